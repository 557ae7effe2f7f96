"""On a device: install a signed update, open what is current, classify a picture. Needs numpy, onnxruntime, Pillow and safetensors.

    python examples/update_device.py STORE UPDATE.r1u TASK PICTURE

STORE was made by `r1export device init`. Whatever goes wrong, the version that was current stays current.
"""

import json
import sys

import numpy as np
import safetensors.numpy
from PIL import Image, ImageOps

import r1export

store, update, task, picture = sys.argv[1:]
try:
    outcome = r1export.apply_bundle(store, update)
    print("installed" if outcome.changed else "already there")
except r1export.R1ExportError as error:
    print(f"still on the old version: {error}", file=sys.stderr)

version = r1export.open_version(store)  # stays what it is, even if another update is installed meanwhile
preprocess, classify = version.session("preprocess.onnx"), version.session("classify.onnx")
classes = json.loads(version.read(f"classes/{task}.json"))["classes"]
embeddings = safetensors.numpy.load(version.read(f"classes/{task}.safetensors"))["class_embeds"]

pixels = np.asarray(ImageOps.exif_transpose(Image.open(picture)).convert("RGB"))  # (height, width, 3), uint8
(pixel_values,) = preprocess.run(None, {"image": pixels})
(logits,) = classify.run(None, {"pixel_values": pixel_values, "class_embeds": embeddings})
probabilities = np.exp(logits[0] - logits[0].max())
probabilities /= probabilities.sum()
for row in np.argsort(-probabilities)[:3]:
    print(f"{classes[row]:24} {probabilities[row]:.1%}")
