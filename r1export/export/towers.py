"""The two towers of a CLIP as modules for export: one input, one unit-norm output, explicit attention.

visual   pixel_values float (n, 3, H, W) -> image_embeds (n, D)
textual  input_ids    int64 (n, L)       -> text_embeds  (n, D)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r1export.errors import Unsupported, first_line
from r1export.export.attention import AnyModule, block_lists, open_up_, share_masks_
from r1export.update.release_layout import TEXTUAL, VISUAL, TowerFiles

NOT_IN_A_TOWER = ("logit_scale", "logit_bias")
SAME = 1e-4  # max-abs on unit-norm embeddings: a rewriting that differs by more is another function
EXAMPLES = 2  # a batch of 1 would be baked into the graph


class VisualTower(nn.Module):
    def __init__(self, model: AnyModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeds: Tensor = self.model.encode_image(pixel_values, normalize=True)
        return embeds


class TextualTower(nn.Module):
    def __init__(self, model: AnyModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.model.encode_text(input_ids, normalize=True)
        return embeds


@dataclass(frozen=True, eq=False)
class Tower:
    """A module to export, its example input, the tensors of the model by state_dict name, and what the model gives.

    `expected` are the embeddings of the example before the module was rewritten for export, with the weights of that time.
    """

    files: TowerFiles
    module: nn.Module
    example: Tensor
    expected: Tensor
    tensors: dict[str, Tensor]


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a weights file can hold: parameters and persistent buffers of floating point, by state_dict name."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}


def make_towers(model: nn.Module, image_size: tuple[int, int], context_length: int) -> tuple[Tower, Tower]:
    """Both towers over `model`, which is rewritten in place: give a copy whose tensors you can spare.

    Raises Unsupported: a tower does not run on an example input.
    """
    tensors = {name: tensor for name, tensor in float_tensors(model).items() if name not in NOT_IN_A_TOWER}
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(EXAMPLES, 3, *image_size, generator=generator)
    tokens = torch.randint(1, _vocabulary(model), (EXAMPLES, context_length), generator=generator)
    return (
        _tower(VISUAL, VisualTower(model), pixels, tensors),
        _tower(TEXTUAL, TextualTower(model), tokens, tensors),
    )


def _vocabulary(model: nn.Module) -> int:
    return next((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), 2)


@torch.no_grad()
def _tower(files: TowerFiles, module: nn.Module, example: Tensor, tensors: dict[str, Tensor]) -> Tower:
    module.eval()
    try:
        with recorded_tokens(module) as tokens:
            expected = module(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Unsupported(
            f"the {files.name} tower does not run: {first_line(error)}",
            "check base.model and its config",
        ) from error
    return Tower(files, _opened(files, module, example, expected, tokens), example, expected, tensors)


@contextmanager
def recorded_tokens(module: nn.Module) -> Iterator[dict[int, int]]:
    """Runs of `module` inside note how many tokens each sequence of blocks sees, by its position among them."""
    tokens: dict[int, int] = {}
    hooks = []
    for i, blocks in enumerate(block_lists(module)):
        hooks.append(
            blocks[0].register_forward_pre_hook(
                lambda _, args, i=i: tokens.update({i: args[0].shape[1]} if args[0].ndim == 3 else {})
            )
        )
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()


def _opened(
    files: TowerFiles, module: nn.Module, example: Tensor, expected: Tensor, tokens: dict[int, int]
) -> nn.Module:
    """The fastest rewriting that computes the same; if none does, the module as it is."""
    for first_only in (True, False) if files == VISUAL else (False,):
        memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}  # copies share the tensors
        candidate = copy.deepcopy(module, memo)
        for i, blocks in list(enumerate(block_lists(candidate))):
            if i in tokens:
                open_up_(blocks, tokens[i], first_only=first_only)
        share_masks_(candidate)
        try:
            if (candidate(example) - expected).abs().max() <= SAME:
                return candidate
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            continue  # a block that needs more than its last dimension, or more tokens than the first
    return module
