"""The report shows pictures with the answers before and after: those that the two models really give."""

import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from r1export.adapt.evaluate import class_embeddings, image_embeddings
from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.train import train_tasks
from r1export.pipeline.verification.examples import COUNT, SIDE, examples
from r1export.recipe import Recipe
from r1export.run_folder import open_run


@pytest.fixture
def trained(tiny_files, tmp_path) -> RunContext:
    recipe = Recipe.model_validate(
        {
            "base": {"weights": str(tiny_files[0]), "config": str(tiny_files[1])},
            "tasks": [{"name": "digits", "source": "builtin:digits"}],
            "probe": {"source": "builtin:objects33"},
            "data": {"shots": 2, "test_limit": 40},
            "train": {"iterations": 10, "learning_rate": 2e-2},
            "pool": {"alpha": 12.0},
        }
    )
    context = RunContext(open_run(tmp_path / "run", recipe, resume=True, overwrite=False), recipe, "cpu", NoProgress())
    train_tasks(context)
    return context


def test_answers_are_those_of_the_base_model_and_of_the_last_release(trained: RunContext) -> None:
    task, pixels = trained.tasks[0], trained.tests["digits"]
    chosen = np.sort(np.random.default_rng(trained.recipe.train.seed).permutation(len(task.test))[:COUNT])
    shown = [example for example in examples(trained, trained.run.updates(trained.recipe)) if example.task == "digits"]

    def answers() -> list[str]:
        similar = image_embeddings(trained.clip, pixels)[chosen] @ class_embeddings(trained.clip, task).T
        return [task.classes[i] for i in similar.argmax(1)]

    assert [example.before.name for example in shown] == answers()
    with trained.with_updates_applied(trained.run.updates(trained.recipe)):
        assert [example.after.name for example in shown] == answers()
    assert [example.before for example in shown] != [example.after for example in shown]
    assert [example.name for example in shown] == [task.classes[label] for label in task.test.labels[chosen]]


def test_every_task_and_the_probe_show_small_pictures(trained: RunContext) -> None:
    shown = examples(trained, [])
    assert [example.task for example in shown] == ["digits"] * COUNT + ["probe"] * COUNT
    for example in shown:
        picture = Image.open(BytesIO(base64.b64decode(example.picture)))
        assert (picture.format, max(picture.size) <= SIDE) == ("WEBP", True)
        assert 0 < example.before.probability <= 1
