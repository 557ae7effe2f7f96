"""What others wrote: names, files and text that a device meets, through the real command line with its exit code."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from device import fleet
from device.steps import in_this_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1export.device import __main__ as command_line
from r1export.device import install, provision, worker
from r1export.device.health import CEILING, check_health, limits_of
from r1export.device.version import open_version
from r1export.errors import CheckFailed, InputError, R1ExportError
from r1export.update.atomic_io import sha256_file
from r1export.update.bundle import assemble, split
from r1export.update.container import read_tensors, write_tensors
from r1export.update.envelope import sign
from r1export.update.manifest import Health
from r1export.update.release_manifest import MANIFEST, FileEntry, GoldenGate, Release

PASSED, FAILED, BAD_INPUT, ENVIRONMENT, INCONCLUSIVE = range(5)
ORDINARY = {PASSED, FAILED, BAD_INPUT, ENVIRONMENT, INCONCLUSIVE}


def r1device(*arguments, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "r1export.device", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def base(lab, tmp_path) -> Path:
    """A copy of the base release, to be changed."""
    return Path(shutil.copytree(lab.release(0), tmp_path / "base"))


def reseal(base: Path, **members) -> None:
    """Make the digests in a changed release fit again, as a faulty or malicious pipeline would."""
    document = json.loads((base / MANIFEST).read_text())
    for path, entry in document["files"].items():
        with suppress(OSError, ValueError):
            data = (base / path).read_bytes()
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (base / MANIFEST).write_text(json.dumps(document | members))


def list_file(base: Path, name: str, data: bytes) -> None:
    """Put a file of any name into the manifest."""
    document = json.loads((base / MANIFEST).read_text())
    document["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (base / MANIFEST).write_text(json.dumps(document))


# --- names that lead out of their folder


@pytest.mark.parametrize(
    "name", ["a\n/../../x", "a\n/../../../x", "../x", "/tmp/x", "link/x", "link", "a\n/..", "\ud800"]
)
def test_a_base_cannot_make_init_write_or_read_outside_its_folder(lab, base, tmp_path, name):
    (base / "a\n").mkdir()
    (base / "link").symlink_to(tmp_path)
    for folder in (tmp_path, base):
        (folder / "x").write_bytes(b"secret")
    list_file(base, name, b"secret")
    before = listing(tmp_path)
    process = r1device("init", tmp_path / "store", "--base", base, "--trust", lab.public, "--health", "none")
    assert (process.returncode, process.stderr.count("\n")) == (BAD_INPUT, 1)
    assert listing(tmp_path) == before


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from("./ab\n\0-\\~"), min_size=1, max_size=12))
def test_whatever_a_file_of_the_base_is_called_nothing_outside_the_store_appears(lab, tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    base = Path(shutil.copytree(lab.release(0), folder / "base"))
    for path in (base / name, base / "a"):  # where a careless copy would read from
        with suppress(OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if str(path.resolve()).startswith(str(folder)) and not path.exists():
                path.write_bytes(b"secret")
    list_file(base, name, b"secret")
    before = listing(folder)
    with suppress(R1ExportError, OSError):
        provision.init(folder / "store", base, [lab.public], health="none")
    assert {path for path in listing(folder) - before if path != "store" and not path.startswith("store/")} == set()
    assert {path.name for path in (folder / "store").glob("*")} <= {
        "base", "slots", "factors", "trust", "store.json", "state.json", "current",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a\n/../../x", "../x", "link/x"])
def test_the_copy_stays_in_its_folder_even_if_the_grammar_of_names_fails(lab, base, tmp_path, name):
    """The second line of defence: a manifest that holds such a name has got past the first."""
    (base / "a\n").mkdir()
    (base / "link").symlink_to(tmp_path)
    (tmp_path / "x").write_bytes(b"secret")
    release, entry = Release.read(base), FileEntry(hashlib.sha256(b"secret").hexdigest(), 6)
    hostile = dataclasses.replace(release, manifest=dataclasses.replace(release.manifest, files={name: entry}))
    with pytest.raises(InputError, match="leads out of"):
        provision._copy(hostile, tmp_path / "store" / "base")
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_version_is_not_read_over_a_link(lab, slot_device, tmp_path):
    slot_device.apply(lab.bundle(1, 0))
    classes = slot_device.path / "slots" / slot_device.store.current / "classes"
    shutil.move(classes, tmp_path / "elsewhere")
    classes.symlink_to(tmp_path / "elsewhere")
    process = r1device("doctor", slot_device.path)
    assert process.returncode == FAILED
    assert "over a link" in process.stdout
    with pytest.raises(InputError, match="over a link"):
        open_version(slot_device.path).read("classes/digits.json")


# --- checked, then read a second time


@pytest.mark.parametrize("name", ["preprocess.json", "visual.safetensors", MANIFEST])
def test_init_writes_what_it_hashed(lab, base, tmp_path, monkeypatch, name):
    """A file that changes between a check and the copy: the bytes that arrive in the store are those that were hashed."""
    original = provision.read_chunks

    def changed(path):
        return (chunk.replace(b"8", b"9") if path.name == name else chunk for chunk in original(path))

    monkeypatch.setattr(provision, "read_chunks", changed)
    with pytest.raises(CheckFailed, match=rf"{name} is damaged"):
        provision.init(tmp_path / "store", base, [lab.public], health="none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_init_believes_the_manifest_that_it_was_told_of(lab, base, tmp_path):
    store, options = tmp_path / "store", ["--base", base, "--trust", lab.public, "--health", "none", "--base-sha256"]
    for digest, code in (("0" * 64, FAILED), ("zero", BAD_INPUT), (sha256_file(base / MANIFEST).upper(), BAD_INPUT)):
        assert r1device("init", store, *options, digest).returncode == code
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert r1device("init", store, *options, sha256_file(base / MANIFEST)).returncode == PASSED


def zeroed(base: Path) -> None:
    tensors = read_tensors(base / "visual.safetensors")
    tensors["visual.head.weight"] = np.zeros_like(tensors["visual.head.weight"])
    write_tensors(base / "visual.safetensors", tensors)


def scalars(base: Path) -> None:
    write_tensors(base / "golden.safetensors", {"pixel_values": np.array(1.0), "image_embeds": np.array(1.0)})


@pytest.mark.parametrize(
    ("damage", "members", "message"),
    [
        (lambda base: (base / "visual.onnx").write_bytes(b"garbage"), {}, "visual.onnx does not run"),
        (lambda base: (base / "visual.onnx").write_bytes(b""), {}, "visual.onnx does not run"),
        (zeroed, {"golden": {"max_abs": 10, "min_cosine": -1}}, "max. difference|lowest cosine|not finite"),
        (lambda base: write_tensors(base / "golden.safetensors", {}), {}, "no golden inputs"),
        (scalars, {}, "visual.onnx does not run"),
        (lambda base: (base / "golden.safetensors").write_bytes(b"rot"), {}, "invalid safetensors file"),
    ],
)  # fmt: skip
def test_a_base_that_does_not_give_its_golden_outputs_is_not_installed(lab, base, tmp_path, damage, members, message):
    damage(base)
    reseal(base, **members)
    process = r1device("init", tmp_path / "store", "--base", base, "--trust", lab.public)
    assert process.returncode == (BAD_INPUT if "safetensors" in message else FAILED)
    assert re.match(rf"Error: the base release fails the health check: .*({message})", process.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_no_version_asks_for_less_than_the_coarsest_precision(lab, slot_device):
    slot_device.apply(lab.bundle(1, 0))
    base, version = open_version(slot_device.path, "base"), open_version(slot_device.path)
    manifest = dataclasses.replace(base.base.manifest, golden=GoldenGate(10, -1))
    lax = dataclasses.replace(base, base=dataclasses.replace(base.base, manifest=manifest))
    assert limits_of(lax) == CEILING
    signed = dataclasses.replace(version.bundle.manifest, health=Health(10, -1, 0.5))
    lax = dataclasses.replace(version, bundle=dataclasses.replace(version.bundle, manifest=signed))
    assert limits_of(lax) == Health(CEILING.max_abs, CEILING.min_cosine, 0.5)
    assert limits_of(version) == version.bundle.manifest.health


def test_a_health_command_is_not_run_where_the_store_is_made(lab, base, tmp_path):
    options = ["--base", base, "--trust", lab.public, "--health", "false"]
    assert r1device("init", tmp_path / "store", *options).returncode == PASSED


# --- bytes that are not what they should be: an ordinary exit code, one line, no traceback


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line in this process, its steps too: what escapes from them is seen."""
    for function in (install.apply, install.rollback, provision.init):
        monkeypatch.setitem(function.__kwdefaults__, "run", in_this_process)

    def run(*arguments):
        code = command_line.main([*map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def flipped(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


def other_member(data: bytes, rng: random.Random) -> bytes:
    """JSON with one member, at any depth, that is something else or missing."""
    try:
        document = json.loads(data)
    except ValueError:
        return flipped(data, rng)
    places = []

    def walk(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(document)
    parent, key = rng.choice(places)
    values = [
        None,
        True,
        -1,
        0.5,
        2**53,
        10**400,
        "",
        "\ud800",
        "\x1b[2J",
        "a\n/../x",
        [],
        {},
        [[]] * 40,
        "0" * 64,
        "x" * 2000,
    ]
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(values)
    return json.dumps(document).encode()


def other_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another member in its header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data):
        return flipped(data, rng)
    header = other_member(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_file(path: Path, rng: random.Random, kinds: list[str]) -> None:
    """Replace a file by something else."""
    data, kind = path.read_bytes(), rng.choice(kinds)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(rng.choice([path.name, "/dev/zero", "/etc/passwd", "/nowhere", "."]))
    elif kind != "missing":
        make = {
            "flipped": flipped,
            "short": lambda data, rng: data[: rng.randrange(len(data) + 1)],
            "empty": lambda data, rng: b"",
            "long": lambda data, rng: data + b"\0" * 9,
            "nested": lambda data, rng: b"[" * 50_000,
            "length": lambda data, rng: rng.choice([2**63, 2**40, 10**8, 0]).to_bytes(8, "little") + data[8:],
            "member": other_member,
            "header": other_header,
        }[kind]
        path.write_bytes(make(data, rng))


CONTENT = ["flipped", "short", "empty", "long", "nested", "length", "member", "member", "header", "header"]
KINDS = [*CONTENT, "folder", "pipe", "link", "missing"]
bounded = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def expect_ordinary(run, *arguments) -> int:
    code, out, err = run(*arguments)
    assert code in ORDINARY, (arguments, out, err)
    assert code == PASSED or out or err.splitlines()[-1].startswith("Error: "), err  # onnxruntime may say more before
    return code


@bounded
@given(st.integers(0, 2**32))
def test_init_ends_with_an_ordinary_code_whatever_the_base_is(lab, run, tmp_path_factory, seed):
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("init")
    base = Path(shutil.copytree(lab.release(0), folder / "base"))
    victim = rng.choice(sorted(path for path in base.rglob("*") if path.is_file()))
    if rng.random() < 0.5:
        victim = base / rng.choice([MANIFEST, "golden.safetensors"])
    damage_file(victim, rng, KINDS)
    if rng.random() < 0.7 and victim.name != MANIFEST and victim.is_file() and victim.resolve() == victim:
        reseal(base)
    code = expect_ordinary(run, "init", folder / "store", "--base", base, "--trust", lab.public)
    assert (folder / "store").exists() == (code == PASSED)
    assert {path.name for path in folder.iterdir()} <= {"base", "store"}
    shutil.rmtree(folder)


@bounded
@given(st.integers(0, 2**32))
def test_a_damaged_store_ends_every_verb_with_an_ordinary_code(lab, run, new_devices, tmp_path_factory, seed):
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("store")
    store = Path(shutil.copytree(new_devices[rng.choice(["slot", "overlay"])], folder / "store", symlinks=True))
    for number in (1, 2):
        assert expect_ordinary(run, "apply", store, lab.bundle(number, number - 1)) == PASSED
    files = sorted(path for path in store.rglob("*") if path.is_file() and "current" not in path.parts)
    victim = rng.choice(files)
    damage_file(victim, rng, KINDS)
    for arguments in (["status", store], ["doctor", store], ["rollback", store], ["apply", store, lab.bundle(3, 2)]):
        expect_ordinary(run, *arguments)
    with suppress(R1ExportError, OSError):
        check_health(version := open_version(store), limits_of(version))
    shutil.rmtree(folder)


@bounded
@given(st.integers(0, 2**32), st.booleans())
def test_any_update_ends_with_an_ordinary_code(lab, run, new_devices, tmp_path_factory, seed, signed):
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("update")
    store = Path(shutil.copytree(new_devices["overlay"], folder / "store", symlinks=True))
    update = folder / "update.r1u"
    shutil.copy(lab.bundle(1, 0), update)
    if signed:
        _, manifest, payload = split(update.read_bytes())
        manifest = other_member(manifest, rng)
        payload = bytes(payload) if rng.random() < 0.7 else flipped(bytes(payload), rng)
        update.write_bytes(assemble(sign(manifest, [lab.key]), manifest, payload))
    else:
        damage_file(update, rng, KINDS)
    expect_ordinary(run, "inspect", update)
    expect_ordinary(run, "apply", store, update)
    shutil.rmtree(folder)


def test_what_is_no_file_is_said_in_one_line(lab, base, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (base / "classes.txt").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "loop", base, "/dev/zero"):
        for arguments in (
            ["inspect", path],
            ["init", tmp_path / "store", "--base", base, "--trust", path, "--health", "none"],
            ["init", tmp_path / "store", "--base", path, "--trust", lab.public] if path != base else ["status", base],
        ):
            process = r1device(*arguments)
            assert (process.returncode, process.stderr.count("\n")) == (BAD_INPUT, 1), process.stderr
    (base / "visual.onnx").unlink()
    os.mkfifo(base / "visual.onnx")
    assert r1device("init", tmp_path / "store", "--base", base, "--trust", lab.public).returncode == BAD_INPUT


@pytest.mark.parametrize(
    "arguments",
    [
        ["--product", "two\nlines"],
        ["--product", b"\xff"],
        ["--device-class", ""],
        ["--keep", "1001"],
        ["--health", "x" * 1001],
        ["--health", "check\x1b[2J"],
        ["--keep", "1" * 30],
        ["--max-seq-jump", "0"],
        ["--min-seq", str(2**53)],
        ["--min-seq", "-1"],
    ],
)
def test_what_a_store_could_not_be_read_with_again_is_refused(lab, base, tmp_path, arguments):
    process = r1device("init", tmp_path / "store", "--base", base, "--trust", lab.public, *(
        argument if isinstance(argument, str) else os.fsdecode(argument) for argument in arguments
    ))  # fmt: skip
    assert (process.returncode, process.stderr.count("\n")) == (BAD_INPUT, 1), process.stderr
    assert not (tmp_path / "store").exists()


def test_a_defect_of_the_kit_is_one_line_that_asks_for_a_report(lab, slot_device, run, monkeypatch):
    def defect(*arguments, **options):
        raise TypeError("not thought of\x1b[2J")

    monkeypatch.setattr(command_line.doctor, "status", defect)
    code, out, err = run("status", slot_device.path)
    assert (code, out, err.count("\n")) == (70, "", 1)
    assert err.startswith("Error: internal error: TypeError: not thought of\\x1b[2J (please report it")
    code, out, _ = run("status", slot_device.path, "--json")
    assert (code, json.loads(out)["exit_code"]) == (70, 70)
    monkeypatch.setenv("R1EXPORT_TRACEBACK", "1")
    assert "Traceback" in run("status", slot_device.path)[2]


def test_no_memory_is_the_environments_fault(slot_device, run, monkeypatch):
    def too_large(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(command_line.doctor, "status", too_large)
    assert run("status", slot_device.path)[0] == ENVIRONMENT


def test_a_reader_that_leaves_early_is_no_error(lab, slot_device):
    command = f"{sys.executable} -m r1export.device doctor {slot_device.path}; echo $? >&2"
    process = subprocess.run(["sh", "-c", f"({command}) | true"], capture_output=True, text=True)
    assert process.stderr.strip() == "0"


# --- text that others wrote, on a terminal


def test_control_characters_in_foreign_text_do_not_reach_the_terminal(lab, base, tmp_path):
    evil = "\x1b]0;owned\x07\x7f\x9b2J\u202e\u2028\r\nError: all is well"
    (base / "visual.onnx").unlink()
    reseal(base, format=evil)
    name = tmp_path / f"base{evil}"
    base.rename(name)
    store = tmp_path / "store"
    for arguments in (
        ["init", store, "--base", name, "--trust", lab.public, "--health", "none"],
        ["inspect", name],
        ["status", tmp_path / evil],
    ):
        for options in ([], ["--json"]):
            process = r1device(*arguments, *options)
            assert process.returncode in (FAILED, BAD_INPUT)
            shown = process.stdout + process.stderr
            assert shown.count("\n") == 1 + len(options)  # with --json a document as well
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", shown)
            assert "owned" in shown
            assert not options or "owned" in json.loads(process.stdout)["error"]["message"]


def test_text_that_the_terminals_encoding_lacks_is_escaped(lab, slot_device):
    process = r1device(
        "status", slot_device.path / "ü\u4e1c", env={**os.environ, "PYTHONIOENCODING": "latin-1"}, errors="replace"
    )
    assert process.returncode == BAD_INPUT
    assert "\\u4e1c" in process.stderr


# --- modes


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_what_a_store_holds_has_its_mode_whatever_the_umask(lab, tmp_path, mask):
    store = tmp_path / "store"
    options = ["--base", lab.release(0), "--trust", lab.public, "--product", "camera", "--device-class", "v1"]
    assert r1device("init", store, *options, umask=mask).returncode == PASSED
    assert r1device("apply", store, lab.bundle(1, 0), umask=mask).returncode == PASSED
    for path in [store, *store.rglob("*")]:
        name, status = path.relative_to(store), path.lstat()
        if stat.S_ISLNK(status.st_mode):
            continue
        expected = (
            0o755 if path.is_dir() else 0o600 if str(name) == "lock" else 0o444 if name.parts[0] == "base" else 0o644
        )
        assert stat.S_IMODE(status.st_mode) == expected, name


def test_the_lock_of_an_older_kit_becomes_private(lab, slot_device):
    (slot_device.path / "lock").touch()
    (slot_device.path / "lock").chmod(0o644)
    slot_device.apply(lab.bundle(1, 0))
    assert stat.S_IMODE((slot_device.path / "lock").stat().st_mode) == 0o600


def test_the_health_check_in_a_fresh_process_takes_the_base_too(lab, slot_device):
    with slot_device.store.lock(0) as descriptor:
        worker.run(slot_device.store, descriptor, "health", "base")
    assert fleet.hashes(slot_device.path / "base") == fleet.hashes(lab.release(0))
