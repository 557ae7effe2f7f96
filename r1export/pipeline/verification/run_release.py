"""Verify one release of a run: the base is measured once in each precision, and every later release is compared with that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from r1export.errors import CheckFailed, R1ExportError
from r1export.pipeline.variant import ReleaseRef
from r1export.pipeline.verification.contents import check_contents
from r1export.pipeline.verification.freezing_gaps import measure_gaps
from r1export.pipeline.verification.graph_runs import graph_feeds, run_graphs
from r1export.pipeline.verification.identity import WEIGHT_FILES
from r1export.pipeline.verification.inputs import ImageEmbeddings, test_images
from r1export.pipeline.verification.latency import PendingTiming, prepare_timing, variant_speed
from r1export.pipeline.verification.parity import TorchRun, base_control, release_parity
from r1export.pipeline.verification.proof import embedding_width, release_proof
from r1export.update.atomic_io import sha256_file
from r1export.update.release_layout import GRAPHS, MANIFEST
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.drift import embedding_drift
from r1export.verify.latency import TimingBudget
from r1export.verify.proof import Executions
from r1export.verify.results import (
    SKIPPED,
    UNTIMED,
    Accuracy,
    Check,
    Contents,
    Drift,
    Environment,
    Gaps,
    Latency,
    Parity,
    ParityStages,
    Probe,
    Proof,
    Ratio,
    ReleaseFacts,
    ReleaseReport,
    VariantCost,
    Verdict,
)  # fmt: skip


@dataclass(frozen=True)
class Conditions:
    """Under what conditions a run is verified; without a `budget` nothing is timed.

    `embeddings` are those of test images by every release.
    """

    providers: tuple[str, ...]
    budget: TimingBudget | None
    environment: Environment
    created: str
    embeddings: ImageEmbeddings


@dataclass(frozen=True)
class BaseMeasurements:
    """The measurements of the base release in one precision, the reference of later releases.

    `manifest` (None if it cannot be read) and `contents` are its own. `controls` are its export parity on the inputs of each
    task; `speed` is its time over that of the base in fp32, by provider.
    """

    manifest: ReleaseManifest | None
    contents: Contents
    parity: ParityStages
    controls: Mapping[str, Parity]
    executions: Executions
    speed: Mapping[str, Ratio] | None = None


def measure_base(base: ReleaseRef, runs: Sequence[TorchRun], conditions: Conditions) -> BaseMeasurements:
    """Run the base on the inputs of every task: `runs` has one for each, the first of which its own report is made from."""
    manifest, contents = _read_contents(base, runs[0], conditions)
    if contents.verdict is Verdict.FAIL:
        skipped, not_run = ParityStages.unmeasured(SKIPPED), Executions({}, "its contents failed")
        return BaseMeasurements(manifest, contents, skipped, {}, not_run)
    providers, first = conditions.providers, runs[0]
    parity = release_parity(base, first, None, providers)
    if parity.verdict is Verdict.FAIL:
        return BaseMeasurements(manifest, contents, parity, {}, Executions({}, "its export parity failed"))
    controls = {first.task.name: parity.export}
    controls |= {run.task.name: base_control(base, run, providers) for run in runs[1:]}
    executions = run_graphs(base.path, graph_feeds(first.inputs, embedding_width(base)), providers)
    budget = None if base.variant.is_reference else conditions.budget
    speed = variant_speed(base.variant, first.inputs, providers, budget) if budget else None
    return BaseMeasurements(manifest, contents, parity, controls, executions, speed)


@dataclass(frozen=True)
class Verified:
    """The report of a release, and the timing that is pending: none if it failed, is the base, or the run is verified without time."""

    ref: ReleaseRef
    report: ReleaseReport
    pending: PendingTiming | None = None


def verify_release(ref: ReleaseRef, base: BaseMeasurements, run: TorchRun, conditions: Conditions) -> Verified:
    """Verify one release, possibly the base, except for its latency. A release with modified files is not measured further."""
    manifest, contents = (base.manifest, base.contents) if ref.is_base else _read_contents(ref, run, conditions)
    report = ReleaseReport(
        created=conditions.created,
        environment=conditions.environment,
        release=_release_facts(ref),
        contents=contents,
        parity=ParityStages.unmeasured(SKIPPED),
        proof=Proof.unmeasured(SKIPPED),
        latency=Latency.unmeasured(SKIPPED),
        accuracy=_accuracy_until(ref),
    )
    if manifest is None or Verdict.FAIL in (contents.manifest.verdict, contents.files.verdict):
        return Verified(ref, report)
    parity = base.parity if ref.is_base else _parity(ref, base, run, conditions)
    report = replace(report, parity=parity)
    if contents.verdict is not Verdict.FAIL and not ref.variant.is_reference:  # also shown if parity fails
        report = replace(report, variant=_variant_cost(ref, manifest, base))
    if Verdict.FAIL in (contents.verdict, parity.verdict):
        return Verified(ref, report)
    report = replace(report, proof=release_proof(ref, run.inputs, base.executions, conditions.providers))
    if ref.is_base:
        return Verified(ref, replace(report, latency=Latency.not_applicable("the base release is the reference")))
    report = replace(report, compatible_with=_drift(ref, conditions) if ref.variant.is_reference else ())
    if report.proof.verdict is Verdict.FAIL:
        return Verified(ref, report)
    report = replace(report, gaps=_gaps(ref, run) if ref.variant.is_reference else None)
    return _ready_for_timing(ref, report, base, run, conditions)


def _read_contents(ref: ReleaseRef, run: TorchRun, conditions: Conditions) -> tuple[ReleaseManifest | None, Contents]:
    try:
        manifest = ReleaseManifest.read(ref.path)
        return manifest, check_contents(ref, manifest, conditions.embeddings, run.models.parameters)
    except R1ExportError as error:
        reason = f"{error.message} (to recreate it, delete {ref.path} and run r1export export)"
        return None, Contents.only(SKIPPED, manifest=Check.failed(reason, of=1))


def _parity(ref: ReleaseRef, base: BaseMeasurements, run: TorchRun, conditions: Conditions) -> ParityStages:
    control = base.controls.get(ref.task.name)
    return release_parity(ref, run, control, conditions.providers)


def _ready_for_timing(
    ref: ReleaseRef, report: ReleaseReport, base: BaseMeasurements, run: TorchRun, conditions: Conditions
) -> Verified:
    """A release that passed so far."""
    if conditions.budget is None:
        return Verified(ref, replace(report, latency=Latency.not_applicable(UNTIMED)))
    if not base.executions.runs:
        reason = f"cannot run the base: {base.executions.problem}"
        return Verified(ref, replace(report, latency=Latency.unmeasured(reason)))
    return Verified(ref, report, prepare_timing(ref, run.inputs, run.models, report.proof.control))


def _variant_cost(ref: ReleaseRef, manifest: ReleaseManifest, base: BaseMeasurements) -> VariantCost:
    """Size, accuracy and latency of an fp16 or int8 release compared with the fp32 release of the same number."""
    reference = ref.reference.path
    accuracies = {task.name: task.accuracy for task in ReleaseManifest.read(reference).tasks}
    return VariantCost(
        precision=ref.variant.precision,
        bytes={name: (ref.path / name).stat().st_size for name in WEIGHT_FILES},
        bytes_fp32={name: (reference / name).stat().st_size for name in WEIGHT_FILES},
        accuracy={task.name: task.accuracy for task in manifest.tasks if task.accuracy is not None},
        accuracy_fp32={name: accuracy for name, accuracy in accuracies.items() if accuracy is not None},
        speed=base.speed,
    )


def _gaps(ref: ReleaseRef, run: TorchRun) -> Gaps:
    """G1 of the task learned last, and G2 and G3 if its experts were routed to the end."""
    answers, routed = run.inputs.answers, ref.context.recipe.train.consolidate == 1
    test = test_images(ref.context, ref.task) if routed else None
    return measure_gaps(run.models, ref.task, test, run.unmerged.among(answers), run.merged.among(answers))


def _drift(ref: ReleaseRef, conditions: Conditions) -> tuple[Drift, ...]:
    """Drift from every earlier release, the base first, except those that fail to run."""
    found, space = [], ReleaseManifest.read(ref.path).embedding_space
    for number in range(ref.number):
        before = ref.variant.release(number).path
        with suppress(CheckFailed):
            earlier = ReleaseManifest.read(before).embedding_space
            same = space is not None and earlier is not None and space.image == earlier.image
            galleries = conditions.embeddings.gallery(before), conditions.embeddings.gallery(ref.path)
            found.append(embedding_drift(*galleries, against=before.name, same_space=same))
    return tuple(found)


def _release_facts(ref: ReleaseRef) -> ReleaseFacts:
    """Names, sizes and digests, as far as the files are there."""
    base, path = ref.context.run.base(), ref.path
    sizes = {name: (path / name).stat().st_size for name in WEIGHT_FILES if (path / name).is_file()}
    if ref.number:
        factors = ref.context.run.task(ref.number, ref.task.name).factors
        sizes[factors.name] = factors.stat().st_size
    return ReleaseFacts(
        index=ref.number,
        name=path.name,
        precision=ref.variant.precision,
        manifest_sha256=sha256_file(path / MANIFEST) if (path / MANIFEST).is_file() else "",
        task=ref.task.name if ref.number else None,
        base=base.name,
        base_sha256=base.sha256,
        graph={name: sha256_file(path / name) for name in GRAPHS if (path / name).is_file()},
        weights={name: sha256_file(path / name) for name in WEIGHT_FILES if (path / name).is_file()},
        bytes=sizes,
    )


def _accuracy_until(ref: ReleaseRef) -> Accuracy | None:
    """The accuracies up to this release; the summary belongs to the whole run."""
    if ref.is_base or not ref.variant.is_reference:
        return None
    metrics = ref.context.run.metrics()
    probe = metrics.probe
    return Accuracy(
        tasks=metrics.tasks,
        zero_shot=metrics.zero_shot,
        matrix=metrics.accuracy[: ref.number],
        probe=Probe(name=probe.name, values=probe.values[: ref.number + 1]) if probe else None,
    )
