"""fastembed opens both halves: pictures by its own preprocessing, texts by a custom model."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from fastembed import ImageEmbedding, TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType


def main(folder: Path, inputs: Path) -> None:
    asked = json.loads((inputs / "inputs.json").read_text(encoding="utf-8"))
    pictures = sorted(map(str, inputs.glob("picture-*.png")))
    image = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=str(folder / "image"))
    TextEmbedding.add_custom_model(
        model="local/clip-text",
        pooling=PoolingType.DISABLED,
        normalization=True,
        sources=ModelSource(hf="local/clip-text"),
        dim=asked["dimension"],
        model_file="model.onnx",
    )
    text = TextEmbedding("local/clip-text", specific_model_path=str(folder / "text"))
    found = {
        "client": f"fastembed {version('fastembed')}",
        "picture_embeds": [row.tolist() for row in image.embed(pictures)],
        "text_embeds": [row.tolist() for row in text.embed(asked["prompts"])],
    }
    print(json.dumps(found))


main(Path(sys.argv[1]), Path(sys.argv[2]))
