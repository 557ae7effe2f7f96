"""fp16 and int8: other graphs, written once as well, filled by numpy alone."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export import exporting

from r1export.errors import Unsupported
from r1export.export.fp16 import half_graphs
from r1export.export.int8 import calibrate, input_scale, quantized_graphs
from r1export.export.precision import rounded_base, version_tensors
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.update.int8 import dequantize
from r1export.update.release_layout import GRAPHS


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.fixture(scope="module")
def half(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    weights = half_graphs(exported.folder, folder)
    exporting.write_weights(weights, version_tensors(exporting.values_of(exported.model), [], weights, {}), folder)
    return exporting.Exported(folder, weights, exported.model)


@pytest.fixture(scope="module")
def ranges(exported):
    pixels, tokens = exporting.inputs(exported.model, 40, seed=9)
    return calibrate(exported.folder, {"pixel_values": pixels, "input_ids": tokens})


@pytest.fixture(scope="module")
def quantized(exported, ranges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    weights = quantized_graphs(exported.folder, folder)
    exporting.write_weights(weights, version_tensors(exporting.values_of(exported.model), [], weights, ranges), folder)
    return exporting.Exported(folder, weights, exported.model)


@pytest.mark.parametrize(("variant", "limit"), [("half", 0.99999), ("quantized", 0.995)])
def test_a_variant_runs_on_the_cpu_and_stays_near_float32(request, exported, variant, limit) -> None:
    other = request.getfixturevalue(variant)
    pixels, tokens = exporting.inputs(exported.model, 5)
    for graph, feeds in (("visual", {"pixel_values": pixels}), ("textual", {"input_ids": tokens})):
        one, found = exported.run(graph, **feeds), other.run(graph, **feeds)
        assert found.dtype == np.float32
        assert cosines(one, found).min() > limit
        assert not np.array_equal(one, found)
    classes = np.eye(3, 24, dtype=np.float32)
    logits = [e.run("classify", pixel_values=pixels, class_embeds=classes) for e in (exported, other)]
    assert np.abs(logits[0] - logits[1]).max() < 100 * (1 - limit) ** 0.5


def test_float16_files_have_half_the_size(exported, half) -> None:
    for file in exported.weights.files:
        assert half.weights.layout(file).nbytes < 0.55 * exported.weights.layout(file).nbytes


def test_the_linears_of_blocks_are_int8_and_multiplied_as_integers(quantized) -> None:
    placed = {p.parameter: p.dtype for _, p in quantized.weights.placements().values()}
    linears = [
        name
        for name in placed
        if name.startswith("visual.transformer") and name.endswith(("c_fc.weight", "c_proj.weight"))
    ]
    assert linears
    assert all(placed[name] == "I8" and placed[f"{name}.scale"] == "F32" for name in linears)
    assert placed["visual.positional_embedding"] == "F32"
    assert placed["token_embedding.weight"] == "F16"
    graph = onnx.load(quantized.folder / "visual.onnx", load_external_data=False).graph
    integer = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    assert integer == sum(p.dtype == "I8" for p in quantized.weights.files["visual.safetensors"])


def test_onnxruntime_multiplies_every_quantised_linear_in_one_integer_kernel(quantized, tmp_path) -> None:
    """The fusion that makes int8 pay: without it, weights are widened in every run and int8 is slower than float32."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(quantized.folder / "visual.onnx", options, providers=["CPUExecutionProvider"])
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)
    linears = sum(p.dtype == "I8" for p in quantized.weights.files["visual.safetensors"])
    assert ops["MatMulIntegerToFloat"] + ops["DynamicQuantizeMatMul"] == linears
    assert ops["DequantizeLinear"] == 0


def test_variants_of_two_models_have_the_same_graphs(exported, half, quantized, tmp_path) -> None:
    other = exporting.Exported(tmp_path / "other", exported.weights, copy.deepcopy(exported.model))
    exporting.randomize_(other.model, 5)
    (tmp_path / "other").mkdir()
    for file in (*GRAPHS, "weight_map.json"):
        (tmp_path / "other" / file).write_bytes((exported.folder / file).read_bytes())
    exporting.write_weights(other.weights, exporting.values_of(other.model), other.folder)
    for write, variant in ((half_graphs, half), (quantized_graphs, quantized)):
        folder = tmp_path / variant.folder.name
        folder.mkdir()
        write(other.folder, folder)
        for file in (*GRAPHS, "weight_map.json"):
            assert (folder / file).read_bytes() == (variant.folder / file).read_bytes(), file


def test_quantised_weights_are_within_half_a_step_of_the_rows_that_torch_has(exported, quantized, ranges) -> None:
    values = exporting.values_of(exported.model)
    stored = version_tensors(values, [], quantized.weights, ranges)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    error = np.abs(dequantize(stored[name], stored[f"{name}.scale"]) - values[name])
    assert (error <= stored[f"{name}.scale"][:, None] * 0.5001).all()


def test_merging_changes_weights_and_scales_and_no_range_of_an_input(exported, quantized, ranges) -> None:
    values, name = exporting.values_of(exported.model), "visual.transformer.resblocks.0.mlp.c_fc.weight"
    rng = np.random.default_rng(0)
    update = ExpertUpdate(
        {Rows(name, 0, 128): Factors.pack(rng.standard_normal((2, 32)), rng.standard_normal((128, 2)), 1.0)}
    )
    before, after = (version_tensors(values, u, quantized.weights, ranges) for u in ([], [update]))
    assert {key for key in before if not np.array_equal(before[key], after[key])} == {name, f"{name}.scale"}


def test_a_range_always_holds_zero_exactly() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)):
        scale, zero = input_scale(low, high)
        assert scale > 0
        assert 0 <= zero <= 255
        assert (0 - min(low, 0)) / scale == pytest.approx(float(zero), abs=0.5)


def test_weights_beyond_float16_are_refused(exported, half) -> None:
    values = exporting.values_of(exported.model)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    with pytest.raises(Unsupported, match=r"c_fc\.weight has values beyond float16"):
        rounded_base(values | {name: values[name] * 1e6}, half.weights)
