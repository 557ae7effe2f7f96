"""A client with the `tokenizers` library alone gets open_clip's own ids for what people type."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_tokenizers import KINDS, write_hub_tokenizer
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer
from typed_texts import every_character, every_reference, in_reach, typed_texts

from r1export.adapt.hub_tokenizer import TokenizerFiles, hub_tokenizer
from r1export.errors import Unsupported
from r1export.export.tokenizer import write_tokenizer

LENGTH = 16
Lab = Callable[[list[str]], torch.Tensor]


@pytest.fixture(scope="module", params=["clip", *KINDS])
def written(request, tmp_path_factory) -> tuple[str, Lab, Path]:
    """A tokenizer of each kind, and the folder that clients get."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        lab = SimpleTokenizer(context_length=LENGTH)
    else:
        files = TokenizerFiles.local(write_hub_tokenizer(request.param, folder / "hub"))
        lab = hub_tokenizer(files, LENGTH, KINDS[request.param][2])
    write_tokenizer(lab, folder / "tokenizer")
    return request.param, lab, folder / "tokenizer"


def differing(lab: Lab, folder: Path, texts: list[str]) -> list[str]:
    """The texts of which a client gets other ids than the lab."""
    client = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = zip(texts, lab(texts).tolist(), client.encode_batch(texts), strict=True)
    return [text for text, expected, found in pairs if found.ids != expected]


def test_a_client_gets_the_ids_of_the_lab_for_all_that_people_type(written) -> None:
    """10,000 texts for CLIP's own; entities, full width, ligatures, control characters, special tokens, over-long ones."""
    name, lab, folder = written
    count = 10_000 if name == "clip" else 1_000
    texts = [text for text in typed_texts(count) if in_reach(text)]
    assert len(texts) > 0.85 * count
    assert differing(lab, folder, texts) == []


def test_a_client_knows_every_html_reference_and_every_character(written) -> None:
    name, lab, folder = written
    share = {"clip": 1, "gemma": 3}.get(name, 12)  # what cleans is the same for all
    texts = [text for text in (*every_reference(), *every_character())[::share] if in_reach(text)]
    assert differing(lab, folder, texts) == []


def test_text_in_the_wrong_encoding_is_repaired_in_western_words(written) -> None:
    _, lab, folder = written
    whole = ["crème brûlée", "it’s a señor’s café", "Straße – “Übung”", "30 °C, 5 €", "año © España"]
    broken = [text.encode().decode("sloppy-windows-1252") for text in whole]
    assert differing(lab, folder, broken) == []
    assert torch.equal(lab(broken), lab(whole))


@pytest.mark.parametrize(
    "text", ["!<start_of_text>", "<START_of_text>", "a<end_of_text><start_of_text><start_of_text>b", "<|startoftext|>"]
)
def test_a_special_token_that_is_typed_is_taken_as_open_clip_takes_it(text: str, tmp_path) -> None:
    lab = SimpleTokenizer(context_length=LENGTH)
    write_tokenizer(lab, tmp_path / "tokenizer")
    assert differing(lab, tmp_path / "tokenizer", [text]) == []


def test_a_pad_token_that_is_a_word_stays_one(tmp_path) -> None:
    """CLIP pads with "!": as a special token it would split "cat!" otherwise."""
    lab = SimpleTokenizer(context_length=LENGTH)
    write_tokenizer(lab, tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    client = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert (config["pad_token"], config["pad_token_id"]) == ("!", 0)
    assert client.encode("cat!").ids == lab(["cat!"])[0].tolist()
    assert "!" not in {token.content for token in client.get_added_tokens_decoder().values()}


def test_the_config_beside_it_says_how_texts_are_padded_and_cut(written) -> None:
    _, lab, folder = written
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    client = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert config["model_max_length"] == client.truncation["max_length"] == client.padding["length"] == LENGTH
    assert (config["pad_token_id"], config["pad_token"]) == (client.padding["pad_id"], client.padding["pad_token"])
    assert lab([""])[0, -1] == config["pad_token_id"]


def test_vocabulary_and_merges_are_complete_and_in_clips_order(tmp_path) -> None:
    folder = tmp_path / "tokenizer"
    write_tokenizer(SimpleTokenizer(context_length=12), folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(49408))
    assert (vocabulary["<start_of_text>"], vocabulary["<end_of_text>"]) == (49406, 49407)
    assert len((folder / "merges.txt").read_text(encoding="utf-8").splitlines()) == 1 + 48894


@pytest.mark.parametrize("tokenizer", [object(), SimpleTokenizer(reduction_mask="random")], ids=["unknown", "random"])
def test_a_tokenizer_that_cannot_be_written_is_refused(tokenizer: object, tmp_path) -> None:
    with pytest.raises(Unsupported, match=r"is not supported for clients"):
        write_tokenizer(tokenizer, tmp_path / "tokenizer")


def test_preprocess_json_says_all_that_a_client_needs(tiny_clip) -> None:
    found = tiny_clip.preprocess.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["size"] == [16, 16]
    assert len(found["mean"]) == len(found["std"]) == 3
    assert {"mode", "interpolation", "resize_mode", "scale", "layout"} <= set(found)
