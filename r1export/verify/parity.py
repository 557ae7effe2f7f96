"""Parity: three separate errors.

    merge    unmerged torch against merged torch      export   merged torch against ONNX
    total    unmerged torch against ONNX: the deployed model

"Unmerged" is the model with its experts as separate branches and a constant gate. Embeddings have unit norm. The error of
the base model's own export, in the same precision, is the control that the gate is calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from r1export.errors import CheckFailed
from r1export.verify.results import Difference, Flip, Histogram, Parity, Verdict

Encode = Callable[[np.ndarray], np.ndarray]
TOWERS = ("visual", "textual")
ENTRIES = {"visual": "pixel_values", "textual": "input_ids"}  # the input of each tower's graph
HISTOGRAM_EDGES = np.logspace(-12, 1, 27)


@dataclass(frozen=True)
class Model:
    """A CLIP as two functions: pixel_values (n, 3, H, W) -> (n, D) and input_ids (n, L) -> (n, D).

    `workers` is how many calls may run at a time, each in its own thread.
    """

    visual: Encode
    textual: Encode
    workers: int = 1

    def tower(self, name: str) -> Encode:
        return self.visual if name == "visual" else self.textual


@dataclass(frozen=True)
class Inputs:
    """Real inputs: images of the task's test set and prompts of its classes.

    The first `answers` prompts are those among which a top-1 is chosen: no two of one class. None: all of them.
    """

    visual: np.ndarray
    textual: np.ndarray
    answers: int | None = None

    def tower(self, name: str) -> np.ndarray:
        return self.visual if name == "visual" else self.textual

    def __len__(self) -> int:
        """Images and prompts."""
        return len(self.visual) + len(self.textual)


@dataclass(frozen=True)
class ExecutionConfig:
    """One way of running a model; `batch` 0 is all inputs at once."""

    provider: str
    level: str
    batch: int

    def __str__(self) -> str:
        batch = f"batch size {self.batch}" if self.batch else "all inputs at once"
        return f"{self.provider} at level {self.level}, {batch}"


@dataclass(frozen=True)
class Embeddings:
    """The outputs of both towers for the same inputs: (n, D) and (m, D)."""

    visual: np.ndarray
    textual: np.ndarray

    def tower(self, name: str) -> np.ndarray:
        return self.visual if name == "visual" else self.textual

    def among(self, answers: int | None) -> Embeddings:
        """The same with only the first `answers` texts."""
        return Embeddings(self.visual, self.textual[:answers])


Outputs = Mapping[ExecutionConfig, Embeddings]


@dataclass(frozen=True)
class Gate:
    """The tolerances in one precision.

    max_abs        largest difference of unit-norm embeddings
    min_cosine     lowest cosine of any sample
    flip_margin    a changed top-1 counts only if the reference preferred its class by more than this cosine
    control_factor allowed error relative to the base model's error in the same comparison
    relative       only the control decides, with the two limits above as its ceiling, since the loss of a coarser
                   precision depends on the model. Otherwise the larger of limit and control decides.
    """

    max_abs: float = 5e-5
    min_cosine: float = 1 - 1e-6
    flip_margin: float = 1e-4
    control_factor: float = 4.0
    relative: bool = False

    def calibrated(self, control: Parity | None) -> Gate:
        """The gate for a merged model, calibrated on the same comparison of the base if that passed."""
        if (
            control is None
            or control.verdict is not Verdict.PASS
            or control.max_abs is None
            or control.min_cosine is None
        ):
            return self
        allowed = self.control_factor * control.max_abs
        lowest = 1 - self.control_factor**2 * (1 - control.min_cosine)  # 1 - cosine grows with the square of the error
        if self.relative:
            return replace(self, max_abs=min(self.max_abs, allowed), min_cosine=max(self.min_cosine, lowest))
        return replace(self, max_abs=max(self.max_abs, allowed), min_cosine=min(self.min_cosine, lowest))

    def no_laxer_than(self, max_abs: float, min_cosine: float) -> Gate:
        """The stricter of this gate and other limits. NaN is ignored."""
        stated = max_abs if max_abs <= self.max_abs else self.max_abs
        return replace(
            self, max_abs=stated, min_cosine=min_cosine if min_cosine >= self.min_cosine else self.min_cosine
        )


# fp32: 3e-6 is the error of a correct export of ViT-B/16. fp16 rounds weights and activations to 2^-11: a cosine of
# 1 - 3e-7 on a transformer, 1 - 1e-4 on EfficientNet-Lite0, where rounding the weights alone has that effect. int8 with
# static scales: 6e-3 and a cosine of 0.9997 on a transformer; one doubled scale makes it 6e-2 or more.
GATES = {
    "fp32": Gate(),
    "fp16": Gate(max_abs=2e-2, min_cosine=1 - 5e-3, flip_margin=1e-3, control_factor=3.0, relative=True),
    "int8": Gate(max_abs=0.1, min_cosine=0.97, flip_margin=0.02, control_factor=4.0, relative=True),
}


def run_in_batches(
    model: Model, inputs: Inputs, configs: Iterable[ExecutionConfig]
) -> dict[ExecutionConfig, Embeddings]:
    """Encode all inputs once per configuration; the batch size is applied here.

    Raises CheckFailed naming the tower and the batch size.
    """
    configs = list(configs)
    with ThreadPoolExecutor(model.workers) as pool:
        pending = {
            (config, tower): _start(pool, model.tower(tower), inputs.tower(tower), config.batch)
            for config in sorted(configs, key=lambda one: one.batch or len(inputs), reverse=True)  # the longest first
            for tower in TOWERS
        }
        try:
            return {
                config: Embeddings(*(_joined(pending[config, t], t, inputs.tower(t), config.batch) for t in TOWERS))
                for config in configs
            }
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a failure


Pending = list[Future[np.ndarray]]


def _start(pool: ThreadPoolExecutor, encode: Encode, values: np.ndarray, batch: int) -> Pending:
    """The encoding of each batch."""
    size = batch or max(1, len(values))
    return [pool.submit(encode, values[i : i + size]) for i in range(0, len(values), size)]


def _joined(pending: Pending, tower: str, values: np.ndarray, batch: int) -> np.ndarray:
    """The embeddings (n, D) of all batches."""
    if not pending:
        raise CheckFailed(f"no input for the {tower} tower", "export the release again")
    size = batch or len(values)
    try:
        embeddings = np.concatenate([np.asarray(part.result()) for part in pending])
    except CheckFailed as error:
        where = f"the {tower} tower fails at batch size {min(size, len(values))}"
        raise CheckFailed(f"{where}: {error.message}", error.remedy) from error
    if len(embeddings) != len(values):
        raise CheckFailed(
            f"the {tower} tower gives {len(embeddings)} embeddings for {len(values)} inputs at batch size {size}",
            "export the graphs again",
        )
    return embeddings


def compare(
    reference: Embeddings, outputs: Outputs, gate: Gate, control: Parity | None = None, answers: int | None = None, of: int = 0
) -> Parity:  # fmt: skip
    """One stage of parity: the worst over all `outputs`, and the verdict.

    Top-1 is chosen among the first `answers` texts. `of` is how many inputs there should be (0: as many as there are).
    """
    towers = {
        name: difference(reference.tower(name), [output.tower(name) for output in outputs.values()]) for name in TOWERS
    }
    flips, agreement = _flips(reference.among(answers), [output.among(answers) for output in outputs.values()])
    limits, images = gate.calibrated(control), len(reference.visual)
    samples = images + len(reference.textual)
    worst = _worst(towers.values())
    passes_without_limit = not list(_problems(towers, flips, replace(limits, max_abs=np.inf)))
    return Parity.judge(
        _problems(towers, flips, limits),
        looked_at=samples if outputs else 0,
        of=of or samples,
        detail=f"{len(outputs)} executions agree",
        max_abs=worst.max_abs,
        p99_abs=worst.p99_abs,
        min_cosine=worst.min_cosine,
        top1_agreement=agreement,
        samples=samples,
        tolerance=limits.max_abs,
        least_tolerance=worst.max_abs if passes_without_limit else None,
        min_cosine_required=limits.min_cosine,
        control=control.difference if control else None,
        flips=tuple(flips),
        histogram=_histogram(reference, outputs.values()),
        towers=towers,
        by_provider=_by_provider(reference, outputs),
        providers=tuple(dict.fromkeys(config.provider for config in outputs)),
        levels=tuple(dict.fromkeys(config.level for config in outputs)),
        batches=tuple(dict.fromkeys(min(config.batch or images, images) for config in outputs)),
    )


def difference(reference: np.ndarray, candidates: Sequence[np.ndarray]) -> Difference:
    """The worst of all `candidates` (n, D) against the reference of the same shape."""
    broken = Difference(max_abs=None, p99_abs=None, min_cosine=None)
    if not candidates or not reference.size or any(candidate.shape != reference.shape for candidate in candidates):
        return broken
    expected = _f64(reference)
    with np.errstate(invalid="ignore"):  # Inf - Inf is what is looked for
        differences = np.concatenate([np.abs(_f64(candidate) - expected) for candidate in candidates])
    if not np.isfinite(differences).all():
        return broken
    cosines = np.concatenate([_cosine(expected, _f64(candidate)) for candidate in candidates])
    return Difference(
        max_abs=float(differences.max()),
        p99_abs=float(np.quantile(differences, 0.99)),
        min_cosine=float(np.nan_to_num(cosines, nan=-1).min()),
    )


def sample_errors(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Largest difference of each sample (n); infinite for NaN, Inf and other shapes."""
    if candidate.shape != reference.shape:
        return np.full(len(reference), np.inf)
    with np.errstate(invalid="ignore"):
        errors = np.abs(_f64(candidate) - _f64(reference)).max(1)
    return np.where(np.isfinite(errors), errors, np.inf)


def _worst(differences: Iterable[Difference]) -> Difference:
    """The worst of each figure; None if one of them is."""
    listed = list(differences)
    columns = {name: [getattr(one, name) for one in listed] for name in ("max_abs", "p99_abs", "min_cosine")}
    if None in columns["max_abs"]:
        return Difference(max_abs=None, p99_abs=None, min_cosine=None)
    return Difference(
        max_abs=max(columns["max_abs"]), p99_abs=max(columns["p99_abs"]), min_cosine=min(columns["min_cosine"])
    )


def _by_provider(reference: Embeddings, outputs: Outputs) -> dict[str, Difference]:
    providers = dict.fromkeys(config.provider for config in outputs)
    return {
        provider: _worst(
            difference(reference.tower(tower), [o.tower(tower) for c, o in outputs.items() if c.provider == provider])
            for tower in TOWERS
        )
        for provider in providers
    }


def _problems(towers: Mapping[str, Difference], flips: Sequence[Flip], gate: Gate) -> Iterator[str]:
    """The failed conditions in words; NaN fails all of them."""
    for name, tower in towers.items():
        if tower.max_abs is None or tower.min_cosine is None:
            yield f"the {name} tower gives NaN, Inf, no output or the wrong shape"
        elif not tower.max_abs <= gate.max_abs:
            yield f"the {name} tower differs by {tower.max_abs:.2g}, allowed {gate.max_abs:.2g}"
        elif not tower.min_cosine >= gate.min_cosine:
            yield f"the {name} tower's lowest cosine is {tower.min_cosine:.8f}, required {gate.min_cosine:.8f}"
    if grave := [flip for flip in flips if not flip.margin <= gate.flip_margin]:
        yield f"{len(grave)} top-1 classes changed whose reference margin is more than {gate.flip_margin:g}"


def _f64(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine of each row; NaN for a row of zeros."""
    with np.errstate(invalid="ignore"):
        cosines: np.ndarray = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    return cosines


def _flips(reference: Embeddings, outputs: Sequence[Embeddings]) -> tuple[list[Flip], float]:
    """Images whose nearest text changed, and the share of unchanged ones; None if the shapes differ."""
    shapes = (reference.visual.shape, reference.textual.shape)
    empty = not (outputs and len(reference.visual) and len(reference.textual))
    if empty or any((output.visual.shape, output.textual.shape) != shapes for output in outputs):
        return [], 0.0
    scores = _f64(reference.visual) @ _f64(reference.textual).T
    expected = scores.argmax(1)
    flips: list[Flip] = []
    for output in outputs:
        images, texts = np.nan_to_num(_f64(output.visual)), np.nan_to_num(_f64(output.textual))
        answers = np.nan_to_num(images @ texts.T).argmax(1)
        flips += [
            Flip(
                sample=int(i),
                margin=float(scores[i, expected[i]] - scores[i, answers[i]]),
                before=int(expected[i]),
                after=int(answers[i]),
            )
            for i in np.flatnonzero(answers != expected)
        ]
    return flips, 1 - len(flips) / (len(outputs) * len(expected))


def _histogram(reference: Embeddings, outputs: Iterable[Embeddings]) -> Histogram | None:
    """Histogram of the differences, with bins of half a power of ten; None if the shapes differ."""
    pairs = [(reference.tower(name), output.tower(name)) for name in TOWERS for output in outputs]
    if not pairs or any(left.shape != right.shape for left, right in pairs):
        return None
    with np.errstate(invalid="ignore"):
        differences = np.concatenate([np.abs(_f64(left) - _f64(right)).ravel() for left, right in pairs])
    values = np.clip(np.nan_to_num(differences, nan=10, posinf=10), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts = np.histogram(values, HISTOGRAM_EDGES)[0]
    return Histogram(edges=tuple(HISTOGRAM_EDGES.tolist()), counts=tuple(counts.tolist()))


@dataclass(frozen=True)
class WorstSample:
    """The largest difference of one tower: in which configuration, and on which input."""

    tower: str
    config: ExecutionConfig
    sample: int
    error: float

    def __str__(self) -> str:
        return f"sample {self.sample} of the {self.tower} tower on {self.config}"


def worst_sample(tower: str, reference: Embeddings, outputs: Outputs) -> WorstSample:
    """The worst of a tower over all configurations, of which there is at least one."""
    samples = (
        WorstSample(tower, config, int(errors.argmax()), float(errors.max()))
        for config, output in outputs.items()
        for errors in [sample_errors(reference.tower(tower), output.tower(tower))]
    )
    return max(samples, key=lambda worst: worst.error)


def erring_configs(tower: str, reference: Embeddings, outputs: Outputs, allowed: float) -> list[ExecutionConfig]:
    """The configurations in which the error of a tower exceeds `allowed`."""
    return [
        config
        for config, output in outputs.items()
        if not sample_errors(reference.tower(tower), output.tower(tower)).max() <= allowed
    ]


def unlocated(erring: Sequence[ExecutionConfig]) -> str:
    """The explanation if a tower fails in these configurations although no node diverges without the optimizer on cpu."""
    if any(config.provider == "cpu" and config.level == "disable" for config in erring):
        return "no single node diverges from torch: the difference accumulates over many nodes"
    places = ", ".join(dict.fromkeys(f"level {config.level} on {config.provider}" for config in erring))
    return f"nothing diverges without the optimizer on cpu: the difference occurs only at {places}"
