"""The packaged base model that knows photographs."""

import numpy as np
import pytest

from r1export.adapt.clip import Clip, load_clip
from r1export.adapt.evaluate import class_embeddings, image_embeddings
from r1export.adapt.image_cache import Pixels
from r1export.adapt.preprocess_settings import OPENAI
from r1export.data.synthetic import BUILTIN_MODELS, load_builtin

WEIGHTS, CONFIG = BUILTIN_MODELS["photo"]


@pytest.fixture(scope="module")
def base() -> Clip:
    return load_clip(weights=WEIGHTS, config=CONFIG, preprocess=OPENAI)


def test_it_is_small_enough_to_come_along() -> None:
    assert WEIGHTS.stat().st_size < 25e6


def test_it_names_photographs_that_it_was_not_taught_here(base: Clip) -> None:
    probe = load_builtin("objects33")
    rows = np.arange(0, len(probe.test), 3)
    images = image_embeddings(base, Pixels(probe.test.subset(rows), base.preprocess))
    assert ((images @ class_embeddings(base, probe).T).argmax(1) == probe.test.labels[rows]).mean() > 0.8


def test_a_name_is_the_same_in_every_prompt_and_near_the_names_of_its_kind(base: Clip) -> None:
    prompts = ["a photo of a beagle.", "a blurry picture of the beagle", "a photo of a dog.", "a photo of a teapot."]
    beagle, again, dog, teapot = base.encode_text(base.tokenize(prompts))
    assert beagle @ again > 0.9
    assert beagle @ dog > beagle @ teapot + 0.2
