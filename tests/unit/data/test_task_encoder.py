"""From a sample to a micro batch."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.energon import SkipSample, VQASample
from PIL import Image

from megatron_patch.config.train import Parallel
from megatron_patch.data.task_encoder import LlavaTaskEncoder
from megatron_patch.data.tokenizer_files import install_tokenizer
from tests.unit.data.samples import CLIP, QUESTION, describe, encode, jpeg, settings


@pytest.fixture(scope="module")
def encoder(model):
    return LlavaTaskEncoder(settings(model[0]), model[1])


def sample(image=None, context=QUESTION, answers="a cat", key="0001"):
    image = jpeg((9, 8, 7)) if image is None else image
    return VQASample(__key__=key, __restore_key__=(), image=image, context=context, answers=answers)


def text_only(answers="a cat"):
    given = sample(context="Name a pet.", answers=answers, key="text")
    given.image = None
    return given


def test_batch_is_padded_to_its_longest_and_a_multiple_of_8(encoder):
    samples = [encode(encoder, given) for given in (sample(answers="a" * 9), text_only(), sample(answers="b"))]
    batch = encoder.batch(samples)
    longest = len(samples[0].input_ids)
    length = -(-longest // 8) * 8
    assert batch.keys == ["0001", "text", "0001"]
    assert batch.input_ids.shape == batch.labels.shape == (3, length)
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.pixels.dtype) == (torch.int64, torch.int64, torch.uint8)
    # Two images for three samples, in the order of their placeholders.
    assert batch.pixels.shape == (2, 3, 28, 28)
    assert (batch.input_ids == encoder.llava.image_token_id).sum(dim=1).tolist() == [16, 0, 16]
    for row, given in enumerate(samples):
        size = len(given.input_ids)
        assert torch.equal(batch.input_ids[row, :size], given.input_ids)
        assert torch.equal(batch.labels[row, :size], given.labels)
        assert (batch.labels[row, size:] == -100).all()


def test_keys_are_shown_without_control_characters(encoder):
    """They come from a dataset, and go into logs."""
    batch = encoder.batch([encode(encoder, sample(key="00\x1b[2J\n01" + "k" * 999))])
    assert batch.keys[0].isprintable()
    assert len(batch.keys[0]) <= 200


def test_batch_without_pictures(encoder):
    batch = encoder.batch([encode(encoder, text_only())])
    assert batch.pixels.shape == (0, 3, 28, 28)


def test_batch_is_never_longer_than_the_decoder_and_says_what_was_cut(model):
    encoder = LlavaTaskEncoder(settings(model[0], length=61), model[1])
    batch = encoder.batch([encode(encoder, given) for given in (sample(answers="x" * 100), sample(answers="x"))])
    assert batch.input_ids.shape == (2, 61)
    assert batch.num_truncated == 1


def test_turns_that_do_not_fit_are_not_written(model, monkeypatch):
    encoder, written = LlavaTaskEncoder(settings(model[0], length=61), model[1]), []

    def pieces(turns):
        for turn in range(100):
            written.append(turn)
            yield "[INST] What is it?[/INST]", False
            yield " It is a cat.</s>", True

    monkeypatch.setattr(encoder, "prompt", SimpleNamespace(pieces=pieces))
    assert encode(encoder, text_only()).num_truncated > 0
    assert len(written) < 10


def test_marked_pictures(model, tmp_path):
    folder = tmp_path / "marked"
    llava = describe(folder)
    config = settings(folder, use_im_start_end=True)
    with pytest.raises(ValueError, match=r"--use-im-start-end true: .* no tokens <im_start> and <im_end>; .* neva"):
        LlavaTaskEncoder(config, llava)
    ids = install_tokenizer(folder / "language_model", folder, ["<im_start>", "<im_end>"])
    given = encode(LlavaTaskEncoder(config, llava), sample())
    image = (given.input_ids == ids["<image>"]).nonzero().flatten().tolist()
    assert len(image) == 16
    assert given.input_ids[[image[0] - 1, image[-1] + 1]].tolist() == [ids["<im_start>"], ids["<im_end>"]]


def test_packs_fill_sequences_and_keep_the_order(model):
    config = settings(model[0], length=128, packing_buffer_size=20, micro_batch_size=1)
    encoder = LlavaTaskEncoder(config, model[1])
    texts = [
        encoder.preencode_sample(sample(answers="x" * (7 * index % 40 + 1), key=str(index))) for index in range(20)
    ]
    packs = encoder.select_samples_to_pack(texts)
    assert sorted(int(text.__key__) for pack in packs for text in pack) == list(range(20))
    lengths = [sum(len(text.input_ids) for text in pack) for pack in packs]
    assert max(lengths) <= 128
    # No worse than one more than the sum of all would need.
    assert len(packs) <= -(-sum(lengths) // 128) + 1
    firsts = [int(pack[0].__key__) for pack in packs]
    assert firsts == sorted(firsts)
    with pytest.raises(SkipSample):
        encoder.pack_selected_samples([])


@pytest.mark.parametrize(
    ("sizes", "multiple"), [({}, 1), ({"context_parallel_size": 2, "tensor_model_parallel_size": 3}, 12)]
)
def test_a_pack_is_one_row_of_whole_samples(sizes, multiple, model):
    """Every sample with its own padding, to what context- and tensor-parallel ranks can share; the row to 8 as well."""
    config = settings(model[0], packing_buffer_size=20, micro_batch_size=1)
    encoder = LlavaTaskEncoder(replace(config, parallel=Parallel(**sizes)), model[1])
    samples = [
        encode(encoder, given) for given in (sample(answers="a" * 9), text_only(), sample(answers="b", key="0002"))
    ]
    batch = encoder.batch([encoder.pack_selected_samples(samples)])
    assert batch.keys == ["0001", "text", "0002"]
    assert batch.pixels.shape == (2, 3, 28, 28)
    assert batch.input_ids.shape == batch.labels.shape == (1, sum(batch.segment_lengths))
    assert sum(batch.segment_lengths) % 8 == 0
    rows = zip(
        samples,
        batch.input_ids[0].split(batch.segment_lengths),
        batch.labels[0].split(batch.segment_lengths),
        strict=True,
    )
    for given, ids, labels in rows:
        size = len(given.input_ids)
        assert len(ids) % multiple == 0
        assert torch.equal(ids[:size], given.input_ids)
        assert torch.equal(labels[:size], given.labels)
        assert (labels[size:] == -100).all()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (sample(context="no image asked for"), "questions have 0 <image>, expected 1"),
        (sample(context="<image> or <image>?"), "questions have 2 <image>, expected 1"),
        (sample(answers="an <image>"), "answers have 1 <image>, expected 0"),
        (sample(answers=["one", "two"]), "expected one text"),
        (sample(answers=" "), "answer is empty"),
        (sample(answers=None), "expected one text"),
        (sample(image=jpeg((0, 0, 0))[:-20]), "image cannot be read"),
        (sample(image=b""), "image cannot be read"),
        (sample(context="<image>" + "long " * 100), "no answer within 256"),
    ],
)
def test_what_cannot_be_trained_on_names_the_key(given, why, encoder):
    with pytest.raises(ValueError, match=f"^sample 0001: .*{why}"):
        encode(encoder, given)


def test_png_under_the_name_jpg(encoder):
    file = io.BytesIO()
    Image.new("RGB", (50, 40), (1, 2, 3)).save(file, "PNG")
    assert encode(encoder, sample(image=file.getvalue())).pixels[0, :, 5, 5].tolist() == [1, 2, 3]


def test_pictures_of_another_size_than_the_towers_are_refused(tmp_path):
    llava = describe(tmp_path)
    changed = {**CLIP, "crop_size": {"height": 14, "width": 14}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"crop_size is \(14, 14\), but the vision tower takes 28"):
        LlavaTaskEncoder(settings(tmp_path), llava)


def test_another_image_token_than_the_configs_is_refused(model):
    with pytest.raises(ValueError, match=r"<image> is 300 in the tokenizer and 7 in config\.json"):
        LlavaTaskEncoder(settings(model[0]), replace(model[1], image_token_id=7))
