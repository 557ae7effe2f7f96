"""r1export: continual fine-tuning of CLIP with rank-1 experts, exported to ONNX once, verified, updated in kilobytes.

    import r1export

    report = r1export.run(r1export.load_recipe("quickstart"), "runs/quickstart")
    assert report.verdict == "pass"

The names in `__all__` are the public API. Until version 1.0 a minor version may change one of them; the changelog then says
how to adapt, and the old form works, with a DeprecationWarning, for one more minor version. Everything else may change at any
time. Files are versioned by themselves (docs/formats.md): devices and releases of an older version keep working.

Each name is loaded when it is first used, so that a device needs numpy alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1export.device.install import apply as apply_bundle
    from r1export.device.version import open_version
    from r1export.errors import CheckFailed, Inconclusive, InputError, R1ExportError, Unsupported
    from r1export.layout.write import layout_release
    from r1export.pipeline.run import run
    from r1export.pipeline.verification.release import verify_release
    from r1export.recipe_file import load_recipe
    from r1export.update.factors import ExpertUpdate

__version__ = "0.2.0"
__all__ = [
    "CheckFailed",
    "ExpertUpdate",
    "Inconclusive",
    "InputError",
    "R1ExportError",
    "Unsupported",
    "apply_bundle",
    "layout_release",
    "load_recipe",
    "open_version",
    "run",
    "verify_release",
]

_PLACES = {
    "CheckFailed": "errors:CheckFailed",
    "ExpertUpdate": "update.factors:ExpertUpdate",
    "Inconclusive": "errors:Inconclusive",
    "InputError": "errors:InputError",
    "R1ExportError": "errors:R1ExportError",
    "Unsupported": "errors:Unsupported",
    "apply_bundle": "device.install:apply",
    "layout_release": "layout.write:layout_release",
    "load_recipe": "recipe_file:load_recipe",
    "open_version": "device.version:open_version",
    "run": "pipeline.run:run",
    "verify_release": "pipeline.verification.release:verify_release",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, noun = _PLACES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), noun)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
