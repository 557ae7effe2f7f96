"""A config from outside describes a model. It never makes open_clip, timm or transformers load from elsewhere."""

import json
import resource
import sys
import types
from contextlib import suppress

import open_clip
import pytest
import timm
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from running import r1export
from safetensors.numpy import save_file

from r1export.adapt.clip import load_clip
from r1export.adapt.hub_tokenizer import make_tokenizer
from r1export.adapt.model_config import read_model_config
from r1export.adapt.preprocess_settings import OPENAI
from r1export.errors import InputError


def changed(section: str, key: str, value: object) -> dict:
    """TINY with one entry more."""
    config = json.loads(json.dumps(TINY))
    config.setdefault(section, {})[key] = value
    return config


REACHING_OUT = [
    ("text_cfg", "tokenizer_kwargs", {"trust_remote_code": True}),
    ("text_cfg", "tokenizer_kwargs", {"clean": "lower", "trust_remote_code": False}),
    ("text_cfg", "tokenizer_kwargs", {"bpe_path": "/etc/passwd"}),
    ("text_cfg", "tokenizer_kwargs", {"additional_special_tokens": ["(a+)+"]}),
    ("text_cfg", "tokenizer_kwargs", ["trust_remote_code"]),
    ("text_cfg", "hf_tokenizer_name", "someone/tokenizer"),
    ("text_cfg", "hf_model_name", "someone/model"),
    ("text_cfg", "hf_model_pretrained", True),
    ("multimodal_cfg", "hf_model_name", "someone/model"),
    ("multimodal_cfg", "hf_tokenizer_name", "someone/tokenizer"),
    ("vision_cfg", "timm_model_pretrained", True),
    ("vision_cfg", "timm_model_name", "hf-hub:someone/model"),
    ("vision_cfg", "timm_model_name", "hf_hub:someone/model"),
    ("vision_cfg", "timm_model_name", "local-dir:/tmp"),
    ("vision_cfg", "timm_model_name", ["vit_tiny_patch16_224"]),
]


@pytest.fixture
def loaders(monkeypatch) -> list[str]:
    """The loaders that were called, all of which would read from elsewhere."""
    called: list[str] = []

    def stub(name: str):
        return lambda *_, **__: called.append(name)

    for name in ("get_tokenizer", "create_model", "load_checkpoint", "download_pretrained", "CLIP", "CustomTextCLIP"):
        monkeypatch.setattr(open_clip, name, stub(name))
    monkeypatch.setattr(timm, "create_model", stub("timm"))
    hub = types.SimpleNamespace(from_pretrained=stub("transformers"))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=hub, AutoModel=hub))
    return called


@pytest.mark.parametrize(("section", "key", "value"), REACHING_OUT)
def test_a_key_that_loads_from_elsewhere_ends_the_command_before_a_loader_is_called(
    section: str, key: str, value: object, tmp_path, tiny_files, loaders
) -> None:
    config, recipe = tmp_path / "outside.json", tmp_path / "r.toml"
    config.write_text(json.dumps(changed(section, key, value)), encoding="utf-8")
    recipe.write_text(
        f'[base]\nweights = "{tiny_files[0]}"\nconfig = "{config}"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n'
    )
    result = r1export("train", recipe, "--out", tmp_path / "run")
    assert result.returncode == 2, result.output
    assert f"{section}.{key}" in result.stderr.replace("\n", "")
    assert loaders == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "entry",
    [
        ("text_cfg", "tokenizer_kwargs", {"clean": "lower"}),
        ("text_cfg", "tokenizer_kwargs", None),
        ("text_cfg", "hf_tokenizer_name", None),
        ("vision_cfg", "timm_model_pretrained", False),
    ],
)
def test_a_harmless_value_of_such_a_key_is_taken(entry, tmp_path, tiny_files) -> None:
    config = tmp_path / f"{entry[1]}.json"
    config.write_text(json.dumps(changed(*entry)), encoding="utf-8")
    loaded = load_clip(weights=tiny_files[0], config=config, preprocess=OPENAI)
    assert loaded.tokenize(["a photo"]).shape == (1, 12)


def test_a_name_that_open_clip_takes_for_siglip_gets_the_tokenizer_of_the_config(tmp_path, tiny_files) -> None:
    """open_clip itself would fetch another tokenizer because of the name alone."""
    config = tmp_path / "my-siglip.json"
    config.write_text(json.dumps(TINY), encoding="utf-8")
    loaded = load_clip(weights=tiny_files[0], config=config, preprocess=OPENAI)
    assert isinstance(loaded.tokenizer, open_clip.SimpleTokenizer)


def test_a_config_has_no_pretrained_tags(tmp_path) -> None:
    config = tmp_path / "own.json"
    config.write_text(json.dumps(TINY), encoding="utf-8")
    with pytest.raises(InputError, match="own has no pretrained tag 'openai'"):
        load_clip(config=config, pretrained="openai")


def test_open_clip_learns_no_name_from_a_config(tmp_path, tiny_files) -> None:
    """What is built is what was checked, and a config called as one of open_clip's own models changes none of them."""
    config = tmp_path / "ViT-B-32.json"
    config.write_text(json.dumps(TINY), encoding="utf-8")
    before = open_clip.get_model_config("ViT-B-32")
    assert load_clip(weights=tiny_files[0], config=config, preprocess=OPENAI).model.visual.image_size == (16, 16)
    assert open_clip.get_model_config("ViT-B-32") == before


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "width", 2**22),
        ("vision_cfg", "mlp_ratio", 1e9),
        ("text_cfg", "vocab_size", 10**11),
        ("text_cfg", "width", 2**20),
        ("vision_cfg", "layers", 10**9),
        ("vision_cfg", "layers", [3, 4, 10**9, 3]),
        ("text_cfg", "layers", 1e18),
        ("text_cfg", "context_length", 10**6),
        ("vision_cfg", "image_size", 10**6),
        ("vision_cfg", "image_size", [10**6, 16]),
    ],
)
def test_a_model_of_impossible_size_is_refused_before_memory_is_taken(
    section: str, key: str, value: object, tmp_path, tiny_files
) -> None:
    config = tmp_path / f"huge-{key}.json"
    config.write_text(json.dumps(changed(section, key, value)), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        load_clip(weights=tiny_files[0], config=config, preprocess=OPENAI)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_refused(tmp_path, tiny_clip) -> None:
    config = tmp_path / "few-words.json"
    config.write_text(json.dumps(changed("text_cfg", "vocab_size", 100)), encoding="utf-8")
    parameters = tiny_clip.parameters()
    rows = {"token_embedding.weight": parameters["token_embedding.weight"][:100]}
    save_file(parameters | rows, tmp_path / "few.safetensors")
    with pytest.raises(InputError, match="vocab_size is 100, expected 49408"):
        load_clip(weights=tmp_path / "few.safetensors", config=config, preprocess=OPENAI)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"embed_dim": "\\ud800", "vision_cfg": {}, "text_cfg": {}}',
        '{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"\\udfff": 1}}',
        '{"embed_dim": ' + "9" * 5000 + "}",
        "\udcff",
        "",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_config_that_is_no_json_for_a_program_is_one_line(text: str, tmp_path) -> None:
    config = tmp_path / "c.json"
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"c\.json: ") as caught:
        read_model_config(config)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["hf_model_name", "hf_tokenizer_name", "timm_model_name", "timm_model_pretrained", "tokenizer_kwargs", "width", "x"]
)


@settings(max_examples=200, deadline=None)
@given(
    embed_dim=JSON,
    vision=st.dictionaries(KEYS, JSON, max_size=4),
    text=st.dictionaries(KEYS, JSON, max_size=4),
)
def test_every_config_is_refused_or_names_no_place_to_load_from(embed_dim, vision, text, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}), encoding="utf-8")
    try:
        values = read_model_config(path).values
    except InputError:
        return
    sections = (values["vision_cfg"], values["text_cfg"])
    assert not any(section.get("hf_model_name") for section in sections)
    assert not values["vision_cfg"].get("hf_tokenizer_name")
    if values["text_cfg"].get("hf_tokenizer_name"):
        with pytest.raises(InputError, match="hf_tokenizer_name"):
            make_tokenizer("any.json", values["text_cfg"], None, may_fetch=False)
    assert not any(section.get("timm_model_pretrained") for section in sections)
    assert all(set(section.get("tokenizer_kwargs") or {}) <= {"clean", "strip_sep_token"} for section in sections)
    assert not any(":" in str(section.get("timm_model_name") or "") for section in sections)


SMALL = st.none() | st.booleans() | st.integers(-3, 40) | st.floats(-2, 2) | st.text(max_size=3)


@settings(max_examples=40, deadline=None)
@given(section=st.sampled_from(["vision_cfg", "text_cfg"]), data=st.data())
def test_any_value_in_a_config_gives_a_model_or_bad_input(section: str, data, tiny_files, tmp_path_factory) -> None:
    key = data.draw(st.sampled_from(sorted(TINY[section])))
    path = tmp_path_factory.getbasetemp() / "some.json"
    path.write_text(json.dumps(changed(section, key, data.draw(SMALL))), encoding="utf-8")
    with suppress(InputError):
        load_clip(weights=tiny_files[0], config=path, preprocess=OPENAI).tokenize(["a photo of a dog"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "a folder, expected a .safetensors file"),
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
    ids=["folder", "empty", "other bytes"],
)
def test_weights_that_are_none_end_the_command_with_exit_code_2(content, words: str, tmp_path, tiny_files) -> None:
    weights, recipe = tmp_path / "w.safetensors", tmp_path / "r.toml"
    weights.mkdir() if content is None else weights.write_bytes(content)
    recipe.write_text(
        f'[base]\nweights = "{weights}"\nconfig = "{tiny_files[1]}"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n'
    )
    result = r1export("train", recipe, "--out", tmp_path / "run")
    assert (result.returncode, words in result.stderr.replace("\n", " ")) == (2, True), result.output


@settings(max_examples=40, deadline=None)
@given(patch=st.binary(max_size=60), position=st.integers(0, 400))
def test_damaged_weights_are_bad_input(patch: bytes, position: int, tiny_files, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    whole = tiny_files[0].read_bytes()
    path.write_bytes(whole[:position] + patch + whole[position + len(patch) :])
    with suppress(InputError):
        load_clip(weights=path, config=tiny_files[1])


def test_weights_of_another_dtype_are_converted_and_of_another_shape_refused(tmp_path, tiny_clip, tiny_files) -> None:
    halves = {name: value.astype("float16") for name, value in tiny_clip.parameters().items()}
    save_file(halves, tmp_path / "half.safetensors")
    assert load_clip(weights=tmp_path / "half.safetensors", config=tiny_files[1]).model.logit_scale.ndim == 0
    save_file({**halves, "logit_scale": halves["logit_scale"].reshape(1, 1)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="does not match the model"):
        load_clip(weights=tmp_path / "odd.safetensors", config=tiny_files[1])
