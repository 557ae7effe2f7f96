"""The answers of `inspect` (what is this file?) and `doctor` (does this environment work?)."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from r1export.data.request import Request
from r1export.data.sources import READERS, read_task
from r1export.data.survey import survey
from r1export.errors import InputError, first_line
from r1export.report.contact_sheet import class_table, write_contact_sheet
from r1export.report.format import size
from r1export.run_folder import RunFolder
from r1export.update.container import NAMES, TensorSpec, read_layout
from r1export.update.factors import Rows
from r1export.update.release_layout import MANIFEST
from r1export.update.release_manifest import ReleaseManifest


class Description(NamedTuple):
    """What `inspect` prints: a title, facts, a table, and notes."""

    title: str
    facts: dict[str, object]
    columns: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The JSON document of `inspect --json`."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"kind": self.title, **self.facts, "rows": rows, **({"notes": self.notes} if self.notes else {})}


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`; `verdict` is "pass", "fail" or "not measured"."""

    check: str
    found: str
    verdict: str


MODULES = (
    "torch",
    "torchvision",
    "open_clip",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnxruntime",
    "numpy",
    "safetensors",
    "tokenizers",
    "cryptography",
)
EXTRAS = ("openvino",)  # optional: if one is missing, less is measured


def is_source(text: str) -> bool:
    """Whether `text` is a task source as in a recipe, for example folder:DIR."""
    return text.partition(":")[0] in READERS and ":" in text


def describe_source(source: str, advance: Callable[[], None], sheet: Path | None) -> Description:
    """Describe the images of a task after decoding all of them, and write a contact sheet if `sheet` is given."""
    task = read_task(Request(source, Path(), skip_broken=True))
    found = survey(task, advance)
    if sheet is not None:
        write_contact_sheet(found, sheet)
    table = class_table(found)
    facts: dict[str, object] = {
        "task": found.task,
        "classes": len(found.classes),
        "images": f"{len(task.train)} to train, {len(task.test)} to test",
        "refused": found.refused,
        "twins": f"{len(found.twins)} test images are identical to a training image",
    }
    lines = (*found.notes, *(line for each in found.classes for line in each.refused), *map(_twins, found.twins))
    columns, rows = [column.lower() for column in table.columns], [list(row) for row in table.rows]
    return Description("Pictures", facts, columns, rows, lines)


def _twins(pair: tuple[str, str]) -> str:
    return f"identical: {pair[0]} and {pair[1]}"


def describe(path: Path) -> Description:
    """Describe a file or folder. Raises InputError for an unknown kind."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder", "check the path")
    if path.is_dir():
        return _release(path) if (path / MANIFEST).exists() else _run(path)
    kinds: dict[str, Callable[[Path], Description]] = {
        ".safetensors": _tensors,
        ".onnx": _graph,
        ".toml": _recipe,
        ".r1u": _bundle,
    }
    if path.suffix not in kinds:
        raise InputError(f"{path}: unknown kind of file", f"expected a folder or one of {', '.join(kinds)}")
    return kinds[path.suffix](path)


def _run(path: Path) -> Description:
    run = RunFolder(path)
    recipe = run.recipe()
    rows = []
    for number, task in enumerate(recipe.stream, 1):
        factors, released = run.task(number, task.name).factors, run.release(number, task.name).exists()
        nbytes = size(factors.stat().st_size) if factors.exists() else "-"
        rows.append([task.name, task.source, _yes(factors.exists()), nbytes, _yes(released)])
    facts = {"run": str(path), "base": recipe.base.model or recipe.base.weights, "seed": recipe.train.seed}
    return Description("Run", facts, ["task", "source", "learned", "factors", "released"], rows)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _release(path: Path) -> Description:
    manifest = ReleaseManifest.read(path)
    rows = [[name, size(entry.nbytes), entry.sha256] for name, entry in manifest.files.items()]
    facts: dict[str, object] = {
        "release": manifest.name,
        "base": manifest.base.name,
        "learned": ", ".join(update.task for update in manifest.updates) or "nothing",
        "parameters": len(manifest.tensors),
    }
    return Description("Release", facts, ["file", "size", "sha256"], rows)


def _tensors(path: Path) -> Description:
    layout = read_layout(path)
    rows = [[spec.name, NAMES[spec.dtype], str(list(spec.shape)), size(spec.nbytes)] for spec in layout.specs]
    facts: dict[str, object] = {"file": str(path), "tensors": len(rows), "bytes": layout.nbytes}
    if experts := {spec.name.removesuffix(".u"): spec.shape[-1] for spec in layout.specs if _is_factor(spec)}:
        facts |= {"adapted linears": len(experts), "experts per linear": _span(experts.values())}
        facts["parameters changed"] = len({Rows.parse(name).parameter for name in experts})
    return Description("Tensors", facts, ["name", "dtype", "shape", "size"], rows)


def _span(counts: Collection[int]) -> str:
    """The smallest and the largest number, or the only one."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _is_factor(spec: TensorSpec) -> bool:
    return spec.name.endswith(".u") and len(spec.shape) == 2


def _graph(path: Path) -> Description:
    import onnx

    from r1export.verify.graph_digest import graph_digest

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is not public
        raise InputError(f"{path}: not an ONNX graph: {error}", "export it again") from error
    ends = [
        f"{v.name} {[d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]}"
        for v in (*model.graph.input, *model.graph.output)
    ]
    facts: dict[str, object] = {
        "graph": str(path),
        "opset": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
        "inputs and outputs": "; ".join(ends),
    }
    facts |= {"initializers": len(model.graph.initializer), "digest": graph_digest(path)}
    nodes = Counter(node.op_type for node in model.graph.node)
    return Description("Graph", facts, ["op", "nodes"], [[op, str(count)] for op, count in nodes.most_common()])


def _recipe(path: Path) -> Description:
    from r1export.recipe_file import load_recipe

    recipe = load_recipe(path)
    rows = [
        [f"{section}.{field}", str(value)]
        for section in ("base", "data", "pool", "train", "export", "verify")
        for field, value in getattr(recipe, section)
    ]
    named = [(f"tasks.{i}", task) for i, task in enumerate(recipe.stream, 1)]
    named += [("probe", recipe.probe)] if recipe.probe else []
    rows += [[f"{section}.{field}", str(value)] for section, task in named for field, value in task]
    facts: dict[str, object] = {"recipe": str(path), "tasks": ", ".join(task.name for task in recipe.stream)}
    return Description("Recipe", facts, ["field", "value"], rows)


def _bundle(path: Path) -> Description:
    from r1export.update.bundle import inspect

    summary = inspect(path)
    rows = [[key, str(value)] for key, value in summary.items() if not isinstance(value, list | dict)]
    rows += [["signed by", keyid] for keyid in summary["signed_by"]]
    rows += [[f"update {i}", _update(update)] for i, update in enumerate(summary["updates"], 1)]
    rows += [[file["path"], size(file["bytes"])] for file in summary["files"]]
    facts: dict[str, object] = {
        "update": str(path),
        "signatures": "listed, not verified (the device verifies them)",
    }
    return Description("Update", facts, ["field", "value"], rows)


def _update(update: Mapping[str, Any]) -> str:
    content = f"{update['experts']} experts" if update["carried"] else "already on the device"
    return f"{update['task']}, {content}, {update['sha256'][:16]}"


def examine_environment() -> list[Finding]:
    """One finding per module, device and trial."""
    findings = [Finding("python", platform.python_version(), "pass")]
    packages = packages_distributions()
    findings += [_module(name, packages) for name in (*MODULES, *EXTRAS)]
    for name, trial in (
        ("torch and torchvision", _try_torch),
        ("onnxruntime runs a graph", _try_onnxruntime),
        ("disk", _try_disk),
    ):
        try:
            findings.append(Finding(name, trial(), "pass"))
        except Exception as error:  # any exception is a finding
            kind = type(error).__name__
            text = f"{kind}: {first_line(error)}" if str(error).strip() else kind
            findings.append(Finding(name, text[:140], "fail"))
    return findings


def _module(name: str, packages: Mapping[str, list[str]]) -> Finding:
    """A module as Python finds it, from whichever package: several packages provide onnxruntime."""
    if find_spec(name) is None:
        return Finding(name, "not installed", "fail" if name in MODULES else "not measured")
    owners = sorted(set(packages.get(name, [])))
    found = ", ".join(
        version(owner) if _plain(owner) == _plain(name) else f"{owner} {version(owner)}" for owner in owners
    )
    if len(owners) > 1:
        found += f"; Python imports {_origin(name)}. They overwrite each other: uninstall all of them and install one"
    return Finding(name, found or "from an unknown package", "pass")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _origin(name: str) -> str:
    """The package that Python imports, by onnxruntime's build info; else its path."""
    module = import_module(name)
    try:
        return str(import_module(f"{name}.capi.build_and_package_info").package_name)
    except (ImportError, AttributeError):
        return str(module.__file__)


def _try_torch() -> str:
    import torch
    import torchvision

    torchvision.ops.nms(
        torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5
    )  # fails if it was built for another torch
    return f"{torch.get_num_threads()} threads, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device'}"


def _try_onnxruntime() -> str:
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones(1, np.float32)})[0][0] == 2, "1 + 1 is not 2"
    return ", ".join(ort.get_available_providers())


def _try_disk() -> str:
    import shutil

    return f"{shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.1f} GB free for temporary files"
