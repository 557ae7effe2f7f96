"""Whether a report still matches the files next to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from r1export.errors import CheckFailed
from r1export.update.atomic_io import sha256_file
from r1export.update.release_layout import MANIFEST
from r1export.update.release_manifest import ReleaseManifest
from r1export.update.run_layout import RunLayout
from r1export.verify.results import Report, RunReport


def check_fresh(report: Report, folder: Path) -> None:
    """Hash the files of every release in the report.

    Raises CheckFailed naming the first release that changed since it was verified.
    """
    for name, sha256, release in _releases(report, folder):
        problem = _change(release, sha256)
        if problem:
            raise CheckFailed(
                f"{name} changed after it was verified: {problem}", f"verify it again: r1export verify {folder}"
            )


def _releases(report: Report, folder: Path) -> Iterable[tuple[str, str, Path]]:
    """(label, manifest digest, folder) of every release in a report."""
    if not isinstance(report, RunReport):
        yield report.name, report.release.manifest_sha256, folder
        return
    for part in report.releases:
        releases = RunLayout(folder).variant(part.release.precision).releases_folder
        yield part.name, part.release.manifest_sha256, releases / part.release.name


def _change(release: Path, manifest_sha256: str) -> str:
    """The first difference from the verified release; empty if there is none."""
    path = release / MANIFEST
    if not path.is_file() or sha256_file(path) != manifest_sha256:
        return f"{MANIFEST} was replaced"
    for name, entry in ReleaseManifest.read(release).files.items():
        file = release / name
        if not file.is_file() or file.is_symlink() or sha256_file(file) != entry.sha256:
            return f"{name} was modified"
    return ""
