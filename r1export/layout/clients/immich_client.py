"""A stand-in for immich's server: it reads the same files and keys and feeds the same inputs as the server's published loader.

What it follows: machine-learning/immich_ml/models/clip/visual.py and textual.py of immich (first output taken, `image` float32,
`text` int32, pad_token from tokenizer_config.json, resize_mode squash or shortest). It is no part of immich.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def session_of(path: Path):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)[0][0].tolist()


def prepare(image, config):
    size = config["size"][0] if isinstance(config["size"], list) else config["size"]
    method = FILTERS[config["interpolation"]]
    if config.get("resize_mode", "shortest") == "squash":
        image = image.resize((size, size), method)
    else:
        width, height = image.size
        longer = int(max(width, height) / min(width, height) * size)
        image = image.resize((size, longer) if width < height else (longer, size), method)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    values = np.asarray(image.convert("RGB"), np.float32) / 255
    values = (values - np.float32(config["mean"])) / np.float32(config["std"])
    return values.astype(np.float32).transpose(2, 0, 1)[None]


def tokenizer_of(root: Path) -> Tokenizer:
    length = json.loads((root / "config.json").read_text())["text_cfg"].get("context_length", 77)
    pad = json.loads((root / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    tokenizer = Tokenizer.from_file(str(root / "textual" / "tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    return tokenizer


def main(folder: Path, inputs: Path) -> None:
    root = next((folder / "clip").iterdir())
    asked = json.loads((inputs / "inputs.json").read_text(encoding="utf-8"))
    config = json.loads((root / "visual" / "preprocess_cfg.json").read_text())
    visual, textual = (session_of(root / tower / "model.onnx") for tower in ("visual", "textual"))
    tokenizer = tokenizer_of(root)
    pictures = [Image.open(path) for path in sorted(inputs.glob("picture-*.png"))]
    found = {
        "client": f"stand-in for immich's loader (onnxruntime {ort.__version__})",
        "picture_embeds": [visual({"image": prepare(image, config)}) for image in pictures],
        "text_embeds": [textual({"text": np.array([tokenizer.encode(p).ids], np.int32)}) for p in asked["prompts"]],
    }
    print(json.dumps(found))


main(Path(sys.argv[1]), Path(sys.argv[2]))
