"""The tokenizer files of a release, as plain JSON and text.

The `tokenizers` library alone gives the same ids as in training: open_clip's text cleaning is part of tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from open_clip.tokenizer import get_clean_fn
from tokenizers import Tokenizer

from r1export.errors import Unsupported
from r1export.export.text_cleaning import CleanName, Normalizer, cleaning, escaped, replacement
from r1export.update.atomic_io import write_file, write_json

Json = dict[str, Any]  # tokenizer.json, whose format is the library's

# CLIP's word pattern (openai/CLIP simple_tokenizer.py, MIT) as HF tokenizers spells it; ſ is an s where case is ignored
PATTERN = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<start_of_text>", "<end_of_text>"  # open_clip's names: typed as text they are the tokens themselves
CLIP_PAD = "!"  # the entry with id 0, with which CLIP pads; it is also a word, so no special token
CONTROL = "\x01"  # cleaned texts have no control characters
FRAMES = (CONTROL, "  ", "\U0010fffd")  # around a special token's number: what nobody types into a cleaned text


@runtime_checkable
class HubTokenizer(Protocol):
    """A tokenizer of the Hugging Face Hub, as the lab uses it (adapt/hub_tokenizer.py)."""

    @property
    def definition(self) -> Json: ...
    @property
    def context_length(self) -> int: ...
    @property
    def clean(self) -> CleanName: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def separator(self) -> int: ...
    @property
    def names(self) -> Mapping[str, str]: ...
    @property
    def padding_side(self) -> Literal["left", "right"]: ...


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json; of CLIP's own byte-pair encoding vocab.json and merges.txt as well.

    Raises Unsupported for a tokenizer that is neither open_clip's own nor from the hub, or drops tokens at random.
    """
    folder.mkdir()
    if isinstance(tokenizer, HubTokenizer):
        _write_hub(tokenizer, folder)
    elif hasattr(tokenizer, "bpe_ranks") and tokenizer.reduction_fn is None:
        _write_clip(tokenizer, folder)
    else:
        raise Unsupported(
            f"tokenizer {type(tokenizer).__name__} is not supported for clients",
            "use a model with CLIP's or a hub tokenizer",
        )


def _write_hub(tokenizer: HubTokenizer, folder: Path) -> None:
    write_json(folder / "tokenizer.json", hub_definition(tokenizer))
    _write_config(folder, "PreTrainedTokenizerFast", tokenizer.context_length, tokenizer.pad_id, tokenizer.names)


def _write_clip(tokenizer: Any, folder: Path) -> None:
    """`tokenizer` is open_clip's SimpleTokenizer."""
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)]
    definition = clip_definition(tokenizer.encoder, merges, _clean_name(tokenizer.clean_fn), tokenizer.context_length)
    write_json(folder / "vocab.json", tokenizer.encoder)
    write_file(folder / "merges.txt", ("#version: 0.2\n" + "\n".join(merges) + "\n").encode())
    write_json(folder / "tokenizer.json", definition)
    names = {"bos_token": START, "eos_token": END, "pad_token": CLIP_PAD}
    _write_config(folder, "CLIPTokenizer", tokenizer.context_length, 0, names)


def _write_config(folder: Path, kind: str, length: int, pad_id: int, names: Mapping[str, str]) -> None:
    config = {"tokenizer_class": kind, "model_max_length": length, "pad_token_id": pad_id, **names}
    write_json(folder / "tokenizer_config.json", config)


def _clean_name(clean: Callable[[str], str]) -> CleanName:
    names: tuple[CleanName, ...] = ("lower", "whitespace", "canonicalize")
    return next(name for name in names if get_clean_fn(name) is clean)


def clip_definition(vocab: Mapping[str, int], merges: list[str], clean: CleanName, context_length: int) -> Json:
    """CLIP's byte-pair encoding in the format of the `tokenizers` library: padded with 0 and cut to `context_length`.

    open_clip takes a special token that is typed as a text for the token itself, unless punctuation comes right before it.
    """
    marks = {START: f"{CONTROL}s", END: f"{CONTROL}e"}
    no_punctuation_before = rf"(?<=(?:^|[\s\p{{L}}\p{{N}}])(?:{'|'.join(map(escaped, marks))})*)"
    typed = [replacement(no_punctuation_before + escaped(token), mark) for token, mark in marks.items()]
    frame = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in marks}
    return {
        "version": "1.0",
        "truncation": _truncation(context_length),
        "padding": _padding(context_length, 0, CLIP_PAD),
        "added_tokens": [_added(token, vocab[token]) for token in marks],
        "normalizer": {"type": "Sequence", "normalizers": [*cleaning(clean), *typed]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": START, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": frame,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False,
            "byte_fallback": False, "vocab": dict(vocab), "merges": merges,
        },
    }  # fmt: skip


def hub_definition(tokenizer: HubTokenizer) -> Json:
    """The tokenizer.json of a hub tokenizer with open_clip's cleaning before its own normalizer, padded and cut."""
    definition = dict(tokenizer.definition)
    tokens = _SpecialTokens.of(definition, get_clean_fn(tokenizer.clean), tokenizer.separator)
    own = definition["normalizer"]
    normalizers = [*cleaning(tokenizer.clean), *tokens.normalizers, *([own] if own else [])]
    return definition | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "added_tokens": tokens.added,
        "post_processor": _renumbered(definition["post_processor"], tokenizer.separator),
        "truncation": _truncation(tokenizer.context_length),
        "padding": _padding(tokenizer.context_length, tokenizer.pad_id, tokenizer.names["pad_token"])
        | {"direction": tokenizer.padding_side.capitalize()},
    }


@dataclass(frozen=True)
class _SpecialTokens:
    """The added tokens of a tokenizer, found in cleaned texts.

    The library looks for most of them before it normalizes: in texts that are not cleaned yet. So the last step of the
    cleaning puts a mark in place of each, which the library finds after it.
    """

    added: list[Json]
    normalizers: list[Normalizer]

    @classmethod
    def of(cls, definition: Json, clean: Callable[[str], str], separator: int) -> _SpecialTokens:
        """Those that a cleaned text can contain. A typed `separator` becomes the token with id 0 (open_clip's `strip_sep_token`)."""
        possible = [token for token in definition["added_tokens"] if clean(token["content"]) == token["content"]]
        marks = _marks([token["content"] for token in possible if not token["normalized"]], definition)
        added = [
            token | {"normalized": token["normalized"] or token["content"] in marks}
            for token in possible
            if token["id"] != separator
        ]
        by_id = {token["id"]: token["content"] for token in possible}
        if separator in by_id and marks:
            marks[by_id[separator]] = marks[by_id[0]]
        longest_first = sorted(marks, key=lambda content: (-len(content), content))
        return cls(added, [replacement(escaped(content), marks[content]) for content in longest_first])


def _marks(contents: Sequence[str], definition: Json) -> dict[str, str]:
    """A mark for each special token that the tokenizer's own normalizer leaves distinct; none if there is no such mark."""
    normalizer = Tokenizer.from_str(json.dumps(definition)).normalizer
    for frame in FRAMES:
        marks = {content: f"{frame}{number}{frame}" for number, content in enumerate(contents)}
        if normalizer is None or _survive(marks.values(), frame, normalizer.normalize_str):
            return marks
    return {}


def _survive(marks: Iterable[str], frame: str, normalize: Callable[[str], str]) -> bool:
    return all(normalize(mark) == mark and normalize(f"a{mark}") == normalize("a") + mark for mark in marks)


def _renumbered(value: Any, separator: int) -> Any:
    """The JSON of a post-processor with 0 for every id that is `separator`, around a text."""
    if isinstance(value, dict):
        return {key: inner if key == "type_id" else _renumbered(inner, separator) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renumbered(inner, separator) for inner in value]
    return 0 if value == separator and isinstance(value, int) and not isinstance(value, bool) else value


def _added(content: str, number: int) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    return {"id": number, "content": content, **flags}


def _truncation(length: int) -> Json:
    return {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}


def _padding(length: int, pad_id: int, pad_token: str) -> Json:
    return {
        "strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": pad_id, "pad_type_id": 0,
        "pad_token": pad_token,
    }  # fmt: skip
