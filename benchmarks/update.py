"""The size of an update, and the cost of applying it. ViT-B/16, both towers, random weights.

    python benchmarks/update.py [--json update.json] [--tasks 4]
    python benchmarks/update.py --only loads --run RUN      # any exported run

Prints bytes of an update, of a binary patch of the same change and of the whole file, time and memory of
`r1device apply` and of the file writing and hashing that no updater can avoid, and how long an application loads the last
release of RUN in overlay mode, which merges on loading, and in slot mode, which loads plain files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np

from r1export.device import install, provision
from r1export.device.kit import device_kit
from r1export.update.atomic_io import sha256_file, write_file, write_json
from r1export.update.container import NAMES, TensorSpec, plan, write_layout, write_tensors
from r1export.update.envelope import SecretKey
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.update.lab.publish import Step, Terms, make_bundle
from r1export.update.rebuild import Rebuild
from r1export.update.release_manifest import Release

EXPERTS = 4  # rank-1 experts of each adapted linear and task
KEY = SecretKey(bytes(range(32)))
TERMS = Terms(created=1_800_000_000)
CLASSES = 10  # classes of a task
TOWERS = {
    "visual": ("visual.transformer.resblocks", 768, 12),
    "textual": ("transformer.resblocks", 512, 12),
}  # prefix, width, layers


Tensors = dict[str, dict[str, object]]  # those of a manifest, by name


class Size(TypedDict):
    """Bytes of one task's update, and of the files that it replaces."""

    towers: str
    factors: str
    update_bytes: int
    factors_bytes: int
    whole_bytes: int


class Way(TypedDict):
    """One way to send the same change: its bytes, the seconds that it takes to make, and its share of the whole file."""

    method: str
    bytes: int | None
    seconds: float | None
    share: float | None


class Figures(TypedDict, total=False):
    """The tables that were made; the last two are figures by name."""

    sizes: list[Size]
    patches: list[Way]
    costs: dict[str, float]
    loads: dict[str, float]


def shapes(tower: str) -> dict[str, tuple[int, ...]]:
    """Parameters of one tower of OpenAI's ViT-B/16 CLIP, as open_clip names them."""
    prefix, width, layers = TOWERS[tower]
    if tower == "visual":
        found = {
            "visual.conv1.weight": (width, 3, 16, 16),
            "visual.class_embedding": (width,),
            "visual.positional_embedding": (197, width),
        }
        found |= {
            f"visual.{name}.{part}": (width,) for name in ("ln_pre", "ln_post") for part in ("weight", "bias")
        } | {"visual.proj": (width, 512)}
    else:
        found = {
            "token_embedding.weight": (49408, width),
            "positional_embedding": (77, width),
            "text_projection": (width, 512),
        }
        found |= {f"ln_final.{part}": (width,) for part in ("weight", "bias")}
    for layer in range(layers):
        linears = {
            "attn.in_proj": (3 * width, width),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }
        for name, shape in linears.items():
            joint = "_" if name == "attn.in_proj" else "."
            found |= {f"{prefix}.{layer}.{name}{joint}weight": shape, f"{prefix}.{layer}.{name}{joint}bias": shape[:1]}
        found |= {
            f"{prefix}.{layer}.{name}.{part}": (width,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")
        }
    return found


def adapted(tower: str) -> list[Rows]:
    """q, k, v, out and both linears of the MLP of each block: 72 weights of a tower."""
    found = []
    for name, shape in shapes(tower).items():
        if name.endswith("in_proj_weight"):
            found += [Rows(name, part * shape[1], (part + 1) * shape[1]) for part in range(3)]
        elif name.endswith(("out_proj.weight", "c_fc.weight", "c_proj.weight")):
            found.append(Rows(name, 0, shape[0]))
    return found


def make_run(run: Path, towers: list[str], tasks: int, dtype: str) -> Path:
    """A base release, the factors of `tasks` tasks, and releases 1 and `tasks`."""
    rng = np.random.default_rng(0)
    base = run / "releases" / "00-base"
    base.mkdir(parents=True)
    tensors: Tensors = {}
    for tower in towers:
        layout = plan((name, np.dtype("f4"), shape) for name, shape in shapes(tower).items())
        write_layout(
            base / f"{tower}.safetensors", layout, lambda spec: rng.standard_normal(spec.shape, "f4") * np.float32(0.02)
        )
        for spec in layout.specs:
            tensors[spec.name] = {
                "file": f"{tower}.safetensors", "offset": spec.offset, "dtype": NAMES[spec.dtype], "shape": list(spec.shape),
                "transposed": False, "sha256": hashlib.sha256(read(base, spec)).hexdigest(),
            }  # fmt: skip
        write_file(base / f"{tower}.onnx", rng.bytes(300_000))
    golden = {
        "pixel_values": rng.standard_normal((8, 3, 224, 224), "f4"),
        "image_embeds": rng.standard_normal((8, 512), "f4"),
    }
    write_tensors(base / "golden.safetensors", golden)
    write_manifest(base, 0, [], tensors)
    updates: list[tuple[str, str, ExpertUpdate]] = []
    for number in range(1, tasks + 1):
        folder = run / "tasks" / f"{number:02d}-task{number}"
        folder.mkdir(parents=True)
        update = ExpertUpdate({rows: factors(rng, rows, tower, dtype) for tower in towers for rows in adapted(tower)})
        update.write(folder / "factors.safetensors")
        updates.append((f"task{number}", sha256_file(folder / "factors.safetensors"), update))
        if number in (1, tasks):
            write_release(run, updates, tensors, golden, rng)
    return run


def read(folder: Path, spec: TensorSpec) -> bytes:
    with open(folder / f"{'visual' if spec.name.startswith('visual') else 'textual'}.safetensors", "rb") as file:
        file.seek(spec.offset)
        return file.read(spec.nbytes)


def factors(rng: np.random.Generator, rows: Rows, tower: str, dtype: str) -> Factors:
    inside = shapes(tower)[rows.parameter][1]
    return Factors.pack(
        rng.standard_normal((EXPERTS, inside)) * 0.02,
        rng.standard_normal((rows.stop - rows.start, EXPERTS)) * 0.02,
        1.0,
        dtype,
    )


def write_release(
    run: Path,
    updates: list[tuple[str, str, ExpertUpdate]],
    tensors: Tensors,
    golden: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> None:
    base = Release.read(run / "releases" / "00-base")
    folder = run / "releases" / f"{len(updates):02d}-{updates[-1][0]}"
    (folder / "classes").mkdir(parents=True)
    rebuild = Rebuild(base, ExpertUpdate.stack(update for _, _, update in updates))
    for path in base.manifest.files:
        write_file(folder / path, rebuild.chunks(path))
    write_tensors(folder / "golden.safetensors", {**golden, "image_embeds": rng.standard_normal((8, 512), "f4")})
    write_tensors(
        folder / "classes" / f"{updates[-1][0]}.safetensors",
        {"class_embeds": rng.standard_normal((CLASSES, 512), "f4")},
    )
    digests = {name: hashlib.sha256(rebuild.tensor(name).tobytes()).hexdigest() for name in rebuild.update.parameters}
    changed = {name: {**tensors[name], "sha256": digest} for name, digest in digests.items()}
    write_manifest(
        folder, len(updates), [{"task": task, "sha256": digest} for task, digest, _ in updates], {**tensors, **changed}
    )


def write_manifest(folder: Path, sequence: int, updates: list[dict[str, str]], tensors: Tensors) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in paths
    }
    golden = {"max_abs": 5e-5, "min_cosine": 0.999999}
    head = {
        "format": "r1export.release/1",
        "name": folder.name,
        "sequence": sequence,
        "procedure": "r1-f64-v1",
        "precision": "fp32",
    }
    body = {
        "base": {"name": "ViT-B-16", "sha256": "0" * 64},
        "updates": updates,
        "files": files,
        "tensors": tensors,
        "golden": golden,
        "tasks": [],
    }
    write_json(folder / "manifest.json", head | body)


def sizes(folder: Path) -> list[Size]:
    """One or both towers, in both precisions of the factors."""
    rows: list[Size] = []
    for towers, dtype in (
        (["visual", "textual"], "float32"),
        (["visual", "textual"], "float16"),
        (["visual"], "float32"),
        (["visual"], "float16"),
    ):
        run = make_run(folder / f"sizes-{'-'.join(towers)}-{dtype}", towers, 1, dtype)
        bundle = make_bundle(run, Step(1), [KEY], TERMS)
        whole = sum((run / "releases" / "00-base" / f"{tower}.safetensors").stat().st_size for tower in towers)
        carried = sum(update.nbytes for update in bundle.carried.values())
        rows.append(
            {
                "towers": "+".join(towers),
                "factors": dtype,
                "update_bytes": len(bundle.to_bytes()),
                "factors_bytes": carried,
                "whole_bytes": whole,
            }
        )
        shutil.rmtree(run)
    return rows


def patches(folder: Path) -> list[Way]:
    """The same change of the smallest and the largest weight of a block (12 MB) as an update's factors and as binary patches."""
    rng = np.random.default_rng(1)
    block = [
        rows for rows in adapted("visual") if rows.parameter.endswith((".0.attn.out_proj.weight", ".0.mlp.c_fc.weight"))
    ]
    base = {
        name: rng.standard_normal(shape, "f4") * np.float32(0.02)
        for name, shape in shapes("visual").items()
        if name in {rows.parameter for rows in block}
    }
    update = ExpertUpdate({rows: factors(rng, rows, "visual", "float32") for rows in block})
    old, new, patch = folder / "old", folder / "new", folder / "patch"
    write_tensors(old, base)
    write_tensors(new, update.apply(base))
    whole = new.stat().st_size
    ways = [
        _way("whole file", whole, 0.0, whole),
        _way("rank-1 factors, float32", update.nbytes, 0.0, whole),
        _way("rank-1 factors, float16", update.nbytes // 2, 0.0, whole),
    ]
    zstd = ["zstd", "-q", "-f", "-19"]
    for method, command in (
        ("zstd -19", [*zstd, str(new), "-o", str(patch)]),
        ("zstd -19 --patch-from", [*zstd, "--long=27", f"--patch-from={old}", str(new), "-o", str(patch)]),
        ("bsdiff", ["bsdiff", str(old), str(new), str(patch)]),
    ):
        ways.append(_packed(method, command, patch, whole))
    if shutil.which("zstd"):
        planes = folder / "planes"
        planes.write_bytes(_byte_planes(old, new))
        ways.append(_packed("XOR, byte planes, zstd -19", [*zstd, str(planes), "-o", str(patch)], patch, whole))
    return ways


def _packed(method: str, command: list[str], patch: Path, whole: int) -> Way:
    """A patch that `command` makes."""
    if not shutil.which(command[0]):
        return _way(f"{method}: {command[0]} is not installed", None, None, whole)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return _way(method, patch.stat().st_size, time.perf_counter() - start, whole)


def _way(method: str, nbytes: int | None, seconds: float | None, whole: int) -> Way:
    return {"method": method, "bytes": nbytes, "seconds": seconds, "share": nbytes / whole if nbytes else None}


def _byte_planes(old: Path, new: Path) -> bytes:
    """The XOR of two files of float32: the first byte of every number, then the second of every number, and so on."""
    one, other = (np.frombuffer(path.read_bytes(), np.uint8)[-(1 << 26) :] for path in (old, new))
    xor = one ^ other
    return np.ascontiguousarray(xor[len(xor) % 4 :].reshape(-1, 4).T).tobytes()


def costs(folder: Path, tasks: int) -> dict[str, float]:
    """Time and memory of applying `tasks` tasks at once to both towers, and of the writing and hashing alone."""
    run = make_run(folder / "costs", ["visual", "textual"], tasks, "float16")
    (folder / "key.pub").write_text(KEY.public.to_pem())
    bundle = make_bundle(run, Step(tasks), [KEY], TERMS)
    (folder / "cost.r1u").write_bytes(bundle.to_bytes())
    kit = device_kit(folder / "r1device.pyz", overwrite=True)
    found: dict[str, float] = {"tasks": tasks, "update_bytes": len(bundle.to_bytes())}
    for mode in ("slot", "overlay"):
        store = folder / f"store-{mode}"
        provision.init(store, run / "releases" / "00-base", [folder / "key.pub"], mode=mode, health="none")
        seconds, busy, peak = measured([sys.executable, str(kit), "apply", str(store), str(folder / "cost.r1u")])
        found |= {f"{mode}_seconds": seconds, f"{mode}_processor_seconds": busy, f"{mode}_peak_bytes": peak}
        if mode == "slot":
            same = all(sha256_file(store / "current" / file.path) == file.sha256 for file in bundle.manifest.files)
            found["bit_equal"] = same
            found |= timed("unavoidable", partial(write_and_hash, store / "base", folder / "copy"))
    found["interpreter_peak_bytes"] = measured([sys.executable, "-c", "import numpy"])[2]
    found |= timed("merge", lambda: merge(Release.read(run / "releases" / "00-base"), bundle.carried.values()))
    return found


LOAD = """
import sys, time
from pathlib import Path
import numpy, onnxruntime
from r1export.device.version import open_version
start = time.perf_counter()
version = open_version(Path(sys.argv[1]))
sessions = [version.session(graph) for graph in ("visual.onnx", "textual.onnx")]
print(time.perf_counter() - start)
"""


def loads(folder: Path, run: Path, rounds: int = 10) -> dict[str, float]:
    """Seconds to open both towers of the last release of `run` on a device, in processes of their own, taking turns."""
    releases = sorted((run / "releases").iterdir())
    (folder / "key.pub").write_text(KEY.public.to_pem())
    bundle = make_bundle(run, Step(len(releases) - 1), [KEY], TERMS)
    (folder / "load.r1u").write_bytes(bundle.to_bytes())
    seconds: dict[str, list[float]] = {"slot": [], "overlay": []}
    for mode in seconds:
        provision.init(folder / mode, releases[0], [folder / "key.pub"], mode=mode, health="none")
        install.apply(folder / mode, folder / "load.r1u")
    for _ in range(rounds + 1):
        for mode, found in seconds.items():
            command = [sys.executable, "-c", LOAD, str(folder / mode)]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    slot, overlay = (np.array(found[1:]) for found in seconds.values())  # the first reads from disk
    more = overlay - slot
    return {
        "updates": len(releases) - 1, "slot_load_seconds": float(np.median(slot)), "overlay_load_seconds": float(np.median(overlay)),
        "overlay_more_seconds": float(np.median(more)), "overlay_more_at_most_seconds": float(more.max()),
    }  # fmt: skip


def merge(base: Release, updates: Iterable[ExpertUpdate]) -> None:
    rebuild = Rebuild(base, ExpertUpdate.stack(updates))
    for parameter in rebuild.update.parameters:
        rebuild.tensor(parameter)


def write_and_hash(base: Path, copy: Path) -> None:
    """What any updater does: check the base, write the new files, sync, check what was written."""
    copy.mkdir()
    for path in base.iterdir():
        sha256_file(path)
        shutil.copyfile(path, copy / path.name)
        with open(copy / path.name, "rb") as file:
            os.fsync(file.fileno())
        sha256_file(copy / path.name)


def timed(name: str, function: Callable[[], None]) -> dict[str, float]:
    """Seconds by the clock and of the processor: they differ if other programs run."""
    start, busy = time.perf_counter(), time.process_time()
    function()
    return {f"{name}_seconds": time.perf_counter() - start, f"{name}_processor_seconds": time.process_time() - busy}


def measured(command: list[str]) -> tuple[float, float, int]:
    """Seconds and processor seconds of a process, and the largest resident memory in bytes of it or a process it started."""
    code = "import resource, subprocess, sys, time; s = time.perf_counter(); subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
    code += "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(time.perf_counter() - s, u.ru_utime + u.ru_stime, u.ru_maxrss * 1024)"
    seconds, busy, peak = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    ).stdout.split()
    return float(seconds), float(busy), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--tasks", type=int, default=4, help="tasks in the update whose cost is measured")
    parser.add_argument("--run", type=Path, help="an exported run whose last release is loaded")
    parser.add_argument("--only", choices=["sizes", "patches", "costs", "loads"], help="make one of the tables")
    options = parser.parse_args()
    if options.only == "loads" and not options.run:
        parser.error("loads needs --run")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures: Figures = {}
        if options.only in (None, "sizes"):
            figures["sizes"] = sizes(folder)
        if options.only in (None, "patches"):
            figures["patches"] = patches(folder)
        if options.only in (None, "costs"):
            figures["costs"] = costs(folder, options.tasks)
        if options.only in (None, "loads") and options.run:
            figures["loads"] = loads(folder, options.run)
    report(figures, options.tasks)
    if options.json:
        write_json(options.json, figures)


def report(figures: Figures, tasks: int) -> None:
    """Print the tables that were made."""
    if "sizes" in figures:
        print(f"One task, {EXPERTS} experts on each adapted weight, {CLASSES} classes\n")
        print("| towers | factors | update | of the weights |\n|---|---|---|---|")
        for row in figures["sizes"]:
            share, whole = 100 * row["update_bytes"] / row["whole_bytes"], row["whole_bytes"] / 1e6
            update = f"{row['update_bytes'] / 1e6:.2f} MB"
            print(f"| {row['towers']} | {row['factors']} | {update} | {share:.2f} % of {whole:.0f} MB |")
    if "patches" in figures:
        print("\nThe same change of two weights (12 MB), as\n")
        print("| method | bytes | share | seconds to make |\n|---|---|---|---|")
        for way in figures["patches"]:
            print(f"| {way['method']} | {_cells(way)} |")
    for title, found in (
        (f"Applying {tasks} tasks to both towers", figures.get("costs")),
        ("Loading both towers", figures.get("loads")),
    ):
        if found:
            print(f"\n{title}\n\n| what | figure |\n|---|---|")
            for key, value in found.items():
                print(f"| {key} | {_shown(key, value)} |")


def _cells(way: Way) -> str:
    if way["bytes"] is None or way["share"] is None or way["seconds"] is None:
        return "not measured | |"
    return f"{way['bytes']:,} | {100 * way['share']:.2f} % | {way['seconds']:.1f}"


def _shown(key: str, value: float) -> str:
    if key.endswith("bytes"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.2f} s" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
