"""One property for each kind of fault that a proof can be fooled by."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verify.manifests import manifest_of

from r1export.errors import InputError
from r1export.update.atomic_io import write_json
from r1export.update.container import write_tensors
from r1export.update.golden_samples import PICTURES, SAMPLES, GoldenSamples
from r1export.update.release_manifest import GoldenGate
from r1export.verify import contents
from r1export.verify.client_files import (
    ListedClasses,
    PreprocessConfig,
    _vocabulary_problems,
    byte_letters,
    check_preprocess,
    check_tokenizer,
)
from r1export.verify.golden import check_classifier, check_golden, check_samples, manifest_gate
from r1export.verify.parity import GATES, Embeddings, Gate, compare
from r1export.verify.results import Check, Contents, Latency, Parity, Proof, Rung, Verdict, overall

FIXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ("visual.onnx", "visual.safetensors", "classes/a.json", "classes/b.json", "preprocess.json")


def golden(images: int = SAMPLES, pictures: int = PICTURES, prompts: int = SAMPLES) -> GoldenSamples:
    rng = np.random.default_rng(0)
    pixels, tokens = rng.normal(size=(images, 3, 4, 4)).astype(np.float32), rng.integers(1, 9, (prompts, 5))
    embeds = [rng.normal(size=(count, 6)).astype(np.float32) for count in (images, prompts)]
    shown = tuple(rng.integers(0, 255, (9, 7, 3), np.uint8) for _ in range(pictures))
    return GoldenSamples(pixels, embeds[0], tokens, embeds[1], shown, tuple(map(str, range(prompts))))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A release in which every file is there and says nothing."""
    for folder in ("tokenizer", "classes"):
        (tmp_path / folder).mkdir()
    for name in ("visual", "textual"):
        write_tensors(tmp_path / f"{name}.safetensors", {})
    write_tensors(tmp_path / "golden.safetensors", golden(0, 0, 0).tensors())
    write_json(tmp_path / "tokenizer" / "tokenizer.json", {})
    write_json(tmp_path / "preprocess.json", {})
    return tmp_path


NOTHING: dict[str, Callable[[Path], Check]] = {
    "files": lambda path: contents.check_files(path, manifest_of(path), (), ("golden.safetensors",)),
    "programs": lambda path: contents.check_programs(path, manifest_of(path), ()),
    "epsilons": lambda path: contents.check_epsilons(path, (), {}),
    "tensor map": lambda path: contents.check_tensor_map(path, manifest_of(path), ("visual.safetensors",)),
    "weights": lambda path: contents.check_weights(path, manifest_of(path), {}, []),
    "classes": lambda path: contents.check_class_embeddings(path, [], lambda _: np.zeros((0, 6)), 1.0),
    "a task without classes": lambda path: contents.check_class_embeddings(
        path, [ListedClasses("a", (), (), False)], lambda _: np.zeros((0, 6)), 1.0
    ),
    "same files": lambda path: contents.check_same_files(path, path, (), ""),
    "same places": lambda path: contents.check_same_places(manifest_of(path), manifest_of(path)),
    "preprocessing": lambda path: check_preprocess(path, golden(0, 0, 0), False),
    "tokenizer": lambda path: check_tokenizer(path, golden(0, 0, 0)),
    "classifier": lambda path: check_classifier(path, [], {}),
    "golden samples": lambda path: check_golden(path, manifest_of(path)),
    "kinds of samples": lambda path: check_samples(golden(0, 0, 0).tensors()),
    "parity": lambda path: compare(Embeddings(np.zeros((0, 6)), np.zeros((0, 6))), {}, Gate()),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_a_check_with_nothing_to_look_at_does_not_pass(empty: Path, name: str) -> None:
    assert contents.attempt(lambda: NOTHING[name](empty), of=0).verdict is not Verdict.PASS


@pytest.mark.parametrize("kind", [Check, Parity, Rung, Latency])
@given(looked_at=st.integers(0, 9), of=st.integers(0, 9))
def test_no_type_of_check_can_claim_what_was_not_looked_at(kind: type[Check], looked_at: int, of: int) -> None:
    if looked_at == of > 0:
        return
    with pytest.raises(ValueError, match="a pass that looked at"):
        kind(verdict=Verdict.PASS, looked_at=looked_at, of=of)
    assert kind.judge([], looked_at=looked_at, of=of, detail="").verdict is Verdict.INCONCLUSIVE


def test_nothing_measured_is_no_pass() -> None:
    assert overall([]) is Verdict.INCONCLUSIVE
    assert Contents.only("not measured").verdict is Verdict.INCONCLUSIVE
    assert Proof.unmeasured("not measured").verdict is Verdict.INCONCLUSIVE


@FIXED
@given(gone=st.sets(st.sampled_from(NAMES), min_size=1))
def test_no_file_that_must_be_there_can_be_left_out(tmp_path_factory: pytest.TempPathFactory, gone: set[str]) -> None:
    release = tmp_path_factory.mktemp("release")
    (release / "classes").mkdir()
    kept = tuple(name for name in NAMES if name not in gone)
    for name in kept:
        (release / name).write_text(name)
    assert contents.check_files(release, manifest_of(release, kept), NAMES, ()).verdict is not Verdict.PASS


@FIXED
@given(gone=st.sets(st.sampled_from(("visual.onnx", "textual.onnx", "classify.onnx")), min_size=1))
def test_no_digest_of_a_graph_can_be_left_out(write_graph, gone: set[str], tmp_path_factory) -> None:
    graphs = {"visual.onnx", "textual.onnx", "classify.onnx"}
    manifest = manifest_of(tmp_path_factory.mktemp("none"), graphs=dict.fromkeys(graphs - gone, "0" * 64))
    check = contents.attempt(lambda: contents.check_programs(Path("/nowhere"), manifest, sorted(graphs)), of=3)
    assert check.verdict is not Verdict.PASS


@FIXED
@given(gone=st.sets(st.sampled_from("abcd"), min_size=1), stored_too=st.booleans())
def test_no_tensor_can_be_left_out(tmp_path_factory: pytest.TempPathFactory, gone: set[str], stored_too: bool) -> None:
    release = tmp_path_factory.mktemp("release")
    expected = {name: np.ones((2, 2), np.float32) for name in "abcd"}
    kept = {name: value for name, value in expected.items() if name not in gone}
    write_tensors(release / "w.safetensors", kept if stored_too else expected)
    manifest = manifest_of(release, ("w.safetensors",), ("w.safetensors",))
    manifest = replace(manifest, tensors={name: manifest.tensors[name] for name in kept})
    checks = (
        contents.check_tensor_map(release, manifest, ("w.safetensors",)),
        contents.check_weights(release, manifest, expected, []),
    )
    assert overall(check.verdict for check in checks) is not Verdict.PASS


@given(images=st.integers(0, SAMPLES), prompts=st.integers(0, SAMPLES))
def test_no_golden_sample_can_be_left_out(images: int, prompts: int) -> None:
    whole = images == prompts == SAMPLES
    assert (check_samples(golden(images, 0, prompts).tensors()).verdict is Verdict.PASS) == whole


@given(
    max_abs=st.floats(allow_nan=True), min_cosine=st.floats(allow_nan=True), precision=st.sampled_from(sorted(GATES))
)
def test_no_limit_that_a_release_states_loosens_the_gate(
    tmp_path_factory: pytest.TempPathFactory, max_abs: float, min_cosine: float, precision: str
) -> None:
    stated = manifest_of(Path("/nowhere"), precision=precision, golden=GoldenGate(max_abs, min_cosine))
    gate, ours = manifest_gate(stated), GATES[precision]
    assert gate.max_abs <= ours.max_abs
    assert gate.min_cosine >= ours.min_cosine
    assert (gate.flip_margin, gate.control_factor) == (ours.flip_margin, ours.control_factor)


@given(verdict=st.sampled_from([v for v in Verdict if v is not Verdict.PASS]), error=st.floats(0, 10))
def test_no_neighbour_that_does_not_pass_loosens_the_gate(verdict: Verdict, error: float) -> None:
    of = 0 if verdict is Verdict.NOT_APPLICABLE else 1
    control = Parity(verdict=verdict, looked_at=of, of=of, detail="a reason", max_abs=error, min_cosine=0.0)
    assert all(gate.calibrated(control) == gate for gate in GATES.values())


@given(stored=st.sampled_from(["<f4", "<f2", "|i1"]), precision=st.sampled_from(["fp32", "fp16", "int8"]))
def test_a_release_cannot_choose_the_precision_that_its_gate_follows_from(
    tmp_path_factory: pytest.TempPathFactory, stored: str, precision: str
) -> None:
    release = tmp_path_factory.mktemp("release")
    write_tensors(release / "w.safetensors", {"a": np.ones((2, 2), np.dtype(stored))})
    manifest = manifest_of(
        release, weights=("w.safetensors",), precision=precision, versions={"r1export": "1"}, sequence=1
    )
    fits = {"<f4": "fp32", "<f2": "fp16", "|i1": "int8"}[stored] == precision
    assert (contents.check_manifest(manifest, {}).verdict is Verdict.PASS) == fits


PREPROCESS = {
    "size": [4, 4], "mode": "RGB", "resize_mode": "shortest", "interpolation": "bicubic", "fill_color": 0,
    "scale": 1 / 255, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "layout": "NCHW",
}  # fmt: skip
OTHER = {
    "size": st.tuples(st.integers(-3, 9), st.integers(-3, 9)).map(list), "mode": st.just("L"), "layout": st.just("NHWC"),
    "resize_mode": st.sampled_from(["longest", "squash"]), "interpolation": st.just("bilinear"),
    "scale": st.floats(-2, 2), "mean": st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    "std": st.lists(st.floats(-1, 1), min_size=3, max_size=3),
}  # fmt: skip


@FIXED
@given(st.data())
def test_every_member_of_preprocess_json_is_tried(tmp_path: Path, data: st.DataObject) -> None:
    write_json(tmp_path / "preprocess.json", PREPROCESS)
    config, samples = PreprocessConfig.read(tmp_path), golden()
    values = np.stack([config.apply(p) for p in samples.pictures])
    samples = replace(samples, pixel_values=np.concatenate([values, samples.pixel_values[PICTURES:]]))
    assert check_preprocess(tmp_path, samples, False).verdict is Verdict.PASS
    name = data.draw(st.sampled_from(sorted(OTHER)))
    value = data.draw(OTHER[name])
    old = np.ravel(PREPROCESS[name]) if isinstance(PREPROCESS[name], list | float) else None
    if old is not None and np.abs(np.ravel(value) - old).max() < 1e-3:
        return
    write_json(tmp_path / "preprocess.json", PREPROCESS | {name: value})
    assert contents.attempt(lambda: check_preprocess(tmp_path, samples, False), of=0).verdict is Verdict.FAIL


@FIXED
@given(st.lists(st.integers(0, 519), min_size=2, max_size=2, unique=True))
def test_no_two_entries_of_a_vocabulary_can_be_exchanged(tmp_path: Path, pair: list[int]) -> None:
    first, second = pair
    letters = byte_letters()
    merges = [f"{letters[2 * i]} {letters[2 * i + 1]}" for i in range(8)]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *joined, "<start>", "<end>"]

    def problems() -> list[str]:
        model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        return list(_vocabulary_problems(tmp_path))

    assert not problems()
    tokens[first], tokens[second] = tokens[second], tokens[first]
    assert len(problems()) == 1


@given(st.integers(-3, 0) | st.integers(4097, 2**31), st.booleans())
def test_a_size_that_no_picture_can_have_is_bad_input(side: int, first: bool) -> None:
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "preprocess.json", PREPROCESS | {"size": [side, 4] if first else [4, side]})
        with pytest.raises(InputError, match="expected 1 to 4096 pixels"):
            PreprocessConfig.read(Path(folder))
