"""The two towers of a CLIP as modules made for export: one input, one unit-norm output, attention in the open.

    visual   pixel_values float (n, 3, H, W) -> image_embeds (n, D)
    textual  input_ids    int64 (n, L)       -> text_embeds  (n, D)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OpenAttention(nn.Module):
    """nn.MultiheadAttention's self-attention written as two linears around scaled dot-product attention.

    torch's own forward moves the batch through the second dimension and back, which costs eight reshapes and
    transposes per block in the exported graph. Parameters keep their names.
    """

    def __init__(self, base: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias, self.out_proj = base.in_proj_weight, base.in_proj_bias, base.out_proj
        self.num_heads = base.num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(n, tokens, d) -> (n, tokens, d); `key` and `value` are `query`."""
        n, tokens, width = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (part.view(n, tokens, self.num_heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).reshape(n, tokens, width)), None


class VisualTower(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values, normalize=True)


class TextualTower(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids, normalize=True)


@dataclass(frozen=True)
class Tower:
    """A module to export with its example input (batch 2: a batch of 1 would be baked in) and the parameters it owns."""

    name: str
    module: nn.Module
    example: Tensor
    input_name: str
    output_name: str
    parameters: tuple[str, ...]


def make_towers(model: nn.Module, image_size: tuple[int, int], context_length: int) -> tuple[Tower, Tower]:
    """Both towers over one private copy of `model`; the copy's parameters keep their state_dict names."""
    model = copy.deepcopy(model).eval()
    names = [name for name, _ in model.named_parameters() if name not in ("logit_scale", "logit_bias")]
    for module in list(model.modules()):
        if isinstance(getattr(module, "attn", None), nn.MultiheadAttention):
            module.attn = OpenAttention(module.attn)
    visual = tuple(name for name in names if name.startswith("visual."))
    textual = tuple(name for name in names if not name.startswith("visual."))
    pixels, tokens = torch.zeros(2, 3, *image_size), torch.ones(2, context_length, dtype=torch.int64)
    return (
        Tower("visual", VisualTower(model).eval(), pixels, "pixel_values", "image_embeds", visual),
        Tower("textual", TextualTower(model).eval(), tokens, "input_ids", "text_embeds", textual),
    )
