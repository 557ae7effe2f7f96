"""Verify a release by itself, without torch: files, graphs, golden samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1export.errors import R1ExportError
from r1export.update.container import read_tensors
from r1export.update.files import sha256_file
from r1export.verify.parity import Gate, Inputs, Model, Outputs, compare, run_in_batches
from r1export.verify.proof import graph_digest
from r1export.verify.runtime import open_session, runner


def changed_files(release: Path, manifest: Mapping[str, Any], unlisted: tuple[str, ...]) -> list[str]:
    """What differs from the manifest: one line for each file that is missing, changed or not listed."""
    found = []
    for name, entry in manifest["files"].items():
        path = release / name
        if not path.is_file() or path.is_symlink():
            found.append(f"{name} is missing")
        elif sha256_file(path) != entry["sha256"]:
            found.append(f"{name} is not the file that was released")
    listed = {*manifest["files"], *unlisted}
    present = {path.relative_to(release).as_posix() for path in release.rglob("*") if not path.is_dir()}
    return found + [f"{name} is not listed in the manifest" for name in sorted(present - listed)]


def changed_graphs(release: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Graphs whose program is not the one that was released."""
    return [f"{name} computes something else than what was released" for name, digest in manifest["graphs"].items() if graph_digest(release / name) != digest]


def golden_parity(release: Path, manifest: Mapping[str, Any], batches: tuple[int, ...] = (1, 2, 5)) -> dict[str, Any]:
    """Stored outputs of torch against this release in onnxruntime on this machine: one stage of parity."""
    golden = read_tensors(release / "golden.safetensors")
    sessions = {name: runner(open_session(release / f"{name}.onnx")) for name in ("visual", "textual")}
    model = Model(lambda values: sessions["visual"]({"pixel_values": values}), lambda values: sessions["textual"]({"input_ids": values}))
    inputs = Inputs(golden["pixel_values"], golden["input_ids"])
    expected = Outputs((golden["image_embeds"],), (golden["text_embeds"],))
    gate = Gate(manifest["golden"]["max_abs"], manifest["golden"]["min_cosine"])
    return compare(expected, run_in_batches(model, inputs, batches), gate) | {"batches": list(batches), "levels": ["all"]}


def damaged(error: R1ExportError | Exception) -> dict[str, Any]:
    """A release that cannot even be run is a failed check, not a crash."""
    return {"verdict": "fail", "detail": str(error), "max_abs": None, "min_cosine": None, "top1_agreement": None, "samples": 0}


