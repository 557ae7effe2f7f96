"""Graphs of a fixed batch: the same function from the same weights, without a dynamic dimension, at opset 18."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export import exporting

from r1export.errors import Unsupported
from r1export.export.static import static_graphs
from r1export.update.release_layout import TEXTUAL, TOWERS, VISUAL


@pytest.fixture(scope="module")
def exported(tiny_files, tmp_path_factory) -> exporting.Exported:
    from r1export.adapt.clip import load_clip

    model = load_clip(weights=tiny_files[0], config=tiny_files[1]).model
    exporting.randomize_(model, 3)
    exported = exporting.export(model, tmp_path_factory.mktemp("static"))
    static_graphs(exported.folder, 2)
    return exported


def graph_of(exported: exporting.Exported, name: str) -> onnx.ModelProto:
    return onnx.load(exported.folder / name, load_external_data=False)


def test_every_shape_is_fixed_and_the_opset_is_18(exported) -> None:
    for tower in TOWERS:
        model = graph_of(exported, tower.static_graph)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            assert all(dim.dim_value for dim in value.type.tensor_type.shape.dim), value.name
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
        assert not {node.op_type for node in model.graph.node} & {"Shape", "Gelu", "Range"}
    onnx.checker.check_model(str(exported.folder / VISUAL.static_graph), full_check=True)


def test_it_computes_what_the_dynamic_graph_computes(exported) -> None:
    for tower, feed in zip(TOWERS, exporting.inputs(exported.model, 2), strict=True):
        expected = exported.run(tower.name, **{tower.input: feed})
        assert np.abs(exported.run(f"{tower.name}.static", **{tower.input: feed}) - expected).max() < 1e-6


def test_a_convolution_pads_by_itself(exported, tmp_path) -> None:
    shutil.copy(exported.folder / TEXTUAL.graph, tmp_path)
    image = onnx.helper.make_tensor_value_info(VISUAL.input, onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 2, 4, 4])
    nodes = [
        onnx.helper.make_node("Pad", [VISUAL.input, "pads"], ["padded"]),
        onnx.helper.make_node("Conv", ["padded", "weight"], ["y"], strides=[2, 2]),
    ]
    constants = {
        "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1]),
        "weight": np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32),
    }
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "padding", [image], [output], initializers)
    dynamic = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(dynamic, tmp_path / VISUAL.graph)
    static_graphs(tmp_path, 1)
    assert [node.op_type for node in onnx.load(tmp_path / VISUAL.static_graph).graph.node] == ["Conv"]
    pixels = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    results = [
        ort.InferenceSession(tmp_path / name).run(None, {VISUAL.input: pixels})[0]
        for name in (VISUAL.graph, VISUAL.static_graph)
    ]
    assert np.array_equal(*results)


def test_another_batch_is_refused_by_the_runtime(exported) -> None:
    pixels, _ = exporting.inputs(exported.model, 3)
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        ort.InferenceSession(exported.folder / VISUAL.static_graph).run(None, {VISUAL.input: pixels})


def test_the_weights_are_those_of_the_dynamic_graph(exported) -> None:
    for tower in TOWERS:
        static, dynamic = (
            {t.name: [(e.key, e.value) for e in t.external_data] for t in model.graph.initializer if t.external_data}
            for model in (graph_of(exported, tower.static_graph), graph_of(exported, tower.graph))
        )
        assert static == dynamic
        assert (exported.folder / tower.static_graph).stat().st_size < 100_000


def test_a_shape_that_depends_on_values_is_refused(exported, tmp_path) -> None:
    for tower in TOWERS:
        (tmp_path / tower.graph).write_bytes((exported.folder / tower.graph).read_bytes())
    model = graph_of(exported, TEXTUAL.graph)
    model.graph.node.append(onnx.helper.make_node("NonZero", [TEXTUAL.input], ["found"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("found", onnx.TensorProto.INT64, [2, None]))
    onnx.save(model, tmp_path / TEXTUAL.graph)
    with pytest.raises(Unsupported, match=r"textual\.static\.onnx: the shape of found stays dynamic"):
        static_graphs(tmp_path, 1)
