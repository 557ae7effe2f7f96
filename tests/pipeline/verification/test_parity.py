"""Parity of a run of two tasks: on the inputs of each task, against a control on the same inputs, and located where it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import context_of, trained_run

from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification import parity as release_parity
from r1export.pipeline.verification.inputs import every_prompt, parity_inputs
from r1export.pipeline.verification.parity import TorchRun, base_control
from r1export.pipeline.verification.run import verify_run
from r1export.pipeline.verification.torch_models import TorchModels, torch_models
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
    recipe = RECIPE.format(*(path.as_posix() for path in tiny_files))
    return trained_run(tmp_path_factory.mktemp("parity"), recipe, "train.iterations=2")


@pytest.fixture
def variant(run: Path) -> Variant:
    return Variant(context_of(run), "fp32")


def torch_run(variant: Variant, models: TorchModels, task: int) -> TorchRun:
    return TorchRun(variant.context, models, variant.context.tasks[task])


def test_the_control_of_every_task_is_the_base_on_that_tasks_inputs(variant: Variant) -> None:
    base, first, second = (r.parity.export for r in verify_run(variant.context, budget=None).releases)
    assert first.control.max_abs == base.max_abs
    with torch_models(variant.context, 0, []) as models:
        expected = base_control(variant.release(0), torch_run(variant, models, 1), ("cpu",))
    assert second.control.max_abs == expected.max_abs != base.max_abs
    assert expected.verdict == "pass"


def test_a_base_that_cannot_be_run_is_a_control_that_failed(variant: Variant, tmp_path: Path) -> None:
    with torch_models(variant.context, 0, []) as models:
        control = base_control(replace(variant.release(0), path=tmp_path), torch_run(variant, models, 1), ("cpu",))
    assert (control.verdict, control.max_abs) == ("fail", None)


def failing(variant: Variant, monkeypatch: pytest.MonkeyPatch, *, level: str, batch: int, sample: int) -> str:
    """The detail of export parity of release 1 where one execution configuration errs on one image."""
    sound = release_parity.onnx_model
    updates = variant.context.run.updates(variant.context.recipe)[:1]
    with torch_models(variant.context, 1, updates) as models:
        run = torch_run(variant, models, 0)
        wanted = run.inputs.visual[sample]

        def faulty(path: Path, *, level: str = "all", provider: str = "cpu", wrong: str = level) -> parity.Model:
            model = sound(path, level=level, provider=provider)

            def visual(values: np.ndarray) -> np.ndarray:
                embeddings = model.visual(values)
                if level == wrong and len(values) == batch:
                    embeddings[[np.array_equal(value, wanted) for value in values]] += 1e-2
                return embeddings

            return parity.Model(visual, model.textual)

        monkeypatch.setattr(release_parity, "onnx_model", faulty)
        stages = release_parity.release_parity(variant.release(1, updates), run, None, ("cpu",))
    assert stages.export.verdict == stages.total.verdict == "fail"
    assert "worst: sample" in stages.total.detail
    return stages.export.detail


def test_a_failed_parity_names_the_worst_configuration_and_the_sample(variant: Variant, monkeypatch) -> None:
    detail = failing(variant, monkeypatch, level="basic", batch=2, sample=4)
    assert "worst: sample 4 of the visual tower on cpu at level basic, batch size 2" in detail
    assert "visual.onnx: nothing diverges without the optimizer on cpu" in detail
    assert detail.endswith("the difference occurs only at level basic on cpu")


def test_the_worst_sample_is_the_one_that_is_located(variant: Variant, monkeypatch) -> None:
    looked_at = {}
    monkeypatch.setattr(release_parity, "locate", lambda _, feeds, *__: looked_at.update(feeds))
    failing(variant, monkeypatch, level="all", batch=8, sample=7)
    inputs = parity_inputs(variant.context, variant.context.tasks[0])
    assert np.array_equal(looked_at["pixel_values"], inputs.visual[[7, 0]])


def test_fewer_inputs_than_the_recipe_asks_for_are_inconclusive(variant: Variant, monkeypatch) -> None:
    with torch_models(variant.context, 0, []) as models:
        run = torch_run(variant, models, 0)
        half = parity.Inputs(run.inputs.visual[:4], run.inputs.textual[:4])
        monkeypatch.setattr(release_parity, "parity_inputs", lambda *_: half)
        control = base_control(variant.release(0), torch_run(variant, models, 0), ("cpu",))
    assert (control.verdict, control.looked_at, control.of) == ("inconclusive", 8, 16)


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
