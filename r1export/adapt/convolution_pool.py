"""A pool of rank-1 experts for one convolution (the formulas are in pool.py)."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from r1export.adapt.pool import ExpertPool
from r1export.adapt.pool_settings import PoolSettings


class ConvolutionPool(ExpertPool):
    """The experts of one adapted convolution: they see the positions that it sees, and each image votes with its mean."""

    def __init__(self, base: nn.Conv2d, settings: PoolSettings) -> None:
        """A pool for a convolution of one group, which pads with zeros if at all."""
        super().__init__(base.weight, settings, route_on="mean")
        self._kernel, self._stride = base.kernel_size, base.stride
        self._padding, self._dilation = base.padding, base.dilation
        self._pads_to_input = isinstance(base, Conv2dSame)

    def add(self, x: Tensor, weights: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, h', w')."""
        kernels = self.lora_A.view(len(self.lora_A), -1, *self._kernel)
        if self._pads_to_input:
            x = pad_same(x, list(self._kernel), list(self._stride), list(self._dilation))
        padding = 0 if self._pads_to_input else self._padding
        low = F.conv2d(x, kernels, None, self._stride, padding, self._dilation)
        return F.conv2d(low * weights.view(-1, weights.shape[-1], 1, 1), self.lora_B[:, :, None, None])

    def reads(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (N, in * kh * kw), one row for each position of the output."""
        if self._pads_to_input:
            x = pad_same(x, list(self._kernel), list(self._stride), list(self._dilation))
        padding = 0 if self._pads_to_input else cast(tuple[int, ...], self._padding)
        patches = F.unfold(x, self._kernel, self._dilation, padding, self._stride)
        return patches.transpose(1, 2).flatten(0, 1)

    def writes(self, y: Tensor) -> Tensor:
        """(n, out, h', w') -> (N, out)."""
        return y.flatten(2).transpose(1, 2).flatten(0, 1)

    def token(self, x: Tensor) -> Tensor:
        """The mean of each image over its positions, (n, in)."""
        return x.mean((2, 3))
