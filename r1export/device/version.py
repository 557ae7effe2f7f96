"""A version for applications: its files and onnxruntime sessions, the same in slot and in overlay mode.

    version = open_version("STORE")
    session = version.session("visual.onnx")

Open a version once and keep it: `current` can switch at any time, an opened version does not change.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r1export.device.store import BASE, Store
from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.update.atomic_io import inside, read_chunks, sha256_bytes
from r1export.update.bundle import Bundle
from r1export.update.container import read_layout, stored_bytes
from r1export.update.manifest import File
from r1export.update.rebuild import Rebuild
from r1export.update.release_layout import MANIFEST
from r1export.update.release_manifest import Release

if TYPE_CHECKING:
    import onnxruntime

CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Version:
    """One version on a device. `bundle` is None for the base; `files_there` says whether `folder` contains the files."""

    folder: Path
    base: Release
    files_there: bool
    bundle: Bundle | None = None
    rebuild: Rebuild | None = None

    @property
    def name(self) -> str:
        """The release's name."""
        return self.bundle.manifest.name if self.bundle else "base"

    @property
    def paths(self) -> list[str]:
        """Names of all files of the version."""
        return list(self._digests)

    @cached_property
    def _digests(self) -> dict[str, str]:
        """The signed SHA-256 of each file; for the base, the one at `init`."""
        if self.bundle:
            return {file.path: file.sha256 for file in self.bundle.manifest.files}
        listed = {path: file.sha256 for path, file in self.base.manifest.files.items()}
        return {**listed, MANIFEST: self.base.manifest_sha256}

    def read(self, path: str) -> bytes:
        """The bytes of one file.

        Raises:
            InputError: the version has none of that name.
            CheckFailed: a digest mismatch.
        """
        self._check_there(path)
        if self.bundle is None or self.files_there:
            data = b"".join(read_chunks(inside(self.folder, path)))
        else:
            file = next(file for file in self.bundle.manifest.files if file.path == path)
            data = b"".join(self.chunks(file))
        check_digest(path, sha256_bytes(data), self._digests[path])
        return data

    def _check_there(self, path: str) -> None:
        if path not in self._digests:
            raise InputError(f"version {self.name} has no file {path}", f"it has {', '.join(self.paths)[:300]}")

    def chunks(self, file: File) -> Iterator[bytes | memoryview]:
        """The bytes of a file, derived from the base and the bundle."""
        assert self.bundle is not None
        assert self.rebuild is not None
        return self.rebuild.chunks(file.path) if file.parts is None else self.bundle.content(file, self.base.path)

    def check(self, file: File) -> set[str]:
        """Derive a file without writing it; returns the names of its merged tensors, whose digests are checked too.

        Raises:
            CheckFailed: it or a tensor is not the signed one.   InputError: a part lies beyond the end of the base's file.
        """
        assert self.bundle is not None
        assert self.rebuild is not None
        digest, checked = hashlib.sha256(), set()
        pieces = self.rebuild.pieces(file.path) if file.parts is None else (("", c) for c in self.chunks(file))
        for name, piece in pieces:
            digest.update(piece)
            if name:
                check_digest(name, sha256_bytes(piece), self.bundle.manifest.tensors.get(name, "nothing"))
                checked.add(name)
        check_digest(file.path, digest.hexdigest(), file.sha256)
        return checked

    def tensors(self, weights: str) -> dict[str, np.ndarray]:
        """The merged tensors of the file `weights` by initializer name, each checked against its signed digest.

        Raises CheckFailed if one differs: the base or the factors are damaged.
        """
        if self.bundle is None or self.rebuild is None:
            return {}
        names = {spec.offset: spec.name for spec in read_layout(self.base.path / weights).specs}
        parameters = self.rebuild.merged_files.get(weights, [])
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # numpy's elementwise loops release the GIL
            tensors = list(pool.map(self._checked, parameters))
        return {
            names[self.rebuild.base.manifest.tensors[parameter].offset]: tensor
            for parameter, tensor in zip(parameters, tensors)
        }

    def _checked(self, parameter: str) -> np.ndarray:
        assert self.bundle is not None
        assert self.rebuild is not None
        tensor = self.rebuild.tensor(parameter)
        check_tensor(parameter, tensor, self.bundle.manifest.tensors)
        return tensor

    def merged_weights(self, graph: str) -> list[str]:
        """The weights files with merged tensors that `graph` reads."""
        if self.rebuild is None:
            return []
        model = self.read(graph)
        return [
            weights for weights in self.rebuild.merged_files if weights.encode() in model
        ]  # a graph names its files

    def session(self, graph: str, providers: Sequence[str] = CPU) -> onnxruntime.InferenceSession:
        """An onnxruntime session for `graph`, for example visual.onnx.

        Raises:
            InputError: the version has no such graph.
            Unsupported: onnxruntime is not installed.
            CheckFailed: the base or the factors are damaged.
        """
        self.read(graph)  # a graph is code: only the signed one may run
        try:
            import onnxruntime
        except ImportError:
            raise Unsupported("onnxruntime is not installed", "pip install onnxruntime") from None
        if self.files_there or self.rebuild is None:
            return onnxruntime.InferenceSession(self.folder / graph, providers=list(providers))
        merged: dict[str, np.ndarray] = {}
        for weights in self.merged_weights(graph):
            merged.update(self.tensors(weights))
        options = onnxruntime.SessionOptions()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for tensor in merged.values()]
        options.add_external_initializers(list(merged), values)
        return onnxruntime.InferenceSession(self.base.path / graph, options, providers=list(providers))


def check_tensor(parameter: str, tensor: np.ndarray, digests: dict[str, str]) -> None:
    """Raises CheckFailed if the stored bytes of `tensor` don't have the signed digest."""
    digest = sha256_bytes(stored_bytes(tensor))
    check_digest(parameter, digest, digests.get(parameter, "nothing"))


def check_digest(name: str, digest: str, signed: str) -> None:
    """Raises CheckFailed if the digest of `name` differs from the signed one."""
    if digest != signed:
        raise CheckFailed(
            f"{name} has SHA-256 {digest}, expected {signed} as signed",
            "run `doctor`; if it finds nothing, build the update again for this base",
        )


def open_version(store: Path | str, slot: str = "") -> Version:
    """The current version of a store, or that of `slot` (a folder's name in slots/, or base).

    Raises:
        InputError, CheckFailed: no such store or version, or it is damaged.
    """
    device = Store.open(Path(store))
    return version_in(device, slot or device.current)


def version_in(device: Store, slot: str) -> Version:
    """The version that lies in `slot`. Raises like `open_version`."""
    if slot == BASE:
        return Version(device.folder(BASE), device.base(), True)
    return version_of(device, device.bundle(slot), device.folder(slot))


def version_of(device: Store, bundle: Bundle, folder: Path) -> Version:
    """The version that `bundle` makes of the device's base; `folder` is its slot. Raises like `open_version`."""
    rebuild = Rebuild(device.base(), device.update(bundle))
    return Version(folder, rebuild.base, device.config.mode == "slot", bundle, rebuild)
