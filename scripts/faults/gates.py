"""K2: a limit that is read from what it limits, or loosened by a neighbour."""

from __future__ import annotations

import numpy as np

from faults.planting import (
    ALONE,
    ELSEWHERE,
    INSIDE_RUN,
    Fault,
    Plant,
    Site,
    in_manifest,
    in_weight,
    only_run,
    together,
)  # fmt: skip
from r1export.update.container import read_tensors, write_tensors

OURS = "the limits of r1export decide whatever a manifest states, and they hold"
C_FC = "visual.transformer.resblocks.1.mlp.c_fc.weight"
zeroed = in_weight(C_FC, np.zeros_like)


def _gate(max_abs: float, min_cosine: float) -> Plant:
    return in_manifest(lambda m: m.update(golden={"max_abs": max_abs, "min_cosine": min_cosine}))


def _precision(precision: str, procedure: str) -> Plant:
    return in_manifest(lambda m: m.update(precision=precision, procedure=procedure))


def _in_recipe(line: str) -> Plant:
    def plant(site: Site) -> None:
        path = site.run / "recipe.toml"
        text, name = path.read_text("utf-8"), line.split(" = ")[0]
        lines = [line if old.startswith(f"{name} = ") else old for old in text.splitlines()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return plant


def _bad_base(site: Site) -> None:
    """The base errs by far more than its gate allows; the release is as it was."""
    tensors = {name: value.copy() for name, value in read_tensors(site.base / "golden.safetensors").items()}
    tensors["image_embeds"] += np.float32(0.05)
    write_tensors(site.base / "golden.safetensors", tensors)


def _wrong_weights_beside_bad_base(site: Site) -> None:
    _bad_base(site)
    in_weight(C_FC, lambda w: w * 1.05)(site)


FAULTS = (
    Fault("K2", "golden.max_abs = 10, min_cosine = -1, a matrix zeroed", together(zeroed, _gate(10, -1))),
    Fault("K2", "golden.max_abs = 10, min_cosine = -1, the weights right", _gate(10, -1),
          only_run(OURS)),
    Fault("K2", "golden limits NaN, a matrix zeroed", together(zeroed, _gate(float("nan"), float("nan")))),
    Fault("K2", "golden.max_abs = -1", _gate(-1, 0.999999)),
    Fault("K2", "a matrix zeroed", zeroed),
    Fault("K2", "precision int8 on a matrix x 1.05", together(in_weight(C_FC, lambda w: w * 1.05), _precision("int8", "r1-int8-v1"))),
    Fault("K2", "precision fp16 on a matrix x 1.05", together(in_weight(C_FC, lambda w: w * 1.05), _precision("fp16", "r1-f64-v1"))),
    Fault("K2", "precision fp16, the weights right", _precision("fp16", "r1-f64-v1")),
    Fault("K2", "a precision that does not exist", _precision("fp64", "r1-f64-v1")),
    Fault("K2", "recipe: verify.max_abs = 0.5", _in_recipe("max_abs = 0.5"), INSIDE_RUN),
    Fault("K2", "recipe: verify.min_cosine = 0.5", _in_recipe("min_cosine = 0.5"), INSIDE_RUN),
    Fault("K2", "a 00-base that does not reproduce its golden samples", _bad_base, {ALONE: ELSEWHERE}),
    Fault("K2", "a matrix x 1.05 next to such a base", _wrong_weights_beside_bad_base),
)  # fmt: skip
