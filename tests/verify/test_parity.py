"""Parity fails closed, and says by how much."""

from dataclasses import replace
from itertools import pairwise
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import CheckFailed
from r1export.verify.parity import (
    GATES,
    Embeddings,
    ExecutionConfig,
    Gate,
    Inputs,
    Model,
    compare,
    erring_configs,
    run_in_batches,
    unlocated,
    worst_sample,
)  # fmt: skip
from r1export.verify.results import Parity, Verdict

RNG = np.random.default_rng(0)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


IMAGES, TEXTS = unit(RNG.normal(size=(8, 16))), unit(RNG.normal(size=(5, 16)))
REFERENCE = Embeddings(IMAGES, TEXTS)
CONFIGS = [ExecutionConfig("cpu", "disable", 1), ExecutionConfig("cpu", "all", 0), ExecutionConfig("cuda", "all", 2)]


def outputs(*embeddings: Embeddings) -> dict[ExecutionConfig, Embeddings]:
    """The same inputs in as many configurations as there are embeddings."""
    return dict(zip(CONFIGS, embeddings, strict=False))


def judged(
    candidate: Embeddings, gate: Gate, control: Parity | None = None, reference: Embeddings = REFERENCE, **more
) -> Parity:
    return compare(reference, outputs(candidate), gate, control, **more)


def moved(by: float) -> Embeddings:
    images = IMAGES.copy()
    images[2, 3] += by
    return Embeddings(images, TEXTS)


def passed(max_abs: float, min_cosine: float) -> Parity:
    """The parity of a base that passed."""
    limits = {"tolerance": 1.0, "min_cosine_required": -1.0}
    return Parity(verdict=Verdict.PASS, looked_at=1, of=1, max_abs=max_abs, min_cosine=min_cosine, **limits)


def test_equal_embeddings_pass_with_a_difference_of_exactly_zero() -> None:
    found = judged(REFERENCE, Gate())
    assert (found.verdict, found.max_abs, found.top1_agreement, found.flips) == ("pass", 0.0, 1.0, ())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tower", ["visual", "textual"])
def test_nan_and_infinity_fail_whatever_the_tolerance(value: float, tower: str) -> None:
    towers = {"visual": IMAGES.copy(), "textual": TEXTS.copy()}
    towers[tower][1, 0] = value
    wide = Gate(max_abs=1e30, min_cosine=-1, flip_margin=1e30)
    found = judged(Embeddings(**towers), wide)
    assert found.verdict == "fail"
    assert f"the {tower} tower gives NaN" in found.detail
    assert found.least_tolerance is None


def test_nan_on_both_sides_fails_too() -> None:
    broken = moved(np.nan)
    assert judged(broken, Gate(max_abs=1e30), reference=broken).verdict == "fail"


def test_a_zero_embedding_fails() -> None:
    zeros = Embeddings(IMAGES * 0, TEXTS)
    assert judged(zeros, Gate(max_abs=10, min_cosine=-0.5, flip_margin=10)).verdict == "fail"


def test_embeddings_of_another_width_fail() -> None:
    found = judged(Embeddings(IMAGES[:, :8], TEXTS[:, :8]), Gate(max_abs=10))
    assert (found.verdict, found.histogram) == ("fail", None)


def test_a_difference_just_inside_the_tolerance_passes_and_just_outside_fails() -> None:
    assert judged(moved(4e-5), Gate()).verdict == "pass"
    found = judged(moved(6e-5), Gate())
    assert found.verdict == "fail"
    assert "the visual tower differs by 6e-05, allowed 5e-05" in found.detail


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1e-2))
def test_the_least_tolerance_passes_and_anything_less_fails(by: float) -> None:
    lenient = {"min_cosine": -1.0, "flip_margin": 10.0}
    least = judged(moved(by), Gate(**lenient)).least_tolerance
    assert judged(moved(by), Gate(max_abs=least, **lenient)).verdict == "pass"
    assert judged(moved(by), Gate(max_abs=np.nextafter(least, 0), **lenient)).verdict == "fail"


def test_no_tolerance_would_pass_where_a_cosine_or_a_flip_fails_too() -> None:
    assert judged(moved(0.3), Gate(max_abs=1e-9)).least_tolerance is None
    one, other = undecided(2e-4)
    assert judged(other, Gate(max_abs=1e-9, min_cosine=0.5), reference=one).least_tolerance is None
    assert (
        judged(other, Gate(max_abs=1e-9, min_cosine=0.5, flip_margin=1e-3), reference=one).least_tolerance is not None
    )


def test_top_1_is_chosen_among_the_answers_alone() -> None:
    """The second text stands for the same class in other words; which of the two is nearer is no answer."""
    one, other = undecided(2e-4)
    lenient = Gate(max_abs=1, min_cosine=0.5)
    assert judged(other, lenient, reference=one).verdict == "fail"
    found = judged(other, lenient, reference=one, answers=1)
    assert (found.verdict, found.flips, found.top1_agreement, found.samples) == ("pass", (), 1.0, 3)


def test_the_worst_of_all_ways_of_running_decides() -> None:
    found = compare(REFERENCE, outputs(REFERENCE, moved(1e-3), REFERENCE), Gate())
    assert found.verdict == "fail"
    assert found.max_abs == pytest.approx(1e-3, rel=1e-3)


def undecided(margin: float) -> tuple[Embeddings, Embeddings]:
    """One image whose two best prompts differ by `margin`, before and after they change places."""
    texts = np.eye(4, dtype=np.float32)[:2]
    before, after = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    before[0, :2], after[0, :2] = (0.5 + margin, 0.5), (0.5, 0.5 + 1e-6)
    return Embeddings(before, texts), Embeddings(after, texts)


@pytest.mark.parametrize(("margin", "verdict"), [(0.5e-4, "pass"), (2e-4, "fail")])
def test_a_flip_is_forgiven_only_where_the_reference_hardly_preferred_its_class(margin: float, verdict: str) -> None:
    one, other = undecided(margin)
    found = judged(other, Gate(max_abs=1, min_cosine=0.5), reference=one)
    assert found.verdict == verdict
    assert [(flip.before, flip.after) for flip in found.flips] == [(0, 1)]
    assert found.flips[0].margin == pytest.approx(margin, rel=1e-2)


def test_the_control_widens_the_gate_fourfold_and_only_if_it_passed_itself() -> None:
    control = passed(4e-5, 1 - 1e-9)
    assert judged(moved(1e-4), Gate(), control).tolerance == pytest.approx(1.6e-4)
    assert judged(moved(1e-4), Gate(), control).verdict == "pass"
    assert judged(moved(1e-4), Gate(), replace(control, verdict=Verdict.FAIL)).verdict == "fail"
    assert judged(moved(1e-4), Gate(), replace(control, verdict=Verdict.INCONCLUSIVE)).verdict == "fail"
    assert judged(moved(1e-4), Gate(), passed(1e-9, 1.0)).tolerance == Gate().max_abs


def test_a_control_that_could_not_be_run_calibrates_nothing() -> None:
    assert Gate().calibrated(Parity.failed("it could not be run")) == Gate()


def test_coarser_precisions_have_wider_gates() -> None:
    order = [GATES[name] for name in ("fp32", "fp16", "int8")]
    for finer, coarser in pairwise(order):
        assert finer.max_abs < coarser.max_abs
        assert finer.min_cosine > coarser.min_cosine


def test_a_coarser_precision_is_compared_with_what_its_own_base_loses() -> None:
    gate = GATES["int8"].calibrated(passed(5e-3, 0.9998))
    assert (gate.max_abs, gate.min_cosine) == (pytest.approx(0.02), pytest.approx(0.9968))
    assert GATES["int8"].calibrated(passed(0.09, 0.975)) == GATES["int8"]


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_limits_that_somebody_else_states_never_make_a_gate_laxer(max_abs: float, min_cosine: float) -> None:
    gate = Gate().no_laxer_than(max_abs, min_cosine)
    assert gate.max_abs <= Gate().max_abs
    assert gate.min_cosine >= Gate().min_cosine


def test_a_comparison_of_nothing_does_not_pass() -> None:
    nothing = Embeddings(IMAGES[:0], TEXTS[:0])
    assert compare(REFERENCE, {}, Gate()).verdict == "fail"
    assert judged(nothing, Gate(), reference=nothing).verdict != "pass"


def test_fewer_samples_than_there_should_be_are_inconclusive() -> None:
    parity = judged(REFERENCE, Gate(), of=14)
    assert (parity.verdict, parity.looked_at, parity.of) == ("inconclusive", 13, 14)
    assert "looked at 13 of 14" in parity.detail


def model(encode) -> Model:
    return Model(encode, encode)


def test_every_input_is_encoded_once_per_batch_size() -> None:
    sizes = []

    def encode(values: np.ndarray) -> np.ndarray:
        sizes.append(len(values))
        return values

    configs = [ExecutionConfig("cpu", "all", batch) for batch in (1, 3, 0)]
    embeddings = run_in_batches(model(encode), Inputs(IMAGES, TEXTS), configs)
    assert list(embeddings) == configs
    assert all(np.array_equal(one.visual, IMAGES) for one in embeddings.values())
    assert sorted(sizes) == sorted([1] * 13 + [3, 3, 2, 3, 2] + [8, 5])


def test_no_batch_size_is_listed_that_is_larger_than_the_inputs() -> None:
    found = {ExecutionConfig("cpu", "all", batch): REFERENCE for batch in (3, 64, 0)}
    assert compare(REFERENCE, found, Gate()).batches == (3, 8)


def test_calls_of_several_workers_run_at_the_same_time_and_keep_their_order() -> None:
    together = Barrier(2, timeout=10)  # breaks unless two calls are inside

    def encode(values: np.ndarray) -> np.ndarray:
        together.wait()
        return values

    config = ExecutionConfig("cpu", "all", 1)
    found = run_in_batches(Model(encode, encode, workers=2), Inputs(IMAGES, TEXTS[:4]), [config])[config]
    assert np.array_equal(found.visual, IMAGES)
    assert np.array_equal(found.textual, TEXTS[:4])


def test_after_a_failure_no_further_batch_is_started() -> None:
    started = []

    def encode(values: np.ndarray) -> np.ndarray:
        started.append(len(values))
        raise CheckFailed("out of memory")

    with pytest.raises(CheckFailed, match="batch size 1: out of memory"):
        run_in_batches(model(encode), Inputs(np.zeros((10_000, 1)), TEXTS), [ExecutionConfig("cpu", "all", 1)])
    assert len(started) < 10_000


def test_a_batch_that_cannot_be_run_is_named() -> None:
    def encode(values: np.ndarray) -> np.ndarray:
        if len(values) > 1:
            raise CheckFailed("got invalid dimensions")
        return values

    with pytest.raises(CheckFailed, match="the visual tower fails at batch size 2: got invalid dimensions"):
        run_in_batches(model(encode), Inputs(IMAGES, TEXTS), [ExecutionConfig("cpu", "all", batch) for batch in (1, 2)])


def test_an_output_with_fewer_rows_than_inputs_is_refused() -> None:
    with pytest.raises(CheckFailed, match="4 embeddings for 8 inputs"):
        run_in_batches(model(lambda values: values[: len(values) // 2]), Inputs(IMAGES, TEXTS), CONFIGS[1:2])


def test_the_histogram_counts_every_difference_once() -> None:
    found = judged(moved(1e-3), Gate())
    assert sum(found.histogram.counts) == IMAGES.size + TEXTS.size


ZEROS = np.zeros((4, 3))
STILL = Embeddings(ZEROS, ZEROS)


def moved_in(config: int, sample: int, by: float) -> dict[ExecutionConfig, Embeddings]:
    """Zeros in all configurations but for a speck in the first and one large difference."""
    images = [ZEROS.copy() for _ in CONFIGS]
    images[0][1, 1] = 1e-6
    images[config][sample, 2] = by
    return outputs(*(Embeddings(one, ZEROS) for one in images))


def test_the_worst_names_the_provider_the_level_the_batch_size_and_the_sample() -> None:
    worst = worst_sample("visual", STILL, moved_in(2, 3, -0.5))
    assert (worst.config, worst.sample, worst.error) == (CONFIGS[2], 3, 0.5)
    assert str(worst) == "sample 3 of the visual tower on cuda at level all, batch size 2"
    assert str(worst_sample("visual", STILL, moved_in(1, 0, 0.5))).endswith("cpu at level all, all inputs at once")


def test_what_is_not_a_number_or_has_another_shape_is_worst() -> None:
    assert worst_sample("visual", STILL, moved_in(2, 3, np.nan)).sample == 3
    other = outputs(STILL, Embeddings(ZEROS[:, :2], ZEROS), STILL)
    assert worst_sample("visual", STILL, other).config == CONFIGS[1]


def test_a_difference_that_only_the_optimizer_makes_is_told_from_one_that_accumulates() -> None:
    assert erring_configs("textual", STILL, moved_in(1, 0, 0.5), 1e-3) == []
    optimized = erring_configs("visual", STILL, moved_in(1, 0, 0.5), 1e-3)
    assert unlocated(optimized).endswith("the difference occurs only at level all on cpu")
    assert "accumulates over many" in unlocated(erring_configs("visual", STILL, moved_in(1, 0, 0.5), 1e-9))
