"""A run in fp16 and int8 beside fp32, by the real command line: written, proved, found faulty, and rebuilt on a device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import RECIPE, SETTINGS, r1export, reseal

from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors, write_tensors
from r1export.verify.parity import GATES

IN_PROJ = "visual.transformer.resblocks.0.attn.in_proj_weight"
PRECISIONS = ("fp16", "int8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    (folder / "recipe.toml").write_text(RECIPE)
    settings = (*SETTINGS, 'export.variants=["fp16", "int8"]')
    sets = [part for setting in settings for part in ("--set", setting)]
    done = r1export("run", folder / "recipe.toml", "--out", folder / "run", *sets)
    assert done.returncode in (0, 4), done.output  # times on a busy machine may decide nothing
    return folder / "run"


@pytest.fixture(scope="module")
def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def releases(run: Path, precision: str) -> list[Path]:
    return sorted((run / "variants" / precision / "releases").iterdir())


def test_every_release_is_there_in_every_precision_with_its_own_manifest(run: Path) -> None:
    for precision in PRECISIONS:
        assert [path.name for path in releases(run, precision)] == ["00-base", "01-digits"]
        for path in releases(run, precision):
            manifest = json.loads((path / "manifest.json").read_text())
            assert manifest["precision"] == precision
            assert all(0 <= task["accuracy"] <= 1 for task in manifest["tasks"])
            assert f"CLIP as ONNX in {precision}" in (path / "README.md").read_text()


def test_parity_contents_and_program_hold_in_every_precision(report: dict) -> None:
    names = [(r["release"]["name"], r["release"]["precision"]) for r in report["releases"]]
    assert names == [(name, p) for p in ("fp32", *PRECISIONS) for name in ("00-base", "01-digits")]
    for release in report["releases"]:
        parts = {**release["contents"], **release["parity"], **release["proof"]}
        assert {part["verdict"] for part in parts.values()} <= {"pass", "not_applicable"}, release["release"]
        assert release["parity"]["export"]["verdict"] == "pass"


def test_variants_err_more_than_fp32_and_are_held_against_their_own_base(report: dict) -> None:
    errors = {f"{r['release']['name']} {r['release']['precision']}": r["parity"]["export"] for r in report["releases"]}
    assert (
        errors["01-digits fp32"]["max_abs"] < errors["01-digits fp16"]["max_abs"] < errors["01-digits int8"]["max_abs"]
    )
    for precision in PRECISIONS:
        control = errors[f"01-digits {precision}"]["control"]["max_abs"]
        assert control == errors[f"00-base {precision}"]["max_abs"]
        factor = GATES[precision].control_factor
        assert errors[f"01-digits {precision}"]["tolerance"] == pytest.approx(factor * control)


def test_the_report_says_what_a_variant_saves_and_costs(run: Path, report: dict) -> None:
    last = report["releases"][-1]["variant"]
    assert sum(last["bytes"].values()) < 0.6 * sum(last["bytes_fp32"].values())
    assert last["speed"]["cpu"]["ratio"] > 0
    assert set(last["accuracy"]) == set(last["accuracy_fp32"]) == {"digits"}
    text = (run / "report.md").read_text()
    assert "## Precision" in text
    assert "| 01-digits int8 |" in text.split("## Precision")[1]


def test_fp16_halves_the_files_and_every_release_shares_its_graphs(run: Path) -> None:
    single = run / "releases/01-digits/visual.safetensors"
    half = run / "variants/fp16/releases/01-digits/visual.safetensors"
    assert half.stat().st_size < 0.51 * single.stat().st_size
    for precision in PRECISIONS:
        for graph in ("visual.onnx", "textual.onnx", "classify.onnx"):
            assert len({sha256_file(path / graph) for path in releases(run, precision)}) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_device_derives_the_bytes_of_the_variant_from_kilobytes(run: Path, precision: str, tmp_path: Path) -> None:
    assert r1export("keygen", tmp_path / "k").returncode == 0
    update, store = tmp_path / "u.r1u", tmp_path / "store"
    base, target = releases(run, precision)
    step = ("--release", 1, "--precision", precision, "--accept-inconclusive")
    made = r1export("bundle", run, *step, "--key", tmp_path / "k.key", "-o", update)
    assert made.returncode == 0, made.output
    assert r1export("device", "init", store, "--base", base, "--trust", tmp_path / "k.pub").returncode == 0
    applied = r1export("device", "apply", store, update)
    assert applied.returncode == 0, applied.output
    for name in ("visual.safetensors", "textual.safetensors"):
        assert sha256_file(store / "current" / name) == sha256_file(target / name)
        assert sha256_file(target / name) != sha256_file(base / name)


def test_an_update_of_one_precision_is_refused_by_a_device_of_another(run: Path, tmp_path: Path) -> None:
    r1export("keygen", tmp_path / "k")
    step = ("--release", 1, "--precision", "int8", "--accept-inconclusive")
    made = r1export("bundle", run, *step, "--key", tmp_path / "k.key", "-o", tmp_path / "u.r1u")
    assert made.returncode == 0, made.output
    r1export("device", "init", tmp_path / "store", "--base", run / "releases/00-base", "--trust", tmp_path / "k.pub")
    refused = r1export("device", "apply", tmp_path / "store", tmp_path / "u.r1u")
    assert refused.returncode == 1, refused.output


@pytest.mark.parametrize("by_itself", [True, False], ids=["release", "run"])
def test_a_doubled_scale_is_found(run: Path, tmp_path: Path, by_itself: bool) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    release = copy / "variants/int8/releases/01-digits"
    tensors = {name: value.copy() for name, value in read_tensors(release / "visual.safetensors").items()}
    tensors[f"{IN_PROJ}.scale"] *= np.float32(2)
    write_tensors(release / "visual.safetensors", tensors)
    reseal(release)
    done = r1export("verify", "--no-latency", release if by_itself else copy)
    assert done.returncode == 1, done.output
    assert ("the visual tower differs by" if by_itself else f"{IN_PROJ}.scale is not base + factors") in done.output


def test_a_variant_that_is_not_in_the_recipe_has_no_releases_to_bundle(run: Path, tmp_path: Path) -> None:
    r1export("keygen", tmp_path / "k")
    bare = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("variants")))
    done = r1export(
        "bundle", bare, "--release", 1, "--precision", "fp16", "--key", tmp_path / "k.key", "-o", tmp_path / "u"
    )
    assert done.returncode == 2
    assert "has 0 releases" in done.output
