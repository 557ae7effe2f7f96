"""Makes known-answer vectors: `python tests/bundles/make.py tests/bundles/v1 fp32`, or `... v1-int8 int8`.

Run it for a new format only. What is in a folder here was released once and has to be read for ever.
The updates are signed with a key that everybody knows: the 32 bytes 00 01 .. 1f.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from r1export.device.arithmetic import KNOWN_ANSWERS
from r1export.update.bundle import Bundle, assemble
from r1export.update.envelope import SecretKey, sign
from r1export.update.lab.publish import Step, Terms, make_bundle

KEY, STRANGER = SecretKey(bytes(range(32))), SecretKey(b"\x09" * 32)
TERMS = Terms(1_800_000_000, "camera", "v1")


def main(out: Path, precision: str) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    from device import fleet

    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        run = fleet.make_run(Path(folder) / "run", precision)
        releases = sorted((run / "releases").iterdir())
        shutil.copytree(releases[0], out / "base", ignore=shutil.ignore_patterns("README.md"))
        (out / "key.pub").write_text(KEY.public.to_pem())
        accepted = [
            ("1-digits.r1u", 1, 0, 0),
            ("2-shapes-since-1.r1u", 2, 1, 0),
            ("3-colours-since-2.r1u", 3, 2, 0),
            ("4-back-to-1.r1u", 1, 3, 4),
        ]
        steps = []
        for name, release, since, seq in accepted:
            bundle = make_bundle(run, Step(release, since, seq=seq), [KEY], TERMS)
            (out / name).write_bytes(bundle.to_bytes())
            steps.append(
                {"update": name, "exit_code": 0, "slot": bundle.slot, "files": fleet.hashes(releases[release])}
            )
        refused = list(refusals(run, out))
    expected = {
        "product": TERMS.product,
        "device_class": TERMS.device_class,
        "accepted": steps,
        "refused_at_1": refused,
    }
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    (out / "arithmetic.json").write_text(json.dumps(arithmetic(), indent=1) + "\n")


def refusals(run: Path, out: Path):
    """(file, exit code, why) of updates that a device at version 1 has to refuse."""
    good = Bundle.parse((out / "2-shapes-since-1.r1u").read_bytes(), [KEY.public])
    third = Bundle.parse((out / "3-colours-since-2.r1u").read_bytes(), [KEY.public])
    text = good.manifest_bytes

    def signed(manifest: bytes, payload=good.payload, key=KEY) -> bytes:
        return assemble(sign(manifest, [key]), manifest, payload)

    def changed(**members) -> bytes:
        return signed(dataclasses.replace(good.manifest, **members).to_bytes())

    data = good.to_bytes()
    swapped = dataclasses.replace(good.manifest, updates=tuple(reversed(good.manifest.updates)))
    cases = {
        "no-bundle": (2, "another first byte", b"\0" + data[1:]),
        "truncated": (1, "the last byte is missing", data[:-1]),
        "appended": (1, "one byte more", data + b"\0"),
        "padding": (2, "a byte between manifest and payload is not zero", nonzero_padding(data, len(good.payload))),
        "stranger": (1, "signed with another key", signed(text, key=STRANGER)),
        "spliced": (1, "the payload of another update", assemble(good.envelope, text, third.payload)),
        "product": (1, "for another product", changed(product="toaster")),
        "class": (1, "for another class of device", changed(device_class="v2")),
        "base": (1, "for another base", changed(base=dataclasses.replace(good.manifest.base, sha256="0" * 64))),
        "expired": (1, "expired in 2020", changed(created=1_500_000_000, expires=1_600_000_000)),
        "lacking": (1, "needs factors that the device has not", third.to_bytes()),
        "swapped": (1, "the experts in another order: one bit differs", signed(swapped.to_bytes())),
        "result": (
            1,
            "a wrong digest of a result",
            changed(tensors={**good.manifest.tensors, "visual.head.weight": "0" * 64}, files=wrong(good)),
        ),
        "traversal": (2, "a path with ..", signed(text.replace(b'"preprocess.json"', b'"../process.json"'))),
        "duplicate": (2, "a member twice", signed(text.replace(b'"seq":2', b'"seq":2,"seq":3'))),
        "float": (2, "2.0 for 2", signed(text.replace(b'"seq":2', b'"seq":2.0'))),
        "unknown": (2, "a member that nobody knows", signed(text.replace(b'"seq":2', b'"seq":2,"critical":1'))),
        "newer": (3, "for a newer updater", signed(text.replace(b'"min_updater":1', b'"min_updater":2'))),
        "gap": (
            2,
            "a gap in the payload",
            signed(
                text.replace(
                    b'"payload":{"bytes":%d' % len(good.payload), b'"payload":{"bytes":%d' % (len(good.payload) + 8)
                )
            ),
        ),
    }
    if good.manifest.algorithm.endswith("+q8"):
        del cases["swapped"]  # one bit of a float32 does not outlive the rounding to int8
    (out / "refused").mkdir()
    for name, (code, why, content) in cases.items():
        (out / "refused" / f"{name}.r1u").write_bytes(content)
        yield {"update": f"refused/{name}.r1u", "exit_code": code, "why": why}


def wrong(bundle: Bundle):
    return tuple(
        dataclasses.replace(file, sha256="0" * 64) if file.path == "visual.safetensors" else file
        for file in bundle.manifest.files
    )


def nonzero_padding(data: bytes, payload: int) -> bytes:
    changed = bytearray(data)
    assert changed[len(data) - payload - 1] == 0
    changed[len(data) - payload - 1] = 1
    return bytes(changed)


def arithmetic() -> list[dict]:
    """The merge's known answers as bit patterns: weight, products (u, v) in order, result."""
    cases = []
    for dtype, weight, products, result in KNOWN_ANSWERS:
        bits = {"type": {"f4": "F32", "f2": "F16"}[dtype], "weight": _hex(weight, dtype), "result": _hex(result, dtype)}
        cases.append({**bits, "products": [[_hex(u, "f4"), _hex(v, "f4")] for u, v in products]})
    return cases


def _hex(value: float, dtype: str) -> str:
    return np.array(value, f">{dtype}").tobytes().hex()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
