"""The contents of a layout as a value, before any file is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from onnx import ModelProto

from r1export.errors import Unsupported
from r1export.layout.graphs import read_graph
from r1export.layout.settings import Preprocessing, Texts, read_json
from r1export.update.release_layout import MODEL_CONFIG, TEXTUAL, TOKENIZER, VISUAL
from r1export.update.release_manifest import Release

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ReleaseSource:
    """A release as layouts read it. `variants` are the same release in other precisions, by name."""

    release: Release
    variants: Mapping[str, ReleaseSource] = field(default_factory=dict)

    def graph(self, name: str) -> ModelProto:
        """A fresh copy of one of the release's graphs, without weights."""
        return read_graph(self.release.path / name)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.read(self.release.path)

    @cached_property
    def texts(self) -> Texts:
        return Texts.read(self.release.path, self.graph(TEXTUAL.graph))

    @cached_property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.graph(VISUAL.graph).graph.output[0].type.tensor_type.shape.dim[1].dim_value)

    @property
    def is_sigmoid(self) -> bool:
        """Whether it is a SigLIP, whose answers go through a sigmoid and not through a softmax."""
        return "logit_bias" in self.release.manifest.tensors

    @cached_property
    def open_clip_config(self) -> Mapping[str, Mapping[str, object]]:
        """What open_clip_config.json says. Raises Unsupported for a release of a version of r1export that wrote none."""
        if MODEL_CONFIG not in self.release.manifest.files:
            raise Unsupported(
                f"{self.release.path} has no {MODEL_CONFIG}", "export it again with this version of r1export"
            )
        return read_json(self.release.path / MODEL_CONFIG)


@dataclass(frozen=True)
class LayoutContent:
    """Paths in the folder: `files` are bytes of the release under another name, `made` what is written for the client, and
    `converted` what follows from all weights. `variants` are `files` of the same release in other precisions.

    `notes` are sentences for the person who deploys the folder.
    """

    files: Mapping[str, str]
    made: Mapping[str, bytes]
    converted: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def tokenizer_files(source: ReleaseSource, folder: str = "") -> dict[str, str]:
    """The tokenizer's two files under `folder`, by their paths in the release. Raises Unsupported if one is missing."""
    held = {f"{folder}{name}": f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES}
    for path in held.values():
        if path not in source.release.manifest.files:
            raise Unsupported(f"{source.release.path} has no {path}", "export it again with this version of r1export")
    return held


def graph_bytes(model: ModelProto) -> bytes:
    """A graph's bytes, the same for the same graph."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data
