"""What a client needs to turn prompts into input_ids: the tokenizer as plain JSON and text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1export.errors import Unsupported
from r1export.update.atomic_io import write_file, write_json

# CLIP's word pattern (openai/CLIP simple_tokenizer.py, MIT), as HF tokenizers spells it
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What open_clip's text cleaning (ftfy) does to prompts that people type: straight quotes, single spaces
REPLACED = (("[\u2018\u2019\u201a\u201b]", "'"), ("[\u201c\u201d\u201e\u201f]", '"'), (r"\s+", " "))
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json (readable by the `tokenizers` library), vocab.json, merges.txt and tokenizer_config.json.

    A tokenizer from the model hub saves itself. Raises Unsupported for one that does neither.
    """
    folder.mkdir()
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
        return
    if not hasattr(tokenizer, "bpe_ranks"):
        raise Unsupported(
            f"tokenizer {type(tokenizer).__name__} cannot be written for clients",
            "use a model with CLIP's or a hub tokenizer",
        )
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)]
    special = {
        tokenizer.sot_token_id: START,
        tokenizer.eot_token_id: END,
    }  # open_clip spells them otherwise, with the same ids
    vocab = {special.get(i, token): i for token, i in tokenizer.encoder.items()}
    write_json(folder / "vocab.json", vocab)
    write_file(folder / "merges.txt", ("#version: 0.2\n" + "\n".join(merges) + "\n").encode())
    write_json(folder / "tokenizer.json", clip_tokenizer(vocab, merges, tokenizer.context_length))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": tokenizer.context_length,
            "bos_token": START,
            "eos_token": END,
            "pad_token_id": 0,
            "do_lower_case": True,
        },
    )


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def clip_tokenizer(vocab: Mapping[str, int], merges: list[str], context_length: int) -> dict[str, Any]:
    """CLIP's byte-pair encoding in the format of the `tokenizers` library: padded with 0 and cut to `context_length`."""
    special = [
        {
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in (START, END)
    ]
    frame = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in (START, END)}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": context_length, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": context_length}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, *(_replace(*pair) for pair in REPLACED), {"type": "Lowercase"}]},
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
