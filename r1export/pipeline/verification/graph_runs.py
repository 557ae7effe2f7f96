"""Run every graph of a release once, on one real input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from r1export.update.release_layout import GRAPHS
from r1export.verify import parity, proof
from r1export.verify.proof import Executions, Feeds


def run_graphs(folder: Path, feeds: Mapping[str, Feeds], providers: Sequence[str]) -> Executions:
    """Every graph of a release, run once on every provider."""
    return proof.execute_graphs({name: folder / name for name in GRAPHS}, feeds, providers)


def graph_feeds(inputs: parity.Inputs, width: int) -> dict[str, Feeds]:
    """One real input for each graph, and two class embeddings of zeros (2, `width`) for the classifier."""
    image, text = {"pixel_values": inputs.visual[:1]}, {"input_ids": inputs.textual[:1]}
    embeds = np.zeros((2, width), inputs.visual.dtype)
    return {"visual.onnx": image, "textual.onnx": text, "classify.onnx": image | {"class_embeds": embeds}}
