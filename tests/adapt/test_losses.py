"""The two losses against their plain forms."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from settings import POOL

from r1export.adapt.losses import in_batch_loss, orthogonality_loss
from r1export.adapt.pool import ExpertPool


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One text per image and a soft target over all images of the same class, as the paper has it."""
    square = logits[:, labels]
    same = (labels[:, None] == labels[None, :]).double()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(square, target) + F.cross_entropy(square.T, target.T)) / 2


def test_one_text_per_class_gives_the_loss_and_the_gradient_of_one_text_per_image() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 2, 2, 1, 0, 2, 2])
    one = (torch.randn(7, 3, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    other = one.detach().clone().requires_grad_()
    loss, plain = in_batch_loss(one, labels), plain_loss(other, labels)
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=0)
    loss.backward()
    plain.backward()
    torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0)


def test_a_batch_of_one_class_costs_the_entropy_of_its_size() -> None:
    """Nothing can be told apart: both directions are uniform over n images."""
    loss = in_batch_loss(torch.full((4, 1), 3.0, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(4.0, dtype=torch.float64).log())


def test_orthogonality_is_the_mean_over_the_linears_and_reaches_only_b() -> None:
    pools = [ExpertPool(torch.empty(4, 3), replace(POOL, rank=2, k_train=1, k_merge=1)) for _ in range(2)]
    for scale, pool in enumerate(pools, 1):
        pool.reset_(torch.Generator().manual_seed(0))
        torch.nn.init.constant_(pool.lora_B, 0.5)
        pool.set_past_(torch.full((4, 3), float(scale)))
    loss = orthogonality_loss(pools)
    assert loss.item() == (4 * 0.5 * 3 * 1 + 4 * 0.5 * 3 * 2) / 2
    loss.backward()
    assert pools[0].lora_B.grad.abs().sum() > 0
    assert pools[0].lora_A.grad is None
