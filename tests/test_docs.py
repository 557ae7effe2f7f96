"""The documents against the program."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import docs_hook
import newcomer

from r1export.cli import app
from r1export.device.__main__ import _parser as device_parser
from r1export.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = get_command(app).commands


def lines_with_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [
            (page.name, line)
            for block in re.findall(r"```\w*\n(.*?)```", text, re.S)
            for line in block.splitlines()
            if line.startswith("r1export ")
        ]
        found += [(page.name, code) for code in re.findall(r"`(r1export [^`]+)`", text)]
    return found


@pytest.mark.parametrize(("page", "line"), lines_with_commands())
def test_every_command_in_the_documents_exists_with_its_options(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line.split(" #")[0])
    assert name in COMMANDS, f"{page}: {line}"
    if name == "device":  # hands everything on to the kit's own parser, which exits on what it does not know
        assert arguments == ["VERB", "STORE"] or device_parser("r1export device").parse_args(arguments)
        return
    command = COMMANDS[name]
    while hasattr(command, "commands") and arguments and arguments[0] in command.commands:
        command = command.commands[arguments.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {a.split("=")[0] for a in arguments if a.startswith("-")} <= known | {"--help"}, f"{page}: {line}"


def test_the_documents_name_commands() -> None:
    assert len(lines_with_commands()) > 8


def test_every_command_is_in_the_list_of_commands() -> None:
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"r1export {name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_link_that_leaves_the_pages_becomes_the_path_of_a_file() -> None:
    assert docs_hook.links_as_text("[all](../benchmarks/README.md)", "docs") == "all (`benchmarks/README.md`)"
    assert (
        docs_hook.links_as_text("[benchmarks/README.md](../benchmarks/README.md#x)", "docs") == "`benchmarks/README.md`"
    )
    for stays in ("[a](../search.md)", "[a](../gone.md)", "[a](search.md#x)", "[a](https://a.example/../b)"):
        assert docs_hook.links_as_text(stays, "docs/decisions") == stays


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    entries = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(entries) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:])


@pytest.mark.parametrize("page", newcomer.PAGES)
def test_a_newcomer_runs_commands_and_here_documents_as_they_are_written(page: str) -> None:
    found = newcomer.commands((ROOT / page).read_text(encoding="utf-8"))
    assert "source .venv/bin/activate" in "\n".join(found)
    assert [command for command in found if "<<" in command and not command.endswith("\nEOF")] == []
    programs = {command.split()[0] for command in found}
    assert programs <= {
        "./scripts/demo",
        "./scripts/test",
        "./scripts/install",
        "source",
        "mkdir",
        "cat",
        "ls",
        "python",
        "r1export",
    }


def test_the_recipe_in_the_readme_is_a_recipe() -> None:
    import tomllib

    text = re.search(r"<<'EOF'\n(.*?)^EOF$", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)[1]
    assert Recipe.model_validate(tomllib.loads(text)).tasks[0].source == "folder:photos"


def test_the_field_list_is_the_recipe_model() -> None:
    assert subprocess.run([sys.executable, ROOT / "scripts/recipe_table.py", "--check"], timeout=60).returncode == 0


def test_the_table_of_methods_is_that_of_the_results() -> None:
    assert subprocess.run([sys.executable, ROOT / "scripts/methods_table.py", "--check"], timeout=60).returncode == 0


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_help_text_has_a_first_line_and_every_option_a_meaning() -> None:
    def walk(command, path: str) -> list[str]:
        silent = [] if (command.help or "").strip() else [path]
        silent += [
            f"{path} {p.name}"
            for p in command.params
            if p.param_type_name == "option" and p.name != "help" and not p.help
        ]
        return silent + [
            s for name, sub in getattr(command, "commands", {}).items() for s in walk(sub, f"{path} {name}")
        ]

    assert walk(get_command(app), "r1export") == []


def test_no_page_names_a_machine_or_a_host_of_a_registry() -> None:
    tracked = [
        *PAGES,
        ROOT / "requirements.lock",
        ROOT / "pyproject.toml",
        *(ROOT / "scripts").iterdir(),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "recipes").iterdir(),
    ]
    words = re.compile(r"pypi\.org|files\.pythonhosted|registry\.npmjs|/work/|/root/|/tmp/s/")
    assert [
        path.name
        for path in tracked
        if path.is_file() and words.search(path.read_text(encoding="utf-8", errors="ignore"))
    ] == []
