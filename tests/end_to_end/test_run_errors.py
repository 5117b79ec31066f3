"""What the terminal shows when a run cannot go on, and what is left of one whose launcher is gone."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from megatron_patch.conversion.companions import checkpoint_folder
from tests.end_to_end.scripts import TRAIN, call, environment, train_arguments
from tests.unit.data.samples import convert_folder, write_pretrain


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pretrain(folder / "raw", 30)
    convert_folder(folder / "raw")
    return folder / "raw" / "wds"


def processes_of(output: Path) -> list[str]:
    """Command lines of the living processes of a run."""
    table = subprocess.run(["ps", "-A", "-o", "stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in table.splitlines() if f"--output={output}" in line and not line.startswith("Z")]


def test_a_folder_in_use_a_killed_launcher_and_a_damaged_checkpoint(mcore, dataset, tmp_path):
    output = tmp_path / "out"
    arguments = {"DATASET_PATH": dataset, "PRETRAIN_CHECKPOINT_PATH": mcore, "TRAIN_ITERS": 5000, "SAVE_INTERVAL": 2}
    flags = ("--num-workers", 1, "--keep-checkpoints", 2, "--async-save", "true")
    words = [str(word) for word in ("sh", TRAIN, *train_arguments(output, **arguments), *flags)]
    with subprocess.Popen(words, cwd="/", env=environment(), stdout=subprocess.PIPE, text=True) as first:
        for line in first.stdout:
            if "saved" in line:
                break
        second = call(*words, cwd="/")
        assert second.returncode == 1
        assert second.stderr == (
            f"error: rank 0: {output}/checkpoint: another run is writing it; wait for its end, or give another output\n"
        )
        assert first.poll() is None

        os.kill(first.pid, 9)
        end = time.monotonic() + 10
        while processes_of(output) and time.monotonic() < end:
            time.sleep(0.2)
        assert not processes_of(output)

    damaged = checkpoint_folder(output / "checkpoint") / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again = call("sh", TRAIN, *train_arguments(output, **arguments), *flags, cwd="/")
    assert again.returncode == 1
    (line,) = again.stderr.splitlines()
    assert f"{damaged}: not what was written" in line
    assert "Traceback" not in again.stdout
    assert "Traceback" in (output / "log" / "rank_000.log").read_text()
