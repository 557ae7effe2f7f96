"""K3: bytes that decide a client's answer, or that people read: preprocessing, tokenizer, classes, weights, graphs, texts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from faults.planting import (
    INSIDE_RUN,
    TASKS,
    Document,
    Fault,
    Plant,
    Site,
    alone,
    class_files,
    copy_from_base,
    edit_json,
    in_golden,
    in_graph,
    in_json,
    in_manifest,
    in_run_json,
    in_tensors,
    in_text,
    in_weight,
    only_run,
    together,
)  # fmt: skip

LAST = TASKS[-1]
EMBEDS, NAMES = class_files(LAST)
TOKENIZER, VOCAB, MERGES, CONFIG = (f"tokenizer/{name}" for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"))  # fmt: skip
C_FC = "visual.transformer.resblocks.1.mlp.c_fc.weight"
OUT_PROJ = "visual.transformer.resblocks.1.attn.out_proj.weight"
IN_PROJ = "visual.transformer.resblocks.1.attn.in_proj_weight"
BIAS = "visual.transformer.resblocks.1.mlp.c_proj.bias"
TEXT = "textual.safetensors"
SMALL_ERROR = "a weight error below what the golden samples notice (their sensitivity is in the report)"
NO_PROMPT = "no golden prompt and no class name uses the entry"
OTHER_BASE = "a release that names another base is a release of that base, which is not there to compare with"
UNUSED_A, UNUSED_B = "jekyll</w>", "probiotics</w>"


def _graph_bytes(data: bytes) -> Plant:
    return lambda site: (site.release / "preprocess.onnx").write_bytes(data)


def _other_mean(site: Site) -> None:
    path = site.release / "preprocess.onnx"
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "Constant" and n.output[0] == "mean_row")
    node.attribute[0].floats[:] = [0.5, 0.5, 0.5]
    path.write_bytes(model.SerializeToString(deterministic=True))


def _exchange(first: str, second: str) -> Callable[[dict[str, int]], None]:
    def change(vocab: dict[str, int]) -> None:
        vocab[first], vocab[second] = vocab[second], vocab[first]

    return change


def _in_model(change: Callable[[Any], object]) -> Plant:
    return in_json(TOKENIZER, lambda t: change(t["model"]))


def _exchange_merges(first: int, second: int) -> Callable[[list[Any]], None]:
    def change(merges: list[Any]) -> None:
        merges[first], merges[second] = merges[second], merges[first]

    return change


def _exchange_lines(first: int, second: int) -> Callable[[str], str]:
    def change(text: str) -> str:
        lines = text.split("\n")
        lines[first], lines[second] = lines[second], lines[first]
        return "\n".join(lines)

    return change


def _relabelled(site: Site) -> None:
    """The last two merges with their vocabulary entries, exchanged in all files alike, and nothing uses them."""
    _in_model(lambda m: _exchange_merges(-1, -2)(m["merges"]))(site)
    in_text(MERGES, _exchange_lines(-2, -3))(site)
    for plant in (_in_model(lambda m: _exchange(UNUSED_A, "rendous</w>")(m["vocab"])), in_json(VOCAB, _exchange(UNUSED_A, "rendous</w>"))):  # fmt: skip
        plant(site)


def _rows(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    return in_tensors(EMBEDS, lambda t: t.update(class_embeds=change(t["class_embeds"]).astype(np.float32)))


def _row(index: int, value: float) -> Plant:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[index] = value
        return rows

    return _rows(change)


def _one_value(position: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[position] = value
        return weight

    return change


def _without_update(site: Site) -> None:
    """The weights of the release before: the last task was never merged."""
    shutil.copyfile(site.run / "releases" / "01-digits" / "visual.safetensors", site.release / "visual.safetensors")


def _epsilon(value: float) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "LayerNormalization":
                next(a for a in node.attribute if a.name == "epsilon").f = value

    return change


def _extra_node(graph: onnx.GraphProto) -> None:
    name = graph.output[0].name
    graph.node[-1].output[0] = "before"
    graph.node.append(helper.make_node("Identity", ["before"], [name], name="extra"))


def _one_batch(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _without_exponential(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if node.op_type == "Exp").op_type = "Identity"


def _without_mask(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        values = None if tensor.external_data else numpy_helper.to_array(tensor)
        if values is not None and values.dtype.kind == "f" and np.isinf(values).any():
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))


def _accuracies(value: float, *, in_run: bool) -> Plant:
    """All accuracies of the release, and in the run's metrics.json with a summary that follows from them."""

    def claimed(document: Document) -> None:
        for task in document["tasks"]:
            task["accuracy"] = value

    def metrics(document: Document) -> None:
        document["accuracy"][-1] = [value, value]
        first = document["accuracy"][0]
        document |= {"last": value, "avg": float(np.mean(document["accuracy"])), "forgetting": [max(0.0, first[0] - value), 0.0]}  # fmt: skip

    def plant(site: Site) -> None:
        in_manifest(claimed)(site)
        if in_run:
            edit_json(site.run / "metrics.json", metrics)

    return plant


def _linked(name: str, folder: bool = False) -> Plant:
    """A link to the same bytes in the base, in the place of a file or folder."""

    def plant(site: Site) -> None:
        here = site.release / name
        kept = here.with_name(f".{here.name}")
        here.rename(kept)
        target = site.run / f"kept-{here.name}"
        shutil.move(kept, target)
        os.symlink(target, here, target_is_directory=folder)

    return plant


def _add(name: str, text: str) -> Plant:
    def plant(site: Site) -> None:
        (site.release / name).parent.mkdir(exist_ok=True)
        (site.release / name).write_text(text)

    return plant


def _preprocess(**fields: object) -> Plant:
    return in_json("preprocess.json", lambda p: p.update(fields))


def _classes(change: Callable[[Document], object]) -> Plant:
    return in_json(NAMES, change)


def _learned(value: bool) -> Plant:
    return together(
        _classes(lambda c: c.update(learned=value)), in_manifest(lambda m: m["tasks"][-1].update(learned=value))
    )


def _base(**fields: object) -> Plant:
    return in_manifest(lambda m: m["base"].update(fields))


PREPROCESSING = (
    Fault("K3", "preprocess.json: mean 0", _preprocess(mean=[0.0, 0.0, 0.0])),
    Fault("K3", "preprocess.json: std 1", _preprocess(std=[1.0, 1.0, 1.0])),
    Fault("K3", "preprocess.json: std 0", _preprocess(std=[0.0, 0.0, 0.0])),
    Fault("K3", "preprocess.json: mean off by 1e-4", _preprocess(mean=[0.48155466, 0.4578275, 0.40821073])),
    Fault("K3", "preprocess.json: size 31", _preprocess(size=[31, 31])),
    Fault("K3", "preprocess.json: size 0", _preprocess(size=[0, 0])),
    Fault("K3", "preprocess.json: size negative", _preprocess(size=[-32, -32])),
    Fault("K3", "preprocess.json: size 2^31", _preprocess(size=[2**31, 2**31])),
    Fault("K3", "preprocess.json: bilinear", _preprocess(interpolation="bilinear")),
    Fault("K3", "preprocess.json: random for bicubic", _preprocess(interpolation="random"),
          only_run("clients do the same for both names")),
    Fault("K3", "preprocess.json: squash", _preprocess(resize_mode="squash")),
    Fault("K3", "preprocess.json: longest", _preprocess(resize_mode="longest")),
    Fault("K3", "preprocess.json: layout NHWC", _preprocess(layout="NHWC")),
    Fault("K3", "preprocess.json: mode L", _preprocess(mode="L")),
    Fault("K3", "preprocess.json: scale 1", _preprocess(scale=1.0)),
    Fault("K3", "preprocess.json: fill_color 255", _preprocess(fill_color=255),
          only_run("the colour of a border that no picture has: each is cropped")),
    Fault("K3", "preprocess.json: a member more", _preprocess(gamma=2.2)),
    Fault("K3", "preprocess.json: garbage", _add("preprocess.json", "garbage")),
    Fault("K3", "preprocess.onnx: garbage", _graph_bytes(b"garbage")),
    Fault("K3", "preprocess.onnx: empty", _graph_bytes(b"")),
    Fault("K3", "preprocess.onnx: another mean", _other_mean),
    Fault("K3", "preprocess.onnx is visual.onnx", lambda s: shutil.copyfile(s.release / "visual.onnx", s.release / "preprocess.onnx")),
)  # fmt: skip
TOKENIZERS = (
    Fault("K3", "vocabulary: two entries exchanged in vocab.json", in_json(VOCAB, _exchange(UNUSED_A, UNUSED_B))),
    Fault("K3", "vocabulary: two entries exchanged in tokenizer.json", _in_model(lambda m: _exchange(UNUSED_A, UNUSED_B)(m["vocab"]))),
    Fault("K3", "vocabulary: two entries exchanged in all files", together(
        _in_model(lambda m: _exchange(UNUSED_A, UNUSED_B)(m["vocab"])), in_json(VOCAB, _exchange(UNUSED_A, UNUSED_B))
    )),
    Fault("K3", "vocabulary: two bytes exchanged in all files", together(
        _in_model(lambda m: _exchange("ł", "Ń")(m["vocab"])), in_json(VOCAB, _exchange("ł", "Ń"))
    )),
    Fault("K3", "merges: two lines exchanged in merges.txt", in_text(MERGES, _exchange_lines(-2, -3))),
    Fault("K3", "merges: two exchanged in all files", together(
        _in_model(lambda m: _exchange_merges(-1, -2)(m["merges"])), in_text(MERGES, _exchange_lines(-2, -3))
    )),
    Fault("K3", "merges and vocabulary relabelled in all files", _relabelled, only_run(NO_PROMPT)),
    Fault("K3", "tokenizer.json: pad id 1", in_json(TOKENIZER, lambda t: t["padding"].update(pad_id=1))),
    Fault("K3", "tokenizer.json: length 8", in_json(TOKENIZER, lambda t: (
        t["truncation"].update(max_length=8), t["padding"].update(strategy={"Fixed": 8})
    ))),
    Fault("K3", "tokenizer.json: not in lower case", in_json(TOKENIZER, lambda t: t["normalizer"]["normalizers"].remove({"type": "Lowercase"}))),
    Fault("K3", "tokenizer.json: no truncation", in_json(TOKENIZER, lambda t: t.update(truncation=None))),
    Fault("K3", "tokenizer.json: garbage", _add(TOKENIZER, "garbage")),
    Fault("K3", "tokenizer_config.json: length 77", in_json(CONFIG, lambda c: c.update(model_max_length=77))),
    Fault("K3", "tokenizer_config.json: pad id 49407", in_json(CONFIG, lambda c: c.update(pad_token_id=49407))),
    Fault("K3", "tokenizer_config.json: bos and eos exchanged", in_json(CONFIG, lambda c: c.update(
        bos_token=c["eos_token"], eos_token=c["bos_token"]
    ))),
    Fault("K3", "tokenizer_config.json: garbage", _add(CONFIG, "garbage")),
)  # fmt: skip
CLASSES = (
    Fault("K3", "class names rotated", _classes(lambda c: c.update(classes=c["classes"][1:] + c["classes"][:1]))),
    Fault("K3", "two class names exchanged", _classes(lambda c: c["classes"].insert(0, c["classes"].pop(1)))),
    Fault("K3", "a class name with a confusable letter", _classes(lambda c: c["classes"].__setitem__(2, "uр"))),
    Fault("K3", "a class name in capitals", _classes(lambda c: c["classes"].__setitem__(2, c["classes"][2].upper())),
          only_run("the tokenizer gives both spellings the same ids")),
    Fault("K3", "an empty class name", _classes(lambda c: c["classes"].__setitem__(2, ""))),
    Fault("K3", "names of another task", lambda s: shutil.copyfile(s.release / class_files(TASKS[0])[1], s.release / NAMES)),
    Fault("K3", "templates changed", _classes(lambda c: c.update(templates=["a photo of {}."]))),
    Fault("K3", "a template without a place for the name", _classes(lambda c: c.update(templates=["an arrow."]))),
    Fault("K3", "learned flag taken back in classes/*.json", _classes(lambda c: c.update(learned=False))),
    Fault("K3", "learned flag taken back everywhere", _learned(False)),
    Fault("K3", "class row zero", _row(5, 0.0)),
    Fault("K3", "class row NaN", _row(5, np.nan)),
    Fault("K3", "class rows scaled by 1.01", _rows(lambda rows: rows * np.float32(1.01))),
    Fault("K3", "two class rows exchanged", _rows(lambda rows: rows[[1, 0, *range(2, len(rows))]])),
    Fault("K3", "class embeddings of the base", copy_from_base(EMBEDS)),
    Fault("K3", "class embeddings in float64", in_tensors(EMBEDS, lambda t: t.update(class_embeds=t["class_embeds"].astype(np.float64)))),
    Fault("K3", "a second tensor next to the class embeddings", in_tensors(EMBEDS, lambda t: t.update(other=np.ones(3, np.float32)))),
    Fault("K3", "a tensor more in golden.safetensors", in_golden(lambda t: t.update(other=np.ones(3, np.float32)))),
)  # fmt: skip
WEIGHTS = (
    Fault("K3", "NaN in a token embedding that no prompt uses", in_weight("token_embedding.weight", _one_value((40000, 3), np.nan), TEXT)),
    Fault("K3", "a token embedding that no prompt uses zeroed", in_weight("token_embedding.weight", _one_value((40000,), 0), TEXT), only_run(NO_PROMPT)),
    Fault("K3", "Inf in a weight", in_weight(C_FC, _one_value((3, 5), np.inf))),
    Fault("K3", "c_fc x 1.0001", in_weight(C_FC, lambda w: w * np.float32(1.0001)), only_run(SMALL_ERROR)),
    Fault("K3", "c_fc x 1.01", in_weight(C_FC, lambda w: w * np.float32(1.01))),
    Fault("K3", "one value of out_proj off by 0.01", in_weight(OUT_PROJ, lambda w: _one_value((3, 5), w[3, 5] + 0.01)(w))),
    Fault("K3", "one value of c_fc off by 1e-7", in_weight(C_FC, lambda w: _one_value((3, 5), w[3, 5] + 1e-7)(w)), only_run(SMALL_ERROR)),
    Fault("K3", "a bias zeroed", in_weight(BIAS, np.zeros_like)),
    Fault("K3", "q and k exchanged", in_weight(IN_PROJ, lambda w: np.concatenate([np.split(w, 3)[i] for i in (1, 0, 2)]))),
    Fault("K3", "the last task never merged", _without_update),
    Fault("K3", "weights of the base", copy_from_base("visual.safetensors")),
    Fault("K3", "logit_scale off by 0.1", in_weight("logit_scale", lambda w: w + np.float32(0.1)),
          only_run("the scale is a parameter as any other, and no golden output has it")),
)  # fmt: skip
GRAPHS = (
    Fault("K3", "epsilon 1e-6 in every release and the export", in_graph("visual.onnx", _epsilon(1e-6)), only_run(SMALL_ERROR)),
    Fault("K3", "epsilon 1e-6 in the last release", in_graph("visual.onnx", _epsilon(1e-6), every=False), alone(SMALL_ERROR)),
    Fault("K3", "epsilon 1e-2", in_graph("visual.onnx", _epsilon(1e-2))),
    Fault("K3", "a node more", in_graph("visual.onnx", _extra_node, every=False), alone("a node that changes nothing changes no answer")),
    Fault("K3", "batch baked to one", in_graph("visual.onnx", _one_batch)),
    Fault("K3", "classify.onnx without the exponential of its scale", in_graph("classify.onnx", _without_exponential)),
    Fault("K3", "text tower without its causal mask", in_graph("textual.onnx", _without_mask)),
    Fault("K3", "visual.onnx: garbage", _add("visual.onnx", "garbage")),
    Fault("K3", "visual.onnx: empty", _add("visual.onnx", "")),
    Fault("K3", "classify.onnx is visual.onnx", lambda s: shutil.copyfile(s.release / "visual.onnx", s.release / "classify.onnx")),
)  # fmt: skip
TEXTS = (
    Fault("K3", "base digest zeroed", _base(sha256="0" * 64), alone(OTHER_BASE)),
    Fault("K3", "base under another name", _base(name="ViT-B-32"), alone(OTHER_BASE)),
    Fault("K3", "another licence of the base", _base(licence="MIT"), alone(OTHER_BASE)),
    Fault("K3", "no licence of the base", _base(licence=None), alone(OTHER_BASE)),
    Fault("K3", "an update with another digest", in_manifest(lambda m: m["updates"][0].update(sha256="0" * 64)),
          only_run("only the run has the factors of its updates")),
    Fault("K3", "two updates exchanged", in_manifest(lambda m: m["updates"].reverse()),
          only_run("in which order updates were merged cannot be seen in their sum")),
    Fault("K3", "accuracies 0.999 in the manifest", _accuracies(0.999, in_run=False), only_run("a release has no test images")),
    Fault("K3", "accuracies 0.999 in the manifest and metrics.json", _accuracies(0.999, in_run=True), only_run("a release has no test images")),
    Fault("K3", "accuracies null", in_manifest(lambda m: [t.update(accuracy=None) for t in m["tasks"]]), only_run("a release has no test images")),
    Fault("K3", "metrics.json: last 0.999", in_run_json("metrics.json", lambda m: m.update(last=0.999)), INSIDE_RUN),
    Fault("K3", "metrics.json: zero_shot_avg 0.999", in_run_json("metrics.json", lambda m: m.update(zero_shot_avg=0.999)), INSIDE_RUN),
    Fault("K3", "metrics.json: forgetting negative", in_run_json("metrics.json", lambda m: m.update(forgetting=[-0.5, 0.0])), INSIDE_RUN),
    Fault("K3", "metrics.json: accuracies after the first task 0.999", in_run_json(
        "metrics.json", lambda m: m["accuracy"].__setitem__(0, [0.999, 0.999])
    ), INSIDE_RUN),
    Fault("K3", "README.md with other code", in_text("README.md", lambda t: t.replace("import json", "import os, json")), sealed=False),
    Fault("K3", "README.md with other accuracies", in_text("README.md", lambda t: re.sub(r"\d+\.\d %", "99.9 %", t)), sealed=False),
    Fault("K3", "manifest: another name", in_manifest(lambda m: m.update(name="07-other"))),
    Fault("K3", "manifest: sequence 9", in_manifest(lambda m: m.update(sequence=9))),
    Fault("K3", "manifest: another procedure", in_manifest(lambda m: m.update(procedure="r1-f32-v9"))),
    Fault("K3", "manifest edited without its digest", in_text("manifest.json", lambda t: t.replace('"arrows"', '"arrow"')), sealed=False),
    Fault("K3", "a link in the place of a file", _linked("visual.safetensors")),
    Fault("K3", "a link in the place of a folder", _linked("classes", folder=True)),
    Fault("K3", "a file more", _add("run.sh", "echo"), sealed=False),
    Fault("K3", "a file more in classes", _add("classes/other.json", "{}"), sealed=False),
    Fault("K3", "an empty file", _add("golden.safetensors", "")),
)  # fmt: skip
FAULTS = (*PREPROCESSING, *TOKENIZERS, *CLASSES, *WEIGHTS, *GRAPHS, *TEXTS)
