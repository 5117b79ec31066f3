"""Flags follow from the dataclasses, and a mistake is one line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_patch.config import train
from megatron_patch.config.dataset import Settings
from megatron_patch.config.flags import flag, help_texts, parse, walk
from megatron_patch.config.train import Config

REQUIRED = "--data-path data --lr 1e-3 --train-iters 9 --output out --pretrained-checkpoint weights".split()

# Renaming or dropping a flag breaks people's scripts: this list is changed on purpose only.
FLAGS = """
--model-size --pretrained-checkpoint --model-config --seq-length --decoder-seq-length --freeze-lm --freeze-vit
--precision --use-flash-attn --transformer-impl
--tensor-model-parallel-size --pipeline-model-parallel-size --virtual-pipeline-model-parallel-size
--context-parallel-size --sequence-parallel --env --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather
--data-path --valid-data-path --micro-batch-size --global-batch-size --num-workers --shuffle-buffer-size
--packing-buffer-size --prompt-format --image-transform --use-im-start-end --allow-dataset-code
--lr --min-lr --lr-warmup-iters --weight-decay --adam-beta1 --adam-beta2 --adam-eps --clip-grad
--use-precision-aware-optimizer --exp-avg-dtype --exp-avg-sq-dtype --optimizer-offload
--train-iters --recompute --recompute-method --recompute-num-layers
--seed --log-interval --eval-interval --eval-iters --log-captions --plan --exit-duration-in-mins
--distributed-timeout-minutes
--output --save-interval --async-save --keep-checkpoints --ckpt-step
""".split()


def error_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(Config, [*REQUIRED, *words])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_flags_are_frozen():
    assert [flag(setting.name) for _, setting, _ in walk(Config)] == FLAGS


def test_a_source_is_parsed_once_for_all_its_flags():
    assert help_texts(train.Model) is help_texts(train.Model)


def test_values_reach_their_fields():
    words = "--freeze-lm false --seq-length none --valid-data-path none --recompute sel --clip-grad 0.5".split()
    config = parse(Config, [*REQUIRED, *words])
    assert config.model.freeze_lm is False
    assert config.model.seq_length is None
    assert config.data.data_path == Path("data")
    assert config.data.valid_data_path is None
    assert config.training.recompute_granularity == "selective"
    assert config.optimizer.clip_grad == 0.5
    assert config.parallel.tensor_model_parallel_size == 1


def test_a_later_flag_wins():
    assert parse(Config, [*REQUIRED, "--seed", "1", "--seed", "2"]).training.seed == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--freeze-lm yes", "--freeze-lm 'yes': expected true or false"),
        ("--precision int8", "--precision 'int8': expected one of bf16, fp16, fp32, fp8"),
        ("--micro-batch-size x", "--micro-batch-size 'x': expected INT"),
        ("--micro-batch-sise 3", "--micro-batch-sise: no such flag; did you mean --micro-batch-size?"),
        ("stray", "stray: no such flag; --help lists them"),
        ("--exp-avg-dtype bf16", "--exp-avg-dtype bf16: needs --use-precision-aware-optimizer true; use fp32"),
        (
            "--context-parallel-size 2 --use-flash-attn false",
            "--use-flash-attn false: megatron.core's unfused attention",
        ),
        ("--sequence-parallel true", "--sequence-parallel true: needs --tensor-model-parallel-size of 2 or more"),
        ("--overlap-param-gather true", "needs --use-distributed-optimizer true and --overlap-grad-reduce true"),
        ("--virtual-pipeline-model-parallel-size 2", "needs --pipeline-model-parallel-size of 2 or more"),
        ("--recompute offload --recompute-num-layers 2", "--recompute-num-layers 2: needs --recompute full"),
        ("--recompute sel --recompute-method block", "--recompute-method block: needs --recompute full; use none"),
        ("--recompute-method some", "--recompute-method 'some': expected one of uniform, block"),
        ("--optimizer-offload static --use-distributed-optimizer false", "needs --use-distributed-optimizer true"),
        (
            "--packing-buffer-size 9 --micro-batch-size 2",
            "--micro-batch-size 2: packed samples are one sequence; use 1",
        ),
        ("--packing-buffer-size 9 --use-flash-attn false", "cannot tell packed samples apart; use true"),
        ("--min-lr 1", "--min-lr 1.0: expected a number from 0 to --lr 0.001"),
        ("--micro-batch-size 0", "--micro-batch-size 0: expected 1 or more"),
        ("--shuffle-buffer-size -1", "--shuffle-buffer-size -1: expected 0 or more"),
        ("--lr-warmup-iters 9", "--lr-warmup-iters 9: expected less than --train-iters 9"),
        ("--pretrained-checkpoint none", "--pretrained-checkpoint none: then --model-config is needed"),
    ],
)
def test_mistakes_are_one_line(capsys, words, said):
    assert said in error_of(capsys, *words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--precision fp8", "needs transformer-engine[pytorch], which is not installed; use bf16, fp16 or"),
        ("--transformer-impl transformer_engine", "pytorch], which is not installed; use auto"),
        ("--use-precision-aware-optimizer true", "transformer-engine[pytorch], which is not installed; use false"),
    ],
)
def test_what_needs_transformer_engine_is_refused_without(capsys, monkeypatch, words, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said in error_of(capsys, *words.split())


def test_transformer_engine_without_its_extension_is_refused(capsys, monkeypatch, tmp_path):
    """As `pip install transformer-engine` leaves it. (Mocks: empty files in the places of package and library.)"""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    said = error_of(capsys, "--transformer-impl", "transformer_engine")
    assert "which is installed without its part for torch (transformer_engine_torch); install that as README" in said
    for place in (tmp_path, package, package / "wheel_lib"):
        place.mkdir(exist_ok=True)
        library = place / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so"
        library.touch()
        assert parse(Config, [*REQUIRED, "--transformer-impl", "transformer_engine"])
        library.unlink()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--precision fp8 --transformer-impl local", "--transformer-impl local: these layers have no fp8; use auto"),
        ("--precision fp8 --recompute offload", "--precision fp8: not with --recompute offload"),
        ("--use-precision-aware-optimizer true --optimizer-offload static", "the CPU's Adam is plain; use one of them"),
        (
            "--use-precision-aware-optimizer true --use-distributed-optimizer false",
            "--use-precision-aware-optimizer true: needs --use-distributed-optimizer true",
        ),
    ],
)
def test_what_does_not_go_together_with_transformer_engine(capsys, monkeypatch, words, said):
    monkeypatch.setattr(train, "require_transformer_engine", lambda *words: None)
    assert said in error_of(capsys, *words.split())


def test_a_stray_empty_word_is_named(capsys):
    assert "'': no such flag" in error_of(capsys, "")


def test_help_has_a_sentence_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    text = capsys.readouterr().out
    for name in FLAGS:
        assert name in text
    assert "Ranks that share every layer's weights. Divides the attention heads" in text


@pytest.mark.parametrize(
    ("argv", "overwrite"),
    [
        (["data"], False),
        (["data", "--overwrite"], True),
        (["--overwrite", "data"], True),
        (["data", "--overwrite", "true"], True),
        (["--overwrite", "false", "data"], False),
        (["--overwrite=true", "data"], True),
        (["--overwrite", "--dry-run", "data"], True),
    ],
)
def test_beside_a_positional_a_flag_of_two_values_may_come_without_one(argv, overwrite):
    settings = parse(Settings, argv, positional="dir")
    assert (settings.dir, settings.overwrite) == ("data", overwrite)


def test_another_value_of_such_a_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["data", "--overwrite=yes"], positional="dir")
    assert "--overwrite 'yes': expected true or false" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(Settings, [], positional="dir")
    assert "DIR" in capsys.readouterr().err
