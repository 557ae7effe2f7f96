"""open_clip makes the model from the folder and embeds by its own preprocessing and tokenizer."""

import json
import sys
from pathlib import Path

import open_clip
import torch
from PIL import Image
from towers import read_inputs


def main(folder: Path, inputs: Path) -> None:
    asked, pixels, ids = read_inputs(inputs)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        pictures = [preprocess(Image.open(path)) for path in sorted(inputs.glob("picture-*.png"))]
        found = {
            "image_embeds": model.encode_image(torch.from_numpy(pixels), normalize=True).tolist(),
            "picture_embeds": model.encode_image(torch.stack(pictures), normalize=True).tolist(),
        }
        if asked["own_tokenizer"]:  # part of open_clip; those of a hub need transformers, so their ids are given
            ids = open_clip.get_tokenizer(f"local-dir:{folder}")(asked["prompts"]).numpy()
        found["text_embeds"] = model.encode_text(torch.from_numpy(ids), normalize=True).tolist()
    print(json.dumps({"client": f"open_clip {open_clip.__version__}", **found}))


main(Path(sys.argv[1]), Path(sys.argv[2]))
