"""Arguments of conversions, and those that must be refused."""

from __future__ import annotations

from pathlib import Path

from megatron_patch.conversion.commands import main


def importing(mistral: Path, clip: Path, target: Path, **changed: object) -> list[str]:
    """Arguments for Hugging Face -> TP2 shards."""
    return as_flags(
        source_llm_ckpt_path=mistral,
        source_clip_ckpt_path=clip,
        target_ckpt_path=target,
        **{"tensor_model_parallel_size": 2, "precision": "fp32", **changed},
    )


def exporting(checkpoint: Path, target: Path, **changed: object) -> list[str]:
    """Arguments for shards -> Hugging Face."""
    return as_flags(source_llm_ckpt_path=checkpoint, target_ckpt_path=target, precision="fp32", mg2hf="true", **changed)


def as_flags(**settings: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, arguments: list[str], *words: object) -> str:
    """Run it here: it must fail with one line that has these words."""
    capsys.readouterr()
    assert main(arguments) == 1
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    for word in words:
        assert str(word) in lines[0]
    return lines[0]
