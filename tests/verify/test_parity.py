"""Parity fails closed, and says by how much."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import CheckFailed
from r1export.verify.parity import GATES, Gate, Inputs, Model, Outputs, compare, run_in_batches

RNG = np.random.default_rng(0)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


IMAGES, TEXTS = unit(RNG.normal(size=(8, 16))), unit(RNG.normal(size=(5, 16)))
REFERENCE = Outputs((IMAGES,), (TEXTS,))


def moved(by: float) -> Outputs:
    images = IMAGES.copy()
    images[2, 3] += by
    return Outputs((images,), (TEXTS,))


def test_equal_embeddings_pass_with_a_difference_of_exactly_zero() -> None:
    found = compare(REFERENCE, REFERENCE, Gate())
    assert (found["verdict"], found["max_abs"], found["top1_agreement"], found["flips"]) == ("pass", 0.0, 1.0, [])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tower", ["visual", "textual"])
def test_nan_and_infinity_fail_whatever_the_tolerance(value: float, tower: str) -> None:
    outputs = {"visual": IMAGES.copy(), "textual": TEXTS.copy()}
    outputs[tower][1, 0] = value
    wide = Gate(max_abs=1e30, min_cosine=-1, flip_margin=1e30)
    found = compare(REFERENCE, Outputs((outputs["visual"],), (outputs["textual"],)), wide)
    assert found["verdict"] == "fail"
    assert f"the {tower} tower gives NaN" in found["detail"]
    assert found["least_tolerance"] is None


def test_nan_on_both_sides_fails_too() -> None:
    broken = moved(np.nan)
    assert compare(broken, broken, Gate(max_abs=1e30))["verdict"] == "fail"


def test_a_zero_embedding_fails() -> None:
    zeros = Outputs((IMAGES * 0,), (TEXTS,))
    assert compare(REFERENCE, zeros, Gate(max_abs=10, min_cosine=-0.5, flip_margin=10))["verdict"] == "fail"


def test_embeddings_of_another_width_fail() -> None:
    found = compare(REFERENCE, Outputs((IMAGES[:, :8],), (TEXTS[:, :8],)), Gate(max_abs=10))
    assert (found["verdict"], found["histogram"]) == ("fail", None)


def test_a_difference_just_inside_the_tolerance_passes_and_just_outside_fails() -> None:
    assert compare(REFERENCE, moved(4e-5), Gate())["verdict"] == "pass"
    found = compare(REFERENCE, moved(6e-5), Gate())
    assert found["verdict"] == "fail"
    assert "the visual tower errs by 6e-05, allowed 5e-05" in found["detail"]


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1e-2))
def test_the_least_tolerance_passes_and_anything_less_fails(by: float) -> None:
    lenient = {"min_cosine": -1.0, "flip_margin": 10.0}
    least = compare(REFERENCE, moved(by), Gate(**lenient))["least_tolerance"]
    assert compare(REFERENCE, moved(by), Gate(max_abs=least, **lenient))["verdict"] == "pass"
    assert compare(REFERENCE, moved(by), Gate(max_abs=np.nextafter(least, 0), **lenient))["verdict"] == "fail"


def test_no_tolerance_would_pass_where_a_cosine_or_a_flip_fails_too() -> None:
    assert compare(REFERENCE, moved(0.3), Gate(max_abs=1e-9))["least_tolerance"] is None
    one, other = undecided(2e-4)
    assert compare(one, other, Gate(max_abs=1e-9, min_cosine=0.5))["least_tolerance"] is None
    assert compare(one, other, Gate(max_abs=1e-9, min_cosine=0.5, flip_margin=1e-3))["least_tolerance"] is not None


def test_top_1_is_chosen_among_the_answers_alone() -> None:
    """The second text stands for the same class in other words; which of the two is nearer is no answer."""
    one, other = undecided(2e-4)
    lenient = Gate(max_abs=1, min_cosine=0.5)
    assert compare(one, other, lenient)["verdict"] == "fail"
    found = compare(one, other, lenient, answers=1)
    assert (found["verdict"], found["flips"], found["top1_agreement"], found["samples"]) == ("pass", [], 1.0, 3)


def test_the_worst_of_all_ways_of_running_decides() -> None:
    found = compare(REFERENCE, Outputs.join([REFERENCE, moved(1e-3), REFERENCE]), Gate())
    assert found["verdict"] == "fail"
    assert found["max_abs"] == pytest.approx(1e-3, rel=1e-3)


def undecided(margin: float) -> tuple[Outputs, Outputs]:
    """One image whose two best prompts differ by `margin`, before and after they change places."""
    texts = np.eye(4, dtype=np.float32)[:2]
    before, after = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    before[0, :2], after[0, :2] = (0.5 + margin, 0.5), (0.5, 0.5 + 1e-6)
    return Outputs((before,), (texts,)), Outputs((after,), (texts,))


@pytest.mark.parametrize(("margin", "verdict"), [(0.5e-4, "pass"), (2e-4, "fail")])
def test_a_flip_is_forgiven_only_where_the_reference_hardly_preferred_its_class(margin: float, verdict: str) -> None:
    one, other = undecided(margin)
    found = compare(one, other, Gate(max_abs=1, min_cosine=0.5))
    assert found["verdict"] == verdict
    assert [(flip["from"], flip["to"]) for flip in found["flips"]] == [(0, 1)]
    assert found["flips"][0]["margin"] == pytest.approx(margin, rel=1e-2)


def test_the_control_widens_the_gate_fourfold_and_only_if_it_passed_itself() -> None:
    control = {"max_abs": 4e-5, "min_cosine": 1 - 1e-9, "verdict": "pass"}
    assert compare(REFERENCE, moved(1e-4), Gate(), control)["tolerance"] == pytest.approx(1.6e-4)
    assert compare(REFERENCE, moved(1e-4), Gate(), control)["verdict"] == "pass"
    assert compare(REFERENCE, moved(1e-4), Gate(), control | {"verdict": "fail"})["verdict"] == "fail"
    assert (
        compare(REFERENCE, moved(1e-4), Gate(), {"max_abs": 1e-9, "min_cosine": 1.0, "verdict": "pass"})["tolerance"]
        == Gate().max_abs
    )


def test_a_control_that_could_not_be_run_calibrates_nothing() -> None:
    assert Gate().calibrated({"verdict": "fail", "max_abs": None, "min_cosine": None}) == Gate()


def test_coarser_precisions_have_wider_gates() -> None:
    order = [GATES[name] for name in ("fp32", "fp16", "bf16", "int8")]
    for finer, coarser in pairwise(order):
        assert finer.max_abs < coarser.max_abs
        assert finer.min_cosine > coarser.min_cosine


def test_a_coarser_precision_is_held_to_what_its_own_base_loses() -> None:
    control = {"max_abs": 5e-3, "min_cosine": 0.9998, "verdict": "pass"}
    asked = GATES["int8"].calibrated(control)
    assert (asked.max_abs, asked.min_cosine) == (pytest.approx(0.02), pytest.approx(0.9968))
    poor = {"max_abs": 0.09, "min_cosine": 0.975, "verdict": "pass"}
    assert GATES["int8"].calibrated(poor) == GATES["int8"]


def model(encode) -> Model:
    return Model(encode, encode)


def test_every_input_is_encoded_once_per_batch_size() -> None:
    sizes = []

    def encode(values: np.ndarray) -> np.ndarray:
        sizes.append(len(values))
        return values

    outputs = run_in_batches(model(encode), Inputs(IMAGES, TEXTS), (1, 3, 0))
    assert all(np.array_equal(way, IMAGES) for way in outputs.visual)
    assert sizes[:12] == [1] * 8 + [3, 3, 2] + [8]


def test_a_batch_that_cannot_be_run_is_named() -> None:
    def encode(values: np.ndarray) -> np.ndarray:
        if len(values) > 1:
            raise CheckFailed("got invalid dimensions")
        return values

    with pytest.raises(CheckFailed, match="the visual tower fails at batch size 2: got invalid dimensions"):
        run_in_batches(model(encode), Inputs(IMAGES, TEXTS), (1, 2))


def test_an_output_with_fewer_rows_than_inputs_is_refused() -> None:
    with pytest.raises(CheckFailed, match="4 embeddings for 8 inputs"):
        run_in_batches(model(lambda values: values[: len(values) // 2]), Inputs(IMAGES, TEXTS), (0,))


def test_the_histogram_counts_every_difference_once() -> None:
    found = compare(REFERENCE, moved(1e-3), Gate())
    assert sum(found["histogram"]["counts"]) == IMAGES.size + TEXTS.size
