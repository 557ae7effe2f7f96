"""Tokenizers in the formats of the hub, trained in a second on a few words: made for tests, with the classes' own settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = (
    "a photo of a cat. a picture of the dog's tail; it doesn't matter! many cars, trains & boats near river-side houses",
    "naïve café façade über straße señor Ελλάδα οδός Москва привет 你好 世界 日本語 العربية كتاب हिन्दी 😀🚗 1234567890",
    'The QUICK Brown fox jumps over the lazy dog, "quoted" (bracketed) [squared] {curly} <tag> #hash @at 100% a_b c/d',
)
SIZE = 600


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def _around(first: str, last: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    tokens = [token for token in (first, last) if token]
    single = " ".join(filter(None, (first and f"{first}:0", "$A:0", last and f"{last}:0")))
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens]
    )


def gemma() -> Tokenizer:
    """SigLIP2's: byte-pair encoding over ▁, with bytes as a fallback, markup and runs of ▁ as added tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    _train(
        tokenizer, trainers.BpeTrainer(vocab_size=SIZE + 256, special_tokens=[*special, *bytes_], show_progress=False)
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("▁▁", "▁▁▁", "\n\n", "<b>", "</b>", "[multimodal]")]
    )
    tokenizer.post_processor = _around("", "<eos>", tokenizer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(raw))


def t5() -> Tokenizer:
    """SigLIP's and mT5's: unigrams over ▁ after NFKC."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=special, unk_token="<unk>", show_progress=False)
    _train(tokenizer, trainer)
    tokenizer.post_processor = _around("", "</s>", tokenizer)
    return tokenizer


def bert() -> Tokenizer:
    """CLIPA's: word pieces in lower case without accents."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False))
    tokenizer.post_processor = _around("[CLS]", "[SEP]", tokenizer)
    return tokenizer


def roberta() -> Tokenizer:
    """Byte-pair encoding over bytes; `<mask>` takes the space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    _train(tokenizer, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def xlm_roberta() -> Tokenizer:
    """The multilingual ones: unigrams with both ends marked."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=special, unk_token="<unk>", show_progress=False)
    _train(tokenizer, trainer)
    tokenizer.post_processor = _around("<s>", "</s>", tokenizer)
    return tokenizer


def nllb() -> Tokenizer:
    """As xlm-roberta's, with languages: the class of transformers puts one before a text, which the file does not say."""
    tokenizer = xlm_roberta()
    tokenizer.add_special_tokens(["eng_Latn", "fra_Latn"])
    return tokenizer


PAD = {
    "__type": "AddedToken",
    "content": "<pad>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any], dict[str, Any]]] = {
    "gemma": (
        gemma,
        {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True, "eos_token": "<eos>", "pad_token": PAD, "padding_side": "right"},
        {"clean": "canonicalize"},
    ),
    "t5": (t5, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}, {"clean": "canonicalize"}),
    "bert": (bert, {"tokenizer_class": "BertTokenizer", "do_lower_case": True}, {"strip_sep_token": True}),
    "roberta": (roberta, {"tokenizer_class": "RobertaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}, {}),
    "xlm-roberta": (xlm_roberta, {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}, {}),
    "nllb": (nllb, {"tokenizer_class": "NllbTokenizer", "eos_token": "</s>", "pad_token": "<pad>"}, {}),
}  # fmt: skip
"""Name -> how it is trained, its tokenizer_config.json, and the `tokenizer_kwargs` of open_clip's config."""


def write_hub_tokenizer(kind: str, folder: Path) -> Path:
    """The folder, made, with the tokenizer.json and the tokenizer_config.json of this kind."""
    train, config, _ = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    train().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
