"""Operators that phones and accelerators lack are written in others, and the graph computes the same."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from r1export.export.portable import portable_

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, 4])


def model(nodes, output, constants=(), inputs=(X,)) -> ir.Model:
    initializers = [numpy_helper.from_array(np.array(value), name) for name, value in constants]
    graph = helper.make_graph(nodes, "g", list(inputs), [output], initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, data_prop=True))


def run(made: ir.Model, value: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: value})[0]


def rewritten(made: ir.Model, value: np.ndarray) -> tuple[Counter, float]:
    """The operators after the rewriting, and the largest difference it makes."""
    before = run(made, value)
    portable_(made.graph)
    after = run(made, value)
    assert after.dtype == before.dtype
    return Counter(node.op_type for node in made.graph), float(np.abs(after - before).max())


def out(kind=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info("y", kind, shape)


VALUES = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("index", [0, 2, -1, -2])
def test_one_index_is_sliced(index):
    made = model([helper.make_node("Gather", ["x", "i"], ["y"], axis=1)], out(), [("i", np.int64(index))])
    operators, difference = rewritten(made, VALUES)
    assert (operators["Gather"], operators["Slice"], operators["Squeeze"], difference) == (0, 1, 1, 0)


def test_many_indices_are_gathered_as_before():
    made = model([helper.make_node("Gather", ["x", "i"], ["y"], axis=1)], out(), [("i", np.array([0, 3]))])
    assert rewritten(made, VALUES) == (Counter(Gather=1), 0)


def test_a_norm_is_the_root_of_a_sum_of_squares_and_divides_without_a_copy_of_itself():
    nodes = [
        helper.make_node("ReduceL2", ["x", "axes"], ["norm"], keepdims=1),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Expand", ["norm", "shape"], ["wide"]),
        helper.make_node("Div", ["x", "wide"], ["y"]),
    ]
    made = model(nodes, out(shape=["n", 5, 4]), [("axes", np.array([-1]))])
    operators, difference = rewritten(made, VALUES)
    assert operators["ReduceL2"] == 0
    assert made.graph.outputs[0].name == "y"
    assert [v.producer().op_type for v in made.graph.outputs[0].producer().inputs if v.producer()] == ["Sqrt"]
    assert difference < 1e-6


def test_what_an_expand_makes_larger_than_the_other_side_stays():
    nodes = [helper.make_node("Expand", ["x", "shape"], ["wide"]), helper.make_node("Div", ["one", "wide"], ["y"])]
    made = model(nodes, out(), [("shape", np.array([7, 3, 5, 4])), ("one", np.float32(1))])
    assert rewritten(made, VALUES) == (Counter(Expand=1, Div=1), 0)


def test_the_end_of_a_text_is_looked_for_in_int32():
    ids = helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 9])
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=-1, keepdims=0)
    tokens = np.random.default_rng(0).integers(0, 49408, (4, 9))
    operators, difference = rewritten(model([node], out(TensorProto.INT64), inputs=(ids,)), tokens)
    assert (operators, difference) == (Counter(Cast=1, ArgMax=1), 0)
