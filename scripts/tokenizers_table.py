#!/usr/bin/env python3
"""Writes the section Tokenizers of docs/models.md: every tokenizer that a config of open_clip names, and whether clients get its ids.

    python scripts/tokenizers_table.py [--texts 2000]

The tokenizers of the hub are stood in for by small ones of the same format (tests/hub_tokenizers.py): what is tried is what is
done to a text before and after the vocabulary, with the cleaning, length and arguments of open_clip's config.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_tokenizers import write_hub_tokenizer  # noqa: E402
from typed_texts import in_reach, typed_texts  # noqa: E402

from r1export.adapt.hub_tokenizer import make_tokenizer  # noqa: E402
from r1export.export.tokenizer import write_tokenizer  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by scripts/tokenizers_table.py -->\n", "<!-- end of tokenizers_table.py -->\n"
FORMATS = {
    "SigLIP2": "gemma",
    "SigLIP": "t5",
    "mt5": "t5",
    "xlm": "xlm-roberta",
    "nllb": "nllb",
    "roberta": "roberta",
    "bert": "bert",
}
HEAD = """| tokenizer | format | cleaning | length | models | same ids |
|---|---|---|---|---|---|
"""


def by_tokenizer() -> dict[tuple[str, str, int], list[str]]:
    """(name, cleaning, length) -> the models of open_clip that have it."""
    groups = defaultdict(list)
    for model in open_clip.list_models():
        text = open_clip.get_model_config(model)["text_cfg"]
        name = text.get("hf_tokenizer_name", "")
        arguments = text.get("tokenizer_kwargs") or {}
        cleaning = arguments.get("clean", "whitespace" if name else "lower")
        stripped = ", no separator" if arguments.get("strip_sep_token") else ""
        groups[_family(name), cleaning + stripped, text.get("context_length", 77)].append(model)
    return groups


def _family(name: str) -> str:
    """Repositories of one family whose tokenizers are the same file."""
    return "timm/ViT-*-SigLIP2*" if "SigLIP2" in name else "timm/ViT-*-SigLIP*" if "SigLIP" in name else name


def same_ids(model: str, texts: list[str]) -> int:
    """On how many texts a client with `tokenizers` alone gets the ids of the lab."""
    text: Mapping[str, Any] = open_clip.get_model_config(model)["text_cfg"]
    name = text.get("hf_tokenizer_name", "")
    with tempfile.TemporaryDirectory() as folder:
        local = write_hub_tokenizer(_format(name), Path(folder) / "hub") if name else None
        lab = make_tokenizer(model, text, local, may_fetch=False)
        write_tokenizer(lab, Path(folder) / "tokenizer")
        client = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
        pairs = zip(lab(texts).tolist(), client.encode_batch(texts), strict=True)
        return sum(expected == found.ids for expected, found in pairs)


def _format(name: str) -> str:
    return next(kind for part, kind in FORMATS.items() if part in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    texts = [text for text in typed_texts(parser.parse_args().texts) if in_reach(text)]
    rows = []
    for (name, cleaning, length), models in sorted(by_tokenizer().items()):
        kind = _format(name) if name else "CLIP's own"
        count = f"{len(models)}, such as {models[0]}" if len(models) > 1 else models[0]
        rows.append(
            f"| {name or 'none'} | {kind} | {cleaning} | {length} | {count} | {same_ids(models[0], texts)} of {len(texts)} |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    document = DOCUMENT.read_text(encoding="utf-8")
    before, rest = document.split(BEGIN)
    table = HEAD + "\n".join(rows) + "\n"
    DOCUMENT.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
