"""Verify a release folder without its run: its manifest, its golden samples, and the base release next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from r1export.errors import R1ExportError, Unsupported
from r1export.export.model_card import model_card
from r1export.export.preprocess import has_graph
from r1export.pipeline.environment import environment, now
from r1export.pipeline.verification.contenders import make_contenders, timeable
from r1export.pipeline.verification.graph_runs import graph_feeds, run_graphs
from r1export.pipeline.verification.identity import WEIGHT_FILES, check_manifest_and_files
from r1export.recipe import Verify
from r1export.report.write import remove_reports
from r1export.update.atomic_io import sha256_file
from r1export.update.container import digest, map_tensors
from r1export.update.golden_samples import PICTURES, SAMPLES
from r1export.update.manifest import PROCEDURES
from r1export.update.release_layout import GRAPHS, MANIFEST, MODEL_CARD, STATIC_GRAPHS, VISUAL, class_names_file
from r1export.update.release_manifest import ReleaseManifest, TensorEntry
from r1export.update.run_layout import FP32
from r1export.verify import contents, latency, parity, proof
from r1export.verify.client_files import (
    ListedClasses,
    PreprocessConfig,
    check_preprocess,
    check_tokenizer,
    client_embed,
)
from r1export.verify.contents import UNREADABLE, attempt
from r1export.verify.golden import (
    GoldenRuns,
    check_classifier,
    check_golden,
    golden_parity,
    golden_sensitivity,
    read_golden,
)
from r1export.verify.latency import DEFAULT_BUDGET, TimingBudget
from r1export.verify.parity import GATES
from r1export.verify.proof import Feeds
from r1export.verify.results import (
    SKIPPED,
    UNSIGNED,
    UNTIMED,
    Check,
    Contents,
    Latency,
    Parity,
    ParityStages,
    Proof,
    ReleaseFacts,
    ReleaseReport,
    Verdict,
    overall,
)  # fmt: skip
from r1export.verify.runtimes.runtime import check_provider
from r1export.verify.signature import SignedUpdate, check_signature
from r1export.verify.static_graphs import check_static_graphs
from r1export.verify.trial import Limits, Trial, limits_for, trials, try_graphs

NO_RUN = "needs the run: verify the run folder"
BAD_BASE = "the base release next to it does not pass: verify it first"
NO_BASE = "no base release next to it (../00-base) to compare with"
NO_CARD = "no README.md, as in the versions on a device"
IS_BASE = "the base release is the reference"


def verify_release(
    path: Path | str,
    providers: Sequence[str] = (),
    budget: TimingBudget | None = DEFAULT_BUDGET,
    limits: Limits | None = None,
    update: SignedUpdate | None = None,
) -> ReleaseReport:
    """Verify a release with its golden samples, and against the base release next to it (../00-base), if there is one.

    With an `update` its files must be the signed ones, so that its own manifest need not be trusted.

    Nothing runs in torch, and nothing is timed without a `budget`. The graphs are first run in a separate process within
    `limits` (default: `limits_for`). An outdated report is deleted.

    Raises InputError if `path` is not a release or `update` is malformed, Unsupported for a missing provider.
    """
    path = Path(path)
    manifest, providers = ReleaseManifest.read(path), tuple(providers) or ("cpu",)
    for provider in providers:
        check_provider(provider)
    signature, runs = check_signature(path, manifest.name, update) if update else UNSIGNED, GoldenRuns()
    base_folder = _base_folder(path)
    with trials({path: limits} | ({base_folder: None} if base_folder else {})) as started:
        base = _neighbour(base_folder, runs, started) if base_folder else None
        report = ReleaseReport(
            created=now(),
            environment=environment(providers),
            release=_facts(path, manifest),
            contents=replace(own_contents(path, manifest, started.get(path), base, runs), signature=signature),
            parity=ParityStages.unmeasured(SKIPPED),
            proof=Proof.unmeasured(SKIPPED),
            latency=Latency.unmeasured(SKIPPED),
        )
        if report.contents.golden.detail != SKIPPED:
            report = _measured(report, path, manifest, base, providers, budget, runs)
    if report.verdict is Verdict.FAIL or report.contents.verdict is not Verdict.PASS:
        remove_reports(path)
    return report


@dataclass(frozen=True)
class Neighbour:
    """The base release next to a release; `sound` if it passes by itself."""

    path: Path
    manifest: ReleaseManifest | None
    sound: bool


def _base_folder(path: Path) -> Path | None:
    """None for the base itself, and where there is none."""
    base = path.parent / "00-base"
    return base if base.is_dir() and base.resolve() != path.resolve() else None


def _neighbour(base: Path, runs: GoldenRuns, started: Mapping[Path, Trial]) -> Neighbour:
    try:
        manifest = ReleaseManifest.read(base)
    except R1ExportError:
        return Neighbour(base, None, sound=False)
    return Neighbour(
        base, manifest, sound=own_contents(base, manifest, started.get(base), runs=runs).verdict is Verdict.PASS
    )


def _measured(
    report: ReleaseReport,
    path: Path,
    manifest: ReleaseManifest,
    base: Neighbour | None,
    providers: Sequence[str],
    budget: TimingBudget | None,
    runs: GoldenRuns,
) -> ReleaseReport:
    """The report of a release whose graphs can be run."""
    unknown = Parity.not_applicable(NO_RUN)
    export = _export_parity(path, manifest, base, providers, runs)
    report = replace(report, parity=ParityStages(merge=unknown, export=export, total=unknown))
    if Verdict.FAIL in (report.contents.verdict, export.verdict):
        return report
    report = replace(report, sensitivity=golden_sensitivity(path, manifest))
    if base is None:
        reason = NO_BASE if manifest.sequence else IS_BASE
        return replace(report, proof=Proof.not_applicable(reason), latency=Latency.not_applicable(reason))
    return _compare_with_base(report, path, manifest, base, providers, budget)


def own_contents(
    path: Path,
    manifest: ReleaseManifest,
    trial: Trial | None = None,
    base: Neighbour | None = None,
    runs: GoldenRuns | None = None,
) -> Contents:
    """The checks that need no run, but the `base` next to it; golden samples use `runs`.

    `trial` is that of the release if it has begun already.
    """
    tasks = [task.name for task in manifest.tasks]
    runs = runs or GoldenRuns()
    identity = check_manifest_and_files(path, manifest, tasks, _expected_fields(manifest, base))
    if overall(check.verdict for check in identity.values()) is Verdict.FAIL:
        return Contents.only(SKIPPED, **identity)
    if problem := trial.result(runs) if trial else try_graphs(path, limits_for(path), runs):
        return Contents.only(SKIPPED, **identity, graphs=Check.failed(problem, of=len(GRAPHS)))
    classes = sum(task.classes for task in manifest.tasks)
    return Contents(
        **identity,
        base=attempt(lambda: _check_base(path, manifest, base), of=1),
        graphs=attempt(lambda: _check_graphs(path, manifest), of=len(GRAPHS)),
        tensors=attempt(lambda: contents.check_tensor_map(path, manifest, WEIGHT_FILES), of=len(manifest.tensors)),
        weights=Check.not_applicable(NO_RUN),
        preprocess=attempt(lambda: _check_preprocess(path), of=PICTURES),
        tokenizer=attempt(lambda: check_tokenizer(path, read_golden(path)), of=SAMPLES),
        classes=attempt(lambda: _check_classes(path, manifest), of=classes),
        classifier=attempt(
            lambda: check_classifier(path, tasks, map_tensors(path / VISUAL.weights), runs), of=len(tasks)
        ),
        golden=attempt(lambda: check_golden(path, manifest, runs), of=SAMPLES),
        accuracy=Check.not_applicable(NO_RUN),
        card=attempt(lambda: _check_card(path, manifest), of=1),
        signature=UNSIGNED,
    )


def _check_graphs(path: Path, manifest: ReleaseManifest) -> Check:
    """The structures are the released ones, and static graphs, if there are any, compute the same."""
    listed = (*GRAPHS, *(name for name in STATIC_GRAPHS if name in manifest.files))
    return Check.joined([contents.check_programs(path, manifest, listed), *check_static_graphs(path, manifest)])


def _check_card(path: Path, manifest: ReleaseManifest) -> Check:
    """Check the model card if there is one: updates don't carry it to devices."""
    card = path / MODEL_CARD
    return contents.check_text(card, model_card(manifest)) if card.exists() else Check.not_applicable(NO_CARD)


def _expected_fields(manifest: ReleaseManifest, base: Neighbour | None) -> dict[str, object]:
    """The fields that follow from the precision, and from the base release if that is sound."""
    expected: dict[str, object] = {"procedure": PROCEDURES.get(manifest.precision)}
    if base and base.manifest and base.sound:
        expected["base"] = base.manifest.base
    return expected


def _check_preprocess(path: Path) -> Check:
    """Check preprocess.json, and preprocess.onnx if export could write it, on the golden images."""
    return check_preprocess(path, read_golden(path), has_graph(asdict(PreprocessConfig.read(path))))


def _check_base(path: Path, manifest: ReleaseManifest, base: Neighbour | None) -> Check:
    """Check the base: of the base release by its own weights, of others by the base next to it."""
    if base is not None:
        if base.manifest is None or not base.sound:
            return Check.unmeasured(BAD_BASE, of=1)
        named = contents.check_base(manifest, base.manifest.base.sha256, "the base release next to it")
        return Check.joined([named, contents.check_same_places(manifest, base.manifest)])
    if manifest.sequence or manifest.precision != FP32:
        return Check.not_applicable(NO_BASE)
    tensors = {name: value for file in WEIGHT_FILES for name, value in map_tensors(path / file).items()}
    model = {name: _as_in_model(tensors[name], entry) for name, entry in manifest.tensors.items()}
    return contents.check_base(manifest, digest(model), "its own weights")


def _as_in_model(stored: np.ndarray, entry: TensorEntry) -> np.ndarray:
    """A tensor in the shape that it has in the model, which the rows of its entry tell: none for a scalar."""
    value = stored.T if entry.transposed else stored
    if not entry.rows:
        return value.reshape(())
    while value.shape[0] == 1 and value.ndim > 1 and entry.rows[-1][1] != 1:
        value = value[0]
    return value


def _check_classes(path: Path, manifest: ReleaseManifest) -> Check:
    """The listed names give the class embeddings, by the release's own tokenizer and text tower; every task has its own."""
    lists = [ListedClasses.read(path / class_names_file(task.name)) for task in manifest.tasks]
    problems = [
        f"{class_names_file(task.name)} lists {len(one.classes)} classes of {one.task}, manifest.json {task.classes} of {task.name}"
        for task, one in zip(manifest.tasks, lists, strict=True)
        if (one.task, len(one.classes), one.learned) != (task.name, task.classes, task.learned)
    ]
    listed = Check.judge(problems, looked_at=len(lists), of=len(lists), detail="names and tasks agree")
    tolerance = 2 * GATES[manifest.precision].max_abs
    return Check.joined([listed, contents.check_class_embeddings(path, lists, client_embed(path), tolerance)])


def _facts(path: Path, manifest: ReleaseManifest) -> ReleaseFacts:
    return ReleaseFacts(
        index=manifest.sequence,
        name=manifest.name,
        precision=manifest.precision,
        manifest_sha256=sha256_file(path / MANIFEST),
        base=manifest.base.name,
        base_sha256=manifest.base.sha256,
    )


def _export_parity(
    path: Path, manifest: ReleaseManifest, base: Neighbour | None, providers: Sequence[str], runs: GoldenRuns
) -> Parity:
    """Golden samples on every provider. A sound base next to the release calibrates the gate."""
    try:
        control = _control(base, manifest, providers, runs) if base else None
        return golden_parity(path, manifest, providers, control, runs)
    except Unsupported:  # not the fault of the release
        raise
    except UNREADABLE as error:
        return Parity.failed(str(error))


def _control(base: Neighbour, manifest: ReleaseManifest, providers: Sequence[str], runs: GoldenRuns) -> Parity | None:
    """The golden samples of the base, if it is the one that the release names and passes by itself."""
    own = base.manifest
    if own is None or not base.sound or own.base != manifest.base or own.precision != manifest.precision:
        return None
    try:
        return golden_parity(base.path, own, providers, runs=runs)
    except UNREADABLE:
        return None


def _compare_with_base(
    report: ReleaseReport,
    path: Path,
    manifest: ReleaseManifest,
    base: Neighbour,
    providers: Sequence[str],
    budget: TimingBudget | None,
) -> ReleaseReport:
    """Proof and latency against the base release."""
    golden = read_golden(path)
    inputs = parity.Inputs(golden.pixel_values, golden.input_ids)
    feeds = graph_feeds(inputs, golden.image_embeds.shape[1])
    base_graphs, graphs = ({name: folder / name for name in GRAPHS} for folder in (base.path, path))
    executions = run_graphs(base.path, feeds, providers)
    control = Check.not_applicable(NO_RUN)
    report = replace(
        report, proof=proof.prove(base_graphs, graphs, executions, lambda: run_graphs(path, feeds, providers), control)
    )
    if report.proof.verdict is Verdict.FAIL or not executions.runs:
        return report
    if budget is None:
        return replace(report, latency=Latency.not_applicable(UNTIMED))
    tower = _timed_tower(manifest, base.manifest) if base.manifest else VISUAL.name
    return replace(report, latency=_latency(path, base.path, tower, feeds[f"{tower}.onnx"], providers, budget))


def _timed_tower(release: ReleaseManifest, base: ReleaseManifest) -> str:
    """The visual tower, unless only the weights of the textual one differ from the base's."""
    weights = {tower: f"{tower}.safetensors" for tower in parity.TOWERS}
    changed = (tower for tower, name in weights.items() if release.files.get(name) != base.files.get(name))
    return next(changed, VISUAL.name)


def _latency(
    path: Path,
    base: Path,
    tower: str,
    feeds: Feeds,
    providers: Sequence[str],
    budget: TimingBudget,
) -> Latency:
    """Rung L5 on one tower."""
    results: list[Latency] = []
    settings = Verify()
    for provider in timeable(providers):
        graphs = {path.name: path / f"{tower}.onnx"}
        contenders = make_contenders(base / f"{tower}.onnx", graphs, {}, dict(feeds), provider)
        results += latency.added_latency(contenders, settings.pairs, settings.margin, budget).values()
    return latency.slowest(results, tower)
