"""Signed updates of a run for devices. The format and its rules are in r1export.update; this module applies them to a run.

Only verified releases are signed: a release needs a report, and a version without a task is verified here.
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
# Allowed growth of the error on another processor. Measured with onnxruntime on aarch64 vs. x86-64, 18 towers
# (docs/experiments/updates.md): fp32 1.14; fp16 3.9, since aarch64 computes in float16 and x86-64 in float32; int8 1.00.
ROOM = {"fp32": 1.5, "fp16": 5.0, "int8": 1.02}


@dataclass(frozen=True)
class Order:
    """A requested update: from which release to which, its conditions, and the signing keys.

    `accept_inconclusive` allows signing a release whose verification is inconclusive.
    """

    step: Step
    terms: Terms
    keys: tuple[SecretKey, ...]
    accept_inconclusive: bool = False


@dataclass(frozen=True)
class Published:
    """The written update, and the inconclusive checks of its release that were accepted."""

    bundle: Bundle
    accepted: tuple[str, ...]


def write_bundle(context: RunContext, order: Order, out: Path, *, overwrite: bool = False) -> Published:
    """Write an update between two releases of the run to `out`, if the target release is verified.

    Raises:
        InputError: `out` exists, the report cannot be read, and what `make_bundle` raises.
        CheckFailed: there is no report, it is about other files, it is not from a verification of the run, or its verdict
            is fail; a version without a task does not pass; or a device's health check would reject the version.
        Inconclusive: the report's verdict is inconclusive and `accept_inconclusive` is not set.
        Unsupported: this machine's arithmetic differs from that of devices.
    """
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists", "choose another name, or use --overwrite")
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
    """The report on exactly the files of `release`, from a verification of the run. Raises as `write_bundle`."""
    path, remedy = release.path / REPORT, f"verify it first: r1export verify {run}"
    if not path.is_file():
        raise CheckFailed(f"{release.path} has no {REPORT}", remedy)
    report = read_report(path, remedy)
    if not isinstance(report, ReleaseReport) or report.release.manifest_sha256 != release.manifest_sha256:
        raise CheckFailed(f"{path} is the report of another release", remedy)
    try:
        check_fresh(report, release.path)
    except CheckFailed as error:
        raise CheckFailed(error.message, remedy) from error
    compared = (report.contents.weights, report.parity.total)  # a release alone can't be compared with what was trained
    if release.manifest.updates and Verdict.NOT_APPLICABLE in {check.verdict for check in compared}:
        raise CheckFailed(f"{path} is from a verification of the release alone, not of its run", remedy)
    return report


def _accepted(report: ReleaseReport, order: Order) -> tuple[str, ...]:
    """The inconclusive checks that are accepted. Raises CheckFailed or Inconclusive if the release must not be signed."""
    reasons = "; ".join(report.reasons)
    if report.verdict is Verdict.FAIL:
        raise CheckFailed(f"{report.name} failed its verification: {reasons}", "fix the cause and verify the run again")
    if report.verdict is Verdict.PASS:
        return ()
    if not order.accept_inconclusive:
        raise Inconclusive(
            f"the verification of {report.name} is inconclusive: {reasons}",
            "verify the run again, or sign it anyway with --accept-inconclusive",
        )
    return report.reasons


def _check_passes(release: Release, contents: Contents) -> None:
    """Raises CheckFailed for anything but a pass."""
    if contents.verdict is not Verdict.PASS:
        undecided = (Verdict.FAIL, Verdict.INCONCLUSIVE)
        reasons = [f"{name}: {check.detail}" for name, check in named_checks(contents) if check.verdict in undecided]
        raise CheckFailed(f"{release.manifest.name} does not pass: {'; '.join(reasons)}", "verify the run again")


def _strict_limits(manifest: ReleaseManifest) -> GoldenGate:
    """The tolerances of devices: those of the release, or of its precision where that is stricter."""
    gate = manifest_gate(manifest)
    return GoldenGate(gate.max_abs, gate.min_cosine)


def _check_on_a_device(release: Release, limits: GoldenGate, min_agreement: float) -> None:
    """Raises CheckFailed if the health check of a device, possibly with another processor, would reject the release."""
    room = ROOM[release.manifest.precision]
    own = Health(
        limits.max_abs / room, 1 - (1 - limits.min_cosine) / room**2, min_agreement
    )  # |error|^2 = 2 (1 - cosine)
    try:
        check_health(Version(release.path, release, files_there=True), own)
    except CheckFailed as error:
        raise CheckFailed(
            f"devices would reject {release.manifest.name}: {error.message}",
            "ship another precision, or find out why its outputs differ from the trained model's",
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
