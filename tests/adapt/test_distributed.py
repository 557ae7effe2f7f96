"""Several processes learn what one does: torchrun on this machine, gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1export.adapt import distributed
from r1export.errors import InputError
from r1export.update.container import read_tensors

ROOT = Path(__file__).parents[2]


def train(recipe: Path, out: Path, processes: int) -> list[float]:
    """Trains by the real command line in so many processes and returns the losses of both tasks."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "r1export"]
    command = [*(command if processes > 1 else command[-2:]), "train", str(recipe), "--out", str(out), "--json"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "metrics.json").read_text()), "the first process alone speaks"
    return [
        loss for path in sorted(out.glob("tasks/*/metrics.json")) for loss in json.loads(path.read_text())["losses"]
    ]


@pytest.mark.parametrize("router", ["random", "straight-through"])
def test_two_processes_have_the_losses_and_the_experts_of_one_on_the_joined_batch(tiny_files, tmp_path, router) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f'[base]\nweights = "{tiny_files[0]}"\nconfig = "{tiny_files[1]}"\n[data]\nshots = 4\ntest_limit = 8\n'
        '[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n[[tasks]]\nname = "arrows"\nsource = "builtin:arrows"\n'
        f'[pool]\ndropout = 0.0\nalpha = 12.0\nrouter = "{router}"\n[train]\niterations = 4\nbatch_size = 8\ndistill_weight = 0.2\n'
    )
    alone, both = (train(recipe, tmp_path / str(count), count) for count in (1, 2))
    assert np.allclose(alone, both, rtol=1e-5)
    assert len(set(np.round(alone, 4))) > 1
    for task in ("01-digits", "02-arrows"):
        one, two = (read_tensors(tmp_path / count / "tasks" / task / "pool.safetensors") for count in "12")
        for name, value in one.items():
            if name.endswith("counts") and "visual" in name:
                assert np.array_equal(value, two[name]), "votes of both processes are added up"
            elif name.endswith("lora_B"):
                assert np.allclose(value, two[name], atol=2e-4)


def test_alone_every_image_is_ones_own() -> None:
    parts = distributed.shares(np.arange(5))
    assert distributed.own(parts).tolist() == [0, 1, 2, 3, 4]
    assert distributed.world() == 1
    assert distributed.is_first()


def test_fewer_images_than_processes_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 4)
    assert [part.tolist() for part in distributed.shares(np.arange(9))] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(InputError, match="3 images is too small for 4 processes"):
        distributed.shares(np.arange(3))
