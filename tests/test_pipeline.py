"""The steps as functions, where a test needs what the command line does not show."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from r1export.adapt.distillation import distillation_targets
from r1export.errors import InputError, Unsupported
from r1export.pipeline import train
from r1export.pipeline.context import NoProgress, RunContext, check_inputs, choose_device
from r1export.pipeline.export import export_releases
from r1export.pipeline.run import run_steps
from r1export.pipeline.train import train_tasks
from r1export.recipe import Recipe
from r1export.run_folder import RunFolder, check_run, open_run
from r1export.update.factors import ExpertUpdate


@pytest.fixture
def recipe(tiny_files) -> Recipe:
    return Recipe.model_validate(
        {
            "base": {"weights": str(tiny_files[0]), "config": str(tiny_files[1])},
            "tasks": [{"name": "digits", "source": "builtin:digits"}, {"name": "arrows", "source": "builtin:arrows"}],
            "data": {"shots": 2, "test_limit": 10},
            "train": {"iterations": 2},
        }
    )


def context_of(recipe: Recipe, path) -> RunContext:
    return RunContext(open_run(path, recipe, resume=True, overwrite=False), recipe, "cpu", NoProgress())


def test_the_second_task_is_learned_on_the_merged_weights_and_the_base_is_put_back(recipe, tmp_path) -> None:
    context = context_of(recipe, tmp_path / "run")
    before = {name: value.copy() for name, value in context.base.items()}
    train_tasks(context)
    assert all(np.array_equal(value, before[name]) for name, value in context.clip.parameters().items())
    updates = context.run.updates(recipe)
    merged = context.merged(updates)
    expected = ExpertUpdate.stack(updates).apply(before)
    assert set(merged) == set(before)
    assert all(np.array_equal(merged[name], expected.get(name, before[name])) for name in merged)


def test_the_base_is_put_back_when_a_step_fails(recipe, tmp_path) -> None:
    context = context_of(recipe, tmp_path / "run")
    train_tasks(context)
    learned: dict[str, np.ndarray] = {}

    def fails() -> None:
        with context.with_updates_applied(context.run.updates(recipe)) as merged:
            learned.update(context.clip.parameters())
            assert all(np.array_equal(learned[name], merged[name]) for name in merged)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert any(not np.array_equal(learned[name], value) for name, value in context.base.items())
    assert all(np.array_equal(value, context.base[name]) for name, value in context.clip.parameters().items())


def test_a_run_stopped_between_tasks_goes_on_with_the_second(recipe, tmp_path) -> None:
    train_tasks(context_of(recipe, tmp_path / "whole"))
    train_tasks(context_of(recipe, tmp_path / "cut"))
    kept = (tmp_path / "cut/tasks/01-digits/factors.safetensors").stat().st_mtime_ns
    for name in ("factors.safetensors", "pool.safetensors", "accuracy.json", "metrics.json"):
        (tmp_path / "cut/tasks/02-arrows" / name).unlink()
    (tmp_path / "cut/metrics.json").unlink()
    assert train_tasks(context_of(recipe, tmp_path / "cut")) == RunFolder(tmp_path / "whole").metrics()
    assert (tmp_path / "cut/tasks/01-digits/factors.safetensors").stat().st_mtime_ns == kept
    second = "tasks/02-arrows/factors.safetensors"
    assert (tmp_path / "cut" / second).read_bytes() == (tmp_path / "whole" / second).read_bytes()


def test_distillation_is_on_imagenets_names_and_those_of_earlier_tasks(recipe, tmp_path, monkeypatch) -> None:
    references = []

    def listening(clip, train, visited, names, on_batch):
        references.append(names)
        return distillation_targets(clip, train, visited, names, on_batch)

    monkeypatch.setattr(train, "distillation_targets", listening)
    factors = []
    for weight in (0.0, 5.0):
        changed = recipe.train.model_copy(update={"distill_weight": weight})
        train_tasks(context_of(recipe.model_copy(update={"train": changed}), tmp_path / str(weight)))
        factors.append((tmp_path / str(weight) / "tasks/01-digits/factors.safetensors").read_bytes())
    assert factors[0] != factors[1]
    assert [len(names) for names in references] == [998, 998 + 10]
    assert references[1][-10:] == context_of(recipe, tmp_path / "other").tasks[0].classes


def test_a_run_cannot_go_on_from_another_base(recipe, tmp_path) -> None:
    context = context_of(recipe, tmp_path / "run")
    train_tasks(context)
    other = context_of(recipe, tmp_path / "run")
    other.clip.load_({"logit_scale": np.float32(1.0)})
    with pytest.raises(InputError, match="another base model"):
        train_tasks(other)


def test_a_file_of_a_run_without_what_it_should_hold_is_named(recipe, tmp_path) -> None:
    context = context_of(recipe, tmp_path / "run")
    train_tasks(context)
    for file, words, step in (
        ("run.json", "missing keys: r1export, seed, base", train_tasks),
        ("zero_shot.json", "no accuracy for digits, arrows", train_tasks),
        ("tasks/02-arrows/accuracy.json", "no accuracy for digits, arrows", train_tasks),
        ("metrics.json", "missing keys: tasks, .*probe", export_releases),
    ):
        whole = (context.run.path / file).read_text()
        for text, said in (("{}", words), ("[]", "expected an object")):
            (context.run.path / file).write_text(text)
            with pytest.raises(InputError, match=rf"{file}: corrupted: .*{said}"):
                step(context)
        (context.run.path / file).write_text(whole)


def test_an_accuracy_that_is_no_share_is_damage(recipe, tmp_path) -> None:
    context = context_of(recipe, tmp_path / "run")
    train_tasks(context)
    for value, message in (
        ("NaN", "NaN is not JSON"),
        ("1.5", "digits: Input should be"),
        ("-0.1", "digits: Input should be"),
        ('"0.5"', "digits: Input should be a valid number"),
    ):
        (context.run.path / "zero_shot.json").write_text(f'{{"digits": {value}, "arrows": 0.5}}')
        with pytest.raises(InputError, match=rf"zero_shot\.json: corrupted: .*{message}"):
            train_tasks(context)


def test_checking_the_inputs_leaves_the_model_as_it_was(recipe, tmp_path) -> None:
    context = RunContext(RunFolder(tmp_path / "never made"), recipe, "cpu", NoProgress())
    names = list(context.clip.model.state_dict())
    check_inputs(context)
    assert list(context.clip.model.state_dict()) == names
    assert not (tmp_path / "never made").exists()


def test_a_run_is_overwritten_only_when_asked(recipe, tmp_path) -> None:
    run = open_run(tmp_path / "run", recipe, resume=False, overwrite=False)
    (run.path / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="a run already exists"):
        check_run(run.path, recipe, resume=False, overwrite=False)
    open_run(run.path, recipe, resume=False, overwrite=True)
    assert not (run.path / "metrics.json").exists()
    assert run.recipe() == recipe


def test_a_file_in_the_place_of_the_run_is_refused(recipe, tmp_path) -> None:
    (tmp_path / "run").write_text("something else")
    with pytest.raises(InputError, match="nothing was modified"):
        open_run(tmp_path / "run", recipe, resume=True, overwrite=True)
    assert (tmp_path / "run").read_text() == "something else"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, Unsupported), (errno.EACCES, Unsupported), (errno.ENOTDIR, InputError)]
)
def test_what_the_disk_refuses_to_a_run_is_the_environment_and_a_wrong_path_is_input(
    number: int, kind: type[Exception], recipe, tmp_path, monkeypatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    context = context_of(recipe, tmp_path / "run")
    monkeypatch.setattr("r1export.pipeline.train.write_json", write)
    monkeypatch.setattr("r1export.run_folder.write_file", write)
    for step in (
        lambda: open_run(tmp_path / "new", recipe, resume=False, overwrite=False),
        lambda: train_tasks(context),
    ):
        with pytest.raises(kind, match=f"cannot write .*: {os.strerror(number)}"):
            step()


def test_full_fine_tuning_is_refused_by_run_before_it_is_trained(recipe, tmp_path) -> None:
    full = recipe.model_copy(update={"train": recipe.train.model_copy(update={"method": "full"})})
    context = context_of(full, tmp_path / "run")
    with pytest.raises(Unsupported, match="use it with r1export train"):
        run_steps(context)
    assert [path.name for path in context.run.path.iterdir()] == ["recipe.toml"]


def test_a_gpu_that_is_not_there_is_unsupported() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_device("auto") == "cpu"
    with pytest.raises(Unsupported, match="--device cpu"):
        choose_device("cuda")


def test_tensorboard_is_an_extra_that_says_so_where_it_is_missing(recipe, tmp_path, monkeypatch) -> None:
    import sys

    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tensorboard": True})})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Unsupported, match=r"r1export\[tensorboard\]"):
        train_tasks(context_of(recipe, tmp_path / "run"))


def test_losses_and_accuracies_go_to_tensorboard(recipe, tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tensorboard": True})})
    train_tasks(context_of(recipe, tmp_path / "run"))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert len(board.Scalars("accuracy/digits")) == 2
