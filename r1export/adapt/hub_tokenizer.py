"""The tokenizer of a model: CLIP's own, or one of the Hugging Face Hub, read with the `tokenizers` library alone.

open_clip loads the latter through transformers (tokenizer.py: `HFTokenizer`); the ids here are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, SimpleTokenizer, get_clean_fn
from tokenizers import Tokenizer
from torch import Tensor

from r1export.errors import InputError, Unsupported, first_line, refused

Json = dict[str, Any]  # tokenizer.json and related files, as other programs define them
CleanName = Literal["lower", "whitespace", "canonicalize"]
Side = Literal["left", "right"]

AnyTokenizer = Callable[[list[str]], Tensor]  # texts -> int64 (n, context_length)

DEFINITION = "tokenizer.json"
CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")  # a later one overrides an earlier one
PAD_TOKENS = ("[PAD]", "<pad>")  # of classes of transformers whose files need not name it
SEPARATORS = ("[SEP]", "</s>")
DECODER_ONLY = ("GemmaTokenizer", "LlamaTokenizer")
MAX_BYTES = 1 << 28  # of a tokenizer.json; the largest that open_clip names has 34 MB
_REMEDY = "set base.tokenizer to the model's tokenizer.json, or its folder"


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of a folder or repository: tokenizer.json and its settings."""

    origin: str
    definition: Json
    settings: Json

    @classmethod
    def local(cls, path: Path) -> TokenizerFiles:
        """From a tokenizer.json or a folder that has one. Raises InputError."""
        folder, definition = (path, path / DEFINITION) if path.is_dir() else (path.parent, path)
        if not definition.is_file():
            raise InputError(f"{definition}: no such file", f"{_REMEDY}; transformers writes it with save_pretrained")
        beside = [folder / name for name in CONFIGS]
        return cls._read(str(definition), definition, [config for config in beside if config.is_file()])

    @classmethod
    def hub(cls, repository: str) -> TokenizerFiles:
        """From the Hugging Face Hub or its cache. Raises Unsupported where it cannot be fetched, InputError where there is none."""
        definition = fetch(repository, DEFINITION, "base.tokenizer")
        if definition is None:
            raise InputError(f"{repository} has no {DEFINITION}", f"write one with transformers, and {_REMEDY}")
        return cls._read(repository, definition, [file for name in CONFIGS if (file := _optional(repository, name))])

    @classmethod
    def _read(cls, origin: str, definition: Path, configs: Sequence[Path]) -> TokenizerFiles:
        settings: Json = {}
        for config in configs:
            settings |= {key: value for key, value in _object(config).items() if value is not None}
        return cls(origin, _object(definition), settings)

    def named(self, key: str) -> str:
        """The special token that the settings call `key`, such as `pad_token`; empty if they name none."""
        value = self.settings.get(key)
        return str(value.get("content", "") if isinstance(value, dict) else value or "")

    @property
    def kind(self) -> str:
        """The class of transformers that this tokenizer is made for, without `Fast`."""
        return str(self.settings.get("tokenizer_class") or "").removesuffix("Fast")

    @property
    def padding_side(self) -> Side:
        """Where pad tokens go; the decoder-only classes put them first."""
        default = "left" if self.kind in DECODER_ONLY else "right"
        return "left" if self.settings.get("padding_side", default) == "left" else "right"


@dataclass(frozen=True)
class HubTokenizer:
    """Text -> ids: open_clip's cleaning, then what tokenizer.json says, padded and cut to the context length.

    `separator` is the id that becomes 0 wherever it stands, or -1 (open_clip's `strip_sep_token`).
    `names` are the special tokens by their keys in tokenizer_config.json, the pad token among them.
    """

    definition: Json
    context_length: int
    clean: CleanName
    pad_id: int
    separator: int
    names: Mapping[str, str]
    padding_side: Side = "right"

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 (n, context_length)."""
        cleaned = [self._clean(text) for text in texts]
        ids = torch.tensor([encoding.ids for encoding in self._tokenizer.encode_batch(cleaned)], dtype=torch.int64)
        return torch.where(ids == self.separator, 0, ids).reshape(len(cleaned), self.context_length)

    @property
    def rows(self) -> int:
        """How many rows a token embedding needs: one more than the highest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _clean(self) -> Callable[[str], str]:
        clean: Callable[[str], str] = get_clean_fn(self.clean)
        return clean

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(json.dumps(self.definition))
        tokenizer.enable_truncation(self.context_length)
        tokenizer.enable_padding(
            direction=self.padding_side,
            length=self.context_length,
            pad_id=self.pad_id,
            pad_token=self.names["pad_token"],
        )
        return tokenizer


def make_tokenizer(origin: str, text: Mapping[str, Any], local: Path | None, *, may_fetch: bool) -> AnyTokenizer:
    """The tokenizer for a `text_cfg` of open_clip: that of a `local` file or folder, of the hub, or CLIP's own.

    Raises:
        InputError: the config names a tokenizer of the hub and `may_fetch` is false, a file is malformed, or the model has fewer
            token rows than it gives tokens.
        Unsupported: it cannot be fetched.
    """
    length, arguments = text.get("context_length", DEFAULT_CONTEXT_LENGTH), text.get("tokenizer_kwargs") or {}
    repository = text.get("hf_tokenizer_name")
    if text.get("tokenizer_mode"):
        raise InputError(f"{origin}: unknown text_cfg.tokenizer_mode {text['tokenizer_mode']!r}", "remove it")
    if local is None and repository and not may_fetch:
        raise InputError(f"{origin}: text_cfg.hf_tokenizer_name: a config must not load from a hub", _REMEDY)
    if local is None and not repository:
        simple: Any = SimpleTokenizer(context_length=length, **arguments)
        _check_rows(origin, text, simple.vocab_size)
        own: AnyTokenizer = simple
        return own
    files = TokenizerFiles.hub(str(repository)) if local is None else TokenizerFiles.local(local)
    tokenizer = hub_tokenizer(files, length, arguments)
    _check_rows(origin, text, tokenizer.rows)
    return tokenizer


def _check_rows(origin: str, text: Mapping[str, Any], needed: int) -> None:
    rows = text.get("vocab_size", needed)
    if rows < needed:
        raise InputError(
            f"{origin}: text_cfg.vocab_size is {rows}, expected {needed} or more", "use the model's own tokenizer"
        )


def hub_tokenizer(files: TokenizerFiles, context_length: int, arguments: Mapping[str, Any]) -> HubTokenizer:
    """The tokenizer that open_clip makes of these files; `arguments` are the `tokenizer_kwargs` of its config.

    Raises InputError: tokenizer.json is malformed, or nothing says with which token texts are padded.
    """
    definition, tokenizer = _complete(files)
    names = {key: files.named(key) for key in ("bos_token", "eos_token", "cls_token", "sep_token") if files.named(key)}
    padding = (definition.get("padding") or {}).get("pad_token", "")
    pad, pad_id = _first_known(tokenizer, (files.named("pad_token"), padding, *PAD_TOKENS))
    if not pad:
        raise InputError(f"{files.origin}: no pad token", "add pad_token to its tokenizer_config.json")
    _, separator = _first_known(tokenizer, (files.named("sep_token"), *SEPARATORS))
    return HubTokenizer(
        definition=definition,
        context_length=context_length,
        clean=arguments.get("clean", "whitespace"),
        pad_id=pad_id,
        separator=separator if arguments.get("strip_sep_token") else -1,
        names=names | {"pad_token": pad},
        padding_side=files.padding_side,
    )


def _complete(files: TokenizerFiles) -> tuple[Json, Tokenizer]:
    """tokenizer.json in the library's own spelling, with what the classes of transformers change when they load one."""
    tokenizer = _built(files.definition, files.origin)
    definition, template = json.loads(tokenizer.to_str()), _template(files)
    normalizer = definition["normalizer"] or {}
    if normalizer.get("type") == "BertNormalizer" and "do_lower_case" in files.settings:
        definition["normalizer"] = normalizer | {"lowercase": bool(files.settings["do_lower_case"])}
    if template:
        definition["post_processor"] = _post_processor(template, tokenizer, files.origin)
    return definition, _built(definition, files.origin)


def _template(files: TokenizerFiles) -> list[str]:
    """The special tokens around a text (an empty string), where a class of transformers replaces those of tokenizer.json."""
    settings, bos, eos = files.settings, files.named("bos_token"), files.named("eos_token")
    if files.kind in DECODER_ONLY and {"add_bos_token", "add_eos_token"} & settings.keys():
        first, last = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
        return [*([bos] if first else []), "", *([eos] if last else [])]
    if files.kind == "NllbTokenizer":
        language, end = str(settings.get("src_lang") or "eng_Latn"), eos or "</s>"
        return ["", end, language] if settings.get("legacy_behaviour") else [language, "", end]
    return []


def _post_processor(template: Sequence[str], tokenizer: Tokenizer, origin: str) -> Json:
    """A TemplateProcessing. Raises InputError for a token that the vocabulary lacks."""
    ids = {token: tokenizer.token_to_id(token) for token in template if token}
    if missing := [token for token, number in ids.items() if number is None]:
        raise InputError(f"{origin}: {missing[0]!r} is not in its vocabulary", _REMEDY)
    single = [
        {"SpecialToken": {"id": token, "type_id": 0}} if token else {"Sequence": {"id": "A", "type_id": 0}}
        for token in template
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ids.items()},
    }


def _built(definition: Json, origin: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(definition))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exceptions, and panics that are none
        raise InputError(f"{origin}: invalid for the tokenizers library: {first_line(error)}", _REMEDY) from error


def _first_known(tokenizer: Tokenizer, candidates: Sequence[str]) -> tuple[str, int]:
    """The first token that has an id, and the id; ("", -1) if none has."""
    known = ((token, tokenizer.token_to_id(token)) for token in candidates if token)
    return next(((token, number) for token, number in known if number is not None), ("", -1))


def fetch(repository: str, name: str, instead: str) -> Path | None:
    """A file of a repository, from the network or the cache; None if it has none of this name. `instead` is what to give otherwise.

    Raises Unsupported if it cannot be known or fetched.
    """
    try:
        return Path(hf_hub_download(repository, name))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _unreachable(repository, name, error, instead) from error
    except Exception as error:  # what the hub, its client and the disk raise
        raise _unreachable(repository, name, error, instead) from error


def _optional(repository: str, name: str) -> Path | None:
    """As `fetch`, but a file that cannot be reached counts as missing: a cache holds only what was asked for."""
    with suppress(Unsupported):
        return fetch(repository, name, "base.tokenizer")
    return None


def _unreachable(repository: str, name: str, error: Exception, instead: str) -> Unsupported:
    return Unsupported(
        f"{repository}: cannot download {name}: {first_line(error)}", f"download it once, or set {instead}"
    )


def _object(path: Path) -> Json:
    """The JSON object in a file. Raises InputError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}", _REMEDY)
        value = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise refused(error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: invalid JSON: {first_line(error)}", _REMEDY) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {value!r:.80}, expected an object", _REMEDY)
    return value
