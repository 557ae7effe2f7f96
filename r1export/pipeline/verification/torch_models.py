"""The torch side of verification: the unmerged and the merged model, and what goes in and out of their modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt.clip import Clip, ClipModel
from r1export.adapt.inject import eject_experts_
from r1export.adapt.pack import load_pool_tensors_
from r1export.adapt.pool import Pools
from r1export.pipeline.context import RunContext, inject_pools_
from r1export.update.container import read_tensors
from r1export.update.factors import ExpertUpdate
from r1export.verify.locate import Boundary
from r1export.verify.parity import Encode, Model
from r1export.verify.runtimes.runtime import CORES


@dataclass(frozen=True)
class TorchModels:
    """`merged` as a plain CLIP; `unmerged` with its `pools` frozen. The base has nothing to merge: both are one, without pools.

    `parameters` are those of `merged`, by name.
    """

    merged: Clip
    unmerged: Clip
    pools: Pools
    parameters: Mapping[str, np.ndarray]


@contextmanager
def torch_models(context: RunContext, number: int, updates: list[ExpertUpdate]) -> Iterator[TorchModels]:
    """The models of release `number`.

    Unmerged is what was trained: the weights before the task, with the selected experts added.
    """
    clip = context.clip
    if not number:
        yield TorchModels(clip, clip, {}, context.base)
        return
    parameters = context.merged(updates)
    merged = clip.with_weights(parameters)
    try:
        clip.load_(context.merged(updates[:-1]))
        pools = inject_pools_(clip, context.recipe)
        path = context.run.task(number, context.tasks[number - 1].name).pool
        load_pool_tensors_(pools, read_tensors(path), str(path))
        for pool in pools.values():
            pool.freeze_()
        clip.model.eval()
        yield TorchModels(merged, clip, pools, parameters)
    finally:
        eject_experts_(clip.model)
        clip.load_(context.base)


@contextmanager
def calls_in_parallel() -> Iterator[None]:
    """torch computes each call in one thread, so that the workers of a `Model` share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encoders(model: ClipModel) -> Model:
    """The two towers of an open_clip model as functions of arrays."""
    device = model.logit_scale.device

    def call(encode: Callable[..., Tensor]) -> Encode:
        def run(values: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return encode(torch.from_numpy(values).to(device), normalize=True).float().cpu().numpy()

        return run

    return Model(call(model.encode_image), call(model.encode_text), CORES if device.type == "cpu" else 1)


def module_boundaries(model: nn.Module, run: Callable[[], np.ndarray]) -> tuple[list[Boundary], np.ndarray]:
    """What goes into and comes out of every linear, norm, convolution and attention of `model` in `run`, and what `run` gives."""
    boundaries: list[Boundary] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            hooks.append(module.register_forward_hook(_attention_hook(name, boundaries), with_kwargs=True))
        elif isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d):
            hooks.append(module.register_forward_hook(_hook(name, boundaries)))
    try:
        with torch.inference_mode():
            output = run()
    finally:
        for hook in hooks:
            hook.remove()
    return boundaries, output


def _hook(name: str, boundaries: list[Boundary]) -> Callable[..., None]:
    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        boundaries.extend((Boundary(name, "in", _array(inputs[0])), Boundary(name, "out", _array(output))))

    return record


def _attention_hook(name: str, boundaries: list[Boundary]) -> Callable[..., None]:
    """nn.MultiheadAttention computes in one call; its projections are computed again here to look between them."""

    def record(
        attention: nn.MultiheadAttention,
        inputs: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: tuple[Tensor, ...],
    ) -> None:
        if not inputs or attention.in_proj_weight is None or not attention.batch_first:
            return
        x, mask = inputs[0], kwargs.get("attn_mask")
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
        boundaries.extend(
            (Boundary(f"{name}.in_proj", "in", _array(x)), Boundary(f"{name}.in_proj", "out", _array(projected)))
        )
        boundaries.extend(
            (Boundary(f"{name}.out_proj", "in", _array(mixed)), Boundary(f"{name}.out_proj", "out", _array(output[0])))
        )

    return record


def _array(tensor: Tensor) -> np.ndarray:
    """A copy: activations of convolutional towers write over what they get."""
    return tensor.detach().float().cpu().numpy().copy()
