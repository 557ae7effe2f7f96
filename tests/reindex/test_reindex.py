"""Vectors of a collection: embedded, resumed, and embedded again as far as the verdict says."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from layout.conftest import PYTHON
from PIL import Image
from running import r1export, reseal

from r1export.errors import InputError
from r1export.reindex.run import Job, list_pictures, open_release, reindex
from r1export.reindex.vectors import read_vectors
from r1export.update.container import read_tensors, write_tensors
from r1export.verify.client_files import PreprocessConfig

PICTURES = 70  # two batches and a part


def draw(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    plane = rng.integers(0, 255, (5, 6, 3), np.uint8)
    return Image.fromarray(plane).resize((60 + index % 7, 50), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A collection with a picture that cannot be read and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for index in range(PICTURES):
        draw(index).save(folder / ("below" if index % 3 else ".") / f"{index:03d}.png")
    (folder / "040b.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture\n")
    return folder


def job_of(release: Path, photos: Path, **changes) -> Job:
    opened, space = open_release(release)
    return replace(Job(opened, space, list_pictures([photos])), **changes)


def embedded_by_hand(release: Path, paths) -> np.ndarray:
    config = PreprocessConfig.read(release)
    session = ort.InferenceSession(release / "visual.onnx", providers=["CPUExecutionProvider"])
    rows = [config.apply(np.asarray(Image.open(path).convert("RGB")))[None] for path in paths]
    return np.concatenate([session.run(None, {"pixel_values": row})[0] for row in rows])


@pytest.fixture(scope="module")
def indexed(lab, photos, tmp_path_factory) -> Path:
    """Vectors of the base release."""
    out = tmp_path_factory.mktemp("index") / "base.npy"
    reindex(job_of(lab.release(0), photos), out)
    return out


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_every_picture_gets_the_vector_that_the_release_gives_it(lab, photos, tmp_path, suffix) -> None:
    out = tmp_path / f"vectors.{suffix}"
    done = r1export("reindex", photos, "--release", lab.release(1), "--out", out, "--workers", 0, "--json")
    assert done.returncode == 0, done.output
    document = json.loads(done.stdout)
    assert (document["rows"], document["embedded"]) == (PICTURES, PICTURES + 1)
    assert list(document["skipped"]) == [str(photos / "040b.jpg")]
    found = read_vectors(out)
    assert found.info.release == "01-digits"
    assert list(found.info.paths) == sorted(str(path) for path in photos.rglob("*.png"))
    np.testing.assert_allclose(found.values, embedded_by_hand(lab.release(1), found.info.paths), atol=2e-6)
    described = {f"{out.name}.json"} if suffix == "npy" else set()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, *described}


def test_worker_processes_give_the_same_bits(lab, photos, indexed, tmp_path) -> None:
    reindex(job_of(lab.release(0), photos, workers=2), tmp_path / "other.npy")
    assert (tmp_path / "other.npy").read_bytes() == indexed.read_bytes()


def test_killed_and_started_again_it_gives_the_same_file(lab, photos, indexed, tmp_path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom reindex.test_reindex import job_of\nfrom r1export.reindex import progress, run\n"
        "progress.RECORD_SECONDS = 0\n"
        "run.reindex(job_of(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]), advance=lambda *_: time.sleep(0.5))\n"
    )
    out = tmp_path / "out.npy"
    command = [sys.executable, "-c", code, str(lab.release(0)), str(photos), str(out)]
    paths = f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"
    with subprocess.Popen(command, env={"PYTHONPATH": paths, "PATH": "/usr/bin"}) as process:
        record, end = tmp_path / ".out.npy.progress/progress.json", time.monotonic() + 60
        while not record.exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    with (tmp_path / ".out.npy.progress/vectors.f32").open("ab") as file:
        file.write(b"half a row")
    done = reindex(job_of(lab.release(0), photos), out)
    assert 0 < done.resumed < PICTURES
    assert out.read_bytes() == indexed.read_bytes()
    assert json.loads(out.with_name("out.npy.json").read_text()) == json.loads(
        indexed.with_name("base.npy.json").read_text()
    )
    assert not (tmp_path / ".out.npy.progress").exists()


def test_what_is_there_of_another_job_is_not_gone_on_with(lab, photos, tmp_path) -> None:
    folder = tmp_path / ".out.npy.progress"
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps({"job": "0" * 64, "rows": 32}))
    (folder / "vectors.f32").write_bytes(b"\x00" * 32 * 128 * 4)
    assert reindex(job_of(lab.release(0), photos), tmp_path / "out.npy").resumed == 0


def test_another_release_embeds_all_pictures_again_where_the_report_says_so(lab, photos, indexed, tmp_path) -> None:
    done = reindex(job_of(lab.release(1), photos), tmp_path / "new.npy", old=indexed)
    drift = json.loads((lab.release(1) / "report.json").read_text())["compatible_with"][0]
    assert done.verdict == drift["reindex"]
    assert (done.kept == 0) == (done.verdict != "not needed")


@pytest.fixture
def text_only(lab, tmp_path) -> Path:
    """A release whose text tower alone is another one."""
    release = Path(shutil.copytree(lab.release(0), tmp_path / "release"))
    tensors = read_tensors(release / "textual.safetensors")
    tensors["text_projection"] = tensors["text_projection"] * 1.5
    write_tensors(release / "textual.safetensors", tensors)
    reseal(release)
    return release


def test_a_change_of_the_text_tower_alone_embeds_no_picture_again(photos, indexed, text_only, tmp_path) -> None:
    done = reindex(job_of(text_only, photos), tmp_path / "new.npy", old=indexed)
    assert (done.embedded, done.kept) == (1, PICTURES)  # the one that cannot be read is tried again
    assert (tmp_path / "new.npy").read_bytes() == indexed.read_bytes()
    info = read_vectors(tmp_path / "new.npy").info
    assert info.kept == {info.space.image: PICTURES}


def test_pictures_that_are_new_are_embedded_and_the_others_kept(lab, photos, indexed, tmp_path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    draw(500).save(more / "new.png")
    job = replace(job_of(lab.release(0), photos), paths=list_pictures([photos, more]))
    done = reindex(job, tmp_path / "out.npy", old=indexed)
    assert (done.embedded, done.kept, done.rows) == (2, PICTURES, PICTURES + 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "vectors.csv"), 2, "unsupported suffix .csv"),
        (("--out", "there.npy"), 2, "there.npy exists"),
        (("--out", "new.npy", "--from", "there.npy"), 2, "there.npy: not a file of r1export vectors"),
    ],
)
def test_bad_input_is_one_line(lab, photos, tmp_path, monkeypatch, arguments, code, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.npy").write_bytes(b"nothing")
    done = r1export("reindex", photos, "--release", lab.release(0), *arguments, "--workers", 0)
    assert done.returncode == code
    assert message in done.stderr
    assert Path("there.npy").read_bytes() == b"nothing"


def test_a_folder_without_pictures_is_one_line(lab, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    done = r1export("reindex", tmp_path / "empty", "--release", lab.release(0), "--out", tmp_path / "x.npy")
    assert done.returncode == 2
    assert "no images found" in done.stderr


def snippets() -> list[str]:
    page = (Path(__file__).parents[2] / "docs/search.md").read_text(encoding="utf-8")
    return [part.partition("```")[0] for part in page.split("```python\n")[1:]]


def run_snippet(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    if not PYTHON.exists():
        pytest.skip("no qdrant-client: python scripts/layout_clients.py")
    command = [str(PYTHON), "-c", snippets()[number], *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_numpy_example_searches_and_refuses_vectors_of_another_space(lab, photos, indexed, tmp_path) -> None:
    found = run_snippet(0, lab.release(0), indexed, "a photo of stripes")
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 5
    refused = run_snippet(0, lab.release(1), indexed, "a photo of stripes")
    assert refused.returncode == 1
    assert "r1export reindex" in refused.stderr


def test_the_qdrant_example_searches_before_and_after_an_update(lab, photos, indexed, tmp_path) -> None:
    new = tmp_path / "new.npy"
    reindex(job_of(lab.release(1), photos), new)
    before = run_snippet(1, lab.release(0), indexed, "a photo of stripes", tmp_path / "store")
    assert before.returncode == 0, before.stderr
    after = run_snippet(1, lab.release(1), new, "a photo of stripes", tmp_path / "store")
    assert after.returncode == 0, after.stderr
    expected = [run_snippet(0, lab.release(n), file, "a photo of stripes") for n, file in ((0, indexed), (1, new))]
    assert [before.stdout, after.stdout] == [done.stdout for done in expected]


def test_a_list_that_is_not_utf8_is_named(tmp_path) -> None:
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(InputError, match=r"list\.txt: not UTF-8 at byte 3"):
        list_pictures([tmp_path / "list.txt"])
