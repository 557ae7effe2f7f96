"""Checks of the contents of a release folder.

Digests in a manifest show that a file is the one that was written, not that it was written correctly. The expected
contents are therefore derived from constants, the recipe and the model, never from the release itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from r1export.errors import R1ExportError, first_line
from r1export.update.atomic_io import sha256_bytes, sha256_file
from r1export.update.container import map_tensors, read_layout, read_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.release_manifest import ReleaseManifest, TensorEntry
from r1export.verify.client_files import ListedClasses
from r1export.verify.graph_digest import graph_digest, read_graph
from r1export.verify.merge_diagnosis import diagnose
from r1export.verify.results import Check

UNREADABLE = (  # exceptions of reading a corrupted release
    R1ExportError, OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError, RecursionError,
)  # fmt: skip
NARROW = {"int8": "int8", "float16": "fp16"}  # a dtype that no more precise variant has
Embed = Callable[[list[str]], np.ndarray]


def attempt(look: Callable[[], Check], *, of: int) -> Check:
    """The check, or a failure with the reason why it could not run."""
    try:
        return look()
    except UNREADABLE as error:
        reason = str(error) if isinstance(error, R1ExportError) else f"unreadable: {first_line(error)}"
        return Check.failed(reason, of=of)


def check_manifest(manifest: ReleaseManifest, expected: Mapping[str, object]) -> Check:
    """Check the manifest's self-digest, the consistency of its fields, and the `expected` values of fields."""
    problems = list(_contradictions(manifest))
    if manifest.sha256 != manifest.digest():
        problems.append("manifest.json was edited: self-digest mismatch")
    problems += [
        f"manifest.json: {name} is {_short(getattr(manifest, name))}, expected {_short(value)}"
        for name, value in expected.items()
        if getattr(manifest, name) != value
    ]
    agrees = f", and {', '.join(expected)} agree with the run" if expected else ""
    count = 2 + len(expected)
    return Check.judge(problems, looked_at=count, of=count, detail=f"the self-digest matches{agrees}")


def _contradictions(manifest: ReleaseManifest) -> Iterator[str]:
    """Contradictions between fields, whatever was trained."""
    learned, merged = [t.name for t in manifest.tasks if t.learned], [update.task for update in manifest.updates]
    if learned != merged:
        yield f"manifest.json: the learned tasks are {_short(learned)}, but the updates are of {_short(merged)}"
    if len(merged) > manifest.sequence:
        yield f"manifest.json: {len(merged)} updates in release number {manifest.sequence}"
    if not manifest.name.startswith(f"{manifest.sequence:02d}-"):
        yield f"manifest.json: {manifest.name} is number {manifest.sequence}"
    if manifest.embedding_space not in (None, manifest.space()):
        yield "manifest.json: embedding_space does not follow from its graphs, tensors and files"
    if "r1export" not in manifest.versions:
        yield "manifest.json: versions lacks the version of r1export"
    stored = {entry.dtype.name for entry in manifest.tensors.values()}
    precision = next((name for dtype, name in NARROW.items() if dtype in stored), "fp32")
    if manifest.precision != precision:
        yield f"manifest.json: precision is {manifest.precision}, but its tensors are {precision}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def check_files(
    release: Path, manifest: ReleaseManifest, required: Collection[str], unlisted: Collection[str]
) -> Check:
    """Check that every file exists with its digest, not as a link, and that there are no other files than the `unlisted` ones."""
    problems = [f"{name} is not listed in the manifest" for name in sorted(set(required) - set(manifest.files))]
    problems += [problem for name in manifest.files for problem in _file_problems(release, name, manifest)]
    present = {path.relative_to(release).as_posix(): path for path in release.rglob("*")}
    links = sorted(name for name, path in present.items() if path.is_symlink())
    extra = {name for name, path in present.items() if not path.is_dir()} - {*manifest.files, *unlisted}
    problems += [f"{name} is a link" for name in links if name not in manifest.files]
    problems += [f"{name} is not listed in the manifest" for name in sorted(extra) if name not in links]
    expected = len({*manifest.files, *required})
    detail = f"{len(manifest.files)} files have their released digests, and there are no others"
    return Check.judge(problems, looked_at=len(manifest.files), of=expected, detail=detail)


def _file_problems(release: Path, name: str, manifest: ReleaseManifest) -> Iterator[str]:
    path, entry = release / name, manifest.files[name]
    if path.is_symlink() or not path.is_file():
        yield f"{name} is a link" if path.is_symlink() else f"{name} is missing"
    elif path.stat().st_size != entry.nbytes or sha256_file(path) != entry.sha256:
        yield f"{name} was modified"


def check_programs(release: Path, manifest: ReleaseManifest, graphs: Sequence[str]) -> Check:
    """Check the structure digest of every graph."""
    problems = [f"{name} has no digest in the manifest" for name in graphs if name not in manifest.graphs]
    problems += [
        f"{name} has another structure than the released graph"
        for name in graphs
        if name in manifest.graphs and graph_digest(release / name) != manifest.graphs[name]
    ]
    return Check.judge(
        problems, looked_at=len(graphs), of=len(graphs), detail=f"{len(graphs)} graphs have their released structure"
    )


def check_epsilons(release: Path, graphs: Sequence[str], epsilons: Mapping[str, float]) -> Check:
    """Check that every LayerNormalization has the epsilon of the module that owns its weight.

    A wrong epsilon stays below any tolerance if the input has a high variance, and breaks the output if it doesn't.
    """
    found = {module: value for name in graphs for module, value in _epsilons(release / name)}
    wrong = {m: v for m, v in found.items() if m in epsilons and np.float32(epsilons[m]) != np.float32(v)}
    problems = [
        f"epsilon of {module} is {value:.3g}, expected {epsilons[module]:.3g}" for module, value in wrong.items()
    ]
    seen = len(found.keys() & epsilons.keys())
    return Check.judge(problems, looked_at=seen, of=len(epsilons), detail=f"{seen} norms have the right epsilon")


def _epsilons(graph: Path) -> Iterator[tuple[str, float]]:
    for node in read_graph(graph).graph.node:
        if node.op_type == "LayerNormalization":
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            yield node.input[1].removesuffix(".weight"), epsilon


def check_tensor_map(release: Path, manifest: ReleaseManifest, files: Sequence[str]) -> Check:
    """Check that the manifest's tensor map is a bijection to the tensors in the weights `files`: devices merge at its offsets.

    Every value is finite.
    """
    layouts = {file: read_layout(release / file).by_name for file in files}
    tensors = {file: map_tensors(release / file) for file in files}
    problems = [
        f"{name} in {file} is not in the manifest's tensor map"
        for file, specs in layouts.items()
        for name in specs
        if name not in manifest.tensors or manifest.tensors[name].file != file
    ]
    for name, entry in manifest.tensors.items():
        spec = layouts[entry.file].get(name) if entry.file in layouts else None
        if spec is None:
            problems.append(f"{entry.file} has no {name}")
        elif wrong := _misplaced(entry, spec.offset, spec.dtype, spec.shape):
            problems.append(f"manifest.json: {wrong} of {name} differs from {entry.file}")
        elif sha256_bytes(values := np.ascontiguousarray(tensors[entry.file][name])) != entry.sha256:
            problems.append(f"{name} in {entry.file}: digest differs from the manifest")
        elif wrong := _rows_problem(entry):
            problems.append(f"manifest.json: rows of {name} {wrong}")
        elif values.dtype.kind == "f" and not np.isfinite(values).all():
            problems.append(f"{name} in {entry.file} has NaN or Inf")
    stored = {(file, name) for file, specs in layouts.items() for name in specs}
    count = len(stored | {(entry.file, name) for name, entry in manifest.tensors.items()})
    return Check.judge(
        problems, looked_at=count, of=count, detail=f"{count} tensors match the manifest's map, all values are finite"
    )


def _misplaced(entry: TensorEntry, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> str:
    """The first field of an entry that differs from the weights file; empty if none does."""
    actual = {"offset": offset, "dtype": dtype, "shape": tuple(shape)}
    return next((field for field, value in actual.items() if getattr(entry, field) != value), "")


def _rows_problem(entry: TensorEntry) -> str:
    """What is wrong with the rows of an entry: the linears in a parameter have equal heights, which divide its own."""
    if not entry.rows:
        return "are missing" if entry.shape and entry.dtype.kind == "f" and len(entry.shape) > 1 else ""
    sides = entry.shape[::-1] if entry.transposed else entry.shape
    height = next((side for side in sides if side != 1), 1)
    block = entry.rows[0][1] - entry.rows[0][0]
    starts = [start for start, _ in entry.rows]
    fits = block > 0 and not height % block and max(stop for _, stop in entry.rows) <= height
    even = all(stop - start == block and not start % block for start, stop in entry.rows) if fits else False
    return "" if even and starts == sorted(set(starts)) else f"are {list(entry.rows)}, of {height}"


def check_weights(
    release: Path,
    manifest: ReleaseManifest,
    expected: Mapping[str, np.ndarray],
    updates: Sequence[tuple[str, ExpertUpdate]],
) -> Check:
    """Compare every parameter bit for bit with `expected` = base + factors; `updates` (task, factors) help to diagnose differences."""
    files = sorted({entry.file for entry in manifest.tensors.values()})
    stored = {name: tensor for file in files for name, tensor in map_tensors(release / file).items()}
    problems = [f"{name} is missing from the weights" for name in expected if name not in stored]
    problems += [f"{name} is not a parameter of the model" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        transposed = name in manifest.tensors and manifest.tensors[name].transposed
        problems += _weight_problems(name, stored[name].T if transposed else stored[name], expected[name], updates)
    detail = f"{len(expected)} tensors are base + factors, bit for bit"
    return Check.judge(sorted(problems), looked_at=len(expected), of=len(expected), detail=detail)


def _weight_problems(
    name: str, stored: np.ndarray, expected: np.ndarray, updates: Sequence[tuple[str, ExpertUpdate]]
) -> Iterator[str]:
    if stored.size != expected.size or stored.dtype != expected.dtype:
        yield f"{name} is {stored.dtype}{list(stored.shape)}, expected {expected.dtype}{list(expected.shape)}"
    elif np.ascontiguousarray(stored).tobytes() != np.ascontiguousarray(expected).tobytes():
        yield f"{name} is not base + factors: {diagnose(name, np.reshape(stored, expected.shape), expected, updates)}"


def check_class_embeddings(release: Path, lists: Iterable[ListedClasses], embed: Embed, tolerance: float) -> Check:
    """Compare all class embeddings with the output of the release's text tower. Counts are classes.

    `embed` takes prompts to unit-norm (n, D). A class embedding is the normalised mean over the templates.
    """
    problems: list[str] = []
    lists = list(lists)
    for one in lists:
        try:
            tensors = read_tensors(release / "classes" / f"{one.task}.safetensors")
            problems += [
                f"classes/{one.task}.safetensors has a tensor {name}" for name in tensors if name != "class_embeds"
            ]
            problems += _class_problems(one, tensors["class_embeds"], embed, tolerance)
        except UNREADABLE as error:
            problems.append(f"classes/{one.task}: {error}")
    count = sum(len(one.classes) for one in lists)
    detail = f"{count} embeddings of {len(lists)} tasks match this text tower"
    return Check.judge(problems, looked_at=count, of=count, detail=detail)


def _class_problems(classes: ListedClasses, stored: np.ndarray, embed: Embed, tolerance: float) -> Iterator[str]:
    file = f"classes/{classes.task}.safetensors"
    if stored.dtype != np.float32:
        yield f"{file} has dtype {stored.dtype}, expected float32"
    if len(stored) != len(classes.classes):
        yield f"{file} has {len(stored)} classes, expected {len(classes.classes)}"
        return
    means = embed(classes.prompts).astype(np.float64).reshape(len(stored), len(classes.templates), -1).mean(1)
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    if stored.shape != expected.shape:
        yield f"{file} has width {stored.shape[1]}, the text tower gives {expected.shape[1]}"
        return
    errors = np.abs(expected - stored).max(1)
    if not errors.max() <= tolerance:  # NaN is not
        worst = int(np.nan_to_num(errors, nan=np.inf).argmax())
        name = classes.classes[worst]
        yield f"{file} is stale: the text tower's embedding of {name!r} differs by {errors[worst]:.2g}, allowed {tolerance:.2g}"


def check_base(manifest: ReleaseManifest, sha256: str, source: str) -> Check:
    """Check that the base named in the manifest has the digest of `source`."""
    problems = (
        []
        if manifest.base.sha256 == sha256
        else [f"manifest.json: base is {manifest.base.sha256}, {source} has {sha256}"]
    )
    return Check.judge(problems, looked_at=1, of=1, detail=f"the base is {source}")


def check_same_places(manifest: ReleaseManifest, base: ReleaseManifest) -> Check:
    """Check that every tensor has the place and form that it has in the base, as their graphs are the same. Rows may be split differently."""
    places, expected = (
        {n: (e.file, e.offset, e.dtype, e.shape, e.transposed, e.scale) for n, e in one.tensors.items()}
        for one in (manifest, base)
    )
    names = sorted(places.keys() | expected.keys())
    problems = [
        f"{name} has another place than in the base" for name in names if places.get(name) != expected.get(name)
    ]
    return Check.judge(
        problems, looked_at=len(names), of=len(names), detail=f"{len(names)} tensors have the same place as in the base"
    )


def check_text(path: Path, expected: str) -> Check:
    """Check that a text is exactly the one generated from the manifest."""
    problems = (
        []
        if path.read_bytes() == expected.encode()
        else [f"{path.name} differs from the one generated from the manifest"]
    )
    return Check.judge(problems, looked_at=1, of=1, detail=f"{path.name} is the one generated from the manifest")


def check_same_files(left: Path, right: Path, names: Sequence[str], detail: str) -> Check:
    """Check that the files `names` of two folders have the same bytes."""
    problems = [f"{name} differs" for name in names if sha256_file(left / name) != sha256_file(right / name)]
    return Check.judge(problems, looked_at=len(names), of=len(names), detail=detail)
