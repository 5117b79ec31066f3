"""The scripts as a user calls them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
CONVERT_DATA = ROOT / "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py"
CONVERT_MODEL = ROOT / "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh"
TRAIN = ROOT / "examples/llava_mcore/run_mcore_llava.sh"


def environment() -> dict[str, str]:
    """This process's, with the interpreter that runs the tests first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def call(*words: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a command in `cwd` and wait for it."""
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def processor_seconds() -> float:
    """Processor time that ended commands took so far: what else the machine does hardly counts, unlike on a clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train_arguments(output: Path, **changed: object) -> list[object]:
    """The 23 arguments in their order, those of a small run on the CPU where `changed` does not say otherwise."""
    values = {
        "ENV": "dsw",
        "MODEL_SIZE": "auto",
        "BATCH_SIZE": 2,
        "GLOBAL_BATCH_SIZE": 4,
        "LR": 1e-3,
        "MIN_LR": 1e-4,
        "SEQ_LEN": 16,
        "DECODER_SEQ_LEN": 128,
        "PR": "fp32",
        "TP": 1,
        "PP": 1,
        "CP": 1,
        "DO": "true",
        "FL": "true",
        "AC": "false",
        "OPTIMIZER_OFFLOAD": "false",
        "SAVE_INTERVAL": 100,
        "DATASET_PATH": output,
        "VALID_DATASET_PATH": "none",
        "PRETRAIN_CHECKPOINT_PATH": output,
        "TRAIN_ITERS": 4,
        "LR_WARMUP_ITERS": 1,
        "OUTPUT_BASEPATH": output,
    }
    assert changed.keys() <= values.keys(), changed.keys() - values.keys()
    return [str(value) for value in {**values, **changed}.values()]


def scalars(output: Path, name: str) -> dict[int, float]:
    """A TensorBoard curve read back; a step that is there twice is an error."""
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(name)
    curve = {point.step: point.value for point in points}
    assert len(curve) == len(points), f"{name} has double points"
    return curve
