"""tritonclient parses the configs; what they say of the graphs is compared, and onnxruntime, which is the server's backend, runs them."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import onnxruntime as ort
from google.protobuf import text_format
from towers import embeds, models, read_inputs
from tritonclient.grpc import model_config_pb2

TYPES = {"tensor(float)": model_config_pb2.TYPE_FP32, "tensor(int64)": model_config_pb2.TYPE_INT64}


def session_of(model: Path):
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    session = ort.InferenceSession(str(model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    stated = [(end.name, end.data_type, list(end.dims)) for end in (*config.input, *config.output)]
    actual = [
        (end.name, TYPES[end.type], [size if isinstance(size, int) else -1 for size in end.shape[1:]])
        for end in (*session.get_inputs(), *session.get_outputs())
    ]
    if config.name != model.name or stated != actual or config.platform != "onnxruntime_onnx":
        raise SystemExit(f"{model.name}/config.pbtxt says {stated}, the graph has {actual}")
    name = session.get_inputs()[0].name
    return lambda values: session.run(None, {name: values})[0]


def main(folder: Path, inputs: Path) -> None:
    visual, textual = map(session_of, models(folder))
    found = embeds(*read_inputs(inputs), visual, textual)
    print(
        json.dumps(
            {"client": f"tritonclient {version('tritonclient')} (configs), onnxruntime {ort.__version__}", **found}
        )
    )


main(Path(sys.argv[1]), Path(sys.argv[2]))
