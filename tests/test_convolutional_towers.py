"""Towers of convolutions go the whole way: trained, merged, exported in every precision, verified, shipped, and faults found."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from running import context_of, r1export, reseal, trained_run
from safetensors.torch import save_file

from r1export.export.precision import version_tensors
from r1export.export.weight_map import WeightMap
from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.verify.unmerged_graph import add_branches

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
RECIPE = """
[base]
weights = "{0}/tiny.safetensors"
config = "{0}/tiny.json"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
interpolation = "bicubic"
resize_mode = "shortest"
[pool]
rank = 4
k_train = 4
k_merge = 2
alpha = 4.0
towers = ["visual"]
[export]
variants = ["int8"]
[[tasks]]
name = "digits"
source = "builtin:digits"
"""


@dataclass(frozen=True)
class Family:
    """A timm tower, the size of its images, its adapted layers, and one of its depthwise convolutions.

    `spread` is whether its random embeddings are far enough apart for a device to rank them in int8.
    """

    trunk: str
    size: int
    layers: int
    depthwise: str
    spread: bool


FAMILIES = (
    Family("test_efficientnet", 32, 6, "visual.trunk.blocks.3.0.conv_dw.weight", spread=True),
    Family("fastvit_t8", 64, 20, "visual.trunk.stages.1.blocks.0.mlp.conv.conv.weight", spread=False),
)


def write_model(folder: Path, family: Family) -> None:
    """Random weights and statistics, as open_clip would save them, with layer scales that let something through."""
    import open_clip

    vision = {"timm_model_name": family.trunk, "timm_pool": "avg", "timm_proj": "linear", "image_size": family.size}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
    (folder / "tiny.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)
    save_file(model.state_dict(), folder / "tiny.safetensors")


@dataclass(frozen=True)
class Run:
    """A verified run, and what was said about it."""

    family: Family
    path: Path
    report: dict[str, Any]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.trunk)
def run(request, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp(request.param.trunk)
    write_model(folder, request.param)
    path = trained_run(folder, RECIPE.format(folder), "train.iterations=2", "data.test_limit=12")
    done = r1export("verify", "--no-latency", "--json", path)
    assert done.returncode == 0, done.output
    return Run(request.param, path, json.loads(done.stdout))


def test_every_precision_is_verified_and_the_unmerged_control_is_caught(run: Run) -> None:
    releases = run.report["releases"]
    assert [release["verdict"] for release in releases] == ["pass"] * 4
    controls = [release["proof"]["control"]["verdict"] for release in releases]
    assert controls.count("pass") == 1  # fp32 after the task: a base has nothing unmerged


def test_the_graph_has_no_norm_to_fold_and_the_run_says_so(run: Run) -> None:
    graph = onnx.load(run.path / "graphs/visual.onnx", load_external_data=False).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    base, released = (
        json.loads((run.path / file).read_text())["base"] for file in ("run.json", "releases/01-digits/manifest.json")
    )
    assert base == released
    assert base["deployed_form"] == 1
    assert base["original_sha256"] != base["sha256"]
    assert 0 < base["deployed_difference"] < 5e-5


def test_the_convolutions_of_its_blocks_are_adapted(run: Run) -> None:
    tensors = read_tensors(run.path / "tasks/01-digits/factors.safetensors")
    assert len(tensors) == 2 * run.family.layers
    assert all(name.startswith("visual.trunk.") and np.isfinite(value).all() for name, value in tensors.items())


def test_onnxruntime_runs_every_quantised_convolution_in_integers(run: Run, tmp_path: Path) -> None:
    release = run.path / "variants/int8/releases/01-digits"
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(release / "visual.onnx", options, providers=["CPUExecutionProvider"])
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)
    placed = WeightMap.read(run.path / "variants/int8/graphs/weight_map.json").files["visual.safetensors"]
    convolutions = sum(placement.dtype == "I8" and len(placement.shape) == 4 for placement in placed)
    assert ops["QLinearConv"] == convolutions >= run.family.layers
    assert ops["Conv"] + ops["FusedConv"] == 1


def embed(folder: Path, run: Run) -> np.ndarray:
    size = run.family.size
    pixels = np.random.default_rng(0).standard_normal((3, 3, size, size)).astype(np.float32)
    session = ort.InferenceSession(folder / "visual.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": pixels})[0]


def test_the_base_with_branches_gives_what_the_merged_model_gives(run: Run, tmp_path: Path) -> None:
    base, merged = run.path / "releases/00-base", run.path / "releases/01-digits"
    update = ExpertUpdate.read(run.path / "tasks/01-digits/factors.safetensors")
    shutil.copy(base / "visual.safetensors", tmp_path)
    add_branches(base / "visual.onnx", update, tmp_path / "visual.onnx")
    assert np.abs(embed(tmp_path, run) - embed(merged, run)).max() < 2e-6
    assert np.abs(embed(base, run) - embed(merged, run)).max() > 1e-5


def test_in_int8_a_channel_without_weights_keeps_its_bias(run: Run, tmp_path: Path) -> None:
    """Its weights give it a scale in which the bias has more than 32 bits: without a wider one it would be lost."""
    if not run.family.spread:
        pytest.skip("its embeddings differ by less than int8 can tell")
    folders = {form: tmp_path / form for form in ("fp32", "int8")}
    weights = {
        "fp32": WeightMap.read(run.path / "graphs/weight_map.json"),
        "int8": WeightMap.read(run.path / "variants/int8/graphs/weight_map.json"),
    }
    values = context_of(run.path).base | {}
    values[run.family.depthwise] = values[run.family.depthwise] * np.float32(1e-12)
    ranges = json.loads((run.path / "variants/int8/graphs/ranges.json").read_text())
    tensors = {"fp32": values, "int8": version_tensors(values, [], weights["int8"], ranges)}
    for form, folder in folders.items():
        folder.mkdir()
        shutil.copy(run.path / ("graphs" if form == "fp32" else "variants/int8/graphs") / "visual.onnx", folder)
        write_tensors(folder / "visual.safetensors", weights[form].stored("visual.safetensors", tensors[form]))
    one, other = (embed(folder, run) for folder in folders.values())
    assert (one * other).sum(1).min() > 0.9975  # 0.996 if it is lost


@pytest.mark.parametrize("variant", ["", "variants/int8"])
def test_a_device_that_takes_its_update_holds_the_released_bytes(run: Run, variant: str, tmp_path: Path) -> None:
    if variant and not run.family.spread:
        pytest.skip("its embeddings differ by less than int8 can tell")
    keys, update, store = tmp_path / "fleet", tmp_path / "1.r1u", tmp_path / "store"
    precision = ("--precision", "int8") if variant else ()
    for command in (
        ("keygen", keys),
        ("bundle", run.path, "--release", 1, "--since", 0, "--accept-inconclusive", "--key", f"{keys}.key", "-o", update, *precision),
        ("device", "init", store, "--base", run.path / variant / "releases/00-base", "--trust", f"{keys}.pub"),
        ("device", "apply", store, update),
    ):  # fmt: skip
        done = r1export(*command)
        assert done.returncode == 0, done.output
    released = run.path / variant / "releases/01-digits"
    for file in ("visual.safetensors", "textual.safetensors", "manifest.json", "golden.safetensors"):
        assert sha256_file(store / "current" / file) == sha256_file(released / file), file
    assert update.stat().st_size < 0.05 * (run.path / "releases/01-digits/visual.safetensors").stat().st_size


def test_exporting_it_again_gives_the_release(run: Run) -> None:
    done = r1export("export", "--audit-reexport", run.path)
    assert done.returncode == 0, done.output


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """The run in fp32 alone, to spoil."""
    path = tmp_path / "run"
    shutil.copytree(run.path, path, ignore=shutil.ignore_patterns("variants", "report.*"))
    recipe = (path / "recipe.toml").read_text()
    (path / "recipe.toml").write_text(re.sub(r"variants = \[[^]]*\]", "variants = []", recipe))
    return path


def test_a_convolution_that_was_merged_twice_is_named(run: Run, copy: Path) -> None:
    release = copy / "releases/01-digits"
    name = min(read_tensors(copy / "tasks/01-digits/factors.safetensors")).partition("[")[0]
    tensors = read_tensors(release / "visual.safetensors")
    delta = tensors[name] - read_tensors(copy / "releases/00-base/visual.safetensors")[name]
    write_tensors(release / "visual.safetensors", tensors | {name: tensors[name] + delta})
    reseal(release)
    said = found_by_verify(copy)
    assert name in said
    assert "the update of task digits is merged 2 times" in said


def test_a_weight_that_a_fresh_export_does_not_give_is_named(run: Run, copy: Path) -> None:
    release = copy / "releases/01-digits"
    tensors = read_tensors(release / "visual.safetensors")
    tensors[run.family.depthwise].flat[0] += 1
    write_tensors(release / "visual.safetensors", tensors)
    done = r1export("export", "--audit-reexport", copy)
    assert done.returncode == 1, done.output
    assert run.family.depthwise in done.output


def test_a_convolution_with_another_kernel_is_located(run: Run, copy: Path) -> None:
    """Its taps two apart, in all releases and in the graphs: as if it had been exported so."""
    for folder in (copy / "graphs", copy / "releases/00-base", copy / "releases/01-digits"):
        model = onnx.load(folder / "visual.onnx", load_external_data=False)
        dilate(next(node for node in model.graph.node if run.family.depthwise in node.input))
        (folder / "visual.onnx").write_bytes(model.SerializeToString(deterministic=True))
        if (folder / "manifest.json").exists():
            reseal(folder)
    said = found_by_verify(copy)
    assert "first diverging node: Conv" in said
    assert run.family.depthwise in said.partition("first diverging node: Conv")[2]


def dilate(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("dilations", "pads"):
            attribute.ints[:] = [2 * value for value in attribute.ints]


def found_by_verify(run: Path) -> str:
    """Verify, check that it is a failed check, and return what is said about it."""
    done = r1export("verify", "--no-latency", run)
    assert done.returncode == 1, done.output
    return " ".join(json.loads((run / "report.json").read_text())["reasons"])
