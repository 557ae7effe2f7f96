"""What a release holds is derived again, and what is wrong is said."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from r1export.update.atomic_io import sha256_bytes, write_json
from r1export.update.container import NAMES, plan, write_layout, write_tensors
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.verify.contents import (
    class_problems,
    epsilon_problems,
    manifest_problems,
    part,
    tensor_map_problems,
    weight_problems,
)
from r1export.verify.merge_diagnosis import diagnose

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


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, dict]:
    """A folder with both parameters in one file, the second one transposed, and the manifest's map of them."""
    stored = {
        "attn.in_proj_weight": MERGED["attn.in_proj_weight"],
        "fc.weight": np.ascontiguousarray(MERGED["fc.weight"].T),
    }
    layout = plan((name, value.dtype, value.shape) for name, value in stored.items())
    write_layout(tmp_path / "w.safetensors", layout, lambda spec: stored[spec.name])
    entries = {
        s.name: {"file": "w.safetensors", "offset": s.offset, "bytes": s.nbytes, "dtype": NAMES[s.dtype], "shape": list(s.shape),
                 "transposed": s.name == "fc.weight", "sha256": sha256_bytes(stored[s.name])} for s in layout.specs
    }  # fmt: skip
    return tmp_path, {"tensors": entries, "name": "01-digits", "sequence": 1}


def test_a_release_that_is_base_plus_factors_has_no_problems(release) -> None:
    path, manifest = release
    assert weight_problems(path, manifest, MERGED, UPDATES) == []
    assert tensor_map_problems(path, manifest) == []


def test_the_smallest_change_of_one_weight_is_found(release) -> None:
    path, manifest = release
    expected = copy.deepcopy(MERGED)
    expected["fc.weight"][2, 1] = np.nextafter(expected["fc.weight"][2, 1], np.float32(9))
    problems = weight_problems(path, manifest, expected, UPDATES)
    assert len(problems) == 1
    assert problems[0].startswith("fc.weight is not base + factors: one value differs by")


def test_a_missing_and_a_foreign_parameter_are_named(release) -> None:
    path, manifest = release
    problems = weight_problems(
        path, manifest, {"attn.in_proj_weight": MERGED["attn.in_proj_weight"], "gone": BASE["fc.weight"]}, UPDATES
    )
    assert problems == ["fc.weight is not a parameter of the model", "gone is missing from the weights"]


@pytest.mark.parametrize(
    ("key", "value"), [("offset", 0), ("shape", [4, 5, 1]), ("dtype", "F16"), ("bytes", 4), ("sha256", "0" * 64)]
)
def test_a_map_of_tensors_that_does_not_fit_the_file_is_found(release, key: str, value: object) -> None:
    path, manifest = release
    manifest["tensors"]["fc.weight"][key] = value
    problems = tensor_map_problems(path, manifest)
    assert len(problems) == 1
    assert "fc.weight" in problems[0]


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


def test_a_manifest_is_compared_with_its_own_digest_and_with_the_run() -> None:
    manifest = {"sha256": "a", "name": "01-digits", "golden": {"max_abs": 1}}
    assert manifest_problems(manifest, {"name": "01-digits"}, "a") == []
    assert manifest_problems(manifest, {"name": "01-digits"}, "b") == [
        "manifest.json was edited: its digest of itself does not fit"
    ]
    assert manifest_problems(manifest, {"name": "02"}, "a") == ["manifest.json: name is '01-digits', expected '02'"]


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


def task_of(release: Path) -> tuple[str, list[str], list[str]]:
    listed = json.loads((release / "classes" / "t.json").read_text())
    return "t", listed["classes"], listed["templates"]


def test_class_embeddings_that_fit_have_no_problem_and_stale_ones_do(classes: Path) -> None:
    assert class_problems(classes, [task_of(classes)], embed, 1e-6) == []
    other = lambda prompts: embed([prompt + " " for prompt in prompts])  # noqa: E731
    assert "classes/t.safetensors is stale" in class_problems(classes, [task_of(classes)], other, 1e-6)[0]


def test_a_class_too_many_a_missing_file_and_another_width_are_problems(classes: Path) -> None:
    name, names, templates = task_of(classes)
    assert (
        "has 300 classes, expected 301"
        in class_problems(classes, [(name, [*names, "more"], templates)], embed, 1e-6)[0]
    )
    assert "no such file" in class_problems(classes, [("gone", names, templates)], embed, 1e-6)[0]
    assert (
        "has width 6, the text tower gives 5"
        in class_problems(classes, [task_of(classes)], lambda p: embed(p)[:, :5], 1e-6)[0]
    )


def test_an_epsilon_that_is_not_the_modules_is_named(write_graph) -> None:
    graph = write_graph("base", epsilon=1e-6)
    assert epsilon_problems(graph, {"ones": 1e-6, "other": 1.0}) == []
    assert epsilon_problems(graph, {"ones": 1e-5}) == ["visual.onnx: epsilon of ones is 1e-06, expected 1e-05"]


def test_many_problems_are_cut_and_counted() -> None:
    assert part([], "fine") == {"verdict": "pass", "detail": "fine"}
    assert part([f"p{i}" for i in range(7)], "fine") == {"verdict": "fail", "detail": "p0; p1; p2; p3; p4 (and 2 more)"}
