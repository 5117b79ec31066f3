"""Token ids, labels and where they are cut; the tokenizer that gets its `<image>`."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from megatron_patch.data.prompts import prompt_format
from megatron_patch.data.tokenize import IGNORE, encode, load_tokenizer
from megatron_patch.data.tokenizer_files import install_tokenizer
from tests.tiny import save_tokenizer
from tests.unit.data.tokenizers import TOKENS, TURNS, encoded, mistral_v3, tiny

SOURCES = {"tiny": tiny, "mistral_v3": mistral_v3}


@pytest.fixture(scope="module", params=SOURCES)
def installed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = SOURCES[request.param](folder / "source")
    return source, folder / "target", install_tokenizer(source, folder / "target")["<image>"]


def test_install_adds_the_image_token_and_nothing_else(installed):
    source, target, image_token_id = installed
    before, after = AutoTokenizer.from_pretrained(source), load_tokenizer(target)
    assert image_token_id == len(before)
    assert len(after) == len(before) + 1
    assert "<image>" in after.all_special_tokens or after.added_tokens_decoder[image_token_id].special
    text = "A photo of [INST] two</s> cats\n\n— naïve 😀 "
    assert after(text).input_ids == before(text, add_special_tokens=False).input_ids
    assert after("x<image><image>y").input_ids.count(image_token_id) == 2
    assert after.chat_template is None
    # Of transformers 5's own words none is written: 4.57 opens the copy too.
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["padding_side"] == "left"
    assert "extra_special_tokens" not in config


def test_install_again_keeps_the_id(installed, tmp_path):
    _, target, image_token_id = installed
    assert install_tokenizer(target, tmp_path) == {"<image>": image_token_id}
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (target / "tokenizer_config.json").read_bytes()


def test_install_leaves_nothing_of_another_tokenizer(tmp_path):
    source, target = mistral_v3(tmp_path / "source"), tiny(tmp_path / "target")
    assert install_tokenizer(source, target) == {"<image>": 32768}
    assert {path.name for path in target.iterdir()} == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(ValueError, match="is the source itself"):
        install_tokenizer(target, target)


def test_words_past_the_embedding_are_refused_and_added_tokens_named(tmp_path, capsys):
    source = tmp_path / "source"
    save_tokenizer(source, 300)
    with pytest.raises(ValueError, match=r"source: 10 tokens of its tokenizer, '<unused_.*, are past the 290 rows"):
        install_tokenizer(source, tmp_path / "target", vocab_size=290)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(source)
    assert install_tokenizer(source, tmp_path / "target", vocab_size=301) == {"<image>": 301}
    assert install_tokenizer(source, tmp_path / "target", ["[PAD]"], vocab_size=300)["[PAD]"] == 300
    assert capsys.readouterr().err == ""
    assert install_tokenizer(source, tmp_path / "target", vocab_size=300) == {"<image>": 301}
    assert "the embedding has no row for [PAD]; --add-tokens gives" in capsys.readouterr().err


@pytest.mark.transformers_5
def test_install_takes_the_bos_out_of_a_tokenizer_json(tmp_path):
    source = tiny(tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = tokenizer["post_processor"]
    template["single"].insert(0, begin)
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert AutoTokenizer.from_pretrained(source)("a").input_ids[0] == 1
    install_tokenizer(source, tmp_path / "target")
    assert load_tokenizer(tmp_path / "target")("a").input_ids[0] != 1


def test_mistral_v3_by_hand(tmp_path):
    """The contract's `<s>[INST] <image>\\n...[/INST] CAPTION</s>`, its ids written out."""
    install_tokenizer(mistral_v3(tmp_path / "source"), tmp_path / "target")
    tokenizer = load_tokenizer(tmp_path / "target")
    input_ids, labels, _, _ = encoded([("Describe it.\n<image>", " a cat ")], tokenizer, "mistral")
    # <s> [INST] ▁ <image>... \n Describe ▁it . [/INST] ▁a ▁cat
    assert input_ids.tolist() == [1, 3, 29473, *[32768] * TOKENS, 781, 23604, 1146, 29491, 4, 1032, 6023]
    assert labels.tolist() == [IGNORE] * (len(input_ids) - 3) + [1032, 6023, 2]


def test_placeholders_in_a_text_are_not_a_format(installed):
    """A caption may speak of {bos} and {eos}."""
    tokenizer = load_tokenizer(installed[1])
    labels = encoded([("say", "{eos} {bos}")], tokenizer, "mistral").labels
    assert tokenizer.decode(labels[labels != IGNORE]).strip() == "{eos} {bos}</s>"


def test_truncation_never_cuts_a_picture(installed):
    """Up to the last position that is allowed, or up to the image that does not fit whole; what is cut is counted."""
    tokenizer = load_tokenizer(installed[1])
    turns = [*TURNS, ("<image>\nthis?", "blue")]
    whole = encoded(turns, tokenizer, "mistral")
    size = len(whole.input_ids)
    assert (whole.num_images, whole.num_cut) == (2, 0)
    pictures = (whole.input_ids == installed[2]).nonzero().flatten()
    second = int(pictures[TOKENS])
    for limit, length in (
        *((second, second), (second + 1, second), (second + TOKENS - 1, second), (second + TOKENS, second + TOKENS)),
        *((size - 1, size - 1), (size, size)),
    ):
        cut = encoded(turns, tokenizer, "mistral", limit)
        assert torch.equal(cut.input_ids, whole.input_ids[:length])
        assert torch.equal(cut.labels, whole.labels[:length])
        assert (cut.num_images, cut.num_cut > 0) == (1 if length == second else 2, size > length)
    for limit in (int(pictures[TOKENS - 1]) + 2, TOKENS):
        with pytest.raises(ValueError, match=r"no answer within .* raise --decoder-seq-length"):
            encoded(turns, tokenizer, "mistral", limit)


def test_text_only(installed):
    tokenizer = load_tokenizer(installed[1])
    given = encoded(TURNS[1:], tokenizer, "mistral")
    assert given.num_images == 0
    assert installed[2] not in given.input_ids.tolist()


def test_a_folder_without_tokenizer_or_image_token_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        install_tokenizer(tmp_path, tmp_path / "target")
    with pytest.raises(ValueError, match="<image> is not one token"):
        load_tokenizer(tiny(tmp_path / "source"))


def by_prefixes(pieces, tokenizer):
    """Ids, and which of them are learned, from the whole text up to the end of each piece."""
    ids, learned, text = [], [], ""
    for piece, is_learned in pieces:
        text += piece
        whole = tokenizer(text, add_special_tokens=False).input_ids
        assert whole[: len(ids)] == ids
        learned += [is_learned] * (len(whole) - len(ids))
        ids = whole
    return ids, learned


@pytest.mark.parametrize("name", ["mistral", "llama_2", "v1", "plain"])
def test_long_conversations_are_cut_as_a_whole_is(name, installed):
    """Though only what follows the last token that stands apart is cut again for each turn."""
    tokenizer = load_tokenizer(installed[1])
    texts = ["one", "  two  words", "a\n\n\tb", "</s> said", "<s>", "日本語 😀", "3.  x", "[INST]", "<unk>", "\n"]
    turns = [(f"<image>\n{text}" if turn % 3 else text, texts[turn % 7] + text) for turn, text in enumerate(texts * 4)]
    pieces = list(prompt_format(name, tokenizer).pieces(turns))
    ids, learned = by_prefixes(pieces, tokenizer)
    made = encode(pieces, tokenizer, image_token_id=installed[2], num_image_tokens=1, max_length=100_000)
    assert made.input_ids.tolist() == ids[:-1]
    assert made.labels.tolist() == [id if one else IGNORE for id, one in zip(ids[1:], learned[1:], strict=True)]
    assert made.num_cut == 0


def test_no_more_is_read_than_there_are_positions(installed):
    tokenizer = load_tokenizer(installed[1])
    asked = []

    def pieces():
        for turn in range(1000):
            asked.append(turn)
            yield f"[INST] question {turn}[/INST]", False
            yield f" answer {turn}</s>", True

    made = encode(pieces(), tokenizer, image_token_id=installed[2], num_image_tokens=TOKENS, max_length=200)
    assert (len(made.input_ids), made.num_cut > 0) == (200, True)
    assert len(asked) < 30


def test_a_turn_is_cut_without_those_before_it(installed):
    tokenizer = load_tokenizer(installed[1])
    pieces = list(prompt_format("mistral", tokenizer).pieces([("What is it?", "A circle.")] * 100))
    lengths = []

    def counted(text, **options):
        lengths.append(len(text))
        return tokenizer(text, **options)

    counted.added_tokens_decoder = tokenizer.added_tokens_decoder
    encode(pieces, counted, image_token_id=installed[2], num_image_tokens=TOKENS, max_length=100_000)
    assert len(lengths) == len(pieces)
    assert sum(lengths) < 5 * sum(len(text) for text, _ in pieces)
