"""K1: a set that is missing, empty or only sampled, where a check would pass by looking at what is left."""

from __future__ import annotations

import json
import shutil

import numpy as np

from faults.planting import (
    ALONE,
    INSIDE_RUN,
    TASKS,
    Document,
    Fault,
    Plant,
    Site,
    class_files,
    edit_json,
    in_golden,
    in_json,
    in_manifest,
    in_tensors,
    only_run,
    together,
    unlink,
)  # fmt: skip

FIRST, LAST = TASKS[0], TASKS[-1]
EMBEDS, NAMES = class_files(LAST)
C_FC = "visual.transformer.resblocks.1.mlp.c_fc.weight"
IN_PROJ = "visual.transformer.resblocks.1.attn.in_proj_weight"


def _delete_factors(*tasks: str) -> Plant:
    def plant(site: Site) -> None:
        for task in tasks:
            next((site.run / "tasks").glob(f"*-{task}/factors.safetensors")).unlink()

    return plant


def _drop_task(document: Document) -> None:
    document["tasks"] = [task for task in document["tasks"] if task["name"] != LAST]


def _drop_files(*names: str) -> Plant:
    def change(document: Document) -> None:
        for name in names:
            document["files"].pop(name, None)

    return in_manifest(change)


def _keep(count: int, *names: str) -> Plant:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in names or [name for name in tensors if not name.startswith(("picture", "prompts"))]:
            tensors[name] = tensors[name][:count]

    return in_golden(change)


def _keep_prompts(count: int) -> Plant:
    def change(tensors: dict[str, np.ndarray]) -> None:
        kept = json.loads(tensors["prompts"].tobytes())[:count]
        tensors["prompts"] = np.frombuffer(json.dumps(kept, ensure_ascii=False).encode(), np.uint8)

    return in_golden(change)


def _same_sample(tensors: dict[str, np.ndarray]) -> None:
    """All samples are the first one, with its true answers."""
    for name in ("pixel_values", "image_embeds", "picture_1", "picture_2"):
        first = "picture_0" if name.startswith("picture") else name
        tensors[name] = tensors[first] if name.startswith("picture") else np.repeat(tensors[name][:1], 8, 0)


def _rename_last(site: Site) -> None:
    site.release.rename(site.run / "releases" / f"03-{LAST}")


def _copy_release(site: Site) -> None:
    shutil.copytree(site.release, site.run / "releases" / "03-more")


def _shorter_recipe(site: Site) -> None:
    """The recipe names the first task alone, and the accuracies are those of one task."""
    recipe = site.run / "recipe.toml"
    lines = recipe.read_text("utf-8").splitlines(keepends=True)
    recipe.write_text("".join(line for line in lines if f'name = "{LAST}"' not in line), encoding="utf-8")

    def one_task(metrics: Document) -> None:
        metrics |= {"tasks": metrics["tasks"][:1], "zero_shot": metrics["zero_shot"][:1], "forgetting": [0.0]}
        metrics["accuracy"] = [metrics["accuracy"][0][:1]]
        last = metrics["accuracy"][0][0]
        metrics |= {"transfer": None, "avg": last, "last": last, "zero_shot_avg": metrics["zero_shot"][0]}

    edit_json(site.run / "metrics.json", one_task)


def _unlist_folder(site: Site) -> None:
    folder = site.release / "classes" / "old"
    folder.mkdir()
    (folder / "digits.json").write_text("{}")


FAULTS = (
    Fault("K1", "factors of the last task deleted", _delete_factors(LAST), INSIDE_RUN),
    Fault("K1", "factors of the first task deleted", _delete_factors(FIRST), INSIDE_RUN),
    Fault("K1", "factors of all tasks deleted", _delete_factors(*TASKS), INSIDE_RUN),
    Fault("K1", "last task taken out of the recipe and of metrics.json", _shorter_recipe, INSIDE_RUN),
    Fault("K1", "last release folder deleted", lambda site: shutil.rmtree(site.base.parent / "01-digits"), INSIDE_RUN),
    Fault("K1", "last release folder under another number", _rename_last, INSIDE_RUN),
    Fault("K1", "a release folder more than there are tasks", _copy_release, INSIDE_RUN),
    Fault("K1", "manifest: graphs = {}", in_manifest(lambda m: m.update(graphs={}))),
    Fault("K1", "manifest: no digest of classify.onnx", in_manifest(lambda m: m["graphs"].pop("classify.onnx"))),
    Fault("K1", "manifest: visual.onnx not listed", _drop_files("visual.onnx")),
    Fault("K1", "manifest: golden.safetensors not listed", _drop_files("golden.safetensors")),
    Fault("K1", "manifest: files = {}", in_manifest(lambda m: m.update(files={}, tensors={}))),
    Fault("K1", "manifest: tensors = {}", in_manifest(lambda m: m.update(tensors={}))),
    Fault("K1", "manifest: one tensor not in the map", in_manifest(lambda m: m["tensors"].pop(C_FC))),
    Fault("K1", "manifest: no tensor of the text tower in the map", in_manifest(
        lambda m: m.update(tensors={n: e for n, e in m["tensors"].items() if e["file"] != "textual.safetensors"})
    )),
    Fault("K1", "a tensor taken out of the weights and of the map", in_tensors(
        "visual.safetensors", lambda t: t.pop(C_FC)
    )),
    Fault("K1", "manifest: rows of a matrix end too early", in_manifest(lambda m: m["tensors"][C_FC].update(rows=[[0, 511]]))),
    Fault("K1", "manifest: rows of a matrix overlap", in_manifest(
        lambda m: m["tensors"][IN_PROJ].update(rows=[[0, 128], [64, 256], [256, 384]])
    )),
    Fault("K1", "manifest: rows of q, k, v as one", in_manifest(lambda m: m["tensors"][IN_PROJ].update(rows=[[0, 384]])),
          only_run("which rows experts change is written in their factors")),
    Fault("K1", "manifest: a matrix without rows", in_manifest(lambda m: m["tensors"][C_FC].update(rows=[]))),
    Fault("K1", "manifest: a square matrix marked as transposed", in_manifest(
        lambda m: m["tensors"]["visual.transformer.resblocks.1.attn.out_proj.weight"].update(transposed=True)
    ), {ALONE: "a square matrix has the same shape both ways; the base's map or its weights tell them apart"}),
    Fault("K1", "golden samples cut to one", _keep(1)),
    Fault("K1", "golden samples cut to none", _keep(0)),
    Fault("K1", "golden images cut to four", _keep(4, "pixel_values", "image_embeds")),
    Fault("K1", "golden pictures removed", in_golden(lambda t: [t.pop(f"picture_{i}") for i in range(3)])),
    Fault("K1", "golden pictures cut to two", in_golden(lambda t: t.pop("picture_2"))),
    Fault("K1", "golden prompts removed", in_golden(lambda t: t.pop("prompts"))),
    Fault("K1", "golden prompts cut to two", _keep_prompts(2)),
    Fault("K1", "eight times the same golden picture", in_golden(_same_sample)),
    Fault("K1", "golden.safetensors without text_embeds", in_golden(lambda t: t.pop("text_embeds"))),
    Fault("K1", "class names cut by one, embeddings not", in_json(NAMES, lambda c: c["classes"].pop())),
    Fault("K1", "class embeddings cut by one, names not", in_tensors(EMBEDS, lambda t: t.update(class_embeds=t["class_embeds"][:-1]))),
    Fault("K1", "class names and embeddings cut by one", together(
        in_json(NAMES, lambda c: c["classes"].pop()),
        in_tensors(EMBEDS, lambda t: t.update(class_embeds=t["class_embeds"][:-1])),
    )),
    Fault("K1", "no class of a task left", together(
        in_json(NAMES, lambda c: c.update(classes=[])),
        in_tensors(EMBEDS, lambda t: t.update(class_embeds=t["class_embeds"][:0])),
        in_manifest(lambda m: m["tasks"][-1].update(classes=0)),
    )),
    Fault("K1", "templates = []", in_json(NAMES, lambda c: c.update(templates=[]))),
    Fault("K1", "files of a task deleted", unlink(EMBEDS, NAMES)),
    Fault("K1", "manifest: tasks = []", in_manifest(lambda m: m.update(tasks=[]))),
    Fault("K1", "manifest: last task taken out, its files not", in_manifest(_drop_task)),
    Fault("K1", "last task taken out with its files", together(in_manifest(_drop_task), unlink(EMBEDS, NAMES))),
    Fault("K1", "manifest: updates = []", in_manifest(lambda m: m.update(updates=[]))),
    Fault("K1", "manifest: first update taken out", in_manifest(lambda m: m["updates"].pop(0))),
    Fault("K1", "visual.onnx deleted", unlink("visual.onnx")),
    Fault("K1", "preprocess.onnx deleted", unlink("preprocess.onnx")),
    Fault("K1", "vocab.json and merges.txt deleted", unlink("tokenizer/vocab.json", "tokenizer/merges.txt"),
          only_run("a tokenizer from the model hub has other files than that of CLIP")),
    Fault("K1", "tokenizer.json deleted", unlink("tokenizer/tokenizer.json")),
    Fault("K1", "README.md deleted", unlink("README.md"),
          only_run("a version on a device has no model card, and nothing is read from it"), sealed=False),
    Fault("K1", "manifest: versions = {}", in_manifest(lambda m: m.update(versions={}))),
    Fault("K1", "a folder that no manifest lists", _unlist_folder),
)  # fmt: skip
