"""Check embeddings that another runtime computed from a release's golden inputs, with the release's own tolerance."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from r1export.errors import InputError
from r1export.update.release_layout import GOLDEN, TOWERS, TowerFiles
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.golden import manifest_gate, read_golden
from r1export.verify.parity import Gate, difference
from r1export.verify.results import Check

REMEDY = f"write it with numpy.savez: {' and '.join(tower.output for tower in TOWERS)}, or one of them, one row per golden input"


def check_outputs(release: Path, outputs: Path) -> Check:
    """Compare the arrays `image_embeds` and `text_embeds` (n, D) of an .npz file with the golden samples of `release`.

    They have unit norm and the order of the golden inputs; a file may have only one of them. Counts are samples.

    Raises InputError: no such release, a file that is not an .npz of plain arrays, or one with neither array.
    """
    gate, golden = manifest_gate(ReleaseManifest.read(release)), read_golden(release).tensors()
    found = _read(outputs)
    towers = [tower for tower in TOWERS if tower.output in found]
    if not towers:
        raise InputError(f"{outputs} has neither {' nor '.join(tower.output for tower in TOWERS)}", REMEDY)
    samples = sum(len(golden[tower.output]) for tower in towers)
    problems = [problem for tower in towers for problem in _problems(tower, golden, found, gate)]
    detail = ", ".join(_closeness(tower, golden, found) for tower in towers)
    return Check.judge(problems, looked_at=samples, of=samples, detail=f"{outputs.name} against {GOLDEN}: {detail}")


def _problems(
    tower: TowerFiles, golden: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], gate: Gate
) -> Iterator[str]:
    """The failed conditions; NaN fails all of them."""
    expected, embeds = golden[tower.output], found[tower.output]
    measured = difference(expected, [embeds])
    if measured.max_abs is None or measured.min_cosine is None:
        yield f"{tower.output} is {embeds.dtype}{list(embeds.shape)} or not finite, expected {list(expected.shape)}"
    elif not measured.max_abs <= gate.max_abs:
        yield f"{tower.output} differs by {measured.max_abs:.2g}, allowed {gate.max_abs:.2g}"
    elif not measured.min_cosine >= gate.min_cosine:
        yield f"{tower.output}: lowest cosine {measured.min_cosine:.8f}, required {gate.min_cosine:.8f}"


def _closeness(tower: TowerFiles, golden: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> str:
    measured = difference(golden[tower.output], [found[tower.output]])
    return f"{tower.output} differs by at most {measured.max_abs or 0:.2g}"


def _read(outputs: Path) -> dict[str, np.ndarray]:
    """The floating-point arrays in the file. Pickled objects are never read."""
    try:
        with np.load(outputs, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise InputError(f"{outputs}: no such file", "check the path") from None
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{outputs} is not an .npz of plain arrays: {error}", REMEDY) from error
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
