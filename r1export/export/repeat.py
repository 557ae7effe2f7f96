"""Export a tower of many equal blocks from three of them: the first, the second in place of all in between, and the last.

The cost of tracing grows with the number of operators, and the blocks of a transformer only differ in their weights. The
nodes of the second block are copied for those that were left out, each copy with its own block's parameters. The graph has the
same bytes as one traced from the whole tower.
"""

from __future__ import annotations

import ast
import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor, nn

SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx.export notes the modules that a node comes from
KEPT = 3


@dataclass(frozen=True)
class Repetition:
    """A sequence of blocks by its name in the tower, and the names of the blocks in it."""

    name: str
    blocks: tuple[str, ...]

    @property
    def first(self) -> str:
        return f"{self.name}.{self.blocks[0]}"

    @property
    def template(self) -> str:
        return f"{self.name}.{self.blocks[1]}"

    @property
    def last(self) -> str:
        return f"{self.name}.{self.blocks[-1]}"

    @property
    def others(self) -> tuple[str, ...]:
        """The blocks for which the template is copied."""
        return tuple(f"{self.name}.{block}" for block in self.blocks[2:-1])

    def everywhere(self, used: Collection[str]) -> set[str]:
        """Names of tensors of the blocks left out, of which the template's are `used`."""
        here = [name for name in used if name.startswith(f"{self.template}.")]
        return {name.replace(self.template, block, 1) for name in here for block in self.others}


class NotRepeated(Exception):
    """The nodes of a block don't form a chain with those before and after it."""


def shorten(tower: nn.Module) -> tuple[nn.Module, tuple[Repetition, ...]]:
    """A copy of `tower`, which shares its tensors, with three blocks of each sequence of equal ones, and what it leaves out."""
    memo = {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())}
    short = copy.deepcopy(tower, memo)
    found: list[Repetition] = []
    for name, blocks in list(short.named_modules()):
        inside = any(name.startswith(f"{other.name}.") for other in found)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and not inside and _repeats(list(blocks)):
            children = OrderedDict(blocks.named_children())
            found.append(Repetition(name, tuple(children)))
            kept = OrderedDict((key, children[key]) for key in (*found[-1].blocks[:2], found[-1].blocks[-1]))
            short.set_submodule(name, nn.Sequential(kept))
    return short, tuple(found)


def _repeats(blocks: list[nn.Module]) -> bool:
    return len(blocks) > KEPT and all(_alike(blocks[1], block) for block in blocks[2:-1])


def _alike(left: nn.Module, right: nn.Module) -> bool:
    """Whether two blocks compute the same but for the values of their tensors, as far as their attributes tell."""
    parts, others = list(left.modules()), list(right.modules())
    return len(parts) == len(others) and all(map(_alike_alone, parts, others))


def _alike_alone(left: nn.Module, right: nn.Module) -> bool:
    hooked = any((m._forward_hooks or m._forward_pre_hooks) for m in (left, right))
    settings, others = ({k: v for k, v in vars(m).items() if not k.startswith("_")} for m in (left, right))
    return (
        not hooked
        and type(left) is type(right)
        and _shapes(left) == _shapes(right)
        and settings.keys() == others.keys()
        and all(_same(settings[name], others[name]) for name in settings)
    )


def _shapes(module: nn.Module) -> dict[str, object]:
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor.shape for name, tensor in tensors}


def _same(left: object, right: object) -> bool:
    return left is right or (isinstance(left, bool | int | float | str | tuple) and left == right)


def repeat_(graph: ir.Graph, repetition: Repetition, tensors: Mapping[str, Tensor]) -> None:
    """Insert the blocks that were left out; `tensors` are those of the whole tower by their names in it.

    Raises NotRepeated: a block reads or gives more than the one activation between blocks.
    """
    nodes = [node for node in graph if repetition.template in _scopes(node)]
    if not nodes:  # blocks of the other tower
        return
    before, after = _activations(graph, nodes, repetition, tensors)
    readers = [(node, i) for node, i in after.uses() if repetition.template not in _scopes(node)]
    if not all(repetition.last in _scopes(node) for node, _ in readers):
        raise NotRepeated(repetition.name)
    last, end = after, nodes[-1]
    for block in repetition.others:
        twins: dict[ir.Value | None, ir.Value] = {before: last}
        for value in _parameters(nodes, repetition.template):
            twins[value] = _parameter(graph, str(value.name).replace(repetition.template, block, 1), tensors)
        copies = [_copy(node, twins, block) for node in nodes]
        graph.insert_after(end, copies)
        last, end = twins[after], copies[-1]
    for node, i in readers:
        node.replace_input_with(i, last)


def _scopes(node: ir.Node) -> list[str]:
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return scopes


def _activations(
    graph: ir.Graph, nodes: list[ir.Node], repetition: Repetition, tensors: Collection[str]
) -> tuple[ir.Value, ir.Value]:
    """What the template reads of the block before it, and what it gives to the one after.

    All else that it reads must be its own, a constant, or what the first block reads too, such as a mask: what each block
    gets of its own from outside (rotations by depth) would be repeated as well.
    """
    members, first = set(nodes), [node for node in graph if repetition.first in _scopes(node)]
    shared, made = {value for node in first for value in node.inputs}, {v for node in first for v in node.outputs}
    own = _parameters(nodes, repetition.template)
    read = {value for node in nodes for value in node.inputs if value is not None and value.producer() not in members}
    foreign = [value for value in read - shared - own - made if not _is_constant(value, tensors)]
    before = [value for value in read & made if not _is_constant(value, tensors)]
    after = [v for node in nodes for v in node.outputs if v.is_graph_output() or set(v.consumers()) - members]
    nested = any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for node in nodes
        for attribute in node.attributes.values()
    )
    if foreign or len(before) != 1 or len(after) != 1 or nested or after[0].is_graph_output():
        raise NotRepeated(repetition.name)
    return before[0], after[0]


def _is_constant(value: ir.Value, tensors: Collection[str]) -> bool:
    producer = value.producer()
    return producer.op_type == "Constant" if producer else value.is_initializer() and value.name not in tensors


def _parameters(nodes: list[ir.Node], block: str) -> set[ir.Value]:
    read = {value for node in nodes for value in node.inputs if value is not None and value.is_initializer()}
    return {value for value in read if str(value.name).startswith(f"{block}.")}


def _parameter(graph: ir.Graph, name: str, tensors: Mapping[str, Tensor]) -> ir.Value:
    tensor = ir.tensor(tensors[name].detach().numpy(), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
    value.shape = ir.Shape(tensors[name].shape)
    graph.register_initializer(value)
    return value


def _copy(node: ir.Node, twins: dict[ir.Value | None, ir.Value], block: str) -> ir.Node:
    """The node with the twins of its inputs; its outputs become twins."""
    inputs = [twins.get(value, value) for value in node.inputs]
    twin = ir.Node(
        node.domain, node.op_type, inputs, node.attributes.values(), overload=node.overload,
        num_outputs=len(node.outputs), name=f"{block}.{node.name}",
    )  # fmt: skip
    for value, other in zip(node.outputs, twin.outputs, strict=True):
        other.name, other.type, other.shape = f"{block}.{value.name}", value.type, value.shape
        other.const_value = value.const_value
        twins[value] = other
    return twin
