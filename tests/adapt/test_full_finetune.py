"""Full fine-tuning takes the same path as the experts."""

from dataclasses import replace

import numpy as np
from settings import TRAIN

from r1export.adapt.evaluate import accuracy
from r1export.adapt.full_finetune import difference, fine_tune_
from r1export.adapt.image_cache import Pixels
from r1export.adapt.trainer import TrainingTask


def test_a_fine_tuned_model_is_the_base_plus_its_update_and_learns(tiny_clip, stripes) -> None:
    base = {name: value.copy() for name, value in tiny_clip.parameters().items()}
    settings = replace(TRAIN, iterations=60, batch_size=8, learning_rate=2e-3, seed=1)
    train = Pixels(stripes.train, tiny_clip.preprocess)
    losses, update = fine_tune_(tiny_clip, TrainingTask(1, stripes, train, settings))
    tuned = tiny_clip.parameters()
    assert len(losses) == 60
    assert not any(parameter.requires_grad for parameter in tiny_clip.model.parameters())
    assert np.array_equal(base["logit_scale"], tuned["logit_scale"])
    assert "token_embedding.weight" in update.parameters
    merged = base | update.apply(base)
    assert max(np.abs(merged[name] - tuned[name]).max() for name in base) < 1e-6
    tiny_clip.load_(merged)
    assert accuracy(tiny_clip, stripes, Pixels(stripes.test, tiny_clip.preprocess)) > 0.9


def test_what_did_not_change_is_no_part_of_the_difference() -> None:
    old = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32), "c": np.ones((2, 1, 2, 2), np.float32)}
    update = difference(old, old | {"b": old["b"] * 2, "c": old["c"] * 3})
    assert update.parameters == ("b", "c")
    assert np.array_equal(update.apply(old)["c"], old["c"] * 3)
