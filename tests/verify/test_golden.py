"""A release by itself: its files, and its golden samples in the real onnxruntime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from r1export.errors import InputError
from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors, write_tensors
from r1export.verify.golden import (
    changed_files,
    changed_graphs,
    classifier_problems,
    golden_parity,
    golden_problems,
    manifest_gate,
)
from r1export.verify.graph_digest import graph_digest
from r1export.verify.parity import Gate
from r1export.verify.runtime import open_session, runner

ENTRIES = {"visual": "pixel_values", "textual": "input_ids"}
GOLDEN = {"max_abs": 5e-5, "min_cosine": 1 - 1e-6}


@pytest.fixture
def release(write_graph) -> tuple[Path, dict]:
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
    files = {
        name: {"sha256": sha256_file(path / name)}
        for name in ("visual.onnx", "textual.onnx", "visual.safetensors", "golden.safetensors")
    }
    return path, {
        "files": files,
        "graphs": {"visual.onnx": graph_digest(path / "visual.onnx")},
        "precision": "fp32",
        "golden": GOLDEN,
    }


def test_a_release_that_is_as_it_was_written_passes(release) -> None:
    path, manifest = release
    assert (
        changed_files(path, manifest, ("manifest.json",))
        == changed_graphs(path, manifest)
        == golden_problems(path, manifest)
        == []
    )
    found = golden_parity(path, manifest)
    assert (found["verdict"], found["batches"]) == ("pass", [1, 2, 5, 8])


def test_a_changed_a_missing_and_an_added_file_are_named(release) -> None:
    path, manifest = release
    (path / "textual.onnx").write_bytes(b"other")
    (path / "visual.onnx").unlink()
    (path / "more.txt").write_text("x")
    assert changed_files(path, manifest, ()) == [
        "visual.onnx is missing",
        "textual.onnx is not the file that was released",
        "more.txt is not listed in the manifest",
    ]


def test_a_link_is_no_file_of_a_release(release) -> None:
    path, manifest = release
    (path / "visual.onnx").rename(path.parent / "elsewhere.onnx")
    (path / "visual.onnx").symlink_to(path.parent / "elsewhere.onnx")
    assert changed_files(path, manifest, ()) == ["visual.onnx is missing"]


def test_golden_samples_that_are_not_reproduced_are_a_problem(release) -> None:
    path, manifest = release
    golden = read_tensors(path / "golden.safetensors")
    golden["image_embeds"][0, 0] += 1e-3
    write_tensors(path / "golden.safetensors", golden)
    assert "the visual tower errs by 0.001, allowed 5e-05" in golden_problems(path, manifest)[0]


def test_the_gate_follows_the_precision_and_the_manifest() -> None:
    gate = manifest_gate({"precision": "int8", "golden": {"max_abs": 0.2, "min_cosine": 0.9}})
    assert (gate.max_abs, gate.min_cosine, gate.relative) == (0.2, 0.9, True)
    assert manifest_gate({"precision": "fp32", "golden": GOLDEN}) == Gate()
    with pytest.raises(InputError, match="precision is 'int4', known are fp32, fp16, bf16, int8"):
        manifest_gate({"precision": "int4", "golden": GOLDEN})


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


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [({}, "right"), ({"turned": False}, "wrong"), ({"scaled": "Identity"}, "wrong"), ({"biased": False}, "wrong")],
    ids=["none", "class embeddings not transposed", "scale without exp", "no bias"],
)
def test_a_classifier_with_another_formula_is_a_problem(release, fault: dict, verdict: str) -> None:
    path, _ = release
    (path / "classes").mkdir()
    write_tensors(path / "classes" / "shapes.safetensors", {"class_embeds": CLASSES})
    write_classifier(path, **fault)
    found = classifier_problems(path, {"logit_scale": SCALE, "logit_bias": BIAS})
    assert [line.split(" differ")[0] for line in found] == (
        [] if verdict == "right" else ["classify.onnx: logits of classes/shapes.safetensors"]
    )


def test_a_classifier_with_another_scale_than_was_expected_is_a_problem(release) -> None:
    path, _ = release
    (path / "classes").mkdir()
    write_tensors(path / "classes" / "shapes.safetensors", {"class_embeds": CLASSES})
    write_classifier(path)
    expected = {"logit_scale": SCALE + np.float32(1e-3), "logit_bias": BIAS}
    assert "allowed" in classifier_problems(path, expected)[0]
