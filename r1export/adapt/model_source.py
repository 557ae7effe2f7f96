"""Sources of a base model: an open_clip name and tag, a folder, a Hub repository, or a file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX

from r1export.adapt.checkpoint import SUFFIX
from r1export.adapt.hub_tokenizer import DEFINITION, fetch
from r1export.adapt.model_config import ModelConfig, builtin_config, read_model_config
from r1export.adapt.preprocess_settings import Prepared, PreprocessSettings, of_config, of_family
from r1export.errors import InputError, Unsupported, first_line

CONFIG = "open_clip_config.json"
# As open_clip looks for them (factory.py: `_find_checkpoint_in_dir`), safetensors before pickles.
CHECKPOINTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
_PICKLE = "set base.allow_pickle=true if you trust its source, or convert it to safetensors"


@dataclass(frozen=True)
class Source:
    """A model that was found and not loaded: its config, its weights, and the `tag` of open_clip that they belong to, if any.

    `tokenizer` is that of its folder, if it has one. `may_fetch` where the model is named by open_clip or a repository, so that its
    parts may come from the hub.
    """

    name: str
    config: ModelConfig
    weights: Path | None
    tag: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    may_fetch: bool = False

    def activation(self, wanted: bool | None) -> bool | None:
        """Whether QuickGELU is to be used: as the recipe says, else where the tag was trained with it; None leaves it to the config.

        open_clip builds ViT-B-16 without QuickGELU, warns, and the weights of OpenAI would give other embeddings.
        """
        return wanted if wanted is not None else self.tag.get("quick_gelu") or None

    def preprocess(self, settings: PreprocessSettings) -> Prepared:
        """How pictures are prepared. Raises InputError if nothing says so."""
        known = of_config(self.tag or self.config.preprocess, settings)
        return known or of_family(self.config.name, settings)


def find_source(
    model: str, *, pretrained: str, weights: Path | None, config: Path | None, allow_pickle: bool
) -> Source:
    """The source that these arguments of `load_clip` name; a tag's weights are fetched if need be.

    Raises:
        InputError: nothing is there, or it is a pickle and none is allowed.
        Unsupported: it cannot be fetched.
    """
    if model.startswith(LOCAL_DIR_PREFIX):
        return _in_folder(Path(model.removeprefix(LOCAL_DIR_PREFIX)), allow_pickle)
    if model.startswith(HF_HUB_PREFIX):
        return _in_repository(model.removeprefix(HF_HUB_PREFIX), allow_pickle)
    described = builtin_config(model) if config is None else read_model_config(config)
    _check_tag(described.name, pretrained, known=config is None)
    if not pretrained:
        return Source(described.name, described, weights, may_fetch=config is None)
    tag = open_clip.get_pretrained_cfg(described.name, pretrained)
    file = _download(described.name, pretrained, tag)
    _check_pickle(f"{described.name} {pretrained}", file, allow_pickle)
    return Source(f"{described.name}/{pretrained}", described, file, tag, may_fetch=True)


def _download(model: str, pretrained: str, tag: Mapping[str, Any]) -> Path:
    """The weights of a tag. Raises Unsupported if they cannot be fetched."""
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # what the hub, urllib and the disk raise
        raise Unsupported(
            f"{model} {pretrained}: cannot download the weights: {first_line(error)}",
            "download the weights once, or set base.weights",
        ) from error


def _in_folder(folder: Path, allow_pickle: bool) -> Source:
    if not (folder / CONFIG).is_file():
        problem = "no such folder" if not folder.is_dir() else f"no {CONFIG} in it"
        raise InputError(
            f"{LOCAL_DIR_PREFIX}{folder}: {problem}",
            "use a folder in open_clip's format, or set base.weights and base.config",
        )
    weights = _checkpoint(folder, allow_pickle)
    tokenizer = folder if (folder / DEFINITION).is_file() else None
    config = read_model_config(folder / CONFIG, folder.resolve().name)
    needs_one = bool(config.text.get("hf_tokenizer_name"))
    return Source(f"{LOCAL_DIR_PREFIX}{config.name}", config, weights, tokenizer=tokenizer if needs_one else None)


def _checkpoint(folder: Path, allow_pickle: bool) -> Path:
    """The weights in a folder. Raises InputError if there are none, or only pickles, or several."""
    found = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    others = sorted(folder.glob(f"*{SUFFIX}"))
    if not found and len(others) == 1:
        return others[0]
    if not found:
        names = f"found {', '.join(path.name for path in others[:3])}" if others else "no weights in it"
        raise InputError(
            f"{folder}: {names}", f"expected one of {', '.join(CHECKPOINTS[:3])}; merge weights that are in parts"
        )
    _check_pickle(str(folder), found[0], allow_pickle)
    return found[0]


def _in_repository(repository: str, allow_pickle: bool) -> Source:
    config = fetch(repository, CONFIG, "base.weights and base.config")
    if config is None:
        raise InputError(f"{HF_HUB_PREFIX}{repository} has no {CONFIG}", "set base.weights and base.config")
    for name in CHECKPOINTS:
        if weights := fetch(repository, name, "base.weights and base.config"):
            _check_pickle(repository, weights, allow_pickle)
            described = read_model_config(config, repository.rpartition("/")[2], may_fetch=True)
            return Source(f"{HF_HUB_PREFIX}{repository}", described, weights, may_fetch=True)
    raise InputError(
        f"{HF_HUB_PREFIX}{repository} has none of {', '.join(CHECKPOINTS)}", "set base.weights and base.config"
    )


def _check_tag(model: str, tag: str, *, known: bool) -> None:
    tags = open_clip.list_pretrained_tags_by_model(model) if known else []
    if tag and tag not in tags:
        raise InputError(f"{model} has no pretrained tag {tag!r}", f"known tags: {', '.join(tags) or 'none'}")


def _check_pickle(owner: str, file: Path, allow_pickle: bool) -> None:
    """Raises InputError if torch would have to unpickle a file unasked."""
    if not (allow_pickle or file.suffix == SUFFIX):
        raise InputError(f"{owner}: {file} is not safetensors, and unpickling can run code", _PICKLE)
