"""OpenVINO reads the graphs of the model server's folder, where config.json says that they lie."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from towers import embeds, read_inputs


def main(folder: Path, inputs: Path) -> None:
    listed = json.loads((folder / "config.json").read_text())["model_config_list"]
    paths = {entry["config"]["name"].rpartition("_")[2]: folder / entry["config"]["base_path"] for entry in listed}
    core = openvino.Core()

    def run(tower):
        compiled = core.compile_model(
            core.read_model(paths[tower] / "1" / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        return lambda values: np.array(compiled([values])[compiled.output(0)])

    found = embeds(*read_inputs(inputs), run("visual"), run("textual"))
    print(json.dumps({"client": f"openvino {openvino.__version__.partition('-')[0]}", **found}))


main(Path(sys.argv[1]), Path(sys.argv[2]))
