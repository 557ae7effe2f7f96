"""Who votes, who acts, what is frozen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from settings import POOL

from r1export.adapt.pool import ExpertPool, TowerInputs, add_experts_, drop, routed
from r1export.adapt.routing import Batch, Frozen, PerSample


def make_pool(**changes) -> ExpertPool:
    torch.manual_seed(0)
    settings = replace(POOL, **({"rank": 4, "k_train": 2, "k_merge": 1, "dropout": 0.0} | changes))
    pool = ExpertPool(torch.empty(5, 6, dtype=torch.float64), settings)
    pool.reset_(torch.Generator().manual_seed(1))
    torch.nn.init.normal_(pool.lora_B)
    return pool


def test_each_sample_votes_for_k_train_experts_by_its_first_token_alone() -> None:
    pool = make_pool().train()
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    pool(x)
    probabilities = pool.router(x[:, 0]).softmax(-1)
    expected = sum(F.one_hot(row.topk(2).indices, 4).sum(0) for row in probabilities)
    assert pool.counts.tolist() == expected.tolist()
    before = pool.counts.clone()
    pool(torch.cat([x[:, :1], torch.randn(7, 9, 6, dtype=torch.float64)], 1))
    assert torch.equal(pool.counts, 2 * before)


def test_the_whole_batch_uses_the_experts_with_the_most_votes_unweighted() -> None:
    pool = make_pool().train()
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    gate = pool.eval().gate(pool.token(x), Batch())
    assert gate.sum() == 2
    assert set(gate.tolist()) == {0.0, 1.0}
    dense = pool.settings.scaling * pool.lora_B @ torch.diag(gate) @ pool.lora_A
    torch.testing.assert_close(pool(x), x @ dense.T, atol=1e-12, rtol=0)


def test_evaluation_counts_no_votes() -> None:
    pool = make_pool().eval()
    pool(torch.randn(3, 2, 6, dtype=torch.float64))
    assert pool.counts.sum() == 0


def test_a_frozen_pool_ignores_the_input_and_uses_the_selected_experts() -> None:
    pool = make_pool(k_merge=2).train()
    pool.counts[:] = torch.tensor([3, 9, 9, 1])
    pool.freeze_()
    assert pool.routing.gate.tolist() == [0, 1, 1, 0]
    chosen = pool.selected()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = pool.settings.scaling * (x @ pool.lora_A[chosen].T) @ pool.lora_B[:, chosen].T
    torch.testing.assert_close(pool(x), expected, atol=1e-12, rtol=0)
    assert pool.counts.tolist() == [3, 9, 9, 1]


def test_dropout_acts_in_training_only_and_never_on_a_frozen_pool() -> None:
    pool = make_pool(dropout=0.5).train()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert not torch.equal(pool(x), pool(x))
    pool.freeze_()
    assert torch.equal(pool(x), pool(x))


@pytest.mark.parametrize("p", [0.2, 0.5, 0.01, 0.999999])
def test_dropped_elements_are_as_many_as_asked_for_and_the_rest_is_as_it_was(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1001, 101, requires_grad=True)
    dropped, kept = drop(x, p)
    stays = dropped != 0
    assert kept == pytest.approx(1 - p, abs=2**-16)
    assert stays.float().mean().item() == pytest.approx(kept, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert torch.equal(dropped[stays], x[stays])
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient != 0, stays)


def test_where_nothing_is_dropped_no_random_number_is_drawn() -> None:
    x, state = torch.randn(2, 3), torch.random.get_rng_state()
    dropped, kept = drop(x, 0.0)
    assert dropped is x
    assert kept == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropped_elements_follow_from_the_seed_and_are_independent_of_their_neighbours() -> None:
    x = torch.ones(2, 200_003)
    first, second, other = (torch.manual_seed(seed) and drop(x, 0.5)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    for lag in (1, 2, 3, 4, 8):
        both = (first[:, lag:] * first[:, :-lag]).mean().item()
        assert both == pytest.approx(0.25, abs=0.005)


def test_a_pool_with_dropout_adds_the_same_on_average() -> None:
    pool, x = make_pool(dropout=0.3), torch.randn(1, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        pool.router.weight.zero_()  # the same experts, whatever is dropped
        pool.router.bias.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        expected = pool.eval()(x)
        mean = torch.stack([pool.train()(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("routing", ["batch", "frozen"])
def test_pools_with_the_same_input_add_to_what_the_linear_gives_as_each_alone_would(routing: str) -> None:
    first, last = make_pool().train(), make_pool(rank=3).train()
    if routing == "frozen":
        first.freeze_(), last.freeze_()
    x, y = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(12, 14, dtype=torch.float64)
    added = torch.cat([first(x), torch.zeros(4, 3, 4, dtype=torch.float64), last(x)], -1).view(12, 14)
    expected = y + added
    torch.testing.assert_close(add_experts_(y, x, [first, 4, last]), expected, atol=1e-12, rtol=0)


def test_pools_with_the_same_input_share_its_dropout() -> None:
    first, last = make_pool(dropout=0.5).train(), make_pool(dropout=0.5).train()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    both = add_experts_(torch.zeros(12, 10, dtype=torch.float64), x, [first, last])
    assert torch.equal(both[:, :5], both[:, 5:])
    assert not torch.equal(both, add_experts_(torch.zeros(12, 10, dtype=torch.float64), x, [first, last]))


def test_the_faithful_router_gets_no_gradient_and_the_experts_do() -> None:
    pool = make_pool().train()
    pool(torch.randn(4, 3, 6, dtype=torch.float64)).square().sum().backward()
    assert pool.router.weight.grad is None
    assert pool.lora_A.grad.abs().sum() > 0
    assert pool.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("changes", [{}, {"router": "straight-through"}, {"gate": "sparse"}])
def test_what_is_learned_is_what_the_loss_reaches(changes: dict[str, str]) -> None:
    pool = make_pool(**changes).train()
    pool(torch.randn(4, 3, 6, dtype=torch.float64)).square().sum().backward()
    assert {id(p) for p in pool.learned()} == {id(p) for p in pool.parameters() if p.grad is not None}


def test_only_the_acting_experts_get_a_gradient() -> None:
    pool = make_pool().train()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    gate = pool.gate(pool.token(x), Batch())
    pool(x).square().sum().backward()
    assert (pool.lora_B.grad.abs().sum(0) > 0).tolist() == (gate > 0).tolist()


def test_fresh_experts_add_nothing_and_follow_from_the_generator() -> None:
    one, other = make_pool(), make_pool()
    for pool in (one, other):
        pool.reset_(torch.Generator().manual_seed(5))
    assert torch.equal(one.lora_A, other.lora_A)
    assert torch.equal(one.router.weight, other.router.weight)
    assert one(torch.randn(1, 2, 6, dtype=torch.float64)).abs().sum() == 0
    assert one.lora_A.abs().max() <= 6**-0.5


def test_overlap_is_the_sum_of_products_of_leading_and_past_columns() -> None:
    pool = make_pool(k_merge=2)
    pool.counts[:] = torch.tensor([0, 4, 0, 9])
    pool.set_past_(torch.randn(5, 3))
    b, p = pool.lora_B.detach().numpy(), pool.past.numpy()
    expected = sum(abs(np.dot(b[:, j], p[:, m])) for j in (1, 3) for m in range(3))
    assert pool.overlap().item() == pytest.approx(expected, abs=1e-12)


def router_gradient(**settings) -> torch.Tensor | None:
    pool = make_pool(**settings).train()
    pool(torch.randn(7, 3, 6, dtype=torch.float64)).square().sum().backward()
    return pool.router.weight.grad


def test_the_faithful_router_never_learns_and_the_straight_through_router_does() -> None:
    assert router_gradient() is None
    assert router_gradient(router="straight-through").abs().sum() > 0


def test_a_straight_through_gate_is_the_same_choice_in_the_forward_pass() -> None:
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    one, other = make_pool()(x), make_pool(router="straight-through")(x)
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_end_of_the_text_votes_where_it_is_asked_to() -> None:
    inputs = TowerInputs()
    pool = ExpertPool(torch.empty(5, 6), POOL, route_on="end", inputs=inputs)
    x = torch.randn(2, 5, 6)
    inputs.ends = torch.tensor([1, 4])
    assert torch.equal(pool.token(x), torch.stack([x[0, 1], x[1, 4]]))


def test_a_sparse_gate_trains_weights_and_merges_those_that_are_left() -> None:
    pool = make_pool(gate="sparse").train()
    pool(torch.randn(7, 3, 6, dtype=torch.float64)).square().sum().backward()
    assert pool.importance.grad.abs().sum() > 0
    with torch.no_grad():
        pool.importance.copy_(torch.tensor([0.3, -0.2, 0.05, 0.0]))
    pool.shrink_(0.1)
    torch.testing.assert_close(pool.frozen().gate, torch.tensor([0.2, -0.1, 0.0, 0.0], dtype=torch.float64))
    pool.shrink_(1.0)
    assert len(pool.selected()) == 1, "an update without any expert would be none"


class Double:
    """Other processes with the very same votes."""

    def add_(self, votes: torch.Tensor) -> None:
        votes *= 2

    def average(self, mean: torch.Tensor) -> torch.Tensor:
        return mean


def test_votes_of_other_processes_are_counted_where_there_are_some() -> None:
    pool, x = make_pool().train(), torch.randn(7, 3, 6, dtype=torch.float64)
    alone = pool(x)
    before = pool.counts.clone()
    pool.counts.zero_()
    pool.route_(Batch(Double()))
    assert torch.equal(pool(x), alone)
    assert torch.equal(pool.counts, 2 * before)


@pytest.mark.parametrize("router", ["random", "straight-through"])
def test_per_sample_each_sample_gets_the_experts_of_a_batch_of_its_own(router: str) -> None:
    pool, x = make_pool(router=router).eval(), torch.randn(7, 3, 6, dtype=torch.float64)
    alone = torch.cat([pool(sample) for sample in x.split(1)])
    together = pool(x)
    with routed([pool], lambda _: PerSample()):
        torch.testing.assert_close(pool(x), alone, atol=1e-12, rtol=0)
    assert not torch.allclose(together, alone)
    assert torch.equal(pool(x), together)


def test_a_sparse_gate_is_the_same_for_every_sample() -> None:
    pool, x = make_pool(gate="sparse").eval(), torch.randn(3, 2, 6, dtype=torch.float64)
    batch = pool(x)
    with routed([pool], lambda _: PerSample()):
        assert torch.equal(pool(x), batch)


def test_a_pool_routes_as_before_after_an_error() -> None:
    pool, frozen = make_pool(), Frozen(torch.ones(4, dtype=torch.float64))
    pool.route_(frozen)
    inside = []

    def fails() -> None:
        with routed([pool], lambda _: Batch()):
            inside.append(pool.routing)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside == [Batch()]
    assert pool.routing is frozen


def test_fresh_experts_are_routed_by_the_batch() -> None:
    pool = make_pool()
    pool.freeze_()
    pool.reset_(torch.Generator().manual_seed(1))
    assert pool.routing == Batch()
