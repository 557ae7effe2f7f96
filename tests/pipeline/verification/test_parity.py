"""Parity of a run of two tasks: on the inputs of each task, against a control on the same inputs, and located where it fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import SETTINGS, r1export

from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification import parity as release_parity
from r1export.pipeline.verification.inputs import every_prompt, parity_inputs
from r1export.pipeline.verification.parity import TorchOutputs, onnx_parity
from r1export.pipeline.verification.torch_models import torch_models
from r1export.run_folder import RunFolder
from r1export.verify import parity

RECIPE = """[base]
weights = "{}"
config = "{}"
[[tasks]]
name = "digits"
source = "builtin:digits"
[[tasks]]
name = "arrows"
source = "builtin:arrows"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_files) -> Path:
    folder = tmp_path_factory.mktemp("comparing")
    (folder / "recipe.toml").write_text(RECIPE.format(*(path.as_posix() for path in tiny_files)))
    settings = (*SETTINGS, "train.iterations=2")
    sets = [part for setting in settings for part in ("--set", setting)]
    for command in (("train", folder / "recipe.toml", "--out", folder / "run", *sets), ("export", folder / "run")):
        done = r1export(*command)
        assert done.returncode == 0, done.output
    return folder / "run"


@pytest.fixture
def form(run: Path) -> Variant:
    return Variant(RunContext(RunFolder(run), RunFolder(run).recipe(), "cpu", NoProgress()), "fp32")


def test_the_control_of_every_task_is_the_base_on_that_tasks_inputs(run: Path, variant: Variant, monkeypatch) -> None:
    monkeypatch.setattr("r1export.verify.latency.PATIENCE", 0.0)
    monkeypatch.setattr("r1export.verify.latency.BLOCKS", 3)
    done = r1export("verify", run)
    assert done.returncode in (0, 4), done.output
    base, first, second = (r["parity"]["export"] for r in json.loads((run / "report.json").read_text())["releases"])
    assert first["control"]["max_abs"] == base["max_abs"]
    path = run / "releases" / "00-base"
    outputs = TorchOutputs(variant.context, parity_inputs(variant.context, variant.context.tasks[1]))
    with torch_models(variant.context, 0, []) as models:
        expected = parity.base_control(variant, path, outputs, models, ("cpu",))
    assert second["control"]["max_abs"] == expected["max_abs"] != base["max_abs"]
    assert expected["verdict"] == "pass"


def test_a_base_that_cannot_be_run_is_a_control_that_failed(variant: Variant, tmp_path: Path) -> None:
    outputs = TorchOutputs(variant.context, parity_inputs(variant.context, variant.context.tasks[1]))
    with torch_models(variant.context, 0, []) as models:
        assert parity.base_control(variant, tmp_path, outputs, models, ("cpu",))["verdict"] == "fail"


def failing(variant: Variant, monkeypatch: pytest.MonkeyPatch, *, level: str, batch: int, sample: int) -> str:
    """What is said of release 1 where one way of running it errs on one image."""
    outputs = TorchOutputs(variant.context, parity_inputs(variant.context, variant.context.tasks[0]))
    wanted, sound = outputs.inputs.visual[sample], parity._onnx

    def faulty(path: Path, asked: str, provider: str) -> parity.Model:
        model = sound(path, asked, provider)

        def visual(values: np.ndarray) -> np.ndarray:
            found = model.visual(values)
            if asked == level and len(values) == batch:
                found[[np.array_equal(value, wanted) for value in values]] += 1e-2
            return found

        return parity.Model(visual, model.textual)

    monkeypatch.setattr(release_parity, "_onnx", faulty)
    updates = variant.context.run.updates(variant.context.recipe)[:1]
    with torch_models(variant.context, 1, updates) as models:
        found = onnx_parity(
            variant, variant.exports.releases(variant.context.recipe)[1], outputs, models, None, ("cpu",)
        )
    assert found["export"]["verdict"] == found["total"]["verdict"] == "fail"
    assert "worst: sample" in found["total"]["detail"]
    return found["export"]["detail"]


def test_a_failed_parity_names_the_worst_way_of_running_and_the_sample(variant: Variant, monkeypatch) -> None:
    said = failing(variant, monkeypatch, level="basic", batch=2, sample=4)
    assert "worst: sample 4 of the visual tower on cpu at level basic, batch size 2" in said
    assert "visual.onnx: nothing diverges without the optimiser on cpu" in said
    assert said.endswith("the difference arises only at level basic on cpu")


def test_the_worst_sample_is_the_one_that_is_located(variant: Variant, monkeypatch) -> None:
    looked_at = {}
    monkeypatch.setattr(release_parity, "locate", lambda _, feeds, *__: looked_at.update(feeds))
    failing(variant, monkeypatch, level="all", batch=8, sample=7)
    inputs = parity_inputs(variant.context, variant.context.tasks[0])
    assert np.array_equal(looked_at["pixel_values"], inputs.visual[[7, 0]])


def test_there_are_as_many_prompts_as_images_and_the_first_are_one_of_every_class(variant: Variant, run: Path) -> None:
    task = variant.context.tasks[1]
    recipe = variant.context.recipe
    many = recipe.model_copy(update={"verify": recipe.verify.model_copy(update={"samples": 50})})
    inputs = parity_inputs(RunContext(RunFolder(run), many, "cpu", NoProgress()), task)
    assert len(inputs.textual) == len(inputs.visual) == 50
    assert inputs.answers == len(task.classes) < 50
    assert len(np.unique(inputs.textual, axis=0)) == min(50, len(set(every_prompt(task))))
    few = parity_inputs(variant.context, variant.context.tasks[0])
    assert (len(few.textual), few.answers) == (8, 8)


def test_every_class_is_there_in_every_template(stripes) -> None:
    prompts = every_prompt(stripes)
    assert sorted(prompts) == sorted(t.format(name) for t in stripes.templates for name in stripes.classes)
    assert [next(name for name in stripes.classes if name in prompt) for prompt in prompts] == [*stripes.classes] * 2
