"""Prompt formats, declared as data: what stands around questions, answers and a system message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

IMAGE = "<image>"

Turn = tuple[str, str]
"""A question and its answer."""
Piece = tuple[str, bool]
"""Part of a text, and whether it is labelled."""


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """What stands around questions and answers. `{bos}` and `{eos}` are the tokenizer's own."""

    begin: str = "{bos}"
    """Once, before everything."""
    system: str = ""
    """What a system message, `{system}`, becomes in an exported chat template. Empty: it has no place."""
    system_place: Literal["begin", "first question", "last question"] = "begin"
    """Where that stands: in place of `begin`, or within a question, before its text."""
    question: str
    """Before each question."""
    answer: str
    """After each question; the model goes on from here."""
    lead: str = " "
    """Before each answer, labelled with it."""
    end: str = "{eos}"
    """After each answer, labelled with it."""
    between: str = ""
    """After an answer that another question follows."""
    word: str = ""
    """Before an answer that nothing but `begin` precedes."""
    keeps_question: bool = True
    """False: of a question only its images stay, without a line of their own."""

    def pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """Of a format that `bound` filled in."""
        given = self.begin
        for question, answer in turns:
            asked = question_text(question) if self.keeps_question else IMAGE * question.count(IMAGE)
            prompt = given + self.question + asked + self.answer
            yield prompt, False
            yield (self.word if prompt == self.begin else self.lead) + answer.strip() + self.end, True
            given = self.between

    def begun(self, blank: Callable[[str], str]) -> PromptFormat:
        """The format with `blank(text)`, a blank or nothing, between each `{bos}` and the text that follows it."""

        def spaced(text: str, after: str = "") -> str:
            first, *parts = text.split("{bos}")
            return first + "".join("{bos}" + blank(part or after) + part for part in parts)

        return replace(
            self,
            begin=spaced(self.begin, self.question),
            system=spaced(self.system),
            question=spaced(self.question),
            word=self.lead or blank("{answer}"),
        )

    def bound(self, bos: str, eos: str) -> PromptFormat:
        """The format in a tokenizer's words."""
        texts = {field.name: getattr(self, field.name) for field in fields(self) if field.type == "str"}
        words = {name: text.replace("{bos}", bos).replace("{eos}", eos) for name, text in texts.items()}
        return replace(self, **words)


def question_text(text: str) -> str:
    """A question as it is asked: its only image goes first, on a line of its own; several stay where they are."""
    if text.count(IMAGE) == 1:
        return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}"
    return text.strip()


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPT_FORMATS = {
    "mistral": PromptFormat(question="[INST] ", answer="[/INST]", system="{system}\n\n", system_place="last question"),
    # Llama-2-chat without a system message: every turn has its own `<s>`, and a space stands before the end.
    "llama_2": PromptFormat(
        begin="",
        question="{bos}[INST] ",
        answer=" [/INST]",
        end=" {eos}",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        system_place="first question",
    ),
    # Vicuna 1.1, as LLaVA-1.5 uses it.
    "v1": PromptFormat(
        begin="{bos}" + VICUNA_SYSTEM + " ", question="USER: ", answer=" ASSISTANT:", system="{bos}{system} "
    ),
    # LLaVA-1.5's pretraining: image, caption. Its newline at the end is our end-of-sequence, so that a caption ends.
    "plain": PromptFormat(question="", answer="", lead="", keeps_question=False),
    "chatml": PromptFormat(
        begin="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        question="<|im_start|>user\n",
        answer="<|im_end|>\n<|im_start|>assistant\n",
        lead="",
        end="<|im_end|>",
        between="\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
    ),
    # NeMo's NeVA (conv_nvgpt): an answer ends with what the next question begins with.
    "nvgpt": PromptFormat(
        begin="{bos}<extra_id_0>System\n" + VICUNA_SYSTEM + "\n\n<extra_id_1>",
        question="User\n",
        answer="\n<extra_id_1>Assistant\n",
        lead="",
        end="\n<extra_id_1>",
        system="{bos}<extra_id_0>System\n{system}\n\n<extra_id_1>",
    ),
    # Llama-3-Instruct without a system message.
    "llama_3": PromptFormat(
        question="<|start_header_id|>user<|end_header_id|>\n\n",
        answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        lead="",
        end="<|eot_id|>",
        system="{bos}<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
    ),
}
