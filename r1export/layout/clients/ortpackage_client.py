"""onnxruntime's ModelPackageContext selects a variant of each component and makes a session of it."""

import json
import sys
from pathlib import Path

import onnxruntime as ort
from towers import embeds, read_inputs


def main(folder: Path, inputs: Path) -> None:
    package = ort.ModelPackageContext(str(folder))
    options = ort.ModelPackageOptions(ort.SessionOptions())

    def run(component):
        session = package.select_component(component, options).create_session(None)
        name = session.get_inputs()[0].name
        return lambda values: session.run(None, {name: values})[0]

    found = embeds(*read_inputs(inputs), run("visual"), run("textual"))
    print(json.dumps({"client": f"onnxruntime {ort.__version__} ModelPackageContext", **found}))


main(Path(sys.argv[1]), Path(sys.argv[2]))
