"""Writing the releases of a run: what is computed for each of them, and what for all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import RECIPE, SETTINGS, context_of, r1export

from r1export.adapt.clip import Clip
from r1export.adapt.evaluate import class_embeddings
from r1export.data.task import Task
from r1export.pipeline.export import export_releases
from r1export.update.container import read_tensors


@pytest.mark.parametrize(("towers", "times"), [(["visual"], 1), (["visual", "textual"], 2)])
def test_prompts_are_encoded_again_only_where_an_update_changes_the_text_tower(
    towers: list[str], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    settings = (*SETTINGS, f"pool.towers={json.dumps(towers)}")
    sets = [part for setting in settings for part in ("--set", setting)]
    assert r1export("train", tmp_path / "recipe.toml", "--out", tmp_path / "run", *sets).returncode == 0
    encoded: list[str] = []

    def noting(clip: Clip, task: Task) -> np.ndarray:
        encoded.append(task.name)
        return class_embeddings(clip, task)

    monkeypatch.setattr("r1export.pipeline.export.class_embeddings", noting)
    base, later = (
        read_tensors(release / "classes/digits.safetensors")
        for release in export_releases(context_of(tmp_path / "run"))
    )
    assert encoded == ["digits"] * times
    assert np.array_equal(base["class_embeds"], later["class_embeds"]) == (towers == ["visual"])
