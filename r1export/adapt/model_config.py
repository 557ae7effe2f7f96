"""An open_clip model config from a file. It may describe a model; it may not make open_clip load anything from elsewhere."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip

from r1export.errors import InputError

REQUIRED = frozenset({"embed_dim", "vision_cfg", "text_cfg"})
HUB_ARGUMENTS = {"clean": ("lower", "whitespace", "canonicalize"), "strip_sep_token": (True, False)}  # tokenizer_kwargs
OWN_ARGUMENTS = {"clean": ("lower",)}  # of CLIP's own tokenizer, for which clients get the same
LIMITS = {"layers": 1000, "context_length": 4096, "image_size": 4096}  # far above any published model
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.]+")  # without the schemes that timm fetches from, such as hf-hub:
_REMEDY = (
    "correct or remove it: base.config describes a model with CLIP's own tokenizer, base.model takes open_clip's names"
)

Json = dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """The checked config of a file, named after it."""

    path: Path
    name: str
    values: Json

    def register(self) -> None:
        """Make it known to open_clip under its name: the values that were checked, not the file, which may change."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"{self.name}.json"
            copy.write_text(json.dumps(self.values), encoding="ascii")
            open_clip.add_model_config(copy)


def read_model_config(path: Path) -> ModelConfig:
    """Read and check a config.

    Raises:
        InputError: not a JSON object, a required key is missing, or a key would make open_clip, timm or transformers load
            from elsewhere or pass arguments to a loader.
    """
    if ":" in path.stem:
        raise InputError(f"{path}: a colon in the name of a config", "rename the file")
    values = _read(path)
    if missing := REQUIRED - values.keys():
        raise InputError(f"{path}: no {', '.join(sorted(missing))}", "give an open_clip model config")
    text = values["text_cfg"]
    hub = isinstance(text, dict) and bool(text.get("hf_tokenizer_name"))
    for section, key, value in _entries(values):
        judged_by_its_reader = section == "text_cfg." and key == "hf_tokenizer_name"
        if not judged_by_its_reader and (problem := _problem(key, value, HUB_ARGUMENTS if hub else OWN_ARGUMENTS)):
            raise InputError(f"{path}: {section}{key}: {problem}", _REMEDY)
    return ModelConfig(path, path.stem, values)


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
        allowed = ", ".join(
            f"{name} ({' or '.join(map(str, options))})" for name, options in tokenizer_arguments.items()
        )
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
