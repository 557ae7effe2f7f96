"""The embedding space: a digest of everything that determines an embedding, which says whether stored vectors are comparable.

Two releases with the same `image` digest give the same image embeddings, whatever else changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from r1export.errors import InputError
from r1export.update.atomic_io import sha256_bytes
from r1export.update.names import DIGEST

NOT_IN_A_TOWER = ("logit_scale", "logit_bias")  # they scale answers, not embeddings


@dataclass(frozen=True)
class EmbeddingSpace:
    """SHA-256 of what determines image embeddings (graph, merged weights, preprocessing), and of what determines text embeddings."""

    image: str
    text: str

    @property
    def sha256(self) -> str:
        """The identity of both halves together."""
        return sha256_bytes(f"{self.image}\n{self.text}\n".encode())

    def to_json(self) -> dict[str, str]:
        return {"sha256": self.sha256, "image": self.image, "text": self.text}

    @classmethod
    def of_members(cls, members: Mapping[str, str], location: str) -> EmbeddingSpace:
        """Inverse of `to_json`. Raises InputError if a digest is missing, malformed or does not follow from the others."""
        found = {name: members.get(name, "") for name in ("sha256", "image", "text")}
        space = cls(found["image"], found["text"])
        whole = all(isinstance(value, str) and DIGEST.fullmatch(value) for value in found.values())
        if not whole or found["sha256"] != space.sha256 or len(members) != len(found):
            raise InputError(f"{location} is not an embedding space", "export the release again")
        return space


def half_digest(graph: str, tensors: Mapping[str, str], files: Mapping[str, str]) -> str:
    """The identity of one tower: the digest of its graph, of its tensors by name, and of the files that a client reads for it."""
    document: tuple[object, ...] = (graph, sorted(tensors.items()), sorted(files.items()))
    return sha256_bytes(json.dumps(document, separators=(",", ":")).encode())
