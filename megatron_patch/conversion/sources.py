"""What an import reads: a language model and a tower, or a whole LLaVA, with the projector of either or a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_patch.conversion.companions import UNUSED
from megatron_patch.conversion.plan import append_mean_rows, check_hf, new_projector
from megatron_patch.families.hf_config import describe_vision_model
from megatron_patch.families.llava import hub_name, parts, rows, unused_shapes
from megatron_patch.families.llava_repository import TOWER, is_repository
from megatron_patch.families.sizes import Llava, plain
from megatron_patch.files.json_object import read_json
from megatron_patch.files.names import CONFIG
from megatron_patch.stores.hf import HfReader, load_safetensors
from megatron_patch.stores.hf_files import refuse_adapter
from megatron_patch.stores.mm_projector import NAMES, read_mm_projector
from megatron_patch.stores.reader import InMemory, Joined, Reader, Views

EMBED_TOKENS = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"


@dataclass(frozen=True)
class Sources:
    """Weights of a whole LLaVA, wherever they lie."""

    reader: Reader
    """All tensors under the hub's names."""

    unused: dict[str, tuple[int, ...]]
    """Names and shapes of those that transformers' model has and megatron.core's has not."""

    files: list[Path]


def open_sources(llava: Llava, llm: Path, clip: Path | None, projector: Path | None, seed: int) -> Sources:
    """The weights in the folders `llm` and `clip`. `clip` None: `llm` is a whole LLaVA.

    `projector`: LLaVA's mm_projector.bin; None: new weights, drawn with `seed`. Raises ValueError or OSError, one line
    that names the file, for what is missing, damaged or contradictory.
    """
    if clip is None:
        models = [open_model(llm, partial(hub_name, llava))]
        reader = models[0]
    else:
        language, tower, connector = parts(llava)
        config = read_json(llm / CONFIG) if (llm / CONFIG).is_file() else {}
        if is_repository(config):
            models = [open_model(llm, partial(_repository_name, llava)), open_model(clip, tower.hub_name)]
            reader = _with_tower(models[0], models[1], bool(config.get("unfreeze_mm_vision_tower")))
        else:
            models = [open_model(llm, language.hub_name), open_model(clip, tower.hub_name)]
            if projector is None:
                # Before anything is made in the sizes that config.json says, the weights have to have them.
                known = [*language.rows(), *tower.rows()]
                there = _without_tied_copy(llava, Joined(models))
                check_hf(known, there, unused_shapes(llava, there))
                last = InMemory(new_projector(connector.rows(), seed), "the new projector")
            else:
                last = read_mm_projector(projector)
            reader = Joined([*models, last])
    reader = _without_tied_copy(llava, reader)
    unused = unused_shapes(llava, reader)
    check_hf(rows(llava), reader, unused)
    files = [path for model in models for path in model.files()]
    return Sources(reader, unused, files)


def open_model(folder: Path, rename: Callable[[str], str | None]) -> HfReader:
    """A Hugging Face folder's model (`HfReader`), which no adapter would change."""
    refuse_adapter(folder)
    return HfReader(folder, rename)


def with_rows(reader: Reader, llava: Llava, num_rows: int) -> Views:
    """A model (the hub's names) with `num_rows` rows in embedding and output layer; new ones are the others' mean."""
    tables = {name for weight in rows(llava) if weight.layout == "vocab" for name in weight.hf}
    views = {name: reader.view(name) for name in reader}
    longer = {name: append_mean_rows(views[name], num_rows) for name in tables if views[name].shape[0] < num_rows}
    return Views({**views, **longer}, reader)


def open_unused(llava: Llava, carriers: Sequence[Path], clip: Path | None, check: bool = True) -> Reader:
    """The tensors that transformers' model has and megatron.core's has not, for an export.

    As the import kept them in the first of `carriers` that has them (`check`: compared with their sha256), or those of
    the tower in `clip`. Raises ValueError or FileNotFoundError, one line, when they are in neither.
    """
    kept = next((path / UNUSED for path in carriers if (path / UNUSED).is_file()), None)
    if kept is not None:
        reader = InMemory(load_safetensors(kept, check), str(kept))
    elif clip is not None:
        _check_same_tower(llava, clip)
        _, tower, _ = parts(llava)
        reader = open_model(clip, tower.hub_name)
    else:
        raise FileNotFoundError(
            f"{carriers[0] / UNUSED}: missing; it holds the tower's last layers, which no training uses; give "
            "the tower's folder with --source-clip-ckpt-path"
        )
    shapes = unused_shapes(llava, reader)
    for name, shape in shapes.items():
        if name not in reader or reader.shape(name) != shape:
            raise ValueError(
                f"{reader.source}: has no {name} of shape {list(shape)}; give another --source-clip-ckpt-path or copy "
                "it again"
            )
    return Views({name: reader.view(name) for name in shapes}, reader)


def _check_same_tower(llava: Llava, folder: Path) -> None:
    """Raise ValueError where the tower in `folder` has other sizes than the model's, or is another kind."""
    tower = llava.vision
    try:
        given = describe_vision_model(read_json(folder / CONFIG), tower.num_layers, tower.select_strategy)
    except ValueError as error:
        raise ValueError(error if str(folder) in str(error) else f"{folder / CONFIG}: {error}") from None
    own, other = plain(tower), plain(given)
    for name in own:
        if own[name] != other[name]:
            raise ValueError(
                f"--source-clip-ckpt-path {folder}: {name} is {other[name]}, and {own[name]} in the checkpoint; give "
                "the folder of the tower that it was made of"
            )


def _repository_name(llava: Llava, name: str) -> str | None:
    """The hub's name of a tensor in a checkpoint of the LLaVA repository."""
    language, tower, _ = parts(llava)
    if name.startswith(TOWER):
        return tower.hub_name(name.removeprefix(TOWER))
    return NAMES.get(name) or language.hub_name(name)


def _with_tower(model: Reader, clip: Reader, was_trained: bool) -> Reader:
    """A checkpoint of the LLaVA repository with its tower, which is the one in `clip` unless it `was_trained`.

    As LLaVA loads it: a tower in the checkpoint is read where it was trained, else by its name. Raises
    ValueError where a tower in it is another than the one that is given.
    """
    own = [name for name in model if name in clip]
    if was_trained and own:
        return model
    for name in own:
        there, given = model[name], clip[name]
        if there.shape != given.shape or not torch.equal(there, given.to(there.dtype)):
            raise ValueError(
                f"{model.source_of(name)}: its tower's {name} is not that of {clip.source}; give the tower that this "
                "LLaVA was trained on, or say unfreeze_mm_vision_tower true in its config.json if the tower was trained"
            )
    return Joined([Views({name: model.view(name) for name in model if name not in clip}, model), clip])


def _without_tied_copy(llava: Llava, reader: Reader) -> Reader:
    """Leave out the output layer that some files of tied models hold. Raises ValueError when it is another tensor."""
    if not llava.language.share_embeddings_and_output_weights or not {LM_HEAD, EMBED_TOKENS} <= set(reader):
        return reader
    if not torch.equal(reader[LM_HEAD], reader[EMBED_TOKENS]):
        raise ValueError(
            f"{reader.source_of(LM_HEAD)}: the output layer is not the embedding, though config.json says "
            "tie_word_embeddings true; set it to false there"
        )
    return Views({name: reader.view(name) for name in reader if name != LM_HEAD}, reader)
