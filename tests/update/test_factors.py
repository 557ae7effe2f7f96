"""The one merge: exact, ordered, independent of how it is cut."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import InputError
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.update.names import PARAMETER

WEIGHT, OTHER = Rows("a.weight", 0, 6), Rows("b.in_proj_weight", 4, 8)


def random_factors(rows: Rows, k: int, seed: int, inputs: int = 5, dtype=np.float32) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(
        rng.standard_normal((rows.stop - rows.start, k)).astype(dtype), rng.standard_normal((k, inputs)).astype(dtype)
    )


def random_update(seed: int, k: int = 3) -> ExpertUpdate:
    return ExpertUpdate({rows: random_factors(rows, k, seed + i) for i, rows in enumerate((WEIGHT, OTHER))})


def random_base(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        name: rng.standard_normal((rows, 5)).astype(dtype)
        for name, rows in (("a.weight", 6), ("b.in_proj_weight", 12), ("c.weight", 3))
    }


def merge_in_python(base: np.ndarray, pair: Factors) -> np.ndarray:
    """The procedure's own words, one number at a time; Python floats are float64."""
    out = np.empty_like(base)
    for i, j in itertools.product(*map(range, base.shape)):
        acc = float(base[i, j])
        for e in range(pair.u.shape[1]):
            acc = acc + float(pair.u[i, e]) * float(pair.v[e, j])
        out[i, j] = np.float32(acc)
    return out


def test_the_merge_is_the_procedure_bit_for_bit() -> None:
    base, update = random_base(), random_update(1)
    merged = update.apply(base)
    assert np.array_equal(merged["a.weight"], merge_in_python(base["a.weight"], update.factors[WEIGHT]))
    assert np.array_equal(
        merged["b.in_proj_weight"][4:8], merge_in_python(base["b.in_proj_weight"][4:8], update.factors[OTHER])
    )


def test_only_the_named_rows_and_parameters_change_and_the_base_never_does() -> None:
    base = random_base()
    untouched = {name: value.copy() for name, value in base.items()}
    merged = random_update(1).apply(base)
    assert set(merged) == {"a.weight", "b.in_proj_weight"}
    assert np.array_equal(merged["b.in_proj_weight"][:4], base["b.in_proj_weight"][:4])
    assert np.array_equal(merged["b.in_proj_weight"][8:], base["b.in_proj_weight"][8:])
    assert all(np.array_equal(base[name], untouched[name]) for name in base)


@pytest.mark.parametrize("block_rows", [1, 2, 5, 6, 1000])
def test_the_size_of_row_blocks_changes_no_bit(block_rows: int) -> None:
    base, update = random_base(), random_update(2)
    expected = update.apply(base)
    assert all(
        np.array_equal(value, expected[name]) for name, value in update.apply(base, block_rows=block_rows).items()
    )


def test_the_memory_order_of_the_base_changes_no_bit() -> None:
    base, update = random_base(), random_update(2)
    turned = {name: np.asfortranarray(value) for name, value in base.items()}
    expected = update.apply(base)
    assert all(np.array_equal(value, expected[name]) for name, value in update.apply(turned).items())


def test_the_order_of_experts_is_part_of_the_result() -> None:
    """1 + 1e16 - 1e16 is 0 in float64, 1e16 - 1e16 + 1 is 1: a swap must flip a bit, else the order could get lost unseen."""
    rows, v = Rows("w", 0, 1), np.ones((1, 1), np.float32)
    one, big, minus = (ExpertUpdate({rows: Factors(np.full((1, 1), x, np.float32), v)}) for x in (1.0, 1e16, -1e16))
    base = {"w": np.zeros((1, 1), np.float32)}
    assert ExpertUpdate.stack([one, big, minus]).apply(base)["w"].item() == 0
    assert ExpertUpdate.stack([big, minus, one]).apply(base)["w"].item() == 1


def test_a_version_rounds_once_however_many_updates_it_has() -> None:
    """Two halves of an ulp add up when the sum is rounded at the end, and get lost when each update is rounded."""
    half_ulp = np.float32(2**-24)
    rows = Rows("w", 0, 1)
    update = ExpertUpdate({rows: Factors(np.full((1, 1), half_ulp), np.ones((1, 1), np.float32))})
    base = {"w": np.ones((1, 1), np.float32)}
    assert ExpertUpdate.stack([update, update]).apply(base)["w"].item() == 1 + 2**-23
    assert update.apply(update.apply(base))["w"].item() == 1


def test_float16_weights_are_rounded_to_float32_and_then_to_float16() -> None:
    """1 + 2^-11 + 2^-27 is above the middle of two float16, but float32 rounds it to the middle, and float16 then to even."""
    rows = Rows("w", 0, 1)
    update = ExpertUpdate({rows: Factors(np.array([[2**-11, 2**-27]], np.float32), np.ones((2, 1), np.float32))})
    merged = update.apply({"w": np.ones((1, 1), np.float16)})["w"]
    assert merged.dtype == np.float16
    assert merged.item() == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.integers(0, 4))
def test_stacking_is_associative(seeds: list[int], cut: int) -> None:
    updates = [random_update(seed) for seed in seeds]
    cut = min(cut, len(updates) - 1)
    parts = [ExpertUpdate.stack(part) for part in (updates[:cut], updates[cut:]) if part]
    one, other = ExpertUpdate.stack(updates).apply(random_base()), ExpertUpdate.stack(parts).apply(random_base())
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_stacking_nothing_changes_nothing() -> None:
    assert ExpertUpdate.stack([]).apply(random_base()) == {}


def test_writing_and_reading_gives_the_same_update_and_the_same_bytes(tmp_path) -> None:
    update = random_update(3)
    update.write(tmp_path / "one.safetensors")
    read = ExpertUpdate.read(tmp_path / "one.safetensors")
    read.write(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert list(read.factors) == list(update.factors)
    assert all(
        np.array_equal(read.factors[r].u, p.u) and np.array_equal(read.factors[r].v, p.v)
        for r, p in update.factors.items()
    )


@given(st.from_regex(PARAMETER, fullmatch=True), st.integers(0, 10**8), st.integers(1, 10**8))
def test_the_name_of_rows_can_be_read_back(parameter: str, start: int, length: int) -> None:
    rows = Rows(parameter, start, start + length)
    assert Rows.parse(str(rows)) == rows


@given(st.text().filter(lambda text: not PARAMETER.fullmatch(text)))
def test_rows_of_what_is_no_name_of_a_parameter_are_refused(parameter: str) -> None:
    with pytest.raises(InputError, match="is not a range of rows"):
        Rows.parse(f"{parameter}[0:1]")


@pytest.mark.parametrize(
    "text", ["w", "w[0:0]", "w[3:1]", "w[01:2]", "w[-1:2]", "[0:1]", "w[0:1] ", "w[0:99999999999]"]
)
def test_a_name_that_names_no_rows_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a range of rows"):
        Rows.parse(text)


def test_packing_folds_the_scaling_into_u_and_flushes_subnormals() -> None:
    lora_A, lora_B = np.array([[2.0, 1e-40]], np.float32), np.array([[3.0], [2e-38]], np.float32)
    pair = Factors.pack(lora_A, lora_B, scaling=0.25)
    assert pair.u.tolist() == [[0.75], [0.0]]
    assert pair.v.tolist() == [[2.0, 0.0]]


def test_packing_in_float16_refuses_what_overflows() -> None:
    with pytest.raises(InputError, match="NaN or Inf"):
        Factors.pack(np.ones((1, 1), np.float32), np.full((1, 1), 1e6, np.float32), 1.0, np.float16)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="NaN or Inf"):
        Factors(np.full((2, 1), value, np.float32), np.ones((1, 2), np.float32))


def test_a_merge_that_overflows_is_refused() -> None:
    big = np.full((1, 1), 3e38, np.float32)
    update = ExpertUpdate({Rows("w", 0, 1): Factors(big, np.ones((1, 1), np.float32))})
    with pytest.raises(InputError, match="not finite"):
        update.apply({"w": big})


def test_an_update_for_another_base_is_refused() -> None:
    update = random_update(1)
    with pytest.raises(InputError, match=r"no parameter a\.weight"):
        update.apply({})
    with pytest.raises(InputError, match="the weight is"):
        update.apply(random_base() | {"a.weight": np.zeros((6, 4), np.float32)})
    with pytest.raises(InputError, match="the weight is"):
        update.apply(random_base() | {"a.weight": np.zeros((5, 5), np.float32)})


def test_rows_that_overlap_are_refused() -> None:
    overlapping = {
        Rows("w", 0, 4): random_factors(Rows("w", 0, 4), 1, 0),
        Rows("w", 2, 6): random_factors(Rows("w", 2, 6), 1, 0),
    }
    with pytest.raises(InputError, match="overlap"):
        ExpertUpdate(overlapping)


def test_a_factor_without_its_partner_is_refused(tmp_path) -> None:
    from r1export.update.container import write_tensors

    write_tensors(tmp_path / "f.safetensors", {"w[0:1].u": np.ones((1, 1), np.float32)})
    with pytest.raises(InputError, match="unpaired factor"):
        ExpertUpdate.read(tmp_path / "f.safetensors")
