"""Compute the embeddings of an image collection, or update those of an earlier release as far as the re-index verdict requires."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from r1export.data.images import SUFFIXES
from r1export.errors import CheckFailed, InputError
from r1export.reindex.decode import DecodedBatch, decoded
from r1export.reindex.progress import Progress
from r1export.reindex.vectors import VectorInfo, Vectors, check_format, read_vectors, write_vectors
from r1export.report.json_format import read_report
from r1export.update.embedding_space import EmbeddingSpace
from r1export.update.release_layout import VISUAL
from r1export.update.release_manifest import Release, check_file
from r1export.verify.client_files import PreprocessConfig
from r1export.verify.drift import NOT_NEEDED
from r1export.verify.results import ReleaseReport
from r1export.verify.runtimes.runtime import Run, runner, session_options, start

Advance = Callable[..., None]
BATCH = 32  # images; affects the bits of a vector
UNKNOWN = "unknown"  # no report compares the new release with the old one


@dataclass(frozen=True)
class Reindexed:
    """`embedded` images were computed now, `kept` copied from the old file, `resumed` computed by an interrupted job.

    `verdict` is the re-index verdict, empty without an old file. `seconds` is the time of embedding only.
    """

    out: Path
    rows: int
    embedded: int
    kept: int
    resumed: int
    skipped: dict[str, str]
    verdict: str
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.embedded / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Job:
    """The images in order, the release, and the settings."""

    release: Release
    space: EmbeddingSpace
    paths: tuple[str, ...]
    batch: int = BATCH
    workers: int = 0

    @property
    def digest(self) -> str:
        """The identity of the job: release, batch size, and each image's path, size and modification time."""
        sha = hashlib.sha256(f"{self.release.manifest_sha256} {self.batch}\n".encode())
        for path in self.paths:
            try:
                found = Path(path).stat()
                sha.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            except OSError:
                sha.update(f"{path}\0missing\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()


def default_workers() -> int:
    """One decoder process per two cores; the tower uses the rest."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def list_pictures(sources: Iterable[Path]) -> tuple[str, ...]:
    """The images in folders (recursive), in lists (.txt, one path per line) and single files, sorted, without duplicates.

    Raises InputError if a path doesn't exist or there are no images.
    """
    found = sorted({path for source in sources for path in _pictures(source)})
    if not found:
        raise InputError("no images found", "pass image folders, image files, or a .txt with one path per line")
    return tuple(found)


def _pictures(source: Path) -> Iterator[str]:
    if source.is_dir():
        for folder, _, names in os.walk(source):
            yield from (os.path.join(folder, name) for name in names if Path(name).suffix.lower() in SUFFIXES)
    elif not source.is_file():
        raise InputError(f"{source} does not exist", "check the path")
    elif source.suffix == ".txt":
        try:
            yield from (line for line in source.read_text("utf-8").splitlines() if line)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}: not UTF-8 at byte {error.start}", "encode the list of paths in UTF-8"
            ) from None
    else:
        yield str(source)


def open_release(path: Path) -> tuple[Release, EmbeddingSpace]:
    """Check the image tower of a release; returns the release and its embedding space.

    Raises InputError: none, or of a version of r1export that did not state its space; CheckFailed: damaged.
    """
    release = Release.read(path)
    for name in (VISUAL.graph, VISUAL.weights):
        if name not in release.manifest.files:
            raise InputError(f"{path}: manifest.json does not list {name}", "use a complete release in RUN/releases")
        check_file(path / name, release.manifest.files[name].sha256)
    if release.manifest.embedding_space is None:
        raise InputError(f"{path} does not state its embedding space", "export it again with this version of r1export")
    return release, release.manifest.embedding_space


def reindex(
    job: Job, out: Path, *, old: Path | None = None, overwrite: bool = False, advance: Advance = lambda *_: None
) -> Reindexed:
    """Write the vectors of the job's images to `out` (.npy or .parquet). An interrupted job resumes.

    With `old` the rows of that file are kept if its embedding space is the same, or the release's report says that
    re-indexing is not needed; other images are computed.

    Raises:
        InputError: `out` exists, another suffix, `old` is none.   Unsupported: pyarrow is missing, no space.
        CheckFailed: the release cannot be run, or gives vectors that are not finite.
    """
    check_format(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists", "choose another name, or use --overwrite")
    stored = read_vectors(old) if old else None
    verdict = reindex_verdict(job, stored.info) if stored else ""
    places = {path: row for row, path in enumerate(stored.info.paths)} if stored and verdict == NOT_NEEDED else {}
    kept = [path for path in job.paths if path in places]
    rest = replace(job, paths=tuple(path for path in job.paths if path not in places))
    session = start(job.release.path / VISUAL.graph, session_options(), "cpu")
    progress = Progress.open(out, rest.digest, int(session.get_outputs()[0].shape[1]))
    resumed, started = progress.rows, time.monotonic()
    advance(f"{resumed + len(kept)} done before", resumed + len(kept))
    _embed(rest, runner(session), progress, advance)
    seconds = time.monotonic() - started
    _write(job, out, progress, rest.paths, stored, [(path, places[path]) for path in kept])
    skipped = {rest.paths[row]: reason for row, reason in progress.skipped.items()}
    progress.remove()
    done = len(rest.paths) - resumed
    return Reindexed(out, len(job.paths) - len(skipped), done, len(kept), resumed, skipped, verdict, seconds)


def reindex_verdict(job: Job, old: VectorInfo) -> str:
    """The re-index verdict on the vectors of `old`: by the embedding space, else by the release's report.

    Raises InputError for a report that cannot be read.
    """
    if old.space.image == job.space.image:
        return NOT_NEEDED
    path = job.release.path / "report.json"
    if not path.is_file():
        return UNKNOWN
    report = read_report(path, f"recreate it with r1export verify {job.release.path}")
    if not isinstance(report, ReleaseReport) or report.release.manifest_sha256 != job.release.manifest_sha256:
        return UNKNOWN
    return next((drift.reindex for drift in report.compatible_with if drift.against == old.release), UNKNOWN)


def _embed(job: Job, run: Run, progress: Progress, advance: Advance) -> None:
    """Compute the missing rows. Batches always begin at multiples of the batch size."""
    config = PreprocessConfig.read(job.release.path)
    first = progress.rows
    batches = [job.paths[start : start + job.batch] for start in range(first, len(job.paths), job.batch)]
    started = time.monotonic()
    for decoded_batch, paths in zip(decoded(batches, config, job.workers), batches, strict=True):
        rows = _rows(decoded_batch, len(paths), run, config, progress.dimension)
        progress.append(rows, {progress.rows + at: reason for at, reason in decoded_batch.skipped.items()})
        rate = (progress.rows - first) / (time.monotonic() - started)
        advance(f"{rate:.1f} images/s", len(paths))
    progress.record()


def _rows(batch: DecodedBatch, count: int, run: Run, config: PreprocessConfig, dimension: int) -> np.ndarray:
    """float32 (count, D), NaN where there is no picture. Raises CheckFailed for vectors that are not finite."""
    rows = np.full((count, dimension), np.nan, np.float32)
    if batch.held:
        embeds = run({VISUAL.input: config.normalize(batch.crops)})
        if not np.isfinite(embeds).all():
            raise CheckFailed("the release gives non-finite vectors", "verify it: r1export verify RELEASE")
        rows[list(batch.held)] = embeds
    return rows


def _write(
    job: Job,
    out: Path,
    progress: Progress,
    paths: Sequence[str],
    stored: Vectors | None,
    kept: Sequence[tuple[str, int]],
) -> None:
    """All rows in the order of the job's images."""
    fresh = progress.values()
    rows = {path: row for row, path in enumerate(paths) if row not in progress.skipped}
    if kept and stored is not None:
        values = _Joined(fresh, stored.values)
        rows |= {path: len(fresh) + row for path, row in kept}
    else:
        values = _Joined(fresh, fresh[:0])
    order = [path for path in job.paths if path in rows]
    manifest, release = job.release.manifest, job.release
    info = VectorInfo(
        release=manifest.name,
        manifest_sha256=release.manifest_sha256,
        space=job.space,
        paths=order,
        skipped={paths[row]: reason for row, reason in progress.skipped.items()},
        kept={stored.info.space.image: len(kept)} if kept and stored is not None else {},
    )
    write_vectors(out, values, np.array([rows[path] for path in order], np.int64), info)


class _Joined:
    """Two arrays of rows as one, of which some rows are read at a time."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        self.first, self.second = first, second
        self.shape = (len(first) + len(second), first.shape[1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.shape[1]), np.float32)
        own = rows < len(self.first)
        found[own] = self.first[rows[own]]
        found[~own] = self.second[rows[~own] - len(self.first)]
        return found
