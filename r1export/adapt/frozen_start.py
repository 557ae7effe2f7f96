"""Cache the frozen start of an image tower: everything up to the first block with experts.

If `pool.layers` excludes the first blocks, the input of the first block with experts is the same in every step. It is
computed once per image and cached, and the tower starts there: earlier modules return zeros of the right shape, and the
cached value replaces the block's input. If a later module reads more than that input, the embeddings would differ, and the
tower is computed from the pixels instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from r1export.adapt.blocks import chosen_blocks
from r1export.adapt.clip import Clip
from r1export.adapt.image_cache import Pixels
from r1export.adapt.pool_settings import PoolSettings

BATCH = 64  # images computed at a time
BUDGET = 256 << 20  # bytes kept per set; larger than pixels, and a run has two sets for every task
TOLERANCE = 1e-5  # on unit-norm embeddings: other batch sizes alone move them by 1e-7


class _Reached(Exception):
    """The tower has come to the block: the rest is not computed."""


@dataclass(frozen=True)
class FrozenStart:
    """Where an image tower starts: at a block of the model, after the modules that are `skipped`. Shapes are without n."""

    block: str
    skipped: dict[str, tuple[int, ...]]
    """What the outermost modules before the block give, by their names."""
    entering: tuple[int, ...]
    """What enters the block."""

    def inputs(self, clip: Clip, pixels: Tensor) -> Tensor:
        """What enters the block for uint8 (n, 3, h, w), in float32 on the CPU."""
        reached: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            reached.append(args[0])
            raise _Reached

        with torch.no_grad(), _hooked(clip.model.get_submodule(self.block), stop):
            try:
                clip.encode_image(pixels)
            except _Reached:
                return reached[0].float().cpu()
        raise AssertionError(f"{self.block} was not reached")

    @contextmanager
    def given(self, model: nn.Module, inputs: Tensor) -> Iterator[None]:
        """Within it the image tower computes its embeddings from `inputs` of the block, whatever image it is given."""

        def put(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (inputs, *args[1:]), kwargs

        def zeros(shape: tuple[int, ...]) -> Callable[..., Tensor]:
            return lambda *args, **kwargs: inputs.new_zeros(()).expand(len(inputs), *shape)

        with ExitStack() as stack:
            stack.enter_context(_hooked(model.get_submodule(self.block), put))
            for name, shape in self.skipped.items():
                module = model.get_submodule(name)
                module.forward = zeros(shape)
                stack.callback(delattr, module, "forward")
            yield


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class LateClip(Clip):
    """A CLIP whose images are given as what enters a block of its image tower."""

    start: FrozenStart | None = None

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Inputs (n, ...) of the block -> unit-norm float (n, D)."""
        assert self.start is not None
        inputs = pixels.to(self.device)
        image = inputs.new_zeros(()).expand(len(inputs), 3, *self.preprocess.size)
        with self.start.given(self.model, inputs):
            embeds: Tensor = self.model.encode_image(image, normalize=True)
        return embeds


class BlockInputs:
    """The images of a set as what enters a block: kept if it fits into memory, computed from the pixels again if not."""

    def __init__(self, pixels: Pixels, clip: Clip, start: FrozenStart, *, budget: int = BUDGET) -> None:
        self._pixels, self._clip, self._start = pixels, clip, start
        shape = (len(pixels), *start.entering)
        keep = pixels.kept and 4 * int(np.prod(shape, dtype=np.int64)) <= budget
        self._kept = torch.empty(shape) if keep else None
        self._done = np.zeros(len(pixels), bool)

    def __len__(self) -> int:
        return len(self._pixels)

    def batch(self, indices: np.ndarray, visit: int = 0) -> Tensor:
        """float32 (n, ...). Raises InputError naming an image that cannot be decoded."""
        if self._kept is None:
            return self._start.inputs(self._clip, self._pixels.batch(indices, visit))
        missing = np.unique(indices[~self._done[indices]])
        for begin in range(0, len(missing), BATCH):
            part = missing[begin : begin + BATCH]
            self._kept[part] = self._start.inputs(self._clip, self._pixels.batch(part, visit))
            self._done[part] = True
        return self._kept[indices]

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))


def frozen_start(clip: Clip, settings: PoolSettings) -> FrozenStart | None:
    """Where the image tower starts that gets experts by `settings`; None if its first block has some, or if it cannot start later."""
    if "visual" not in settings.towers:
        return None
    first, chosen = (chosen_blocks(clip.model, "visual", each)[0] for each in (replace(settings, layers=()), settings))
    if first.name == chosen.name:
        return None
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, *clip.preprocess.size), np.uint8))
    start = _traced(clip, chosen.name, pixels)
    with torch.no_grad():
        late = late_clip(clip, start).encode_image(start.inputs(clip, pixels))
        difference = (late - clip.encode_image(pixels)).abs().max()
    return start if difference < TOLERANCE else None


def late_clip(clip: Clip, start: FrozenStart) -> LateClip:
    """The same model, given what enters a block of its image tower."""
    return LateClip(**{field.name: getattr(clip, field.name) for field in fields(Clip)}, start=start)


def _traced(clip: Clip, block: str, pixels: Tensor) -> FrozenStart:
    """The outermost modules of the image tower that are done when `block` begins."""
    parents = [block[:end] for end, letter in enumerate(block) if letter == "."]
    before = {
        f"{parent}.{name}": module
        for parent in parents
        for name, module in clip.model.get_submodule(parent).named_children()
        if f"{parent}.{name}" not in (*parents, block)
    }
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        return add

    handles = [module.register_forward_hook(note(name)) for name, module in before.items()]
    try:
        entering = FrozenStart(block, {}, ()).inputs(clip, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return FrozenStart(block, shapes, tuple(entering.shape[1:]))
