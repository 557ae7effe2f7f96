"""Faults that verification once missed, by the real command line with its exit code.

scripts/planted_faults.py plants many more, and tries each in every mode.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from running import r1export, trained_run

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from faults import gates, missing, unread
from faults.planting import ALONE, BESIDE, MODES, RUN, Site

RECIPE = """
[base]
model = "builtin:world"
[[tasks]]
name = "digits"
source = "builtin:digits"
[[tasks]]
name = "arrows"
source = "builtin:arrows"
[train]
learning_rate = 5e-3
[pool]
alpha = 12.0
"""
FAULTS = {fault.name: fault for fault in (*missing.FAULTS, *gates.FAULTS, *unread.FAULTS)}
PLANTED = [  # fault, mode, exit code, what is said
    ("factors of the last task deleted", RUN, 4, "1 of 2 tasks are trained, missing arrows"),
    ("factors of all tasks deleted", RUN, 4, "0 of 2 tasks are trained, missing digits, arrows"),
    ("factors of the first task deleted", RUN, 4, "0 of 2 tasks are trained, missing digits; continue"),
    ("a release folder more than there are tasks", RUN, 4, "not verified: releases/03-more"),
    ("last task taken out of the recipe and of metrics.json", RUN, 1, "not verified: releases/02-arrows"),
    ("manifest: graphs = {}", ALONE, 1, "visual.onnx has no digest in the manifest"),
    ("manifest: one tensor not in the map", ALONE, 1, "is not in the manifest's tensor map"),
    ("manifest: rows of a matrix end too early", ALONE, 1, "rows of visual.transformer.resblocks.1.mlp.c_fc.weight"),
    ("manifest: rows of q, k, v as one", RUN, 1, "which differ from the factors"),
    ("manifest: a square matrix marked as transposed", BESIDE, 1, "has another place than in the base"),
    ("golden samples cut to one", ALONE, 1, "Golden samples"),
    ("golden pictures removed", ALONE, 4, "looked at 0 of 6"),
    ("eight times the same golden picture", ALONE, 1, "are identical"),
    ("class row zero", ALONE, 1, "classes/arrows.safetensors is stale"),
    ("last task taken out with its files", ALONE, 1, "learned tasks are ['digits'], but the updates are of ['digits', 'arrows']"),
    ("preprocess.onnx deleted", ALONE, 1, "preprocess.onnx"),
    ("golden.max_abs = 10, min_cosine = -1, a matrix zeroed", ALONE, 1, "the visual tower differs by"),
    ("precision int8 on a matrix x 1.05", ALONE, 1, "precision is int8, but its tensors are fp32"),
    ("a matrix x 1.05 next to such a base", BESIDE, 1, "the visual tower differs by"),
    ("a 00-base that does not reproduce its golden samples", BESIDE, 4, "does not pass"),
    ("recipe: verify.max_abs = 0.5", RUN, 4, "verify.max_abs = 0.5 is looser than the default 5e-05"),
    ("preprocess.json: mean 0", ALONE, 1, "preprocess.json: image 0 differs"),
    ("preprocess.onnx: garbage", ALONE, 1, "preprocess.onnx"),
    ("vocabulary: two entries exchanged in all files", ALONE, 1, "vocabulary entry"),
    ("class names rotated", ALONE, 1, "classes/arrows.safetensors is stale"),
    ("class names cut by one, embeddings not", ALONE, 1, "7 classes"),
    ("NaN in a token embedding that no prompt uses", ALONE, 1, "token_embedding.weight in textual.safetensors has NaN"),
    ("base digest zeroed", BESIDE, 1, "base is BaseModel"),
    ("accuracies 0.999 in the manifest and metrics.json", RUN, 1, "the manifest claims 0.999"),
    ("metrics.json: zero_shot_avg 0.999", RUN, 1, "zero_shot_avg is 0.999"),
    ("README.md with other code", ALONE, 1, "README.md differs from the one generated from the manifest"),
]  # fmt: skip


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks that passes every check."""
    run = trained_run(tmp_path_factory.mktemp("planted"), RECIPE)
    done = r1export("verify", "--no-latency", run)
    assert done.returncode == 0, done.output
    return run


@pytest.mark.parametrize(("name", "mode", "code", "said"), PLANTED, ids=[row[0] for row in PLANTED])
def test_a_planted_fault_is_found(verified: Path, tmp_path: Path, name: str, mode: str, code: int, said: str) -> None:
    site = Site(Path(shutil.copytree(verified, tmp_path / "run")))
    FAULTS[name].put(site)
    target = {RUN: site.run, BESIDE: site.release, ALONE: tmp_path / "alone" / site.release.name}[mode]
    if mode == ALONE:
        shutil.copytree(site.release, target, symlinks=True)
    done = r1export("verify", "--no-latency", target)
    assert done.returncode == code, done.output
    assert said in " ".join(done.output.split())
    assert not (target / "report.json").exists() or '"verdict": "pass"' not in _verdict(target)


def _verdict(target: Path) -> str:
    """The line of the report's own verdict: no old pass is left behind."""
    lines = (target / "report.json").read_text("utf-8").splitlines()
    return next(line for line in lines if line.startswith('  "verdict"'))


def test_faults_have_names_of_their_own_and_are_sixty_at_least() -> None:
    count = sum(len(module.FAULTS) for module in (missing, gates, unread))
    assert len(FAULTS) == count >= 60
    assert all(set(fault.unknowable) <= set(MODES) - {RUN} for fault in FAULTS.values())
