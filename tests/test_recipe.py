"""Recipes: what is read, what is refused, and every recipe that comes with the project."""

import re
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from running import r1export

from r1export.errors import InputError
from r1export.recipe import Export, Recipe, TaskSource, in_order
from r1export.recipe_file import RETIRED, Retired, load_recipe
from r1export.run_folder import RunFolder
from r1export.update.names import NAME, PATH, check_paths

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
MINIMAL = '[base]\nmodel = "builtin:world"\n[[tasks]]\nname = "a"\nsource = "builtin:digits"\n'
BASE = '[base]\n{}\n[[tasks]]\nname = "a"\nsource = "builtin:digits"\n'


def write(tmp_path, text: str) -> Path:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    return tmp_path / "r.toml"


def test_every_opset_of_a_recipe_can_be_exported() -> None:
    from r1export.export.graph import MAX_OPSET, MIN_OPSET

    for opset in range(MIN_OPSET, MAX_OPSET + 1):
        assert Export(opset=opset).opset == opset
    for opset in (MIN_OPSET - 1, MAX_OPSET + 1):
        with pytest.raises(ValidationError):
            Export(opset=opset)


def test_the_project_comes_with_recipes() -> None:
    assert {"quickstart", "mini-mtil", "mtil-5shot", "mtil-full"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_being_written(path: Path, tmp_path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, recipe.dumps())) == recipe


def test_what_is_said_of_pictures_and_tokenizers_survives_being_written(tmp_path) -> None:
    said = 'mean = [0, 0.25, 0.5]\nstd = [1, 1, 1]\ninterpolation = "bilinear"\nresize_mode = "squash"\nimage_size = 64\nquick_gelu = false'
    recipe = load_recipe(
        write(tmp_path, BASE.format(f'model = "ViT-B-32"\nweights = "w.safetensors"\ntokenizer = "t"\n{said}'))
    )
    assert (recipe.base.mean, recipe.base.quick_gelu, recipe.base.image_size) == ((0, 0.25, 0.5), False, 64)
    assert load_recipe(write(tmp_path, recipe.dumps())) == recipe


def test_mtil_recipes_learn_the_eleven_sets_with_openai_weights() -> None:
    for name in ("mtil-5shot", "mtil-full"):
        recipe = load_recipe(ROOT / "recipes" / f"{name}.toml")
        assert (recipe.base.model, recipe.base.pretrained) == ("ViT-B-16", "openai")
        assert len({task.source for task in recipe.tasks}) == 11


@pytest.mark.parametrize("name", ["mtil-5shot", "mtil-full", "xtail"])
def test_the_header_of_a_benchmark_says_how_to_run_the_method_as_published(name: str) -> None:
    path = ROOT / "recipes" / f"{name}.toml"
    line = next(line for line in path.read_text(encoding="utf-8").splitlines() if "method as published" in line)
    found = load_recipe(path, tuple(re.findall(r"--set (\S+)", line)))
    published = load_recipe(ROOT / "recipes/baselines/faithful.toml")
    assert found.train == published.train.model_copy(update={"iterations": found.train.iterations})
    assert (found.pool, found.data.augment) == (published.pool, published.data.augment)


def test_a_recipe_changes_only_what_it_says_of_the_one_it_extends(tmp_path) -> None:
    (tmp_path / "parent.toml").write_text(
        MINIMAL + "[train]\niterations = 7\nseed = 1\n[pool]\nrank = 6\nk_train = 4\n"
    )
    recipe = load_recipe(write(tmp_path, 'extends = "parent.toml"\n[train]\nseed = 2\n'))
    assert (recipe.train.iterations, recipe.train.seed, recipe.pool.rank) == (7, 2, 6)
    assert "extends" not in recipe.dumps()


def test_a_recipe_that_extends_itself_or_nothing_is_refused(tmp_path) -> None:
    (tmp_path / "a.toml").write_text('extends = "r.toml"')
    for text, words in (
        ('extends = "a.toml"', "extends itself"),
        ('extends = "gone.toml"', "no such recipe"),
        ("extends = 3", "one recipe"),
    ):
        with pytest.raises(InputError, match=words):
            load_recipe(write(tmp_path, text))


def test_tasks_may_be_learned_in_another_order(tmp_path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + '[[tasks]]\nname = "b"\nsource = "builtin:photos"\n'))
    for order in ("reversed", "b, a"):
        assert [task.name for task in in_order(recipe, order).stream] == ["b", "a"]
    with pytest.raises(InputError, match="list each task exactly once"):
        in_order(recipe, "a,a")


def test_x_tail_classifies_among_all_classes_of_ten_sets() -> None:
    recipe = load_recipe(ROOT / "recipes" / "xtail.toml")
    assert (len(recipe.tasks), recipe.data.candidates, recipe.data.shots) == (10, "all", 16)


def test_the_defaults_are_the_faithful_settings(tmp_path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    pool, train = recipe.pool, recipe.train
    assert (pool.rank, pool.k_train, pool.k_merge, pool.alpha, pool.dropout) == (12, 8, 4, 1.0, 0.2)
    assert (train.iterations, train.batch_size, train.learning_rate, train.min_learning_rate, train.weight_decay) == (
        500,
        32,
        2e-3,
        1e-6,
        1e-2,
    )
    assert (train.orthogonality_weight, train.seed) == (0.1, 42)


def test_every_field_says_what_it_means() -> None:
    sections = [
        Recipe,
        *(
            field.annotation
            for name, field in Recipe.model_fields.items()
            if name in ("base", "data", "pool", "train", "export", "verify")
        ),
    ]
    silent = [
        f"{s.__name__}.{name}" for s in sections[1:] for name, field in s.model_fields.items() if not field.description
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "invalid TOML"),
        (MINIMAL + "[train]\niterationz = 5\n", r"train\.iterationz: unknown key"),
        (MINIMAL + '[train]\niterations = "many"\n', r"train\.iterations: .*'many'"),
        (MINIMAL + "[train]\niterations = 0\n", r"train\.iterations: .*0"),
        (MINIMAL + "[pool]\nk_merge = 13\n", "must not exceed rank 12"),
        (MINIMAL + '[pool]\ntowers = ["audio"]\n', r"pool\.towers"),
        (MINIMAL + 'order = ["b"]\n', r"tasks\.0\.order: unknown key"),
        ('order = ["b"]\n' + MINIMAL, "order must list each task exactly once: a"),
        (MINIMAL + '[[tasks]]\nname = "A"\nsource = "x"\n', "two tasks have the same name"),
        (MINIMAL.replace('"a"', '"../a"'), r"tasks\.0\.name"),
        ('[base]\nmodel = "ViT-B-16"\n[[tasks]]\nname = "a"\nsource = "x"\n', "either pretrained"),
        ('[base]\nweights = "w"\n[[tasks]]\nname = "a"\nsource = "x"\n', "set either model"),
        ('[base]\nmodel = "builtin:world"\n', "tasks"),
        (MINIMAL.replace('"\n[[', '"\nweights = "w"\n[[', 1), "builtin:world needs no other settings: remove weights"),
        (BASE.format('model = "ViT-B-32"\nconfig = "c"\nweights = "w"'), r"set either model .* or config "),
        (BASE.format('model = "local-dir:x"\nweights = "w"'), r"local-dir:\S*x includes weights and config: remove"),
        (BASE.format('model = "hf-hub:a/b"\npretrained = "openai"'), "hf-hub:a/b includes weights and config"),
        (
            BASE.format('config = "c"\nweights = "w"\nstd = [0.5, 0.0, 0.5]'),
            r"std is \[0\.5, 0\.0, 0\.5\], expected values greater than 0",
        ),
        (BASE.format('config = "c"\nweights = "w"\nmean = [0.5, 0.5]'), r"base\.mean"),
        (BASE.format('config = "c"\nweights = "w"\nresize_mode = "crop"'), r"base\.resize_mode"),
        (BASE.format('config = "c"\nweights = "w"\nimage_size = 0'), r"base\.image_size"),
        (MINIMAL + '[pool]\ngate = "sparse"\n', r"needs train\.consolidate = 1, found 0\.3"),
        (MINIMAL + "[verify]\nbatches = [1, 0]\n", r"verify\.batches\.1: .*0"),
        (MINIMAL + "[verify]\nbatches = []\n", r"verify\.batches"),
        (MINIMAL + "[train]\nseed = -1\n", r"train\.seed: .*-1"),
        (MINIMAL + "[verify]\nmax_abs = inf\n", r"verify\.max_abs: .*finite.*inf"),
        (MINIMAL + "[train]\ndistill_weight = nan\n", r"train\.distill_weight: .*nan"),
        (MINIMAL + "[pool]\nalpha = inf\n", r"pool\.alpha: .*inf"),
        (MINIMAL + '[probe]\nname = "A"\nsource = "x"\n', r"both named A: change probe\.name"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_the_name_of_the_field(text: str, message: str, tmp_path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "r.toml"))
    assert "\n" not in str(caught.value)


def test_a_sparse_gate_that_is_thresholded_until_the_end_is_taken(tmp_path) -> None:
    text = f'{MINIMAL}[pool]\ngate = "sparse"\n[train]\nconsolidate = 1\n'
    assert load_recipe(write(tmp_path, text)).pool.gate == "sparse"


def with_retired(retired: Retired) -> str:
    """A recipe with an old name, its value in the type of the field."""
    section, _, name = retired.field.partition(".")
    value = (
        "0.2"
        if retired.value is None
        else f'["visual", "{retired.value}"]'
        if name == "towers"
        else f'"{retired.value}"'
    )
    return f"{MINIMAL}[{section}]\n{name} = {value}\n"


@pytest.mark.parametrize("retired", RETIRED, ids=str)
def test_an_old_name_is_refused_with_the_new_one_wherever_it_stands(retired: Retired, tmp_path) -> None:
    path = write(tmp_path, with_retired(retired))
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(with_retired(retired), encoding="utf-8")
    child = tmp_path / "child.toml"
    child.write_text('extends = "r.toml"\n', encoding="utf-8")
    for read, file in (
        (lambda: load_recipe(path), path),
        (lambda: load_recipe(child), path),
        (RunFolder(run).recipe, run / "recipe.toml"),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value) == f"{file}: {retired} is no longer used ({retired.advice})"


@pytest.mark.parametrize("retired", RETIRED, ids=str)
def test_every_rename_is_in_the_changelog_and_what_replaces_it_loads(retired: Retired, tmp_path) -> None:
    assert retired.field in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## 0.1.0")[0]
    new = re.match(r'use "?(\w+(?:\.\w+)?)', retired.advice)[1]
    text = with_retired(retired)
    text = text.replace("keep", new.split(".")[1]) if retired.value is None else text.replace(retired.value, new)
    load_recipe(write(tmp_path, text))


def test_an_old_name_ends_the_command_with_exit_code_2(tmp_path) -> None:
    for field, value in (("train.keep", "0.2"), ("pool.gate", "frequency")):
        result = r1export("train", write(tmp_path, MINIMAL), "--out", tmp_path / "new", "--set", f"{field}={value}")
        assert result.returncode == 2, result.output
        assert f"--set {field}" in result.stderr
        assert "is no longer used" in result.stderr
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(MINIMAL + "[train]\nkeep = 0.2\n", encoding="utf-8")
    result = r1export("verify", run)
    assert (result.returncode, "use train.distill_weight" in result.stderr) == (2, True)
    assert str(run / "recipe.toml") in result.stderr.replace("\n", "")


DEEP = {
    "arrays": "x = " + "[" * 20_000 + "]" * 20_000,
    "inline tables": "x = " + "{a = " * 20_000,
    "dotted keys": f"[{'.'.join('a' * 20_000)}]\nb = 1",
    "a number of 5,000 digits": "x = " + "9" * 5000,
    "a lone surrogate": 'x = "\\ud800"',
    "a byte that is no UTF-8": "x = '\udcff'",
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_what_the_parser_cannot_take_ends_the_command_with_one_line_and_exit_code_2(text: str, tmp_path) -> None:
    path, child = tmp_path / "r.toml", tmp_path / "child.toml"
    path.write_bytes((text + "\n" + MINIMAL).encode("utf-8", "surrogateescape"))
    child.write_bytes((f'extends = "r.toml"\n{text}\n').encode("utf-8", "surrogateescape"))
    for recipe in (path, child):
        for command in (("inspect", recipe), ("train", recipe, "--out", tmp_path / "run")):
            result = r1export(*command)
            assert result.returncode == 2, result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 20_000, "9" * 5000, "'\udcff'", "a\udcff"], ids=lambda text: ascii(text[:8])
)
def test_an_override_that_the_parser_cannot_take_is_bad_input(text: str, tmp_path) -> None:
    for field in ("train.iterations", "base.model", "pool.layers"):
        with pytest.raises(InputError) as caught:
            load_recipe(write(tmp_path, MINIMAL), (f"{field}={text}",))
        str(caught.value).encode()


def test_a_long_value_is_shortened_in_the_message(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, f'{MINIMAL}[train]\niterations = "{"x" * 10**6}"\n'))
    assert len(str(caught.value)) < 600


VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates() | st.sampled_from(["text", "input"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = {
    name: Recipe.model_fields[name].annotation for name in ("base", "data", "pool", "train", "export", "verify")
}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), section=st.sampled_from(sorted(SECTIONS)))
def test_any_value_of_any_field_is_a_recipe_or_bad_input(data, section: str, tmp_path_factory) -> None:
    field = data.draw(st.sampled_from(["keep", *sorted(SECTIONS[section].model_fields)]))
    values = tomllib.loads(MINIMAL)
    table = data.draw(VALUES) if data.draw(st.booleans()) else values.get(section, {}) | {field: data.draw(VALUES)}
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(tomli_w.dumps(values | {section: table}), encoding="utf-8")
    with suppress(InputError):
        assert load_recipe(path) == Recipe.model_validate(tomllib.loads(load_recipe(path).dumps()))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_a_recipe_or_bad_input(text: str, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "text.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        load_recipe(path)


def test_a_missing_recipe_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")


def test_fields_can_be_overridden(tmp_path) -> None:
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(
        path,
        ("train.iterations=7", "data.root=/some/dir", "tasks.0.name=b", 'pool.towers=["visual"]', "data.download=true"),
    )
    assert (
        recipe.train.iterations,
        recipe.data.root,
        recipe.tasks[0].name,
        recipe.pool.towers,
        recipe.data.download,
    ) == (
        7,
        "/some/dir",
        "b",
        ("visual",),
        True,
    )


@pytest.mark.parametrize(
    "override", ["iterations", "=5", "tasks.9.name=b", "tasks.x.name=b", "base.model.deep=1", "train.iterationz=5"]
)
def test_an_override_that_fits_nothing_is_refused(override: str, tmp_path) -> None:
    with pytest.raises(InputError, match=r"--set|unknown key"):
        load_recipe(write(tmp_path, MINIMAL), (override,))


def test_order_changes_the_stream_and_not_the_tasks(tmp_path) -> None:
    text = 'order = ["b", "a"]\n' + MINIMAL + '[[tasks]]\nname = "b"\nsource = "y"\n'
    recipe = load_recipe(write(tmp_path, text))
    assert [task.name for task in recipe.stream] == ["b", "a"]
    assert [task.name for task in recipe.tasks] == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.iterations=true", "integer"),
        ('train.iterations="20"', "integer"),
        ("train.iterations=20.0", "integer"),
        ("train.learning_rate=true", "number"),
        ('train.learning_rate="1e-3"', "number"),
        ("train.tensorboard=1", "boolean"),
        ("pool.layers=[1, true]", "integer"),
        ("base.model=3", "string"),
        ("tasks.0.source=1979-05-27", "string"),
    ],
)
def test_types_are_strict(tmp_path, override, expected) -> None:
    with pytest.raises(InputError, match=rf"{override.partition('=')[0]}.*valid {expected}"):
        load_recipe(write(tmp_path, MINIMAL), (override,))


def test_a_whole_number_is_a_number(tmp_path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), ("train.learning_rate=1",)).train.learning_rate == 1.0


@given(st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True) | st.sampled_from(["aux", "Con.x", "nul", "a.", "lpt1"]))
def test_a_task_that_a_recipe_accepts_can_be_released_and_bundled(name: str) -> None:
    with suppress(ValidationError):
        accepted = TaskSource(name=name, source="builtin:digits").name
        check_paths([f"classes/{accepted}.json", f"classes/{accepted}.safetensors"], "manifest")
        assert NAME.fullmatch(accepted)
        assert PATH.fullmatch(f"classes/{accepted}.safetensors")


@pytest.mark.parametrize("name", ["aux", "AUX", "con.fusion", "nul", "com1", "pets."])
def test_a_name_that_could_never_be_bundled_is_refused_at_once(tmp_path, name) -> None:
    with pytest.raises(InputError, match=r"tasks.0.name: .*choose another"):
        load_recipe(write(tmp_path, MINIMAL.replace('"a"', f'"{name}"')))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(tmp_path / "r.toml").tasks[0].name == "a"
