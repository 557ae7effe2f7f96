"""preprocess.onnx against open_clip's own transform."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from r1export.adapt.clip import Preprocess
from r1export.errors import Unsupported
from r1export.export.preprocess import write_preprocess


def photograph(height: int, width: int) -> Image.Image:
    """Smooth shapes with an edge: what filters treat differently."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 100 * np.sin(x / 9 + c) * np.cos(y / (7 + c)) + 28 * (x > width / 2) for c in range(3)]
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("shape", [(16, 16), (47, 31), (200, 333), (9, 50)])
@pytest.mark.parametrize(
    ("resize_mode", "interpolation"), [("shortest", "bicubic"), ("squash", "bicubic"), ("shortest", "bilinear")]
)
def test_images_of_any_size_come_out_as_open_clip_makes_them(tmp_path, shape, resize_mode, interpolation) -> None:
    config = PreprocessCfg(size=16, resize_mode=resize_mode, interpolation=interpolation)
    write_preprocess(Preprocess(config).to_json(), tmp_path / "preprocess.onnx", opset=18)
    session = ort.InferenceSession(tmp_path / "preprocess.onnx", providers=["CPUExecutionProvider"])
    image = photograph(*shape)
    found = session.run(None, {"image": np.asarray(image)})[0]
    expected = image_transform_v2(config, is_train=False)(image).numpy()[None]
    levels = np.abs(found - expected) * np.array(config.std).reshape(3, 1, 1) * 255
    assert found.shape == expected.shape
    assert levels.max() < 1.01  # a weight of the filter is rounded to another side at most
    assert levels.mean() < 0.15


def test_what_has_no_faithful_graph_is_refused(tmp_path) -> None:
    with pytest.raises(Unsupported, match=r"no preprocess\.onnx for RGB longest"):
        write_preprocess(
            Preprocess(PreprocessCfg(size=16, resize_mode="longest")).to_json(), tmp_path / "preprocess.onnx", opset=20
        )
    assert not list(tmp_path.iterdir())
