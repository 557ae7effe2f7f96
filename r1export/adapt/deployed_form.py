"""The deployed form of an image tower: branches fused, BatchNorm folded into the preceding layer.

Procedure 1, in float64, rounded once to the type of the weights:

    1. every module that timm can reparameterize is, by its own method: MobileOne, RepMixer, RepVGG, large kernels
    2. each BatchNorm whose input is the output of a convolution or linear that nothing else reads goes into it:
       g = gamma / sqrt(var + eps)      W' = g[:, None, ...] W      b' = g (b - mean) + beta

Other BatchNorms stay, and a tower with neither is unchanged. Experts, digests and graphs refer to the deployed form: it has
a single weight to merge experts into, and makes training steps cheaper.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from r1export.errors import Unsupported, first_line

DEPLOYED_FORM = 1  # number of the procedure
FOLDS_INTO = (nn.Conv2d, Conv2dSame, nn.Linear)  # these very classes: others compute with another weight than theirs
FUSED_BY = ("fuse", "reparameterize", "switch_to_deploy")  # names of timm's methods


class Fold(NamedTuple):
    """The names of a layer and of the BatchNorm that can be folded into it."""

    layer: str
    norm: str


def deploy_(tower: nn.Module, image_size: tuple[int, int]) -> bool:
    """Bring an image tower in eval mode into its deployed form, in place; False if it was in it already.

    `image_size` is the height and width of its input in pixels.

    Raises Unsupported: the tower does not run on an image of that size.
    """
    if not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or _fuses(module) for module in tower.modules()):
        return False
    dtype = next(tower.parameters()).dtype
    with _default_dtype(torch.float64):
        reparameterize_model(tower.double(), inplace=True)
    for fold in foldable(tower, image_size):
        _fold_(tower, fold)
    tower.to(dtype).eval().requires_grad_(False)
    return True


def _fuses(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in FUSED_BY)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """timm makes the fused layers in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def foldable(tower: nn.Module, image_size: tuple[int, int]) -> list[Fold]:
    """Every BatchNorm that follows a layer whose output nothing else reads, found by running the tower without values.

    Raises Unsupported: the tower does not run on an image of that size.
    """
    skeleton = copy.deepcopy(tower).to("meta")
    made: dict[int, str] = {}
    read: dict[str, int] = {}
    calls: Counter[str] = Counter()
    for name, module in skeleton.named_modules():
        if type(module) in FOLDS_INTO:
            module.register_forward_hook(_noting_output(name, made, calls))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.register_forward_pre_hook(_noting_input(name, read, calls))
    readers = _Readers()
    example = torch.empty(1, 3, *image_size, device="meta", dtype=next(skeleton.parameters()).dtype)
    try:
        with readers, torch.no_grad():
            skeleton(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Unsupported(
            f"the visual tower does not run: {first_line(error)}", "check base.model and its config"
        ) from error
    pairs = [Fold(made[tensor], norm) for norm, tensor in read.items() if tensor in made and readers.count[tensor] == 1]
    return [fold for fold in pairs if calls[fold.layer] == calls[fold.norm] == 1]


def _noting_output(name: str, made: dict[int, str], calls: Counter[str]) -> Callable[[nn.Module, object, Tensor], None]:
    def note(_: nn.Module, __: object, output: Tensor) -> None:
        made[id(output)] = name
        calls[name] += 1

    return note


def _noting_input(
    name: str, read: dict[str, int], calls: Counter[str]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[name] = id(inputs[0])
        calls[name] += 1

    return note


class _Readers(TorchFunctionMode):
    """Counts how often each tensor is an argument of a function that gives tensors, and keeps all of them: ids stay theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        results, arguments = list(_tensors(result)), list(_tensors((args, kwargs)))
        if results:
            self.count.update(map(id, arguments))
            self._kept += results + arguments
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@torch.no_grad()
def _fold_(tower: nn.Module, fold: Fold) -> None:
    layer, norm = tower.get_submodule(fold.layer), tower.get_submodule(fold.norm)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = (1 if norm.weight is None else norm.weight) / (norm.running_var + norm.eps).sqrt()
    centered = (0 if layer.bias is None else layer.bias) - norm.running_mean
    layer.weight.mul_(gain.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(gain * centered + (0 if norm.bias is None else norm.bias))
    tower.set_submodule(fold.norm, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
