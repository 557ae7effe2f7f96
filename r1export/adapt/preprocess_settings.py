"""Preprocessing settings of a base model: from the recipe, else its config, else all tags of its family.

Weight files don't contain them, and open_clip's default is OpenAI's, which would be silently wrong for MobileCLIP, PE-Core or
SigLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from r1export.errors import InputError

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class PreprocessSettings:
    """What a recipe says; None where it says nothing. Colours are shares of 1, in red, green, blue."""

    mean: Colour | None = None
    std: Colour | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The values that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


UNSET = PreprocessSettings()
OPENAI = PreprocessSettings(
    mean=open_clip.OPENAI_DATASET_MEAN,
    std=open_clip.OPENAI_DATASET_STD,
    interpolation="bicubic",
    resize_mode="shortest",
)
NAMES = tuple(field.name for field in fields(PreprocessSettings))


@dataclass(frozen=True)
class Prepared:
    """The settings that were found, and where, if not in a recipe, a config or a tag."""

    values: dict[str, Any]
    note: str = ""


def of_config(config: Mapping[str, Any] | None, settings: PreprocessSettings) -> Prepared | None:
    """Those of a `preprocess_cfg`, in which open_clip's defaults stand for what it omits; None if there is no config."""
    if config is None:
        return None
    return Prepared(merge_preprocess_dict(PreprocessCfg(), dict(config)) | settings.given)


def of_family(model: str, settings: PreprocessSettings) -> Prepared:
    """Those on which all tags of an open_clip model agree, but where the recipe decides.

    Raises InputError: the model has no tags or they differ, and the recipe does not decide.
    """
    tags = open_clip.list_pretrained_tags_by_model(model) if model in open_clip.list_models() else []
    by_tag = {tag: of_config(open_clip.get_pretrained_cfg(model, tag), settings) for tag in tags}
    found: dict[str, Any] = dict(settings.given)
    for name in (name for name in NAMES if name not in found):
        values = {tag: _hashable(prepared.values[name]) for tag, prepared in by_tag.items() if prepared}
        if len(set(values.values())) != 1:
            raise InputError(*_undecided(model, name, values))
        found[name] = next(iter(values.values()))
    taken = [name for name in NAMES if name not in settings.given]
    said = ", ".join(f"{name} {found[name]}" for name in taken)
    return Prepared(found, f"{said}: so say all tags of {model}" if taken else "")


def _undecided(model: str, name: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """What is not known, and how to say it."""
    lines = "base.mean, base.std, base.interpolation and base.resize_mode"
    if not values:
        return (
            f"{model or 'the base model'}: unknown preprocessing",
            f'set {lines} (OpenAI: mean = {list(open_clip.OPENAI_DATASET_MEAN)}, std = {list(open_clip.OPENAI_DATASET_STD)}, "bicubic", "shortest"), '
            "or preprocess_cfg in the config",
        )
    choices = {value: tag for tag, value in values.items()}
    listed = "; ".join(f"{value} of {tag}" for value, tag in choices.items())
    return f"{model}: its tags differ in {name}: {listed}", f"set base.{name} as in the training of these weights"


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
