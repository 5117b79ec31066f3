"""Prompts and labels: transformers' processor is the judge of what stands before an answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor

from megatron_patch.data.tokenize import (
    IGNORE,
    PROMPT_FORMATS,
    PromptFormat,
    chat_template,
    encode,
    format_name,
    install_tokenizer,
    load_tokenizer,
    prompt_format,
)
from tests.tiny import save_tokenizer
from tests.unit.data.samples import CLIP

TOKENS = 16
TURNS = [("<image>\nWhat  is it?", "a red circle"), ("And its colour?", "red")]


def mistral_v3(folder: Path) -> Path:
    """The real tokenizer of Mistral-7B-Instruct-v0.3, which mistral-common ships: sentencepiece, no tokenizer.json."""
    mistral_common = pytest.importorskip("mistral_common", reason="it brings the real Mistral tokenizer")
    folder.mkdir()
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copyfile(data / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "chat_template": "of no use"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny(folder: Path) -> Path:
    """Byte-level BPE in a tokenizer.json, with chatml's tokens in it."""
    save_tokenizer(folder, 300)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<unused_1>", "<|im_start|>").replace("<unused_2>", "<|im_end|>"))
    tokenizer = json.loads(path.read_text())
    for name in ("<|im_start|>", "<|im_end|>"):
        token = {**tokenizer["added_tokens"][0], "id": tokenizer["model"]["vocab"][name], "content": name}
        tokenizer["added_tokens"].append(token)
    path.write_text(json.dumps(tokenizer))
    return folder


SOURCES = {"tiny": tiny, "mistral_v3": mistral_v3}


@pytest.fixture(scope="module", params=SOURCES)
def installed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = SOURCES[request.param](folder / "source")
    return source, folder / "target", install_tokenizer(source, folder / "target")["<image>"]


def encoded(turns, tokenizer, style: PromptFormat, length=2000):
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return encode(turns, tokenizer, style, image_token_id=image_token_id, num_image_tokens=TOKENS, max_length=length)


def known_formats(tokenizer):
    for name in PROMPT_FORMATS:
        if name != "chatml" or "<|im_end|>" in tokenizer.get_vocab():
            yield name, prompt_format(name, tokenizer)


def test_install_adds_the_image_token_and_nothing_else(installed):
    source, target, image_token_id = installed
    before, after = AutoTokenizer.from_pretrained(source), load_tokenizer(target)
    assert image_token_id == len(before)
    assert len(after) == len(before) + 1
    assert "<image>" in after.all_special_tokens or after.added_tokens_decoder[image_token_id].special
    text = "  A photo of [INST] two</s> cats\n\n— naïve 😀 "
    assert after(text).input_ids == before(text, add_special_tokens=False).input_ids
    assert after("x<image><image>y").input_ids.count(image_token_id) == 2
    assert after.chat_template is None
    # Of transformers 5's own words none is written: 4.57 opens the copy too.
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in ("LlamaTokenizer", "PreTrainedTokenizerFast")
    assert "extra_special_tokens" not in config


def test_install_again_keeps_the_id(installed, tmp_path):
    _, target, image_token_id = installed
    assert install_tokenizer(target, tmp_path) == {"<image>": image_token_id}
    assert (tmp_path / "tokenizer_config.json").read_bytes() == (target / "tokenizer_config.json").read_bytes()


def test_install_leaves_nothing_of_another_tokenizer(tmp_path):
    source, target = mistral_v3(tmp_path / "source"), tiny(tmp_path / "target")
    assert install_tokenizer(source, target) == {"<image>": 32768}
    assert {path.name for path in target.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    with pytest.raises(ValueError, match="is the source itself"):
        install_tokenizer(target, target)


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


@pytest.mark.parametrize("name", PROMPT_FORMATS)
def test_training_prompt_is_what_the_processor_makes(name, installed, tmp_path):
    """Token by token, and without a second beginning of sequence: what was learned is what is generated next."""
    _, target, _ = installed
    shutil.copytree(target, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    (tmp_path / "chat_template.jinja").write_text(chat_template(name))
    tokenizer = load_tokenizer(tmp_path)
    if name not in dict(known_formats(tokenizer)):
        with pytest.raises(ValueError, match="not a token of this tokenizer"):
            prompt_format(name, tokenizer)
        return
    processor = LlavaProcessor(
        image_processor=_image_processor(tmp_path),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(name),
    )
    input_ids, labels, num_images = encoded(TURNS, tokenizer, prompt_format(name, tokenizer))
    assert num_images == 1
    answers = (labels != IGNORE).nonzero().flatten()
    first = int(answers[0])
    second = int(answers[(answers[1:] - answers[:-1]).argmax() + 1]) if name != "plain" else None
    asked = [{"type": "text", "text": "What  is it? "}, {"type": "image"}]
    messages = [{"role": "user", "content": asked}]
    for content in (asked, TURNS[0][0]):
        messages = [{"role": "user", "content": content}]
        assert _prompt(processor, messages) == input_ids[: first + 1].tolist()
    messages += [
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": TURNS[1][0]},
    ]
    if second is not None:
        assert _prompt(processor, messages) == input_ids[: second + 1].tolist()
    whole = _prompt(processor, [*messages, {"role": "assistant", "content": "red"}])
    assert whole[:-1] == input_ids.tolist()
    # Shifted: after each position, what follows it in the whole, where an answer is.
    assert labels[answers].tolist() == [whole[i + 1] for i in answers]


def _image_processor(folder):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, use_fast=False)


def _prompt(processor, messages):
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    (ids,) = processor(text=text, images=Image.new("RGB", (30, 40)), return_tensors="pt").input_ids.tolist()
    return ids


def test_mistral_v3_by_hand(tmp_path):
    """The contract's `<s>[INST] <image>\\n...[/INST] CAPTION</s>`, its ids written out."""
    install_tokenizer(mistral_v3(tmp_path / "source"), tmp_path / "target")
    tokenizer = load_tokenizer(tmp_path / "target")
    input_ids, labels, _ = encoded(
        [("Describe it.\n<image>", " a cat ")], tokenizer, prompt_format("mistral", tokenizer)
    )
    # <s> [INST] ▁ <image>... \n Describe ▁it . [/INST] ▁a ▁cat
    assert input_ids.tolist() == [1, 3, 29473, *[32768] * TOKENS, 781, 23604, 1146, 29491, 4, 1032, 6023]
    assert labels.tolist() == [IGNORE] * (len(input_ids) - 3) + [1032, 6023, 2]


# The text of two turns, and in brackets what is learned, as the published formats have it.
BY_HAND = {
    "mistral": "<s>[INST] <image>\nWhat  is it?[/INST]{ a red circle</s>}[INST] And its colour?[/INST]{ red</s>}",
    "llama_2": "<s>[INST] <image>\nWhat  is it? [/INST]{ a red circle </s>}"
    "<s>[INST] And its colour? [/INST]{ red </s>}",
    "v1": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nWhat  is it? ASSISTANT:{ a red circle</s>}"
    "USER: And its colour? ASSISTANT:{ red</s>}",
    "plain": "<s><image>{a red circle</s>}{red</s>}",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat  is it?"
    "<|im_end|>\n<|im_start|>assistant\n{a red circle<|im_end|>}\n<|im_start|>user\nAnd its colour?<|im_end|>\n"
    "<|im_start|>assistant\n{red<|im_end|>}",
}


@pytest.mark.parametrize("name", PROMPT_FORMATS)
def test_labels_by_hand(name, tmp_path):
    """Every answer and its end are learned, nothing else: byte by byte, since the tiny tokenizer merges hardly any."""
    install_tokenizer(tiny(tmp_path / "source"), tmp_path / "target")
    tokenizer = load_tokenizer(tmp_path / "target")
    expected_ids, expected_learned = [], []
    for index, part in enumerate(BY_HAND[name].replace("}", "{").split("{")):
        ids = tokenizer(part, add_special_tokens=False).input_ids
        for token in ids:
            count = TOKENS if token == 300 else 1
            expected_ids += [token] * count
            expected_learned += [index % 2 == 1] * count
    input_ids, labels, _ = encoded(TURNS, tokenizer, prompt_format(name, tokenizer))
    assert input_ids.tolist() == expected_ids[:-1]
    pairs = zip(expected_ids[1:], expected_learned[1:], strict=True)
    assert labels.tolist() == [token if learned else IGNORE for token, learned in pairs]
    assert input_ids.dtype == labels.dtype == torch.int64


def test_placeholders_in_a_text_are_not_a_format(installed):
    """A caption may speak of {bos} and {eos}."""
    tokenizer = load_tokenizer(installed[1])
    _, labels, _ = encoded([("say", "{eos} {bos}")], tokenizer, prompt_format("mistral", tokenizer))
    assert tokenizer.decode(labels[labels != IGNORE]).strip() == "{eos} {bos}</s>"


def test_truncation_never_cuts_a_picture(installed):
    tokenizer = load_tokenizer(installed[1])
    style = prompt_format("mistral", tokenizer)
    turns = [*TURNS, ("<image>\nthis?", "blue")]
    whole_ids, whole_labels, num_images = encoded(turns, tokenizer, style)
    assert num_images == 2
    pictures = (whole_ids == installed[2]).nonzero().flatten()
    second = int(pictures[TOKENS])
    for length in (second, second + TOKENS, len(whole_ids) - 1):
        input_ids, labels, num_images = encoded(turns, tokenizer, style, length)
        assert torch.equal(input_ids, whole_ids[:length])
        assert torch.equal(labels, whole_labels[:length])
        assert num_images == (1 if length == second else 2)
    for length in (second + 1, second + TOKENS - 1):
        with pytest.raises(ValueError, match=r"cut a picture .* in two; raise --decoder-seq-length"):
            encoded(turns, tokenizer, style, length)
    with pytest.raises(ValueError, match="no answer within"):
        encoded(turns, tokenizer, style, int(pictures[TOKENS - 1]) + 2)


def test_text_only(installed):
    tokenizer = load_tokenizer(installed[1])
    input_ids, _, num_images = encoded(TURNS[1:], tokenizer, prompt_format("mistral", tokenizer))
    assert num_images == 0
    assert installed[2] not in input_ids.tolist()


def test_auto_is_the_familys_format():
    assert [format_name("auto", family) for family in ("mistral", "llama")] == ["mistral", "llama_2"]
    assert format_name("plain", "mistral") == "plain"
    with pytest.raises(ValueError, match="--prompt-format auto: unknown for qwen9"):
        format_name("auto", "qwen9")


def test_a_folder_without_tokenizer_or_image_token_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        install_tokenizer(tmp_path, tmp_path / "target")
    with pytest.raises(ValueError, match="<image> is not one token"):
        load_tokenizer(tiny(tmp_path / "source"))
