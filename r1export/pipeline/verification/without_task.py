"""Verify a version without some of its tasks, which was just derived from the run and has no report."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.release import own_contents
from r1export.update.factors import ExpertUpdate
from r1export.update.release_manifest import Release
from r1export.verify import contents
from r1export.verify.contents import attempt
from r1export.verify.results import SKIPPED, Check, Contents


def check_without_tasks(release: Release, variant: Variant, number: int, dropped: Collection[str]) -> Contents:
    """All applicable checks of `release`, which is release `number` of the run without the tasks `dropped`.

    Its weights are compared with base + remaining factors bit for bit, class embeddings, classifier, golden samples,
    preprocessing and tokenizer are tried as a client uses them.
    """
    context, manifest, path = variant.context, release.manifest, release.path
    found = own_contents(path, manifest)
    if found.golden.detail == SKIPPED:
        return found
    updates = _remaining(variant, number, dropped)
    merged = [update for _, update in updates]

    def weights() -> Check:
        return contents.check_weights(path, manifest, variant.tensors(merged), updates)

    return replace(
        found,
        base=contents.check_base(manifest, context.base_sha256, "the base model of the run"),
        weights=attempt(weights, of=len(manifest.tensors)),
    )


def _remaining(variant: Variant, number: int, dropped: Collection[str]) -> list[tuple[str, ExpertUpdate]]:
    """(task, factors) of what is left to be merged."""
    context = variant.context
    learned = zip(context.recipe.stream[:number], context.run.updates(context.recipe), strict=False)
    return [(task.name, update) for task, update in learned if task.name not in dropped]
