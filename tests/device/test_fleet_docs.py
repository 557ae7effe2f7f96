"""The examples in docs/fleet.md and the sizes in docs/bundle-format.md, checked against the program."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from device import fleet

from r1export.device.kit import device_kit
from r1export.update import bundle, envelope, manifest, names

DOCS = Path(__file__).parents[2] / "docs"


def example(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (DOCS / "fleet.md").read_text(), re.S)
    return next(block for block in blocks if containing in block)


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    return device_kit(tmp_path_factory.mktemp("kit") / "r1device.pyz")


def run(script: Path, kit: Path, store: Path, *arguments, **environment):
    text = (
        script.read_text()
        .replace("/usr/lib/r1device.pyz", str(kit))
        .replace("/data/model", str(store))
        .replace("python3", sys.executable)
    )
    script.write_text(text)
    return subprocess.run(
        ["sh", script, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_mender_module_installs_and_rolls_back(lab, slot_device, kit, tmp_path):
    script = tmp_path / "module"
    script.write_text(example("sh", "ArtifactInstall"))
    for folder in ("files", "tmp"):
        (tmp_path / "artifact" / folder).mkdir(parents=True)
    shutil.copy(lab.bundle(1, 0), tmp_path / "artifact" / "files" / "update.r1u")
    assert run(script, kit, slot_device.path, "SupportsRollback", tmp_path / "artifact").stdout == "Yes\n"
    assert run(script, kit, slot_device.path, "ArtifactInstall", tmp_path / "artifact").returncode == 0
    assert slot_device.files() == fleet.hashes(lab.release(1))
    assert run(script, kit, slot_device.path, "ArtifactRollback", tmp_path / "artifact").returncode == 0
    assert slot_device.store.current == "base"
    (tmp_path / "artifact" / "files" / "update.r1u").write_bytes(b"rot")
    assert run(script, kit, slot_device.path, "ArtifactInstall", tmp_path / "artifact").returncode == 2


def test_the_rauc_hook_installs_and_fails_for_a_bad_file(lab, slot_device, kit, tmp_path):
    script = tmp_path / "hook.sh"
    script.write_text(example("sh", "slot-install"))
    assert run(script, kit, slot_device.path, "slot-install", RAUC_IMAGE_NAME=str(lab.bundle(1, 0))).returncode == 0
    assert slot_device.files() == fleet.hashes(lab.release(1))
    assert run(script, kit, slot_device.path, "slot-install", RAUC_IMAGE_NAME=str(script)).returncode == 2


@pytest.fixture
def channel(lab, tmp_path):
    """A folder that a server offers, with updates from 0, 1 and 2 to 3; yields the folder and its address."""
    folder = tmp_path / "camera"
    folder.mkdir()
    entries = [{"since": since, "path": f"3-since-{since}.r1u"} for since in (0, 1, 2)]
    for entry in entries:
        shutil.copy(lab.bundle(3, entry["since"]), folder / entry["path"])
    (folder / "channel.json").write_text(json.dumps({"seq": 3, "updates": entries}))
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fetch(address, kit, store):
    code = example("python", "channel.json").replace("https://models.example/camera/v1", address)
    code = code.replace('"r1device.pyz"', repr(str(kit))).replace("/data/model", str(store))
    machine = store.parent / "machine-id"
    machine.write_text("0123456789abcdef0123456789abcdef\n")
    code = code.replace("/etc/machine-id", str(machine))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_device_takes_the_smallest_fitting_update_from_a_plain_folder(lab, slot_device, kit, channel):
    slot_device.apply(lab.bundle(1, 0))
    assert fetch(channel[1], kit, slot_device.path).returncode == 0
    assert slot_device.files() == fleet.hashes(lab.release(3))
    assert slot_device.store.current == lab.read(lab.bundle(3, 1)).slot


def test_a_device_reads_no_more_than_an_update_can_have(lab, slot_device, kit, channel):
    folder, address = channel
    with open(folder / "3-since-0.r1u", "r+b") as file:
        file.truncate((64 << 20) + 1)
    process = fetch(address, kit, slot_device.path)
    assert "3-since-0.r1u has more than 67108864 bytes" in process.stderr
    assert slot_device.store.current == "base"


def set_percent(folder, percent):
    channel = json.loads((folder / "channel.json").read_text())
    (folder / "channel.json").write_text(json.dumps({**channel, "percent": percent}))


def test_a_stage_of_nobody_changes_nothing_and_one_of_all_reaches_the_device(lab, slot_device, kit, channel):
    folder, address = channel
    set_percent(folder, 0)
    assert fetch(address, kit, slot_device.path).returncode == 0
    assert slot_device.store.current == "base"
    set_percent(folder, 100)
    (folder / "reports" / "3").mkdir(parents=True)
    (folder / "reports" / "3" / "0").touch()
    assert fetch(address, kit, slot_device.path).returncode == 0
    assert slot_device.files() == fleet.hashes(lab.release(3))


def names_of(block, device="d"):
    """What an example defines, without running the part that talks to a server."""
    defined = {}
    code = example("python", block).partition("\nchannel = ")[0]
    exec(code.replace('Path("/etc/machine-id").read_text().strip()', repr(device)), defined)
    return defined


def test_a_stage_grows_and_begins_with_other_devices_for_every_update():
    def chosen(seq, percent):
        return {i for i in range(1000) if names_of_device[i](seq, percent)}

    names_of_device = [names_of("is_chosen", f"device-{i}")["is_chosen"] for i in range(1000)]
    assert not chosen(3, 0)
    assert len(chosen(3, 100)) == 1000
    assert 70 < len(chosen(3, 10)) < 130
    assert chosen(3, 1) < chosen(3, 10) < chosen(3, 50)
    assert len(chosen(3, 10) & chosen(4, 10)) < 30


@pytest.mark.parametrize(
    ("percent", "passed", "failed", "expected"),
    [(1, 20, 0, 1), (1, 150, 0, 10), (50, 900, 10, 100), (1, 100, 3, 0), (10, 1000, 30, 0), (100, 5000, 0, 100), (1, 148, 2, 10)],
)  # fmt: skip
def test_a_roll_out_goes_on_waits_or_stops(percent, passed, failed, expected):
    assert names_of("next_percent")["next_percent"](percent, passed, failed) == expected


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_one_file_is_fetched_with_curl_and_leaves_nothing(lab, slot_device, kit, channel, tmp_path):
    folder, address = channel
    script, scratch = tmp_path / "fetch.sh", tmp_path / "scratch"
    script.write_text(example("sh", "curl"))
    scratch.mkdir()
    assert run(script, kit, slot_device.path, f"{address}/3-since-0.r1u", TMPDIR=str(scratch)).returncode == 0
    assert slot_device.files() == fleet.hashes(lab.release(3))
    with open(folder / "3-since-1.r1u", "r+b") as file:
        file.truncate((64 << 20) + 1)
    assert run(script, kit, slot_device.path, f"{address}/3-since-1.r1u", TMPDIR=str(scratch)).returncode == 63
    assert list(scratch.iterdir()) == []


def test_an_update_is_signed_again_and_replaces_the_signature(lab, slot_device, tmp_path):
    slot_device.apply(lab.bundle(1, 0))
    shutil.copy(lab.bundle(1, 0), tmp_path / "update.r1u")
    key = envelope.SecretKey(b"\x05" * 32)
    (tmp_path / "new.key").write_text(key.to_pem())
    subprocess.run([sys.executable, "-c", example("python", "signed-again.r1u")], check=True, cwd=tmp_path)
    (slot_device.path / "trust" / f"{key.public.keyid}.pub").write_text(key.public.to_pem())
    assert slot_device.apply(tmp_path / "signed-again.r1u").changed
    assert slot_device.store.bundle(slot_device.store.current).envelope == envelope.sign(
        lab.read(lab.bundle(1, 0)).manifest_bytes, [key]
    )


def test_a_store_is_made_again_with_its_floor(lab, slot_device, kit, tmp_path):
    slot_device.apply(lab.bundle(1, 0))
    script = tmp_path / "again.sh"
    text = example("sh", "--min-seq").replace("r1device.pyz", str(kit)).replace("00-base", str(lab.release(0)))
    script.write_text(
        "set -e\n" + text.replace("fleet.pub", str(lab.public)).replace("update.r1u", str(lab.bundle(3, 0)))
    )
    process = run(script, kit, slot_device.path)
    assert process.returncode == 0, process.stderr
    assert (slot_device.store.config.min_seq, slot_device.store.state().min_seq) == (3, 3)
    assert slot_device.files() == fleet.hashes(lab.release(3))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_the_format_document_names_the_programs_limits_and_members(lab):
    text = (DOCS / "bundle-format.md").read_text()
    for limit in (f"{envelope.MAX_ENVELOPE:,}", f"{manifest.MAX_MANIFEST:,}"):
        assert limit.replace(",", " ") in text
    assert bundle.MAGIC.hex(" ") in text
    assert f'"{len(envelope.PAYLOAD_TYPE)}" SP "{envelope.PAYLOAD_TYPE}"' in text
    document = json.loads(lab.read(lab.bundle(1, 0)).manifest_bytes)
    for member in document:
        assert f"`{member}`" in text
    assert names.NAME.pattern in text
    assert names.PARAMETER.pattern in text
