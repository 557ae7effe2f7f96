"""Options and arguments that several commands share, and those of `bundle`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


RecipeFile = Annotated[
    Path,
    typer.Argument(
        readable=False, metavar="RECIPE", help="Recipe (TOML), or the name of a built-in one such as quickstart."
    ),
]
Run = Annotated[Path, typer.Argument(readable=False, metavar="RUN", help="Run folder.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", readable=False, metavar="RUN", help="Run folder to create. Default: runs/RECIPE."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the existing run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the existing run first.")]
Where = Annotated[Device, typer.Option("--device", help="Device for torch.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a recipe field, e.g. train.iterations=50. Repeatable."),
]
Order = Annotated[
    str | None,
    typer.Option("--order", metavar="NAMES", help="Task order: comma-separated names, or `reversed`."),
]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="onnxruntime provider (cpu, cuda, tensorrt), openvino, or reference (onnx's own, not timed). Repeatable. Default: cpu, and cuda if available.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document to stdout, also for an error. Everything else goes to stderr."
    ),
]

# The options of `bundle`.
TargetRelease = Annotated[int, typer.Option("--release", help="Release to install; 0 is the base.")]
Keys = Annotated[
    list[Path], typer.Option("--key", readable=False, help="Secret key from keygen. Repeatable, one signature each.")
]
UpdateFile = Annotated[
    Path, typer.Option("--out", "-o", readable=False, metavar="FILE", help="Output file, e.g. update.r1u.")
]
Since = Annotated[int, typer.Option("--since", help="Release that the device already has.")]
WhichPrecision = Annotated[
    Precision, typer.Option("--precision", help="Precision of the releases: fp32, or a variant of the recipe.")
]
Drop = Annotated[
    list[str] | None, typer.Option("--drop", metavar="TASK", help="Leave out a task. Requires --seq. Repeatable.")
]
Seq = Annotated[
    int,
    typer.Option(
        "--seq",
        help="Sequence number. A rollback or --without needs one above all that the fleet has seen.",
    ),
]
Product = Annotated[str, typer.Option("--product", help="Only devices of this product accept the update.")]
DeviceClass = Annotated[str, typer.Option("--device-class", help="Only devices of this class accept the update.")]
MinSeq = Annotated[int, typer.Option("--min-seq", help="Devices can't roll back below this sequence number.")]
Expires = Annotated[int, typer.Option("--expires", help="Expiry in seconds since 1970 (UTC); 0 is never.")]
AcceptInconclusive = Annotated[
    bool, typer.Option("--accept-inconclusive", help="Sign a release even if its verification is inconclusive.")
]
