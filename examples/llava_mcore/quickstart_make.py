"""What the quickstart works on, made here and not downloaded: two small models and a set of captioned pictures.

    python quickstart_make.py FOLDER

writes FOLDER/llm (a Mistral with its tokenizer), FOLDER/clip (a CLIP vision tower), both with random weights,
FOLDER/LLaVA-Pretrain (pictures to train on, in the layout of the data set of that name) and FOLDER/held_out (pictures
that are never trained on).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from megatron_patch.families.hf_config import describe_vision_model, preprocessor_config

PICTURE_SIZE = 56
# Pictures are drawn larger and scaled down, which smooths the edges.
OVERSAMPLING = 3
JPEG_QUALITY = 92
PICTURES_PER_FOLDER = 1000

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle")
# From the second object to the first, in units of the picture; y grows downwards.
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
QUESTIONS = ("Describe the picture.", "What do you see?", "Write a caption.")


@dataclass(frozen=True)
class Scene:
    """Two objects and how the large one lies to the small one: everything that a caption says."""

    large: tuple[str, str]
    relation: str
    small: tuple[str, str]

    @property
    def caption(self) -> str:
        """The one right caption; the large object comes first, so no picture has a second one."""
        return f"a large {' '.join(self.large)} {self.relation} a small {' '.join(self.small)}"


def random_scene(rng: random.Random) -> Scene:
    """One of the 1,296 scenes, each as likely as another."""

    def thing() -> tuple[str, str]:
        return rng.choice(list(COLOURS)), rng.choice(SHAPES)

    return Scene(thing(), rng.choice(list(RELATIONS)), thing())


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of `scene`: sizes, places, shades and the background vary, what the caption says does not."""
    side = PICTURE_SIZE * OVERSAMPLING
    grey = rng.randint(25, 80)
    image = Image.new("RGB", (side, side), tuple(grey + rng.randint(-12, 12) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    along, across = rng.uniform(0.205, 0.225), rng.uniform(-0.04, 0.04)
    dx, dy = RELATIONS[scene.relation]
    x, y = 0.5 + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.02, 0.02)
    step = (dx * along + dy * across, dy * along + dx * across)
    for (colour, shape), sign, radius in (
        (scene.large, 1, rng.uniform(0.205, 0.225)),
        (scene.small, -1, rng.uniform(0.135, 0.15)),
    ):
        shade = tuple(max(0, min(255, part + rng.randint(-15, 15))) for part in COLOURS[colour])
        _draw_shape(pen, shape, ((x + sign * step[0]) * side, (y + sign * step[1]) * side), radius * side, shade)
    return image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, fill: tuple) -> None:
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        corners = [math.radians(angle) for angle in (-90, 30, 150)]
        middle = y + radius / 5
        pen.polygon([(x + 1.2 * radius * math.cos(a), middle + 1.2 * radius * math.sin(a)) for a in corners], fill=fill)


def save_pictures(folder: Path, count: int, seed: int) -> None:
    """`count` pictures in LLaVA-Pretrain's layout: folders of .jpg and one json of conversations."""
    rng = random.Random(seed)
    entries = []
    for index in range(count):
        scene = random_scene(rng)
        name = f"{index // PICTURES_PER_FOLDER:05d}/{index:09d}.jpg"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(scene, rng).save(path, quality=JPEG_QUALITY, subsampling=0)
        question = rng.choice(QUESTIONS)
        # LLaVA-Pretrain puts the picture before the question in some entries and after it in others.
        prompt = f"<image>\n{question}" if rng.random() < 0.5 else f"{question}\n<image>"
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": scene.caption}]
        entries.append({"id": f"{index:09d}", "image": name, "conversations": turns})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(entries))


def all_captions() -> Iterator[str]:
    """Every caption there can be."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for large in things:
        for relation in RELATIONS:
            for small in things:
                yield Scene(large, relation, small).caption


def save_tokenizer(folder: Path) -> int:
    """A BPE tokenizer built as Mistral's is (bytes for what is unknown, words that carry their space); its length."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=words, show_progress=False)
    tokenizer.train_from_iterator([*all_captions(), *QUESTIONS * 9], trainer)
    # The trainer makes every given word special; the bytes must stay plain, or decoding would drop them.
    learned = json.loads(tokenizer.to_str())
    learned["added_tokens"] = [token for token in learned["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(learned))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_language_model(folder: Path, seed: int) -> None:
    """A Mistral of 0.8M parameters with grouped-query attention, random weights and its tokenizer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    vocab_size = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        # 1 / sqrt(hidden size); the default, 0.02, suits wider models and learns slowly here.
        initializer_range=0.09,
        tie_word_embeddings=False,
    )
    MistralForCausalLM(config).save_pretrained(folder)


def save_vision_tower(folder: Path, seed: int) -> None:
    """A CLIP vision tower of 0.7M parameters, random weights and its image processor."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        # LLaVA takes the second last layer's output, so the fourth is carried along and not used.
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=14,
        projection_dim=64,
        hidden_act="quick_gelu",
        initializer_range=0.1,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    preprocessor = preprocessor_config(describe_vision_model(config.to_dict()))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=20000, help="pictures to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=500, help="pictures to judge by (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of pictures and weights (default: %(default)s)")
    args = parser.parse_args()
    save_pictures(args.folder / "LLaVA-Pretrain", args.train, args.seed)
    save_pictures(args.folder / "held_out", args.held_out, args.seed + 1)
    save_language_model(args.folder / "llm", args.seed)
    save_vision_tower(args.folder / "clip", args.seed)
    print(f"{args.train} pictures to train on, {args.held_out} held out, two models: {args.folder}")


if __name__ == "__main__":
    main()
