"""An open_clip model config, from a file or by name. A file may describe a model; it may not make open_clip load anything from elsewhere."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip

from r1export.errors import InputError

REQUIRED = frozenset({"embed_dim", "vision_cfg", "text_cfg"})
HUB_ARGUMENTS = {"clean": ("lower", "whitespace", "canonicalize"), "strip_sep_token": (True, False)}  # tokenizer_kwargs
OWN_ARGUMENTS = {"clean": ("lower",)}  # of CLIP's own tokenizer, for which clients get the same
LIMITS = {"layers": 1000, "context_length": 4096, "image_size": 4096}  # far above any published model
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.]+")  # without the schemes that timm fetches from, such as hf-hub:
_REMEDY = "correct or remove it: base.config describes a model and names no place to load from, base.model takes open_clip's names"

Json = dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """A checked config: open_clip's `model_cfg`, and its `preprocess_cfg` where it has one. `origin` is its file or name."""

    origin: str
    name: str
    values: Json
    preprocess: Json | None = None

    @property
    def text(self) -> Json:
        """Its `text_cfg`."""
        text: Json = self.values["text_cfg"]
        return text

    def changed(self, *, image_size: int | None, quick_gelu: bool | None) -> ModelConfig:
        """With another size of images, in pixels, or another activation, where they are given."""
        values = copy.deepcopy(self.values)
        if image_size is not None:
            values["vision_cfg"]["image_size"] = image_size
        if quick_gelu is not None:
            values["quick_gelu"] = quick_gelu
        return replace(self, values=values)

    def build(self, device: str = "cpu") -> Any:
        """The module of open_clip with random weights, as `open_clip.create_model` makes it; nothing is loaded."""
        values = copy.deepcopy(self.values)
        vision, text = values["vision_cfg"], values["text_cfg"]
        custom = values.pop("custom_text", False) or "hf_model_name" in text
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        if "hf_model_name" in text:
            text["hf_model_pretrained"] = False
        kind = open_clip.CoCa if "multimodal_cfg" in values else open_clip.CustomTextCLIP if custom else open_clip.CLIP
        return kind(**values).to(device)


def builtin_config(name: str) -> ModelConfig:
    """The config of one of open_clip's own models. Raises InputError for an unknown name."""
    if name not in open_clip.list_models():
        raise InputError(
            f"open_clip {open_clip.__version__} knows no model {name!r}",
            "open_clip.list_models() names them, or give base.config",
        )
    return ModelConfig(name, name, open_clip.get_model_config(name))


def read_model_config(path: Path, name: str = "") -> ModelConfig:
    """Read and check a config: open_clip's `model_cfg` alone, or an open_clip_config.json with a `preprocess_cfg` beside it.

    Raises:
        InputError: not a JSON object, a required key is missing, or a key would make open_clip, timm or transformers load
            from elsewhere or pass arguments to a loader.
    """
    document = _read(path)
    values, preprocess = document, None
    if "model_cfg" in document:
        values = _object(path, document, "model_cfg")
        preprocess = _object(path, document, "preprocess_cfg") if "preprocess_cfg" in document else None
    if missing := REQUIRED - values.keys():
        raise InputError(f"{path}: no {', '.join(sorted(missing))}", "give an open_clip model config")
    _check_entries(path, values)
    return ModelConfig(str(path), name or path.stem, values, preprocess)


def _check_entries(path: Path, values: Json) -> None:
    text = values["text_cfg"]
    hub = isinstance(text, dict) and bool(text.get("hf_tokenizer_name"))
    for section, key, value in _entries(values):
        judged_by_its_reader = section == "text_cfg." and key == "hf_tokenizer_name"
        if not judged_by_its_reader and (problem := _problem(key, value, HUB_ARGUMENTS if hub else OWN_ARGUMENTS)):
            raise InputError(f"{path}: {section}{key}: {problem}", _REMEDY)


def _object(path: Path, document: Json, key: str) -> Json:
    """A part of an open_clip_config.json."""
    value = document[key]
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: {key}: found {value!r:.80}, expected an object", "give open_clip's open_clip_config.json"
        )
    return value


def _read(path: Path) -> Json:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # lone surrogates, which no file or terminal takes
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not a readable open_clip config: {error}",
            "give the JSON with embed_dim, vision_cfg and text_cfg",
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: found {values!r:.80}, expected an object", "give an open_clip model config")
    return values


def _entries(values: Json, section: str = "") -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of all objects in objects."""
    for key, value in values.items():
        yield section, key, value
        if isinstance(value, dict) and key != "tokenizer_kwargs":
            yield from _entries(value, f"{section}{key}.")


def _problem(key: str, value: Any, tokenizer_arguments: Mapping[str, tuple[Any, ...]]) -> str:
    """What is wrong with one entry; empty if nothing is."""
    if key.startswith("hf_") and value:
        return "loads a tokenizer or a text tower from the Hugging Face Hub"
    if key == "timm_model_pretrained" and value:
        return "loads weights from a hub"
    if key == "timm_model_name" and value and not (isinstance(value, str) and _TIMM_NAME.fullmatch(value)):
        return f"found {value!r:.80}, expected the name of one of timm's own models"
    if key == "tokenizer_kwargs" and value and not _allowed(value, tokenizer_arguments):
        allowed = ", ".join(f"{name} ({' or '.join(map(str, values))})" for name, values in tokenizer_arguments.items())
        return f"found {value!r:.80}, allowed: {allowed}"
    if key in LIMITS and _largest(value) > LIMITS[key]:
        return f"found {value!r:.80}, expected at most {LIMITS[key]}"
    return ""


def _largest(value: Any) -> float:
    """The largest number of a size, which may be a list of sizes."""
    sizes = value if isinstance(value, list) else [value]
    return max((size for size in sizes if isinstance(size, int | float)), default=0)


def _allowed(arguments: Any, known: Mapping[str, tuple[Any, ...]]) -> bool:
    return isinstance(arguments, dict) and all(value in known.get(name, ()) for name, value in arguments.items())
