"""The file names of a release folder, and the inputs and outputs of its graphs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TowerFiles:
    """One tower: its name, and the input and output of its graph."""

    name: str
    input: str
    output: str

    @property
    def graph(self) -> str:
        return f"{self.name}.onnx"

    @property
    def static_graph(self) -> str:
        """The graph of a fixed batch, which a release has if the recipe asks for it."""
        return f"{self.name}.static.onnx"

    @property
    def weights(self) -> str:
        return f"{self.name}.safetensors"


VISUAL = TowerFiles("visual", "pixel_values", "image_embeds")
TEXTUAL = TowerFiles("textual", "input_ids", "text_embeds")
TOWERS = (VISUAL, TEXTUAL)
CLASSIFIER = "classify.onnx"  # (pixel_values, class_embeds) -> logits
CLASS_EMBEDS = "class_embeds"
WEIGHTS = {
    VISUAL.graph: VISUAL.weights,
    TEXTUAL.graph: TEXTUAL.weights,
    CLASSIFIER: VISUAL.weights,
}  # graph -> the file that holds its weights
GRAPHS = tuple(WEIGHTS)
STATIC_GRAPHS = tuple(tower.static_graph for tower in TOWERS)  # optional
PREPROCESS_GRAPH, PREPROCESS = "preprocess.onnx", "preprocess.json"
TOKENIZER = "tokenizer"
MODEL_CONFIG = "open_clip_config.json"  # what open_clip builds the model from
CLASSES = "classes"
GOLDEN = "golden.safetensors"
MANIFEST = "manifest.json"
MODEL_CARD = "README.md"
REPORTS = ("report.html", "report.md", "report.xml", "report.json")  # in the order in which they are written
UPDATE = "update.r1u"
UNLISTED = (MANIFEST, MODEL_CARD, *REPORTS, UPDATE)  # made from the manifest, or after it


def class_embeddings_file(task: str) -> str:
    """The file of a task's class embeddings (C, D)."""
    return f"{CLASSES}/{task}.safetensors"


def class_names_file(task: str) -> str:
    """The file of a task's classes and templates."""
    return f"{CLASSES}/{task}.json"
