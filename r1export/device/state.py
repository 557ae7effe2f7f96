"""The persistent state of a device: store.json, fixed by `init`, and state.json, whose values never decrease.

Both have a self-digest, so that a flipped bit is detected and never becomes another configuration or history.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from r1export.device.policy import MAX_SEQ_JUMP
from r1export.errors import InputError
from r1export.update.atomic_io import read_regular, write_json
from r1export.update.manifest import Manifest
from r1export.update.strict_json import parse_json

FORMAT = "r1export.store/1"
MODES = ("slot", "overlay")
CONFIG = "store.json"
STATE = "state.json"
MAX_BYTES = 1 << 20  # of either file
_ANY = re.compile(r"(?s).{0,1000}")


@dataclass(frozen=True)
class Config:
    """The configuration of a device, fixed by `init`. `health` is onnxruntime, none, or a command line; `keep` counts slots.

    `min_seq` is the lowest allowed version: a store that replaces another one keeps its limit.
    """

    product: str
    device_class: str
    mode: str
    health: str
    threshold: int
    keep: int
    base_manifest: str
    max_seq_jump: int = MAX_SEQ_JUMP
    min_seq: int = 0


@dataclass(frozen=True)
class State:
    """The highest sequence number with its digest, the lowest allowed one, the latest signed time, and failed tries."""

    seq: int = 0
    digest: str = ""
    min_seq: int = 0
    clock: int = 0
    pending: str = ""
    tries: Mapping[str, int] = field(default_factory=dict)

    def awaits(self, slot: str) -> bool:
        """Whether `slot` is the version of the update that is being installed, or was interrupted."""
        return bool(self.pending) and slot.endswith(f"-{self.pending[:16]}")

    def raised(self, manifest: Manifest, digest: str) -> State:
        """This state after `manifest` was installed. Values never decrease."""
        newer = manifest.seq > self.seq
        return replace(
            self,
            seq=max(self.seq, manifest.seq),
            digest=digest if newer else self.digest,
            min_seq=max(self.min_seq, manifest.min_seq),
            clock=max(self.clock, manifest.created),
        )


def write_config(path: Path, config: Config) -> None:
    """Write store.json with a self-digest: a flipped bit could lower the signature threshold."""
    body = {"format": FORMAT, **asdict(config)}
    write_json(path, {**body, "sha256": _digest(body)})


def read_config(path: Path) -> Config:
    """Read store.json, also without the digest or newer members. Raises InputError if it is missing or corrupted."""
    try:
        fields = parse_json(read_regular(path, MAX_BYTES), str(path), MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent} is not a store: it has no {CONFIG}", "create one with `init`") from None
    members = set(fields)
    form = fields.text("format", re.compile(re.escape(FORMAT)))
    config = Config(
        product=fields.text("product", _ANY),
        device_class=fields.text("device_class", _ANY),
        mode=fields.text("mode", re.compile("|".join(MODES))),
        health=fields.text("health", _ANY),
        threshold=fields.integer("threshold", 1),
        keep=fields.integer("keep", 1),
        base_manifest=fields.digest("base_manifest"),
        max_seq_jump=fields.integer("max_seq_jump", 1) if "max_seq_jump" in fields else MAX_SEQ_JUMP,
        min_seq=fields.integer("min_seq") if "min_seq" in fields else 0,
    )
    body = {name: value for name, value in {"format": form, **asdict(config)}.items() if name in members}
    if "sha256" in fields and fields.digest("sha256") != _digest(body):
        raise InputError(f"{path} is damaged", "create a new store with `init` from the base release")
    fields.done()  # a flipped bit in the key of the digest must not make it look like an old file
    return config


def read_state(path: Path) -> State:
    """Read state.json. Raises InputError if it is missing or damaged."""
    try:
        fields = parse_json(read_regular(path, MAX_BYTES), str(path), MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path} is missing", "the next update recreates it") from None
    digest, body = fields.digest("sha256"), fields.object("state")
    tries = body.object("tries")
    state = State(
        seq=body.integer("seq"),
        digest=body.text("digest", _ANY),
        min_seq=body.integer("min_seq"),
        clock=body.integer("clock"),
        pending=body.text("pending", _ANY),
        tries={name: tries.integer(name) for name in tries},
    )
    if _digest(asdict(state)) != digest:
        raise InputError(f"{path} is damaged", "the next update recreates it")
    return state


def write_state(path: Path, state: State) -> None:
    """Write state.json atomically, and sync it and its folder."""
    body = asdict(state)
    write_json(path, {"state": body, "sha256": _digest(body)})


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
