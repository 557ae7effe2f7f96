"""Build a signed update: what a device lacks to derive release N from the base.

    delivery = plan_delivery(run, step)
    with leaving_out(delivery, step.drop, refresh) as delivery:
        bundle = sign_delivery(delivery, terms, keys)

Each file of the release is derived as on a device, and a bundle is built only if all bytes agree. This module does not check
whether the release was verified; `pipeline.bundle` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import sha256_bytes, sha256_file
from r1export.update.bundle import MAX_BUNDLE, Bundle, assemble
from r1export.update.container import NAMES
from r1export.update.envelope import SecretKey, sign
from r1export.update.factors import ExpertUpdate
from r1export.update.lab.byte_delta import differences
from r1export.update.lab.without_task import Refresh, release_without
from r1export.update.manifest import ALIGN, Base, Experts, File, Health, Manifest, Part, Update
from r1export.update.rebuild import Rebuild
from r1export.update.release_layout import MANIFEST, REPORTS
from r1export.update.release_manifest import GoldenGate, MergedUpdate, Release, is_graph
from r1export.update.run_layout import FACTORS, RunLayout


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


MAX_EXPIRES = 100_000_000_000  # seconds since 1970; what is larger are milliseconds


@dataclass(frozen=True)
class Terms:
    """The conditions of an update. Times are seconds since 1970 UTC; `expires` 0 means never.

    Raises InputError for an expiry before the creation time, or after the year 5000.
    """

    created: int
    product: str = "default"
    device_class: str = "default"
    min_seq: int = 0
    expires: int = 0
    min_agreement: float = 0.9

    def __post_init__(self) -> None:
        if self.expires > MAX_EXPIRES:
            raise InputError(
                f"--expires {self.expires} is after the year 5000 (in seconds since 1970)",
                "use seconds, not milliseconds",
            )
        if self.expires and self.created >= self.expires:
            raise InputError(
                f"the update would expire at {self.expires}, before its creation at {self.created} (seconds since 1970)",
                "check this machine's clock and --expires; a creation time in the future can't be undone",
            )


@dataclass(frozen=True)
class Delivery:
    """The way from `base` to `target` on a device that holds the updates with the digests `held`.

    `factors` are the experts of the run's tasks by the digest of their file. Devices apply `limits` to the golden samples.
    """

    base: Release
    target: Release
    factors: Mapping[str, ExpertUpdate]
    held: frozenset[str]
    seq: int
    limits: GoldenGate

    def rebuild(self) -> Rebuild:
        """How the device derives the target. Raises InputError if the run lacks the factors of one of its updates."""
        digests = [update.sha256 for update in self.target.manifest.updates]
        if lacking := [sha256 for sha256 in digests if sha256 not in self.factors]:
            raise InputError(
                f"{self.target.path}: no {FACTORS} with SHA-256 {lacking[0]}",
                "bundle from the run of the release",
            )
        return Rebuild(self.base, ExpertUpdate.stack(self.factors[sha256] for sha256 in digests))


def make_bundle(
    run: Path, step: Step, keys: Sequence[SecretKey], terms: Terms, refresh: Refresh | None = None
) -> Bundle:
    """What a device lacks to take `step` between two releases of `run`, signed with `keys`, whatever a verification says.

    `refresh` computes class embeddings and golden outputs of a version with dropped tasks, which cannot be made without it.

    Raises:
        InputError: an unknown release or task, a sequence number that is missing.
        CheckFailed: the release cannot be derived from its base and its factors bit for bit.
        Unsupported: neither cryptography nor PyNaCl is installed.
    """
    with leaving_out(plan_delivery(run, step), step.drop, refresh) as delivery:
        return sign_delivery(delivery, terms, keys)


def plan_delivery(run: Path, step: Step) -> Delivery:
    """The way of `step` to the release as it is in `run`, no task left out yet; limits are those that the release states.

    Raises InputError for an unknown release, or a sequence number that is missing.
    """
    releases = read_releases(run, step.precision)
    if not {0, step.since, step.release} <= releases.keys():
        raise InputError(
            f"{run} has the releases {sorted(releases)}, expected 0, {step.since} and {step.release} among them",
            "choose existing releases",
        )
    if (step.drop or step.release < step.since) and not step.seq:
        raise InputError(
            "a rollback or --without needs a sequence number",
            "set --seq above all numbers that the fleet has seen",
        )
    target = releases[step.release]
    held = frozenset(update.sha256 for update in releases[step.since].manifest.updates)
    seq = step.seq or target.manifest.sequence
    return Delivery(releases[0], target, read_factors(run), held, seq, target.manifest.golden)


@contextmanager
def leaving_out(delivery: Delivery, drop: Sequence[str], refresh: Refresh | None) -> Iterator[Delivery]:
    """`delivery`, or one of a smaller release without the tasks `drop`, which lives as long as the block.

    Raises InputError if there is no such task, or no `refresh` to compute what follows from the smaller release's weights.
    """
    if not drop:
        yield delivery
        return
    if refresh is None:
        raise InputError(
            "class embeddings and golden outputs of a version without a task must be recomputed",
            "pass `refresh`",
        )
    with release_without(delivery.base, delivery.target, delivery.factors, drop, refresh) as smaller:
        yield replace(delivery, target=smaller)


def read_releases(run: Path, precision: str = "fp32") -> dict[int, Release]:
    """The releases of a run by sequence number. Raises InputError if there are none or two have the same number."""
    folder = RunLayout(run).variant(precision).releases_folder
    releases = [Release.read(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    by_number = {release.manifest.sequence: release for release in releases}
    if not releases or len(by_number) != len(releases):
        raise InputError(
            f"{folder} has {len(releases)} releases with {len(by_number)} different numbers",
            "run `r1export run` first",
        )
    return by_number


def read_factors(run: Path) -> dict[str, ExpertUpdate]:
    """The experts of each task of a run by the digest of their file.

    Raises InputError for a file that this program did not write: a device could not write its bytes again.
    """
    factors = {}
    for path in (task.factors for task in RunLayout(run).trained()):
        update, digest = ExpertUpdate.read(path), sha256_file(path)
        if sha256_bytes(update.to_bytes()) != digest:
            raise InputError(f"{path} is not in canonical form", "write it with ExpertUpdate.write")
        factors[digest] = update
    return factors


def sign_delivery(delivery: Delivery, terms: Terms, keys: Sequence[SecretKey]) -> Bundle:
    """The bundle, signed and read back as a device will read it: nothing leaves the lab that no device would accept.

    Raises:
        InputError: factors that are missing, or an update that is too large.
        CheckFailed, Unsupported: as `make_bundle`.
    """
    payload = _Payload()
    text = _manifest(delivery, payload, terms).to_bytes()
    data = assemble(sign(text, keys), text, bytes(payload.data))
    if len(data) > MAX_BUNDLE:
        raise InputError(
            f"the update has {len(data)} bytes, devices accept at most {MAX_BUNDLE}",
            "bundle from a later release with --since",
        )
    return Bundle.parse(data, [key.public for key in keys], len(keys))


def _manifest(delivery: Delivery, payload: _Payload, terms: Terms) -> Manifest:
    """What is signed; what has to travel is added to `payload`. Raises as `make_bundle`."""
    base, target, rebuild = delivery.base, delivery.target, delivery.rebuild()
    _check_tensors(rebuild, target)
    _check_graphs(base, target)
    updates = tuple(_update(delivery, payload, update) for update in target.manifest.updates)
    files = tuple(_file(payload, rebuild, target, path) for path in [*sorted(target.manifest.files), MANIFEST])
    return Manifest(
        name=target.manifest.name,
        product=terms.product,
        device_class=terms.device_class,
        seq=delivery.seq,
        min_seq=terms.min_seq,
        created=terms.created,
        expires=terms.expires,
        base=Base(base.manifest.base.name, base.manifest.base.sha256, base.manifest_sha256),
        payload_bytes=len(payload.data),
        payload_sha256=sha256_bytes(payload.data),
        updates=updates,
        tensors={name: target.manifest.tensors[name].sha256 for name in rebuild.changed},
        files=files,
        health=Health(delivery.limits.max_abs, delivery.limits.min_cosine, terms.min_agreement),
        algorithm=rebuild.procedure,
        # Only their digests are sent.
        evidence={name: sha256_file(target.path / name) for name in REPORTS if (target.path / name).is_file()},
    )


class _Payload:
    """The payload while it grows; `add` returns the offset at which the bytes lie."""

    def __init__(self) -> None:
        self.data = bytearray()

    def align(self) -> None:
        self.data += bytes(-len(self.data) % ALIGN)

    def add(self, data: bytes) -> int:
        self.data += data
        return len(self.data) - len(data)


def _update(delivery: Delivery, payload: _Payload, merged: MergedUpdate) -> Update:
    """A merged update: by its digest where the device holds it, else with its experts in the payload."""
    if merged.sha256 in delivery.held:
        return Update(merged.task, merged.sha256)
    factors = delivery.factors[merged.sha256].factors
    dtypes = {NAMES[pair.u.dtype] for pair in factors.values()}
    if len(dtypes) != 1:
        raise InputError(
            f"the factors of {merged.task} have mixed types {sorted(dtypes)}", "use one type for all experts of a task"
        )
    payload.align()
    experts = []
    for rows, pair in factors.items():
        u, v = payload.add(pair.u.tobytes()), payload.add(pair.v.tobytes())
        experts.append(Experts(rows, pair.v.shape[1], pair.v.shape[0], u, v))
    return Update(merged.task, merged.sha256, dtypes.pop(), tuple(experts))


def _check_tensors(rebuild: Rebuild, target: Release) -> None:
    """Exactly the parameters that the updates name may differ from the base, and have to lie where the base has them."""
    old, new, named = rebuild.base.manifest.tensors, target.manifest.tensors, set(rebuild.changed)
    for name in sorted(old.keys() | new.keys()):
        if name in old and name in new:
            before, after = old[name], new[name]
            same_layout = before.file == after.file and before.spec(name) == after.spec(name)
            if same_layout and (name in named or before.sha256 == after.sha256):
                continue
        raise CheckFailed(
            f"{name} differs between {rebuild.base.path} and {target.path}, but no update changes it",
            "export both again",
        )


def _check_graphs(base: Release, target: Release) -> None:
    """All releases share the base's graphs: a device in overlay mode opens those and no others."""
    old, new = base.manifest.files, target.manifest.files
    for path in sorted(old.keys() | new.keys()):
        if is_graph(path) and old.get(path) != new.get(path):
            raise CheckFailed(
                f"{path} differs between {base.path} and {target.path}",
                "a new graph needs a new base: export a new run",
            )


def _file(payload: _Payload, rebuild: Rebuild, target: Release, path: str) -> File:
    """One file of the target, as cheaply as it can be said: the base's, the base's with merged tensors, or parts."""
    source, old_files = target.path / path, rebuild.base.manifest.files
    digest = target.manifest_sha256 if path == MANIFEST else target.manifest.files[path].sha256
    if path in old_files and (path in rebuild.base.manifest.weights or digest == old_files[path].sha256):
        _check_digest(source, sha256_file(source), digest)
        derived = hashlib.sha256()
        for chunk in rebuild.chunks(path):
            derived.update(chunk)
        if derived.hexdigest() != digest:
            raise CheckFailed(f"{source} is not base + factors", "export the release again")
        return File(path, source.stat().st_size, digest)
    new = source.read_bytes()
    _check_digest(source, sha256_bytes(new), digest)
    old = (rebuild.base.path / path).read_bytes() if path in old_files or path == MANIFEST else b""
    return File(path, len(new), digest, tuple(_parts(payload, old, new)))


def _check_digest(source: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CheckFailed(f"{source} is corrupted: SHA-256 {found}, expected {expected}", "export the release again")


def _parts(payload: _Payload, old: bytes, new: bytes) -> Iterator[Part]:
    """How a device writes `new` from pieces of `old`; the rest is added to the payload."""
    for kind, start, stop in differences(old, new):
        if kind == "base":
            yield Part("base", start, stop - start)
        else:
            payload.align()
            yield Part("payload", payload.add(new[start:stop]), stop - start)
