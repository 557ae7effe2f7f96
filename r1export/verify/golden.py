"""Verify a release by itself, without torch: files, graphs, golden samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import InputError
from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors
from r1export.verify.graph_digest import graph_digest
from r1export.verify.parity import GATES, Gate, Inputs, Model, Outputs, compare, run_in_batches
from r1export.verify.runtime import open_session, runner

BATCHES = (1, 2, 5, 0)
CLASSIFIED = 4  # golden images that are classified: each one meets the classes of every task
FLOAT32 = 2.0**-24  # rounding of one operation
ROUNDED = 16  # operations beside the products of a logit: exp, scale, bias, and a unit norm that is not quite one


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


def classifier_problems(release: Path, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """classify.onnx against logits = exp(logit_scale) image_embeds class_embeds^T + logit_bias, in float64 from visual.onnx.

    Scale and bias are taken from `tensors`, 1 and 0 where they are not. One line per task whose logits are others. The
    embeddings have unit norm and are the same in both graphs, and what follows them is float32 in every precision: a sum of
    D products errs by at most D roundings of (scale + |bias|). Raises CheckFailed if a graph cannot be run.
    """
    pixels = {"pixel_values": read_tensors(release / "golden.safetensors")["pixel_values"][:CLASSIFIED]}
    embed, classify = (runner(open_session(release / f"{name}.onnx")) for name in ("visual", "classify"))
    embeds = embed(pixels).astype(np.float64)
    scale, bias = np.exp(_scalar(tensors, "logit_scale")), _scalar(tensors, "logit_bias")
    allowed = (scale + abs(bias)) * (embeds.shape[1] + ROUNDED) * FLOAT32
    problems = []
    for path in sorted((release / "classes").glob("*.safetensors")):
        classes = read_tensors(path)["class_embeds"]
        expected, found = (
            scale * embeds @ classes.T.astype(np.float64) + bias,
            classify(pixels | {"class_embeds": classes}),
        )
        error = np.abs(found - expected).max() if found.shape == expected.shape else np.inf
        if not error <= allowed:  # NaN is not
            problems.append(
                f"classify.onnx: logits of classes/{path.name} differ by {error:.2g} from "
                f"{scale:.6g} image_embeds class_embeds^T{f' {bias:+.6g}' if bias else ''}, allowed {allowed:.2g}"
            )
    return problems


def _scalar(tensors: Mapping[str, np.ndarray], name: str) -> float:
    return float(np.ravel(tensors[name])[0]) if name in tensors else 0.0
