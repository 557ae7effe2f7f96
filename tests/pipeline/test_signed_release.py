"""`verify RELEASE --bundle UPDATE --trust KEY`: what is wrong with a release whose own digests were made to fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from running import Result, r1export

from r1export.export.model_card import model_card
from r1export.update.release_manifest import ReleaseManifest

Verify = Callable[..., Result]


@pytest.fixture(scope="module")
def updates(verified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates to releases 1 and 2, signed by fleet.key, and the key of a stranger."""
    folder = tmp_path_factory.mktemp("updates")
    assert r1export("keygen", folder / "stranger").returncode == 0
    for number in (1, 2):
        key = ("--key", verified.parent / "fleet.key")
        done = r1export("bundle", verified, "--release", number, *key, "-o", folder / f"{number}.r1u")
        assert done.returncode == 0, done.output
    shutil.copy(verified.parent / "fleet.pub", folder)
    return folder


@pytest.fixture
def release(verified: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(verified / "releases/01-digits", tmp_path / "01-digits"))


@pytest.fixture
def verify(updates: Path) -> Verify:
    """Verifies a release against an update, by default the one that was made of it."""

    def run(path: Path, update: str = "1.r1u", keys: tuple[str, ...] = ("fleet.pub",), *options: object) -> Result:
        trust = [part for key in keys for part in ("--trust", updates / key)]
        return r1export("verify", path, "--no-latency", "--json", "--bundle", updates / update, *trust, *options)

    return run


def signature(done: Result) -> dict:
    return json.loads(done.stdout)["contents"]["signature"]


def test_a_release_that_was_signed_passes_and_says_who_signed_it(release: Path, verify: Verify) -> None:
    done = verify(release)
    assert done.returncode == 0, done.output
    found = signature(done)
    assert (found["verdict"], found["looked_at"]) == ("pass", found["of"])
    assert "signed by " in found["detail"]


def test_without_an_update_the_check_does_not_apply(release: Path) -> None:
    done = r1export("verify", release, "--no-latency", "--json")
    assert (done.returncode, signature(done)["verdict"]) == (0, "not_applicable")


def test_a_change_that_the_release_alone_cannot_know_of_is_found(release: Path, verify: Verify) -> None:
    manifest = ReleaseManifest.read(release)
    better = tuple(replace(task, accuracy=0.999) for task in manifest.tasks)
    changed = replace(manifest, tasks=better).sealed()
    changed.write(release)
    (release / "README.md").write_text(model_card(changed))
    assert r1export("verify", release, "--no-latency").returncode == 0
    done = verify(release)
    assert done.returncode == 1, done.output
    assert signature(done)["detail"] == "manifest.json differs from the signed file"


def test_a_file_that_is_missing_or_another_is_found(release: Path, verify: Verify) -> None:
    (release / "classes/arrows.json").unlink()
    (release / "report.md").write_text("Passed")
    done = verify(release)
    assert done.returncode == 1, done.output
    detail = signature(done)["detail"]
    assert "classes/arrows.json is missing" in detail
    assert "report.md differs from the signed file" in detail


def test_reports_may_be_missing_as_on_a_device(release: Path, verify: Verify) -> None:
    for path in release.glob("report.*"):
        path.unlink()
    assert verify(release).returncode == 0


def test_the_update_of_another_release_is_found(release: Path, verify: Verify) -> None:
    done = verify(release, "2.r1u")
    assert (done.returncode, "the update is for 02-arrows, this release is 01-digits" in signature(done)["detail"]) == (
        1,
        True,
    )


def test_keys_that_did_not_sign_are_found(release: Path, verify: Verify) -> None:
    for keys, options in ((("stranger.pub",), ()), (("fleet.pub", "stranger.pub"), ("--threshold", 2))):
        done = verify(release, "1.r1u", keys, *options)
        assert (done.returncode, signature(done)["verdict"]) == (1, "fail"), done.output
    assert verify(release, "1.r1u", ("fleet.pub", "stranger.pub")).returncode == 0


def test_a_payload_that_was_not_signed_is_found(release: Path, verify: Verify, updates: Path) -> None:
    data = bytearray((updates / "1.r1u").read_bytes())
    data[-1] ^= 1
    (updates / "damaged.r1u").write_bytes(data)
    done = verify(release, "damaged.r1u")
    assert (done.returncode, "the payload has SHA-256" in signature(done)["detail"]) == (1, True), done.output


def test_a_version_on_a_device_is_verified_by_its_update(
    verified: Path, verify: Verify, updates: Path, tmp_path: Path
) -> None:
    store, base = tmp_path / "store", verified / "releases/00-base"
    for command in (
        ("init", store, "--base", base, "--trust", updates / "fleet.pub"),
        ("apply", store, updates / "1.r1u"),
    ):
        done = r1export("device", *command)
        assert done.returncode == 0, done.output
    done = verify(store / "current")
    assert done.returncode == 0, done.output


def test_what_is_no_update_or_lacks_its_keys_is_bad_input(
    verified: Path, release: Path, verify: Verify, updates: Path
) -> None:
    (updates / "text.r1u").write_text("no update")
    for update, keys, options, words in (
        ("text.r1u", ("fleet.pub",), (), "not a .r1u file"),
        ("nowhere.r1u", ("fleet.pub",), (), "no such file"),
        ("1.r1u", (), (), "--bundle and --trust must be used together"),
        ("1.r1u", ("fleet.pub", "fleet.pub"), ("--threshold", 2), "2 signatures required from 1 keys"),
    ):
        done = verify(release, update, keys, *options)
        assert (done.returncode, words in done.stderr) == (2, True), done.output
    done = verify(verified)
    assert (done.returncode, "--bundle needs a release" in done.stderr) == (2, True), done.output
    done = r1export("verify", release, "--trust", updates / "fleet.pub")
    assert (done.returncode, "must be used together" in done.stderr) == (2, True), done.output
