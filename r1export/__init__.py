"""r1export: continual CLIP adaptation with rank-1 experts, exported once, proven, and updated in kilobytes.

    from r1export import load_recipe, run
    report = run(load_recipe("recipes/quickstart.toml"), "runs/quickstart")

The nouns below are the public ones; each is loaded when it is first asked for, so that a device needs numpy alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1export.device.install import apply as apply_bundle
    from r1export.pipeline.run import run
    from r1export.pipeline.verification.release import verify_release
    from r1export.recipe import load_recipe
    from r1export.update.factors import ExpertUpdate

__version__ = "0.1.0"
__all__ = ["ExpertUpdate", "apply_bundle", "load_recipe", "run", "verify_release"]

_PLACES = {
    "ExpertUpdate": "update.factors:ExpertUpdate",
    "apply_bundle": "device.install:apply",
    "load_recipe": "recipe:load_recipe",
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
