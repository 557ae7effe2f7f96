"""Relative paths in a recipe refer to the folder of the file they are written in, wherever the command runs."""

from pathlib import Path

import pytest
import torchvision.datasets
from running import RECIPE, r1export

from r1export.data.request import Request
from r1export.data.sources import load_task
from r1export.recipe import Recipe
from r1export.recipe_file import load_recipe

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").rglob("*.toml"))
BASE = '[base]\nweights = "w.safetensors"\nconfig = "/abs/c.json"\n'
TASKS = '[[tasks]]\nname = "a"\nsource = "folder:photos"\n[[tasks]]\nname = "b"\nsource = "npz:packs/b.npz"\n'
PROBE = '[probe]\nsource = "folder:probe"\n'


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """A folder with recipes in it; the command runs elsewhere."""
    (tmp_path / "lab" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "lab"


def load(file: Path, text: str, *overrides: str) -> Recipe:
    file.write_text(text)
    return load_recipe(file, overrides)


def all_sources(recipe: Recipe) -> list[str]:
    return [task.source for task in (*recipe.tasks, *((recipe.probe,) if recipe.probe else ()))]


def test_weights_config_and_sources_are_found_next_to_the_recipe(lab) -> None:
    recipe = load(lab / "r.toml", BASE + TASKS + PROBE)
    assert (recipe.base.weights, recipe.base.config) == (f"{lab}/w.safetensors", "/abs/c.json")
    assert all_sources(recipe) == [f"folder:{lab}/photos", f"npz:{lab}/packs/b.npz", f"folder:{lab}/probe"]


def test_what_a_parent_says_refers_to_the_folder_of_the_parent(lab) -> None:
    (lab / "parent.toml").write_text(BASE + TASKS)
    recipe = load(lab / "sub" / "r.toml", 'extends = "../parent.toml"\n' + PROBE)
    assert recipe.base.weights == f"{lab}/w.safetensors"
    assert all_sources(recipe) == [f"folder:{lab}/photos", f"npz:{lab}/packs/b.npz", f"folder:{lab}/sub/probe"]


def test_with_a_root_sources_stay_relative_to_it(lab) -> None:
    for recipe in (
        load(lab / "r.toml", BASE + TASKS + '[data]\nroot = "data"\n'),
        load(lab / "r.toml", BASE + TASKS, f"data.root={lab}/data"),
    ):
        assert recipe.data.root == f"{lab}/data"
        assert all_sources(recipe) == ["folder:photos", "npz:packs/b.npz"]


def test_on_the_command_line_paths_refer_to_the_current_folder(lab) -> None:
    recipe = load(lab / "r.toml", BASE + TASKS, "base.weights=x.safetensors", "tasks.1.source=npz:y.npz")
    here = Path.cwd()
    assert recipe.base.weights == f"{here}/x.safetensors"
    assert all_sources(recipe) == [f"folder:{lab}/photos", f"npz:{here}/y.npz"]


@pytest.mark.parametrize(
    "source", ["folder:~/photos", "npz:${DATA}/b.npz", "folder:/abs", "builtin:digits", "torchvision:MNIST", "hf:o/n"]
)
def test_what_is_no_relative_path_stays_as_it_is(lab, source) -> None:
    recipe = load(lab / "r.toml", BASE + f'[[tasks]]\nname = "a"\nsource = "{source}"\n')
    assert all_sources(recipe) == [source]


def test_a_data_set_of_the_hub_that_is_a_folder_here_is_that_folder(lab) -> None:
    (lab / "pets").mkdir()
    recipe = load(lab / "r.toml", BASE + '[[tasks]]\nname = "a"\nsource = "hf:pets:small"\n')
    assert all_sources(recipe) == [f"hf:{lab}/pets:small"]


def test_the_recipe_of_a_run_says_the_same_from_any_folder(lab) -> None:
    recipe = load(lab / "r.toml", BASE + TASKS + PROBE)
    assert load(lab / "sub" / "recipe.toml", recipe.dumps()) == recipe


def test_a_run_that_was_started_with_relative_paths_goes_on_in_another_folder(lab, monkeypatch) -> None:
    from pictures import dotted

    for name in ("cat", "dog"):
        (lab / "photos" / name).mkdir(parents=True)
        for i in range(3):
            dotted((60 * i, 80, 99), (20, 20)).save(lab / "photos" / name / f"{i}.png")
    text = RECIPE.replace("builtin:digits", "folder:photos")
    (lab / "r.toml").write_text(text)
    sets = ["--set", "train.iterations=2", "--set", "train.batch_size=2"]
    monkeypatch.chdir(lab)
    assert r1export("train", "r.toml", "--out", "run", *sets).returncode == 0
    monkeypatch.chdir("/")
    result = r1export("export", lab / "run")
    assert result.returncode == 0, result.output


def test_a_shipped_recipe_has_a_name_that_works_everywhere(lab) -> None:
    assert [task.name for task in load_recipe("quickstart").tasks] == ["trash6", "clothing10", "signdigits"]


def test_a_file_of_that_name_comes_first(lab) -> None:
    Path("quickstart").write_text(BASE + TASKS)
    assert [task.name for task in load_recipe("quickstart").tasks] == ["a", "b"]


def test_an_unknown_name_is_answered_with_the_known_ones(lab) -> None:
    done = r1export("run", "quickstrat")
    assert done.returncode == 2
    assert "quickstrat: no such recipe" in done.stderr
    assert "quickstart" in done.stderr


def test_a_run_without_a_folder_goes_to_runs(lab) -> None:
    (lab / "mine.toml").write_text(RECIPE)
    done = r1export("train", lab / "mine.toml", "--set", "train.iterations=1", "--set", "data.test_limit=4")
    assert done.returncode == 0, done.stderr
    assert Path("runs/mine/metrics.json").is_file()


def header(recipe: Path) -> str:
    """The comment at the top of a recipe."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_as_it_is_or_says_at_the_top_what_it_requires(path: Path) -> None:
    recipe = load_recipe(path)
    if not recipe.base.model.startswith("builtin:"):
        assert "open_clip downloads" in header(path)
    for source in all_sources(recipe):
        scheme, _, name = source.partition(":")
        if scheme == "builtin":
            assert len(load_task(Request(source, test_only=True)).test)
        else:
            assert scheme == "torchvision", source
            assert hasattr(torchvision.datasets, name), source
            assert "R1EXPORT_DATA" in header(path)
            assert "data.download=true" in header(path)
