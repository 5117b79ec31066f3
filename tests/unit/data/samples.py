"""What the data tests work on: a described model, and LLaVA-Pretrain folders of drawn images."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.energon import Sample
from PIL import Image

from megatron_patch.config.train import Checkpoint, Config, Data, Model, Optimizer, Training
from megatron_patch.data.task_encoder import EncodedSample, LlavaTaskEncoder
from megatron_patch.data.tokenizer_files import install_tokenizer
from megatron_patch.families.clip import CLIP as CLIP_TOWER
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.families.sizes import LanguageModel, Llava, VisionModel
from megatron_patch.prepare import ANNOTATIONS, Report, Settings, convert
from tests.tiny import save_tokenizer

PHOTO_SIZES = ((500, 333), (333, 500), (336, 336), (640, 427), (224, 300), (1100, 120), (90, 70))
"""Width and height in pixels, in turn."""
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
QUESTION = "<image>\nDescribe it."


def describe(folder: Path) -> Llava:
    """Write tokenizer and preprocessor of a tiny LLaVA: 300 words, images of 28 pixels that take 16 positions."""
    save_tokenizer(folder / "language_model", 300)
    image_token_id = install_tokenizer(folder / "language_model", folder)["<image>"]
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP))
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    return Llava(
        language=LanguageModel(
            family=MISTRAL,
            **sizes,
            num_query_groups=4,
            kv_channels=8,
            layernorm_epsilon=1e-5,
            vocab_size=300,
            rotary_base=1e4,
            max_position_embeddings=512,
        ),
        vision=VisionModel(family=CLIP_TOWER, **sizes, layernorm_epsilon=1e-5, patch_dim=7, img_size=28),
        image_token_id=image_token_id,
    )


def settings(description: Path, dataset: Path = Path("unused"), *, seed: int = 1, length: int = 256, **data) -> Config:
    """A Config that trains the described model on `dataset`."""
    return Config(
        model=Model(model_config=description, decoder_seq_length=length),
        data=Data(data_path=dataset, valid_data_path=dataset, **data),
        optimizer=Optimizer(lr=1e-3),
        training=Training(train_iters=10, seed=seed),
        checkpoint=Checkpoint(output=Path("unused")),
    )


def encode(encoder: LlavaTaskEncoder, sample: Sample) -> EncodedSample:
    """Text, then images, as the loader does it."""
    return encoder.postencode_sample(encoder.preencode_sample(sample))


def jpeg(color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    """An encoded image of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


def entry(index: int) -> dict:
    """A good sample of LLaVA-Pretrain's json; its image is `00000/INDEX.jpg`."""
    return {
        "id": f"{index:06d}",
        "image": f"00000/{index:06d}.jpg",
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": f"image number {index}"},
        ],
    }


def write_pretrain(folder: Path, count: int) -> list[dict]:
    """A LLaVA-Pretrain folder of `count` drawn images; returns its json, to be changed and written again."""
    (folder / "00000").mkdir(parents=True)
    entries = [entry(index) for index in range(count)]
    for index, sample in enumerate(entries):
        (folder / sample["image"]).write_bytes(jpeg((index % 256, 100, 200)))
    write_annotations(folder, entries)
    return entries


def write_annotations(folder: Path, entries: list) -> None:
    """(Re)write the json."""
    (folder / ANNOTATIONS).write_text(json.dumps(entries))


def write_dataset(folder: Path, samples: Sequence[dict[str, bytes]], yaml: str) -> Path:
    """An energon dataset of 10 shards, 9 of them to train on; of each sample the files by their extension."""
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder.mkdir(parents=True)
    names = [f"{shard}.tar" for shard in range(10)]
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for index in range(shard * len(samples) // 10, (shard + 1) * len(samples) // 10):
                for extension, data in samples[index].items():
                    member = tarfile.TarInfo(f"{folder.name}{index:03d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    split = [("train", 9.0), ("val", 1.0), ("test", 0.0)]
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            EPath(folder), names, split_parts_ratio=split, shuffle_seed=None, workers=1
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml)
    return folder


def but_in_transformers_4(names: Iterable[str], *others: str) -> list:
    """`names` as a test's parameters; `others` are those of them that only transformers 5 takes so."""
    return [pytest.param(name, marks=pytest.mark.transformers_5) if name in others else name for name in names]


def photo(index: int) -> bytes:
    """A JPEG like a camera's: shades under noise, each index another, every fifth gray."""
    width, height = PHOTO_SIZES[index % len(PHOTO_SIZES)]
    random = np.random.default_rng(index)
    across, down = np.linspace(0, 6, width)[:, None], np.linspace(0, 6, height)[:, None, None]
    shades = np.sin(across * random.uniform(0.2, 2, 3) + down * random.uniform(0.2, 2, 3) + random.uniform(0, 6, 3))
    pixels = 128 + 100 * shades + random.normal(0, 12, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("L" if index % 5 == 4 else "RGB")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60 + 5 * (index % 8), progressive=index % 2 == 1, subsampling=index % 3)
    return file.getvalue()


def write_photos(folder: Path, count: int) -> None:
    """A LLaVA-Pretrain folder of `count` images like photographs."""
    for index, sample in enumerate(write_pretrain(folder, count)):
        (folder / sample["image"]).write_bytes(photo(index))


def convert_folder(folder: Path, **settings) -> Report:
    """`folder`/wds from what is in `folder`, in this process."""
    return convert(Settings(dir=str(folder), **{"workers": 1, **settings}))
