"""`r1device.pyz`: all that a device needs in one file that Python runs. Builds are reproducible byte for byte."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from r1export.errors import InputError
from r1export.update.atomic_io import write_file

PACKAGE = Path(__file__).parents[1]
MODULES = {  # the part of the package that devices run
    "": ("__init__", "errors"),
    "update": (
        "__init__",
        "atomic_io",
        "bundle",
        "container",
        "ed25519",
        "embedding_space",
        "envelope",
        "factors",
        "golden_samples",
        "int8",
        "layout_file",
        "linking",
        "manifest",
        "names",
        "oci",
        "open_clip_weights",
        "plain_text",
        "rebuild",
        "release_layout",
        "release_manifest",
        "strict_json",
    ),
    "device": (
        "__init__",
        "__main__",
        "arithmetic",
        "client_files",
        "doctor",
        "health",
        "install",
        "layouts",
        "policy",
        "provision",
        "slot_files",
        "slot_files",
        "state",
        "store",
        "version",
        "worker",
    ),
}
OLDEST_PYTHON = (3, 8)
# Older Pythons must be able to parse this to report that they are too old.
MAIN = f"""import sys

if sys.version_info < {OLDEST_PYTHON}:
    sys.stderr.write("Error: r1device needs Python {".".join(map(str, OLDEST_PYTHON))} or newer, this is %s\\n" % sys.version.split()[0])
    sys.exit(3)

from r1export.device.__main__ import main

sys.exit(main())
"""


def device_kit(out: Path, *, overwrite: bool = False) -> Path:
    """Write the kit to `out` and return the path. Raises InputError if it exists and `overwrite` is not set."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists", "choose another name, or use --overwrite")
    sources = {
        f"r1export/{folder}/{name}.py".replace("//", "/"): PACKAGE / folder / f"{name}.py"
        for folder, names in MODULES.items()
        for name in names
    }
    archive = io.BytesIO(b"")
    archive.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(
        archive, "a", zipfile.ZIP_STORED
    ) as pyz:  # not compressed: compressors differ between machines
        for name, data in {
            **{name: path.read_bytes() for name, path in sources.items()},
            "__main__.py": MAIN.encode(),
        }.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            pyz.writestr(entry, data)
    write_file(out, archive.getvalue())
    return out
