"""Verify a run: the base first, then every release against it, and write the reports."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from r1export.adapt.metrics import stream_metrics
from r1export.errors import InputError, Unsupported
from r1export.pipeline.context import RunContext
from r1export.pipeline.environment import absent, environment, now
from r1export.pipeline.variant import REFERENCE, ReleaseRef, Variant
from r1export.pipeline.verification.examples import examples
from r1export.pipeline.verification.freezing_gaps import summarize
from r1export.pipeline.verification.inputs import ImageEmbeddings
from r1export.pipeline.verification.latency import PendingTiming, group_size, release_latencies
from r1export.pipeline.verification.parity import TorchRun
from r1export.pipeline.verification.run_release import (
    BaseMeasurements,
    Conditions,
    Verified,
    measure_base,
    verify_release,
)
from r1export.pipeline.verification.torch_models import torch_models
from r1export.report.write import remove_reports, write_report
from r1export.run_folder import RunMetrics
from r1export.update.factors import ExpertUpdate
from r1export.verify.latency import DEFAULT_BUDGET, TimingBudget
from r1export.verify.parity import GATES
from r1export.verify.results import Accuracy, Check, Guard, Latency, ReleaseReport, RunContents, RunReport, Verdict
from r1export.verify.runtimes.runtime import check_provider


def default_providers() -> tuple[str, ...]:
    """cpu, and cuda where torch and onnxruntime can use it."""
    return ("cpu",) if absent("cuda") or not torch.cuda.is_available() else ("cpu", "cuda")


def verify_run(
    context: RunContext,
    providers: Sequence[str] = (),
    budget: TimingBudget | None = DEFAULT_BUDGET,
    only: int | None = None,
) -> RunReport:
    """Verify every release, in every precision, against the unmerged model. Write all reports and return the run's.

    Without a `budget` nothing is timed. `only` verifies that release and the base: their reports are written, those of other
    releases stay, and the run's, which is about all of them, is returned without them but not written.

    Raises:
        Unsupported: full fine-tuning, or a missing provider.
        InputError: an unknown provider, a run that is not trained or not exported, no release `only`.
    """
    if context.recipe.train.method == "full":
        raise Unsupported("full fine-tuning has no unmerged model to verify against", "use it with r1export train")
    providers = tuple(providers) or default_providers()
    for provider in providers:
        check_provider(provider)
    conditions = Conditions(providers, budget, environment(providers), now(), ImageEmbeddings(context))
    updates = context.run.updates(context.recipe)
    numbers = _numbers(len(updates), only)
    releases = _release_refs(context, updates, numbers)
    for ref in releases:
        remove_reports(ref.path)
    remove_reports(context.run.path)
    reports = list(_verify_releases(context, updates, numbers[1:], conditions))
    if only is not None:
        asked = " and ".join(dict.fromkeys(ref.path.name for ref in releases))
        folders = Check.not_applicable(f"only {asked}: --release {only}")
        return _run_report(context, updates, folders, reports, conditions)
    report = _run_report(context, updates, _check_folders(context, releases), reports, conditions)
    report = replace(report, examples=examples(context, updates))
    write_report(report, context.run.path)
    return report


def _numbers(last: int, only: int | None) -> list[int]:
    """The releases to verify, the base first. Raises InputError if there is no release `only`."""
    if only is None:
        return list(range(last + 1))
    if not 0 <= only <= last:
        raise InputError(f"no release {only}", f"this run has releases 0 to {last}")
    return sorted({0, only})


def _release_refs(context: RunContext, updates: Sequence[ExpertUpdate], numbers: Sequence[int]) -> list[ReleaseRef]:
    """The releases with these numbers in every precision. Raises InputError if one is missing."""
    refs = [v.release(number, updates) for v in Variant.all_of(context) for number in numbers]
    for ref in refs:
        if not ref.path.exists():
            raise InputError(f"{ref.path}: no such release", f"write it with r1export export {context.run.path}")
    return refs


def _verify_releases(
    context: RunContext, updates: Sequence[ExpertUpdate], later: Sequence[int], conditions: Conditions
) -> Iterator[ReleaseReport]:
    """The reports of the base and of the `later` releases, each written as soon as it is complete; the base first in every precision.

    Several releases are timed together, which is faster than one after the other and compares all with the same base.
    """
    bases: dict[Variant, BaseMeasurements] = {}
    for base, measured, verified in _verify_bases(context, later, conditions):
        bases[base.variant] = measured
        yield _written(verified.report, base)
    waiting: list[Verified] = []
    together = group_size(Variant.all_of(context)[0].release(0))
    for count, number in enumerate(later, 1):
        _return_memory()
        waiting += _verify_number(context, updates[:number], bases, conditions)
        if count % together == 0 or number == later[-1]:
            yield from _timed(waiting, conditions)
            waiting.clear()


def _verify_bases(
    context: RunContext, later: Sequence[int], conditions: Conditions
) -> Iterator[tuple[ReleaseRef, BaseMeasurements, Verified]]:
    """The base in every precision, on inputs of the first task and of those that the `later` releases add."""
    with torch_models(context, 0, []) as models:
        runs = [TorchRun(context, models, context.tasks[number - 1]) for number in sorted({1, *later})]
        for variant in Variant.all_of(context):
            base = variant.release(0)
            context.progress.step(f"Verifying {base.label}")
            measured = measure_base(base, runs, conditions)
            yield base, measured, verify_release(base, measured, runs[0], conditions)


def _verify_number(
    context: RunContext,
    updates: Sequence[ExpertUpdate],
    bases: Mapping[Variant, BaseMeasurements],
    conditions: Conditions,
) -> list[Verified]:
    """The release of the last of `updates` in every precision. Its torch models are gone before it is timed."""
    number, found = len(updates), []
    with torch_models(context, number, list(updates)) as models:
        run = TorchRun(context, models, context.tasks[number - 1])
        for variant, base in bases.items():
            ref = variant.release(number, updates)
            context.progress.step(f"Verifying {ref.label}")
            found.append(verify_release(ref, base, run, conditions))
    return found


def _timed(verified: Sequence[Verified], conditions: Conditions) -> Iterator[ReleaseReport]:
    """The written reports, with the latencies of those that are to be timed."""
    latencies = iter(_latencies([one.pending for one in verified if one.pending], conditions))
    for one in verified:
        yield _written(replace(one.report, latency=next(latencies)) if one.pending else one.report, one.ref)


def _latencies(pending: Sequence[PendingTiming], conditions: Conditions) -> list[Latency]:
    """While graphs are timed, which takes most memory, torch's model is out of it."""
    if not pending or not conditions.budget:
        return []
    context = pending[0].ref.context
    with context.clip.unloaded(context.base):
        _return_memory()
        return release_latencies(pending, conditions.providers, conditions.budget)


def _return_memory() -> None:
    """Give what earlier models had back to the system, which glibc keeps by itself; nothing with other C libraries."""
    with suppress(OSError, AttributeError, TypeError):  # a library without it, or Windows, which has no such library
        ctypes.CDLL(None).malloc_trim(0)


def _written(report: ReleaseReport, ref: ReleaseRef) -> ReleaseReport:
    write_report(report, ref.path)
    if report.gaps:
        ref.context.run.keep_gaps(ref.number, ref.task.name, report.gaps)
    return report


def _run_report(
    context: RunContext,
    updates: Sequence[ExpertUpdate],
    folders: Check,
    reports: Sequence[ReleaseReport],
    conditions: Conditions,
) -> RunReport:
    """`folders` says whether every release was verified."""
    by_variant = sorted(
        reports, key=lambda report: [v.precision for v in Variant.all_of(context)].index(report.release.precision)
    )
    gaps = {report.release.task: report.gaps for report in reports if report.gaps and report.release.task}
    return RunReport(
        created=conditions.created,
        environment=conditions.environment,
        recipe=context.recipe.model_dump(mode="json"),
        contents=RunContents(
            tasks=_check_tasks(context, len(updates)),
            releases=folders,
            gates=_check_gates(context),
            metrics=_check_metrics(context.run.metrics()),
        ),
        releases=tuple(by_variant),
        accuracy=accuracy_of(context.run.metrics()),
        gaps=summarize(gaps),
        guards=_guards(context),
        inputs=context.run.inputs(),
    )


def _guards(context: RunContext) -> dict[str, Guard]:
    """By task, what `train.guard` changed."""
    names = [task.name for task in context.recipe.stream]
    found = {name: context.run.task_metrics(number, name) for number, name in enumerate(names, 1)}
    return {name: metrics.guard for name, metrics in found.items() if metrics and metrics.guard}


def _check_gates(context: RunContext) -> Check:
    """Check that the recipe's tolerances are not looser than the defaults, which define what a pass means."""
    settings, gate = context.recipe.verify, GATES[REFERENCE]
    lax = [
        f"verify.{name} = {abs(stated):g} is looser than the default {abs(ours):g}"
        for name, stated, ours in (
            ("max_abs", settings.max_abs, gate.max_abs),
            ("min_cosine", -settings.min_cosine, -gate.min_cosine),
        )
        if stated > ours
    ]
    detail = "; ".join(lax) or "the recipe's tolerances are not looser than the defaults"
    return Check(verdict=Verdict.INCONCLUSIVE if lax else Verdict.PASS, looked_at=2, of=2, detail=detail)


def _check_metrics(metrics: RunMetrics) -> Check:
    """The summary of metrics.json follows from its matrix."""
    if len(metrics.accuracy) != len(metrics.tasks):
        return Check.unmeasured(f"{len(metrics.accuracy)} of {len(metrics.tasks)} tasks have a row of accuracies", of=5)
    summary = stream_metrics(metrics.accuracy)
    zero_shot = float(np.mean(metrics.zero_shot))
    stated = (metrics.zero_shot_avg, metrics.transfer, metrics.avg, metrics.last, metrics.forgetting)
    follows = (zero_shot, summary.transfer, summary.avg, summary.last, summary.forgetting)
    names = ("zero_shot_avg", "transfer", "avg", "last", "forgetting")
    problems = [
        f"metrics.json: {name} is {left}, expected {right} from its matrix"
        for name, left, right in zip(names, stated, follows, strict=True)
        if left != right
    ]
    return Check.judge(problems, looked_at=5, of=5, detail="averages, transfer and forgetting match the accuracies")


def _check_tasks(context: RunContext, learned: int) -> Check:
    """Every task of the recipe is learned."""
    names = [task.name for task in context.recipe.stream]
    if learned == len(names):
        return Check.judge(
            [], looked_at=len(names), of=len(names), detail=f"all {len(names)} tasks of the recipe are trained"
        )
    missing = [n for number, n in enumerate(names, 1) if not context.run.task(number, n).factors.exists()]
    detail = f"{learned} of {len(names)} tasks are trained, missing {', '.join(missing)}; continue with r1export run --resume"
    return Check(verdict=Verdict.INCONCLUSIVE, looked_at=learned, of=len(names), detail=detail)


def _check_folders(context: RunContext, refs: Sequence[ReleaseRef]) -> Check:
    """Check that every release folder of the run was opened by a check."""
    opened = {ref.path for ref in refs}
    present = {path for root in _release_roots(context) for path in root.iterdir()}
    unopened = sorted(path.relative_to(context.run.path).as_posix() for path in present - opened)
    detail = f"all {len(opened)} release folders were verified"
    if unopened:
        detail = f"not verified: {', '.join(unopened)}, which are no releases of the recipe and its factors"
    verdict = Verdict.INCONCLUSIVE if unopened else Verdict.PASS
    return Check(verdict=verdict, looked_at=len(opened), of=len(opened | present), detail=detail)


def _release_roots(context: RunContext) -> list[Path]:
    roots = [context.run.variant().releases_folder, *context.run.variants_folder.glob("*/releases")]
    return [root for root in roots if root.is_dir()]


def accuracy_of(metrics: RunMetrics) -> Accuracy:
    """What the report says of the accuracies of a whole run."""
    return Accuracy(
        tasks=metrics.tasks,
        zero_shot=metrics.zero_shot,
        matrix=metrics.accuracy,
        zero_shot_avg=metrics.zero_shot_avg,
        transfer=metrics.transfer,
        avg=metrics.avg,
        last=metrics.last,
        forgetting=metrics.forgetting,
        probe=metrics.probe,
    )
