"""Verify a release by itself, without torch: files, graphs, golden samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1export.errors import InputError
from r1export.update.container import read_tensors
from r1export.update.files import sha256_file
from r1export.verify.digest import graph_digest
from r1export.verify.parity import GATES, Gate, Inputs, Model, Outputs, compare, run_in_batches
from r1export.verify.runtime import open_session, runner

BATCHES = (1, 2, 5, 0)


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
    return [
        f"{name} computes something else than what was released"
        for name, digest in manifest["graphs"].items()
        if graph_digest(release / name) != digest
    ]


def golden_parity(
    release: Path, manifest: Mapping[str, Any], provider: str = "cpu", control: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Stored outputs of torch against this release in onnxruntime on this machine: one stage of parity.

    `control` is the same stage of the base release. Raises CheckFailed if the release cannot be run, InputError as `manifest_gate`.
    """
    golden = read_tensors(release / "golden.safetensors")
    sessions = {
        name: runner(open_session(release / f"{name}.onnx", provider=provider)) for name in ("visual", "textual")
    }
    model = Model(
        lambda values: sessions["visual"]({"pixel_values": values}),
        lambda values: sessions["textual"]({"input_ids": values}),
    )
    inputs = Inputs(golden["pixel_values"], golden["input_ids"])
    expected = Outputs((golden["image_embeds"],), (golden["text_embeds"],))
    found = compare(expected, run_in_batches(model, inputs, BATCHES), manifest_gate(manifest), control)
    return found | {"batches": [size or len(inputs.visual) for size in BATCHES], "levels": ["all"]}


def manifest_gate(manifest: Mapping[str, Any]) -> Gate:
    """The gate of the release's precision, with the tolerances that its manifest gives. Raises InputError for an unknown one."""
    if (precision := manifest["precision"]) not in GATES:
        raise InputError(
            f"the release's precision is {precision!r}, known are {', '.join(GATES)}", "verify it with a newer r1export"
        )
    return replace(GATES[precision], max_abs=manifest["golden"]["max_abs"], min_cosine=manifest["golden"]["min_cosine"])


def golden_problems(release: Path, manifest: Mapping[str, Any]) -> list[str]:
    """One line if the stored samples are not reproduced. Raises as `golden_parity`."""
    found = golden_parity(release, manifest)
    return [] if found["verdict"] == "pass" else [f"golden.safetensors is not reproduced: {found['detail']}"]
