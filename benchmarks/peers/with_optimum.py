"""Optimum: PEFT merges, then `optimum-cli export onnx` writes one graph of both towers and validates it against torch."""

from __future__ import annotations

from pathlib import Path

from peers.contender import (
    FIRST_LINEAR,
    cut_image_tower,
    enter,
    onnx_embeddings,
    release_bytes,
    run,
    timed,
    versions,
)  # fmt: skip
from peers.row import Fault, Row
from peers.workload import adapted_model, parity, read_samples

TASK = "zero-shot-image-classification"
# The tool itself, with one weight of its file negated between writing and validating.
FLIPPED = f"""
import sys
from pathlib import Path
from optimum.exporters.onnx import convert
from peers.contender import flip_sign
from transformers import CLIPModel
export_models, model, out = convert.export_models, Path(sys.argv[4]), Path(sys.argv[-1])
def faulty(*arguments, **options):
    found = export_models(*arguments, **options)
    weight = CLIPModel.from_pretrained(model).get_submodule("{FIRST_LINEAR}").weight.detach().numpy()
    flip_sign(out / "model.onnx", weight)
    return found
convert.export_models = faulty
from optimum.commands.optimum_cli import main
sys.argv[0] = "optimum-cli"
main()
"""


def build(work: Path) -> Row:
    from optimum.exporters.onnx import main_export

    folder = work / "optimum"
    seconds: dict[str, float] = {}
    with timed(seconds, "export"):
        merged(work, folder / "merged-hf")
        main_export(str(folder / "merged-hf"), folder / "adapted", task=TASK)
    main_export(str(work / "base"), folder / "base", task=TASK)
    graph, samples = folder / "adapted" / "model.onnx", read_samples(work)
    return {
        "versions": versions("optimum", "optimum-onnx", "transformers", "peft", "torch"),
        "first_seconds": seconds["export"], "later_seconds": seconds["export"],
        "release_bytes": release_bytes(graph), "update_bytes": release_bytes(graph),
        "parity": parity(onnx_embeddings(dict.fromkeys(("image_embeds", "text_embeds"), graph), samples), work),
        "faults": faults(work, folder),
        "graphs": {
            kind: {"graph": str(cut_image_tower(folder / kind / "model.onnx", folder / f"{kind}-image.onnx"))} for kind in ("base", "adapted")
        },
    }  # fmt: skip


def merged(work: Path, out: Path, *, scaled_twice: bool = False) -> None:
    """PEFT's merge, saved as a model of transformers."""
    adapted_model(work, scaled_twice=scaled_twice).merge_and_unload(safe_merge=True).save_pretrained(out)


def faults(work: Path, folder: Path) -> dict[str, Fault]:
    """The command line on a wrong merge, and on a right one whose file is damaged before it is validated."""
    merged(work, folder / "twice-hf", scaled_twice=True)
    samples = read_samples(work)
    found: dict[str, Fault] = {}
    for fault, model, code in (
        ("merge", folder / "twice-hf", "from optimum.commands.optimum_cli import main; main()"),
        ("file", folder / "merged-hf", FLIPPED),
    ):
        out = folder / f"fault-{fault}"
        said = run("export", "onnx", "--model", str(model), "--task", TASK, str(out), code=code)
        embeds = onnx_embeddings(dict.fromkeys(("image_embeds", "text_embeds"), out / "model.onnx"), samples)
        found[fault] = {**said, "off_by": parity(embeds, work)}
    return found


if __name__ == "__main__":
    enter("optimum", build)
