"""Several datasets as one, by weight."""

import json
import shutil
from itertools import islice

import pytest

from megatron_patch.data.loader import save_position
from tests.unit.data.loaders import assert_same, build, flat, resume, take
from tests.unit.data.samples import jpeg, write_dataset

CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
OWN = """\
sample_type:
  __module__: megatron_patch.data.conversation
  __class__: Conversation
sample_loader: sample_loader.py:sample_loader
part_filter: sample_loader.py:part_filter
"""
OWN_LOADER = """\
def sample_loader(raw):
    return {"turns": [("<image> " + raw["question.txt"], raw["answer.txt"])], "pictures": [raw["png"]]}


def part_filter(part):
    return part in ("question.txt", "answer.txt", "png")
"""
BLEND = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    blend:
      - {weight: 3, path: vqa}
      - {weight: 2, path: talk}
      - {weight: 1, path: own}
  val:
    path: vqa
"""

BLEND_OF_ONE = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    blend:
      - {weight: 1, path: "PATH"}
      - {weight: 1, path: "PATH"}
"""


@pytest.fixture(scope="module")
def blend(dataset, tmp_path_factory):
    """Three kinds of datasets: VQASample, several turns and images or none, one with its own sample_loader."""
    folder = tmp_path_factory.mktemp("blend")
    shutil.copytree(dataset, folder / "vqa")
    talks = []
    for index in range(30):
        places = "<image>" * (index % 3)
        turns = [("human", f"{places} what"), ("gpt", "a " * index), ("human", "and"), ("gpt", str(index))][
            index == 0 :
        ]
        talk = {"json": json.dumps([{"from": who, "value": text} for who, text in turns]).encode()}
        talk |= {name: jpeg((index, 0, 0)) for name in ("jpg", "1.jpg")[: index % 3]}
        talks.append(talk)
    write_dataset(folder / "talk", talks, CRUDE)
    own = [{"question.txt": b"who", "answer.txt": b"me", "png": jpeg((0, 0, index))} for index in range(20)]
    write_dataset(folder / "own", own, OWN)
    (folder / "own" / ".nv-meta" / "sample_loader.py").write_text(OWN_LOADER)
    (folder / "blend.yaml").write_text(BLEND)
    return folder / "blend.yaml"


def test_blends_of_all_kinds_keep_their_weights(model, blend):
    loader = build(model, blend, micro_batch_size=1, allow_dataset_code=True)
    batches = take(loader, 240)
    assert loader.failures.count == 0
    counts = [sum(key.startswith(kind) for key in flat(batches)) for kind in ("0", "talk", "own")]
    assert sum(counts) == 240
    assert [abs(count - share) < 25 for count, share in zip(counts, (120, 80, 40), strict=True)] == [True] * 3
    assert {len(batch.pixels) for batch in batches} == {0, 1, 2}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing_buffer_size", [0, 12])
def test_a_restored_blend_goes_on_exactly(num_workers, packing_buffer_size, model, blend):
    """With samples waiting to be packed too."""
    options = {"num_workers": num_workers, "packing_buffer_size": packing_buffer_size, "micro_batch_size": 1}
    options["allow_dataset_code"] = True
    loader = build(model, blend, **options)
    batches = iter(loader)
    for _ in range(30):
        next(batches)
    position = save_position(loader)
    expected = list(islice(batches, 20))
    again = resume(model, blend, position, **options)
    assert_same(take(again, 20), expected)
    if packing_buffer_size:
        assert max(len(batch.keys) for batch in expected) > 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BLEND_OF_ONE.replace("1", "-3", 1), "split train has a weight of .*; expected one above 0"),
        (BLEND_OF_ONE.replace("}", ""), "no yaml; expected a metadataset of energon"),
        ("", "split train cannot be read: .*; expected a metadataset"),
        (BLEND_OF_ONE.replace("PATH", "/no\\e[31m\\n where"), r"split train cannot be read: .*\\x1b\[31m.*where"),
    ],
)
def test_what_is_not_a_blend_is_answered_in_one_line(text, why, model, dataset, tmp_path):
    (tmp_path / "blend.yaml").write_text(text.replace("PATH", str(dataset)))
    with pytest.raises(ValueError, match=rf"blend\.yaml: .*{why}") as caught:
        build(model, tmp_path / "blend.yaml")
    assert str(caught.value).isprintable()
