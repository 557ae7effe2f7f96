"""Tokenizers of the hub without transformers: the ids that open_clip's HFTokenizer gives, or one line that says what is missing."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import open_clip
import pytest
from hub_tokenizers import KINDS, write_hub_tokenizer
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from typed_texts import typed_texts

from r1export.adapt import hub_tokenizer as module
from r1export.adapt.hub_tokenizer import HubTokenizer, TokenizerFiles, hub_tokenizer, make_tokenizer
from r1export.errors import InputError, R1ExportError, Unsupported

LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {kind: write_hub_tokenizer(kind, root / kind) for kind in KINDS}


def loaded(folder: Path, kind: str) -> HubTokenizer:
    return hub_tokenizer(TokenizerFiles.local(folder), LENGTH, KINDS[kind][2])


@pytest.mark.parametrize(
    "kind", sorted(KINDS.keys() - {"nllb"})
)  # whose class in transformers 5 knows its real files only
def test_the_ids_are_those_of_open_clips_own_wrapper(kind: str, folders) -> None:
    pytest.importorskip("transformers", reason="compares with transformers: pip install 'r1export[hf]'")
    wrapper = open_clip.tokenizer.HFTokenizer(str(folders[kind]), context_length=LENGTH, **KINDS[kind][2])
    texts = typed_texts(1_000, mojibake=0.3)
    assert loaded(folders[kind], kind)(texts).tolist() == wrapper(texts).tolist()


@pytest.mark.parametrize(
    ("kind", "first", "last", "pad"),
    [
        ("gemma", None, "<eos>", "<pad>"),
        ("t5", None, "</s>", "</s>"),
        ("bert", "[CLS]", None, "[PAD]"),
        ("roberta", "<s>", "</s>", "<pad>"),
        ("nllb", "eng_Latn", "</s>", "<pad>"),
    ],
)
def test_a_text_stands_between_the_tokens_of_its_class(kind: str, first, last, pad: str, folders) -> None:
    """The class of transformers decides for gemma and nllb; a bert of CLIPA has no end."""
    tokenizer = loaded(folders[kind], kind)
    ids = [tokenizer._tokenizer.id_to_token(number) for number in tokenizer(["cat"])[0].tolist()]
    filled = ids[: ids.index(pad)] if last != pad else ids[: ids.index(pad) + 1]
    assert first in (None, filled[0])
    assert filled[-1] == last or (last is None and "[SEP]" not in ids)
    assert set(ids[len(filled) :]) == {pad}


def test_every_config_of_open_clip_that_names_a_hub_tokenizer_gets_it_without_transformers(
    folders, monkeypatch
) -> None:
    """49 configs in open_clip 3.3: none needs more than the files of the repository that it names."""
    asked: list[str] = []

    def fetch(repository: str, name: str) -> Path:
        asked.append(repository)
        return folders["bert"] / name if (folders["bert"] / name).exists() else missing()

    def missing():
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(module, "hf_hub_download", fetch)
    named = {}
    for model in open_clip.list_models():
        text = open_clip.get_model_config(model)["text_cfg"]
        if "hf_tokenizer_name" in text:
            named[model] = text["hf_tokenizer_name"]
            tokenizer = make_tokenizer(model, text, None, may_fetch=True)
            assert tokenizer(["a cat"]).shape == (1, text.get("context_length", 77))
    assert len(named) >= 49
    assert set(named.values()) == set(asked)


def test_the_settings_of_gemma_decide_what_stands_around_a_text(folders, tmp_path) -> None:
    """As its class in transformers does, whatever the file says."""
    settings = json.loads((folders["gemma"] / "tokenizer_config.json").read_text(encoding="utf-8"))
    plain = json.loads((folders["gemma"] / "tokenizer.json").read_text(encoding="utf-8")) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert loaded(tmp_path, "gemma")(["cat"]).tolist() == loaded(folders["gemma"], "gemma")(["cat"]).tolist()


def test_a_local_tokenizer_is_taken_in_place_of_the_hubs(folders, monkeypatch) -> None:
    monkeypatch.setattr(module, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    text = open_clip.get_model_config("ViT-B-16-SigLIP2")["text_cfg"]
    for place in (folders["gemma"], folders["gemma"] / "tokenizer.json"):
        assert make_tokenizer("x", text, place, may_fetch=True)(["A cat!"])[0, -1] == 0


def test_a_config_that_names_a_hub_tokenizer_asks_for_a_local_one() -> None:
    with pytest.raises(InputError, match=r"x\.json: text_cfg\.hf_tokenizer_name.*base\.tokenizer"):
        make_tokenizer("x.json", {"hf_tokenizer_name": "a/b"}, None, may_fetch=False)


def test_a_repository_that_cannot_be_reached_or_has_no_tokenizer_json_is_one_line(monkeypatch) -> None:
    def failing(error: Exception):
        def fetch(*_: str) -> str:
            raise error

        return fetch

    monkeypatch.setattr(module, "hf_hub_download", failing(LocalEntryNotFoundError("no network")))
    with pytest.raises(R1ExportError, match=r"a/b.*base\.tokenizer"):
        TokenizerFiles.hub("a/b")
    monkeypatch.setattr(module, "hf_hub_download", failing(ConnectionError("no route")))
    with pytest.raises(Unsupported, match=r"a/b: cannot download tokenizer\.json: no route.*base\.tokenizer"):
        TokenizerFiles.hub("a/b")
    monkeypatch.setattr(module, "hf_hub_download", failing(EntryNotFoundError("404")))
    with pytest.raises(InputError, match=r"a/b has no tokenizer\.json"):
        TokenizerFiles.hub("a/b")


def test_a_folder_without_a_tokenizer_json_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        TokenizerFiles.local(tmp_path)


def test_a_model_with_fewer_rows_than_tokens_is_refused(folders) -> None:
    with pytest.raises(InputError, match=r"vocab_size is 100, expected \d+ or more"):
        make_tokenizer("x.json", {"vocab_size": 100}, folders["gemma"], may_fetch=False)


def test_a_tokenizer_that_names_no_pad_token_is_refused(folders, tmp_path) -> None:
    text = (folders["gemma"] / "tokenizer.json").read_text(encoding="utf-8").replace("<pad>", "<nothing>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="no pad token"):
        hub_tokenizer(TokenizerFiles.local(tmp_path), LENGTH, {})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_tokenizer_json_is_bad_input(data, folders, tmp_path_factory) -> None:
    """Whatever the library does, panics included."""
    whole = json.loads((folders["bert"] / "tokenizer.json").read_text(encoding="utf-8"))
    key = data.draw(st.sampled_from(sorted(whole)))
    whole[key] = data.draw(st.none() | st.integers() | st.text(max_size=4) | st.just([{}]) | st.just({"type": "BPE"}))
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    with suppress(InputError):
        assert hub_tokenizer(TokenizerFiles.local(path), LENGTH, {})(["a cat"]).shape == (1, LENGTH)
