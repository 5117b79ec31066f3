"""The 23 arguments without a run: the published line's configuration, and what each argument alone changes in it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_patch.config.flags import parse
from megatron_patch.config.train import Checkpoint, Config, Data, Model, Optimizer, Parallel, Training
from megatron_patch.estimate.cards import CARDS
from megatron_patch.estimate.report import suggest
from tests.end_to_end.scripts import TRAIN
from tests.unit.config.test_train import LLAVA

# As tutorials of Pai-Megatron-Patch have it.
PUBLISHED = (
    "dsw 7B 1 256 0.00015 1e-5 576 1024 bf16 4 1 1 true true true false 100000 "
    "/mnt/LLaVA-Pretrain/wds /mnt/LLaVA-Pretrain/wds /mnt/mistral-clip-tp4 20000 200 /workspace/output"
).split()

MEANING = Config(
    model=Model(
        model_size="7B",
        seq_length=576,
        decoder_seq_length=1024,
        precision="bf16",
        use_flash_attn=True,
        pretrained_checkpoint=Path("/mnt/mistral-clip-tp4"),
        # Not among the arguments; as the tutorial has them.
        freeze_lm=True,
        freeze_vit=True,
    ),
    parallel=Parallel(
        env="dsw",
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        use_distributed_optimizer=True,
    ),
    data=Data(
        micro_batch_size=1,
        global_batch_size=256,
        data_path=Path("/mnt/LLaVA-Pretrain/wds"),
        valid_data_path=Path("/mnt/LLaVA-Pretrain/wds"),
    ),
    optimizer=Optimizer(
        lr=0.00015,
        min_lr=1e-5,
        lr_warmup_iters=200,
        optimizer_offload="false",
        # Not among the arguments; as the tutorial has them.
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.01,
        clip_grad=1.0,
    ),
    training=Training(train_iters=20000, recompute="true"),
    checkpoint=Checkpoint(output=Path("/workspace/output"), save_interval=100000),
)

CHANGES = (  # argument, another value, the one setting that follows
    (1, "dlc", {"env": "dlc"}),
    (2, "13B", {"model_size": "13B"}),
    (3, "2", {"micro_batch_size": 2}),
    (4, "128", {"global_batch_size": 128}),
    (5, "1e-3", {"lr": 1e-3}),
    (6, "0", {"min_lr": 0.0}),
    (7, "256", {"seq_length": 256}),
    (8, "2048", {"decoder_seq_length": 2048}),
    (9, "fp32", {"precision": "fp32"}),
    (10, "2", {"tensor_model_parallel_size": 2}),
    (11, "2", {"pipeline_model_parallel_size": 2}),
    (12, "2", {"context_parallel_size": 2}),
    (13, "false", {"use_distributed_optimizer": False}),
    (14, "false", {"use_flash_attn": False}),
    (15, "full", {"recompute": "full"}),
    (16, "static", {"optimizer_offload": "static"}),
    (17, "500", {"save_interval": 500}),
    (18, "other data", {"data_path": Path("other data")}),
    (19, "none", {"valid_data_path": None}),
    (20, "other weights", {"pretrained_checkpoint": Path("other weights")}),
    (21, "300", {"train_iters": 300}),
    (22, "0", {"lr_warmup_iters": 0}),
    (23, "an output", {"output": Path("an output")}),
)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The script in a checkout of its own, whose interpreter only says what it was asked to run."""
    root = tmp_path_factory.mktemp("check out")
    copy = root / "examples/llava_mcore" / TRAIN.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(TRAIN.read_bytes())
    interpreter = root / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    interpreter.chmod(0o755)
    return copy


def settings_of(script: Path, *arguments: str) -> Config:
    """What pretrain_llava.py would be told to do."""
    result = subprocess.run(["sh", script, *arguments], cwd="/", capture_output=True, text=True, check=True)
    program, *flags = result.stdout.rstrip("\0").split("\0")
    assert program == str(script.with_name("pretrain_llava.py"))
    return parse(Config, flags)


def flat(config: Config) -> dict[str, object]:
    return {name: value for part in dataclasses.asdict(config).values() for name, value in part.items()}


def test_the_published_line_means_what_it_says(script):
    assert settings_of(script, *PUBLISHED) == MEANING


@pytest.mark.parametrize(("position", "value", "expected"), CHANGES, ids=[next(iter(change[2])) for change in CHANGES])
def test_an_argument_changes_its_own_setting_alone(script, position, value, expected):
    arguments = [*PUBLISHED[: position - 1], value, *PUBLISHED[position:]]
    before, after = flat(MEANING), flat(settings_of(script, *arguments))
    assert {name: setting for name, setting in after.items() if setting != before[name]} == expected


def test_flags_behind_the_arguments_win(script):
    config = settings_of(script, *PUBLISHED, "--freeze-lm", "false", "--lr=2e-5", "--seed", "7")
    before = flat(MEANING)
    changed = {name: setting for name, setting in flat(config).items() if setting != before[name]}
    assert changed == {"freeze_lm": False, "lr": 2e-5, "seed": 7}


@pytest.mark.parametrize("page", ["README.md", "README_zh-CN.md"])
def test_the_walk_through_recommends_what_the_plan_suggests(script, page):
    """Stage 1 of a frozen 7B on an 80 GB GPU: without tensor parallelism and recomputation, eight samples at once."""
    blocks = re.findall(r"```sh\n(.*?)```", TRAIN.with_name(page).read_text(), re.DOTALL)
    lines = [block.replace("\\\n", " ") for block in blocks if block.startswith("sh examples/llava_mcore/run_mcore")]
    published, fast = (settings_of(script, *shlex.split(line)[2:]) for line in lines)
    before, after = flat(published), flat(fast)
    changed = {name: setting for name, setting in after.items() if setting != before[name]}
    assert changed == {"tensor_model_parallel_size": 1, "micro_batch_size": 8, "recompute": "none"}
    assert suggest(published, LLAVA, 4, CARDS["H100"], CARDS["H100"].memory).config == fast
