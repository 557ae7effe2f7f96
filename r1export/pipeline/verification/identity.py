"""Whether a folder is the release that was written: its manifest and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r1export.update.release_layout import (
    GOLDEN,
    GRAPHS,
    MODEL_CONFIG,
    PREPROCESS,
    PREPROCESS_GRAPH,
    STATIC_GRAPHS,
    TOKENIZER,
    TOWERS,
    UNLISTED,
    class_embeddings_file,
    class_names_file,
)  # fmt: skip
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify import contents
from r1export.verify.results import Check

WEIGHT_FILES = tuple(tower.weights for tower in TOWERS)


def required_files(tasks: Sequence[str]) -> tuple[str, ...]:
    """The files that every release has, whatever its manifest lists."""
    classes = [name(task) for task in tasks for name in (class_embeddings_file, class_names_file)]
    return (*GRAPHS, *WEIGHT_FILES, GOLDEN, PREPROCESS, f"{TOKENIZER}/tokenizer.json", *classes)


def check_manifest_and_files(release: Path, manifest: ReleaseManifest, tasks: Sequence[str], expected: dict[str, object]) -> dict[str, Check]:  # fmt: skip
    """Whether it is the release that was written. If this fails, nothing else is measured."""
    required = required_files(tasks)
    files = contents.check_files(release, manifest, required, UNLISTED)
    return {
        "manifest": contents.check_manifest(manifest, expected),
        "files": Check.joined([files, _check_known(manifest, required)]),
    }


def _check_known(manifest: ReleaseManifest, required: Sequence[str]) -> Check:
    """Check that each listed file is one that a release can have."""
    known = {*required, PREPROCESS_GRAPH, MODEL_CONFIG, *STATIC_GRAPHS}
    foreign = [name for name in manifest.files if name not in known and not name.startswith(f"{TOKENIZER}/")]
    problems = [f"{name} is not a file of a release of {', '.join(t.name for t in manifest.tasks)}" for name in foreign]
    count = len(manifest.files)
    return Check.judge(problems, looked_at=count, of=max(count, len(required)), detail="each is a known file")
