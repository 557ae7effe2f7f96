"""Load a layout with its client, and compare the outputs with the golden samples.

The client runs in a separate process, started by a program in `clients/`, without r1export between it and the folder.
A program gets the layout's folder and a folder of inputs (`_write_inputs`), and prints one JSON object as its last line:

    {"client": "fastembed 0.9.1", "image_embeds": [[...]], "picture_embeds": [[...]], "text_embeds": [[...]], "top1": [...]}

Members that the client doesn't support are omitted; see `ClientResult`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.layout.write import check_layout_files
from r1export.update.container import read_tensors
from r1export.update.golden_samples import GoldenSamples
from r1export.update.layout_file import LayoutFile
from r1export.update.release_layout import GOLDEN
from r1export.verify.results import Check

PROGRAMS = Path(__file__).with_name("clients")
SECONDS = 600  # timeout
MISSING = (  # messages of a missing or outdated client
    "ModuleNotFoundError",
    "MODULE_NOT_FOUND",
    "has no attribute 'ModelPackageContext'",
    "No such file or directory: 'skopeo'",
)
RESIZED = 0.9  # lowest cosine of an image that a client resizes with its own filters


@dataclass(frozen=True)
class Client:
    """The client of a layout: its program, and how to install its requirements."""

    program: str
    install: str

    @property
    def runs_in_node(self) -> bool:
        return self.program.endswith(".mjs")


CLIENTS: Mapping[str, Client] = {
    "transformersjs": Client("transformersjs.mjs", "npm install @huggingface/transformers"),
    "fastembed": Client("fastembed_client.py", "pip install fastembed"),
    "immich": Client("immich_client.py", "pip install onnxruntime tokenizers pillow"),
    "openclip": Client("openclip_client.py", "pip install open_clip_torch"),
    "ortpackage": Client("ortpackage_client.py", "pip install onnxruntime>=1.32"),
    "triton": Client("triton_client.py", "pip install tritonclient[grpc] onnxruntime"),
    "ovms": Client("ovms_client.py", "pip install openvino"),
    "oci": Client("oci_client.py", "apt install skopeo, pip install onnxruntime"),
}


@dataclass(frozen=True)
class ClientResult:
    """The result of a client: max. differences of embeddings, and equal top-1 classes.

    `differences` maps image, text, short_text (given without padding), picture (resized by the client with Pillow) and
    resized_picture (with filters of its own) to the largest absolute difference. `same_top1` of `classified` pictures got
    the class that the golden embeddings give.
    """

    layout: str
    client: str
    differences: Mapping[str, float]
    same_top1: int
    classified: int
    check: Check


def check_layout(folder: Path, *, python: Path | None = None, node_modules: Path | None = None) -> ClientResult:
    """Run the client of the layout `folder` on its golden samples.

    `python` is the interpreter that has the client, by default this one; `node_modules` the folder in or above which npm
    installed it, by default the current one.

    Raises:
        InputError: no layout.   CheckFailed: a file is damaged, or the client failed.
        Unsupported: the client is not installed.
    """
    folder = folder.resolve() if folder.exists() else folder
    layout = check_layout_files(folder)
    if layout.layout not in CLIENTS:
        raise InputError(f"{folder}: layout {layout.layout!r:.80}", f"known are {', '.join(CLIENTS)}")
    golden = GoldenSamples.from_tensors(read_tensors(folder / GOLDEN))
    client = CLIENTS[layout.layout]
    with TemporaryDirectory() as name:
        inputs = Path(name)
        _write_inputs(golden, folder, layout, inputs)
        answer = _run(client, _command(client, folder, inputs, python, node_modules))
    return judge(layout, golden, answer)


def _command(client: Client, folder: Path, inputs: Path, python: Path | None, node_modules: Path | None) -> list[str]:
    program = [str(PROGRAMS / client.program), str(folder), str(inputs)]
    if not client.runs_in_node:
        return [str(python or sys.executable), "-W", "ignore", *program]
    node = shutil.which("node")
    if node is None:
        raise Unsupported("node is not installed", "apt install nodejs, or from nodejs.org")
    return [node, *program, str((node_modules or Path.cwd()).resolve())]


def _run(client: Client, command: list[str]) -> dict[str, Any]:
    """The client's answer. Raises CheckFailed with its last words, or Unsupported if it is not there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{client.program} took more than {SECONDS} seconds", "run it manually to see why") from None
    except OSError as error:
        raise Unsupported(f"{command[0]}: {error.strerror}", "set the interpreter with --python") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if any(words in done.stderr for words in MISSING):
            raise Unsupported(f"the client of this layout is not installed: {lines[-1][:200]}", client.install)
        errors = [line for line in lines if "rror" in line]
        raise CheckFailed(
            f"the client rejected the layout: {(errors or lines or ['no message'])[-1][:300]}", client.install
        )
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        raise CheckFailed(f"{client.program} exited without a result", "run it manually to see why") from None


def _write_inputs(golden: GoldenSamples, folder: Path, layout: LayoutFile, inputs: Path) -> None:
    """inputs.json, pixel_values.f32 (little-endian, of shape `shape`), input_ids.json, and picture-0.png and so on."""
    pad_id, left = _padding(golden)
    asked = {
        "prompts": golden.prompts,
        "labels": labels(golden),
        "shape": golden.pixel_values.shape,
        "dimension": golden.text_embeds.shape[1],
        "pad_id": pad_id,
        "left": left,
        "own_tokenizer": "tokenizer.json" not in layout.files,
    }
    (inputs / "inputs.json").write_text(json.dumps(asked), encoding="utf-8")
    (inputs / "input_ids.json").write_text(json.dumps(golden.input_ids.tolist()), encoding="utf-8")
    (inputs / "pixel_values.f32").write_bytes(golden.pixel_values.astype("<f4").tobytes())
    for index, picture in enumerate(golden.pictures):
        Image.fromarray(picture).save(inputs / f"picture-{index}.png")


def _padding(golden: GoldenSamples) -> tuple[int | None, bool]:
    """The pad id, and whether it goes before the text: what prompts end, or begin, with twice. None if none is padded."""
    for left in (False, True):
        for row in golden.input_ids:
            first, second = (row[0], row[1]) if left else (row[-1], row[-2])
            if first == second:
                return int(first), left
    return None, False


def labels(golden: GoldenSamples) -> list[str]:
    """The golden prompts, each once: classes to choose among."""
    return list(dict.fromkeys(golden.prompts))


def judge(layout: LayoutFile, golden: GoldenSamples, answer: Mapping[str, Any]) -> ClientResult:
    """Compare a client's answer with the golden samples.

    Embeddings have to be within the release's own limit; pictures that the client resizes with filters of its own only have to be
    close, and their top-1 the same wherever the golden margin is larger than the difference that this makes.
    """
    pictures = golden.image_embeds[: len(golden.pictures)]
    expected = {
        "image": golden.image_embeds,
        "picture": pictures,
        "resized_picture": pictures,
        "text": golden.text_embeds,
        "short_text": golden.text_embeds,
    }
    found = {name: np.array(answer[f"{name}_embeds"], np.float64) for name in expected if f"{name}_embeds" in answer}
    problems, differences = [], {}
    for name, values in found.items():
        if values.shape != expected[name].shape or not np.isfinite(values).all():
            problems.append(f"{name}: embeddings {values.shape}, expected {expected[name].shape}")
            continue
        differences[name] = float(np.abs(values - expected[name]).max())
        if name == "resized_picture":
            cosine = float((values * expected[name]).sum(1).min())
            if cosine < RESIZED:
                problems.append(f"images that the client resizes: cosine {cosine:.3f}, expected {RESIZED} or more")
        elif differences[name] > layout.max_abs:
            problems.append(f"{name} embeddings differ by {differences[name]:.2g}, allowed {layout.max_abs:.2g}")
    resized = found["resized_picture"] if "resized_picture" in differences else None
    same, flips = _top1(golden, answer.get("top1", []), resized)
    problems += flips
    looked_at = len(found) + (1 if answer.get("top1") else 0)
    detail = f"{answer['client']}: {', '.join(f'{name} {value:.1e}' for name, value in differences.items())}"
    check = Check.judge(problems, looked_at=looked_at, of=max(looked_at, 2), detail=detail)
    return ClientResult(layout.layout, str(answer["client"]), differences, same, len(answer.get("top1", [])), check)


def _top1(golden: GoldenSamples, answers: list[int], embeds: np.ndarray | None) -> tuple[int, list[str]]:
    """How many answers are those of the golden embeddings, and the others that resizing does not explain."""
    rows = [golden.prompts.index(label) for label in labels(golden)]
    same, problems = 0, []
    for index, answer in enumerate(answers):
        cosines = golden.image_embeds[index] @ golden.text_embeds[rows].T
        best = int(cosines.argmax())
        same += answer == best
        if answer == best:
            continue
        moved = 0.0 if embeds is None else float(np.linalg.norm(embeds[index] - golden.image_embeds[index]))
        apart = float(np.linalg.norm(golden.text_embeds[rows[best]] - golden.text_embeds[rows[answer]]))
        # Cauchy-Schwarz: by no more can resizing move the margin. A client that shows no embeddings of what it resized has no excuse.
        if cosines[best] - cosines[answer] > moved * apart:
            problems.append(
                f"image {index} is classified as {labels(golden)[answer]!r:.40}, expected {labels(golden)[best]!r:.40}"
            )
    return same, problems
