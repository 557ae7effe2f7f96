"""Parity of one release of a run: the same real inputs through the unmerged model, the merged model and the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from r1export.data.task import Task
from r1export.errors import CheckFailed
from r1export.pipeline.context import RunContext
from r1export.pipeline.variant import ReleaseRef
from r1export.pipeline.verification.inputs import parity_inputs, sample_count
from r1export.pipeline.verification.torch_models import TorchModels, calls_in_parallel, encoders, module_boundaries
from r1export.verify import parity
from r1export.verify.locate import locate
from r1export.verify.parity import Embeddings, ExecutionConfig, Outputs
from r1export.verify.results import Parity, ParityStages, Verdict
from r1export.verify.runtimes.runtime import PROVIDERS, onnx_model

WHOLE = ExecutionConfig("torch", "eager", 0)


@dataclass(frozen=True)
class TorchRun:
    """The torch models of a release on the inputs of one task; each is run once, for all precisions."""

    context: RunContext
    models: TorchModels
    task: Task

    @cached_property
    def inputs(self) -> parity.Inputs:
        return parity_inputs(self.context, self.task)

    @property
    def input_count(self) -> int:
        """Images and prompts that the inputs have to have."""
        return 2 * min(sample_count(self.context), len(self.task.test))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes of the recipe, and all inputs at once (0)."""
        return tuple(dict.fromkeys((*self.context.recipe.verify.batches, 0)))

    @cached_property
    def merged(self) -> Embeddings:
        """Of all inputs at once."""
        model = replace(encoders(self.models.merged.model), workers=1)  # two long calls, which torch splits by itself
        return parity.run_in_batches(model, self.inputs, [WHOLE])[WHOLE]

    @cached_property
    def unmerged_outputs(self) -> Outputs:
        """In every batch size."""
        configs = [replace(WHOLE, batch=batch) for batch in self.batches]
        with calls_in_parallel():
            return parity.run_in_batches(encoders(self.models.unmerged.model), self.inputs, configs)

    @property
    def unmerged(self) -> Embeddings:
        """Of all inputs at once."""
        return self.unmerged_outputs[WHOLE]


def base_control(base: ReleaseRef, run: TorchRun, providers: Sequence[str]) -> Parity:
    """What the base's own export errs by on the inputs of a task, optimized as clients run it: all inputs at once."""
    try:
        outputs: dict[ExecutionConfig, Embeddings] = {}
        for provider in providers:
            configs = [ExecutionConfig(provider, "all", 0)]
            outputs |= parity.run_in_batches(onnx_model(base.path, provider=provider), run.inputs, configs)
    except CheckFailed as error:
        return Parity.failed(str(error), of=run.input_count)
    return parity.compare(run.merged, outputs, base.variant.gate, answers=run.inputs.answers, of=run.input_count)


def release_parity(ref: ReleaseRef, run: TorchRun, control: Parity | None, providers: Sequence[str]) -> ParityStages:
    """The three stages. The base has nothing to merge, and the merge is the same in every precision."""
    if ref.is_base:
        nothing = Parity.not_applicable("the base release has no merge")
        return ParityStages(merge=nothing, export=_onnx_parity(ref, run, None, providers).export, total=nothing)
    stages = _onnx_parity(ref, run, control, providers)
    return replace(stages, merge=_merge_parity(run, control, ref)) if ref.variant.is_reference else stages


def _merge_parity(run: TorchRun, control: Parity | None, ref: ReleaseRef) -> Parity:
    """Merged torch, all inputs at once, against unmerged torch in every batch size."""
    answers, of = run.inputs.answers, run.input_count
    stage = parity.compare(run.merged, run.unmerged_outputs, ref.variant.gate, control, answers, of)
    return replace(stage, providers=(), levels=(), by_provider=None)


def _onnx_parity(ref: ReleaseRef, run: TorchRun, control: Parity | None, providers: Sequence[str]) -> ParityStages:
    """Export and total. What cannot be run has failed."""
    merge = Parity.not_applicable("the merge is checked in fp32")
    try:
        outputs: dict[ExecutionConfig, Embeddings] = {}
        for provider in providers:
            outputs |= _run_provider(ref, run, provider)
    except CheckFailed as error:
        detail = "; ".join([str(error), *_located(ref, run, {})])
        failed = Parity.failed(str(error), of=run.input_count)
        return ParityStages(merge=merge, export=replace(failed, detail=detail), total=failed)
    export = _stage(ref, run, run.merged, outputs, control)
    if export.verdict is Verdict.FAIL:
        export = replace(export, detail="; ".join([export.detail, *_located(ref, run, outputs, export.tolerance)]))
    total = export if not run.models.pools else _stage(ref, run, run.unmerged, outputs, control)
    return ParityStages(merge=merge, export=export, total=total)


def _stage(ref: ReleaseRef, run: TorchRun, reference: Embeddings, outputs: Outputs, control: Parity | None) -> Parity:
    stage = parity.compare(reference, outputs, ref.variant.gate, control, run.inputs.answers, run.input_count)
    if stage.verdict is not Verdict.FAIL:
        return stage
    worst = max((parity.worst_sample(t, reference, outputs) for t in parity.TOWERS), key=lambda sample: sample.error)
    return replace(stage, detail=f"{stage.detail}; worst: {worst}")


def _run_provider(ref: ReleaseRef, run: TorchRun, provider: str) -> Outputs:
    """All inputs through the graphs on one provider, at every level of optimization that it has and in every batch size."""
    outputs: dict[ExecutionConfig, Embeddings] = {}
    for level in PROVIDERS[provider].levels:
        configs = [ExecutionConfig(provider, level, batch) for batch in run.batches]
        outputs |= parity.run_in_batches(onnx_model(ref.path, level=level, provider=provider), run.inputs, configs)
    return outputs


def _located(ref: ReleaseRef, run: TorchRun, outputs: Outputs, tolerance: float | None = None) -> Iterator[str]:
    """The first diverging node of each tower on its worst sample and the next, with a reproducer in the run's failures."""
    model = run.models.merged.model
    for tower, entry in parity.ENTRIES.items():
        values = run.inputs.tower(tower)
        first = parity.worst_sample(tower, run.merged, outputs).sample if outputs else 0
        few = values[[first, (first + 1) % len(values)]]
        boundaries, output = module_boundaries(model, partial(encoders(model).tower(tower), few))
        case = ref.variant.exports.path / "failures" / ref.path.name / tower
        try:
            divergence = locate(
                ref.path / f"{tower}.onnx", {entry: few}, boundaries, output, case, ref.variant.precision
            )
        except CheckFailed as error:
            yield f"{tower}.onnx: {error.message}"
            continue
        if divergence:
            script = case.relative_to(ref.context.run.path) / "reproduce.py"
            yield f"{tower}.onnx: {divergence}; reproduce with {script}"
        elif outputs and (erring := parity.erring_configs(tower, run.merged, outputs, tolerance or 0.0)):
            yield f"{tower}.onnx: {parity.unlocated(erring)}"
