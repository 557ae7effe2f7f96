"""G1 to G3, and the torch side of verification, on a two-layer CLIP."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from report.examples import run
from settings import POOL

from r1export.adapt.clip import Clip
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import pack_experts
from r1export.adapt.pool import routed
from r1export.adapt.routing import Batch, PerSample
from r1export.data.task import Task
from r1export.pipeline.verification.freezing_gaps import BATCH, _accuracy, measure_gaps, summarize
from r1export.pipeline.verification.inputs import LabelledImages
from r1export.pipeline.verification.torch_models import TorchModels, encoders, module_boundaries
from r1export.report.summary import accuracy_summary
from r1export.update.factors import ExpertUpdate
from r1export.verify.parity import Embeddings, ExecutionConfig, Inputs, run_in_batches
from r1export.verify.results import Gaps


def taught(clip: Clip) -> dict:
    """Pools with random experts, as if trained: B is not zero and experts have votes."""
    pools = inject_experts_(clip.model, replace(POOL, alpha=12.0))
    generator = torch.Generator().manual_seed(0)
    for pool in pools.values():
        pool.reset_(generator)
        pool.lora_B.data.copy_(0.02 * torch.randn(pool.lora_B.shape, generator=generator))
        pool.counts.copy_(torch.randint(0, 50, pool.counts.shape, generator=generator))
        pool.freeze_()
    clip.model.eval()
    return pools


@pytest.fixture
def pixels(tiny_clip: Clip, stripes) -> torch.Tensor:
    return Pixels(stripes.test, tiny_clip.preprocess).batch(np.arange(16))


def inputs_of(clip: Clip, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs(clip.preprocess.normalize(pixels).to(dtype).numpy(), clip.tokenize(["a photo", "another"]).numpy())


def embeddings_of(clip: Clip, pixels: torch.Tensor) -> Embeddings:
    whole = ExecutionConfig("torch", "eager", 0)
    return run_in_batches(encoders(clip.model), inputs_of(clip, pixels), [whole])[whole]


def gaps_of(clip: Clip, pools: dict, task: Task, pixels: torch.Tensor, merged: Embeddings | None = None) -> Gaps:
    frozen = embeddings_of(clip, pixels)
    test = LabelledImages(pixels, task.test.labels[: len(pixels)])
    return measure_gaps(TorchModels(clip, clip, pools, {}), task, test, frozen, merged or frozen)


def test_g1_is_rounding_alone_in_float32(tiny_clip: Clip, stripes, pixels: torch.Tensor) -> None:
    """Merged by the one merge, against the pools as branches."""
    base = tiny_clip.parameters()
    pools = taught(tiny_clip)
    update: ExpertUpdate = pack_experts(pools)
    eject_experts_(tiny_clip.model)
    untaught = embeddings_of(tiny_clip, pixels)
    tiny_clip.load_(base | update.apply(base))
    merged = embeddings_of(tiny_clip, pixels)
    tiny_clip.load_(base)
    pools = taught(tiny_clip)
    exact = gaps_of(tiny_clip, pools, stripes, pixels, merged)
    assert exact.G1 < 1e-4  # 14 x float32 rounding of embeddings
    assert exact.G1_top1_agreement == 1.0
    assert gaps_of(tiny_clip, pools, stripes, pixels, untaught).G1 > 1e-2


def test_routing_each_sample_by_itself_is_routing_in_batches_of_one(tiny_clip: Clip, pixels: torch.Tensor) -> None:
    pools = taught(tiny_clip)
    with torch.inference_mode():
        frozen = tiny_clip.encode_image(pixels)
        with routed(pools.values(), lambda _: Batch()):
            one_by_one = torch.cat([tiny_clip.encode_image(pixels[i : i + 1]) for i in range(len(pixels))])
            together = tiny_clip.encode_image(pixels)
        with routed(pools.values(), lambda _: PerSample()):
            each = tiny_clip.encode_image(pixels)
        again = tiny_clip.encode_image(pixels)
    assert (each - one_by_one).abs().max() < 1e-5
    assert (together - one_by_one).abs().max() > 1e-4  # votes of a batch choose for all of it
    assert torch.equal(frozen, again)


def test_gaps_are_differences_of_accuracies_and_leave_the_pools_frozen(
    tiny_clip: Clip, stripes, pixels: torch.Tensor
) -> None:
    pools = taught(tiny_clip)
    gates = {rows: pool.routing.gate.clone() for rows, pool in pools.items()}
    counts = {rows: pool.counts.clone() for rows, pool in pools.items()}
    gaps = gaps_of(tiny_clip, pools, stripes, pixels)
    accuracies = gaps.accuracies
    assert set(accuracies) == {"frozen_4", "frozen_8", "frozen_12", "routed_batch_1", "routed_batch_32"}
    assert accuracies["routed_batch_1"] - accuracies["frozen_8"] == gaps.G2
    assert accuracies["frozen_8"] - accuracies["frozen_4"] == gaps.G3
    assert all(
        torch.equal(pool.routing.gate, gates[rows]) and torch.equal(pool.counts, counts[rows])
        for rows, pool in pools.items()
    )


def test_experts_that_were_fixed_before_the_end_have_a_merge_gap_alone(tiny_clip: Clip, stripes, pixels) -> None:
    pools, frozen = taught(tiny_clip), embeddings_of(tiny_clip, pixels)
    gaps = measure_gaps(TorchModels(tiny_clip, tiny_clip, pools, {}), stripes, None, frozen, frozen)
    assert gaps == Gaps(G1=0.0, G1_top1_agreement=1.0)
    assert (gaps.G2, gaps.G3) == (None, None)
    assert [row for row in accuracy_summary(run(gaps=summarize({"a": gaps}))) if "gap" in row[0]] == [
        ("Merge gap (G1)", "0")
    ]


def test_texts_are_routed_in_batches_of_the_same_size_as_images(tiny_clip: Clip, stripes, pixels, monkeypatch) -> None:
    """Where the end of a text votes, the texts of a batch choose for each other."""
    taught(tiny_clip)
    many = Task("many", tuple(f"thing {i}" for i in range(40)), ("a photo of {}.",), stripes.train, stripes.test)
    sizes, encode = [], Clip.encode_text
    monkeypatch.setattr(Clip, "encode_text", lambda clip, part: sizes.append(len(part)) or encode(clip, part))
    assert 0 <= _accuracy(tiny_clip, many, LabelledImages(pixels, stripes.test.labels[:16])) <= 1
    assert sizes == [BATCH, 8]


def test_a_sparse_gate_has_no_shrink_gap(tiny_clip: Clip, stripes, pixels: torch.Tensor) -> None:
    """It decides by itself how many experts are merged: a difference of nothing would look like a shrink that costs nothing."""
    pools = inject_experts_(tiny_clip.model, replace(POOL, gate="sparse"))
    for pool in pools.values():
        pool.reset_(torch.Generator().manual_seed(0))
        pool.freeze_()
    tiny_clip.model.eval()
    assert gaps_of(tiny_clip, pools, stripes, pixels).G3 is None
    summary = summarize({"a": gap(1e-6, 0.1, None), "b": gap(3e-6, 0.3, None)})
    assert (3e-6, pytest.approx(0.2), None) == (summary.G1, summary.G2, summary.G3)
    assert accuracy_summary(run(gaps=summary))[-1][0].startswith("Freezing gap")


def gap(g1: float, g2: float, g3: float | None) -> Gaps:
    return Gaps(G1=g1, G1_top1_agreement=1.0, G2=g2, G2_batch_32=g2, G3=g3, images=16, accuracies={})


def test_the_gaps_of_a_run_are_the_worst_g1_and_the_mean_of_the_others() -> None:
    tasks = {"a": gap(1e-6, 0.1, 0.0), "b": gap(3e-6, 0.3, -0.2)}
    summary = summarize(tasks)
    assert (3e-6, pytest.approx(0.2), pytest.approx(-0.1)) == (summary.G1, summary.G2, summary.G3)
    assert summary.tasks == tasks
    assert summarize({}) is None


def test_boundaries_name_the_modules_that_own_parameters(tiny_clip: Clip, pixels: torch.Tensor) -> None:
    values = inputs_of(tiny_clip, pixels[:2]).visual
    found, output = module_boundaries(tiny_clip.model, lambda: encoders(tiny_clip.model).visual(values))
    assert np.array_equal(output, encoders(tiny_clip.model).visual(values))
    by_place = {(b.module, b.side): b.value for b in found}
    block = "visual.transformer.resblocks.0"
    assert by_place[f"{block}.ln_1", "out"].shape == by_place[f"{block}.attn.in_proj", "in"].shape == (2, 5, 32)
    weights = tiny_clip.parameters()
    again = (
        by_place[f"{block}.attn.out_proj", "in"] @ weights[f"{block}.attn.out_proj.weight"].T
        + weights[f"{block}.attn.out_proj.bias"]
    )
    assert np.abs(again - by_place[f"{block}.attn.out_proj", "out"]).max() < 1e-6
    count = len(found)
    encoders(tiny_clip.model).visual(values)
    assert len(found) == count  # no hook is left behind
