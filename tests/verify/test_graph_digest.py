"""The graph digest knows the program, and nothing of names and weights."""

import copy

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from r1export.verify.graph_digest import graph_digest


def tensor(name: str, values: object, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def external(name: str, shape: tuple[int, ...], offset: int = 0, kind: int = TensorProto.FLOAT) -> TensorProto:
    weight = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", offset), ("length", 4 * int(np.prod(shape)))):
        weight.external_data.add(key=key, value=str(value))
    return weight


def attention(
    *, q: str = "q", k: str = "k", batch: str = "batch", opset: int = 20, scale: float = 0.5
) -> onnx.ModelProto:
    """scores = (x Wq) (x Wk)^T scale, normalised: the smallest graph in which q and k can be swapped."""
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], name="project_q"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], name="project_k"),
        helper.make_node("Transpose", [k], ["kt"], perm=[1, 0]),
        helper.make_node("MatMul", [q, "kt"], ["s"]),
        helper.make_node("Mul", ["s", "scale"], ["scaled"]),
        helper.make_node("LayerNormalization", ["scaled", "gamma"], ["y"], epsilon=1e-5),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, batch])],
        [external("wq", (4, 4)), external("wk", (4, 4), 64), tensor("scale", scale), tensor("gamma", [1.0, 1.0])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


BASE = attention()


def changed(change) -> onnx.ModelProto:
    model = copy.deepcopy(BASE)
    change(model.graph)
    return model


def rename(graph: onnx.GraphProto) -> None:
    new = {"q": "a", "k": "b", "wq": "first", "wk": "second", "scale": "c", "s": "d"}
    for node in graph.node:
        node.name, node.doc_string = "anything", "any text"
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for weight in graph.initializer:
        weight.name = new.get(weight.name, weight.name)


def shuffle(graph: onnx.GraphProto) -> None:
    tensors = list(graph.initializer)
    del graph.initializer[:]
    graph.initializer.extend(reversed(tensors))


def move_weights(graph: onnx.GraphProto) -> None:
    graph.initializer[0].CopyFrom(external("wq", (4, 4), 4096))


@pytest.mark.parametrize("change", [rename, shuffle, move_weights])
def test_names_the_order_of_initializers_and_the_bytes_of_weights_do_not_matter(change) -> None:
    assert graph_digest(changed(change)) == graph_digest(BASE)


def test_the_name_of_a_dynamic_dimension_does_not_matter_but_a_fixed_one_does() -> None:
    assert graph_digest(attention(batch="n")) == graph_digest(BASE)
    assert graph_digest(attention(batch=1)) != graph_digest(BASE)


def insert_identity(graph: onnx.GraphProto) -> None:
    graph.node[-1].output[0] = "before"
    graph.node.append(helper.make_node("Identity", ["before"], ["y"]))


def insert_cast(graph: onnx.GraphProto) -> None:
    graph.node[-1].output[0] = "before"
    graph.node.append(helper.make_node("Cast", ["before"], ["y"], to=TensorProto.FLOAT))


def change_epsilon(graph: onnx.GraphProto) -> None:
    graph.node[-1].attribute[0].f = 1e-6


def change_weight_dtype(graph: onnx.GraphProto) -> None:
    graph.initializer[0].CopyFrom(external("wq", (4, 4), kind=TensorProto.FLOAT16))


def change_weight_shape(graph: onnx.GraphProto) -> None:
    graph.initializer[0].CopyFrom(external("wq", (4, 8)))


def share_one_weight(graph: onnx.GraphProto) -> None:
    graph.node[1].input[1] = "wq"


def add_unused_weight(graph: onnx.GraphProto) -> None:
    graph.initializer.append(external("unused", (64, 64)))


def let_a_weight_be_overridden(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("wq", TensorProto.FLOAT, [4, 4]))


@pytest.mark.parametrize(
    "change",
    [
        insert_identity,
        insert_cast,
        change_epsilon,
        change_weight_dtype,
        change_weight_shape,
        share_one_weight,
        add_unused_weight,
        let_a_weight_be_overridden,
    ],
)
@pytest.mark.parametrize("structural", [False, True])
def test_another_program_has_another_digest(change, structural: bool) -> None:
    assert graph_digest(changed(change), structural=structural) != graph_digest(BASE, structural=structural)


def test_q_and_k_swapped_is_another_program() -> None:
    assert graph_digest(attention(q="k", k="q")) != graph_digest(BASE)


def test_another_opset_is_another_program() -> None:
    assert graph_digest(attention(opset=21)) != graph_digest(BASE)


def test_an_inline_constant_counts_by_value_except_in_the_structure() -> None:
    """In a release all weights are external, so what is inline is a constant; the optimiser inlines folded weights too."""
    assert graph_digest(attention(scale=0.25)) != graph_digest(BASE)
    assert graph_digest(attention(scale=0.25), structural=True) == graph_digest(BASE, structural=True)


def mask(value: float) -> onnx.ModelProto:
    """A mask is too large for a small constant and still decides what is computed."""
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [77, 77]) for name in "xy"]
    return helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor("mask", np.full((77, 77), value))])
    )


def test_a_large_mask_counts_by_value() -> None:
    assert graph_digest(mask(0.0)) != graph_digest(mask(float("-inf")))


def shaped(target: list[int]) -> onnx.ModelProto:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor("shape", target, np.int64)]))


def test_integers_are_shapes_and_count_in_the_structure_too() -> None:
    assert graph_digest(shaped([2, -1]), structural=True) != graph_digest(shaped([3, -1]), structural=True)


def branching(inner: str, outer_weight: str = "w") -> onnx.ModelProto:
    """An If whose branches use a value and a weight of the graph around them."""
    value = helper.make_tensor_value_info("r", TensorProto.FLOAT, [4])
    then = helper.make_graph([helper.make_node(inner, ["x", outer_weight], ["r"])], "then", [], [value])
    other = helper.make_graph([helper.make_node("Sub", ["x", "w"], ["r"])], "else", [], [value])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    weights = [external("w", (4,)), external("v", (4,), 16)]
    return helper.make_model(
        helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], weights)
    )


def test_subgraphs_are_read_with_the_values_of_the_graph_around_them() -> None:
    assert graph_digest(branching("Add")) == graph_digest(branching("Add"))
    assert graph_digest(branching("Add")) != graph_digest(branching("Mul"))
    assert graph_digest(branching("Add")) != graph_digest(branching("Add", "v"))


def with_function(op: str, argument: str = "a") -> onnx.ModelProto:
    body = helper.make_function(
        "local", "F", [argument], ["b"], [helper.make_node(op, [argument], ["b"])], [helper.make_opsetid("", 20)]
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="local")], "g", ends[:1], ends[1:])
    return helper.make_model(
        graph, functions=[body], opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    )


def test_local_functions_are_read_without_their_names_of_values() -> None:
    assert graph_digest(with_function("Relu")) == graph_digest(with_function("Relu", "other"))
    assert graph_digest(with_function("Relu")) != graph_digest(with_function("Sigmoid"))


def test_the_digest_of_a_file_is_that_of_its_model(tmp_path) -> None:
    (tmp_path / "g.onnx").write_bytes(BASE.SerializeToString())
    assert graph_digest(tmp_path / "g.onnx") == graph_digest(BASE)
