"""An OCI image layout with a CNCF ModelPack artifact: what registries, clusters and signing tools carry.

Contract: OCI image-spec 1.1 (image-layout.md, manifest.md) and CNCF ModelPack model-spec 0.0.7 (media types, annotations).
An update on a device is a referrer: a manifest whose `subject` is the base's manifest and whose layer is the .r1u.
"""

from __future__ import annotations

from r1export.layout.content import LayoutContent, ReleaseSource
from r1export.update.atomic_io import json_bytes, sha256_bytes
from r1export.update.oci import FILEPATH, IMAGE, INDEX, LAYOUT_MARK, Descriptor, blob, index
from r1export.update.release_layout import MANIFEST, MODEL_CARD

MODEL = "application/vnd.cncf.model"
WEIGHTS, CONFIG, DOCUMENT = (f"{MODEL}.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc"))
PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """Every file of the release is a layer; `name` is the tag, by default the release's name."""
    release = source.release
    manifest = release.manifest
    layers = [
        Descriptor(_kind(path), entry.sha256, entry.nbytes, {FILEPATH: path}) for path, entry in manifest.files.items()
    ]
    files = {blob(layer.sha256): layer.annotations[FILEPATH] for layer in layers}
    document = (release.path / MANIFEST).read_bytes()
    layers.append(Descriptor(CONFIG, sha256_bytes(document), len(document), {FILEPATH: MANIFEST}))
    config = json_bytes(_config(source, [layer.sha256 for layer in layers]))
    described = Descriptor(f"{MODEL}.config.v1+json", sha256_bytes(config), len(config))
    image = json_bytes(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE,
            "artifactType": f"{MODEL}.manifest.v1+json",
            "config": described.to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
    )
    tag = {"org.opencontainers.image.ref.name": name or manifest.name}
    listed = Descriptor(IMAGE, sha256_bytes(image), len(image), tag)
    made = {blob(sha256_bytes(data)): data for data in (document, config, image)}
    return LayoutContent(files, made | {INDEX: index([listed]), "oci-layout": json_bytes(LAYOUT_MARK)})


def _kind(path: str) -> str:
    """The media type of a file of a release."""
    if path.endswith((".onnx", ".safetensors")):
        return WEIGHTS
    return DOCUMENT if path == MODEL_CARD else CONFIG


def _config(source: ReleaseSource, digests: list[str]) -> dict[str, object]:
    manifest = source.release.manifest
    return {
        "descriptor": {"name": manifest.name, "licenses": [manifest.base.licence] if manifest.base.licence else []},
        "config": {"architecture": "clip", "format": "onnx", "precision": PRECISIONS[manifest.precision]},
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{digest}" for digest in digests]},
    }
