"""The graphs: exported once, the same for all weights, the same function as torch."""

from __future__ import annotations

import copy
import importlib
import json

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from export import exporting
from onnxscript.rewriter import rewrite

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.export import graph as graph_module
from r1export.export import trace as trace_module
from r1export.export.audit import _walk, audit_reexport
from r1export.export.graph import MAX_OPSET, MIN_OPSET, export_graphs
from r1export.export.sentinels import fill_with_sentinels_, flipped
from r1export.export.simplify import RULES
from r1export.export.towers import float_tensors
from r1export.export.weight_map import WeightMap, place_parameters
from r1export.update.release_layout import GRAPHS

FP32 = 2e-6  # max-abs on unit-norm embeddings of the tiny model; sums of 32 terms are rounded in another order


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_onnxruntime_gives_what_torch_gives_at_every_batch(exported, n) -> None:
    assert exported.error(n) < FP32


def test_an_independent_runtime_agrees(exported) -> None:
    pixels, tokens = exporting.inputs(exported.model, 3)
    for graph, feeds in (("visual", {"pixel_values": pixels}), ("textual", {"input_ids": tokens})):
        session = onnx.reference.ReferenceEvaluator(onnx.load(exported.folder / f"{graph}.onnx"))
        assert np.abs(session.run(None, feeds)[0] - exported.run(graph, **feeds)).max() < FP32


def test_two_models_of_one_architecture_give_the_same_bytes(exported, tmp_path) -> None:
    other = copy.deepcopy(exported.model)
    exporting.randomize_(other, 7)
    export_graphs(other, (16, 16), 12, tmp_path, opset=20)
    for file in (*GRAPHS, "weight_map.json"):
        assert (tmp_path / file).read_bytes() == (exported.folder / file).read_bytes(), file


def test_another_set_of_weights_needs_no_export(exported, tmp_path) -> None:
    other = copy.deepcopy(exported.model)
    exporting.randomize_(other, 8)
    for file in GRAPHS:
        (tmp_path / file).write_bytes((exported.folder / file).read_bytes())
    exporting.write_weights(WeightMap.read(exported.folder / "weight_map.json"), exporting.values_of(other), tmp_path)
    assert exporting.Exported(tmp_path, exported.weights, other).error(3) < FP32


def test_nothing_in_a_graph_says_where_or_when_it_was_made(exported) -> None:
    for file in GRAPHS:
        data = (exported.folder / file).read_bytes()
        assert not any(
            word in data
            for word in (b".py", b"site-packages", str(exported.folder).encode(), torch.__version__.encode())
        )


def test_initializers_have_the_names_of_the_state_dict(exported) -> None:
    found = set()
    for file in GRAPHS:
        graph = onnx.load(exported.folder / file, load_external_data=False).graph
        found |= {i.name for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    assert found == set(exported.model.state_dict())


def test_only_constants_of_the_architecture_are_inside_the_graph(exported) -> None:
    for file in GRAPHS:
        graph = onnx.load(exported.folder / file, load_external_data=False).graph
        inside = [i for i in graph.initializer if i.data_location != onnx.TensorProto.EXTERNAL]
        assert max(len(i.raw_data) for i in inside) <= 12 * 12 * 4  # the causal mask


def test_every_linear_of_a_block_is_one_gemm_and_no_shape_is_computed(exported) -> None:
    graph = onnx.load(exported.folder / "visual.onnx", load_external_data=False).graph
    ops = [node.op_type for node in graph.node]
    assert ops.count("Gemm") == 2 * 4
    assert ops.count("Softmax") == 2
    assert ops.count("Shape") == 1  # of the batch, for the class token


def test_the_rows_of_a_packed_projection_lie_as_torch_has_them(exported) -> None:
    files = exported.weights.placements()
    for name in ("visual.transformer.resblocks.1.attn.in_proj_weight", "transformer.resblocks.0.attn.in_proj_weight"):
        _, placement = files[name]
        assert not placement.transposed
        assert placement.shape == tuple(exported.model.state_dict()[name].shape)


def test_classify_gives_scaled_cosines_for_any_class_list(exported) -> None:
    pixels, _ = exporting.inputs(exported.model, 2)
    embeds = exported.run("visual", pixel_values=pixels)
    for classes in (1, 4):
        class_embeds = np.random.default_rng(classes).standard_normal((classes, 24)).astype(np.float32)
        logits = exported.run("classify", pixel_values=pixels, class_embeds=class_embeds)
        np.testing.assert_allclose(
            logits, exported.model.logit_scale.exp().item() * embeds @ class_embeds.T, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("opset", [MIN_OPSET - 1, MAX_OPSET + 1])
def test_an_opset_out_of_range_is_refused(exported, tmp_path, opset) -> None:
    with pytest.raises(InputError, match=f"opset {opset} is out of range"):
        export_graphs(exported.model, (16, 16), 12, tmp_path, opset=opset)


def test_the_oldest_opset_works_too(exported, tmp_path) -> None:
    assert exporting.export(exported.model, tmp_path, MIN_OPSET).error(2) < FP32
    assert {o.version for o in onnx.load(tmp_path / "visual.onnx", load_external_data=False).opset_import} == {
        MIN_OPSET
    }


def test_a_program_that_is_not_decomposed_gives_the_bytes_of_one_that_is(exported, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trace_module, "_as_it_is_", lambda program: False)
    export_graphs(exported.model, (16, 16), 12, tmp_path, opset=20)
    for file in (*GRAPHS, "weight_map.json"):
        assert (tmp_path / file).read_bytes() == (exported.folder / file).read_bytes(), file


class Halved(torch.nn.Module):
    """A layer norm whose output is overwritten."""

    def __init__(self, base: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        out.mul_(0.5).add_(x)
        return out


def test_the_table_of_translations_is_made_once_for_all_towers_and_again_for_the_next_model() -> None:
    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    made = vars(registry)["from_torchlib"]
    with trace_module.lean():
        first = registry.from_torchlib(opset_version=20)
        assert registry.from_torchlib(opset_version=20) is first
        assert registry.from_torchlib(opset_version=18) is not first
    assert vars(registry)["from_torchlib"] is made


@pytest.mark.parametrize("name", ["visual.onnx", "textual.onnx"])
def test_the_rules_find_nothing_more_in_an_exported_graph(exported, name) -> None:
    model = ir.load(exported.folder / name)
    before = ir.to_proto(model).graph.SerializeToString(deterministic=True)
    rewrite(model, RULES)
    assert ir.to_proto(model).graph.SerializeToString(deterministic=True) == before


def test_an_operator_that_writes_into_its_input_is_exported_too(exported, tmp_path) -> None:
    model = copy.deepcopy(exported.model)
    model.visual.ln_post = Halved(model.visual.ln_post)
    assert exporting.export(model, tmp_path).error(3) < FP32


class Doubled(torch.nn.Module):
    """A layer norm that computes with its weight before it uses it."""

    def __init__(self, base: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, self.base.normalized_shape, self.base.weight * 2, self.base.bias)


def test_a_parameter_that_is_folded_away_is_named(exported, tmp_path, monkeypatch) -> None:
    model = copy.deepcopy(exported.model)
    model.visual.ln_post = Doubled(model.visual.ln_post)
    monkeypatch.setattr(trace_module, "simplify_", _fold_everything_)
    with pytest.raises(Unsupported, match=r"parameter visual\.ln_post\.base\.weight occurs 0 times"):
        export_graphs(model, (16, 16), 12, tmp_path, opset=20)


def _fold_everything_(model, held) -> None:
    from onnxscript.optimizer import optimize_ir

    optimize_ir(model)


def test_a_graph_that_computes_something_else_is_not_written(exported, tmp_path, monkeypatch) -> None:
    def swap(graph, parameters, used):
        placed = dict(zip(*_swapped(original(graph, parameters, used)), strict=True))
        return placed

    def _swapped(placed):
        keys, values = list(placed), list(placed.values())
        i, j = (
            next(n for n, p in enumerate(keys) if p.parameter.endswith(f"resblocks.{layer}.mlp.c_fc.weight"))
            for layer in (0, 1)
        )
        values[i], values[j] = values[j], values[i]
        return keys, values

    original = graph_module.place_parameters
    monkeypatch.setattr(graph_module, "place_parameters", swap)
    with pytest.raises(Unsupported, match="differs from torch"):
        export_graphs(exported.model, (16, 16), 12, tmp_path, opset=20)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_remembers_the_weights_it_was_found_by_is_not_written(exported, tmp_path, monkeypatch) -> None:
    """It adds sum(2 b - B) to the embeddings, where B is 2 b of the sentinels: nothing, as long as b is theirs."""

    def remembering(tower, opset, **options):
        model, used = original(tower, opset, **options)
        if tower.files.name == "visual":
            graph, bias = model.graph, tower.tensors["visual.ln_post.bias"].detach().numpy()
            parameter = next(v for v in graph.initializers.values() if np.array_equal(v.const_value.numpy(), bias))
            doubled = ir.val("doubled", const_value=ir.tensor(2 * bias, name="doubled"))
            graph.register_initializer(doubled)
            embeds, node = graph.outputs[0], graph_module._node
            rest = node(graph, "Sub", node(graph, "Add", parameter, parameter, name="twice"), doubled, name="rest")
            changed = node(graph, "Add", embeds, node(graph, "ReduceSum", rest, name="sum"), name="changed")
            changed.type, changed.shape = embeds.type, embeds.shape
            graph.outputs[0] = changed
        return model, used

    original = graph_module.trace
    monkeypatch.setattr(graph_module, "trace", remembering)
    with pytest.raises(Unsupported, match="the exported visual tower differs from torch"):
        export_graphs(exported.model, (16, 16), 12, tmp_path, opset=20)
    assert not list(tmp_path.iterdir())


def test_a_fresh_export_of_the_merged_model_is_the_release(exported) -> None:
    audit = audit_reexport(exported.model, (16, 16), 12, exported.folder, opset=20)
    assert (
        audit.parameters == len(exported.model.state_dict()) - 1
    )  # all but logit_scale, which only classify.onnx reads
    assert audit.nbytes == sum(t.nbytes for n, t in exported.model.state_dict().items() if n != "logit_scale")


def test_the_audit_names_a_weight_that_is_not_the_release_s(exported) -> None:
    model = copy.deepcopy(exported.model)
    with torch.no_grad():
        model.transformer.resblocks[1].mlp.c_fc.weight[3, 5] += 1e-3
    with pytest.raises(CheckFailed, match=r"textual\.onnx: transformer\.resblocks\.1\.mlp\.c_fc\.weight: sha256"):
        audit_reexport(model, (16, 16), 12, exported.folder, opset=20)


def test_the_audit_names_an_input_that_a_fresh_export_leaves_out() -> None:
    def clip(low: bool) -> ir.Graph:
        x = ir.val("x", ir.DataType.FLOAT, [2])
        ends = [ir.val(name, const_value=ir.tensor(np.float32(1), name=name)) for name in ("low", "high")]
        node = ir.node("Clip", [x, ends[0] if low else None, ends[1]])
        return ir.Graph([x], node.outputs, nodes=[node], initializers=ends, opset_imports={"": 20})

    with pytest.raises(CheckFailed, match=r"node 0 \(Clip\): reads low, the new export reads nothing"):
        _walk(clip(False), clip(True), "01-a/visual.onnx")
    with pytest.raises(CheckFailed, match=r"node 0 \(Clip\): reads nothing, the new export reads low"):
        _walk(clip(True), clip(False), "01-a/visual.onnx")


def test_a_weight_map_reads_what_it_wrote_and_refuses_the_rest(exported, tmp_path) -> None:
    exported.weights.write(tmp_path / "weight_map.json")
    assert WeightMap.read(tmp_path / "weight_map.json") == exported.weights
    (tmp_path / "weight_map.json").write_text(json.dumps({"visual.safetensors": [{"parameter": "a"}]}))
    with pytest.raises(InputError, match="not a weight map"):
        WeightMap.read(tmp_path / "weight_map.json")


def test_sentinels_are_the_model_s_own_memory_and_no_two_are_equal(exported) -> None:
    model = copy.deepcopy(exported.model)
    sentinels = fill_with_sentinels_(model, 1)
    tensors = float_tensors(model)
    assert sentinels.keys() == tensors.keys()
    assert all(np.shares_memory(sentinels[name], tensor.detach().numpy()) for name, tensor in tensors.items())
    assert len({values.tobytes() for values in sentinels.values()}) == len(sentinels)


def test_flipped_sentinels_are_finite_and_all_others_until_they_are_flipped_back(exported) -> None:
    sentinels = fill_with_sentinels_(copy.deepcopy(exported.model), 1)
    before = {name: values.copy() for name, values in sentinels.items()}
    with flipped(sentinels):
        for name, values in sentinels.items():
            assert np.isfinite(values).all()
            assert (np.abs(values - before[name]) >= np.abs(before[name])).all()
    assert all(np.array_equal(values, before[name]) for name, values in sentinels.items())


def test_a_parameter_is_found_by_all_of_its_values_not_by_the_first_alone() -> None:
    """Two tensors with the same beginning: each is found where it stands, and one that differs in its last value nowhere."""
    rng = np.random.default_rng(0)
    left = rng.normal(size=(6, 8)).astype(np.float32)
    right, other = left.copy(), left.copy()
    right[-1, -1], other[-1, -1] = 5.0, 6.0
    values = [
        ir.val(name, const_value=ir.tensor(value, name=name)) for name, value in (("a", left), ("b", right.T.copy()))
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values)
    found = place_parameters(graph, {"left": left, "right": right}, {"left", "right"})
    assert {(p.parameter, p.transposed): value.name for p, value in found.items()} == {
        ("left", False): "a",
        ("right", True): "b",
    }
    with pytest.raises(Unsupported, match="occurs 0 times"):
        place_parameters(graph, {"other": other}, {"other"})
