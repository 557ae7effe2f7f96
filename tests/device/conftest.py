"""A run in the lab and devices in the field, small and real."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from device import fleet
from device.steps import in_this_process

from r1export.device import install, provision
from r1export.device.store import Store
from r1export.device.version import open_version
from r1export.update.atomic_io import sha256_file
from r1export.update.bundle import Bundle
from r1export.update.envelope import SecretKey
from r1export.update.lab.publish import Step, Terms, make_bundle

CREATED = 1_800_000_000  # seconds since 1970, when all updates of these tests were made


@dataclass
class Lab:
    """Makes updates, each once."""

    folder: Path
    run: Path
    key: SecretKey
    made: dict = field(default_factory=dict)

    @property
    def public(self) -> Path:
        return self.folder / "fleet.pub"

    def release(self, number: int) -> Path:
        return next((self.run / "releases").glob(f"{number:02d}-*"))

    def bundle(self, release: int, since: int = 0, *, keys=None, seq: int = 0, drop=(), **terms) -> Path:
        name = repr((release, since, seq, drop, sorted(terms.items()), keys and [key.public.keyid for key in keys]))
        if name not in self.made:
            path = self.folder / f"update-{len(self.made)}.r1u"
            terms = Terms(**{"product": "camera", "device_class": "v1", "created": CREATED, **terms})
            step = Step(release, since, tuple(drop), seq)
            made = make_bundle(self.run, step, keys or [self.key], terms, fleet.refresh)
            path.write_bytes(made.to_bytes())
            self.made[name] = path
        return self.made[name]

    def read(self, path: Path) -> Bundle:
        return Bundle.parse(path.read_bytes(), [self.key.public])


@dataclass
class Device:
    """One device in the field, driven without a fresh process for each step."""

    path: Path

    def apply(self, bundle: Path, **options) -> install.Outcome:
        return install.apply(self.path, bundle, **{"now": CREATED, "run": in_this_process, **options})

    def rollback(self, to=None, **options) -> install.Outcome:
        return install.rollback(self.path, to, **{"run": in_this_process, **options})

    @property
    def store(self) -> Store:
        return Store.open(self.path)

    def files(self) -> dict[str, str]:
        """SHA-256 of every file of the current version, as an application reads them."""
        import hashlib

        version = open_version(self.path)
        return {path: hashlib.sha256(version.read(path)).hexdigest() for path in version.paths}

    def everything(self) -> dict[str, str]:
        """Every file, link and folder of the store with its content, but the lock."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = str(path.relative_to(self.path))
            found[name] = (
                str(path.readlink()) if path.is_symlink() else sha256_file(path) if path.is_file() else "folder"
            )
        found.pop("lock", None)
        return found

    def facts(self) -> dict[str, str]:
        """`everything` but the record of tries, which a failed update may write."""
        return {name: value for name, value in self.everything().items() if name != "state.json"} | {
            "seq": str(self.store.state().seq)
        }


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    key = SecretKey(bytes(range(32)))
    (folder / "fleet.pub").write_text(key.public.to_pem())
    return Lab(folder, fleet.make_run(folder / "run"), key)


@pytest.fixture(scope="session")
def half_lab(tmp_path_factory) -> Lab:
    """The same in float16: weights and factors."""
    return other_lab(tmp_path_factory, "fp16", "float16")


@pytest.fixture(scope="session")
def int8_lab(tmp_path_factory) -> Lab:
    """The same with weights in int8 and factors in float32."""
    return other_lab(tmp_path_factory, "int8", "float32")


def other_lab(tmp_path_factory, precision, factors) -> Lab:
    folder = tmp_path_factory.mktemp(precision)
    key = SecretKey(bytes(range(32)))
    (folder / "fleet.pub").write_text(key.public.to_pem())
    return Lab(folder, fleet.make_run(folder / "run", precision, factors), key)


@pytest.fixture(scope="session")
def new_devices(lab, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("factory")
    for mode in ("slot", "overlay"):
        provision.init(
            folder / mode, lab.release(0), [lab.public], product="camera", device_class="v1", mode=mode, health="none"
        )
    return {mode: folder / mode for mode in ("slot", "overlay")}


@pytest.fixture(params=["slot", "overlay"])
def device(request, new_devices, tmp_path) -> Device:
    """A new device, once in each mode."""
    shutil.copytree(new_devices[request.param], tmp_path / "store", symlinks=True)
    return Device(tmp_path / "store")


@pytest.fixture
def slot_device(new_devices, tmp_path) -> Device:
    shutil.copytree(new_devices["slot"], tmp_path / "store", symlinks=True)
    return Device(tmp_path / "store")
