"""transformers.js in Chromium names a photograph as onnxruntime does, with a release of the built-in photo model."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from layout.conftest import NODE
from PIL import Image
from running import trained_run
from sklearn.datasets import load_sample_image
from tokenizers import Tokenizer
from web.conftest import Browser, missing

from r1export.layout.write import read_source, write_layout

TEXTS = [f"a photo of a {name}." for name in ("flower", "temple", "dog", "car", "cup", "bird", "ship", "shoe")]
PAGE = """<!doctype html><link rel="icon" href="data:,"><script type="module">
import * as hf from "/dist/transformers.min.js";
hf.env.allowRemoteModels = false;
hf.env.allowLocalModels = true;
hf.env.localModelPath = "/";
hf.env.useBrowserCache = false;
hf.env.backends.onnx.wasm.wasmPaths = "/ort/";
hf.env.backends.onnx.wasm.numThreads = 1;
window.classify = async (dtype, texts) => {
  const pipe = await hf.pipeline("zero-shot-image-classification", "layout", { dtype, device: "wasm" });
  const found = {};
  for (const file of ["china.png", "flower.png"]) {
    const answers = await pipe(`/${file}`, texts, { hypothesis_template: "{}" });
    found[file] = [...answers].sort((a, b) => b.score - a.score)[0].label;
  }
  return found;
};
window.ready = true;
</script>"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Skips where parts are missing, unless they have to be there."""
    lack = missing() or ("" if (NODE / "node_modules").is_dir() else "python scripts/layout_clients.py")
    if lack:
        assert "required" not in (os.environ.get("R1EXPORT_BROWSER"), os.environ.get("R1EXPORT_CLIENTS")), lack
        pytest.skip(lack)
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The built-in photo model after one task, with an int8 variant."""
    recipe = (
        '[base]\nmodel = "builtin:photo"\n[[tasks]]\nname = "clothing"\nsource = "builtin:clothing10"\n'
        '[train]\nlearning_rate = 1e-3\n[export]\nvariants = ["int8"]\n'
    )
    settings = ("tasks.0.name=clothing", "tasks.0.source=builtin:clothing10", "train.iterations=2")
    run = trained_run(tmp_path_factory.mktemp("photo"), recipe, *settings)
    return next((run / "releases").glob("01-*"))


@pytest.fixture(scope="module")
def site(release, tmp_path_factory) -> Path:
    """A folder for the web: the page, the library, the layout and two photographs, of which the client sees the pixels."""
    folder = tmp_path_factory.mktemp("site")
    write_layout(read_source(release, variants=True), "transformersjs", folder / "layout")
    modules = NODE / "node_modules"
    (folder / "dist").symlink_to(modules / "@huggingface/transformers/dist")
    (folder / "ort").symlink_to(modules / "onnxruntime-web/dist")
    (folder / "index.html").write_text(PAGE, encoding="utf-8")
    for name in ("china", "flower"):
        Image.fromarray(load_sample_image(f"{name}.jpg")).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def url(site) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    Quiet.extensions_map = Quiet.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def named_by_onnxruntime(release: Path, picture: Path) -> str:
    def run(graph: str, **feeds: np.ndarray) -> np.ndarray:
        return ort.InferenceSession(release / graph, providers=["CPUExecutionProvider"]).run(None, feeds)[0]

    tokenizer = Tokenizer.from_file(str(release / "tokenizer/tokenizer.json"))
    texts = run("textual.onnx", input_ids=np.array([tokenizer.encode(text).ids for text in TEXTS], np.int64))
    pixels = run("preprocess.onnx", image=np.asarray(Image.open(picture).convert("RGB")))
    return TEXTS[int((run("visual.onnx", pixel_values=pixels) @ texts.T).argmax())]


@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_a_photograph_is_named_as_onnxruntime_names_it(chromium, url, site, release, dtype) -> None:
    precision = release if dtype == "fp32" else release.parents[1] / "variants/int8/releases" / release.name
    chromium.do("open", {})
    chromium.do("page.goto", url)
    chromium.do("until", "window.ready === true")
    found = chromium.do("evaluate", f"window.classify({json.dumps(dtype)}, {json.dumps(TEXTS)})")
    assert found == {file: named_by_onnxruntime(precision, site / file) for file in ("china.png", "flower.png")}
    if dtype == "fp32":
        assert found["flower.png"] == "a photo of a flower."
