"""The programs and the notebook in examples/, run the way a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from pictures import dotted
from running import r1export

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
QUICK = (
    "train.iterations=2", "data.test_limit=10", "data.shots=2", "verify.samples=4", "verify.images=8", "verify.pairs=20",
    "verify.margin=0.9",
)  # fmt: skip
RECIPE = '[base]\nmodel = "builtin:world"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n'


def example(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by finetune.py, and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "recipe.toml").write_text(RECIPE)
    done = example("finetune.py", folder / "recipe.toml", folder / "run", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "finetune.txt").write_text(done.stdout)
    return folder


def test_every_example_is_listed() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in index for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


def test_finetune_names_what_may_be_deployed(folder: Path) -> None:
    lines = (folder / "finetune.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["00-base", "pass,"], ["01-digits", "pass,"]]
    assert lines[2].startswith("digits ")
    assert lines[-1] == f"deploy {folder}/run/releases/01-digits"


def test_a_release_becomes_the_folder_of_a_client(folder: Path) -> None:
    done = example("deploy_to_client.py", folder / "run/releases/01-digits", "openclip", folder / "client")
    assert done.returncode == 0, done.stderr
    assert (folder / "client/layout.json").is_file()


def test_a_damaged_release_is_not_deployed(folder: Path, tmp_path: Path) -> None:
    release = folder / "run/releases/01-digits"
    copy = tmp_path / "01-digits"
    copy.mkdir()
    for file in release.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(release)).parent.mkdir(exist_ok=True)
            (copy / file.relative_to(release)).write_bytes(file.read_bytes())
    (copy / "preprocess.json").write_text("{}")
    done = example("deploy_to_client.py", copy, "openclip", tmp_path / "client")
    assert (done.returncode, (tmp_path / "client").exists()) == (1, False), done.stderr


def test_a_device_takes_the_update_and_answers(folder: Path) -> None:
    for command in (
        ("keygen", folder / "fleet"),
        ("bundle", folder / "run", "--release", 1, "--key", folder / "fleet.key", "-o", folder / "update.r1u"),
        ("device", "init", folder / "store", "--base", folder / "run/releases/00-base", "--trust", folder / "fleet.pub"),
    ):  # fmt: skip
        done = r1export(*command)
        assert done.returncode == 0, done.output
    arguments = (folder / "store", folder / "update.r1u", "digits", folder / "picture.png")
    dotted((200, 30, 30), (90, 60)).save(folder / "picture.png")
    first, again = (example("update_device.py", *arguments) for _ in range(2))
    assert first.stdout.splitlines()[0] == "installed", first.stderr
    assert again.stdout.splitlines()[0] == "already there", again.stderr
    assert len(first.stdout.splitlines()) == 4


def test_the_notebook_runs_from_top_to_bottom() -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source = settings.source.replace('("train.iterations=40", "data.test_limit=60")', repr(QUICK))
    assert repr(QUICK) in settings.source
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    pictures = [
        o.data["text/html"]
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "data" in o and "text/html" in o.data
    ]
    assert "(probe)" in pictures[0]
    assert "data:image/webp" in pictures[1]
    assert any("installed: True" in o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
