"""A graph whose blocks are copies of one is the graph of the whole tower, and towers whose blocks differ are traced whole."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from export import exporting
from torch import Tensor, nn

from r1export.export import trace as trace_module
from r1export.export.audit import audit_reexport
from r1export.export.repeat import NotRepeated, Repetition, shorten
from r1export.update.release_layout import GRAPHS

FP32 = 2e-6  # max-abs on unit-norm embeddings of a tiny model
DEPTH = 6
TEXT = {"context_length": 12, "vocab_size": 100, "width": 16, "heads": 2, "layers": DEPTH}
VISION = {"image_size": 16, "layers": DEPTH, "width": 16, "head_width": 8, "patch_size": 8}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT).eval()


@pytest.fixture
def outcomes(monkeypatch) -> list[str]:
    """What became of every repetition, in order."""
    seen: list[str] = []

    def noted(graph, repetition: Repetition, tensors) -> None:
        try:
            original(graph, repetition, tensors)
        except NotRepeated:
            seen.append("refused")
            raise
        seen.append("repeated")

    original = trace_module.repeat_
    monkeypatch.setattr(trace_module, "repeat_", noted)
    return seen


def test_a_tower_of_repeated_blocks_has_the_bytes_of_the_whole_one(model, outcomes, tmp_path, monkeypatch) -> None:
    repeated = exporting.export(model, tmp_path / "repeated")
    assert "repeated" in outcomes
    assert "refused" not in outcomes
    assert repeated.error(3) < FP32
    monkeypatch.setattr(trace_module, "shorten", lambda tower: (tower, ()))
    exporting.export(model, tmp_path / "whole")
    for file in (*GRAPHS, "weight_map.json"):
        assert _bytes(tmp_path, "repeated", file) == _bytes(tmp_path, "whole", file), file


def _bytes(folder: Path, kind: str, file: str) -> bytes:
    return (folder / kind / file).read_bytes()


def test_the_first_two_blocks_and_the_last_are_kept_with_their_names_and_tensors(model) -> None:
    short, found = shorten(model)
    assert {repetition.name for repetition in found} == {"visual.transformer.resblocks", "transformer.resblocks"}
    assert [name for name, _ in short.transformer.resblocks.named_children()] == ["0", "1", str(DEPTH - 1)]
    whole = dict(model.named_parameters())
    assert all(parameter is whole[name] for name, parameter in short.named_parameters())
    assert len(model.transformer.resblocks) == DEPTH


def test_blocks_that_differ_in_a_setting_or_a_hook_are_not_equal(model) -> None:
    model.transformer.resblocks[3].ln_2.eps = 1e-3
    model.visual.transformer.resblocks[2].register_forward_hook(lambda module, args, out: out)
    assert shorten(model)[1] == ()


class Loop(nn.Module):
    """A text transformer in place of open_clip's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.resblocks = base.resblocks
        self.register_buffer("scales", torch.linspace(0.5, 2, DEPTH), persistent=False)

    def get_cast_dtype(self) -> torch.dtype:
        return torch.float32


class ByDepth(Loop):
    """Each block gets a mask of its own, made outside of the blocks."""

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        for i, block in enumerate(self.resblocks):
            x = block(x, attn_mask=(attn_mask == 0) * self.scales[i])
        return x


def test_what_each_block_gets_of_its_own_from_outside_is_not_repeated(model, outcomes, tmp_path) -> None:
    model.transformer = ByDepth(model.transformer)
    assert exporting.export(model, tmp_path).error(3) < FP32
    assert "refused" in outcomes


class Scaled(Loop):
    """Something is computed between two blocks."""

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask=attn_mask) * 0.9
        return x


def test_work_between_blocks_is_not_left_out(model, outcomes, tmp_path) -> None:
    model.transformer = Scaled(model.transformer)
    assert exporting.export(model, tmp_path).error(3) < FP32
    assert "refused" in outcomes


class Numbered(nn.Module):
    """A block that is told its depth."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, attn_mask: Tensor, depth: int) -> Tensor:
        return self.block(x, attn_mask=attn_mask) * (1 + depth / DEPTH)


class Counting(Loop):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.resblocks = nn.ModuleList(map(Numbered, base.resblocks))

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        for depth, block in enumerate(self.resblocks):
            x = block(x, attn_mask, depth)
        return x


def test_blocks_that_are_called_with_different_numbers_are_traced_whole_after_the_proof(
    model, outcomes, tmp_path
) -> None:
    model.transformer = Counting(model.transformer)
    assert exporting.export(model, tmp_path).error(3) < FP32
    assert "repeated" in outcomes


@pytest.mark.parametrize("numbered", [False, True])
def test_the_audit_traces_every_block_whatever_the_export_repeated(numbered, model, outcomes, tmp_path) -> None:
    model.transformer = Counting(model.transformer) if numbered else model.transformer
    exporting.export(model, tmp_path)
    outcomes.clear()
    audit = audit_reexport(model, (16, 16), TEXT["context_length"], tmp_path, opset=20)
    assert audit.nodes > 0
    assert outcomes == []
