"""What a command does where the machine is unkind: signals, no memory, no permission, odd terminals, two at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import dotted
from running import RECIPE, r1export

from r1export.inspection import examine_environment
from r1export.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
COMMAND = [sys.executable, "-m", "r1export"]
BARE = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def process(*arguments: object, environment: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment or BARE, timeout=120, **options)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + "[data]\nshots = 2\ntest_limit = 20\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify"], "Missing argument 'RUN|RELEASE' (see r1export verify --help)"),
        (["bogus"], "No such command 'bogus' (see r1export --help)"),
        (["verify", "x", "--nope"], "No such option: --nope (see r1export verify --help)"),
        (["verify", "x", "--threshold", "many"], "(see r1export verify --help)"),
    ],
)
def test_wrong_usage_is_one_line_and_one_document(arguments: list[str], words: str) -> None:
    result = r1export(*arguments, "--json")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr
    document = json.loads(result.stdout)
    assert document["exit_code"] == 2
    assert result.stderr == f"Error: {document['error']['message']} ({document['error']['remedy']})\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["rollback"], 2), (["status", "nowhere"], 2), (["apply", "nowhere", "x", "--wait", "soon"], 2)],
    ids=["missing argument", "bad input", "wrong type"],
)
@pytest.mark.parametrize("command", [["-m", "r1export", "device"], ["-m", "r1export.device"]], ids=" ".join)
def test_the_device_kit_prints_errors_in_the_same_form(command: list[str], arguments: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, *command, *arguments, "--json"], env=BARE, capture_output=True, text=True)
    assert done.returncode == code
    document = json.loads(done.stdout)
    assert document["exit_code"] == code
    assert done.stderr == f"Error: {document['error']['message']} ({document['error']['remedy']})\n"


@pytest.mark.parametrize(
    "command",
    [["-m", "r1export", "inspect", "nowhere"], ["-m", "r1export.device", "inspect", "nowhere"]],
    ids=["r1export", "r1device"],
)
@pytest.mark.parametrize(
    ("setting", "prefix"),
    [
        ({}, "\x1b[1;31mError: \x1b[0m"),
        ({"NO_COLOR": "1"}, "\x1b[1mError: \x1b[0m"),
        ({"TERM": "dumb"}, "Error: "),
    ],
    ids=["colour", "NO_COLOR", "dumb"],
)
def test_both_command_lines_colour_errors_alike(command: list[str], setting: dict[str, str], prefix: str) -> None:
    environment = BARE | {"TERM": "xterm"} | setting
    leader, follower = os.openpty()
    done = subprocess.run([sys.executable, *command], env=environment, stderr=follower, timeout=60)
    os.close(follower)
    shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert done.returncode == 2
    assert shown.startswith(f"{prefix}nowhere: no such file")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_run_in_one_line_and_the_run_can_be_resumed(recipe, tmp_path, number) -> None:
    out = tmp_path / "run"
    arguments = ["train", recipe, "--out", out, "--set", "train.iterations=100000", "--set", "train.checkpoint_every=5"]
    command, checkpoint = [*COMMAND, *map(str, arguments)], RunFolder(out).task(1, "digits").checkpoint
    with subprocess.Popen(command, env=BARE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals) as started:
        try:
            until(lambda: checkpoint.exists() or started.poll() is not None)
            started.send_signal(number)
            _, stderr = started.communicate(timeout=60)
        finally:
            started.kill()
    assert started.returncode == 128 + number, stderr
    assert stderr == f"Error: interrupted by {number.name} (continue a run with --resume)\n"
    assert not list(out.rglob(".*.partial*"))


def heed_signals() -> None:
    """A suite that runs in the background, or under nohup, ignores some, and its children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def until(holds, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_that_is_ignored_stays_ignored(recipe) -> None:
    """As under nohup."""
    code = (
        "import signal, os; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from r1export.command import open_terminal\n"
        "with open_terminal(False): os.kill(os.getpid(), signal.SIGHUP); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=BARE, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
    ],
    ids=["Python", "torch", "CUDA"],
)
def test_no_memory_is_one_line_and_exit_code_3(monkeypatch, tmp_path, error) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("r1export.inspection.describe", fail)
    result = r1export("inspect", tmp_path)
    assert result.returncode == 3
    assert result.stderr.startswith("Error: out of memory (")


def test_a_real_lack_of_memory_is_one_line(recipe, tmp_path) -> None:
    """Pictures that decode to more than the process may have."""
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    dotted((1, 2, 3), (8000, 8000)).save(tmp_path / "photos/cat/1.png", compress_level=1)
    code = (
        "import resource, sys, runpy; from r1export.inspection import describe_source\n"
        "import r1export.cli, r1export.command\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + (100 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        f"sys.argv = ['r1export', 'inspect', 'folder:{tmp_path}/photos']\n"
        "r1export.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=BARE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: out of memory (")


def without_privilege(*arguments: object) -> subprocess.CompletedProcess:
    """The command as a user who may not read what its owner locked: root would."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*drop, *COMMAND, *map(str, arguments)], capture_output=True, text=True, env=BARE, timeout=120
    )


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
@pytest.mark.parametrize(
    "locked", ["recipe.toml", "w.safetensors", "c.json", "photos", "photos/cat", "photos/cat/0.png"]
)
def test_what_may_not_be_read_is_a_matter_of_permission_and_not_missing(tiny_files, tmp_path, locked: str) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            dotted((60 * i, 80, 99), (20, 20)).save(tmp_path / "photos" / name / f"{i}.png")
    shutil.copy(tiny_files[0], tmp_path / "w.safetensors")
    shutil.copy(tiny_files[1], tmp_path / "c.json")
    (tmp_path / "recipe.toml").write_text(
        '[base]\nweights = "w.safetensors"\nconfig = "c.json"\n[[tasks]]\nname = "a"\nsource = "folder:photos"\n'
    )
    (tmp_path / locked).chmod(0)
    result = without_privilege("train", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    (tmp_path / locked).chmod(0o755)
    assert result.returncode == 3, result.stderr
    line = result.stderr.splitlines()[-1]
    assert "permission denied" in line.lower()
    assert str(tmp_path / locked) in line


def test_the_second_of_two_commands_in_one_run_is_refused_and_changes_nothing(recipe, tmp_path) -> None:
    assert r1export("train", recipe, "--out", tmp_path / "run", "--set", "train.iterations=2").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    with RunFolder(tmp_path / "run").lock():
        for arguments in (
            ("export", tmp_path / "run"),
            ("verify", tmp_path / "run"),
            ("train", recipe, "--out", tmp_path / "run", "--set", "train.iterations=2", "--resume"),
            ("train", recipe, "--out", tmp_path / "run", "--overwrite"),
        ):
            result = r1export(*arguments)
            assert result.returncode == 2, result.output
            assert "another r1export command is working on this run" in result.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    assert after == before


def test_what_a_killed_command_left_is_removed_by_the_next(recipe, tmp_path) -> None:
    run = tmp_path / "run"
    assert r1export("train", recipe, "--out", run, "--set", "train.iterations=2").returncode == 0
    (run / "tasks/01-digits/.factors.safetensors.x1y2.partial").write_bytes(b"x")
    (run / ".graphs.abc.partial.old").mkdir()
    (run / ".graphs.abc.partial.old" / "visual.onnx").write_bytes(b"x")
    resumed = r1export("train", recipe, "--out", run, "--set", "train.iterations=2", "--resume")
    assert resumed.returncode == 0, resumed.output
    assert not list(run.rglob("*.partial*"))


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb"},
        {"COLUMNS": "20"},
        {},
    ],
    ids=["LANG=C", "ASCII", "dumb", "narrow", "no HOME"],
)
def test_odd_terminals_and_locales_change_no_answer(environment: dict[str, str]) -> None:
    done = process("inspect", QUICKSTART, "--json", environment=BARE | environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "Recipe"


def test_a_reader_that_stops_early_ends_the_command_quietly() -> None:
    shell = f"{sys.executable} -m r1export inspect {QUICKSTART} | head -n 1; exit ${{PIPESTATUS[0]}}"
    slow = shell.replace("| head", "| (exec <&-; true) #")
    for command in (shell, slow):
        done = subprocess.run(["bash", "-c", command], env=BARE, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        assert done.stderr == ""


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_closed_stream_is_no_defect(stream: str) -> None:
    command = f"{sys.executable} -m r1export inspect {QUICKSTART} {stream}>&-"
    done = subprocess.run(["bash", "-c", command], env=BARE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_paths_with_spaces_and_relative_paths_work_from_any_folder(tmp_path, recipe, monkeypatch) -> None:
    folder = tmp_path / "my photos & co"
    folder.mkdir()
    shutil.move(recipe, folder / "the recipe.toml")
    monkeypatch.chdir(folder)
    done = r1export("train", "the recipe.toml", "--out", "a run", "--set", "train.iterations=2")
    assert done.returncode == 0, done.output
    monkeypatch.chdir(tmp_path)
    assert r1export("export", "my photos & co/a run").returncode == 0


def package(folder: Path, name: str) -> None:
    """A package that says it owns the module onnxruntime, as pip records it."""
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (info / "top_level.txt").write_text("onnxruntime\n")


def test_doctor_says_which_of_two_onnxruntimes_python_gets(tmp_path) -> None:
    package(tmp_path, "onnxruntime")
    done = process("doctor", "--json", environment=BARE | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}["onnxruntime"]
    assert "9.9, onnxruntime-gpu" in found["found"]
    assert "Python imports onnxruntime-gpu. They overwrite each other" in found["found"]


def test_doctor_accepts_an_onnxruntime_of_any_package(monkeypatch) -> None:
    monkeypatch.setattr("r1export.inspection.packages_distributions", lambda: {"onnxruntime": ["onnx"]})
    found = {finding.check: finding for finding in examine_environment()}["onnxruntime"]
    assert found.verdict == "pass"


def test_doctor_misses_a_module_and_not_a_package(monkeypatch) -> None:
    monkeypatch.setattr("r1export.inspection.MODULES", ("nowhere",))
    findings = {finding.check: finding for finding in examine_environment()}
    assert (findings["nowhere"].found, findings["nowhere"].verdict) == ("not installed", "fail")
