"""From a recipe to verified releases: the one place that knows the order of the steps.

run      the three of them in a row
train    zero-shot -> for each task: train the pools, pack the selected experts, merge, evaluate
export   the graphs once -> for each release: weights, class embeddings, golden samples, manifest
verify   for each release: parity, proof, latency -> reports
bundle   the factors that a device lacks, signed
"""

from r1export.adapt import together
from r1export.pipeline.releasing import export
from r1export.pipeline.running import carry_out, open_stage, reopen_stage, run
from r1export.pipeline.self_verifying import verify_release
from r1export.pipeline.stage import Silent, Stage, Watcher, check_inputs, choose_device
from r1export.pipeline.training import train
from r1export.pipeline.updating import bundle
from r1export.pipeline.verifying import default_providers, verify

__all__ = [
    "Silent",
    "Stage",
    "Watcher",
    "bundle",
    "carry_out",
    "check_inputs",
    "choose_device",
    "default_providers",
    "export",
    "open_stage",
    "reopen_stage",
    "run",
    "together",
    "train",
    "verify",
    "verify_release",
]
