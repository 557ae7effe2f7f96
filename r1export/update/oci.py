"""The parts of an OCI image layout that both `r1export layout` and devices write (OCI image-spec 1.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from r1export.update.atomic_io import json_bytes

INDEX = "index.json"
LAYOUT_MARK = {"imageLayoutVersion": "1.0.0"}
FILEPATH = "org.cncf.model.filepath"
IMAGE = "application/vnd.oci.image.manifest.v1+json"
EMPTY, EMPTY_TYPE = b"{}", "application/vnd.oci.empty.v1+json"
UPDATE_TYPE = "application/vnd.r1export.update.v1"  # of a .r1u


@dataclass(frozen=True)
class Descriptor:
    """What names a blob: media type, SHA-256 and length in bytes."""

    media_type: str
    sha256: str
    nbytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""

    def to_json(self) -> dict[str, Any]:
        document = {"mediaType": self.media_type, "digest": f"sha256:{self.sha256}", "size": self.nbytes}
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        return document


def blob(sha256: str) -> str:
    """Where a blob lies."""
    return f"blobs/sha256/{sha256}"


def index(manifests: Iterable[Descriptor]) -> bytes:
    """index.json."""
    return json_bytes(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest.to_json() for manifest in manifests],
        }
    )
