"""All layouts by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from r1export.errors import InputError
from r1export.layout import fastembed, immich, oci, openclip, ortpackage, ovms, transformersjs, triton
from r1export.layout.content import LayoutContent, ReleaseSource


@dataclass(frozen=True)
class Layout:
    """One client's folder: what it holds for a release and the name that the client gives the model."""

    name: str
    opened_by: str
    content: Callable[[ReleaseSource, str], LayoutContent]
    takes_variants: bool = False


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("transformersjs", "transformers.js and Optimum", transformersjs.content, takes_variants=True),
        Layout("fastembed", "fastembed and Qdrant", fastembed.content),
        Layout("immich", "immich's machine-learning server", immich.content),
        Layout("openclip", "open_clip (local-dir:)", openclip.content),
        Layout("ortpackage", "onnxruntime's ModelPackageContext", ortpackage.content),
        Layout("triton", "Triton Inference Server", triton.content),
        Layout("ovms", "OpenVINO Model Server", ovms.content),
        Layout("oci", "OCI registries and tools", oci.content),
    )
}


def layout_named(name: str) -> Layout:
    """Raises InputError for a name that is not in the table."""
    if name not in LAYOUTS:
        raise InputError(f"unknown layout {name!r:.80}", f"use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
