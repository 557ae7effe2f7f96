"""Distributed training (torchrun): images are split, features gathered, votes summed.

Each process encodes its part of the images and all prompts; the loss is that of the joined batch, in every process. With
world processes the gradient that reaches a feature is world times that of one loss, and DistributedDataParallel takes
the mean over processes: together the gradient of the joined batch.
"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.nn.parallel import DistributedDataParallel

from r1export.adapt.clip import Clip
from r1export.adapt.pool import Pools
from r1export.adapt.routing import Batch
from r1export.errors import InputError


def start(device: str) -> None:
    """Join the processes that torchrun started; nothing where there is only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes the files and speaks: the only one, or rank 0."""
    return world() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()


class _Peers:
    """What pools of the image tower ask of the other processes."""

    def add_(self, votes: Tensor) -> None:
        dist.all_reduce(votes)

    def average(self, mean: Tensor) -> Tensor:
        total: Tensor = all_reduce(mean)
        return total / world()


class Encoders(nn.Module):
    """Both towers as one module, as DistributedDataParallel wants it."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model, self._clip = clip.model, clip

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-norm embeddings of uint8 (n, 3, h, w) and int64 (m, L)."""
        return self._clip.encode_image(pixels), self._clip.encode_text(tokens)


def encoders(clip: Clip, pools: Pools) -> nn.Module:
    """`Encoders`, shared with the other processes where there are some; visual pools then add up the votes of all."""
    towers = Encoders(clip)
    if world() == 1:
        return towers
    for rows, pool in pools.items():
        if rows.parameter.startswith("visual."):
            pool.route_(Batch(_Peers()))
    return DistributedDataParallel(towers, find_unused_parameters=True)  # a random router is never used


def shares(indices: np.ndarray) -> list[np.ndarray]:
    """The images of each process, of equal number. Raises InputError if there are too few for one each."""
    count = len(indices) // world()
    if not count:
        raise InputError(
            f"a batch of {len(indices)} images is too small for {world()} processes", "raise train.batch_size"
        )
    return [indices[i * count : (i + 1) * count] for i in range(world())]


def gathered(features: Tensor) -> Tensor:
    """The features of all processes, in their order; gradients flow back to the process they came from."""
    return torch.cat(all_gather(features)) if world() > 1 else features


def average_(tensor: Tensor) -> None:
    """The mean over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
        tensor /= world()


def own(parts: list[np.ndarray]) -> np.ndarray:
    """This process's part."""
    return parts[dist.get_rank() if world() > 1 else 0]
