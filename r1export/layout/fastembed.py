"""fastembed, with which Qdrant embeds: image/ for ImageEmbedding, text/ for a custom TextEmbedding.

Contract: fastembed 0.9.1, image/onnx_embedding.py, common/preprocessor_utils.py, text/custom_text_embedding.py.
"""

from __future__ import annotations

from r1export.layout.content import LayoutContent, ReleaseSource, graph_bytes, tokenizer_files
from r1export.layout.graphs import accept_texts_
from r1export.update.atomic_io import json_bytes
from r1export.update.release_layout import TEXTUAL, VISUAL


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """`name` is not used: the person who loads the text model gives it one. Raises Unsupported for other preprocessing."""
    source.preprocessing.check_for("fastembed")
    texts = source.texts
    textual = accept_texts_(source.graph(TEXTUAL.graph), texts)
    made = {
        "image/model.onnx": graph_bytes(source.graph(VISUAL.graph)),
        "image/preprocessor_config.json": json_bytes(source.preprocessing.processor("CLIPImageProcessor")),
        "text/model.onnx": graph_bytes(textual),
        "text/config.json": json_bytes({"pad_token_id": texts.pad_id, "max_position_embeddings": texts.length}),
    }
    weights = {f"image/{VISUAL.weights}": VISUAL.weights, f"text/{TEXTUAL.weights}": TEXTUAL.weights}
    return LayoutContent(weights | tokenizer_files(source, "text/"), made)
