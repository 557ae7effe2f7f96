"""Verify a release folder by itself: what it says of itself, its golden samples, and the base release beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import CheckFailed, R1ExportError, Unsupported
from r1export.pipeline.environment import report_head
from r1export.pipeline.verification.contents import own_classifier, own_identity
from r1export.pipeline.verification.latency import opener, timeable
from r1export.recipe import Verify
from r1export.report.checks import failed
from r1export.report.write import settled
from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify import contents, golden, latency, parity, proof
from r1export.verify.ort_profile import Execution
from r1export.verify.runtime import PROVIDERS, check_provider


def verify_release(path: Path, providers: Sequence[str] = ()) -> dict[str, Any]:
    """Verify a release by its own golden samples, and against the base release beside it (../00-base), if there is one.

    Nothing is trained or run in torch. Raises InputError if `path` is no release, Unsupported for a missing provider.
    """
    manifest, providers = ReleaseManifest.read(path).to_json(), tuple(providers) or ("cpu",)
    for provider in providers:
        check_provider(provider)
    found = report_head(providers) | {
        "release": {
            "index": manifest.get("sequence"),
            "name": manifest.get("name") or path.name,
            "precision": manifest.get("precision"),
        },
        "contents": own_identity(path, manifest),
    }
    if failed(found["contents"]):
        return settled(found)
    found["release"] |= {"base": manifest["base"]["name"], "base_sha256": manifest["base"]["sha256"]}
    problems = contents.tensor_map_problems(path, manifest)
    found["contents"]["weights"] = contents.part(
        problems, f"{len(manifest['tensors'])} tensors lie where the manifest says"
    )
    found["contents"]["classifier"] = own_classifier(path)
    base = path.parent / "00-base"
    beside = base if base.is_dir() and base.resolve() != path.resolve() else None
    found["parity"] = {"export": _parity(path, manifest, beside, providers)}
    if beside and not failed(found["contents"]) and not failed(found["parity"]):
        found |= _beside(path, beside, manifest, providers)
    return settled(found)


def _parity(path: Path, manifest: Mapping[str, Any], beside: Path | None, providers: Sequence[str]) -> dict[str, Any]:
    """Golden samples on every provider: the worst. The base beside it, if it can be run there, calibrates the gate."""
    try:
        if changed := golden.changed_graphs(path, manifest):
            return parity.unrunnable("; ".join(changed))
        stages = {
            provider: golden.golden_parity(path, manifest, provider, _control(beside, provider) if beside else None)
            for provider in providers
        }
        worst = max(stages.values(), key=lambda stage: (stage["verdict"] == "fail", stage["max_abs"]))
        figures = {name: {key: stage[key] for key in ("max_abs", "min_cosine")} for name, stage in stages.items()}
        return worst | {"providers": list(providers), "by_provider": figures}
    except (CheckFailed, OSError, ValueError, KeyError) as error:
        return parity.unrunnable(str(error))


def _control(base: Path, provider: str) -> dict[str, Any] | None:
    try:
        return golden.golden_parity(base, ReleaseManifest.read(base).to_json(), provider)
    except (R1ExportError, OSError, ValueError, KeyError):
        return None


def _beside(path: Path, base: Path, manifest: Mapping[str, Any], providers: Sequence[str]) -> dict[str, Any]:
    """Proof and latency against the base release."""
    graphs = [{name: folder / name for name in manifest["graphs"]} for folder in (base, path)]
    golden = read_tensors(path / "golden.safetensors")
    width = golden["image_embeds"].shape[1]
    image, text = ({name: golden[name][:1]} for name in parity.ENTRIES.values())
    feeds = {
        "visual.onnx": image,
        "textual.onnx": text,
        "classify.onnx": image | {"class_embeds": np.zeros((2, width), image["pixel_values"].dtype)},
    }
    found = {"same_file": proof.same_files(*graphs), "graph": proof.same_graphs(*graphs)}
    ran: dict[str, Execution] = {}
    try:
        ran = proof.executions(graphs[0], feeds, providers)
        found |= proof.rungs(ran, lambda: proof.executions(graphs[1], feeds, providers))
    except (CheckFailed, Unsupported) as error:
        found |= proof.unclimbed(str(error) if ran else f"the base beside it cannot be run: {error}")
    if failed(found) or not ran:
        return {"proof": found}
    tower = next((tower for tower in parity.TOWERS if _weights_differ(path, base, tower)), "visual")
    return {"proof": found, "latency": _latency(path, base, tower, feeds[f"{tower}.onnx"], providers)}


def _weights_differ(path: Path, base: Path, tower: str) -> bool:
    return sha256_file(path / f"{tower}.safetensors") != sha256_file(base / f"{tower}.safetensors")


def _latency(
    path: Path, base: Path, tower: str, feeds: dict[str, np.ndarray], providers: Sequence[str]
) -> dict[str, Any] | None:
    """Rung L5 on one tower; None if no provider can be timed."""
    timed = [
        latency.added_latency(
            opener(base / f"{tower}.onnx", feeds, name),
            opener(path / f"{tower}.onnx", feeds, name),
            pairs=Verify().pairs,
            margin=Verify().margin,
            provider=PROVIDERS[name],
        )
        for name in timeable(providers)
    ]
    return latency.slowest(timed) | {"tower": tower} if timed else None
