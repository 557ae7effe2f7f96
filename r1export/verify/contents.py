"""What a release holds against what it has to hold, derived anew from the base and the factors.

Digests in a manifest say that a file is the one that was written; they do not say that what was written was right.
Every function returns one line per problem, none if all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import R1ExportError
from r1export.update.atomic_io import sha256_bytes
from r1export.update.container import NAMES, TensorSpec, map_tensors, read_layout, read_tensors
from r1export.update.factors import ExpertUpdate
from r1export.verify.graph_digest import read_graph
from r1export.verify.merge_diagnosis import diagnose

PROMPTS = (
    256  # prompts per task that are embedded again: enough for every class of a small task, spread over a large one
)
Embed = Callable[[list[str]], np.ndarray]


def part(problems: Iterable[str], fine: str) -> dict[str, str]:
    """One part of a release's contents as it stands in the report."""
    found = list(problems)
    more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
    return {"verdict": "fail" if found else "pass", "detail": "; ".join(found[:5]) + more if found else fine}


def manifest_problems(manifest: Mapping[str, Any], expected: Mapping[str, Any], digest: str) -> list[str]:
    """`digest` is what the manifest's own digest should be; `expected` are facts that follow from the run."""
    problems = (
        [] if manifest.get("sha256") == digest else ["manifest.json was edited: its digest of itself does not fit"]
    )
    other = {name: value for name, value in expected.items() if manifest.get(name) != value}
    return problems + [
        f"manifest.json: {name} is {_short(manifest.get(name))}, expected {_short(value)}"
        for name, value in other.items()
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def tensor_map_problems(release: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The manifest's map of tensors against the weights files: devices merge at the offsets that it gives."""
    files: dict[str, tuple[Mapping[str, TensorSpec], Mapping[str, np.ndarray]]] = {}
    problems = []
    for name, entry in manifest["tensors"].items():
        file = entry["file"]
        if file not in files:
            files[file] = read_layout(release / file).by_name, map_tensors(release / file)
        specs, tensors = files[file]
        if name not in specs:
            problems.append(f"{file} has no {name}")
            continue
        spec = specs[name]
        found = {"offset": spec.offset, "bytes": spec.nbytes, "dtype": NAMES[spec.dtype], "shape": list(spec.shape)}
        wrong = [key for key, value in found.items() if entry[key] != value]
        if wrong:
            problems.append(
                f"manifest.json: {wrong[0]} of {name} is {entry[wrong[0]]}, in {file} it is {found[wrong[0]]}"
            )
        elif sha256_bytes(np.ascontiguousarray(tensors[name])) != entry["sha256"]:
            problems.append(f"{name} in {file} has another digest than the manifest says")
    return problems


def weight_problems(
    release: Path,
    manifest: Mapping[str, Any],
    expected: Mapping[str, np.ndarray],
    updates: Sequence[tuple[str, ExpertUpdate]],
) -> list[str]:
    """Every parameter, bit for bit, against `expected` = base + factors; `updates` (task, factors) help to say what went wrong."""
    files = sorted({entry["file"] for entry in manifest["tensors"].values()})
    stored = {name: tensor for file in files for name, tensor in map_tensors(release / file).items()}
    problems = [f"{name} is missing from the weights" for name in expected if name not in stored]
    problems += [f"{name} is not a parameter of the model" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        turned = bool(manifest["tensors"].get(name, {}).get("transposed"))
        found, wanted = (stored[name].T if turned else stored[name]), expected[name]
        if found.size != wanted.size or found.dtype != wanted.dtype:
            problems.append(f"{name} is {found.dtype}{list(found.shape)}, expected {wanted.dtype}{list(wanted.shape)}")
        elif np.ascontiguousarray(found).tobytes() != np.ascontiguousarray(wanted).tobytes():
            problems.append(
                f"{name} is not base + factors: {diagnose(name, np.reshape(found, wanted.shape), wanted, updates)}"
            )
    return sorted(problems)


def epsilon_problems(graph: Path, epsilons: Mapping[str, float]) -> list[str]:
    """Every LayerNormalization against the epsilon of the module that owns its weight.

    A wrong one errs by less than any tolerance where the input varies much, and by everything where it does not.
    """
    problems = []
    for node in read_graph(graph).graph.node:
        module = node.input[1].removesuffix(".weight") if node.op_type == "LayerNormalization" else ""
        found = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        if module in epsilons and np.float32(epsilons[module]) != np.float32(found):
            problems.append(f"{graph.name}: epsilon of {module} is {found:.3g}, expected {epsilons[module]:.3g}")
    return problems


def class_problems(
    release: Path, tasks: Iterable[tuple[str, Sequence[str], Sequence[str]]], embed: Embed, tolerance: float
) -> list[str]:
    """Each task's (name, classes, templates) and its class embeddings against what the release's own text tower gives now.

    `embed` takes prompts to unit-norm (n, D). A class embedding is the normalised mean over the templates.
    """
    problems = []
    for name, classes, templates in tasks:
        try:
            problems += _task_problems(release / "classes", name, classes, templates, embed, tolerance)
        except (R1ExportError, OSError, ValueError, KeyError) as error:
            problems.append(f"classes/{name}: {error}")
    return problems


def _task_problems(
    folder: Path, name: str, classes: Sequence[str], templates: Sequence[str], embed: Embed, tolerance: float
) -> list[str]:
    stored = read_tensors(folder / f"{name}.safetensors")["class_embeds"]
    if len(stored) != len(classes):
        return [f"classes/{name}.safetensors has {len(stored)} classes, expected {len(classes)}"]
    count = max(1, min(len(classes), PROMPTS // len(templates)))
    chosen = np.unique(np.linspace(0, len(classes) - 1, count).astype(int))
    prompts = [template.format(classes[i]) for i in chosen for template in templates]
    means = embed(prompts).astype(np.float64).reshape(len(chosen), len(templates), -1).mean(1)
    fresh = means / np.linalg.norm(means, axis=1, keepdims=True)
    if stored.shape[1] != fresh.shape[1]:
        return [f"classes/{name}.safetensors has width {stored.shape[1]}, the text tower gives {fresh.shape[1]}"]
    error = np.abs(fresh - stored[chosen]).max(1)
    if error.max() <= tolerance:
        return []
    worst = classes[chosen[int(error.argmax())]]
    return [
        f"classes/{name}.safetensors is stale: the text tower gives another embedding, by {error.max():.2g} for {worst!r}, allowed {tolerance:.2g}"
    ]
