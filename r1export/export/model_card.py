"""README.md of a release: what it is, and the few lines with which a client gets the release's own answers."""

from __future__ import annotations

import json

from r1export.export.text_cleaning import LIMITS
from r1export.update.release_manifest import ReleaseManifest

HUB = "hf-hub:"
LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0", "CC-BY-4.0": "cc-by-4.0"}  # SPDX identifier -> the Hub's own


def model_card(manifest: ReleaseManifest) -> str:
    """The card, which follows from the manifest. What its code does to pictures follows from preprocess.json."""
    rows = "\n".join(
        f"| {t.name} | {t.classes} | {_percent(t.accuracy)} | {'yes' if t.learned else 'no'} |" for t in manifest.tasks
    )
    digests = "\n".join(
        f"    {entry.sha256}  {name}"
        for name, entry in manifest.files.items()
        if name.endswith((".onnx", ".safetensors"))
    )
    names = [task.name for task in manifest.tasks]
    learned = [task.name for task in manifest.tasks if task.learned]
    return front_matter(manifest) + CARD.format(
        name=manifest.name,
        base=manifest.base.name,
        base_sha256=manifest.base.sha256,
        licence=manifest.base.licence or "unknown; check their source",
        precision=manifest.precision,
        count=len(learned),
        rows=rows,
        digests=digests,
        version=manifest.versions.get("r1export", "?"),
        task=(learned or names or ["TASK"])[-1],
        tasks=", ".join(names),
        limits="\n".join(f"- {limit}" for limit in LIMITS),
    )


def front_matter(manifest: ReleaseManifest) -> str:
    """The card's metadata as the Hugging Face Hub reads it, in YAML with every text quoted.

    A base model is named only where it is one of the Hub. Datasets are not: the tasks' names are the user's own, and the Hub would take
    them for its own data sets of the same name.
    """
    lines = ["---", *_licence_lines(manifest.base.licence), "library_name: onnx"]
    lines.append("pipeline_tag: zero-shot-image-classification")
    if manifest.base.name.startswith(HUB):
        relation = "finetune" if manifest.precision == "fp32" else "quantized"
        lines += [f"base_model: {_quoted(manifest.base.name.removeprefix(HUB))}", f"base_model_relation: {relation}"]
    lines += ["tags:", "- clip", "- onnx", "- r1export"]
    measured = [task for task in manifest.tasks if task.accuracy is not None]
    if measured:
        lines += ["model-index:", f"- name: {_quoted(manifest.name)}", "  results:"]
    for task in measured:
        lines += [
            "  - task:",
            "      type: zero-shot-image-classification",
            "    dataset:",
            f"      type: {_quoted(task.name)}",
            f"      name: {_quoted(task.name)}",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {task.accuracy}",
            "      name: top-1",
        ]
    return "\n".join([*lines, "---", "", ""])


def _licence_lines(licence: str | None) -> list[str]:
    if licence in LICENCES:
        return [f"license: {LICENCES[licence]}"]
    return ["license: other", f"license_name: {_quoted(licence)}"] if licence else ["license: unknown"]


def _quoted(text: str) -> str:
    """A text as a YAML scalar; JSON's strings are YAML's."""
    return json.dumps(text)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


CARD = """# {name}

CLIP as ONNX in {precision}, exported with r1export {version} from base model `{base}`, with {count} fine-tuned task(s) merged into the weights.
The graphs are byte-identical to the base model's; only the weights differ.
Licence of the base weights: {licence}. Their SHA-256: `{base_sha256}`.

| task | classes | top-1 | learned |
|---|---|---|---|
{rows}

## Classify an image

Save this as `classify.py` in the release folder and run it there. It decodes, resizes and normalizes an image as in training.

```python
# pip install onnxruntime numpy pillow
import json

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

PICTURE = "photo.jpg"  # your image
TASK = "{task}"  # one of: {tasks}

p = json.load(open("preprocess.json", encoding="utf-8"))
height, width = p["size"]
fill = p["fill_color"] if isinstance(p["fill_color"], list) else [p["fill_color"]] * 3

image = ImageOps.exif_transpose(Image.open(PICTURE))  # upright
if image.mode[0] in "IF":  # gray of 16 or 32 bits, scaled by its range
    gray = np.asarray(image, np.float64)
    low, high = (0, 65535) if ";" in image.mode else (gray.min(), gray.max())
    image = Image.fromarray(np.rint((gray - low) * (255 / (high - low))).astype(np.uint8))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, (*fill, 255)), image.convert("RGBA"))
image = image.convert("RGB")

by_shorter = p["resize_mode"] == "shortest"
bilinear = p["interpolation"] == "bilinear" and not (by_shorter and height != width)
method = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
if p["resize_mode"] == "squash":
    image = image.resize((width, height), method)
elif by_shorter and height == width:
    image = image.resize([width * side // min(image.size) for side in image.size], method)
else:
    ratio = (min if by_shorter else max)(image.width / width, image.height / height)
    image = image.resize([round(side / ratio) for side in image.size], method)
middle = [(b - a) // 2 if a < b else -round((a - b) / 2) for a, b in zip(image.size, (width, height))]
canvas = Image.new("RGB", (width, height), tuple(fill))
canvas.paste(image, middle)
pixels = (np.asarray(canvas, np.float32) / 255 - np.float32(p["mean"])) / np.float32(p["std"])

with open(f"classes/{{TASK}}.safetensors", "rb") as file:  # a JSON header behind its length, then float32
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    classes = np.frombuffer(file.read(), "<f4").reshape(header["class_embeds"]["shape"])
names = json.load(open(f"classes/{{TASK}}.json", encoding="utf-8"))["classes"]

session = ort.InferenceSession("classify.onnx", providers=["CPUExecutionProvider"])
logits = session.run(None, {{"pixel_values": pixels.transpose(2, 0, 1)[None], "class_embeds": classes}})[0][0]
print(names[logits.argmax()])
```

`preprocess.onnx`, if present, turns an upright RGB image of any size (uint8, height x width x 3) into `pixel_values`, with differences of at
most a few of 256 levels. `visual.onnx` returns the L2-normalized embedding of `pixel_values`.

## Use your own classes

```python
# pip install onnxruntime numpy tokenizers
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

TEXTS = ["a photo of a cat.", "a photo of a dog."]

tokenizer = Tokenizer.from_file("tokenizer/tokenizer.json")  # cleans, pads and cuts by itself
ids = np.array([tokenizer.encode(text).ids for text in TEXTS], np.int64)
session = ort.InferenceSession("textual.onnx", providers=["CPUExecutionProvider"])
print(session.run(None, {{"input_ids": ids}})[0])  # one row of length 1 for each text: class_embeds
```

For several templates per class, average the rows and scale the result to length 1. The ids match open_clip's, except possibly for

{limits}

`golden.safetensors` contains inputs and expected outputs for a self-test; `manifest.json` lists the SHA-256 of every file and the location
of every parameter.

## Digests

{digests}
"""
