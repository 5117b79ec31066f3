"""generation_config.json of an export: `generate` stops where training ended its answers, and transformers saves it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_patch.conversion.companions import GENERATION_CONFIG, read_json, write_json

# Vicuna's file has two of them without do_sample: transformers 4.57 loads that, ignores it, and refuses to save it.
FOR_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
FOR_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def write_generation(folder: Path, config: dict[str, Any], tokenizer: Any, end: int | None) -> dict[str, Any]:
    """Write `folder`/generation_config.json, and return `config` (a LlavaConfig) with the same ends of an answer.

    `end`: id of the token that training ends an answer with; those that the file and `config` name already stay beside
    it. `tokenizer`: the export's, whose padding token is named. What the file says besides stays, as far as
    transformers can save it; what does not is named in a line. Raises ValueError for a file that holds no object.
    """
    folder = Path(folder)
    own = read_json(folder, GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
    text = config["text_config"]
    known = [end, *_ids(own.get("eos_token_id")), *_ids(text.get("eos_token_id")), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(id for id in known if id is not None and 0 <= id < len(tokenizer)))
    stop = ends[0] if len(ends) == 1 else ends
    settings, left_out = _savable({name: value for name, value in own.items() if name not in (*IDS, "auto_map")})
    if left_out:
        print(
            f"warning: {folder.name}/{GENERATION_CONFIG}: without {', '.join(left_out)[:200]}, which transformers "
            "ignores there and refuses to save",
            file=sys.stderr,
        )
    bos = next((id for id in (*_ids(own.get("bos_token_id")), tokenizer.bos_token_id) if id is not None), None)
    ids = {"bos_token_id": bos, "eos_token_id": stop or None, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder, GENERATION_CONFIG, {**settings, **{name: id for name, id in ids.items() if id is not None}})
    if not ends:
        return config
    return {**config, "eos_token_id": stop, "text_config": {**text, "eos_token_id": stop}}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int) and not isinstance(id, bool) and id >= 0]


def _savable(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings that transformers saves again, and the names of the others."""
    from transformers import GenerationConfig

    unused = () if settings.get("do_sample") is True else FOR_SAMPLING
    unused = unused if _ids(settings.get("num_beams")) > [1] else (*unused, *FOR_BEAMS)
    left_out = [name for name in settings if name in unused and settings[name] is not None]
    # That it was made of config.json, in which case transformers makes it again: that one has other ends.
    dropped = (*left_out, "_from_model_config", "transformers_version")
    settings = {name: value for name, value in settings.items() if name not in dropped}
    try:
        made = GenerationConfig(**settings)
        made.validate(strict=True)
        json.dumps(made.to_dict())
    except Exception:  # of any class, as the types are not checked before
        return {}, [*left_out, *settings]
    return settings, left_out
