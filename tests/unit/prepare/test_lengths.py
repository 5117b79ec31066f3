"""Token counts: those of the samples that training makes of the same shards."""

import json
from collections import Counter

import pytest

from megatron_patch.data.loader import train_loader, valid_loader
from megatron_patch.prepare.lengths import Lengths
from tests.tiny import save_tokenizer
from tests.unit.data.samples import convert_folder, describe, settings, write_annotations, write_pretrain


@pytest.mark.parametrize("workers", [1, 2])
def test_lengths_are_those_of_training(workers, tmp_path):
    model = describe(tmp_path / "model")
    tower = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7}
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"text_config": {"model_type": "mistral"}, "vision_config": tower})
    )
    entries = write_pretrain(tmp_path / "data", 20)
    for index, sample in enumerate(entries[:10]):
        sample["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "so on " * index}]
    entries[11]["image"] = "nowhere.jpg"
    del entries[12]["image"]
    entries[12]["conversations"][0]["value"] = "Nothing to see?"
    write_annotations(tmp_path / "data", entries)
    report = convert_folder(
        tmp_path / "data", tokenizer=str(tmp_path / "model"), max_rejected_share=0.5, workers=workers
    )
    config = settings(tmp_path / "model", tmp_path / "data" / "wds", num_workers=0, micro_batch_size=1)
    found = {}
    for loader in (train_loader, valid_loader):
        for batch, _ in zip(loader(config, model, rank=0, world_size=1), range(100), strict=False):
            found[batch.keys[0]] = int((batch.labels[0] != -100).nonzero().max()) + 1
    assert len(found) == report.written == 18  # an empty answer is the other rejected one
    assert report.lengths.counts == Counter(found.values())
    assert report.lengths.num_image_tokens == 16


def test_a_language_model_alone_counts_pictures_as_llavas(tmp_path):
    save_tokenizer(tmp_path / "model", 300)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mistral"}')
    write_pretrain(tmp_path / "data", 10)
    report = convert_folder(tmp_path / "data", tokenizer=str(tmp_path / "model"), dry_run=True)
    assert report.lengths.quantile(0.5) > 576
    assert str(report.lengths).startswith("tokens (mistral, 576 an image): median ")
    with pytest.raises(ValueError, match=r"--tokenizer .*: no config\.json in it; expected a model's folder"):
        convert_folder(tmp_path / "data", tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", "[", "its config.json is no model's"),
        ("config.json", '{"vision_config": 7}', "its config.json is no model's"),
        (
            "config.json",
            '{"vision_config": {"model_type": "x"}}',
            "no model's .vision tower: model_type 'x' is not supp",
        ),
        ("tokenizer.json", "{}", "its tokenizer is not readable"),
        ("tokenizer.json", None, "neither tokenizer.json nor tokenizer.model"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: holds a list"),
    ],
)
def test_a_damaged_model_is_refused_before_anything_is_written(name, content, why, tmp_path):
    save_tokenizer(tmp_path / "model", 300)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mistral", "vision_config": null}')
    write_pretrain(tmp_path / "data", 10)
    path = tmp_path / "model" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=f"--tokenizer .*{why}") as caught:
        convert_folder(tmp_path / "data", tokenizer=str(tmp_path / "model"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "wds.partial").exists()


def test_the_suggestion_holds_nearly_all():
    lengths = Lengths(counts=Counter({600: 5000, 700: 4990, 705: 5, 3000: 5}), prompt_format="v1", num_image_tokens=576)
    assert [lengths.quantile(share) for share in (0.5, 0.999, 1)] == [600, 700, 3000]
    assert lengths.suggested == 704
    assert str(lengths).endswith("longest 3000; DECODER_SEQ_LEN 704 holds all but 10 samples")
