"""onnx.reference, the operators of the specification as numpy code, through the same sessions."""

import numpy as np
import pytest

from r1export.errors import CheckFailed
from r1export.verify.runtimes.runtime import PROVIDERS, open_session, runner


def test_the_specification_gives_what_onnxruntime_gives(write_graph, x) -> None:
    graph = write_graph("base")
    one, other = (runner(open_session(graph, provider=provider))(x) for provider in ("cpu", "reference"))
    assert np.abs(one - other).max() < 1e-5  # float32 rounding of values of order one through a norm
    assert PROVIDERS["reference"].levels == ("all",)


def test_what_it_refuses_is_a_failed_check(write_graph, tmp_path) -> None:
    with pytest.raises(CheckFailed, match=r"onnx\.reference rejects the model"):
        open_session(tmp_path / "none.onnx", provider="reference")
    with pytest.raises(CheckFailed, match=r"the runtime fails to run y \[2, 6\]"):
        runner(open_session(write_graph("base"), provider="reference"))({"y": np.zeros((2, 6), np.float32)})
