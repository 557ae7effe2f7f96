"""Golden samples: stored inputs and outputs that a release has to reproduce without torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, log10
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from r1export.errors import InputError
from r1export.update.container import read_layout, read_tensors
from r1export.update.golden_samples import SAMPLES, GoldenSamples
from r1export.update.release_layout import GOLDEN, VISUAL
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.parity import (
    GATES,
    TOWERS,
    Embeddings,
    ExecutionConfig,
    Gate,
    Inputs,
    Outputs,
    compare,
    difference,
    run_in_batches,
)
from r1export.verify.results import Check, Parity, Sensitivity
from r1export.verify.runtimes.runtime import onnx_model, open_session, runner

BATCHES = (1, 2, 5, 0)
LOGITS = "logits."  # and the name of a task: an array of a saved run
CLASSIFIED = 4  # golden images that are classified, each with the classes of every task
STEPS = 4  # relative changes per decade
CHANGES = tuple(10.0 ** (n / STEPS) for n in range(-6 * STEPS, 1))  # that can be tried, 1e-6 to 1
FLOAT32 = 2.0**-24  # rounding of one operation
ROUNDED = 16  # operations of a logit in addition to its products: exp, scale, bias, and an inexact unit norm


@dataclass(frozen=True)
class Classified:
    """The first CLASSIFIED golden images: embeddings (n, D) of visual.onnx, and logits (n, C) of classify.onnx by task."""

    embeds: np.ndarray
    logits: Mapping[str, np.ndarray]


class GoldenRuns:
    """The outputs of releases for their golden samples, each computed once: in every batch size, and classified."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[Path, str], Outputs] = {}
        self._classified: dict[Path, Classified] = {}

    def of(self, release: Path, provider: str) -> Outputs:
        """Raises CheckFailed if the release cannot be run."""
        if (release, provider) not in self._outputs:
            samples = read_golden(release)
            inputs = Inputs(samples.pixel_values, samples.input_ids)
            configs = [ExecutionConfig(provider, "all", batch) for batch in BATCHES]
            model = onnx_model(release, provider=provider)
            self._outputs[release, provider] = run_in_batches(model, inputs, configs)
        return self._outputs[release, provider]

    def classified(self, release: Path, tasks: Sequence[str]) -> Classified:
        """By the classes of every task. Raises CheckFailed if a graph cannot be run."""
        if release not in self._classified:
            self._classified[release] = _classify(release, tasks)
        return self._classified[release]

    def save(self, path: Path, release: Path) -> None:
        """Write what is known of a release on the CPU as an .npz file: an array per batch size and tower, and per task."""
        classified, outputs = self._classified[release], self._outputs[release, "cpu"]
        arrays = {f"{config.batch}.{t}": embeds.tower(t) for config, embeds in outputs.items() for t in TOWERS}
        logits = {f"{LOGITS}{task}": values for task, values in classified.logits.items()}
        np.savez(path, **arrays, **logits, embeds=classified.embeds)  # type: ignore[arg-type]  # stubs: allow_pickle

    def load(self, path: Path, release: Path) -> None:
        """What `save` wrote. Raises OSError, ValueError or KeyError if it is not there, damaged or incomplete."""
        with np.load(path, allow_pickle=False) as arrays:
            outputs = {
                ExecutionConfig("cpu", "all", batch): Embeddings(*(arrays[f"{batch}.{tower}"] for tower in TOWERS))
                for batch in BATCHES
            }
            logits = {n.removeprefix(LOGITS): arrays[n] for n in arrays.files if n.startswith(LOGITS)}
            classified = Classified(arrays["embeds"], logits)
        self._outputs[release, "cpu"], self._classified[release] = outputs, classified


def golden_parity(
    release: Path,
    manifest: ReleaseManifest,
    providers: Sequence[str] = ("cpu",),
    control: Parity | None = None,
    runs: GoldenRuns | None = None,
) -> Parity:
    """Compare torch's stored outputs with this release in onnxruntime on all `providers`: one stage of parity.

    `control` is the same stage of the base release; `runs` has known outputs.
    Raises CheckFailed if the release cannot be run, InputError as `manifest_gate`.
    """
    samples, gate, runs = read_golden(release), manifest_gate(manifest), runs or GoldenRuns()
    expected = Embeddings(samples.image_embeds, samples.text_embeds)
    outputs: dict[ExecutionConfig, Embeddings] = {}
    for provider in providers:
        outputs |= runs.of(release, provider)
    return compare(expected, outputs, gate, control, of=len(TOWERS) * SAMPLES)


def read_golden(release: Path) -> GoldenSamples:
    """Raises InputError if they cannot be read."""
    return GoldenSamples.from_tensors(read_tensors(release / GOLDEN))


def manifest_gate(manifest: ReleaseManifest) -> Gate:
    """The gate of the release's precision, or the limits in its manifest where they are stricter.

    Raises InputError for an unknown precision.
    """
    if manifest.precision not in GATES:
        raise InputError(
            f"unknown precision {manifest.precision!r}, expected one of {', '.join(GATES)}",
            "verify it with a newer r1export",
        )
    return GATES[manifest.precision].no_laxer_than(manifest.golden.max_abs, manifest.golden.min_cosine)


def check_golden(release: Path, manifest: ReleaseManifest, runs: GoldenRuns | None = None) -> Check:
    """Check that the golden outputs are reproduced. Raises as `golden_parity`."""
    parity = golden_parity(release, manifest, runs=runs)
    reproduced = Check(
        verdict=parity.verdict, looked_at=parity.looked_at, of=parity.of, detail=f"golden.safetensors: {parity.detail}"
    )
    return Check.joined([check_samples(read_tensors(release / GOLDEN)), _check_space(release, manifest), reproduced])


def _check_space(release: Path, manifest: ReleaseManifest) -> Check:
    """Check that the samples name the embedding space of their release; older versions of r1export didn't store it."""
    problems = []
    if read_golden(release).embedding_space not in (None, manifest.embedding_space):
        problems.append(f"{GOLDEN} has another embedding space than manifest.json")
    return Check.judge(problems, looked_at=1, of=1, detail="the samples have the embedding space of the release")


def check_samples(tensors: Mapping[str, np.ndarray]) -> Check:
    """Check that golden.safetensors contains only samples, and different ones. Counts are samples."""
    samples = GoldenSamples.from_tensors(tensors)
    problems = [f"{GOLDEN} has a tensor {name}" for name in sorted(tensors.keys() - samples.tensors().keys())]
    for name, values in (("images", samples.pixel_values), ("prompts", samples.input_ids)):
        if len(values) > 1 and (values == values[:1]).all():
            problems.append(f"{GOLDEN}: all {name} are identical")
    looked_at, of = len(samples.pixel_values) + len(samples.input_ids), 2 * SAMPLES
    return Check.judge(problems, looked_at=looked_at, of=of, detail="its samples differ from each other")


def golden_sensitivity(release: Path, manifest: ReleaseManifest) -> Sensitivity:
    """The smallest relative change of one matrix of the image tower that its golden samples detect, to a quarter of a decade.

    The matrix is the middle one of the largest; an int8 one is changed by its scales. Raises CheckFailed if it cannot be run.
    """
    parameter = _middle_matrix(manifest)
    samples, gate = read_golden(release), manifest_gate(manifest)
    with TemporaryDirectory() as folder:
        for name in (VISUAL.graph, VISUAL.weights):
            shutil.copyfile(release / name, Path(folder) / name)
        spec = read_layout(Path(folder) / VISUAL.weights).by_name[manifest.tensors[parameter].scale or parameter]
        target = np.memmap(Path(folder) / VISUAL.weights, spec.dtype, "r+", spec.offset, spec.shape)
        original = target.astype(np.float32)

        def error(change: float) -> float:
            target[...] = original * np.float32(1 + change)
            target.flush()
            embeds = runner(open_session(Path(folder) / VISUAL.graph))({VISUAL.input: samples.pixel_values})
            distance = difference(samples.image_embeds, [embeds]).max_abs
            return inf if distance is None else distance

        smallest = smallest_noticed(error, gate.max_abs)
    return Sensitivity(parameter=parameter, relative_change=smallest, largest_tried=CHANGES[-1])


def smallest_noticed(error: Callable[[float], float], allowed: float) -> float | None:
    """The smallest of CHANGES whose error is not allowed; None if there is none.

    Larger changes have larger errors. Small ones have proportional errors, which tells where to look next: in most cases it
    is the third change that is tried. Whatever was predicted, it and the next smaller change are tried.
    """
    low, high = 0, len(CHANGES)  # the index that is looked for is one of these or lies between them
    tried = high // 2
    while low < high:
        found = error(CHANGES[tried])
        low, high = (tried + 1, high) if found <= allowed else (low, tried)
        if 0 < found < inf:
            expected = ceil(tried + STEPS * log10(allowed / found))
            tried = expected - 1 if expected > low else expected
        else:
            tried = (low + high) // 2
        tried = max(low, min(tried, high - 1))
    return CHANGES[low] if low < len(CHANGES) else None


def _middle_matrix(manifest: ReleaseManifest) -> str:
    matrices = {n: e for n, e in manifest.tensors.items() if e.file == VISUAL.weights and len(e.shape) == 2}
    largest = max(entry.nbytes for entry in matrices.values())
    names = [name for name, entry in matrices.items() if entry.nbytes == largest]
    return names[len(names) // 2]


def check_classifier(
    release: Path, tasks: Sequence[str], scalars: Mapping[str, np.ndarray], runs: GoldenRuns | None = None
) -> Check:
    """Compare classify.onnx with logits = exp(logit_scale) image_embeds class_embeds^T + logit_bias, in float64 from visual.onnx.

    Scale and bias are taken from `scalars`, and default to 1 and 0; `runs` has known outputs. The embeddings have unit norm and
    are the same in both graphs, and the rest is float32 in every precision: the error of a sum of D products is at most D
    roundings of (scale + |bias|). Counts are tasks. Raises CheckFailed if a graph cannot be run.
    """
    classified = (runs or GoldenRuns()).classified(release, tasks)
    embeds = classified.embeds.astype(np.float64)
    scale, bias = np.exp(_scalar(scalars, "logit_scale")), _scalar(scalars, "logit_bias")
    allowed = (scale + abs(bias)) * (embeds.shape[1] + ROUNDED) * FLOAT32
    problems = []
    for task in tasks:
        expected = scale * embeds @ _class_embeds(release, task).T.astype(np.float64) + bias
        logits = classified.logits[task]
        error = np.abs(logits - expected).max(initial=0) if logits.shape == expected.shape else np.inf
        if not error <= allowed:  # NaN is not
            problems.append(
                f"classify.onnx: logits of classes/{task}.safetensors differ by {error:.2g} from "
                f"{scale:.6g} image_embeds class_embeds^T{f' {bias:+.6g}' if bias else ''}, allowed {allowed:.2g}"
            )
    detail = "the logits of golden images are the scaled dot products of image and class embeddings"
    return Check.judge(problems, looked_at=len(tasks) if len(embeds) else 0, of=len(tasks), detail=detail)


def _classify(release: Path, tasks: Sequence[str]) -> Classified:
    pixels = {"pixel_values": read_golden(release).pixel_values[:CLASSIFIED]}
    embed, classify = (runner(open_session(release / f"{name}.onnx")) for name in ("visual", "classify"))
    logits = {task: classify(pixels | {"class_embeds": _class_embeds(release, task)}) for task in tasks}
    return Classified(embed(pixels), logits)


def _class_embeds(release: Path, task: str) -> np.ndarray:
    return read_tensors(release / "classes" / f"{task}.safetensors")["class_embeds"]


def _scalar(scalars: Mapping[str, np.ndarray], name: str) -> float:
    return float(np.ravel(scalars[name])[0]) if name in scalars else 0.0
