"""Prompt formats: transformers is the judge of what stands before an answer, published templates of which is which."""

import json
import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor

from megatron_patch.config.train import PromptFormatName
from megatron_patch.data.prompts import (
    MARKED_IMAGE,
    PROMPT_FORMATS,
    chat_template,
    find_end,
    find_format,
    prompt_format,
)
from megatron_patch.data.tokenize import IGNORE, load_tokenizer
from megatron_patch.data.tokenizer_files import install_tokenizer
from tests.unit.data.samples import CLIP
from tests.unit.data.tokenizers import TOKENS, TURNS, encoded, mistral_v3, tiny


def test_every_format_can_be_named():
    assert set(get_args(PromptFormatName)) == {"auto", *PROMPT_FORMATS, "tokenizer"}


SOURCES = {"tiny": tiny, "mistral_v3": mistral_v3}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        *(("tiny", name) for name in PROMPT_FORMATS),
        *(("mistral_v3", name) for name in ("mistral", "llama_2", "v1", "plain")),
    ],
)
def test_training_prompt_is_what_the_processor_makes(name, source, tmp_path):
    """Token by token, and without a second beginning of sequence: what was learned is what is generated next."""
    install_tokenizer(SOURCES[source](tmp_path / "source"), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    tokenizer = load_tokenizer(tmp_path)
    processor = LlavaProcessor(
        image_processor=_image_processor(tmp_path),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(name, tokenizer=tokenizer),
    )
    input_ids, labels, num_images, _ = encoded(TURNS, tokenizer, name)
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


# The text of two turns, and in brackets what is learned, as the published formats have it.
BY_HAND = {
    "mistral": "<s>[INST] <image>\nWhat  is it?[/INST]{ a red circle</s>}[INST] And its colour?[/INST]{ red</s>}",
    "llama_2": "<s>[INST] <image>\nWhat  is it? [/INST]{ a red circle </s>}"
    "<s>[INST] And its colour? [/INST]{ red </s>}",
    "v1": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nWhat  is it? ASSISTANT:{ a red circle</s>}"
    "USER: And its colour? ASSISTANT:{ red</s>}",
    "plain": "<s><image>{a red circle</s>}{red</s>}",
    "nvgpt": "<s><extra_id_0>System\nA chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions.\n\n<extra_id_1>User\n<image>\n"
    "What  is it?\n<extra_id_1>Assistant\n{a red circle\n<extra_id_1>}User\nAnd its colour?\n<extra_id_1>Assistant\n"
    "{red\n<extra_id_1>}",
    "llama_3": "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat  is it?<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\n{a red circle<|eot_id|>}<|start_header_id|>user<|end_header_id|>\n\n"
    "And its colour?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{red<|eot_id|>}",
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
    input_ids, labels, _, _ = encoded(TURNS, tokenizer, name)
    assert input_ids.tolist() == expected_ids[:-1]
    pairs = zip(expected_ids[1:], expected_learned[1:], strict=True)
    assert labels.tolist() == [token if learned else IGNORE for token, learned in pairs]
    assert input_ids.dtype == labels.dtype == torch.int64


# Chat templates as their models were published with them, and the format that each of them is.
PUBLISHED = {
    "Mistral-7B-Instruct-v0.2": (
        "mistral",
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token}}{% endif %}{% endfor %}",
    ),
    "Llama-2-7b-chat": (
        "llama_2",
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "Meta-Llama-3-8B-Instruct": (
        "llama_3",
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "Qwen2-7B-Instruct": (
        "chatml",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "llava-1.5-7b-hf": (
        "v1",
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
        "{% endif %}{# Render all images first #}{% for content in message['content'] | "
        "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    "zephyr-7b-beta": (
        "tokenizer",
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + "
        "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("language model") / "llm")


def with_template(source, folder, template):
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("model", PUBLISHED)
def test_auto_is_the_format_of_the_published_template(model, source, tmp_path):
    name, template = PUBLISHED[model]
    # Of a family that is another one's by default.
    assert find_format("auto", with_template(source, tmp_path / "llm", template), "qwen9") == name


@pytest.mark.parametrize("model", ["Llama-2-7b-chat", "Meta-Llama-3-8B-Instruct", "Qwen2-7B-Instruct"])
def test_text_is_the_published_templates(model, source, tmp_path):
    """(Of Mistral's see below; LLaVA-1.5's leaves out the end of an answer.)"""
    name, template = PUBLISHED[model]
    tokenizer = AutoTokenizer.from_pretrained(with_template(source, tmp_path / "llm", template))
    messages = []
    for question, answer in TURNS:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    text = "".join(piece for piece, _ in prompt_format(name, tokenizer).pieces(TURNS))
    assert text == expected.rstrip("\n")
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


def test_mistral_is_what_mistrals_own_library_writes(tmp_path):
    """Of its version 3, token by token. (Version 1, of Mistral-7B-Instruct-v0.1 and v0.2, has other blanks.)"""
    install_tokenizer(mistral_v3(tmp_path / "source"), tmp_path / "model")
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    turns = [("What is it?", "a red circle"), ("And its colour?", "red")]
    (first, answer), (second, _) = turns
    messages = [UserMessage(content=first), AssistantMessage(content=answer), UserMessage(content=second)]
    expected = MistralTokenizer.v3().encode_chat_completion(ChatCompletionRequest(messages=messages))
    input_ids, _, _, _ = encoded(turns, load_tokenizer(tmp_path / "model"), "mistral")
    assert input_ids.tolist()[: len(expected.tokens)] == expected.tokens


def test_auto_knows_our_own_templates_and_models_without_one(source, tmp_path):
    for name in PROMPT_FORMATS:
        for marked in (False, True):
            folder = tmp_path / f"{name} {marked}"
            with_template(source, folder, chat_template(name, use_im_start_end=marked))
            assert find_format("auto", folder, "qwen9") == name
    assert find_format("plain", source, "mistral") == "plain"
    bare = tmp_path / "bare"
    mistral_v3(bare)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    assert [find_format("auto", bare, family) for family in ("mistral", "llama")] == ["mistral", "llama_2"]
    with pytest.raises(ValueError, match="--prompt-format auto: unknown for qwen9"):
        find_format("auto", bare, "qwen9")
    (bare / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    assert find_format("auto", bare, "llama") == "v1"
    # A base model of Llama 3 has the tokens and no template.
    assert find_format("auto", source, "llama") == "llama_3"


def test_the_tokenizers_own_template(source, tmp_path):
    """Zephyr's, which no format is: the same text, answers learned with their ends, images taken on the way back."""
    llm = with_template(source, tmp_path / "llm", PUBLISHED["zephyr-7b-beta"][1])
    install_tokenizer(llm, tmp_path / "llava")
    template = chat_template("tokenizer", llm)
    (tmp_path / "llava" / "chat_template.jinja").write_text(template)
    assert chat_template("tokenizer", tmp_path / "llava") == template
    tokenizer = load_tokenizer(tmp_path / "llava")
    pieces = list(prompt_format("tokenizer", tokenizer).pieces(TURNS))
    assert pieces == [
        ("<|user|>\n<image>\nWhat  is it?</s>\n<|assistant|>\n", False),
        ("a red circle</s>", True),
        ("\n<|user|>\nAnd its colour?</s>\n<|assistant|>\n", False),
        ("red</s>", True),
    ]
    asked = [{"type": "image"}, {"type": "text", "text": "What  is it?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": TURNS[0][1]}]
    messages.append({"role": "user", "content": TURNS[1][0]})
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "".join(
        text for text, _ in pieces[:3]
    )


@pytest.mark.parametrize("name", ["mistral", "plain", "tokenizer"])
def test_templates_mark_pictures_as_training_does(name, source, tmp_path):
    llm = with_template(source, tmp_path / "llm", PUBLISHED["zephyr-7b-beta"][1])
    # What the converter wrote, from which a run that marks images makes its own.
    (llm / "chat_template.jinja").write_text(chat_template("tokenizer", llm))
    template = chat_template(name, llm, use_im_start_end=True)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    pieces = list(prompt_format(name, tokenizer).pieces(TURNS[:1]))
    asked = [{"type": "image"}, {"type": "text", "text": "What  is it?"}]
    for content in (asked, TURNS[0][0]):
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert text == pieces[0][0].replace("<image>", MARKED_IMAGE)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "has no chat template"),
        (PUBLISHED["llava-1.5-7b-hf"][1], "would not learn to stop"),
        ("{{ messages[0]['content'] }}", "leaves out what is said"),
        ("{{ raise_exception('no') }}", "leaves out what is said"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}</s>{% endfor %}", "rewrites earlier turns"),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_refused(template, why, source, tmp_path):
    folder = with_template(source, tmp_path / "llm", template) if template else source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match=why) as caught:
        list(prompt_format("tokenizer", tokenizer).pieces(TURNS))
    assert "\n" not in str(caught.value)


def test_a_format_whose_end_is_no_token_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(mistral_v3(tmp_path / "mistral"))
    for name in ("chatml", "nvgpt", "llama_3"):
        with pytest.raises(ValueError, match=f"--prompt-format {name}: its end .* is not a token of this tokenizer"):
            prompt_format(name, tokenizer)


# What a prompt is with the system message "Be brief.", then one question, and in a second turn. As published: Mistral's
# of version 3 (in the last question), Meta's of Llama 2 and 3, Vicuna's, ChatML, NeVA's.
WITH_SYSTEM = {
    "mistral": ("<s>[INST] Be brief.\n\nQ[/INST]", "<s>[INST] Q[/INST] A</s>[INST] Be brief.\n\nR[/INST]"),
    "llama_2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]",
    ),
    "v1": ("<s>Be brief. USER: Q ASSISTANT:", "<s>Be brief. USER: Q ASSISTANT: A</s>USER: R ASSISTANT:"),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
    ),
    "nvgpt": (
        "<s><extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\n",
        "<s><extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\nA\n<extra_id_1>User\nR\n"
        "<extra_id_1>Assistant\n",
    ),
    "llama_3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "R<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


def say(role, text):
    return {"role": role, "content": text}


@pytest.mark.parametrize("name", PROMPT_FORMATS)
def test_a_system_message_stands_where_the_format_has_a_place_for_it(name, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = chat_template(name, tokenizer=tokenizer)

    def written(*messages):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    asked, listed = say("system", " Be brief.\n"), say("system", [{"type": "text", "text": "Be brief."}])
    if name not in WITH_SYSTEM:
        with pytest.raises(Exception, match="only the roles user and assistant"):
            written(asked, say("user", "Q"))
        return
    first, second = WITH_SYSTEM[name]
    for system in (asked, listed):
        assert written(system, say("user", "Q")) == first
        assert written(system, say("user", "Q"), say("assistant", "A"), say("user", "R")) == second
    with pytest.raises(Exception, match="only the roles user and assistant"):
        written(say("user", "Q"), say("assistant", "A"), asked, say("user", "R"))


@pytest.mark.parametrize("model", ["Meta-Llama-3-8B-Instruct", "Qwen2-7B-Instruct"])
def test_a_system_message_is_written_as_published(model, source):
    name, template = PUBLISHED[model]
    tokenizer = AutoTokenizer.from_pretrained(source)
    messages = [say("system", "Be brief."), say("user", "Q"), say("assistant", "A"), say("user", "R")]
    mine, theirs = (
        tokenizer.apply_chat_template(messages, chat_template=one, tokenize=False, add_generation_prompt=True)
        for one in (chat_template(name, tokenizer=tokenizer), template)
    )
    assert mine == theirs


@pytest.mark.parametrize(
    ("name", "end"),
    [
        *(("mistral", "</s>"), ("llama_2", "</s>"), ("v1", "</s>"), ("plain", "</s>"), ("chatml", "<|im_end|>")),
        *(("nvgpt", "<extra_id_1>"), ("llama_3", "<|eot_id|>"), ("tokenizer", "<|im_end|>")),
    ],
)
def test_the_end_of_an_answer(name, end, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = PUBLISHED["Qwen2-7B-Instruct"][1]
    assert find_end(name, tokenizer) == tokenizer.convert_tokens_to_ids(end)
    # A template whose answers have none leaves it to the tokenizer's.
    tokenizer.chat_template = PUBLISHED["llava-1.5-7b-hf"][1]
    assert find_end("tokenizer", tokenizer) == tokenizer.eos_token_id


def test_a_template_of_an_earlier_version_is_still_its_format(source, tmp_path, monkeypatch):
    """Without a place for a system message."""
    for name, style in list(PROMPT_FORMATS.items()):
        with monkeypatch.context() as patch:
            patch.setitem(PROMPT_FORMATS, name, replace(style, system=""))
            folder = with_template(source, tmp_path / name, chat_template(name))
        assert find_format("auto", folder, "qwen9") == name
