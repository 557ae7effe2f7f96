"""Text towers of transformers: their linears by name, their config from the config, and one line where transformers is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import ROBERTA, write_family
from hub_tokenizers import write_hub_tokenizer
from settings import POOL

from r1export.adapt import model_config
from r1export.adapt.clip import load_clip
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.model_config import read_model_config
from r1export.adapt.pack import pack_experts
from r1export.errors import InputError, Unsupported

BERT = ROBERTA["text_cfg"]["hf_model_config"]
SEQUENCE = {"vocab_size": 1000, "d_model": 32, "is_encoder_decoder": True}
KINDS = {
    "roberta": BERT,
    "xlm-roberta": BERT | {"model_type": "xlm-roberta"},
    "bert": BERT | {"model_type": "bert", "pad_token_id": 0},
    "mt5": SEQUENCE | {"model_type": "mt5", "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "pad_token_id": 0},
    "m2m_100": SEQUENCE
    | {
        "model_type": "m2m_100",
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 24, "pad_token_id": 1},
}


def written(folder: Path, transformer: object, **text: object) -> Path:
    """A config with this transformer in it."""
    text_cfg = ROBERTA["text_cfg"] | {"hf_model_config": transformer} | text
    (folder / "own.json").write_text(json.dumps(ROBERTA | {"text_cfg": text_cfg}), encoding="utf-8")
    return folder / "own.json"


@pytest.fixture(params=KINDS)
def model(request, tmp_path) -> torch.nn.Module:
    pytest.importorskip("transformers", reason="builds models of transformers: pip install 'r1export[hf]'")
    torch.manual_seed(0)
    path = written(tmp_path, KINDS[request.param], hf_proj_type="linear")
    return read_model_config(path).build().eval().requires_grad_(False)


def encode(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 900, (3, 16), generator=torch.Generator().manual_seed(1))
    tokens[:, 11:] = model.text.config.pad_token_id
    return model.encode_text(tokens, normalize=True)


def test_query_key_value_and_the_three_dense_layers_get_experts_and_the_merge_gives_the_same(model) -> None:
    settings = replace(POOL, alpha=12.0, towers=("textual",))
    with torch.no_grad():
        before, names = encode(model), list(model.state_dict())
        pools = inject_experts_(model, settings)
        gated = any("wi_0" in rows.parameter for rows in pools)
        assert len(pools) == 2 * (7 if gated else 6)
        generator = torch.Generator().manual_seed(3)
        for pool in pools.values():
            pool.reset_(generator)
            pool.lora_B.data.copy_(torch.randn(pool.lora_B.shape, generator=generator) * 0.3)
            pool.counts.copy_(torch.randint(0, 50, pool.counts.shape, generator=generator))
            pool.freeze_()
        frozen, update = encode(model), pack_experts(pools)
        eject_experts_(model)
        assert list(model.state_dict()) == names
        parameters = dict(model.named_parameters())
        for name, value in update.apply({n: p.numpy() for n, p in parameters.items()}).items():
            parameters[name].copy_(torch.from_numpy(value))
        assert (encode(model) - frozen).abs().max() < 2e-5
        assert (encode(model) - before).abs().max() > 1e-3


def test_every_expert_learns(model) -> None:
    pools = inject_experts_(model, replace(POOL, rank=4, k_train=4, k_merge=2, dropout=0.0, towers=("textual",)))
    for pool in pools.values():
        pool.reset_(torch.Generator().manual_seed(0))
        pool.train()
    (encode(model) * torch.linspace(-1, 1, 24)).sum().backward()
    assert all(pool.lora_B.grad.abs().max() > 0 for pool in pools.values())
    assert {pool.route_on for pool in pools.values()} == {"mean"}
    assert all(pool.counts.sum() == 3 * 4 for pool in pools.values())


def test_each_target_names_its_linears(model) -> None:
    one = {target: inject_and_name(model, target) for target in ("q", "k", "v", "out", "fc", "proj")}
    found = [name for names in one.values() for name in names]
    assert len(found) == len(set(found)) >= 12
    assert all(len(names) == (4 if target == "fc" and "wi_0" in str(names) else 2) for target, names in one.items())


def inject_and_name(model: torch.nn.Module, target: str) -> list[str]:
    pools = inject_experts_(model, replace(POOL, towers=("textual",), targets=(target,)))
    eject_experts_(model)
    return [rows.parameter for rows in pools]


def test_the_end_of_a_text_does_not_vote_there(model) -> None:
    with pytest.raises(Unsupported, match="no end token that alone sees the whole text"):
        inject_experts_(model, replace(POOL, towers=("textual",), text_token="end"))


def test_without_transformers_one_line_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(model_config, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"own: the text tower needs transformers.*pip install 'r1export\[hf\]'"):
        read_model_config(written(tmp_path, BERT)).build()


def test_a_transformer_of_the_hub_is_refused_and_one_in_a_folder_is_taken(tmp_path) -> None:
    config = ROBERTA | {"text_cfg": {k: v for k, v in ROBERTA["text_cfg"].items() if k != "hf_model_config"}}
    (tmp_path / "own.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"text_cfg\.hf_model_name: loads a text tower from the Hugging Face Hub; put its"
    ):
        read_model_config(tmp_path / "own.json")
    (tmp_path / "roberta").mkdir()
    (tmp_path / "roberta" / "config.json").write_text(json.dumps(BERT), encoding="utf-8")
    assert read_model_config(tmp_path / "own.json").transformer == BERT


@pytest.mark.parametrize(
    "transformer",
    [{}, 3, {"model_type": "gpt2"}, BERT | {"auto_map": {"AutoModel": "x--y.Z"}}, BERT | {"num_hidden_layers": 10**9}],
    ids=["empty", "number", "another kind", "code", "layers"],
)
def test_a_transformer_that_open_clip_cannot_build_is_refused(transformer: object, tmp_path) -> None:
    with pytest.raises(InputError, match=r"hf_model_config"):
        read_model_config(written(tmp_path, transformer))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pad_token_id": 0}, "pad token is 0, the tokenizer pads with 1"),
        ({"vocab_size": 500}, "500 token embeddings, the tokenizer needs"),
        ({"max_position_embeddings": 12}, "(does not read|fails with) 16 tokens"),
    ],
)
def test_a_tower_that_does_not_fit_its_tokenizer_is_refused(change: dict, words: str, tmp_path) -> None:
    pytest.importorskip("transformers", reason="builds models of transformers: pip install 'r1export[hf]'")
    folder = write_family("roberta", tmp_path)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["hf_model_config"] |= change
    path.write_text(json.dumps(config), encoding="utf-8")
    from safetensors.torch import save_file

    save_file(read_model_config(path).build().state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=words):
        load_clip(f"local-dir:{folder}")


def test_a_roberta_in_a_folder_encodes_texts(tmp_path) -> None:
    pytest.importorskip("transformers", reason="builds models of transformers: pip install 'r1export[hf]'")
    clip = load_clip(f"local-dir:{write_family('roberta', tmp_path)}")
    write_hub_tokenizer("roberta", tmp_path / "other")
    embeds = clip.encode_text(clip.tokenize(["a cat", "two dogs"]))
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
