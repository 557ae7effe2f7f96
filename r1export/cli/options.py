"""Options and arguments that commands share, and those of `bundle`, which are many."""

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
        readable=False,
        metavar="RECIPE",
        help="A recipe in TOML, or the name of one that comes with r1export, such as quickstart.",
    ),
]
Run = Annotated[Path, typer.Argument(readable=False, metavar="RUN", help="Folder of a run.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", readable=False, metavar="RUN", help="Folder for the run; by default runs/RECIPE."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the existing run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the existing run first.")]
Where = Annotated[Device, typer.Option("--device", help="Where to train and to run torch.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override a recipe field, for example train.iterations=50; repeatable."
    ),
]
Order = Annotated[
    str | None,
    typer.Option("--order", metavar="NAMES", help="Task names with commas between them, or `reversed`."),
]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="cpu, cuda or tensorrt of onnxruntime, openvino, or reference (onnx's own, untimed); repeatable. Default: cpu, and cuda where there is one.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout, of an error too; everything else goes to stderr.")
]

# The options of `bundle`, which are many: a fleet's owner decides all of this.
TargetRelease = Annotated[
    int, typer.Option("--release", help="Number of the release that the device will have; 0 is the base.")
]
Keys = Annotated[
    list[Path], typer.Option("--key", readable=False, help="Secret key from keygen; give it once for each signature.")
]
UpdateFile = Annotated[
    Path, typer.Option("--out", "-o", readable=False, metavar="FILE", help="The update, for example update.r1u.")
]
Since = Annotated[int, typer.Option("--since", help="Number of the release that the device has.")]
WhichPrecision = Annotated[
    Precision, typer.Option("--precision", help="Which releases: those of fp32 or of a variant of the recipe.")
]
Drop = Annotated[
    list[str] | None, typer.Option("--drop", metavar="TASK", help="Leave a task out; needs --seq; repeatable.")
]
Seq = Annotated[
    int,
    typer.Option(
        "--seq",
        help="Sequence number; a rollback or a version without a task needs one above all that the fleet has seen.",
    ),
]
Product = Annotated[str, typer.Option("--product", help="Devices of another product refuse the update.")]
DeviceClass = Annotated[str, typer.Option("--device-class", help="Devices of another class refuse the update.")]
MinSeq = Annotated[int, typer.Option("--min-seq", help="Devices may not roll back below this sequence number.")]
Expires = Annotated[
    int, typer.Option("--expires", help="Seconds since 1970 after which devices refuse the update; 0 is never.")
]
AcceptInconclusive = Annotated[
    bool, typer.Option("--accept-inconclusive", help="Sign a release whose verification did not decide everything.")
]
