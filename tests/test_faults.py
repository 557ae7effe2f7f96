"""Planted faults: each is found by the real command line, named, and never taken for a crash.

Every fault is planted as a faulty pipeline would leave it: with the digests of the manifest, and the manifest's digest
of itself, made to fit. What remains to tell it is what was trained.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from running import QUICK, RECIPE, r1export, reseal, trained_run

from r1export.pipeline.verification.release import verify_release
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.release_layout import GRAPHS
from r1export.update.release_manifest import GoldenGate, ReleaseManifest


@pytest.fixture(scope="session")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one task, small in every way, that passes every check; time is not what is tested here."""
    run = trained_run(tmp_path_factory.mktemp("faults"), RECIPE)
    done = r1export("verify", "--no-latency", run)
    assert done.returncode == 0, done.output
    return run


@pytest.fixture
def run(verified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(verified, tmp_path / "run"))


def change_weights(release: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one parameter, seen as (out, in) whatever the way in which it is stored."""
    entry = json.loads((release / "manifest.json").read_text())["tensors"][name]
    tensors = read_tensors(release / entry["file"])
    changed = change(tensors[name].T if entry["transposed"] else tensors[name])
    tensors[name] = np.ascontiguousarray(changed.T if entry["transposed"] else changed).astype(tensors[name].dtype)
    write_tensors(release / entry["file"], tensors)
    reseal(release)


def change_graph(
    run: Path,
    name: str,
    change: Callable[[onnx.ModelProto], None],
    releases: tuple[str, ...] = ("00-base", "01-digits"),
) -> None:
    """Change one graph; in all releases, and in the graphs that were exported once, it is as if it had been exported so."""
    folders = [run / "releases" / release for release in releases] + ([run / "graphs"] if len(releases) == 2 else [])
    for folder in folders:
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
        if (folder / "manifest.json").exists():
            reseal(folder)


def found_by_verify(run: Path) -> str:
    """Verify, check that it is a failed check, and return what is said about it."""
    done = r1export("verify", "--no-latency", run)
    assert done.returncode == 1, done.output
    return " ".join(json.loads((run / "report.json").read_text())["reasons"])


def factors(run: Path) -> ExpertUpdate:
    return ExpertUpdate.read(run / "tasks" / "01-digits" / "factors.safetensors")


WEIGHTS = ("visual.safetensors", "textual.safetensors")
IN_PROJ = "visual.transformer.resblocks.1.attn.in_proj_weight"
OUT_PROJ = "visual.transformer.resblocks.1.attn.out_proj.weight"


def delta(run: Path, parameter: str, expert: int | None = None) -> np.ndarray:
    """What the update adds to a parameter, or one of its experts alone."""
    update = factors(run)
    total = np.zeros_like(
        ExpertUpdate(update.factors).apply({name: _zeros(update, name) for name in update.parameters})[parameter]
    )
    for rows, pair in update.factors.items():
        if rows.parameter == parameter:
            chosen = slice(None) if expert is None else slice(expert, expert + 1)
            total[rows.start : rows.stop] += pair.u[:, chosen] @ pair.v[chosen]
    return total


def _zeros(update: ExpertUpdate, parameter: str) -> np.ndarray:
    pairs = {rows: pair for rows, pair in update.factors.items() if rows.parameter == parameter}
    return np.zeros((max(rows.stop for rows in pairs), next(iter(pairs.values())).v.shape[1]), np.float32)


def test_one_weight_changed_by_a_hundredth_is_found(run: Path) -> None:
    def change(weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        weight[3, 5] += 1e-2
        return weight

    change_weights(run / "releases" / "01-digits", OUT_PROJ, change)
    said = found_by_verify(run)
    assert f"{OUT_PROJ} is not base + factors: one value differs by 0.01, at [3, 5]" in said


def test_an_expert_merged_twice_is_found_and_named(run: Path) -> None:
    layers = {
        rows.parameter: len(pair.v) for rows, pair in factors(run).factors.items() if "in_proj" not in rows.parameter
    }
    parameter, most = max(layers.items(), key=lambda layer: layer[1])
    last = most - 1
    change_weights(run / "releases" / "01-digits", parameter, lambda w: w + delta(run, parameter, last))
    assert re.search(rf"expert {last} of task digits in rows 0:\d+ is merged 2 times", found_by_verify(run))


def test_an_expert_that_training_packed_twice_is_found_by_the_merge_stage(run: Path) -> None:
    """The fault is in the factors themselves, so base + factors is wrong as well; only the trained pool knows better."""
    update = factors(run)
    doubled = {
        rows: type(pair)(np.concatenate([2 * pair.u[:, :1], pair.u[:, 1:]], 1), pair.v)
        for rows, pair in update.factors.items()
    }
    ExpertUpdate(doubled).write(run / "tasks" / "01-digits" / "factors.safetensors")
    shutil.rmtree(run / "releases")
    assert r1export("export", run).returncode == 0
    assert "Merge parity: failed." in found_by_verify(run)


def test_out_proj_merged_twice_is_found_and_named(run: Path) -> None:
    change_weights(run / "releases" / "01-digits", OUT_PROJ, lambda w: w + delta(run, OUT_PROJ))
    assert "the update of task digits is merged 2 times" in found_by_verify(run)


def test_q_and_k_in_the_wrong_order_are_found_and_named(run: Path) -> None:
    change_weights(
        run / "releases" / "01-digits", IN_PROJ, lambda w: np.concatenate([np.split(w, 3)[i] for i in (1, 0, 2)])
    )
    assert "its rows are in the order k, q, v instead of q, k, v" in found_by_verify(run)


def change_epsilons(run: Path, value: float) -> None:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "LayerNormalization":
                next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = value

    change_graph(run, "visual.onnx", change)


def test_an_epsilon_that_no_tolerance_would_notice_is_found_and_named(run: Path) -> None:
    change_epsilons(run, 1e-6)
    assert "epsilon of visual.ln_pre is 1e-06, expected 1e-05" in found_by_verify(run)


def test_another_epsilon_is_located_and_leaves_a_case_that_shows_it(run: Path) -> None:
    change_epsilons(run, 1e-2)
    said = found_by_verify(run)
    assert "Export parity: failed." in said
    assert "visual.onnx: first diverging node: LayerNormalization" in said
    case = run / "failures" / "01-digits" / "visual"
    assert len((case / "reproduce.py").read_text().splitlines()) == 3
    done = subprocess.run([sys.executable, "reproduce.py"], cwd=case, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("max abs difference"), done.stderr
    assert float(done.stdout.split()[-1]) > 1e-4


def test_a_text_tower_without_its_causal_mask_is_found(run: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        masks = [
            tensor
            for tensor in model.graph.initializer
            if tensor.data_type == 1 and not tensor.external_data and np.isinf(numpy_helper.to_array(tensor)).any()
        ]
        assert masks, "the exported text tower holds no mask"
        for mask in masks:
            mask.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(mask)), mask.name))

    change_graph(run, "textual.onnx", change)
    said = found_by_verify(run)
    assert "the textual tower differs by" in said
    assert "textual.onnx: first diverging node" in said


def classifier_node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    """The node that the classifier adds to the image tower; its names are those that export gives."""
    return next(node for node in model.graph.node if node.op_type == op and node.name in ("scale", "logits_mul"))


def test_a_classifier_without_the_exponential_of_its_scale_is_found(run: Path) -> None:
    change_graph(run, "classify.onnx", lambda model: setattr(classifier_node(model, "Exp"), "op_type", "Identity"))
    said = found_by_verify(run)
    assert "Classifier: failed. classify.onnx: logits of classes/digits.safetensors differ" in said


def test_a_classifier_that_adds_its_scale_is_found_in_a_release_by_itself(run: Path) -> None:
    change_graph(run, "classify.onnx", lambda model: setattr(classifier_node(model, "Mul"), "op_type", "Add"))
    done = r1export("verify", "--no-latency", run / "releases" / "01-digits")
    assert done.returncode == 1, done.output
    assert "classify.onnx: logits of classes/digits.safetensors differ" in done.output


def test_a_batch_baked_to_one_is_found(run: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    change_graph(run, "visual.onnx", change)
    assert "the visual tower fails at batch size 2" in found_by_verify(run)


@pytest.mark.parametrize("op", ["Identity", "Cast"])
def test_a_release_with_one_more_node_is_found(run: Path, op: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        last, name = model.graph.node[-1], model.graph.output[0].name
        last.output[0] = "before"
        attributes = {"to": onnx.TensorProto.FLOAT} if op == "Cast" else {}
        model.graph.node.append(helper.make_node(op, ["before"], [name], name="extra", **attributes))

    change_graph(run, "visual.onnx", change, ("01-digits",))
    said = found_by_verify(run)
    assert "manifest.json: graphs is" in said


def test_stale_class_embeddings_are_found(run: Path) -> None:
    releases = run / "releases"
    shutil.copyfile(
        releases / "00-base" / "classes" / "digits.safetensors",
        releases / "01-digits" / "classes" / "digits.safetensors",
    )
    reseal(releases / "01-digits")
    assert "classes/digits.safetensors is stale" in found_by_verify(run)


def test_an_edited_manifest_is_found(run: Path) -> None:
    path = run / "releases" / "01-digits" / "manifest.json"
    path.write_text(path.read_text().replace('"max_abs": 5e-05', '"max_abs": 0.5'))
    assert "manifest.json was edited" in found_by_verify(run)
    alone = subprocess.run(
        [sys.executable, "-m", "r1export", "verify", path.parent],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        timeout=120,
    )
    assert (alone.returncode, alone.stderr) == (1, "")
    assert "manifest.json was edited" in alone.stdout


def test_a_manifest_that_was_edited_and_sealed_again_is_found_by_the_run(run: Path) -> None:
    path = run / "releases" / "01-digits" / "manifest.json"
    replace(ReleaseManifest.read(path.parent), golden=GoldenGate(0.5, 0.1)).sealed().write(path.parent)
    assert "manifest.json: golden is GoldenGate(max_abs=0.5, min_cosine=0.1)" in found_by_verify(run)


@pytest.mark.parametrize(("provider", "code"), [("tensorrt", 3), ("abacus", 2)])
def test_a_provider_that_this_machine_or_nobody_has_is_refused_and_never_replaced(
    verified: Path, provider: str, code: int
) -> None:
    done = r1export("verify", verified / "releases" / "01-digits", "--provider", provider)
    assert done.returncode == code, done.output


def test_a_release_by_itself_is_verified_against_the_base_next_to_it(verified: Path) -> None:
    report = verify_release(verified / "releases" / "01-digits", budget=QUICK)
    assert report.verdict in ("pass", "inconclusive"), report.reasons
    assert report.proof.verdict == "pass"
    assert report.latency.ratio > 0


def test_all_graphs_are_those_that_faults_are_planted_in(run: Path) -> None:
    """preprocess.onnx holds no weights and stands outside the proof; a changed one is found by its digest."""
    assert {path.name for path in (run / "graphs").glob("*.onnx")} == {*GRAPHS, "preprocess.onnx"}
