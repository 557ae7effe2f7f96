"""Load weights from a file: without running code, converted to open_clip's names, and checked before memory is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import load_state_dict
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from r1export.adapt.layouts import State, has_openai_extras, to_open_clip, without_wrappers
from r1export.adapt.photo_vit import EXTENDS, with_photo
from r1export.errors import InputError, first_line, refused

SUFFIX = ".safetensors"
POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding", "visual.trunk.pos_embed")  # fmt: skip
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNSCALED = {"float8": "unscaled"}  # metadata of a safetensors file whose floats of 8 bits are the weights themselves
CODE = torch.int8  # stands for every other type of a header: integers of all sizes, and floats of 8 and 4 bits
SIGNATURES = (
    (b"PK\x03\x04", "a zip file, which is what torch.save writes, or numpy"),
    (b"\x80", "a pickle"),
    (b"GGUF", "a GGUF file of quantized weights"),
    (b"\x89HDF", "an HDF5 file of Keras"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"\x08", "possibly an ONNX model"),
)
_CONVERT = "convert the checkpoint with safetensors.torch.save_file"
_FIT = "check base.model and base.config"


def load_weights_(model: Any, weights: Path, *, allow_pickle: bool = False) -> list[str]:
    """Load a checkpoint into `model`, in place, and return notes for the user, one line each.

    Raises:
        InputError: not a file, not safetensors and pickle is not allowed, integer or non-finite weights, or tensors that don't
            match the model; the message names the first tensor.
        Unsupported: the file is not readable.
    """
    with _reading(weights):
        pickled = allow_pickle and weights.suffix != SUFFIX
        stored: State = load_state_dict(str(weights)) if pickled else _read(weights)
    state = to_open_clip(stored, model)
    notes = _resized_(state, model)
    _check_fit(weights, state, model)
    _check_floating(weights, state, model)
    _check_finite(weights, state)
    with _reading(weights):
        model.load_state_dict(state)
    return notes + _about_activation(model, stored)


def check_header(model: Any, weights: Path) -> None:
    """Compare the header of the weights with `model`, which may be on the meta device: before memory is taken for it.

    Raises InputError as `load_weights_` does, but for what only the values show.
    """
    headers = _headers(weights)
    state = {name: torch.empty(shape, dtype=kind, device="meta") for name, (kind, shape) in headers.items()}
    with _reading(weights):
        converted = to_open_clip(state, model)
    _check_fit(weights, converted, model, resizable=True)
    _check_floating(weights, converted, model)


def what_it_is(path: Path) -> str:
    """In words, for a file that is not safetensors; empty if its first bytes say nothing."""
    with path.open("rb") as file:
        first = file.read(32)
    return next(
        (words for signature, words in SIGNATURES if first.startswith(signature)), "an empty file" * (not first)
    )


def _read(weights: Path) -> State:
    with safe_open(weights, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    if EXTENDS in metadata:
        return with_photo(tensors, _read(_rest(weights, metadata)))
    if metadata != UNSCALED:
        return tensors
    return {name: t.half() if t.dtype == torch.float8_e4m3fn else t for name, t in tensors.items()}  # no value changes


def _headers(weights: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) of all tensors, from the header alone."""
    with _reading(weights), safe_open(weights, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
        kinds = FLOATS | ({"F8_E4M3": torch.float16} if metadata == UNSCALED else {})
        headers = {name: (kinds.get(part.get_dtype(), CODE), tuple(part.get_shape())) for name, part in slices.items()}
        return with_photo(headers, _headers(_rest(weights, metadata))) if EXTENDS in metadata else headers


def _rest(weights: Path, metadata: Mapping[str, str]) -> Path:
    """The file next to `weights` that has the rest of its tensors, and extends no other file."""
    rest = weights.with_name(metadata[EXTENDS])
    with safe_open(rest, "pt") as opened:
        if EXTENDS in (opened.metadata() or {}):
            raise InputError(
                f"{weights} extends {rest.name}, which extends another file, expected complete weights there",
                "download both files again",
            )
    return rest


def _resized_(state: State, model: Any) -> list[str]:
    """Bring position embeddings to the length that the model has, as open_clip does; says which changed."""
    before = {name: tuple(state[name].shape) for name in POSITIONS if name in state}
    for name in before:
        state[name] = state[name].float()  # which interpolation needs
    try:
        resize_pos_embed(state, model)
        if hasattr(model, "positional_embedding") or hasattr(getattr(model, "text", None), "positional_embedding"):
            resize_text_pos_embed(state, model)
        _resize_timm_(state, model)
    except (RuntimeError, AssertionError, ValueError):
        return []  # another width, or no square: the comparison of shapes names it
    return [
        f"position embeddings {name} resized from {shape} to {tuple(state[name].shape)}, as open_clip does"
        for name, shape in before.items()
        if tuple(state[name].shape) != shape
    ]


def _resize_timm_(state: State, model: Any) -> None:
    """As timm does when a model is given another size of images."""
    name, trunk = "visual.trunk.pos_embed", getattr(model.visual, "trunk", None)
    own = getattr(trunk, "pos_embed", None)
    if trunk is None or name not in state or not isinstance(own, Tensor) or own.shape == state[name].shape:
        return
    prefix = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 1)
    state[name] = resample_abs_pos_embed(state[name], list(trunk.patch_embed.grid_size), num_prefix_tokens=prefix)


def _check_fit(weights: Path, state: State, model: nn.Module, *, resizable: bool = False) -> None:
    sizes, stored = ({name: tuple(t.shape) for name, t in some.items()} for some in (model.state_dict(), state))
    wrong = [
        name
        for name in sorted(sizes.keys() | stored.keys())
        if sizes.get(name) != stored.get(name) and not (resizable and _can_resize(name, sizes, stored))
    ]
    if wrong:
        more = f"; {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise InputError(
            f"{weights} does not match the model: {wrong[0]} is {stored.get(wrong[0], 'missing')}, "
            f"expected {sizes.get(wrong[0], 'no such tensor')}{more}",
            _FIT,
        )


def _can_resize(name: str, sizes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> bool:
    """A position embedding whose last dimension, the width, is that of the model."""
    size, shape = sizes.get(name), stored.get(name)
    return (
        name in POSITIONS
        and size is not None
        and shape is not None
        and size[-1:] == shape[-1:]
        and math.prod(shape) > 0
    )


def _check_floating(weights: Path, state: State, model: nn.Module) -> None:
    """Counters of BatchNorm apart, a model has floating point only."""
    floating = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    codes = [name for name in floating if state[name].dtype not in FLOATS.values()]
    if codes:
        more = f" and {len(codes) - 1} more are" if len(codes) > 1 else " is"
        raise InputError(
            f"{weights}: {codes[0]}{more} not floating point of 16 bits or more",
            "quantized values can't be used without their scales: use the original checkpoint",
        )


def _check_finite(weights: Path, state: State) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{weights}: {name} has {count} NaN or infinite values",
                "use a checkpoint from before training diverged",
            )


def _about_activation(model: nn.Module, stored: State) -> list[str]:
    """OpenAI trained with QuickGELU; a config without it computes other embeddings, and nothing else shows it."""
    quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    if quick or not has_openai_extras(without_wrappers(stored)):
        return []
    return ["warning: OpenAI's weights need QuickGELU, which the config lacks: set base.quick_gelu = true"]


@contextmanager
def _reading(weights: Path) -> Iterator[None]:
    """What goes wrong while the file is read is an InputError."""
    if weights.is_dir():
        raise InputError(
            f"{weights} is a folder, expected a {SUFFIX} file",
            f'use the file in it, or base.model = "local-dir:{weights}" if it has an open_clip_config.json',
        )
    if not weights.is_file():
        problem = "not a file" if weights.exists() else "no such file"
        raise InputError(f"{weights}: {problem}", f"set base.weights to the path of a {SUFFIX} file")
    try:
        weights.open("rb").close()  # safetensors says that a file is missing where it may not be read
        yield
    except InputError:
        raise
    except PermissionError as error:
        raise refused(error) from error
    except Exception as error:  # SafetensorError, or what torch raises for the dtypes and sizes of a damaged header
        found = what_it_is(weights) or first_line(error)
        raise InputError(f"{weights}: not a safetensors file: {found}", _CONVERT) from error
