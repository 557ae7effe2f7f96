"""Signatures that the OpenSSF library verifies, and bills of materials that CycloneDX's library accepts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from layout.conftest import PYTHON
from running import RECIPE, r1export, trained_run

from r1export.attest.bill_of_materials import bill_of_materials
from r1export.update.release_manifest import Release

VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(str(error) if error else 0)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("attest"), RECIPE)


@pytest.fixture
def release(run, tmp_path) -> Path:
    return Path(shutil.copytree(run / "releases/01-digits", tmp_path / "01-digits"))


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    """A P-256 key pair: model.key and model.pub."""
    folder, secret = tmp_path_factory.mktemp("key"), ec.generate_private_key(ec.SECP256R1())
    return write_key(folder / "model.key", secret)


def write_key(path: Path, secret) -> Path:
    plain = serialization.NoEncryption()
    path.write_bytes(secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public = secret.public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_suffix(".pub").write_bytes(public.public_bytes(serialization.Encoding.PEM, form))
    return path


def by_library(*arguments: object) -> subprocess.CompletedProcess[str]:
    if not PYTHON.exists():
        pytest.skip("no model-signing, no cyclonedx: python scripts/layout_clients.py")
    return subprocess.run([str(PYTHON), *map(str, arguments)], capture_output=True, text=True, timeout=120)


def verified(release: Path, key: Path, signature: Path) -> subprocess.CompletedProcess[str]:
    options = ("--signature", signature, "--public_key", key.with_suffix(".pub"))
    return by_library("-m", "model_signing", "verify", "key", *options, release)


@pytest.mark.parametrize("inside", [False, True])
def test_the_library_verifies_the_signature_of_a_release(release, key, tmp_path, inside) -> None:
    out = release if inside else tmp_path / "attested"
    done = r1export("attest", release, "--key", key, "--out", out)
    assert done.returncode == 0, done.output
    assert verified(release, key, out / "model.sig").returncode == 0


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_a_release_that_changed_is_not_verified(release, key, tmp_path, change) -> None:
    assert r1export("attest", release, "--key", key, "--out", tmp_path / "out").returncode == 0
    path = release / "preprocess.json"
    if change == "edited":
        path.write_bytes(path.read_bytes() + b" ")
    elif change == "added":
        (release / "more.bin").write_bytes(b"more")
    else:
        path.unlink()
    assert verified(release, key, tmp_path / "out/model.sig").returncode == 1


def test_the_signature_of_another_key_is_not_verified(release, key, tmp_path) -> None:
    other = write_key(tmp_path / "other.key", ec.generate_private_key(ec.SECP256R1()))
    assert r1export("attest", release, "--key", other, "--out", tmp_path / "out").returncode == 0
    assert verified(release, key, tmp_path / "out/model.sig").returncode == 1


def test_the_library_accepts_the_bill_of_materials(release, tmp_path) -> None:
    assert r1export("attest", release, "--out", tmp_path / "out").returncode == 0
    done = by_library("-c", VALIDATE, tmp_path / "out/mlbom.cdx.json")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out/model.sig").exists()


def test_the_bill_of_materials_lists_every_file_and_what_was_measured(release) -> None:
    document = json.loads(bill_of_materials(Release.read(release)))
    manifest = json.loads((release / "manifest.json").read_text())
    hashes = {part["name"]: part["hashes"][0]["content"] for part in document["components"] if part["type"] == "file"}
    assert hashes == {path: entry["sha256"] for path, entry in manifest["files"].items()}
    metrics = document["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [(m["slice"], float(m["value"])) for m in metrics] == [
        (task["name"], pytest.approx(task["accuracy"], abs=1e-4)) for task in manifest["tasks"]
    ]


def test_an_ed25519_key_is_refused_with_what_to_do(release, tmp_path) -> None:
    wrong = write_key(tmp_path / "field.key", ed25519.Ed25519PrivateKey.generate())
    done = r1export("attest", release, "--key", wrong, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "not a P-256 key" in done.stderr
    assert "openssl ecparam" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_release_with_a_link_is_not_signed(release, key, tmp_path) -> None:
    (release / "link").symlink_to("preprocess.json")
    done = r1export("attest", release, "--key", key, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "is a link" in done.stderr
    assert not (tmp_path / "out/model.sig").exists()
