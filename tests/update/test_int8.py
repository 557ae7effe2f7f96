"""Weights in int8: rounded the same way everywhere, and only once a version."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from r1export.errors import InputError
from r1export.update.int8 import dequantize, quantize

weights = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-4, 4, width=32))


@given(weights)
def test_no_weight_moves_by_more_than_half_a_step(weight):
    q, scale = quantize(weight)
    error = np.abs(weight.astype(np.float64) - dequantize(q, scale))
    assert (error <= scale[:, None] * (0.5 + 1e-5)).all()
    assert np.abs(q.astype(int)).max() <= 127


@given(weights)
def test_rows_do_not_influence_each_other(weight):
    whole = quantize(weight)
    for row in range(len(weight)):
        one = quantize(weight[row : row + 1])
        assert np.array_equal(one[0][0], whole[0][row])
        assert one[1][0] == whole[1][row]


def test_half_a_step_goes_to_the_even_level():
    q, scale = quantize(np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], "f4"))
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_row_of_zeros_or_of_almost_nothing_is_zero():
    q, scale = quantize(np.array([[0, 0], [1e-40, 0]], "f4"))
    assert not q.any()
    assert scale.tolist() == [1, 1]


def test_it_is_dequantize_linear_of_onnx():
    import onnx
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(0)
    q, scale = quantize(rng.standard_normal((5, 7)).astype("f4"))
    node = onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0)
    info = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in (("q", 3), ("s", 1), ("w", 1))]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", info[:2], info[2:]), opset_imports=[onnx.helper.make_opsetid("", 21)]
    )
    assert np.array_equal(ReferenceEvaluator(model).run(None, {"q": q, "s": scale})[0], dequantize(q, scale))


def test_types_and_shapes_that_do_not_fit_are_refused():
    q, scale = quantize(np.ones((2, 3), "f4"))
    for wrong in ((q.astype("i2"), scale), (q, scale[:1]), (q, scale.astype("f8")), (q, scale * np.float32("inf"))):
        with pytest.raises(InputError):
            dequantize(*wrong)
