"""Every kind of energon's samples: what it says, what is learned of it, which images stand where."""

import pickle

import pytest
import torch
from megatron.energon import (
    CaptioningSample,
    CrudeSample,
    InterleavedSample,
    Sample,
    SimilarityInterleavedSample,
    VQASample,
    edataclass,
)

from megatron_patch.data.conversation import Conversation, cook, pair_turns, read
from megatron_patch.data.prompts import document_pieces
from megatron_patch.data.task_encoder import LlavaTaskEncoder
from megatron_patch.data.tokenize import IGNORE
from tests.unit.data.samples import describe, encode, jpeg, settings

RED, BLUE = jpeg((200, 0, 0)), jpeg((0, 0, 200))
KEYS = {"__key__": "0001", "__restore_key__": ()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llava = describe(folder)
    return LlavaTaskEncoder(settings(folder), llava)


def said_and_learned(encoder, sample):
    """The text that the model is given, `#` for an image; what is learned, `|` where something else is in between."""
    given = encode(encoder, sample)
    text = encoder.tokenizer.decode(given.input_ids).replace("<image>" * 16, "#")
    learned, was_learned = "", False
    for label in given.labels.tolist():
        learned += (
            "" if label == IGNORE else ("" if was_learned or not learned else "|") + encoder.tokenizer.decode(label)
        )
        was_learned = label != IGNORE
    colours = ["red" if pixels[0].float().mean() > 100 else "blue" for pixels in given.pixels]
    return text, learned, colours


def turn(who, text):
    return {"from": who, "value": text}


TURNS = [
    turn("human", "Which <image>\nor <image>?"),
    turn("gpt", "the red"),
    turn("human", "why"),
    turn("gpt", "no idea"),
]
TALK = "<s>[INST] Which #\nor #?[/INST] the red</s>[INST] why[/INST] no idea"
LEARNED = " the red</s>| no idea</s>"


def test_crude_samples(encoder):
    """Images in the order of their numbers, whatever order they lie in; several turns; text alone."""
    crude = CrudeSample({**KEYS, "10.jpg": RED, "jpg": BLUE, "2.png": RED, "json": [*TURNS, turn("human", "<image>?")]})
    assert cook(crude).pictures == [BLUE, RED, RED]
    crude = CrudeSample({**KEYS, "1.jpg": RED, "jpg": BLUE, "json": TURNS})
    assert said_and_learned(encoder, cook(crude)) == (TALK, LEARNED, ["blue", "red"])
    crude = CrudeSample({**KEYS, "json": TURNS[2:]})
    assert said_and_learned(encoder, cook(crude)) == ("<s>[INST] why[/INST] no idea", " no idea</s>", [])


def test_captioning(encoder):
    given = CaptioningSample(**KEYS, image=RED, caption="a red thing")
    assert said_and_learned(encoder, given) == ("<s>[INST] #\n[/INST] a red thing", " a red thing</s>", ["red"])


def test_documents_learn_all_their_text(encoder):
    given = InterleavedSample(**KEYS, sequence=["one ", RED, BLUE, " two", RED])
    assert said_and_learned(encoder, given) == ("<s>one ## two#", "one | two|</s>", ["red", "blue", "red"])


def test_pictures_go_before_the_text_they_are_matched_to(encoder):
    given = {**KEYS, "images": [RED, BLUE], "texts": ["one", " two", " three"]}
    expected = ("<s>one# two# three", "one| two| three</s>", ["blue", "red"])
    matched = SimilarityInterleavedSample(**given, matched_text_indices=[2, 1])
    assert said_and_learned(encoder, matched) == expected
    similar = SimilarityInterleavedSample(**given, similarity_matrix=torch.tensor([[0.1, 0.2, 0.9], [0.1, 0.8, 0.2]]))
    assert said_and_learned(encoder, similar) == expected
    with pytest.raises(ValueError, match="2 images and no places for them"):
        read(SimilarityInterleavedSample(**given))


def test_texts_that_follow_one_another_are_one(encoder):
    """A border within a text would stand between tokens that belong together; MMC4's texts are sentences."""
    sequence = ["fast", "er", RED, "so"]
    pieces = [("<s>", False), ("faster", True), ("<image>", False), ("so</s>", True)]
    assert document_pieces(sequence, encoder.tokenizer) == pieces
    given = {**KEYS, "images": [RED], "texts": ["One.", "Two.", "Three.", "Four."]}
    expected = ("<s>One. Two.#Three. Four.", "One. Two.|Three. Four.</s>", ["red"])
    assert said_and_learned(encoder, SimilarityInterleavedSample(**given, matched_text_indices=[2])) == expected
    for place in (-1, 4):
        with pytest.raises(ValueError, match=f"an image's place is {place}, expected 0 to 3"):
            read(SimilarityInterleavedSample(**given, matched_text_indices=[place]))


def test_similarity_samples_that_hold_turns(encoder):
    """As Megatron-LM's examples/multimodal stores LLaVA's instructions."""
    given = SimilarityInterleavedSample(**KEYS, images=[BLUE, RED], texts=TURNS, matched_text_indices=[0, 0])
    assert said_and_learned(encoder, given) == (TALK, LEARNED, ["blue", "red"])


def test_a_conversation_of_ones_own(encoder):
    given = Conversation(**KEYS, turns=[("Say <image>", "yes"), ("<image>", "no")], pictures=[RED, BLUE])
    talk = "<s>[INST] #\nSay[/INST] yes</s>[INST] #\n[/INST] no"
    assert said_and_learned(encoder, given) == (talk, " yes</s>| no</s>", ["red", "blue"])


def test_turns_of_both_spellings():
    assert pair_turns(TURNS)[1] == ("why", "no idea")
    roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert pair_turns(roles) == [("a", "b")]
    # As in LLaVA's training on ShareGPT's part of its mix.
    assert pair_turns([turn("gpt", "hello"), *TURNS, turn("human", "and?")]) == pair_turns(TURNS)


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_in_a_shard_are_never_loaded(encoder, tmp_path):
    data = pickle.dumps(Canary(tmp_path / "canary"))
    names = ("pyd", "pickle", "pkl", "pth", "npy", "jpg", "1.jpg", "cls")
    raw = {**KEYS, **dict.fromkeys(names, data), "json": b"[1]", "txt": b"a"}
    decoded = encoder.decoder(raw)
    assert all(decoded[name] == data for name in names)
    assert (decoded["json"], decoded["txt"]) == ([1], "a")
    assert not (tmp_path / "canary").exists()


@edataclass
class Sound(Sample):
    """A type that nobody knows."""


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (lambda: read(Sound(**KEYS)), "samples of type Sound are not known; .*Conversation with a sample_loader"),
        (lambda: pair_turns({"a": 1}), "expected a list of turns"),
        (lambda: pair_turns([*TURNS[:2], *TURNS[:2], TURNS[1]]), "turn 5 is the assistant's again"),
        (lambda: pair_turns([turn("system", "be nice")]), "expected from human or gpt"),
        (lambda: pair_turns([turn("human", None)]), "a value that is a text"),
        (lambda: read(cook(CrudeSample({**KEYS, "json": []}))), "no question with an answer"),
        (lambda: read(cook(CrudeSample(KEYS))), "conversation is None"),
        (lambda: read(cook(CrudeSample({**KEYS, "json": TURNS, "jpg": RED}))), "questions have 2 <image>, expected 1"),
        (
            lambda: read(VQASample(**KEYS, image=torch.zeros(3), context="<image>", answers="x")),
            "is a Tensor, expected",
        ),
        (lambda: read(InterleavedSample(**KEYS, sequence=[RED])), "some text"),
        (lambda: read(InterleavedSample(**KEYS, sequence=["a <image>"])), "texts have 1 <image>, expected 0"),
    ],
)
def test_what_says_nothing_that_can_be_learned(given, why):
    with pytest.raises(ValueError, match=why) as caught:
        given()
    assert "\n" not in str(caught.value)
