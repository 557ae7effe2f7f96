"""Graphs of both towers in a runtime, fed with what golden samples say; shared by the programs of servers and packages."""

import json
from pathlib import Path

import numpy as np


def read_inputs(inputs):
    """What was asked, pixel_values (n, 3, h, w) and input_ids (n, L)."""
    asked = json.loads((inputs / "inputs.json").read_text(encoding="utf-8"))
    pixels = np.fromfile(inputs / "pixel_values.f32", "<f4").reshape(asked["shape"])
    ids = np.array(json.loads((inputs / "input_ids.json").read_text()), np.int64)
    return asked, pixels, ids


def shortened(ids, pad_id, left):
    """Each row of ids without its padding, as clients that do not pad send it: a list of (1, l)."""
    rows = []
    for row in ids:
        kept = np.flatnonzero(row != pad_id)
        inside = row[kept[0] :] if left else row[: kept[-1] + 1]
        rows.append(inside[None])
    return rows


def embeds(asked, pixels, ids, visual, textual):
    """`visual` and `textual` map arrays to embeddings. Texts are given both whole and without padding."""
    found = {"image_embeds": np.asarray(visual(pixels)).tolist(), "text_embeds": np.asarray(textual(ids)).tolist()}
    if asked["pad_id"] is not None:
        short = [textual(row)[0] for row in shortened(ids, asked["pad_id"], asked["left"])]
        found["short_text_embeds"] = np.asarray(short).tolist()
    return found


def models(folder):
    """The two model folders of a numeric layout, image tower first."""
    found = sorted(path.parent.parent for path in Path(folder).glob("*/1/model.onnx"))
    return sorted(found, key=lambda path: not path.name.endswith("_visual"))
