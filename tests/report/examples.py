"""Reports as values: a release that passed every check, and a run of two of them."""

from __future__ import annotations

from dataclasses import fields, replace

from r1export.verify.results import (
    RUNGS,
    Accuracy,
    Agreement,
    Check,
    Contents,
    Difference,
    Drift,
    Environment,
    Gaps,
    Histogram,
    Latency,
    Parity,
    ParityStages,
    Probe,
    Proof,
    ProviderLatency,
    Ratio,
    ReleaseFacts,
    ReleaseReport,
    RunContents,
    Rung,
    RunGaps,
    RunReport,
    Times,
    Verdict,
)  # fmt: skip

TASKS = ("digits", "eurosat", "flowers-17")
DIGEST = "f32886b30167abbd82aedb9a3ff5b45433dc8a6b145e2363a418562feb197546"


def passed(of: int = 3, detail: str = "all is well") -> Check:
    return Check.judge([], looked_at=of, of=of, detail=detail)


def stage(max_abs: float, control: float, **changes) -> Parity:
    edges = tuple(10.0**exponent for exponent in range(-10, -3))
    figures = {
        "max_abs": max_abs, "p99_abs": max_abs / 3, "min_cosine": 1.0, "top1_agreement": 1.0, "samples": 512, "tolerance": 5e-5,
        "least_tolerance": max_abs, "min_cosine_required": 0.999999,
        "control": Difference(max_abs=control, p99_abs=control / 2, min_cosine=1.0),
        "histogram": Histogram(edges=edges, counts=(0, 3, 40, 200, 90, 0)),
        "towers": {tower: Difference(max_abs=max_abs, p99_abs=max_abs / 3, min_cosine=1.0) for tower in ("visual", "textual")},
        "by_provider": {"cpu": Difference(max_abs=max_abs, p99_abs=max_abs / 3, min_cosine=1.0)},
        "providers": ("cpu",), "levels": ("disable", "basic", "all"), "batches": (1, 2, 5, 256),
    }  # fmt: skip
    return Parity(verdict=Verdict.PASS, looked_at=512, of=512, detail="12 executions agree", **figures | changes)


def latency(ratio: float = 1.001) -> Latency:
    times = {
        name: Times(median_ms=ms, p90_ms=ms * 1.1, p99_ms=None, n=400)
        for name, ms in (("base", 52.11), ("merged", 52.16), ("unmerged", 68.4), ("merged_torch", 140.2))
    }
    noise, ci95 = Ratio(1.0, (0.997, 1.003)), (ratio - 0.004, ratio + 0.004)
    provider = ProviderLatency(verdict=Verdict.PASS, ratio=ratio, ci95=ci95, noise_floor=noise)
    return Latency(
        verdict=Verdict.PASS, looked_at=1, of=1, tower="visual", ratio=ratio, ci95=ci95, margin=0.02, noise_floor=noise,
        unmerged_ratio=1.312, pairs=400, pair_ratios=(0.99, 1.0, 1.01, 1.002),
        providers={"CPUExecutionProvider": {"1": times}}, by_provider={"CPUExecutionProvider": provider},
    )  # fmt: skip


def accuracy(**changes) -> Accuracy:
    values = {
        "tasks": TASKS, "zero_shot": (0.41, 0.37, 0.71), "zero_shot_avg": 0.4967, "matrix": ((0.95, 0.39, 0.7), (0.94, 0.9, 0.69), (0.932, 0.88, 0.97)),
        "transfer": 0.59, "avg": 0.79, "last": 0.927, "forgetting": (0.018, 0.02, 0.0), "probe": Probe(name="imagenet", values=(0.68, 0.67, 0.66, 0.65)),
    }  # fmt: skip
    return Accuracy(**values | changes)


def gaps() -> Gaps:
    return Gaps(
        G1=2e-5, G1_top1_agreement=1.0, G2=0.004, G2_batch_32=0.003, G3=0.01, images=200, accuracies={"frozen_4": 0.9}
    )


def environment() -> Environment:
    return Environment(
        r1export="0.1.0", python="3.11.7", torch="2.9.1", open_clip="3.2.0", onnx="1.22.0", onnxruntime="1.23.0", numpy="2.4.0", cpu="a processor",
        threads=2, os="Linux x86_64", gpu=None, runtimes={"CPU": "measured", "CUDA": "not measured, no device"},
    )  # fmt: skip


def drift(against: str, recall: float) -> Drift:
    agreement = Agreement(top1=0.99, recall_at_10=recall)
    return Drift(
        against=against, images=200, mean_cosine=0.99, min_cosine=0.9, new_queries=agreement, old_queries=agreement, same_space=False, reindex="advised",
    )  # fmt: skip


def release(name: str = "03-flowers-17", **changes) -> ReleaseReport:
    """A release that passed every check, but for `changes`."""
    files = {"visual.safetensors": 345000123, "textual.safetensors": 254000400, "factors.safetensors": 144636}
    facts = ReleaseFacts(
        index=3, name=name, precision="fp32", manifest_sha256=DIGEST, task="flowers-17", base="open_clip:ViT-B-16/openai", base_sha256=DIGEST,
        graph={"visual.onnx": DIGEST}, weights={"visual.safetensors": DIGEST, "textual.safetensors": DIGEST}, bytes=files,
    )  # fmt: skip
    rung = Rung.judge([], looked_at=3, of=3, detail="the same", digest=DIGEST, expected=DIGEST)
    report = ReleaseReport(
        created="2026-03-14T09:26:53+00:00",
        environment=environment(),
        release=facts,
        contents=Contents(**{field.name: passed() for field in fields(Contents)}),
        parity=ParityStages(merge=stage(4.2e-7, 3.8e-7), export=stage(2.9e-6, 2.6e-6), total=stage(3.1e-6, 2.8e-6)),
        proof=Proof(**dict.fromkeys(RUNGS, rung), control=passed(1, "told apart by L1, L2, L3")),
        latency=latency(),
        compatible_with=(drift("00-base", 0.91), drift("02-eurosat", 0.97)),
        gaps=gaps(),
        accuracy=accuracy(),
    )  # fmt: skip
    return replace(report, **changes)


def run(*releases: ReleaseReport, **changes) -> RunReport:
    """A run of `releases`, or of two that passed."""
    report = RunReport(
        created="2026-03-14T09:26:53+00:00",
        environment=environment(),
        recipe={"train": {"iterations": 50}, "tasks": [{"name": "digits"}]},
        contents=RunContents(**{field.name: passed() for field in fields(RunContents)}),
        releases=releases or (release(), release("04-oxford_pets")),
        accuracy=accuracy(),
        gaps=RunGaps(G1=2e-5, G2=0.004, G3=None, tasks={"digits": gaps()}),
    )
    return replace(report, **changes)
