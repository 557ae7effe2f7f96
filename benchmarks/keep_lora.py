"""KeepLoRA (arXiv 2601.19659) as a baseline: r1export's trainer with two changes, behind the same command line.

    python benchmarks/keep_lora.py train RECIPE --out RUN        # benchmarks/method.py --methods keep-lora does this

    A  fixed: the leading directions of the gradient at the start of a task, outside of what is protected (pool.init)
    B  trained from zero, merged after the task
    protected: the inputs of earlier tasks (train.protect), and the principal subspace of each weight instead of
    the task's own inputs: the leading right singular vectors of W that hold the share train.protect_own of |W|^2

Other than in its release every layer of r1export's pools is adapted instead of attention alone, and the steps and learning rate
are those of the comparison. Its shares for the image tower are 0.99 and 0.85; recipe: benchmarks/keep-lora.toml.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
from torch import Tensor

from r1export.adapt import input_span
from r1export.adapt.clip import Clip
from r1export.adapt.gradient_init import init_along_gradient_
from r1export.adapt.image_cache import Images
from r1export.adapt.input_span import Span
from r1export.adapt.pool import Pools
from r1export.adapt.trainer import TrainingTask
from r1export.cli import main
from r1export.pipeline import train


def principal_directions(clip: Clip, pools: Pools, images: Images, sample: np.ndarray, share: float) -> Span:
    """In place of `own_directions`: of the weights under the pools, which the images have no part in."""
    del images, sample
    weights = {name.replace(".base.", "."): p for name, p in clip.model.named_parameters()}

    def moment(weight: Tensor) -> Tensor:
        matrix = weight.detach().flatten(1).cpu().double()
        return matrix.T @ matrix

    return {
        rows: input_span._directions(
            moment(weights[rows.parameter][rows.start : rows.stop]), pool.span.cpu().double(), share
        )
        for rows, pool in pools.items()
    }


def fix_inputs_(clip: Clip, pools: Pools, training: TrainingTask) -> None:
    """In place of `init_along_gradient_`: the same, then A is not trained."""
    init_along_gradient_(clip, pools, training)
    for pool in pools.values():
        pool.lora_A.requires_grad_(False)


if __name__ == "__main__":
    with patch.multiple(train, own_directions=principal_directions, init_along_gradient_=fix_inputs_):
        main()
