"""The manifest.json of a release: its files with digests, and the location of each parameter.

Laws: `ReleaseManifest.parse(m.to_bytes(), "") == m`, and `m.to_bytes()` are the bytes on disk. The files of a parsed manifest
are inside the release folder, and its parameters are inside these files. `verify` checks whether a release is complete.
The format is described in docs/formats.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import json_bytes, read_regular, sha256_bytes, sha256_file, write_file
from r1export.update.container import NAMES, TensorSpec, take_dtype, take_shape
from r1export.update.embedding_space import NOT_IN_A_TOWER, EmbeddingSpace, half_digest
from r1export.update.names import NAME, PARAMETER, PATH, PRINTABLE, check_paths
from r1export.update.release_layout import MANIFEST, PREPROCESS, TEXTUAL, TOKENIZER, VISUAL, TowerFiles
from r1export.update.strict_json import Fields, items, parse_json, whole, wrong

FORMAT = "r1export.release/1"
MAX_MANIFEST = 64 << 20  # bytes; 300 parameters need about 100 kB
MAX_ITEMS = 100_000  # of one list


@dataclass(frozen=True)
class BaseModel:
    """The base model of all updates; `sha256` is that of its parameters, `licence` is None if unknown.

    `deployed_form` is the number of the procedure that folded BatchNorms and branches of its image tower into convolutions,
    0 where there was nothing to fold. Otherwise `original_sha256` is the digest of the parameters before that, and
    `deployed_difference` the largest difference it made to the unit-norm embeddings of real images.
    """

    name: str
    sha256: str
    licence: str | None = None
    deployed_form: int = 0
    original_sha256: str = ""
    deployed_difference: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The members in the order of the file; those of the deployed form only if the model has one."""
        members = asdict(self)
        form = {"deployed_form", "original_sha256", "deployed_difference"}
        return {name: value for name, value in members.items() if self.deployed_form or name not in form}


@dataclass(frozen=True)
class MergedUpdate:
    """One task's experts in the weights; `sha256` is that of its factors.safetensors."""

    task: str
    sha256: str


@dataclass(frozen=True)
class TaskEntry:
    """A task with class embeddings in the release. `accuracy` is top-1 in 0..1, None if not measured."""

    name: str
    classes: int
    learned: bool
    accuracy: float | None


@dataclass(frozen=True)
class GoldenGate:
    """The tolerance on golden outputs: max. difference and lowest cosine."""

    max_abs: float
    min_cosine: float


@dataclass(frozen=True)
class FileEntry:
    """Digest and length of one file."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class TensorEntry:
    """Where a parameter lies: `shape` as stored; `transposed` if that is the (in, out) of an (out, in) weight.

    `offset` counts from the start of `file`. `rows` are the (start, stop) of each adapted linear in the parameter, or of all
    its rows; a scalar has none, nor has a tensor of a manifest that does not say. An int8 parameter names with `scale` the
    one that holds the float32 scale of each of its rows. `sha256` is that of the stored bytes. `model_shape` is the shape in
    the model, None where it follows: `shape`, or the reverse of it if `transposed`.
    """

    file: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    transposed: bool
    sha256: str
    scale: str = ""
    model_shape: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Length of the stored tensor."""
        return self.dtype.itemsize * prod(self.shape)

    @property
    def end(self) -> int:
        """Where the next tensor may begin."""
        return self.offset + self.nbytes

    def spec(self, name: str) -> TensorSpec:
        """What the header of `file` has to say of the parameter `name`."""
        return TensorSpec(name, self.dtype, self.shape, self.offset)


@dataclass(frozen=True)
class ReleaseManifest:
    """The manifest of a release. `sha256` is its self-digest, empty before it is sealed.

    `updates` are in the order of merging, `graphs` maps the graphs to the digests of their structure, `versions` names the
    software that made the release. `embedding_space` is None in a manifest of an older version of r1export.
    """

    name: str
    sequence: int
    procedure: str
    precision: str
    base: BaseModel
    updates: tuple[MergedUpdate, ...]
    tasks: tuple[TaskEntry, ...]
    graphs: Mapping[str, str]
    golden: GoldenGate
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    versions: Mapping[str, str]
    sha256: str = ""
    embedding_space: EmbeddingSpace | None = None

    @classmethod
    def read(cls, release: Path) -> ReleaseManifest:
        """Read RELEASE/manifest.json. Raises InputError if it is missing or malformed."""
        return Release.read(release).manifest

    @classmethod
    def parse(cls, data: bytes, location: str) -> ReleaseManifest:
        """Inverse of `to_bytes`, for untrusted bytes; `location` names them in errors.

        Raises InputError: malformed, ambiguous or beyond a limit; the message names the member.
        """
        fields = parse_json(data, location, MAX_MANIFEST)
        if (form := fields.text("format", PRINTABLE)) != FORMAT:
            raise InputError(f"{location}: format {form!r}, expected {FORMAT!r}", "export it again with this version")
        manifest = cls(
            name=fields.text("name", NAME),
            sequence=fields.integer("sequence"),
            procedure=fields.text("procedure", NAME),
            precision=fields.text("precision", NAME),
            base=_base(fields.object("base")),
            updates=tuple(_update(item) for item in fields.records("updates", MAX_ITEMS)),
            tasks=tuple(_task(item) for item in fields.records("tasks", MAX_ITEMS)),
            graphs=fields.digests("graphs", PATH, MAX_ITEMS) if "graphs" in fields else {},
            golden=_golden(fields.object("golden")),
            files={path: _file(item) for path, item in fields.objects("files", PATH, MAX_ITEMS).items()},
            tensors={name: _tensor(item) for name, item in fields.objects("tensors", PARAMETER, MAX_ITEMS).items()},
            versions=fields.texts("versions", NAME, PRINTABLE, MAX_ITEMS) if "versions" in fields else {},
            sha256=fields.digest("sha256") if "sha256" in fields else "",
            embedding_space=_space(fields) if "embedding_space" in fields else None,
        )
        fields.done(extensions=False)
        check_paths([*manifest.files, MANIFEST], f"{location}.files")
        _check_tensors(manifest, location)
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The document, its members in the order of the file."""
        tasks = self.tasks
        document = {
            "format": FORMAT,
            "name": self.name,
            "sequence": self.sequence,
            "procedure": self.procedure,
            "precision": self.precision,
            "base": self.base.to_json(),
            "updates": [{"task": update.task, "sha256": update.sha256} for update in self.updates],
            "tasks": [
                {"name": t.name, "classes": t.classes, "learned": t.learned, "accuracy": t.accuracy} for t in tasks
            ],
            "graphs": dict(self.graphs),
            "golden": {"max_abs": self.golden.max_abs, "min_cosine": self.golden.min_cosine},
            "files": {path: {"sha256": file.sha256, "bytes": file.nbytes} for path, file in self.files.items()},
            "tensors": _tensors_json(self.tensors),
            "versions": dict(self.versions),
        }
        if self.embedding_space:
            document["embedding_space"] = self.embedding_space.to_json()
        return {**document, **({"sha256": self.sha256} if self.sha256 else {})}

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json."""
        return json_bytes(self.to_json())

    def digest(self) -> str:
        """The expected `sha256`: the digest of the content without it, for any order of keys."""
        return manifest_digest(self.to_json())

    def sealed(self) -> ReleaseManifest:
        """The manifest with its self-digest, which detects edits; only a signed update proves who wrote it."""
        return replace(self, sha256=self.digest())

    def write(self, release: Path) -> None:
        """Write RELEASE/manifest.json. Raises InputError, and writes nothing, if readers would reject it."""
        data = self.to_bytes()
        self.parse(data, str(release / MANIFEST))
        write_file(release / MANIFEST, data)

    def space(self) -> EmbeddingSpace | None:
        """The embedding space that follows from the digests; None if the manifest does not list all that makes vectors."""
        sides = ((VISUAL, PREPROCESS), (TEXTUAL, f"{TOKENIZER}/tokenizer.json"))
        if any(tower.graph not in self.graphs or file not in self.files for tower, file in sides):
            return None
        return EmbeddingSpace(*(self._half(tower, file) for tower, file in sides))

    def _half(self, tower: TowerFiles, file: str) -> str:
        tensors = {
            name: entry.sha256
            for name, entry in self.tensors.items()
            if entry.file == tower.weights and name not in NOT_IN_A_TOWER
        }
        return half_digest(self.graphs[tower.graph], tensors, {file: self.files[file].sha256})

    @property
    def weights(self) -> frozenset[str]:
        """The files in which parameters lie."""
        return frozenset(tensor.file for tensor in self.tensors.values())


@dataclass(frozen=True)
class Release:
    """One release on disk; `manifest_sha256` is the digest of manifest.json, which covers all other files."""

    path: Path
    manifest: ReleaseManifest
    manifest_sha256: str

    @classmethod
    def read(cls, path: Path) -> Release:
        """Read PATH/manifest.json once. Raises InputError if it is missing or not the manifest of a release."""
        try:
            data = read_regular(path / MANIFEST, MAX_MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path} is not a release: it has no {MANIFEST}", "use a folder in RUN/releases") from None
        return cls(path, ReleaseManifest.parse(data, str(path / MANIFEST)), sha256_bytes(data))

    def check(self) -> None:
        """Hash every file. Raises CheckFailed naming the first that is missing or has another digest."""
        for name, entry in self.manifest.files.items():
            check_file(self.path / name, entry.sha256)


def is_graph(path: str) -> bool:
    """Whether the file is one of the graphs, which all releases of a base share."""
    return path.casefold().endswith(".onnx")


def check_file(path: Path, sha256: str) -> None:
    """Raises CheckFailed if the file at `path` is missing or has another digest."""
    if not path.is_file():
        raise CheckFailed(f"{path} is missing", "copy it from the release it belongs to")
    if (found := sha256_file(path)) != sha256:
        raise CheckFailed(
            f"{path} is damaged: SHA-256 {found}, expected {sha256}", "copy it from the release it belongs to"
        )


def manifest_digest(document: Mapping[str, object]) -> str:
    """SHA-256 of a manifest's JSON without its own `sha256`, whatever the order of its members."""
    content = {name: value for name, value in document.items() if name != "sha256"}
    return sha256_bytes(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def _base(fields: Fields) -> BaseModel:
    licence = fields.take("licence") if "licence" in fields else None
    if licence is not None and licence != "" and not (isinstance(licence, str) and PRINTABLE.fullmatch(licence)):
        raise wrong(f"{fields.location}.licence", licence, "text or null")
    base = BaseModel(fields.text("name", PRINTABLE), fields.digest("sha256"), licence)
    if "deployed_form" in fields:
        base = replace(
            base,
            deployed_form=fields.integer("deployed_form", low=1),
            original_sha256=fields.digest("original_sha256"),
            deployed_difference=fields.number("deployed_difference", 0, 2),
        )
    fields.done(extensions=False)
    return base


def _space(fields: Fields) -> EmbeddingSpace:
    location = f"{fields.location}.embedding_space"
    return EmbeddingSpace.of_members(fields.digests("embedding_space", NAME, 3), location)


def _update(fields: Fields) -> MergedUpdate:
    update = MergedUpdate(fields.text("task", NAME), fields.digest("sha256"))
    fields.done(extensions=False)
    return update


def _task(fields: Fields) -> TaskEntry:
    name, classes, learned = fields.text("name", NAME), fields.integer("classes"), fields.flag("learned")
    task = TaskEntry(name, classes, learned, fields.number_or_null("accuracy", 0, 1))
    fields.done(extensions=False)
    return task


def _golden(fields: Fields) -> GoldenGate:
    gate = GoldenGate(fields.number("max_abs", 0, 10), fields.number("min_cosine", -1, 1))
    fields.done(extensions=False)
    return gate


def _file(fields: Fields) -> FileEntry:
    file = FileEntry(fields.digest("sha256"), fields.integer("bytes"))
    fields.done(extensions=False)
    return file


def _tensor(fields: Fields) -> TensorEntry:
    """`bytes` follows from dtype and shape. Manifests of the first version of r1export lack it, and the rows."""
    tensor = TensorEntry(
        file=fields.text("file", PATH),
        offset=fields.integer("offset"),
        dtype=take_dtype(fields),
        shape=take_shape(fields),
        rows=tuple(_rows(item, location) for item, location in fields.array("rows", MAX_ITEMS))
        if "rows" in fields
        else (),
        transposed=fields.flag("transposed"),
        sha256=fields.digest("sha256"),
        scale=fields.text("scale", PARAMETER) if "scale" in fields else "",
        model_shape=take_shape(fields, "model_shape") if "model_shape" in fields else None,
    )
    if "bytes" in fields and (nbytes := fields.integer("bytes")) != tensor.nbytes:
        raise wrong(f"{fields.location}.bytes", nbytes, f"{tensor.nbytes}, by dtype and shape")
    fields.done(extensions=False)
    return tensor


def _rows(value: object, location: str) -> tuple[int, int]:
    ends = [whole(end, where) for end, where in items(value, location, 2)]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise wrong(location, ends, "start and stop, with start <= stop")
    return ends[0], ends[1]


def _tensors_json(tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """In a manifest that lacks the rows of all tensors they are lacking of scalars too, for the digest to stay the same."""
    with_rows = any(tensor.rows for tensor in tensors.values())
    return {name: _tensor_json(tensor, with_rows) for name, tensor in tensors.items()}


def _tensor_json(tensor: TensorEntry, with_rows: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "file": tensor.file,
        "offset": tensor.offset,
        "bytes": tensor.nbytes,
        "dtype": NAMES[tensor.dtype],
        "shape": list(tensor.shape),
    }
    if tensor.rows or (with_rows and not tensor.shape):
        document["rows"] = [list(rows) for rows in tensor.rows]
    document.update({"transposed": tensor.transposed, "sha256": tensor.sha256})
    if tensor.scale:
        document["scale"] = tensor.scale
    if tensor.model_shape is not None:
        document["model_shape"] = list(tensor.model_shape)
    return document


def _check_tensors(manifest: ReleaseManifest, location: str) -> None:
    """Every parameter is inside a hashed file, and every scale exists."""
    remedy = "export it again with this version"
    for name, tensor in manifest.tensors.items():
        file = manifest.files.get(tensor.file)
        if file is None or tensor.end > file.nbytes:
            length = "not listed" if file is None else f"{file.nbytes} bytes long"
            raise InputError(
                f"{location}.tensors.{name}: ends at byte {tensor.end} of {tensor.file}, which is {length}", remedy
            )
        if tensor.scale and tensor.scale not in manifest.tensors:
            raise InputError(f"{location}.tensors.{name}: its scale {tensor.scale} is not in the list", remedy)
