"""Parity of one release of a run: the same real inputs through the unmerged model, the merged model and the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from r1export.errors import CheckFailed
from r1export.pipeline.context import RunContext
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.torch_models import TorchModels, encoders, module_boundaries
from r1export.verify import parity
from r1export.verify.locate import locate
from r1export.verify.runtime import levels, open_session, runner
from r1export.verify.ways import Way, Worst, erring_ways, unlocated, worst_of


class TorchOutputs:
    """What the two torch models of a release give for its inputs, computed once for all its precisions."""

    def __init__(self, context: RunContext, inputs: parity.Inputs) -> None:
        self.inputs = inputs
        self.batches = tuple(dict.fromkeys((*context.recipe.verify.batches, 0)))  # 0: all samples at once
        self._merged: parity.Outputs | None = None
        self._unmerged: parity.Outputs | None = None

    @property
    def counts(self) -> list[int]:
        """The batch sizes in images."""
        return [size or len(self.inputs.visual) for size in self.batches]

    def merged(self, models: TorchModels) -> parity.Outputs:
        """All inputs at once."""
        self._merged = self._merged or parity.run_in_batches(encoders(models.merged.model), self.inputs, (0,))
        return self._merged

    def unmerged(self, models: TorchModels) -> parity.Outputs:
        """In every batch size, all inputs at once last."""
        self._unmerged = self._unmerged or parity.run_in_batches(
            encoders(models.unmerged.model), self.inputs, self.batches
        )
        return self._unmerged


def base_control(
    form: Variant, path: Path, outputs: TorchOutputs, models: TorchModels, providers: tuple[str, ...]
) -> dict[str, Any]:
    """What the base's own export errs by on the inputs of a task, optimised as clients run it: all inputs at once."""
    try:
        found = parity.Outputs.join(
            parity.run_in_batches(_onnx(path, "all", provider), outputs.inputs, (0,)) for provider in providers
        )
    except CheckFailed as error:
        return parity.unrunnable(str(error))
    return parity.compare(outputs.merged(models), found, form.gate, answers=outputs.inputs.answers)


def merge_parity(
    form: Variant, outputs: TorchOutputs, models: TorchModels, control: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Merged torch, all inputs at once, against unmerged torch in every batch size."""
    answers = outputs.inputs.answers
    found = parity.compare(outputs.merged(models), outputs.unmerged(models), form.gate, control, answers)
    return found | {"batches": outputs.counts}


def onnx_parity(
    form: Variant,
    path: Path,
    outputs: TorchOutputs,
    models: TorchModels,
    control: Mapping[str, Any] | None,
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """Export, and total where there is something to merge. What cannot be run has failed."""
    asked = list(dict.fromkeys(level for provider in providers for level in levels(provider)))
    facts = {"batches": outputs.counts, "levels": asked, "providers": list(providers)}
    references = {"export": outputs.merged(models)}
    if models.pools:
        references["total"] = outputs.unmerged(models).last()
    try:
        found = {provider: _runs(path, provider, outputs) for provider in providers}
    except CheckFailed as error:
        stages = {name: parity.unrunnable(str(error)) for name in references}
        stages["export"]["detail"] = "; ".join([str(error), *_located(form, path, outputs.inputs, models, {}, {})])
        return stages
    candidate = parity.Outputs.join(found.values())
    ways = [Way(name, level, size) for name in providers for level in levels(name) for size in outputs.batches]
    stages = {
        name: parity.compare(reference, candidate, form.gate, control, outputs.inputs.answers)
        | facts
        | {"by_provider": {provider: parity.figures(reference, one) for provider, one in found.items()}}
        for name, reference in references.items()
    }
    for name, stage in stages.items():
        if stage["verdict"] == "fail":
            by_tower = {t: worst_of(t, references[name], candidate, ways) for t in parity.TOWERS}
            said = [stage["detail"], f"worst: {max(by_tower.values(), key=lambda worst: worst.error)}"]
            if name == "export":
                erring = {t: erring_ways(t, references[name], candidate, ways, stage["tolerance"]) for t in by_tower}
                said += _located(form, path, outputs.inputs, models, by_tower, erring)
            stage["detail"] = "; ".join(said)
    return stages


def _located(
    form: Variant,
    path: Path,
    inputs: parity.Inputs,
    models: TorchModels,
    worst: Mapping[str, Worst],
    erring: Mapping[str, Sequence[Way]],
) -> Iterator[str]:
    """The first diverging node of each tower on its worst sample and the next, with a reproducer beside the releases."""
    encode = encoders(models.merged.model)
    for tower, name in parity.ENTRIES.items():
        values, first = inputs.tower(tower), worst[tower].sample if tower in worst else 0
        few = values[[first, (first + 1) % len(values)]]
        boundaries, output = module_boundaries(models.merged.model, partial(encode.tower(tower), few))
        case = form.exports.path / "failures" / path.name / tower
        try:
            at = locate(path / f"{tower}.onnx", {name: few}, boundaries, output, case, form.precision)
        except CheckFailed as error:
            yield f"{tower}.onnx: {error.message}"
            continue
        if at:
            yield f"{tower}.onnx: {at}; to reproduce it: {case.relative_to(form.context.run.path)}/reproduce.py"
        elif ways := erring.get(tower):
            yield f"{tower}.onnx: {unlocated(ways)}"


def _runs(path: Path, provider: str, outputs: TorchOutputs) -> parity.Outputs:
    """All inputs through the graphs on one provider, at every level of optimisation that it has and in every batch size."""
    return parity.Outputs.join(
        parity.run_in_batches(_onnx(path, level, provider), outputs.inputs, outputs.batches)
        for level in levels(provider)
    )


def _onnx(path: Path, level: str, provider: str) -> parity.Model:
    visual, textual = (
        runner(open_session(path / f"{tower}.onnx", level=level, provider=provider)) for tower in parity.TOWERS
    )
    return parity.Model(lambda values: visual({"pixel_values": values}), lambda values: textual({"input_ids": values}))
