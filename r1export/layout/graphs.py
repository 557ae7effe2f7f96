"""The graphs of a release for a client: other names of tensors, other places of weights, and a head for texts of any length.

The nodes of the towers stay as they are, so what they compute stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from r1export.errors import InputError, Unsupported, first_line
from r1export.layout.settings import Texts
from r1export.update.release_layout import CLASS_EMBEDS, TEXTUAL, VISUAL

LOGITS = "logits"


def read_graph(path: Path) -> ModelProto:
    """A graph without its weights. Raises InputError if it cannot be read."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # the protobuf library has several roots
        raise InputError(f"{path}: {first_line(error)}", "copy it from the release it belongs to") from error


def relocate_(model: ModelProto, locations: Mapping[str, str]) -> ModelProto:
    """Look for weights in other files: `locations` maps names of weights files to names as they lie next to the graph."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = locations.get(entry.value, entry.value)
    return model


def rename_(model: ModelProto, names: Mapping[str, str]) -> ModelProto:
    """Give values of the graph, such as its inputs and outputs, other names."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return model


def accept_texts_(model: ModelProto, texts: Texts, *, int32: bool = False, end: bool = False) -> ModelProto:
    """Give the textual graph a head that fills `input_ids` (n, l), l <= L, with the pad id to (n, L), as its tokenizer does.

    So a client may give texts of any length up to L, also to a tower that attends to padding. Longer ones fail, as before:
    without the Max, Pad would cut them. With `int32` the ids may be that. With `end` a text that a client cut at L gets back
    the token that ends texts, for clients that cut it off.
    """
    graph, ids = model.graph, graph_input(model, TEXTUAL.input)
    rename_(model, {TEXTUAL.input: "tower_ids"})
    ids.name = TEXTUAL.input
    ids.type.tensor_type.elem_type = TensorProto.INT32 if int32 else TensorProto.INT64
    dim = ids.type.tensor_type.shape.dim[1]
    dim.Clear()
    dim.dim_param = "sequence"
    end_id = texts.end_id if end else None
    head = [*_padding(texts, int32=int32, output="tower_ids" if end_id is None else "padded_ids")]
    head += [] if end_id is None else _ending(texts, end_id)
    nodes = [*(node for node, _ in head), *graph.node]
    graph.initializer.extend(constant for _, constants in head for constant in constants)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


Step = tuple[NodeProto, tuple[TensorProto, ...]]  # a node, and the constants that it brings


def _padding(texts: Texts, *, int32: bool, output: str) -> Iterator[Step]:
    ids = TEXTUAL.input
    if int32:
        yield helper.make_node("Cast", [ids], ["ids_int64"], "ids_int64", to=TensorProto.INT64), ()
        ids = "ids_int64"
    yield helper.make_node("Shape", [ids], ["pad_length"], "pad_length", start=1, end=2), ()
    to, none, others = _int64("pad_to", [texts.length]), _int64("pad_none", [0]), [0] * (2 if texts.left else 3)
    yield helper.make_node("Sub", ["pad_to", "pad_length"], ["pad_difference"], "pad_difference"), (to,)
    yield helper.make_node("Max", ["pad_difference", "pad_none"], ["pad_missing"], "pad_missing"), (none,)
    parts = ["pad_none", "pad_missing", "pad_others"] if texts.left else ["pad_others", "pad_missing"]
    widths = helper.make_node("Concat", parts, ["pad_widths"], "pad_widths", axis=0)
    yield widths, (_int64("pad_others", others),)
    pad_id = helper.make_tensor("pad_id", TensorProto.INT64, [], [texts.pad_id])
    yield helper.make_node("Pad", [ids, "pad_widths", "pad_id"], [output], "pad"), (pad_id,)


def _ending(texts: Texts, end: int) -> Iterator[Step]:
    """Where a row of `padded_ids` has no end token its last id becomes it."""
    end_id = helper.make_tensor("end_id", TensorProto.INT64, [], [end])
    last = helper.make_tensor("end_last", TensorProto.BOOL, [1, texts.length], [False] * (texts.length - 1) + [True])
    yield helper.make_node("Equal", ["padded_ids", "end_id"], ["end_there"], "end_there"), (end_id,)
    yield helper.make_node("Cast", ["end_there"], ["end_ones"], "end_ones", to=TensorProto.INT32), ()
    most = helper.make_node("ReduceMax", ["end_ones", "end_axis"], ["end_most"], "end_most", keepdims=1)
    yield most, (_int64("end_axis", [1]),)
    yield helper.make_node("Cast", ["end_most"], ["end_any"], "end_any", to=TensorProto.BOOL), ()
    yield helper.make_node("Not", ["end_any"], ["end_missing"], "end_missing"), ()
    yield helper.make_node("And", ["end_missing", "end_last"], ["end_here"], "end_here"), (last,)
    yield helper.make_node("Where", ["end_here", "end_id", "padded_ids"], ["tower_ids"], "end"), ()


def _int64(name: str, values: list[int]) -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def graph_input(model: ModelProto, name: str) -> ValueInfoProto:
    """An input of a graph. Raises Unsupported if it has none of that name."""
    value: ValueInfoProto | None = next((value for value in model.graph.input if value.name == name), None)
    if value is None:
        raise Unsupported(f"a graph has no input {name}", "export the release again with this version of r1export")
    return value


def join(classifier: ModelProto, textual: ModelProto) -> ModelProto:
    """One graph of both towers: (pixel_values, input_ids) -> logits_per_image (n, C), logits_per_text (C, n), text_embeds, image_embeds.

    The class embeddings of `classifier` become those of the texts. Raises Unsupported if it does not have the image
    embeddings inside.
    """
    if VISUAL.output not in {name for node in classifier.graph.node for name in node.output}:
        raise Unsupported("classify.onnx has no image_embeds inside", "export the release again")
    _prefix_(textual, "textual.", keep={TEXTUAL.input, TEXTUAL.output})
    rename_(classifier, {CLASS_EMBEDS: TEXTUAL.output, LOGITS: "logits_per_image"})
    image, text = classifier.graph, textual.graph
    pixels = next(value for value in image.input if value.name == VISUAL.input)
    dimension = text.output[0].type.tensor_type.shape.dim[1].dim_value
    outputs = [
        _floats("logits_per_image", ["batch", "texts"]),
        _floats("logits_per_text", ["texts", "batch"]),
        _floats(TEXTUAL.output, ["texts", dimension]),
        _floats(VISUAL.output, ["batch", dimension]),
    ]
    ids = graph_input(textual, TEXTUAL.input)
    ids.type.tensor_type.shape.dim[0].dim_param = "texts"
    turn = helper.make_node("Transpose", ["logits_per_image"], ["logits_per_text"], "logits_per_text", perm=[1, 0])
    graph = GraphProto(name="clip")
    graph.node.extend([*text.node, *image.node, turn])
    graph.initializer.extend([*text.initializer, *image.initializer])
    graph.input.extend([ids, pixels])
    graph.output.extend(outputs)
    return helper.make_model(
        graph, ir_version=classifier.ir_version, opset_imports=classifier.opset_import, producer_name="r1export"
    )


def _prefix_(model: ModelProto, prefix: str, keep: set[str]) -> None:
    """Tell all names of a graph from those of another."""
    names = {name for node in model.graph.node for name in (*node.input, *node.output) if name}
    names |= {tensor.name for tensor in model.graph.initializer}
    rename_(model, {name: prefix + name for name in names - keep})
    for node in model.graph.node:
        node.name = prefix + node.name
    del model.graph.value_info[:]


def _floats(name: str, shape: list[str | int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
