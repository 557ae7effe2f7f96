"""A small real run: a two-tower model as ONNX files with weights beside them, three tasks, four releases."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from r1export.export.preprocess import write_preprocess
from r1export.update.atomic_io import sha256_file, write_json
from r1export.update.container import NAMES, read_layout, read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.update.int8 import dequantize, quantize
from r1export.verify.client_files import PreprocessConfig

TASKS = ("digits", "shapes", "colours")
SHAPES = {  # parameter: logical shape, file, whether it is stored as (in, out)
    "visual.proj.weight": ((16, 192), "visual.safetensors", True),
    "visual.proj.bias": ((16,), "visual.safetensors", False),
    "visual.head.weight": ((8, 16), "visual.safetensors", False),
    "token_embedding.weight": ((32, 16), "textual.safetensors", False),
    "text.head.weight": ((8, 16), "textual.safetensors", True),
}
# One element of one weight for which the order of the first two tasks shows: without rounding between them the sum lies
# 1.1 * 2^-53 below the middle of two float32, and only the wrong order keeps enough of that to round down.
ORDER_WEIGHT = -1.25 * 2.0**-54
ORDER_PRODUCTS = ((1 + 2.0**-23, 1.0), (2.0**-12 * (1 + 2.0**-15), 2.0**-12 * (1 - 2.0**-15)))
PROMPTS = ("a photo of one", "größe", "a photo of three of two a photo", "two")
CONFIG = {
    "size": [8, 8], "mode": "RGB", "resize_mode": "shortest", "interpolation": "bicubic", "fill_color": 0,
    "scale": 1 / 255, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "layout": "NCHW",
}  # fmt: skip
QUANTISED = ("visual.proj.weight", "visual.head.weight", "text.head.weight")  # in the int8 run
ADAPTED = (
    Rows("visual.proj.weight", 0, 8),
    Rows("visual.proj.weight", 8, 16),
    Rows("visual.head.weight", 0, 8),
    Rows("text.head.weight", 0, 8),
)


def make_run(run: Path, precision: str = "fp32", factors: str = "float32", *, clients: bool = False) -> Path:
    """Write RUN/tasks and RUN/releases as the pipeline does; for `clients` with what they do before the towers."""
    rng = np.random.default_rng(7)
    dtype = np.float16 if precision == "fp16" else np.float32
    base = {name: (rng.standard_normal(shape) * 0.3).astype(dtype) for name, (shape, _, _) in SHAPES.items()}
    base["visual.head.weight"][0, 0] = ORDER_WEIGHT
    golden: dict[str, np.ndarray] = {
        "pixel_values": rng.standard_normal((6, 3, 8, 8)).astype(np.float32),
        "input_ids": rng.integers(0, 32, (4, 5)),
    }
    if clients:
        golden |= client_samples(golden["pixel_values"])
    updates: list[tuple[str, str, ExpertUpdate]] = []
    write_release(run / "releases" / "00-base", base, base, golden, updates, precision)
    for number, task in enumerate(TASKS, 1):
        folder = run / "tasks" / f"{number:02d}-{task}"
        folder.mkdir(parents=True)
        update = random_update(rng, number + 1, factors, ORDER_PRODUCTS[number - 1] if number < 3 else (0.0, 0.0))
        update.write(folder / "factors.safetensors")
        updates.append((task, sha256_file(folder / "factors.safetensors"), update))
        start = {name: dequantize(*quantize(base[name])) for name in QUANTISED} if precision == "int8" else {}
        merged = base | ExpertUpdate.stack(update for _, _, update in updates).apply(base | start)
        write_release(run / "releases" / f"{number:02d}-{task}", base, merged, golden, updates, precision)
    return run


def random_update(rng: np.random.Generator, experts: int, dtype: str, corner: tuple[float, float]) -> ExpertUpdate:
    """Experts for every adapted linear; row 0 of visual.head.weight gets nothing but the product `corner` in its first element."""
    pairs = {}
    for rows in ADAPTED:
        shape = SHAPES[rows.parameter][0]
        lora_A, lora_B = (
            rng.standard_normal((experts, shape[1])),
            rng.standard_normal((rows.stop - rows.start, experts)) * 0.05,
        )
        if rows.parameter == "visual.head.weight":
            lora_B[0], lora_B[0, 0], lora_A[0] = 0, corner[0], 0
            lora_A[0, 0] = corner[1]
        pairs[rows] = Factors.pack(lora_A, lora_B, 1.0, dtype)
    return ExpertUpdate(pairs)


def write_release(
    folder: Path,
    base: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    golden: dict[str, np.ndarray],
    updates: Sequence[tuple[str, str, ExpertUpdate]],
    precision: str,
) -> None:
    (folder / "classes").mkdir(parents=True)
    tensors: dict[str, dict[str, Any]] = {}
    for file in ("visual.safetensors", "textual.safetensors"):
        stored: dict[str, np.ndarray] = {}
        for name in (name for name in SHAPES if SHAPES[name][1] == file):
            if precision == "int8" and name in QUANTISED:
                q, scale = quantize(weights[name])
                stored |= {f"{name}.scale": scale, name: _stored(q, SHAPES[name][2])}
            else:
                stored[name] = _stored(weights[name], SHAPES[name][2])
        stored = dict(sorted(stored.items(), key=lambda item: -item[1].itemsize))
        write_tensors(folder / file, stored)
        for spec in read_layout(folder / file).specs:
            tensors[spec.name] = {
                "file": file,
                "offset": spec.offset,
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "transposed": spec.name in SHAPES and SHAPES[spec.name][2],
                "sha256": hashlib.sha256(stored[spec.name].tobytes()).hexdigest(),
            }
            if f"{spec.name}.scale" in stored:
                tensors[spec.name]["scale"] = f"{spec.name}.scale"
    for name, model in _graphs(folder, precision).items():
        onnx.save(model, folder / name)
    write_tensors(
        folder / "golden.safetensors",
        golden | {"image_embeds": np.zeros((6, 8), "f4"), "text_embeds": np.zeros((4, 8), "f4")},
    )
    answers = expected(folder)
    write_tensors(folder / "golden.safetensors", golden | answers)
    for task, _, _ in updates:
        write_json(folder / "classes" / f"{task}.json", {"classes": ["one", "two", "three"]})
    write_classes(folder)
    if "prompts" in golden:
        write_client_files(folder)
    else:
        write_json(folder / "preprocess.json", {"size": 8})
    base_digest = hashlib.sha256(b"".join(base[name].tobytes() for name in SHAPES)).hexdigest()
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": "r1export.release/1",
        "name": folder.name,
        "sequence": len(updates),
        "procedure": "r1-f64-v1",
        "precision": precision,
        "base": {"name": "tiny", "sha256": base_digest},
        "updates": [{"task": task, "sha256": digest} for task, digest, _ in updates],
        "files": {
            path: {"sha256": sha256_file(folder / path), "bytes": (folder / path).stat().st_size} for path in paths
        },
        "tensors": tensors,
        "golden": {"max_abs": 5e-5, "min_cosine": 0.999999},
        "tasks": [{"name": task, "classes": 3, "learned": True, "accuracy": 0.5} for task, _, _ in updates],
    }
    write_json(folder / "manifest.json", manifest)
    (folder / "README.md").write_text("a model card\n")


def client_samples(pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """Golden samples with three pictures and with prompts."""
    config = TypeAdapter(PreprocessConfig).validate_json(json.dumps(CONFIG))
    rng = np.random.default_rng(8)
    pictures = [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in ((8, 8), (31, 20), (9, 40))]
    ids = np.array([encoding.ids for encoding in tokenizer().encode_batch(list(PROMPTS))], np.int64)
    return {
        "pixel_values": np.concatenate([[config.apply(picture) for picture in pictures], pixel_values[3:]]),
        "input_ids": ids,
        "prompts": np.frombuffer(json.dumps(PROMPTS, ensure_ascii=False).encode(), np.uint8),
        **{f"picture_{i}": picture for i, picture in enumerate(pictures)},
    }


def write_client_files(folder: Path) -> None:
    """preprocess.json, preprocess.onnx and tokenizer/tokenizer.json."""
    write_json(folder / "preprocess.json", CONFIG)
    write_preprocess(CONFIG, folder / "preprocess.onnx", opset=19)
    (folder / "tokenizer").mkdir()
    tokenizer().save(str(folder / "tokenizer/tokenizer.json"))


def tokenizer() -> Tokenizer:
    """Words to ids below 32, always five."""
    words = ("[UNK]", "[PAD]", "a", "photo", "of", "one", "two", "three", "größe")
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.enable_padding(pad_id=1, length=5)
    made.enable_truncation(5)
    return made


def write_classes(folder: Path) -> None:
    """Class embeddings from the text tower, for each list of classes that is there."""
    for path in (folder / "classes").glob("*.json"):
        embeds = read_tensors(folder / "golden.safetensors")["text_embeds"][:3] + np.float32(len(path.stem))
        write_tensors(path.with_suffix(".safetensors"), {"class_embeds": embeds})


def refresh(folder: Path) -> None:
    """What follows from a release's weights, computed anew."""
    golden = read_tensors(folder / "golden.safetensors")
    write_tensors(folder / "golden.safetensors", golden | expected(folder))
    write_classes(folder)


def expected(folder: Path) -> dict[str, np.ndarray]:
    """What onnxruntime answers to the golden inputs."""
    golden = read_tensors(folder / "golden.safetensors")
    answers = {}
    for graph, given, answer in (
        ("visual.onnx", "pixel_values", "image_embeds"),
        ("textual.onnx", "input_ids", "text_embeds"),
    ):
        session = ort.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])
        (answers[answer],) = session.run([answer], {given: golden[given]})
    return answers


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a release's manifest lists, and of the manifest."""
    skipped = {"README.md", "report.json", "update.r1u"}
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped
    }


def _stored(weight: np.ndarray, transposed: bool) -> np.ndarray:
    return np.ascontiguousarray(weight.T if transposed else weight)


def _graphs(folder: Path, precision: str) -> dict[str, onnx.ModelProto]:
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 8, 8])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["m", 5])
    classes = helper.make_tensor_value_info("class_embeds", TensorProto.FLOAT, ["c", 8])
    image, text, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in ("image_embeds", "text_embeds", "logits")
    )
    node = helper.make_node
    visual = [
        *(_as_float(name, precision) for name in SHAPES if name.startswith("visual")),
        node("Flatten", ["pixel_values"], ["x"]),
        node("MatMul", ["x", "visual.proj.weight.f"], ["y"]),
        node("Add", ["y", "visual.proj.bias.f"], ["z"]),
        node("Relu", ["z"], ["h"]),
        node("Gemm", ["h", "visual.head.weight.f"], ["e"], transB=1),
        node("LpNormalization", ["e"], ["image_embeds"], axis=-1, p=2),
    ]
    textual = [
        *(_as_float(name, precision) for name in SHAPES if not name.startswith("visual")),
        node("Gather", ["token_embedding.weight.f", "input_ids"], ["x"]),
        node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0),
        node("MatMul", ["y", "text.head.weight.f"], ["e"]),
        node("LpNormalization", ["e"], ["text_embeds"], axis=-1, p=2),
    ]
    classify = [
        *visual,
        node("Transpose", ["class_embeds"], ["t"], perm=[1, 0]),
        node("MatMul", ["image_embeds", "t"], ["logits"]),
    ]
    return {
        "visual.onnx": _model(folder, visual, [pixels], image, "visual.safetensors"),
        "textual.onnx": _model(folder, textual, [ids], text, "textual.safetensors"),
        "classify.onnx": _model(folder, classify, [pixels, classes], logits, "visual.safetensors"),
    }


def _as_float(name: str, precision: str) -> onnx.NodeProto:
    if precision == "int8" and name in QUANTISED:
        return helper.make_node("DequantizeLinear", [name, f"{name}.scale"], [f"{name}.f"], axis=int(SHAPES[name][2]))
    return helper.make_node("Cast", [name], [f"{name}.f"], to=TensorProto.FLOAT)


def _model(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    output: onnx.ValueInfoProto,
    weights: str,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, [output])
    for spec in read_layout(folder / weights).specs:
        kind = {"<f2": TensorProto.FLOAT16, "|i1": TensorProto.INT8}.get(spec.dtype.str, TensorProto.FLOAT)
        tensor = onnx.TensorProto(name=spec.name, data_type=kind, dims=spec.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", weights), ("offset", spec.offset), ("length", spec.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        graph.initializer.append(tensor)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
