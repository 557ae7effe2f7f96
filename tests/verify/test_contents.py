"""What a release holds is derived again, and what is wrong is said."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verify.manifests import manifest_of

from r1export.update.atomic_io import write_json
from r1export.update.container import plan, read_tensors, write_layout, write_tensors
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.client_files import ListedClasses
from r1export.verify.contents import (
    check_class_embeddings,
    check_epsilons,
    check_files,
    check_manifest,
    check_programs,
    check_tensor_map,
    check_weights,
)  # fmt: skip
from r1export.verify.graph_digest import graph_digest
from r1export.verify.merge_diagnosis import diagnose
from r1export.verify.results import Check

RNG = np.random.default_rng(0)
BASE = {
    "attn.in_proj_weight": RNG.normal(size=(12, 4)).astype(np.float32),
    "fc.weight": RNG.normal(size=(5, 4)).astype(np.float32),
}


def factors(rows: int) -> Factors:
    return Factors((0.1 * RNG.normal(size=(rows, 2))).astype(np.float32), RNG.normal(size=(2, 4)).astype(np.float32))


UPDATE = ExpertUpdate(
    {
        Rows("attn.in_proj_weight", 0, 4): factors(4),
        Rows("attn.in_proj_weight", 4, 8): factors(4),
        Rows("fc.weight", 0, 5): factors(5),
    }
)
MERGED = BASE | UPDATE.apply(BASE)
UPDATES = [("digits", UPDATE)]


def added(name: str, expert: int | None = None) -> np.ndarray:
    total = np.zeros_like(BASE[name])
    for rows, pair in UPDATE.factors.items():
        if rows.parameter == name:
            chosen = slice(None) if expert is None else slice(expert, expert + 1)
            total[rows.start : rows.stop] += pair.u[:, chosen] @ pair.v[chosen]
    return total


WEIGHTS = ("w.safetensors",)


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, ReleaseManifest]:
    """A folder with both parameters in one file, the second one transposed, and its manifest."""
    stored = {
        "attn.in_proj_weight": MERGED["attn.in_proj_weight"],
        "fc.weight": np.ascontiguousarray(MERGED["fc.weight"].T),
    }
    layout = plan((name, value.dtype, value.shape) for name, value in stored.items())
    write_layout(tmp_path / "w.safetensors", layout, lambda spec: stored[spec.name])
    manifest = manifest_of(tmp_path, WEIGHTS, WEIGHTS)
    return tmp_path, with_tensor(manifest, "fc.weight", transposed=True, rows=((0, 5),))


def with_tensor(manifest: ReleaseManifest, name: str, **fields) -> ReleaseManifest:
    return replace(manifest, tensors=manifest.tensors | {name: replace(manifest.tensors[name], **fields)}).sealed()


def test_a_release_that_is_base_plus_factors_passes(release) -> None:
    path, manifest = release
    weights, tensors = check_weights(path, manifest, MERGED, UPDATES), check_tensor_map(path, manifest, WEIGHTS)
    assert (weights.verdict, weights.looked_at, weights.of) == ("pass", 2, 2)
    assert (tensors.verdict, tensors.looked_at, tensors.of) == ("pass", 2, 2)


def test_the_smallest_change_of_one_weight_is_found(release) -> None:
    path, manifest = release
    expected = copy.deepcopy(MERGED)
    expected["fc.weight"][2, 1] = np.nextafter(expected["fc.weight"][2, 1], np.float32(9))
    check = check_weights(path, manifest, expected, UPDATES)
    assert check.verdict == "fail"
    assert check.detail.startswith("fc.weight is not base + factors: one value differs by")


def test_a_missing_and_a_foreign_parameter_are_named(release) -> None:
    path, manifest = release
    expected = {"attn.in_proj_weight": MERGED["attn.in_proj_weight"], "gone": BASE["fc.weight"]}
    check = check_weights(path, manifest, expected, UPDATES)
    assert check.detail == "fc.weight is not a parameter of the model; gone is missing from the weights"


@pytest.mark.parametrize(
    ("field", "value"), [("offset", 0), ("shape", (4, 5, 1)), ("dtype", np.dtype("<f2")), ("sha256", "0" * 64), ("file", "x.safetensors")]
)  # fmt: skip
def test_a_tensor_map_that_does_not_fit_the_file_is_found(release, field: str, value: object) -> None:
    path, manifest = release
    check = check_tensor_map(path, with_tensor(manifest, "fc.weight", **{field: value}), WEIGHTS)
    assert check.verdict == "fail"
    assert "fc.weight" in check.detail


@pytest.mark.parametrize("gone", [["fc.weight"], ["fc.weight", "attn.in_proj_weight"]])
def test_a_tensor_that_the_map_leaves_out_is_found(release, gone: list[str]) -> None:
    path, manifest = release
    kept = {name: entry for name, entry in manifest.tensors.items() if name not in gone}
    check = check_tensor_map(path, replace(manifest, tensors=kept), WEIGHTS)
    assert check.verdict == "fail"
    assert "fc.weight in w.safetensors is not in the manifest's tensor map" in check.detail


def test_weights_that_are_not_finite_are_found(tmp_path: Path) -> None:
    values = {"a": np.array([1, np.nan], np.float32), "b": np.ones(2, np.float32)}
    write_tensors(tmp_path / "w.safetensors", values)
    check = check_tensor_map(tmp_path, manifest_of(tmp_path, WEIGHTS, WEIGHTS), WEIGHTS)
    assert check.detail == "a in w.safetensors has NaN or Inf"


def test_weights_without_a_single_tensor_do_not_pass(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", {})
    manifest = manifest_of(tmp_path, WEIGHTS, WEIGHTS)
    assert check_tensor_map(tmp_path, manifest, WEIGHTS).verdict != "pass"
    assert check_weights(tmp_path, manifest, {}, []).verdict != "pass"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("fc.weight", lambda w: w + added("fc.weight"), "the update of task digits is merged 2 times"),
        ("fc.weight", lambda w: w + 2 * added("fc.weight"), "the update of task digits is merged 3 times"),
        ("fc.weight", lambda w: BASE["fc.weight"], "the update of task digits is missing"),
        ("fc.weight", lambda w: w + added("fc.weight", 1), "expert 1 of task digits in rows 0:5 is merged 2 times"),
        ("fc.weight", lambda w: w - added("fc.weight", 0), "expert 0 of task digits in rows 0:5 is missing"),
        (
            "attn.in_proj_weight",
            lambda w: w[[4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11]],
            "its rows are in the order k, q, v instead of q, k, v",
        ),
        ("fc.weight", lambda w: np.where(np.eye(5, 4, dtype=bool), np.nan, w), "it has NaN or Inf"),
        ("fc.weight", lambda w: w + 1, "20 of 20 values differ, by 1 at most"),
    ],
)
def test_the_known_ways_of_merging_wrongly_are_recognised(name: str, change, said: str) -> None:
    assert said in diagnose(name, change(MERGED[name]).astype(np.float32), MERGED[name], UPDATES)


def test_a_difference_of_another_kind_is_not_explained_away() -> None:
    noise = MERGED["fc.weight"] + RNG.normal(size=(5, 4)).astype(np.float32)
    assert ";" not in diagnose("fc.weight", noise, MERGED["fc.weight"], UPDATES)


def test_a_manifest_is_compared_with_its_own_digest_and_with_the_run(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    assert check_manifest(manifest, {"name": "01-digits"}).verdict == "pass"
    edited = check_manifest(replace(manifest, procedure="r2"), {})
    assert (edited.verdict, edited.detail) == ("fail", "manifest.json was edited: self-digest mismatch")
    assert check_manifest(manifest, {"name": "02"}).detail == "manifest.json: name is '01-digits', expected '02'"


def test_a_changed_a_missing_a_linked_and_an_added_file_are_named(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    manifest = manifest_of(tmp_path, ("a", "b", "c"))
    assert check_files(tmp_path, manifest, ("a", "b"), ()).verdict == "pass"
    (tmp_path / "a").write_text("z")  # as long as it was
    (tmp_path / "b").unlink()
    (tmp_path / "c").rename(tmp_path / "more.txt")
    (tmp_path / "c").symlink_to(tmp_path / "more.txt")
    (tmp_path / "folder").symlink_to(tmp_path)
    assert check_files(tmp_path, manifest, (), ()).detail == (
        "a was modified; b is missing; c is a link; folder is a link; more.txt is not listed in the manifest"
    )
    assert "more.txt" not in check_files(tmp_path, manifest, (), ("more.txt",)).detail


def test_a_file_that_every_release_has_must_be_listed(tmp_path: Path) -> None:
    assert check_files(tmp_path, manifest_of(tmp_path), (), ()).verdict == "inconclusive"
    check = check_files(tmp_path, manifest_of(tmp_path), ("visual.onnx",), ())
    assert (check.verdict, check.of, check.detail) == ("fail", 1, "visual.onnx is not listed in the manifest")


def test_every_graph_has_to_have_its_digest_in_the_manifest(write_graph) -> None:
    path = write_graph("release").parent
    digest = graph_digest(path / "visual.onnx")
    graphs = ("visual.onnx",)
    assert check_programs(path, manifest_of(path, graphs={"visual.onnx": digest}), graphs).verdict == "pass"
    assert check_programs(path, manifest_of(path, graphs={"visual.onnx": "0" * 64}), graphs).verdict == "fail"
    assert check_programs(path, manifest_of(path, graphs={}), graphs).verdict == "fail"


def embed(prompts: list[str]) -> np.ndarray:
    """A text tower that is a hash."""
    values = np.array([np.random.default_rng(sum(map(ord, prompt)) * len(prompt)).normal(size=6) for prompt in prompts])
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    (tmp_path / "classes").mkdir()
    names, templates = [f"class {i}" for i in range(300)], ["a {}.", "the {}!"]
    means = embed([t.format(n) for n in names for t in templates]).reshape(300, 2, 6).mean(1)
    write_tensors(
        tmp_path / "classes" / "t.safetensors",
        {"class_embeds": (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)},
    )
    write_json(tmp_path / "classes" / "t.json", {"classes": names, "templates": templates})
    return tmp_path


def class_list(release: Path) -> ListedClasses:
    listed = json.loads((release / "classes" / "t.json").read_text())
    return ListedClasses("t", tuple(listed["classes"]), tuple(listed["templates"]), False)


def judged(release: Path, classes: ListedClasses, embed=embed) -> Check:
    return check_class_embeddings(release, [classes], embed, 1e-6)


def test_class_embeddings_that_fit_pass_and_stale_ones_fail(classes: Path) -> None:
    check = judged(classes, class_list(classes))
    assert (check.verdict, check.looked_at, check.of) == ("pass", 300, 300)
    other = lambda prompts: embed([prompt + " " for prompt in prompts])  # noqa: E731
    assert "classes/t.safetensors is stale" in judged(classes, class_list(classes), other).detail


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(0, 299), value=st.sampled_from([0.0, np.nan, np.inf]))
def test_every_single_row_is_looked_at(classes: Path, row: int, value: float) -> None:
    file = classes / "classes" / "t.safetensors"
    whole = file.read_bytes()
    embeddings = read_tensors(file)["class_embeds"].copy()
    embeddings[row] = value
    write_tensors(file, {"class_embeds": embeddings})
    check = judged(classes, class_list(classes))
    file.write_bytes(whole)
    assert check.verdict == "fail"
    assert f"'class {row}'" in check.detail


def test_a_class_too_many_a_missing_file_and_another_width_fail(classes: Path) -> None:
    listed = class_list(classes)
    more = replace(listed, classes=(*listed.classes, "more"))
    assert "has 300 classes, expected 301" in judged(classes, more).detail
    assert "no such file" in judged(classes, replace(listed, task="gone")).detail
    narrow = judged(classes, listed, lambda prompts: embed(prompts)[:, :5])
    assert "has width 6, the text tower gives 5" in narrow.detail


def test_no_tasks_do_not_pass(classes: Path) -> None:
    assert check_class_embeddings(classes, [], embed, 1e-6).verdict == "inconclusive"


def test_an_epsilon_that_is_not_the_modules_is_named(write_graph) -> None:
    folder = write_graph("base", epsilon=1e-6).parent
    graphs = ("visual.onnx",)
    assert check_epsilons(folder, graphs, {"ones": 1e-6}).verdict == "pass"
    assert check_epsilons(folder, graphs, {"ones": 1e-5}).detail == "epsilon of ones is 1e-06, expected 1e-05"
    incomplete = check_epsilons(folder, graphs, {"ones": 1e-6, "other": 1.0})
    assert (incomplete.verdict, incomplete.looked_at, incomplete.of) == ("inconclusive", 1, 2)
