"""A release: one folder that can be deployed by itself, written whole or not at all, in the time of writing its bytes.

The .onnx files are copied from the one export; only the weights and what follows from them are new.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import InputError, refused
from r1export.export.graph import GRAPHS
from r1export.export.int8 import SCALE
from r1export.export.precision import PROCEDURES
from r1export.export.tokenizer import write_tokenizer
from r1export.export.weight_map import WeightMap
from r1export.update.atomic_io import new_folder, sha256_bytes, sha256_file, write_file, write_json
from r1export.update.container import NAMES, write_tensors
from r1export.update.factors import Rows
from r1export.update.release_manifest import FORMAT, MANIFEST, REPORTS, sealed

PREPROCESS = "preprocess.onnx"
UNLISTED = (MANIFEST, "README.md", *REPORTS, "update.r1u")  # made from the manifest, or after it


@dataclass(frozen=True)
class TaskClasses:
    """Class embeddings (C, D) of one task, the names and templates they were made from, and whether the task was learned."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    embeddings: np.ndarray
    learned: bool


@dataclass(frozen=True)
class Golden:
    """Real inputs and the outputs that torch gives for them: what a client compares its own outputs with."""

    pixel_values: np.ndarray
    image_embeds: np.ndarray
    input_ids: np.ndarray
    text_embeds: np.ndarray


@dataclass(frozen=True)
class ReleaseContent:
    """Everything that makes one release. `accuracy` is asked for the folder once its graphs and weights are there.

    `adapted` are the rows beside which experts stand in this or a later release: the same for all, so that their maps are.
    """

    name: str
    sequence: int
    precision: str
    base: Mapping[str, str]
    updates: tuple[Mapping[str, str], ...]
    weights: Mapping[str, np.ndarray]
    tasks: tuple[TaskClasses, ...]
    golden: Golden
    preprocess: Mapping[str, Any]
    tokenizer: Any
    graph_digests: Mapping[str, str]
    accuracy: Callable[[Path], Mapping[str, float]]
    versions: Mapping[str, str]
    tolerance: Mapping[str, float]
    adapted: tuple[Rows, ...] = ()


def write_release(content: ReleaseContent, graphs: Path, path: Path) -> dict[str, Any]:
    """Write the release folder `path` and return its manifest. `graphs` is the folder of the one export.

    Raises:
        InputError: `path` cannot be.
        Unsupported: no space, no permission. Nothing half-written is left.
    """
    weights = WeightMap.read(graphs / "weight_map.json")
    with refused_writes(path), new_folder(path) as folder:
        for graph in (*GRAPHS, *((PREPROCESS,) if (graphs / PREPROCESS).exists() else ())):
            shutil.copyfile(graphs / graph, folder / graph)
        tensors = {file: weights.stored(file, content.weights) for file in weights.files}
        for file, stored in tensors.items():
            write_tensors(folder / file, stored)
        _write_classes(content.tasks, folder / "classes")
        write_json(folder / "preprocess.json", content.preprocess)
        write_tokenizer(content.tokenizer, folder / "tokenizer")
        write_tensors(
            folder / "golden.safetensors",
            {n: getattr(content.golden, n) for n in ("input_ids", "pixel_values", "image_embeds", "text_embeds")},
        )
        accuracy = content.accuracy(folder)
        manifest = sealed(_manifest(content, folder, accuracy, weights, tensors))
        write_json(folder / MANIFEST, manifest)
        write_file(folder / "README.md", model_card(manifest).encode())
    return manifest


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Turns an OSError while writing under `path` into one line that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        raise refused(error, f"{path} could not be written") from error


def _write_classes(tasks: tuple[TaskClasses, ...], folder: Path) -> None:
    folder.mkdir()
    for task in tasks:
        write_tensors(folder / f"{task.name}.safetensors", {"class_embeds": task.embeddings})
        write_json(
            folder / f"{task.name}.json",
            {
                "task": task.name,
                "classes": list(task.classes),
                "templates": list(task.templates),
                "learned": task.learned,
            },
        )


def _manifest(
    content: ReleaseContent,
    folder: Path,
    accuracy: Mapping[str, float],
    weights: WeightMap,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    listed = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNLISTED)
    with ThreadPoolExecutor() as pool:  # all bytes are hashed twice, which takes as long as writing them
        places = pool.submit(_tensor_map, weights, tensors, content)
        digests = dict(zip(listed, pool.map(sha256_file, listed), strict=True))
    return {
        "format": FORMAT,
        "name": content.name,
        "sequence": content.sequence,
        "procedure": PROCEDURES[content.precision],
        "precision": content.precision,
        "base": dict(content.base),
        "updates": [dict(update) for update in content.updates],
        "tasks": [
            {"name": t.name, "classes": len(t.classes), "learned": t.learned, "accuracy": accuracy.get(t.name)}
            for t in content.tasks
        ],
        "graphs": dict(content.graph_digests),
        "golden": dict(content.tolerance),
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": digest, "bytes": path.stat().st_size}
            for path, digest in digests.items()
        },
        "tensors": places.result(),
        "versions": dict(content.versions),
    }


def _tensor_map(
    weights: WeightMap, tensors: Mapping[str, Mapping[str, np.ndarray]], content: ReleaseContent
) -> dict[str, Any]:
    """Parameter -> where its bytes lie, in which form, and their digest."""
    entries = {}
    for file, placed in weights.files.items():
        specs = weights.layout(file).by_name
        for placement in placed:
            spec, stored = specs[placement.parameter], tensors[file][placement.parameter]
            entries[spec.name] = {
                "file": file, "offset": spec.offset, "bytes": spec.nbytes, "dtype": NAMES[spec.dtype], "shape": list(spec.shape),
                "rows": _rows(spec.name, content), "transposed": placement.transposed, "sha256": sha256_bytes(stored),
            }  # fmt: skip
            if placement.dtype == "I8":
                entries[spec.name]["scale"] = spec.name + SCALE
    return entries


def _rows(parameter: str, content: ReleaseContent) -> list[list[int]]:
    """[start, stop] of each adapted linear in a parameter (rows, in), a packed one has several; else all rows, none of a scalar."""
    found = sorted([rows.start, rows.stop] for rows in content.adapted if rows.parameter == parameter)
    shape = content.weights[parameter].shape  # not as it is stored, which may be transposed or have further axes
    return found or [[0, height] for height in shape[:1]]


def read_manifest(release: Path) -> dict[str, Any]:
    """Raises InputError if `release` is not a release folder."""
    path = release / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
        return manifest
    except FileNotFoundError:
        raise InputError(
            f"{release}: no {MANIFEST}", "give a release folder, for example RUN/releases/01-NAME"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a release manifest: {error}", "write the release again with r1export export"
        ) from error


def model_card(manifest: Mapping[str, Any]) -> str:
    """README.md of the release."""
    learned = [task for task in manifest["tasks"] if task["learned"]]
    rows = "\n".join(
        f"| {t['name']} | {t['classes']} | {_percent(t['accuracy'])} | {'yes' if t['learned'] else 'no'} |"
        for t in manifest["tasks"]
    )
    digests = "\n".join(
        f"    {entry['sha256']}  {name}"
        for name, entry in manifest["files"].items()
        if name.endswith((".onnx", ".safetensors"))
    )
    return CARD.format(
        name=manifest["name"],
        base=manifest["base"]["name"],
        base_sha256=manifest["base"]["sha256"],
        licence=manifest["base"].get("licence") or "not known to r1export; ask where they come from",
        precision=manifest["precision"],
        count=len(learned),
        rows=rows,
        digests=digests,
        version=manifest["versions"].get("r1export", "?"),
    )


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


CARD = """# {name}

CLIP as ONNX in {precision}, made by r1export {version} from base model `{base}`, with {count} learned task(s) merged into its weights.
The graphs are those of the base model, byte for byte; only the weights differ.
Licence of the base weights: {licence}. Their SHA-256: `{base_sha256}`.

| task | classes | top-1 | learned |
|---|---|---|---|
{rows}

## Use

```python
import json, numpy as np, onnxruntime as ort
from pathlib import Path
from safetensors.numpy import load_file
from PIL import Image
p = json.loads(Path("preprocess.json").read_text())
image = Image.open("image.png").convert("RGB").resize(p["size"][::-1], Image.BICUBIC)  # or resize the short side and crop
pixels = (np.asarray(image, np.float32) / 255 - p["mean"]) / p["std"]
classes = load_file("classes/TASK.safetensors")["class_embeds"]
session = ort.InferenceSession("classify.onnx", providers=["CPUExecutionProvider"])
logits = session.run(None, {{"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32), "class_embeds": classes}})[0]
print(json.loads(Path("classes/TASK.json").read_text())["classes"][logits.argmax()])
```

`preprocess.onnx`, where it is there, turns an image of any size (uint8, height x width x 3) into pixel_values.
`visual.onnx` and `textual.onnx` give L2-normalised embeddings; `golden.safetensors` holds inputs and expected outputs
for a self-test; `manifest.json` lists every file's SHA-256 and where each parameter lies.

## Digests

{digests}
"""
