"""The command line, run as people run it: exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import dotted
from running import Result, r1export

from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors

ROOT = Path(__file__).parents[1]
FAST = [
    "--set",
    "train.iterations=4",
    "--set",
    "data.test_limit=24",
    "--set",
    "data.shots=4",
    "--set",
    "verify.pairs=20",
    "--set",
    "verify.margin=0.9",
    "--set",
    "verify.samples=6",
]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def in_a_process(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "r1export", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, **options)


def one_line_error(result: Result | subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr + result.stdout
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: "), result.stderr
    assert all(word in line for word in words), line
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_files) -> Path:
    """Two builtin tasks on the tiny random CLIP."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(
        f'[base]\nweights = "{tiny_files[0]}"\nconfig = "{tiny_files[1]}"\n'
        '[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n[[tasks]]\nname = "arrows"\nsource = "builtin:arrows"\n'
        '[probe]\nsource = "builtin:world"\n[train]\ncheckpoint_every = 1\n',
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> tuple[Path, Result]:
    """A whole run of the real command."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, r1export("run", recipe, "--out", out, "--json", *FAST)


def test_the_page_on_formats_lists_the_files_of_a_run_and_no_others(run) -> None:
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    of_a_run, of_a_release = (
        [line.split()[0] for line in part.splitlines() if line.startswith("    ")] for part in page.split("\n## ")[1:3]
    )
    lines = {line for line in of_a_run if line != "releases/NN-NAME/"}
    lines |= {f"releases/NN-NAME/{line}" for line in of_a_release}
    found = set()
    for path in (path.relative_to(run[0]) for path in run[0].rglob("*") if path.is_file()):
        name = re.sub(r"(tasks|releases)/\d\d-\w+", r"\1/NN-NAME", path.as_posix())
        name = re.sub(r"classes/\w+", "classes/TASK", name)
        found.add(re.sub(r"tokenizer/.*", "tokenizer/", name))
    assert found == lines


def test_a_run_ends_with_a_verdict_and_everything_on_disk(run) -> None:
    out, result = run
    report = json.loads(result.stdout)
    assert report["schema"] == "r1export.report/2"
    assert result.returncode == {"pass": 0, "inconclusive": 4}[report["verdict"]], result.stderr
    for release in report["releases"]:  # time on a busy machine may decide nothing; what follows from bytes must hold
        stages = {stage["verdict"] for stage in release["parity"].values()}
        assert stages == ({"pass"} if release["release"]["index"] else {"pass", "not_applicable"})
        assert release["proof"]["same_file"]["verdict"] == release["proof"]["graph"]["verdict"] == "pass"
        assert not any("L5" not in reason for reason in release["reasons"]), release["reasons"]
    assert [r["release"]["name"] for r in report["releases"]] == ["00-base", "01-digits", "02-arrows"]
    for release in ("00-base", "01-digits", "02-arrows"):
        found = {
            path.relative_to(out / "releases" / release).as_posix()
            for path in (out / "releases" / release).rglob("*")
            if path.is_file()
        }
        expected = {
            "visual.onnx",
            "visual.safetensors",
            "textual.onnx",
            "textual.safetensors",
            "classify.onnx",
            "golden.safetensors",
            "preprocess.json",
            "manifest.json",
        }
        assert (
            expected
            | {
                "README.md",
                "report.json",
                "report.md",
                "report.html",
                "classes/digits.safetensors",
                "classes/digits.json",
                "tokenizer/vocab.json",
            }
            <= found
        )
    assert (out / "report.html").exists()
    assert not [path for path in out.rglob("*") if ".partial" in path.name]


def test_all_releases_share_the_bytes_of_every_graph_and_differ_in_their_weights(run) -> None:
    releases = sorted((run[0] / "releases").iterdir())
    for graph in ("visual.onnx", "textual.onnx", "classify.onnx"):
        assert len({sha256_file(release / graph) for release in releases}) == 1
    assert len({sha256_file(release / "visual.safetensors") for release in releases}) == 3


def test_parity_of_all_three_stages_is_reported_within_1e_5(run) -> None:
    report = json.loads(run[1].stdout)
    for release in report["releases"][1:]:
        for stage in ("merge", "export", "total"):
            assert 0 < release["parity"][stage]["max_abs"] < 1e-5
            assert {1, 2, 5} <= set(release["parity"][stage]["batches"])


def test_metrics_hold_a_square_matrix_beside_the_zero_shot_row_and_the_probe(run) -> None:
    metrics = json.loads((run[0] / "metrics.json").read_text())
    assert metrics["tasks"] == ["digits", "arrows"]
    assert np.shape(metrics["accuracy"]) == (2, 2)
    assert len(metrics["zero_shot"]) == 2
    assert len(metrics["probe"]["values"]) == 3
    assert {"transfer", "avg", "last", "forgetting"} <= set(metrics)


def test_metrics_of_a_task_hold_what_training_wrote_and_the_gaps_that_verify_measured(run) -> None:
    gaps = json.loads(run[1].stdout)["gaps"]["tasks"]
    assert gaps.keys() == {"digits", "arrows"}
    for folder, name in (("01-digits", "digits"), ("02-arrows", "arrows")):
        metrics = json.loads((run[0] / "tasks" / folder / "metrics.json").read_text())
        assert metrics["gaps"] == gaps[name]
        assert {"G1", "G2", "G3"} <= metrics["gaps"].keys()
        assert metrics["task"] == name
        assert len(metrics["losses"]) == 4


def test_the_weights_of_a_release_are_the_base_plus_the_factors_in_order(run) -> None:
    from r1export.update.factors import ExpertUpdate

    base = read_tensors(run[0] / "releases/00-base/visual.safetensors")
    tensors = json.loads((run[0] / "releases/00-base/manifest.json").read_text())["tensors"]
    third = len(base["visual.transformer.resblocks.0.attn.in_proj_bias"]) // 3
    packed = tensors["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert packed["rows"] == [[i * third, (i + 1) * third] for i in range(3)]
    straight = {name: value.T if tensors[name]["transposed"] else value for name, value in base.items()}
    updates = [ExpertUpdate.read(run[0] / f"tasks/{name}/factors.safetensors") for name in ("01-digits", "02-arrows")]
    visual = ExpertUpdate(
        {
            rows: pair
            for rows, pair in ExpertUpdate.stack(updates).factors.items()
            if rows.parameter.startswith("visual.")
        }
    )
    merged = visual.apply(straight)
    released = read_tensors(run[0] / "releases/02-arrows/visual.safetensors")
    assert len(merged) == 8
    for name, value in merged.items():
        assert np.array_equal(value.T if tensors[name]["transposed"] else value, released[name])


def test_the_same_seed_gives_the_same_factors_in_another_process(run, recipe, tmp_path) -> None:
    assert in_a_process("train", recipe, "--out", tmp_path / "again", *FAST).returncode == 0
    for factors in (run[0] / "tasks").glob("*/factors.safetensors"):
        assert sha256_file(factors) == sha256_file(tmp_path / "again" / factors.relative_to(run[0]))


def killed(recipe: Path, out: Path, delay: float) -> None:
    """A training run that gets SIGKILL `delay` seconds after its first checkpoint."""
    command = [sys.executable, "-m", "r1export", "train", recipe, "--out", out, *FAST]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and not list(out.glob("tasks/*/checkpoint.safetensors")):
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_killed_inside_a_task_and_resumed_gives_the_factors_of_the_uninterrupted_run(
    run, recipe, tmp_path
) -> None:
    out = tmp_path / "killed"
    killed(recipe, out, 0)
    assert list(out.glob("tasks/*/checkpoint.safetensors")), "killed too late to be inside a task"
    assert not (out / "metrics.json").exists()
    assert r1export("train", recipe, "--out", out, "--resume", *FAST).returncode == 0
    for factors in (run[0] / "tasks").glob("*/factors.safetensors"):
        assert sha256_file(factors) == sha256_file(out / factors.relative_to(run[0]))


@pytest.mark.skipif(os.environ.get("R1EXPORT_SWEEP") != "full", reason="takes minutes: R1EXPORT_SWEEP=full runs it")
def test_twenty_runs_killed_at_random_points_end_with_the_same_factors(run, recipe, tmp_path) -> None:
    delays, inside = np.random.default_rng(0).uniform(0, 0.6, 20), 0
    for number, delay in enumerate(delays):
        out = tmp_path / str(number)
        killed(recipe, out, float(delay))
        inside += not (out / "metrics.json").exists()
        assert r1export("train", recipe, "--out", out, "--resume", *FAST).returncode == 0
        for factors in (run[0] / "tasks").glob("*/factors.safetensors"):
            assert sha256_file(factors) == sha256_file(out / factors.relative_to(run[0]))
    assert inside > 5, "most were killed after the end"


def test_a_full_disk_in_the_middle_of_a_release_leaves_no_release(recipe, run, tmp_path) -> None:
    """No file may grow beyond 1 MB: the graphs fit, the text tower's weights (3.2 MB) do not."""
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/releases")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    one_line_error(
        in_a_process("export", tmp_path / "run", preexec_fn=limit),
        3,
        "cannot write ",
        "File too large",
        "check disk space",
    )
    assert list((tmp_path / "run/releases").rglob("*")) == []


def test_verify_of_one_release_needs_no_run(run, tmp_path) -> None:
    shutil.copytree(run[0] / "releases/01-digits", tmp_path / "fielded")
    result = r1export("verify", tmp_path / "fielded", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parity"]["export"]["verdict"] == "pass"


def test_a_release_with_one_changed_byte_fails_with_the_name_of_the_file(run, tmp_path) -> None:
    release = tmp_path / "fielded"
    shutil.copytree(run[0] / "releases/01-digits", release)
    data = bytearray((release / "visual.safetensors").read_bytes())
    data[-7] ^= 1
    (release / "visual.safetensors").write_bytes(data)
    result = r1export("verify", release)
    assert result.returncode == 1
    assert "visual.safetensors" in result.stdout
    assert "Traceback" not in result.stderr


def test_an_existing_run_is_neither_touched_nor_continued_unasked(run, recipe) -> None:
    before = (run[0] / "metrics.json").stat().st_mtime_ns
    one_line_error(
        r1export("run", recipe, "--out", run[0], *FAST), 2, "a run already exists", "--resume", "--overwrite"
    )
    one_line_error(
        r1export("run", recipe, "--out", run[0], "--resume", *FAST, "--set", "train.seed=7"),
        2,
        "train.seed is 42, now 7",
    )
    assert (run[0] / "metrics.json").stat().st_mtime_ns == before


def test_a_folder_that_is_no_run_is_never_deleted(recipe, tmp_path) -> None:
    (tmp_path / "photo.jpg").write_text("precious")
    one_line_error(
        r1export("run", recipe, "--out", tmp_path, "--overwrite"), 2, "not empty and not a run", "nothing was modified"
    )
    assert (tmp_path / "photo.jpg").read_text() == "precious"


def photos(folder: Path, classes: dict[str, int]) -> Path:
    for split in ("train", "test"):
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                dotted((40 * i, 40 * i, 40 * i), (20, 20)).save(folder / split / name / f"{i}.png")
    return folder


def with_source(recipe: Path, tmp_path: Path, source: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(recipe.read_text().replace("builtin:digits", source))
    return path


BAD_TASKS = {
    "a missing folder": (lambda p: f"folder:{p}/none", ["none"]),
    "a one-class task": (lambda p: f"folder:{photos(p / 'one', {'cat': 2})}", ["one"]),
    "an empty class": (lambda p: f"folder:{photos(p / 'empty', {'cat': 2, 'dog': 0, 'hen': 2})}", ["dog"]),
    "an unknown builtin": (lambda p: "builtin:nonsense", ["nonsense", "digits"]),
    "an unknown kind of source": (lambda p: "ftp:x", ["ftp"]),
    "a variable that is not set": (lambda p: "npz:${R1EXPORT_NOWHERE}/x.npz", ["R1EXPORT_NOWHERE"]),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_task_that_cannot_be_learned_is_refused_before_anything_is_written(name: str, recipe, tmp_path) -> None:
    source, words = BAD_TASKS[name]
    result = r1export("run", with_source(recipe, tmp_path, source(tmp_path)), "--out", tmp_path / "out", *FAST)
    one_line_error(result, 2, *words)
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_is_named(recipe, tmp_path) -> None:
    folder = photos(tmp_path / "photos", {"cat": 3, "dog": 3})
    (folder / "train/dog/1.png").write_bytes(b"no image")
    result = r1export("run", with_source(recipe, tmp_path, f"folder:{folder}"), "--out", tmp_path / "out", *FAST)
    one_line_error(result, 2, "1.png")


def test_a_tower_without_the_blocks_that_are_named_is_unsupported(recipe, tmp_path) -> None:
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    import open_clip
    from safetensors.torch import save_file

    (tmp_path / "resnet.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "w.safetensors")
    result = r1export(
        "run",
        recipe,
        "--out",
        tmp_path / "out",
        "--set",
        f"base.weights={tmp_path}/w.safetensors",
        "--set",
        f"base.config={tmp_path}/resnet.json",
        "--set",
        "pool.layers=[9]",
        *FAST,
    )
    one_line_error(result, 3, "the visual tower has 5 blocks, pool.layers contains 9")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train.iterationz=3"], "train.iterationz"),
        (["train.iterations=many"], "train.iterations"),
        (["base.weights=/none/w.safetensors"], "/none/w.safetensors"),
    ],
)
def test_wrong_overrides_are_refused_by_the_name_of_the_field(arguments, word: str, recipe, tmp_path) -> None:
    one_line_error(r1export("run", recipe, "--out", tmp_path / "out", "--set", *arguments), 2, word)


def test_verify_export_report_and_inspect_say_what_they_need(tmp_path) -> None:
    for command in ("verify", "export", "inspect"):
        one_line_error(r1export(command, tmp_path), 2, "not a run")
    one_line_error(r1export("report", tmp_path), 2, "recreate it with r1export verify")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", ["digits", "arrows"]),
        ("releases/01-digits", ["visual.onnx"]),
        ("tasks/01-digits/factors.safetensors", ["adapted linears: 24", "experts per linear: 1 to "]),
        ("releases/00-base/classify.onnx", ["class_embeds", "opset"]),
        ("recipe.toml", ["train.iterations", "4", "tasks.2.source", "builtin:arrows", "probe.source"]),
    ],
)
def test_inspect_knows_every_kind_of_file(path: str, words: list[str], run) -> None:
    result = r1export("inspect", run[0] / path)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in words), result.stdout


def test_a_manifest_of_nothing_but_its_format_is_refused_by_what_is_missing(tmp_path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "r1export.release/1"}')
    one_line_error(r1export("inspect", tmp_path), 2, "manifest.json.name is missing")


@pytest.mark.parametrize("verb", ["report", "verify", "inspect", "export"])
def test_an_error_is_one_json_document_too(verb: str, tmp_path) -> None:
    result = r1export(verb, tmp_path, "--json")
    one_line_error(result, 2)
    found = json.loads(result.stdout)
    assert found.keys() == {"error", "exit_code"}
    assert found["exit_code"] == 2
    message, remedy = (found["error"][part] for part in ("message", "remedy"))
    assert result.stderr.strip() == f"Error: {message} ({remedy})"
    assert r1export(verb, tmp_path).stdout == ""


def test_an_interrupted_command_says_so_to_machines_as_well(tmp_path, monkeypatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("r1export.inspection.describe", interrupt)
    result = r1export("inspect", tmp_path, "--json")
    one_line_error(result, 130, "interrupted by SIGINT (continue a run with --resume)")
    assert json.loads(result.stdout)["exit_code"] == 130


def test_report_shows_the_verdict_again_without_measuring(run) -> None:
    result = r1export("report", run[0])
    assert result.returncode == 0
    assert f"Verdict: {json.loads(run[1].stdout)['verdict']}" in result.stdout


def test_doctor_finds_this_environment_fit() -> None:
    result = r1export("doctor", "--json")
    assert result.returncode == 0, result.stdout
    assert {f["check"] for f in json.loads(result.stdout)["findings"]} >= {"torch", "onnxruntime runs a graph"}


def test_doctor_names_a_fault_that_says_nothing_of_itself(monkeypatch) -> None:
    def fail() -> str:
        raise AssertionError

    monkeypatch.setattr("r1export.inspection._try_disk", fail)
    result = r1export("doctor", "--json")
    assert result.returncode == 3
    assert {"check": "disk", "found": "AssertionError", "verdict": "fail"} in json.loads(result.stdout)["findings"]


def test_help_loads_no_torch() -> None:
    code = """
import sys, r1export.cli as c
try: c.app(['--help'])
except SystemExit: pass
heavy = ('torch', 'onnx', 'numpy', 'pydantic', 'open_clip')
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == "[]"
    assert "verify" in result.stdout


def test_a_device_that_takes_the_updates_holds_the_released_bytes_and_a_version_without_a_task_verifies(
    run, tmp_path
) -> None:
    def must(*arguments: object) -> Result:
        result = r1export(*arguments)
        assert result.returncode == 0, result.stderr
        return result

    out, store, keys = run[0], tmp_path / "store", tmp_path / "fleet"
    must("keygen", keys)
    assert (tmp_path / "fleet.key").stat().st_mode & 0o777 == 0o600
    for number in (1, 2):
        must(
            "bundle",
            out,
            "--release",
            number,
            "--since",
            number - 1,
            "--accept-inconclusive",  # times on a busy machine may decide nothing
            "--key",
            f"{keys}.key",
            "-o",
            tmp_path / f"{number}.r1u",
        )
    must(
        "bundle",
        out,
        "--release",
        2,
        "--drop",
        "digits",
        "--seq",
        9,
        "--accept-inconclusive",
        "--key",
        f"{keys}.key",
        "-o",
        tmp_path / "dropped.r1u",
    )
    made = sha256_file(tmp_path / "1.r1u")
    again = r1export("bundle", out, "--release", 2, "--key", f"{keys}.key", "-o", tmp_path / "1.r1u")
    one_line_error(again, 2, "exists")
    assert sha256_file(tmp_path / "1.r1u") == made
    must("device", "init", store, "--base", out / "releases/00-base", "--trust", f"{keys}.pub")
    for number, name in ((1, "01-digits"), (2, "02-arrows")):
        must("device", "apply", store, tmp_path / f"{number}.r1u")
        for file in (
            "visual.safetensors",
            "textual.safetensors",
            "golden.safetensors",
            "classes/arrows.safetensors",
            "manifest.json",
        ):
            assert sha256_file(store / "current" / file) == sha256_file(out / "releases" / name / file)
    assert (tmp_path / "2.r1u").stat().st_size < 0.05 * (store / "current/visual.safetensors").stat().st_size + 100_000
    one_line = r1export("device", "apply", store, tmp_path / "1.r1u")
    assert (one_line.returncode, "Traceback" in one_line.stderr) == (1, False)
    must("device", "apply", store, tmp_path / "dropped.r1u")
    assert json.loads(must("verify", store / "current", "--json").stdout)["verdict"] == "pass"
    must("device", "doctor", store)
    shown = must("inspect", tmp_path / "2.r1u").stdout
    assert all(word in shown for word in ("seq", "signed by", "visual.safetensors")), shown
    assert re.search(r"arrows, \d+ experts", shown)


@pytest.mark.parametrize("arguments", [("keygen", "missing/fleet"), ("device-kit", "-o", "missing/kit.pyz")])
def test_a_folder_that_is_not_there_is_an_error_of_the_user(arguments, tmp_path) -> None:
    result = r1export(*arguments[:-1], tmp_path / arguments[-1])
    one_line_error(result, 2, "missing")
    assert list(tmp_path.iterdir()) == []
