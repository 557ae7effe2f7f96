"""Checkpoints as they come: every layout gives the same embeddings, and what is no checkpoint is named for what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1export.adapt.checkpoint import UNSCALED
from r1export.adapt.clip import load_clip
from r1export.adapt.layouts import OPENAI_EXTRAS, without_wrappers
from r1export.errors import InputError

State = dict[str, Tensor]
SIGLIP = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 12, "vocab_size": 600, "width": 32, "heads": 2, "layers": 2, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
    },
}  # fmt: skip


def random_state(config: dict, seed: int = 0) -> State:
    torch.manual_seed(seed)
    model = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(
        **{key: value for key, value in config.items() if key != "custom_text"}
    )
    generator = torch.Generator().manual_seed(seed)  # biases and scales too, which start at 0 and 1
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def written(folder: Path, config: dict, state: State, **document: object) -> dict:
    """Arguments of load_clip for weights and a config in a folder."""
    (folder / "own.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}, **document}), encoding="utf-8"
    )
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "w.safetensors")
    return {"weights": folder / "w.safetensors", "config": folder / "own.json"}


def loaded_state(arguments: dict, **options: object) -> State:
    clip = load_clip(**arguments, **options)
    return {name: torch.from_numpy(value) for name, value in clip.parameters().items()}


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def unpacked(state: State, old: str, new: str, names: tuple[str, str] = ("in_proj_weight", "in_proj_bias")) -> State:
    """A packed projection under `old` as q_proj, k_proj and v_proj under `new`, in the layout of transformers."""
    parts: State = {}
    for packed, kind in zip(names, ("weight", "bias"), strict=True):
        thirds = state[f"{old}{packed}"].chunk(3)
        parts |= {f"{new}{letter}_proj.{kind}": part for letter, part in zip("qkv", thirds, strict=True)}
    return parts


def block_of_transformers(state: State, old: str, new: str) -> State:
    """One block of open_clip's own transformer, as CLIPModel and SiglipModel have it."""
    pairs = (
        ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
    )  # fmt: skip
    block = {f"{new}{b}.{kind}": state[f"{old}{a}.{kind}"] for a, b in pairs for kind in ("weight", "bias")}
    return block | unpacked(state, f"{old}attn.", f"{new}self_attn.")


def as_clip_model(state: State) -> State:
    """The layout of transformers' CLIPModel, positions included."""
    text, vision = "text_model.", "vision_model."
    renamed = {
        f"{text}embeddings.token_embedding.weight": state["token_embedding.weight"],
        f"{text}embeddings.position_embedding.weight": state["positional_embedding"],
        f"{text}embeddings.position_ids": torch.arange(len(state["positional_embedding"]))[None],
        f"{vision}embeddings.class_embedding": state["visual.class_embedding"],
        f"{vision}embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        f"{vision}embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "logit_scale": state["logit_scale"],
    }
    for old, new in (
        ("ln_final", f"{text}final_layer_norm"),
        ("visual.ln_pre", f"{vision}pre_layrnorm"),
        ("visual.ln_post", f"{vision}post_layernorm"),
    ):
        renamed |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    for i in range(2):
        renamed |= block_of_transformers(state, f"transformer.resblocks.{i}.", f"{text}encoder.layers.{i}.")
        renamed |= block_of_transformers(state, f"visual.transformer.resblocks.{i}.", f"{vision}encoder.layers.{i}.")
    return renamed


WRAPPED: dict[str, Callable[[State], State]] = {
    "plain": dict,
    "DistributedDataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "a trainer": lambda state: {f"state_dict.{name}": t for name, t in state.items()} | {"epoch": torch.tensor(3)},
    "both": lambda state: {f"state_dict.module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "OpenAI's extras": lambda state: state | {name: torch.tensor(7) for name in OPENAI_EXTRAS},
    "a row of one": lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)},
    "CLIPModel": as_clip_model,
    "CLIPModel, wrapped": lambda state: {f"module.{name}": tensor for name, tensor in as_clip_model(state).items()},
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_every_layout_gives_the_same_weights(layout: str, tmp_path) -> None:
    state = random_state(TINY)
    assert same(loaded_state(written(tmp_path, TINY, WRAPPED[layout](state))), state)


@pytest.mark.parametrize("layout", ["plain", "CLIPModel", "a trainer"])
def test_a_model_with_a_text_tower_of_its_own_takes_the_older_layout(layout: str, tmp_path) -> None:
    state = random_state(TINY)
    found = loaded_state(written(tmp_path, TINY | {"custom_text": True}, WRAPPED[layout](state)))
    assert {name.removeprefix("text.") for name in found} == state.keys()
    assert all(torch.equal(tensor, state[name.removeprefix("text.")]) for name, tensor in found.items())


def as_siglip_model(state: State) -> State:
    """The layout of transformers' SiglipModel."""
    trunk, text, vision = "visual.trunk.", "text_model.", "vision_model."
    renamed = {
        f"{vision}embeddings.position_embedding.weight": state[f"{trunk}pos_embed"][0],
        f"{vision}head.probe": state[f"{trunk}attn_pool.latent"],
        f"{text}embeddings.token_embedding.weight": state["text.token_embedding.weight"],
        f"{text}embeddings.position_embedding.weight": state["text.positional_embedding"],
        "logit_scale": state["logit_scale"].reshape(1),
        "logit_bias": state["logit_bias"].reshape(1),
    }
    for kind in ("weight", "bias"):
        renamed |= {
            f"{vision}embeddings.patch_embedding.{kind}": state[f"{trunk}patch_embed.proj.{kind}"],
            f"{vision}post_layernorm.{kind}": state[f"{trunk}norm.{kind}"],
            f"{vision}head.attention.in_proj_{kind}": torch.cat(
                [state[f"{trunk}attn_pool.{part}.{kind}"] for part in ("q", "kv")]
            ),
            f"{vision}head.attention.out_proj.{kind}": state[f"{trunk}attn_pool.proj.{kind}"],
            f"{vision}head.layernorm.{kind}": state[f"{trunk}attn_pool.norm.{kind}"],
            f"{text}final_layer_norm.{kind}": state[f"text.ln_final.{kind}"],
            f"{text}head.{kind}": state[f"text.text_projection.{kind}"],
        } | {f"{vision}head.mlp.{fc}.{kind}": state[f"{trunk}attn_pool.mlp.{fc}.{kind}"] for fc in ("fc1", "fc2")}
    pairs = (
        ("attn.proj", "self_attn.out_proj"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    )
    depth = len({name.split(".")[3] for name in state if name.startswith(f"{trunk}blocks.")})
    for i in range(depth):
        old, new = f"{trunk}blocks.{i}.", f"{vision}encoder.layers.{i}."
        renamed |= {f"{new}{b}.{kind}": state[f"{old}{a}.{kind}"] for a, b in pairs for kind in ("weight", "bias")}
        renamed |= unpacked(state, f"{old}attn.", f"{new}self_attn.", ("qkv.weight", "qkv.bias"))
    for i in range(2):
        renamed |= block_of_transformers(state, f"text.transformer.resblocks.{i}.", f"{text}encoder.layers.{i}.")
    return renamed


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    from hub_tokenizers import write_hub_tokenizer

    return write_hub_tokenizer("t5", tmp_path_factory.mktemp("t5"))


def test_a_siglip_model_of_transformers_gives_the_same_weights(tmp_path, vocabulary) -> None:
    state = random_state(SIGLIP)
    renamed = as_siglip_model(state)
    left_over = {
        name: tensor for name, tensor in state.items() if name.endswith((".ls1.gamma", ".ls2.gamma", "reg_token"))
    }
    found = loaded_state(written(tmp_path, SIGLIP, renamed | left_over), tokenizer=vocabulary)
    assert same(found, state)


def test_a_clip_model_of_transformers_gives_its_own_embeddings(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install 'r1export[hf]'")
    torch.manual_seed(0)
    text = {"vocab_size": 49408, "hidden_size": 16, "intermediate_size": 64, "max_position_embeddings": 12}
    vision = {"hidden_size": 32, "intermediate_size": 128, "image_size": 16, "patch_size": 8}
    both = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu", "eos_token_id": 49407}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=24)
    ).eval()
    clip = load_clip(**written(tmp_path, TINY, theirs.state_dict()), quick_gelu=True)
    pixels, tokens = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), clip.tokenize(["a cat", "two dogs"])
    with torch.no_grad():
        output = theirs(pixel_values=clip.preprocess.normalize(pixels), input_ids=tokens)
        assert (clip.encode_image(pixels) - output.image_embeds).abs().max() < 1e-6
        assert (clip.encode_text(tokens) - output.text_embeds).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_floating_type_are_taken(kind: torch.dtype, tmp_path) -> None:
    state = random_state(TINY)
    found = loaded_state(written(tmp_path, TINY, {name: tensor.to(kind) for name, tensor in state.items()}))
    assert same(found, {name: tensor.to(kind).float() for name, tensor in state.items()})


def test_position_embeddings_of_another_size_are_resized_as_open_clip_does_and_it_is_said(tmp_path) -> None:
    state = random_state(TINY)
    arguments = written(tmp_path, TINY, state)
    clip = load_clip(**arguments, image_size=32)
    larger = open_clip.CLIP(**(TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 32}}))
    open_clip.load_checkpoint(larger, str(arguments["weights"]))
    assert torch.equal(clip.model.visual.positional_embedding, larger.visual.positional_embedding)
    assert clip.preprocess.size == (32, 32)
    assert clip.notes == (
        "position embeddings visual.positional_embedding resized from (5, 32) to (17, 32), as open_clip does",
    )


def test_a_tower_of_timm_is_resized_too(tmp_path, vocabulary) -> None:
    clip = load_clip(**written(tmp_path, SIGLIP, random_state(SIGLIP)), tokenizer=vocabulary, image_size=64)
    assert clip.preprocess.size == (64, 64)
    assert clip.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 96)
    assert "position embeddings of the image tower resized" in clip.notes[0]


def test_openais_weights_without_quickgelu_are_called_by_name(tmp_path) -> None:
    arguments = written(tmp_path, TINY, WRAPPED["OpenAI's extras"](random_state(TINY)))
    assert "need QuickGELU" in load_clip(**arguments).notes[0]
    quick = load_clip(**arguments, quick_gelu=True)
    assert quick.notes == ()
    assert "QuickGELU" in {type(module).__name__ for module in quick.model.modules()}


CODES = {"int8": torch.int8, "uint8": torch.uint8, "float8": torch.float8_e4m3fn}


@pytest.mark.parametrize("kind", CODES)
def test_quantized_codes_are_no_weights(kind: str, tmp_path) -> None:
    state = {name: tensor.to(CODES[kind]) for name, tensor in random_state(TINY).items()}
    with pytest.raises(InputError, match=r"w\.safetensors: \S+ and \d+ more are not floating point.*scales"):
        load_clip(**written(tmp_path, TINY, state))


def test_floats_of_8_bits_are_weights_where_the_file_says_that_they_have_no_scale(tmp_path) -> None:
    state = random_state(TINY)
    rows = state["token_embedding.weight"].to(torch.float8_e4m3fn)
    arguments = written(tmp_path, TINY, state | {"token_embedding.weight": rows})
    save_file(load_file(arguments["weights"]), arguments["weights"], metadata=UNSCALED)
    assert torch.equal(load_clip(**arguments).model.token_embedding.weight, rows.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(value: float, tmp_path) -> None:
    state = random_state(TINY)
    state["visual.ln_post.bias"][3] = value
    with pytest.raises(InputError, match=r"visual\.ln_post\.bias has 1 NaN or infinite values"):
        load_clip(**written(tmp_path, TINY, state))


def test_a_missing_and_a_foreign_tensor_are_named_with_the_count_of_others(tmp_path) -> None:
    state = random_state(TINY)
    del state["ln_final.weight"]
    with pytest.raises(InputError, match=r"ln_final\.weight is missing, expected \(16,\) \("):
        load_clip(**written(tmp_path, TINY, state | {}))
    with pytest.raises(InputError, match=r"head\.weight is \(2, 2\), expected no such tensor; 1 more differ"):
        load_clip(**written(tmp_path, TINY, state | {"head.weight": torch.zeros(2, 2)}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(99), "a zip file, which is what torch.save writes"),
        (b"\x80\x02}q" + bytes(99), "a pickle"),
        (b"GGUF" + bytes(99), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"", "an empty file"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(content: bytes, words: str, tmp_path, tiny_files) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_clip(weights=tmp_path / "w.safetensors", config=tiny_files[1])


def test_a_pickle_is_read_where_it_is_allowed(tmp_path, tiny_files) -> None:
    state = load_file(tiny_files[0])
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: not a safetensors file: a zip file"):
        load_clip(weights=tmp_path / "w.pt", config=tiny_files[1])
    clip = load_clip(weights=tmp_path / "w.pt", config=tiny_files[1], allow_pickle=True)
    assert all(np.array_equal(value, state[name]) for name, value in clip.parameters().items())


@settings(max_examples=60, deadline=None)
@given(prefixes=st.lists(st.sampled_from(["state_dict.", "module.", "_orig_mod.", "model."]), max_size=4))
def test_wrappers_in_any_order_are_taken_off(prefixes: list[str]) -> None:
    names = ["logit_scale", "visual.proj", "transformer.resblocks.0.attn.in_proj_weight"]
    wrapped = {"".join(prefixes) + name: torch.zeros(1) for name in names}
    assert list(without_wrappers(wrapped)) == names
