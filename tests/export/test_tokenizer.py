"""What a client needs besides the graphs gives the client open_clip's own numbers."""

import json

import pytest

from r1export.errors import Unsupported
from r1export.export.tokenizer import write_tokenizer

TEXTS = [
    "a photo of a cat.",
    "A  Photo\tof  THREE   dogs!",
    "",
    "it's we'll don't 42 1234",
    "naïve café – “quoted” 😀 日本語",
    "hyphen-ated_words/and.dots",
    "x" * 200,
    'a photo of the number: "7".',
    "one two three four five six seven eight nine ten eleven twelve thirteen",
]


@pytest.fixture(scope="module")
def written(tiny_files, tmp_path_factory):
    from r1export.adapt.clip import load_clip

    clip = load_clip(weights=tiny_files[0], config=tiny_files[1])
    folder = tmp_path_factory.mktemp("client") / "tokenizer"
    write_tokenizer(clip.tokenizer, folder)
    return clip, folder


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizers_library_gives_open_clips_tokens(text: str, written) -> None:
    """A longer text than fits is cut: CLIP puts the end token in the last place, and so must the client."""
    tokenizers = pytest.importorskip("tokenizers")
    clip, folder = written
    expected = clip.tokenizer([text])[0].tolist()
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == expected


def test_vocabulary_and_merges_are_complete_and_named_as_clients_expect(written) -> None:
    clip, folder = written
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(49408))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)
    assert len((folder / "merges.txt").read_text(encoding="utf-8").splitlines()) == 1 + 48894
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["model_max_length"] == clip.tokenizer.context_length == 12


def test_a_tokenizer_that_cannot_be_written_is_refused(tmp_path) -> None:
    with pytest.raises(Unsupported, match="tokenizer object cannot be written"):
        write_tokenizer(object(), tmp_path / "tokenizer")


def test_preprocess_json_says_all_that_a_client_needs(written) -> None:
    found = written[0].preprocess.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["size"] == [16, 16]
    assert len(found["mean"]) == len(found["std"]) == 3
    assert {"mode", "interpolation", "resize_mode", "scale", "layout"} <= set(found)
