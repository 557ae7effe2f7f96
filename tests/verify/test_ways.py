"""Of all ways of running a release, the one that errs most is named."""

import numpy as np

from r1export.verify.parity import Outputs
from r1export.verify.ways import Way, erring_ways, unlocated, worst_of

ZEROS = np.zeros((4, 3))
REFERENCE = Outputs((ZEROS,), (ZEROS,))
WAYS = [Way("cpu", "disable", 1), Way("cpu", "all", 0), Way("cuda", "all", 2)]


def moved(way: int, sample: int, by: float) -> Outputs:
    ways = [ZEROS.copy() for _ in WAYS]
    ways[0][1, 1] = 1e-6
    ways[way][sample, 2] = by
    return Outputs(tuple(ways), (ZEROS,) * len(WAYS))


def test_the_worst_names_the_provider_the_level_the_batch_size_and_the_sample() -> None:
    found = worst_of("visual", REFERENCE, moved(2, 3, -0.5), WAYS)
    assert (found.way, found.sample, found.error) == (WAYS[2], 3, 0.5)
    assert str(found) == "sample 3 of the visual tower on cuda at level all, batch size 2"
    assert str(worst_of("visual", REFERENCE, moved(1, 0, 0.5), WAYS)).endswith("cpu at level all, all inputs at once")


def test_what_is_not_a_number_or_has_another_shape_is_worst() -> None:
    assert worst_of("visual", REFERENCE, moved(2, 3, np.nan), WAYS).sample == 3
    other = Outputs((ZEROS, ZEROS[:, :2], ZEROS), (ZEROS,) * 3)
    assert worst_of("visual", REFERENCE, other, WAYS).way == WAYS[1]


def test_a_difference_that_only_the_optimiser_makes_is_told_from_one_that_adds_up() -> None:
    assert erring_ways("textual", REFERENCE, moved(1, 0, 0.5), WAYS, 1e-3) == []
    optimised = erring_ways("visual", REFERENCE, moved(1, 0, 0.5), WAYS, 1e-3)
    assert unlocated(optimised).endswith("the difference arises only at level all on cpu")
    assert "adds up over many" in unlocated(erring_ways("visual", REFERENCE, moved(1, 0, 0.5), WAYS, 1e-9))
