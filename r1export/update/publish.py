"""Make a field update in the lab: what a device lacks to turn the base into release N, signed.

The result is not promised but tried: each file of the release is derived as a device will derive it, and a bundle
is written only if all bytes agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import sha256_bytes, sha256_file
from r1export.update.bundle import MAX_BUNDLE, Bundle, assemble
from r1export.update.byte_delta import differences
from r1export.update.container import NAMES
from r1export.update.envelope import SecretKey, sign
from r1export.update.factors import ExpertUpdate
from r1export.update.manifest import ALIGN, Base, Experts, File, Health, Manifest, Part, Update
from r1export.update.rebuild import Rebuild
from r1export.update.release_manifest import MANIFEST, REPORTS, Release, is_graph
from r1export.update.without_task import Refresh, release_without


@dataclass(frozen=True)
class Step:
    """From which version to which: a device at release `since` (0: the base) gets `release`, without the tasks in `drop`.

    `seq` 0 stands for the release's own sequence number; a rollback or a version with dropped tasks has to name a higher one.
    `precision` is that of both releases: fp32, or a variant of the run.
    """

    release: int
    since: int = 0
    drop: tuple[str, ...] = ()
    seq: int = 0
    precision: str = "fp32"


@dataclass(frozen=True)
class Terms:
    """What the fleet's owner decides about an update. Times are seconds since 1970 UTC; `expires` 0 means never."""

    created: int
    product: str = "default"
    device_class: str = "default"
    min_seq: int = 0
    expires: int = 0
    min_agreement: float = 0.9


def make_bundle(
    run: Path, step: Step, keys: Sequence[SecretKey], terms: Terms, refresh: Refresh | None = None
) -> Bundle:
    """What a device lacks to take `step` between two releases of `run`, signed with `keys`.

    `refresh` computes class embeddings and golden outputs of a version with dropped tasks, which cannot be made without it.

    Raises:
        InputError: an unknown release or task, a sequence number that is missing, an expiry that is over.
        CheckFailed: the release cannot be derived from its base and its factors bit for bit.
        Unsupported: neither cryptography nor PyNaCl is installed.
    """
    if terms.expires and terms.created >= terms.expires:
        raise InputError(
            f"the update would expire at {terms.expires}, it is made at {terms.created} (seconds since 1970)",
            "check this machine's clock and --expires: a `created` in the future cannot be taken back",
        )
    releases = read_releases(run, step.precision)
    if not {0, step.since, step.release} <= releases.keys():
        raise InputError(
            f"{run} has the releases {sorted(releases)}, wanted were 0, {step.since} and {step.release}",
            "choose among them",
        )
    if (step.drop or step.release < step.since) and not step.seq:
        raise InputError(
            "a rollback or a version without a task needs a sequence number of its own",
            "give one above all that the fleet has seen",
        )
    base, target, held = releases[0], releases[step.release], releases[step.since].updates
    factors = read_factors(run)
    if not step.drop:
        return _bundle_release(base, target, factors, held, keys, step.seq or target.sequence, terms)
    if refresh is None:
        raise InputError(
            "class embeddings and golden outputs of a version without a task have to be computed anew",
            "give `refresh`",
        )
    with release_without(base, target, factors, step.drop, refresh) as smaller:
        return _bundle_release(base, smaller, factors, held, keys, step.seq, terms)


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
        if sha256_bytes(update.to_bytes()) != digest:
            raise InputError(f"{path} is not in canonical form", "write it with ExpertUpdate.write")
        factors[digest] = update
    return factors


def _bundle_release(
    base: Release,
    target: Release,
    factors: Mapping[str, ExpertUpdate],
    held: Iterable[tuple[str, str]],
    keys: Sequence[SecretKey],
    seq: int,
    terms: Terms,
) -> Bundle:
    """The bundle that turns `base` into `target` on a device that holds the updates `held`; see `make_bundle`."""
    lacking = [sha256 for _, sha256 in target.updates if sha256 not in factors]
    if lacking:
        raise InputError(
            f"{target.path}: no factors.safetensors with SHA-256 {lacking[0]}",
            "bundle from the run that made the release",
        )
    rebuild = Rebuild(base, ExpertUpdate.stack(factors[sha256] for _, sha256 in target.updates))
    _check_tensors(rebuild, target)
    _check_graphs(base, target)
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
        created=terms.created,
        expires=terms.expires,
        base=Base(base.base_name, base.base_sha256, base.manifest_sha256),
        payload_bytes=len(payload.data),
        payload_sha256=sha256_bytes(payload.data),
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


def _check_graphs(base: Release, target: Release) -> None:
    """All releases share the base's graphs: a device in overlay mode opens those and no others."""
    for path in sorted(base.files.keys() | target.files.keys()):
        if is_graph(path) and base.files.get(path) != target.files.get(path):
            raise CheckFailed(
                f"{path} differs between {base.path} and {target.path}",
                "a new graph needs a new base: export a run of its own",
            )


def _file(payload: _Payload, rebuild: Rebuild, target: Release, path: str) -> File:
    """One file of the target, as cheaply as it can be said: the base's, the base's with merged tensors, or parts."""
    base, source = rebuild.base, target.path / path
    digest, nbytes = sha256_file(source), source.stat().st_size
    if path in target.files and digest != target.files[path].sha256:
        raise CheckFailed(
            f"{source} is damaged: SHA-256 {digest}, expected {target.files[path].sha256}", "export the release again"
        )
    if path in base.files and (path in base.weights or digest == base.files[path].sha256):
        derived = hashlib.sha256()
        for chunk in rebuild.chunks(path):
            derived.update(chunk)
        if derived.hexdigest() != digest:
            raise CheckFailed(f"{source} is not the base with the factors merged", "export the release again")
        return File(path, nbytes, digest)
    new = source.read_bytes()
    old = (base.path / path).read_bytes() if path in base.files or path == MANIFEST else b""
    parts = []
    for kind, start, stop in differences(old, new):
        if kind == "base":
            parts.append(Part("base", start, stop - start))
        else:
            payload.align()
            parts.append(Part("payload", payload.add(new[start:stop]), stop - start))
    return File(path, nbytes, digest, tuple(parts))
