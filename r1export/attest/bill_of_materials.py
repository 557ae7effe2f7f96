"""A CycloneDX 1.6 bill of materials of a release: the model, its components, and every file with its SHA-256.

Format: CycloneDX 1.6 (ECMA-424), `machine-learning-model` components with a model card. It depends only on the manifest, without serial
number or time, so it is reproducible.
"""

from __future__ import annotations

from r1export.update.atomic_io import json_bytes
from r1export.update.release_manifest import Release, ReleaseManifest

BOM = "mlbom.cdx.json"
SPDX = {"MIT", "Apache-2.0", "BSD-3-Clause", "CC-BY-4.0", "CC0-1.0"}  # licences that are written as identifiers
DIGEST = "SHA-256"


def bill_of_materials(release: Release) -> bytes:
    """The document's bytes."""
    manifest = release.manifest
    model, base = f"model:{manifest.name}", "model:base"
    files = [
        {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [_hash(entry.sha256)]}
        for path, entry in manifest.files.items()
    ]
    described = [_base(manifest, base), *_updates(manifest), *_software(manifest), *files]
    return json_bytes(
        {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"component": _model(release, model)},
            "components": described,
            "dependencies": [
                {"ref": model, "dependsOn": [base, *(f"update:{update.task}" for update in manifest.updates)]}
            ],
        }
    )


def _model(release: Release, ref: str) -> dict[str, object]:
    manifest = release.manifest
    metrics = [
        {"type": "top-1 accuracy", "value": f"{task.accuracy:.4f}", "slice": task.name}
        for task in manifest.tasks
        if task.accuracy is not None
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": manifest.name,
        "version": str(manifest.sequence),
        "hashes": [_hash(release.manifest_sha256)],
        **_licences(manifest.base.licence),
        "modelCard": {
            "modelParameters": {
                "task": "zero-shot-image-classification",
                "architectureFamily": "CLIP",
                "datasets": [{"type": "dataset", "name": task.name} for task in manifest.tasks if task.learned],
                "inputs": [{"format": "image"}, {"format": "text"}],
                "outputs": [{"format": "embedding"}],
            },
            **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        },
        "properties": [{"name": "r1export:precision", "value": manifest.precision}, *_space(manifest)],
    }


def _space(manifest: ReleaseManifest) -> list[dict[str, str]]:
    space = manifest.embedding_space
    return [{"name": "r1export:embedding_space", "value": space.sha256}] if space else []


def _base(manifest: ReleaseManifest, ref: str) -> dict[str, object]:
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": manifest.base.name,
        "hashes": [_hash(manifest.base.sha256)],
        **_licences(manifest.base.licence),
    }


def _updates(manifest: ReleaseManifest) -> list[dict[str, object]]:
    return [
        {
            "type": "data",
            "bom-ref": f"update:{update.task}",
            "name": f"rank-1 experts of {update.task}",
            "hashes": [_hash(update.sha256)],
        }
        for update in manifest.updates
    ]


def _software(manifest: ReleaseManifest) -> list[dict[str, object]]:
    return [
        {"type": "library", "bom-ref": f"software:{name}", "name": name, "version": version}
        for name, version in manifest.versions.items()
    ]


def _licences(licence: str | None) -> dict[str, object]:
    if not licence:
        return {}
    return {"licenses": [{"license": {"id": licence} if licence in SPDX else {"name": licence}}]}


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": DIGEST, "content": sha256}
