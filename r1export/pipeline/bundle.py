"""Field updates of a run: what a device lacks, signed. The rules are in r1export.update; here they meet the models.

Only what was verified is signed: a release by its report, a version without a task by a verification of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from r1export.adapt.evaluate import class_embeddings
from r1export.device.health import check_health
from r1export.device.version import Version
from r1export.device.worker import known_answers_hold_in_fresh_process
from r1export.errors import CheckFailed, Inconclusive, InputError
from r1export.pipeline.context import RunContext
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.without_task import check_without_tasks
from r1export.report.freshness import check_fresh
from r1export.report.json_format import read_report
from r1export.update.atomic_io import write_file
from r1export.update.bundle import Bundle
from r1export.update.container import read_tensors, write_tensors
from r1export.update.envelope import SecretKey
from r1export.update.lab.publish import Step, Terms, leaving_out, plan_delivery, sign_delivery
from r1export.update.manifest import Health
from r1export.update.release_layout import CLASS_EMBEDS, GOLDEN, TEXTUAL, VISUAL, class_embeddings_file
from r1export.update.release_manifest import GoldenGate, Release, ReleaseManifest
from r1export.verify.golden import manifest_gate
from r1export.verify.results import Contents, ReleaseReport, Verdict, named_checks

REPORT = "report.json"
# How many times as far as here the answers of another processor may be off. onnxruntime on aarch64 against x86-64, 18 towers
# (docs/experiments/updates.md): fp32 1.14; fp16 3.9, as it computes in float16 there and in float32 here; int8 1.00.
ROOM = {"fp32": 1.5, "fp16": 5.0, "int8": 1.02}


@dataclass(frozen=True)
class Order:
    """The update that somebody wants: which step, on which terms, signed with which keys.

    `accept_inconclusive`: a release whose verification decided not everything may be signed all the same.
    """

    step: Step
    terms: Terms
    keys: tuple[SecretKey, ...]
    accept_inconclusive: bool = False


@dataclass(frozen=True)
class Published:
    """An update as written, and what was inconclusive in the verification of its release."""

    bundle: Bundle
    accepted: tuple[str, ...]


def write_bundle(context: RunContext, order: Order, out: Path, *, overwrite: bool = False) -> Published:
    """Write to `out` what a device lacks to take a step between two releases of the run, if its target was verified.

    Raises:
        InputError: `out` exists, the report cannot be read, and what `make_bundle` raises.
        CheckFailed: there is no report, it is about other files, is not of a verification of the run, or says fail; a
            version without a task does not pass; or a device's health check would refuse the version.
        Inconclusive: the report says so, and the order does not accept that.
        Unsupported: this machine does not add as devices do.
    """
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists", "choose another name, or overwrite it on purpose")
    step = order.step
    known_answers_hold_in_fresh_process()
    delivery = plan_delivery(context.run.path, step)
    report = _read_report(context.run.path, delivery.target)
    accepted = _accepted(report, order)
    with leaving_out(delivery, step.drop, lambda folder: _refresh(context, step, folder)) as planned:
        if step.drop:
            variant = Variant(context, step.precision)
            _check_passes(planned.target, check_without_tasks(planned.target, variant, step.release, step.drop))
        limits = _strict_limits(planned.target.manifest)
        _check_on_a_device(planned.target, limits, order.terms.min_agreement)
        bundle = sign_delivery(replace(planned, limits=limits), order.terms, order.keys)
    write_file(out, bundle.to_bytes())
    return Published(bundle, accepted)


def _read_report(run: Path, release: Release) -> ReleaseReport:
    """The report of a verification of the run about exactly the files of `release`. Raises as `write_bundle`."""
    path, remedy = release.path / REPORT, f"verify it first: r1export verify {run}"
    if not path.is_file():
        raise CheckFailed(f"{release.path} has no {REPORT}", remedy)
    report = read_report(path, remedy)
    if not isinstance(report, ReleaseReport) or report.release.manifest_sha256 != release.manifest_sha256:
        raise CheckFailed(f"{path} is about another release", remedy)
    try:
        check_fresh(report, release.path)
    except CheckFailed as error:
        raise CheckFailed(error.message, remedy) from error
    compared = (report.contents.weights, report.parity.total)  # a release alone knows nothing of its training
    if release.manifest.updates and Verdict.NOT_APPLICABLE in {check.verdict for check in compared}:
        raise CheckFailed(f"{path} is of a verification of the release alone, not of its run", remedy)
    return report


def _accepted(report: ReleaseReport, order: Order) -> tuple[str, ...]:
    """What was inconclusive and is accepted. Raises CheckFailed, Inconclusive if the report forbids to sign."""
    reasons = "; ".join(report.reasons)
    if report.verdict is Verdict.FAIL:
        raise CheckFailed(f"{report.name} failed its verification: {reasons}", "repair it and verify the run again")
    if report.verdict is Verdict.PASS:
        return ()
    if not order.accept_inconclusive:
        raise Inconclusive(
            f"the verification of {report.name} is inconclusive: {reasons}",
            "verify the run again, or sign it all the same with --accept-inconclusive",
        )
    return report.reasons


def _check_passes(release: Release, contents: Contents) -> None:
    """Raises CheckFailed for anything but a pass."""
    if contents.verdict is not Verdict.PASS:
        undecided = (Verdict.FAIL, Verdict.INCONCLUSIVE)
        reasons = [f"{name}: {check.detail}" for name, check in named_checks(contents) if check.verdict in undecided]
        raise CheckFailed(f"{release.manifest.name} does not pass: {'; '.join(reasons)}", "verify the run again")


def _strict_limits(manifest: ReleaseManifest) -> GoldenGate:
    """What devices may differ by: the limits of the release, or those of its precision where they are stricter."""
    gate = manifest_gate(manifest)
    return GoldenGate(gate.max_abs, gate.min_cosine)


def _check_on_a_device(release: Release, limits: GoldenGate, min_agreement: float) -> None:
    """Raises CheckFailed if the health check of a device would refuse the release, also one of another processor."""
    room = ROOM[release.manifest.precision]
    own = Health(
        limits.max_abs / room, 1 - (1 - limits.min_cosine) / room**2, min_agreement
    )  # |error|^2 = 2 (1 - cosine)
    try:
        check_health(Version(release.path, release, files_there=True), own)
    except CheckFailed as error:
        raise CheckFailed(
            f"devices would refuse {release.manifest.name}: {error.message}",
            "ship another precision, or see why its answers differ from those of the trained model",
        ) from error


@torch.inference_mode()
def _refresh(context: RunContext, step: Step, folder: Path) -> None:
    """Class embeddings and golden outputs in `folder` from the model without the dropped tasks."""
    clip = context.clip
    trained = zip(context.recipe.stream, context.run.updates(context.recipe)[: step.release], strict=False)
    golden = read_tensors(folder / GOLDEN)
    images, tokens = (torch.from_numpy(golden[tower.input]).to(clip.device) for tower in (VISUAL, TEXTUAL))
    with context.with_updates_applied([update for task, update in trained if task.name not in step.drop]):
        for task in context.tasks:
            write_tensors(folder / class_embeddings_file(task.name), {CLASS_EMBEDS: class_embeddings(clip, task)})
        golden[VISUAL.output] = clip.model.encode_image(images, normalize=True).float().cpu().numpy()
        golden[TEXTUAL.output] = clip.encode_text(tokens).float().cpu().numpy()
    write_tensors(folder / GOLDEN, golden)
