"""An open_clip model config, from a file or by name. A file may describe a model; it may not make open_clip load anything from elsewhere."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from open_clip.hf_configs import arch_dict

from r1export.errors import InputError, Unsupported, refused

REQUIRED = frozenset({"embed_dim", "vision_cfg", "text_cfg"})
HUB_ARGUMENTS = {"clean": ("lower", "whitespace", "canonicalize"), "strip_sep_token": (True, False)}  # tokenizer_kwargs
OWN_ARGUMENTS = {"clean": ("lower",)}  # of CLIP's own tokenizer, for which clients get the same
LIMITS = {
    "layers": 1000, "context_length": 4096, "image_size": 4096,
    "num_hidden_layers": 1000, "num_layers": 1000, "num_decoder_layers": 1000, "encoder_layers": 1000, "decoder_layers": 1000,
}  # fmt: skip  # far above any published model
HF_READINGS = {  # how open_clip reads a text tower of transformers; names nothing to load
    "hf_pooler_type": ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler"),
    "hf_proj_type": ("linear", "mlp"),
}
TRANSFORMER_TYPES = tuple(arch_dict)
TRANSFORMER = (
    "config.json"  # of transformers, beside an open_clip_config.json or in the folder that hf_model_name names
)
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.]+")  # without the schemes that timm fetches from, such as hf-hub:
_LOCAL_NAME = re.compile(r"[\w./-]{1,200}")  # of a folder
_REMEDY = "fix or remove it: base.config must not load from a hub; base.model accepts open_clip's names"

Json = dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """A checked config: open_clip's `model_cfg`, and its `preprocess_cfg` where it has one. `origin` is its file or name.

    `transformer` is the config of a text tower of transformers, where it does not come from the hub.
    """

    origin: str
    name: str
    values: Json
    preprocess: Json | None = None
    transformer: Json | None = None

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
        """The module of open_clip with random weights, as `open_clip.create_model` makes it; no weights are loaded.

        Raises Unsupported: its text tower needs transformers, which is not installed.
        """
        values = copy.deepcopy(self.values)
        vision, text = values["vision_cfg"], values["text_cfg"]
        custom = values.pop("custom_text", False) or bool(text.get("hf_model_name"))
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        kind = open_clip.CoCa if "multimodal_cfg" in values else open_clip.CustomTextCLIP if custom else open_clip.CLIP
        with self._transformer_folder() as folder:
            if text.get("hf_model_name"):
                text |= {"hf_model_pretrained": False, "hf_model_name": folder or text["hf_model_name"]}
            return kind(**values).to(device)

    @contextmanager
    def _transformer_folder(self) -> Iterator[str]:
        """A folder with the transformer's config, from which transformers reads it; empty for one of the hub."""
        if self.text.get("hf_model_name") and find_spec("transformers") is None:
            raise Unsupported(
                f"{self.name}: the text tower needs transformers, which is not installed",
                "pip install 'r1export[hf]'",
            )
        if self.transformer is None:
            yield ""
            return
        with TemporaryDirectory() as folder:
            (Path(folder) / TRANSFORMER).write_text(json.dumps(self.transformer), encoding="ascii")
            yield folder


def builtin_config(name: str) -> ModelConfig:
    """The config of one of open_clip's own models. Raises InputError for an unknown name."""
    if name not in open_clip.list_models():
        raise InputError(
            f"open_clip {open_clip.__version__} has no model {name!r}",
            "choose one of open_clip.list_models(), or set base.config",
        )
    return ModelConfig(name, name, open_clip.get_model_config(name))


def read_model_config(path: Path, name: str = "", *, may_fetch: bool = False) -> ModelConfig:
    """Read and check a config: open_clip's `model_cfg` alone, or an open_clip_config.json that also has a `preprocess_cfg`.

    With `may_fetch` the config of a transformer may come from the hub, as that of a repository does.

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
        raise InputError(f"{path}: missing {', '.join(sorted(missing))}", "use an open_clip model config")
    values, transformer = _take_transformer(path, values)
    _check_entries(path, values, described=may_fetch or transformer is not None)
    return ModelConfig(str(path), name or path.stem, values, preprocess, transformer)


def _take_transformer(path: Path, values: Json) -> tuple[Json, Json | None]:
    """The config without `text_cfg.hf_model_config`, and what it says of the transformer of a text tower: there, or in a local file.

    Raises InputError: the file or the entry is none that open_clip can build, or names code to load.
    """
    text = values["text_cfg"]
    if not isinstance(text, dict):
        return values, None
    inline = text.get("hf_model_config")
    values = values | {"text_cfg": {key: value for key, value in text.items() if key != "hf_model_config"}}
    if not text.get("hf_model_name"):
        return values, None
    local = _LOCAL_NAME.fullmatch(str(text["hf_model_name"]))
    folders = (*([path.parent / local[0]] if local else []), path.parent)
    file = next((folder / TRANSFORMER for folder in folders if (folder / TRANSFORMER).is_file()), None)
    if inline is None and file is None:
        return values, None
    origin, transformer = (
        (f"{path}: text_cfg.hf_model_config", inline) if inline is not None else (str(file), _read(file or path))
    )
    if (
        not isinstance(transformer, dict)
        or transformer.get("model_type") not in TRANSFORMER_TYPES
        or "auto_map" in transformer
    ):
        raise InputError(
            f"{origin}: not a config of {', '.join(TRANSFORMER_TYPES)}", "use the config.json of the transformer"
        )
    for section, key, value in _entries(transformer):
        if key in LIMITS and _largest(value) > LIMITS[key]:
            raise InputError(f"{origin}: {section}{key}: found {value!r:.80}, expected at most {LIMITS[key]}", _REMEDY)
    return values, transformer


def _check_entries(path: Path, values: Json, *, described: bool) -> None:
    """`described` where the transformer that `hf_model_name` names has its config here."""
    text = values["text_cfg"]
    hub = isinstance(text, dict) and bool(text.get("hf_tokenizer_name"))
    for section, key, value in _entries(values):
        here = section == "text_cfg." and (key == "hf_tokenizer_name" or (key == "hf_model_name" and described))
        if not here and (problem := _problem(key, value, HUB_ARGUMENTS if hub else OWN_ARGUMENTS)):
            raise InputError(f"{path}: {section}{key}: {problem}", _REMEDY)


def _object(path: Path, document: Json, key: str) -> Json:
    """A part of an open_clip_config.json."""
    value = document[key]
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: {key}: found {value!r:.80}, expected an object", "use an open_clip_config.json of open_clip"
        )
    return value


def _read(path: Path) -> Json:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # lone surrogates, which no file or terminal takes
    except PermissionError as error:
        raise refused(error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: invalid JSON: {error}",
            "use an open_clip config with embed_dim, vision_cfg and text_cfg",
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: found {values!r:.80}, expected an object", "use an open_clip model config")
    return values


def _entries(values: Json, section: str = "") -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of all objects in objects."""
    for key, value in values.items():
        yield section, key, value
        if isinstance(value, dict) and key != "tokenizer_kwargs":
            yield from _entries(value, f"{section}{key}.")


def _problem(key: str, value: Any, tokenizer_arguments: Mapping[str, tuple[Any, ...]]) -> str:
    """What is wrong with one entry; empty if nothing is."""
    if key in HF_READINGS and value in (None, *HF_READINGS[key]):
        return ""
    if key == "hf_model_name" and value:
        return "loads a text tower from the Hugging Face Hub; put its config.json into text_cfg.hf_model_config or a folder here"
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
