"""Which experts have the most votes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from r1export.adapt.routing import top_experts


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 12))
def test_top_experts_have_the_most_votes_and_ties_go_to_the_lower_index(votes: list[int], k: int) -> None:
    k = min(k, len(votes))
    expected = sorted(sorted(range(len(votes)), key=lambda i: (-votes[i], i))[:k])
    assert top_experts(torch.tensor(votes), k).tolist() == expected
