"""Field updates of a run: what a device lacks, signed. The rules are in r1export.update; here they meet the models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from r1export.adapt.evaluate import class_embeddings
from r1export.errors import InputError
from r1export.pipeline.context import RunContext
from r1export.update.atomic_io import write_file
from r1export.update.bundle import Bundle
from r1export.update.container import read_tensors, write_tensors
from r1export.update.envelope import SecretKey
from r1export.update.publish import Step, Terms, make_bundle
from r1export.update.release_layout import CLASS_EMBEDS, GOLDEN, TEXTUAL, VISUAL, class_embeddings_file


def write_bundle(
    context: RunContext, step: Step, keys: Sequence[SecretKey], terms: Terms, out: Path, *, overwrite: bool = False
) -> Bundle:
    """Write to `out` what a device lacks to take `step` between two releases of the run.

    Raises:
        InputError: `out` exists, and what `make_bundle` raises.
    """
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists", "choose another name, or overwrite it on purpose")
    bundle = make_bundle(context.run.path, step, keys, terms, lambda folder: _refresh(context, step, folder))
    write_file(out, bundle.to_bytes())
    return bundle


@torch.inference_mode()
def _refresh(context: RunContext, step: Step, folder: Path) -> None:
    """Class embeddings and golden outputs in `folder` from the model without the dropped tasks."""
    clip = context.clip
    trained = zip(context.recipe.stream, context.run.updates(context.recipe)[: step.release], strict=False)
    golden = read_tensors(folder / GOLDEN)
    images, tokens = (torch.from_numpy(golden[tower.input]).to(clip.device) for tower in (VISUAL, TEXTUAL))
    with context.with_updates_applied([update for task, update in trained if task.name not in step.drop]):
        for task in context.tasks:
            write_tensors(folder / class_embeddings_file(task.name), {CLASS_EMBEDS: class_embeddings(clip, task)})
        golden[VISUAL.output] = clip.model.encode_image(images, normalize=True).float().cpu().numpy()
        golden[TEXTUAL.output] = clip.encode_text(tokens).float().cpu().numpy()
    write_tensors(folder / GOLDEN, golden)
