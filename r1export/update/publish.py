"""Make a field update in the lab: what a device lacks to turn the base into release N, signed.

The result is not promised but tried: each file of the release is derived as a device will derive it, and a bundle
is written only if all bytes agree.
"""

from __future__ import annotations

import difflib
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1export.errors import CheckFailed, InputError
from r1export.update.bundle import MAX_BUNDLE, Bundle, assemble
from r1export.update.container import NAMES
from r1export.update.drop import Refresh, release_without
from r1export.update.envelope import SecretKey, sign
from r1export.update.factors import ExpertUpdate
from r1export.update.files import sha256_file, write_file
from r1export.update.manifest import ALIGN, Base, Experts, File, Health, Manifest, Part, Update
from r1export.update.rebuild import Rebuild
from r1export.update.release import MANIFEST, REPORTS, Release

SHORT = 64  # bytes: a run of equal bytes shorter than this costs more as a part of its own than sent again


@dataclass(frozen=True)
class Terms:
    """What the fleet's owner decides about an update. `expires` 0 means never; `created` is seconds since 1970 UTC."""

    product: str
    device_class: str
    min_seq: int = 0
    created: int = 0
    expires: int = 0
    min_agreement: float = 0.9


def make_bundle(
    run: Path,
    release: int,
    since: int,
    keys: Sequence[SecretKey],
    out: Path,
    *,
    drop: Iterable[str] = (),
    seq: int = 0,
    terms: Terms | None = None,
    refresh: Refresh | None = None,
    overwrite: bool = False,
    precision: str = "fp32",
) -> Bundle:
    """Write to `out` what a device at release `since` (0: the base) needs for `release` of `run`, without the tasks in `drop`.

    `seq` is by default the release's sequence number; a rollback or a version with dropped tasks has to name a higher one.
    `refresh` computes class embeddings and golden outputs of a version with dropped tasks, which cannot be made without it.

    Raises:
        InputError: an unknown release or task, a file that exists, a sequence number that is missing.
        CheckFailed: the release cannot be derived from its base and its factors bit for bit.
        Unsupported: neither cryptography nor PyNaCl is installed.
    """
    releases = read_releases(run, precision)
    if release not in releases or since not in releases or 0 not in releases:
        raise InputError(
            f"{run} has the releases {sorted(releases)}, wanted were 0, {since} and {release}", "choose among them"
        )
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists", "choose another name, or overwrite it on purpose")
    target, dropped = releases[release], tuple(drop)
    if (dropped or release < since) and not seq:
        raise InputError(
            "a rollback or a version without a task needs a sequence number of its own",
            "give one above all that the fleet has seen",
        )
    factors = read_factors(run)
    if dropped:
        if refresh is None:
            raise InputError(
                "class embeddings and golden outputs of a version without a task have to be computed anew",
                "give `refresh`",
            )
        with release_without(releases[0], target, factors, dropped, refresh) as smaller:
            bundle = bundle_release(releases[0], smaller, factors, releases[since].updates, keys, seq, terms)
    else:
        bundle = bundle_release(
            releases[0], target, factors, releases[since].updates, keys, seq or target.sequence, terms
        )
    write_file(out, bundle.to_bytes())
    return bundle


def read_releases(run: Path, precision: str = "fp32") -> dict[int, Release]:
    """The releases of a run by sequence number. Raises InputError if there are none or two have the same number."""
    folder = (run if precision == "fp32" else run / "variants" / precision) / "releases"
    found = [Release.read(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    releases = {release.sequence: release for release in found}
    if not found or len(releases) != len(found):
        raise InputError(
            f"{folder} has {len(found)} releases with {len(releases)} different numbers",
            "run `r1export run` first",
        )
    return releases


def read_factors(run: Path) -> dict[str, ExpertUpdate]:
    """The experts of each task of a run by the digest of their file.

    Raises InputError for a file that this program did not write: a device could not write its bytes again.
    """
    factors = {}
    for path in sorted((run / "tasks").glob("*/factors.safetensors")):
        update, digest = ExpertUpdate.read(path), sha256_file(path)
        if hashlib.sha256(update.to_bytes()).hexdigest() != digest:
            raise InputError(f"{path} is not in canonical form", "write it with ExpertUpdate.write")
        factors[digest] = update
    return factors


def bundle_release(
    base: Release,
    target: Release,
    factors: Mapping[str, ExpertUpdate],
    held: Iterable[tuple[str, str]],
    keys: Sequence[SecretKey],
    seq: int,
    terms: Terms | None = None,
) -> Bundle:
    """The bundle that turns `base` into `target` on a device that holds the updates `held`; see `make_bundle`."""
    terms = terms or Terms("default", "default")
    lacking = [sha256 for _, sha256 in target.updates if sha256 not in factors]
    if lacking:
        raise InputError(
            f"{target.path}: no factors.safetensors with SHA-256 {lacking[0]}",
            "bundle from the run that made the release",
        )
    rebuild = Rebuild(base, ExpertUpdate.stack(factors[sha256] for _, sha256 in target.updates))
    _check_tensors(rebuild, target)
    payload = _Payload()
    held_digests = {sha256 for _, sha256 in held}
    updates = tuple(
        Update(task, sha256) if sha256 in held_digests else _carry(payload, task, sha256, factors[sha256])
        for task, sha256 in target.updates
    )
    files = tuple(_file(payload, rebuild, target, path) for path in [*sorted(target.files), MANIFEST])
    manifest = Manifest(
        name=target.name,
        product=terms.product,
        device_class=terms.device_class,
        seq=seq,
        min_seq=terms.min_seq,
        created=terms.created or int(time.time()),
        expires=terms.expires,
        base=Base(base.base_name, base.base_sha256, base.manifest_sha256),
        payload_bytes=len(payload.data),
        payload_sha256=hashlib.sha256(payload.data).hexdigest(),
        updates=updates,
        tensors={name: target.tensors[name].sha256 for name in rebuild.changed},
        files=files,
        health=Health(target.golden["max_abs"], target.golden["min_cosine"], terms.min_agreement),
        algorithm=rebuild.procedure,
        # Their digests travel, they do not.
        evidence={name: sha256_file(target.path / name) for name in REPORTS if (target.path / name).is_file()},
    )
    return _signed(manifest, bytes(payload.data), keys)


def _signed(manifest: Manifest, payload: bytes, keys: Sequence[SecretKey]) -> Bundle:
    """Sign, and read back what a device will read: nothing leaves the lab that no device would accept."""
    text = manifest.to_bytes()
    data = assemble(sign(text, keys), text, payload)
    if len(data) > MAX_BUNDLE:
        raise InputError(
            f"the update has {len(data)} bytes, devices read {MAX_BUNDLE}", "bundle from a later release with --since"
        )
    return Bundle.parse(data, [key.public for key in keys], len(keys))


class _Payload:
    """The payload while it grows; `add` returns the offset at which the bytes lie."""

    def __init__(self) -> None:
        self.data = bytearray()

    def align(self) -> None:
        self.data += bytes(-len(self.data) % ALIGN)

    def add(self, data: bytes) -> int:
        self.data += data
        return len(self.data) - len(data)


def _carry(payload: _Payload, task: str, sha256: str, factors: ExpertUpdate) -> Update:
    dtypes = {NAMES[pair.u.dtype] for pair in factors.factors.values()}
    if len(dtypes) != 1:
        raise InputError(
            f"the factors of {task} have the types {sorted(dtypes)}", "pack all experts of a task in one type"
        )
    payload.align()
    experts = []
    for rows, pair in factors.factors.items():
        u, v = payload.add(pair.u.tobytes()), payload.add(pair.v.tobytes())
        experts.append(Experts(rows, pair.v.shape[1], pair.v.shape[0], u, v))
    return Update(task, sha256, dtypes.pop(), tuple(experts))


def _check_tensors(rebuild: Rebuild, target: Release) -> None:
    """Exactly the parameters that the updates name may differ from the base, and have to lie where the base has them."""
    base, named = rebuild.base, set(rebuild.changed)
    for name in sorted(base.tensors.keys() | target.tensors.keys()):
        old, new = base.tensors.get(name), target.tensors.get(name)
        same_place = (
            old and new and (old.file, old.offset, old.dtype, old.shape) == (new.file, new.offset, new.dtype, new.shape)
        )
        if not old or not new or not same_place or (name not in named and old.sha256 != new.sha256):
            raise CheckFailed(
                f"{name} differs between {base.path} and {target.path}, but no update changes it", "export both again"
            )


def _file(payload: _Payload, rebuild: Rebuild, target: Release, path: str) -> File:
    """One file of the target, as cheaply as it can be said: the base's, the base's with merged tensors, or parts."""
    base, source = rebuild.base, target.path / path
    digest, nbytes = sha256_file(source), source.stat().st_size
    if path in target.files and digest != target.files[path].sha256:
        raise CheckFailed(
            f"{source} is damaged: SHA-256 {digest}, expected {target.files[path].sha256}", "export the release again"
        )
    if path in base.files and (path in rebuild.merged_files or digest == base.files[path].sha256):
        derived = hashlib.sha256()
        for chunk in rebuild.chunks(path):
            derived.update(chunk)
        if derived.hexdigest() != digest:
            raise CheckFailed(f"{source} is not the base with the factors merged", "export the release again")
        return File(path, nbytes, digest)
    new = source.read_bytes()
    old = (base.path / path).read_bytes() if path in base.files or path == MANIFEST else b""
    parts = []
    for kind, start, stop in _differences(old, new):
        if kind == "base":
            parts.append(Part("base", start, stop - start))
        else:
            payload.align()
            parts.append(Part("payload", payload.add(new[start:stop]), stop - start))
    return File(path, nbytes, digest, tuple(parts))


def _differences(old: bytes, new: bytes) -> list[tuple[str, int, int]]:
    """How to write `new` from pieces: ("base", start, stop) of `old`, ("payload", start, stop) of `new`."""
    if len(old) == len(new):
        runs = _equal_runs(old, new)
    elif b"\0" in new or not old:
        runs = []
    else:
        runs = _equal_lines(old, new)
    pieces, position = [], 0
    for start, at, length in [*((a, b, n) for a, b, n in runs if n >= SHORT), (0, len(new), 0)]:
        if at > position:
            pieces.append(("payload", position, at))
        if length:
            pieces.append(("base", start, start + length))
        position = at + length
    return pieces


def _equal_runs(old: bytes, new: bytes) -> list[tuple[int, int, int]]:
    """(start in old, start in new, length) of the bytes that are equal where they stand."""
    same = np.frombuffer(old, np.uint8) == np.frombuffer(new, np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]])))
    return [(int(a), int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= SHORT]


def _equal_lines(old: bytes, new: bytes) -> list[tuple[int, int, int]]:
    """(start in old, start in new, length) of the lines that both have, in order."""
    olds, news = old.splitlines(keepends=True), new.splitlines(keepends=True)
    starts = [np.cumsum([0, *map(len, lines)]).tolist() for lines in (olds, news)]
    blocks = difflib.SequenceMatcher(None, olds, news).get_matching_blocks()
    return [(starts[0][a], starts[1][b], starts[1][b + n] - starts[1][b]) for a, b, n in blocks]
