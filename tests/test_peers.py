"""The parts of benchmarks/against_peers.py that need no peer: the mapping of names and the tables."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from peers import table  # noqa: E402
from peers.mapping import rows_of, to_open_clip  # noqa: E402
from peers.workload import SIZES, VOCABULARY, open_clip_config, samples  # noqa: E402

TINY = {"image": 16, "patch": 8, "embed": 24, "layers": 2, "vision_width": 32, "vision_heads": 2, "text_width": 16, "text_heads": 2}  # fmt: skip


def transformers_state() -> dict[str, np.ndarray]:
    """A state_dict with the names and shapes of transformers' CLIPModel."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (), "visual_projection.weight": (24, 32), "text_projection.weight": (24, 16),
        "vision_model.embeddings.class_embedding": (32,), "vision_model.embeddings.patch_embedding.weight": (32, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (5, 32), "vision_model.embeddings.position_ids": (1, 5),
        "text_model.embeddings.token_embedding.weight": (VOCABULARY, 16), "text_model.embeddings.position_embedding.weight": (77, 16),
    }  # fmt: skip
    for tower, width in (("vision_model", 32), ("text_model", 16)):
        norms = ("pre_layrnorm", "post_layernorm") if tower == "vision_model" else ("final_layer_norm",)
        shapes |= {f"{tower}.{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
        for layer in range(2):
            block = f"{tower}.encoder.layers.{layer}"
            sizes = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
            sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
            for name, shape in sizes.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
            shapes |= {f"{block}.layer_norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def row(**changes) -> dict:
    """A row of a contender that is good at everything."""
    fault = {"exit_code": 1, "said": "a | b", "off_by": 0.1}
    timing = {"ms": {"base": 10.0, "adapted": 10.0}, "ratios": {"adapted": {"ratio": 1.0, "ci95": [0.99, 1.01], "verdict": "pass"}}}  # fmt: skip
    return {
        "versions": {"torch": "2"}, "first_seconds": 1.0, "later_seconds": 1.0, "release_bytes": 100, "update_bytes": 100, "parity": 1e-7,
        "faults": {"merge": fault, "file": fault}, "timing": timing,
    } | changes  # fmt: skip


def test_every_parameter_of_transformers_finds_its_place_in_open_clip(tmp_path: Path) -> None:
    import open_clip
    import torch

    config = tmp_path / "mapped-clip.json"
    config.write_text(json.dumps(open_clip_config(TINY)), encoding="utf-8")
    open_clip.add_model_config(config)
    model, state = open_clip.create_model("mapped-clip", load_weights=False), transformers_state()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in to_open_clip(state).items()}, strict=True)
    second_value = model.visual.transformer.resblocks[1].attn.in_proj_weight[64:].detach().numpy()
    assert np.array_equal(second_value, state["vision_model.encoder.layers.1.self_attn.v_proj.weight"])
    assert np.array_equal(model.text_projection.detach().numpy().T, state["text_projection.weight"])


def test_a_linear_is_a_third_of_the_packed_rows_or_all_of_its_own() -> None:
    assert rows_of("text_model.encoder.layers.3.self_attn.k_proj", 512) == ("transformer.resblocks.3.attn.in_proj_weight", 512, 1024)  # fmt: skip
    assert rows_of("vision_model.encoder.layers.0.mlp.fc2", 768) == ("visual.transformer.resblocks.0.mlp.c_proj.weight", 0, 768)  # fmt: skip


def test_a_name_that_is_not_clip_is_refused() -> None:
    with pytest.raises(KeyError, match="no parameter of transformers"):
        to_open_clip({"vision_model.head.weight": np.zeros(1)})


def test_every_text_has_one_end_and_it_is_the_largest_token() -> None:
    tokens = samples(SIZES["quick"], 0)["input_ids"]
    assert ((tokens == VOCABULARY - 1).sum(1) == 1).all()
    assert tokens.max() == VOCABULARY - 1


def test_a_contender_that_failed_is_a_row_that_says_how() -> None:
    made = table.table({"olive": {"failed": "KeyError: 'a|b'"}, "r1export": row()})
    assert "| Olive, merged while converting | failed: KeyError: 'a/b' |" in made
    assert len({line.count("|") for line in made.splitlines()}) == 1


def test_the_brief_table_counts_the_faults_that_fail_a_run() -> None:
    half = row(faults={"merge": {"exit_code": 0}, "file": {"exit_code": 1}}, update_bytes=4_500_000)
    made = table.brief({"olive": {"failed": "KeyError: 'a|b'"}, "peft": half, "r1export": row()})
    assert "| PEFT merge and torch.onnx | 1.0 s | 1.000 [0.990, 1.010] | 4.5 MB | 1 of 2 |" in made
    assert len({line.count("|") for line in made.splitlines()}) == 1


def test_r1export_says_where_it_is_not_the_best() -> None:
    rows = {"multilora": row(update_bytes=90), "r1export": row(update_bytes=100)}
    assert [sentence.split(":")[0] for sentence in table.shortfalls(rows)] == ["Bytes of an update"]
    assert table.shortfalls({"optimum": row(parity=2e-7), "r1export": row(parity=3e-7)}) == []
    unnoticed = {fault: {"exit_code": 0, "said": "", "off_by": 0.1} for fault in ("merge", "file")}
    assert len(table.shortfalls({"r1export": row(faults=unnoticed)})) == 2


def test_the_table_is_put_between_the_markers_and_nowhere_else() -> None:
    page = f"above\n{table.BEGIN}old\n{table.END}below\n"
    assert table.placed(page, "new\n") == f"above\n{table.BEGIN}new\n{table.END}below\n"
    with pytest.raises(ValueError, match="no place"):
        table.placed("nothing", "new")


@pytest.mark.parametrize("page", ["README.md", "docs/peers.md"])
def test_both_pages_have_a_place_for_the_table(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert table.placed(text, text.split(table.BEGIN)[1].split(table.END)[0]) == text
    assert not re.search(r"/tmp/|/root/", text)
