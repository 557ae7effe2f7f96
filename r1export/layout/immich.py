"""immich, a photo server: clip/NAME/{config.json, visual/, textual/}, where NAME is one of the server's own list.

Contract: immich's machine-learning/immich_ml/models/clip/{visual,textual}.py (files, keys, inputs, first output taken) and
models/constants.py (the list of names). The server decides by the name which dimension its index has.
"""

from __future__ import annotations

from r1export.errors import InputError, Unsupported
from r1export.layout.content import LayoutContent, ReleaseSource, graph_bytes, tokenizer_files
from r1export.layout.graphs import accept_texts_, rename_
from r1export.update.atomic_io import json_bytes
from r1export.update.release_layout import TEXTUAL, VISUAL

KNOWN = {  # names on the server's list -> length of an embedding; the first that fits is the default
    "ViT-B-32__openai": 512,
    "ViT-B-16__openai": 512,
    "RN50x4__openai": 640,
    "ViT-B-16-SigLIP2__webli": 768,
    "ViT-L-14__openai": 768,
    "RN50__openai": 1024,
    "ViT-L-16-SigLIP2-256__webli": 1024,
    "ViT-SO400M-16-SigLIP2-256__webli": 1152,
    "ViT-gopt-16-SigLIP2-256__webli": 1536,
}


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """`name` is one of `KNOWN`, by default the first with this dimension.

    Raises:
        InputError: `name` is none of them, or has another dimension.
        Unsupported: none has this dimension; the server cannot prepare its pictures; the release has no model config.
    """
    source.preprocessing.check_for("immich")
    chosen, config = _name(source.dimension, name), source.open_clip_config
    root, texts, pixels = f"clip/{chosen}", source.texts, source.preprocessing.config
    textual = accept_texts_(source.graph(TEXTUAL.graph), texts, int32=True)
    preprocess = {
        "size": list(pixels.size),
        "mode": "RGB",
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "interpolation": "bicubic" if pixels.interpolation == "random" else pixels.interpolation,
        "resize_mode": pixels.resize_mode,
        "fill_color": pixels.fill_color,
    }
    made = {
        f"{root}/config.json": json_bytes(config["model_cfg"]),
        f"{root}/visual/model.onnx": graph_bytes(rename_(source.graph(VISUAL.graph), {VISUAL.input: "image"})),
        f"{root}/visual/preprocess_cfg.json": json_bytes(preprocess),
        f"{root}/textual/model.onnx": graph_bytes(rename_(textual, {TEXTUAL.input: "text"})),
    }
    weights = {f"{root}/{tower.name}/{tower.weights}": tower.weights for tower in (VISUAL, TEXTUAL)}
    notes = (
        f"Copy clip/{chosen} to the server's model cache and select the model {chosen}.",
        "The re-index verdict in the release's report says whether Smart Search must be run again for all images.",
    )
    return LayoutContent(weights | tokenizer_files(source, f"{root}/textual/"), made, notes=notes)


def _name(dimension: int, name: str) -> str:
    fitting = [known for known, size in KNOWN.items() if size == dimension]
    if not fitting:
        raise Unsupported(
            f"immich has no model with {dimension}-dimensional embeddings, only {sorted(set(KNOWN.values()))}",
            "use a base model with one of these dimensions",
        )
    if name and name not in fitting:
        raise InputError(
            f"--name {name!r:.80}: not an immich model with {dimension}-dimensional embeddings",
            f"choose {', '.join(fitting)}",
        )
    return name or fitting[0]
