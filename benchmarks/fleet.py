"""A fleet on one machine: many devices, each a process with the kit, against one server of static files.

    python benchmarks/fleet.py [--devices 500] [--together 8] [--json FILE]

Every device runs the program of docs/fleet.md with a store and an identity of its own, first at 10 percent and then at 100.
One in fifty has a base that somebody damaged, and has to fail and say so. Counted are requests and bytes by what they are
for, reports by exit code, and how many devices have the release bit for bit; seconds are the processors' of all devices.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, AnyStr, ClassVar, TypedDict

if TYPE_CHECKING:
    from _typeshed import SupportsRead, SupportsWrite

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from device import fleet  # noqa: E402

from r1export.device import provision  # noqa: E402
from r1export.device.kit import device_kit  # noqa: E402
from r1export.update.atomic_io import sha256_file, write_json  # noqa: E402
from r1export.update.envelope import SecretKey  # noqa: E402
from r1export.update.lab.publish import Step, Terms, make_bundle  # noqa: E402

SEQ, DAMAGED = 3, 50  # one device of so many is damaged
URL = "https://models.example/camera/v1"


class Stage(TypedDict):
    """What one percentage of a rollout cost: `seconds` of the processors for a device, `requests` as (count, bytes) by file."""

    percent: int
    devices: int
    updated: int
    seconds: float
    requests: dict[str, tuple[int, int]]


class Origin(http.server.SimpleHTTPRequestHandler):
    """Static files, and a count of requests and bytes by kind."""

    requests: ClassVar[Counter[str]] = Counter()
    nbytes: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def copyfile(self, source: SupportsRead[AnyStr], outputfile: SupportsWrite[AnyStr]) -> None:
        kind = re.sub(r".*\.r1u$", "update", self.path.lstrip("/"))
        data = source.read()
        outputfile.write(data)
        with self.lock:
            self.requests[kind] += 1
            self.nbytes[kind] += len(data)


def program(kit: Path, address: str) -> str:
    """The device's program of docs/fleet.md, with the paths of this machine."""
    blocks: list[str] = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8"), re.S
    )
    (code,) = (block for block in blocks if URL in block)
    changes = {URL: address, '"r1device.pyz"': repr(str(kit)), '"/data/model"': "sys.argv[1]"}
    changes['Path("/etc/machine-id").read_text().strip()'] = "Path(sys.argv[1]).name"
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def publish(folder: Path, percent: float) -> None:
    channel = {"seq": SEQ, "percent": percent, "updates": [{"since": 0, "path": f"{SEQ}-since-0.r1u"}]}
    write_json(folder / "channel.json", channel)


def make_fleet(work: Path, devices: int) -> tuple[Path, list[Path]]:
    """What the server offers, and a store for each device."""
    run, key, origin = fleet.make_run(work / "run"), SecretKey(bytes(range(32))), work / "origin"
    (work / "key.pub").write_text(key.public.to_pem())
    base = next((run / "releases").glob("00-*"))
    model = provision.init(work / "store", base, [work / "key.pub"], health="none").path
    (origin / "reports" / str(SEQ)).mkdir(parents=True)
    for code in (0, 1, 2, 3, 4, 70):
        (origin / "reports" / str(SEQ) / str(code)).touch()
    bundle = make_bundle(run, Step(SEQ), [key], Terms(created=1_800_000_000))
    (origin / f"{SEQ}-since-0.r1u").write_bytes(bundle.to_bytes())
    stores = []
    for number in range(devices):
        stores.append(Path(shutil.copytree(model, work / "devices" / f"device-{number:06d}", symlinks=True)))
        if number % DAMAGED == DAMAGED - 1:
            weights = stores[-1] / "base" / "visual.safetensors"
            weights.chmod(0o644)
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    return origin, stores


def stage(code: str, stores: list[Path], together: int) -> float:
    """Let every device run once; returns the seconds that all of them took of the processors."""
    before = sum(os.times()[2:4])

    def one(store: Path) -> int:
        return subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True).returncode

    with ThreadPoolExecutor(together) as pool:
        crashed = sum(pool.map(one, stores))
    if crashed:
        raise SystemExit(f"{crashed} devices ended with a traceback")
    return sum(os.times()[2:4]) - before


def updated(stores: list[Path], release: dict[str, str]) -> int:
    """Devices that have the release, bit for bit."""
    return sum(
        all(
            (store / "current" / path).is_file() and sha256_file(store / "current" / path) == sha256
            for path, sha256 in release.items()
        )
        for store in stores
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--together", type=int, default=8, help="processes at a time")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    results: list[Stage] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        origin, stores = make_fleet(work, asked.devices)
        release = fleet.hashes(next((work / "run" / "releases").glob(f"{SEQ:02d}-*")))
        handler = functools.partial(Origin, directory=str(origin))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            code = program(device_kit(work / "r1device.pyz"), f"http://127.0.0.1:{server.server_port}")
            print(
                "| percent | devices with the release | processor seconds a device | requests and bytes by file |\n|---|---|---|---|"
            )
            for percent in (10, 100):
                publish(origin, percent)
                Origin.requests.clear()
                Origin.nbytes.clear()
                seconds = stage(code, stores, asked.together) / len(stores)
                done = updated(stores, release)
                counts = {kind: (n, Origin.nbytes[kind]) for kind, n in sorted(Origin.requests.items())}
                results.append(
                    {
                        "percent": percent,
                        "devices": len(stores),
                        "updated": done,
                        "seconds": round(seconds, 3),
                        "requests": counts,
                    }
                )
                print(f"| {percent} | {done} of {len(stores)} | {seconds:.2f} | {json.dumps(counts)} |", flush=True)
            server.shutdown()
    if asked.json:
        write_json(asked.json, results)


if __name__ == "__main__":
    main()
