"""A release by itself: its files, and its golden samples in the real onnxruntime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from verify.manifests import manifest_of

from r1export.errors import CheckFailed, InputError
from r1export.update.container import read_tensors, write_tensors
from r1export.update.release_manifest import GoldenGate, ReleaseManifest
from r1export.verify import golden
from r1export.verify.golden import (
    CHANGES,
    GoldenRuns,
    check_classifier,
    check_golden,
    golden_parity,
    manifest_gate,
    smallest_noticed,
)
from r1export.verify.parity import GATES, Gate
from r1export.verify.results import Check
from r1export.verify.runtimes.runtime import onnx_model, open_session, runner

ENTRIES = {"visual": "pixel_values", "textual": "input_ids"}


@pytest.fixture
def release(write_graph) -> tuple[Path, ReleaseManifest]:
    """A folder whose two towers are the small graph, under the names of the inputs of a CLIP."""
    path = write_graph("release").parent
    original = onnx.load(path / "visual.onnx", load_external_data=False)
    for name, entry in ENTRIES.items():
        model = onnx.ModelProto.FromString(original.SerializeToString())
        model.graph.input[0].name = model.graph.node[0].input[0] = entry
        (path / f"{name}.onnx").write_bytes(model.SerializeToString())
    inputs = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    outputs = [runner(open_session(path / f"{name}.onnx"))({entry: inputs}) for name, entry in ENTRIES.items()]
    write_tensors(
        path / "golden.safetensors",
        {"input_ids": inputs, "pixel_values": inputs, "image_embeds": outputs[0], "text_embeds": outputs[1]},
    )
    return path, manifest_of(path)


def test_a_release_that_reproduces_its_samples_passes(release) -> None:
    parity = golden_parity(*release)
    assert (parity.verdict, parity.batches, parity.looked_at, parity.of) == ("pass", (1, 2, 5, 8), 16, 16)
    assert check_golden(*release).verdict == "pass"


def test_golden_samples_that_are_not_reproduced_fail(release) -> None:
    path, manifest = release
    golden = read_tensors(path / "golden.safetensors")
    golden["image_embeds"][0, 0] += 1e-3
    write_tensors(path / "golden.safetensors", golden)
    check = check_golden(path, manifest)
    assert check.verdict == "fail"
    assert "the visual tower differs by 0.001, allowed 5e-05" in check.detail


@pytest.mark.parametrize("kept", [1, 7])
def test_fewer_samples_than_every_release_has_do_not_pass(release, kept: int) -> None:
    path, manifest = release
    golden = {name: values[:kept] for name, values in read_tensors(path / "golden.safetensors").items()}
    write_tensors(path / "golden.safetensors", golden)
    assert golden_parity(path, manifest).verdict != "pass"


def test_a_release_without_samples_is_a_failed_check(release) -> None:
    path, manifest = release
    golden = {name: values[:0] for name, values in read_tensors(path / "golden.safetensors").items()}
    write_tensors(path / "golden.safetensors", golden)
    with pytest.raises(CheckFailed, match="no input for the visual tower"):
        golden_parity(path, manifest)


def test_a_manifest_can_only_make_the_gate_stricter() -> None:
    here = Path()
    lax = manifest_gate(manifest_of(here, precision="int8", golden=GoldenGate(10.0, -1.0)))
    assert lax == GATES["int8"]
    strict = manifest_gate(manifest_of(here, golden=GoldenGate(1e-6, 1.0)))
    assert (strict.max_abs, strict.min_cosine) == (1e-6, 1.0)
    assert manifest_gate(manifest_of(here)) == Gate()
    with pytest.raises(InputError, match="unknown precision 'int4', expected one of fp32, fp16, int8"):
        manifest_gate(manifest_of(here, precision="int4"))


CLASSES = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0].astype(np.float32)  # as many as they are wide
SCALE, BIAS = np.float32(2.0), np.float32(-3.0)


def write_classifier(path: Path, *, turned: bool = True, scaled: str = "Exp", biased: bool = True) -> None:
    """classify.onnx of the small visual graph, right unless told otherwise."""
    model = onnx.load(path / "visual.onnx", load_external_data=False)
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("class_embeds", 1, ["classes", 6]))
    graph.initializer.extend([numpy_helper.from_array(SCALE, "s"), numpy_helper.from_array(BIAS, "b")])
    graph.node.extend(
        [
            helper.make_node("Transpose" if turned else "Identity", ["class_embeds"], ["turned"]),
            helper.make_node("MatMul", [graph.output[0].name, "turned"], ["cosines"]),
            helper.make_node(scaled, ["s"], ["scale"]),
            helper.make_node("Mul", ["cosines", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "b"], ["logits"]) if biased else helper.make_node("Identity", ["scaled"], ["logits"]),
        ]
    )  # fmt: skip
    graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, ["batch", "classes"]))
    (path / "classify.onnx").write_bytes(model.SerializeToString())


def judged(path: Path, scale: np.float32 = SCALE) -> Check:
    (path / "classes").mkdir()
    write_tensors(path / "classes" / "shapes.safetensors", {"class_embeds": CLASSES})
    return check_classifier(path, ["shapes"], {"logit_scale": scale, "logit_bias": BIAS})


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [({}, "pass"), ({"turned": False}, "fail"), ({"scaled": "Identity"}, "fail"), ({"biased": False}, "fail")],
    ids=["none", "class embeddings not transposed", "scale without exp", "no bias"],
)
def test_a_classifier_with_another_formula_fails(release, fault: dict, verdict: str) -> None:
    path, _ = release
    write_classifier(path, **fault)
    check = judged(path)
    assert check.verdict == verdict
    assert ("classify.onnx: logits of classes/shapes.safetensors differ" in check.detail) == (verdict == "fail")


def test_a_classifier_with_another_scale_than_was_expected_fails(release) -> None:
    path, _ = release
    write_classifier(path)
    assert "allowed" in judged(path, SCALE + np.float32(1e-3)).detail


def test_logits_that_are_not_a_number_fail(release) -> None:
    path, _ = release
    write_classifier(path)
    assert judged(path, np.float32(np.nan)).verdict == "fail"


def test_a_classifier_that_meets_no_task_or_no_image_does_not_pass(release) -> None:
    path, _ = release
    write_classifier(path)
    assert check_classifier(path, [], {}).verdict == "inconclusive"
    golden = {name: values[:0] for name, values in read_tensors(path / "golden.safetensors").items()}
    write_tensors(path / "golden.safetensors", golden)
    assert judged(path).verdict != "pass"


def test_golden_samples_go_through_a_release_once_per_provider(release, monkeypatch) -> None:
    path, manifest = release
    opened = []
    monkeypatch.setattr(
        golden, "onnx_model", lambda *args, **options: opened.append(args) or onnx_model(*args, **options)
    )
    runs = GoldenRuns()
    checked, compared = check_golden(path, manifest, runs), golden_parity(path, manifest, runs=runs)
    assert (checked.verdict, compared.verdict, len(opened)) == ("pass", "pass", 1)


@pytest.mark.parametrize("smallest", [*range(0, len(CHANGES), 3), len(CHANGES) - 1])
def test_the_smallest_noticed_change_is_found_in_few_runs_if_errors_are_proportional(smallest: int) -> None:
    tried = []

    def error(change: float) -> float:
        tried.append(change)
        return change

    assert smallest_noticed(error, CHANGES[smallest] / 1.1) == CHANGES[smallest]
    assert len(tried) <= 3
    assert {CHANGES[smallest], CHANGES[max(0, smallest - 1)]} <= set(tried), "it and the next smaller one"


@pytest.mark.parametrize("smallest", range(len(CHANGES)))
def test_the_smallest_noticed_change_is_found_however_errors_grow(smallest: int) -> None:
    for error in (
        lambda c: float(c >= CHANGES[smallest]),
        lambda c: np.inf if c >= CHANGES[smallest] else 0.1 * c**0.1,
    ):
        assert smallest_noticed(error, 0.5) == CHANGES[smallest]


def test_no_change_is_noticed_if_none_matters() -> None:
    assert smallest_noticed(lambda change: 0.0, 1e-5) is None
