"""transformers.js and Optimum: config.json, processors, onnx/*.onnx with FILE.onnx_data.

Contract: @huggingface/transformers 4.3.1, models/session.js and utils/model-loader.js (names of external data),
pipelines/zero-shot-image-classification.js (logits_per_image, model_type). It cuts long texts
after it added the token that ends them, so the graphs put that back.
"""

from __future__ import annotations

from r1export.layout.content import LayoutContent, ReleaseSource, graph_bytes, tokenizer_files
from r1export.layout.graphs import accept_texts_, join, relocate_, rename_
from r1export.update.atomic_io import json_bytes
from r1export.update.release_layout import CLASSIFIER, TEXTUAL, VISUAL

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}  # of file names, by precision
CHUNKS = {"vision_model.onnx": 1, "text_model.onnx": 1, "model.onnx": 2}  # files of external data of each graph


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """`name` is not used: the folder's name is the model's. Raises Unsupported if the client cannot prepare its pictures."""
    source.preprocessing.check_for("transformers.js")
    made, variants = _graphs(source, "fp32"), {}
    for precision, variant in source.variants.items():
        made |= _graphs(variant, precision)
        variants[precision] = _weights(precision)
    kind = "SiglipImageProcessor" if source.is_sigmoid else "CLIPImageProcessor"
    made |= {
        "config.json": json_bytes(_config(source)),
        "preprocessor_config.json": json_bytes(source.preprocessing.processor(kind)),
    }
    return LayoutContent(_weights("fp32") | tokenizer_files(source), made, variants=variants)


def _config(source: ReleaseSource) -> dict[str, object]:
    family, kind = ("siglip", "SiglipModel") if source.is_sigmoid else ("clip", "CLIPModel")
    height, _ = source.preprocessing.config.size
    chunks = {
        f"{graph[:-5]}{SUFFIXES[name]}.onnx": n for name in ("fp32", *source.variants) for graph, n in CHUNKS.items()
    }
    return {
        "model_type": family,
        "architectures": [kind],
        "projection_dim": source.dimension,
        "text_config": {
            "model_type": f"{family}_text_model",
            "max_position_embeddings": source.texts.length,
            "pad_token_id": source.texts.pad_id,
            "projection_dim": source.dimension,
        },
        "vision_config": {
            "model_type": f"{family}_vision_model",
            "image_size": height,
            "projection_dim": source.dimension,
        },
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": chunks},
    }


def _weights(precision: str) -> dict[str, str]:
    """The weights of one precision: path in the folder -> path in its release."""
    end = f"{SUFFIXES[precision]}.onnx_data"
    return {
        f"onnx/vision_model{end}": VISUAL.weights,
        f"onnx/text_model{end}": TEXTUAL.weights,
        f"onnx/model{end}": VISUAL.weights,
        f"onnx/model{end}_1": TEXTUAL.weights,
    }


def _graphs(source: ReleaseSource, precision: str) -> dict[str, bytes]:
    """The three graphs of one precision."""
    end, texts = f"{SUFFIXES[precision]}.onnx", source.texts
    vision = relocate_(source.graph(VISUAL.graph), {VISUAL.weights: f"vision_model{end}_data"})
    text = relocate_(source.graph(TEXTUAL.graph), {TEXTUAL.weights: f"text_model{end}_data"})
    accept_texts_(text, texts, end=True)
    if source.is_sigmoid:  # there the towers' outputs are called so
        rename_(vision, {VISUAL.output: "pooler_output"})
        rename_(text, {TEXTUAL.output: "pooler_output"})
    places = {VISUAL.weights: f"model{end}_data", TEXTUAL.weights: f"model{end}_data_1"}
    textual = accept_texts_(source.graph(TEXTUAL.graph), texts, end=True)
    both = relocate_(join(source.graph(CLASSIFIER), textual), places)
    return {
        f"onnx/vision_model{end}": graph_bytes(vision),
        f"onnx/text_model{end}": graph_bytes(text),
        f"onnx/model{end}": graph_bytes(both),
    }
