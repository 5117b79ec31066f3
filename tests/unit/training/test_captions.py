"""Where a caption begins and ends. That it is the right one: tests/distributed/test_captions.py."""

from __future__ import annotations

import torch

from megatron_patch.config import train
from megatron_patch.config.train import Parallel
from megatron_patch.data.task_encoder import Batch
from megatron_patch.training.captions import MAX_NEW_TOKENS, _generate, _prompt_and_answer
from tests import tiny_runs

ENDS = torch.tensor([2, 3])


def generate(
    tmp_path, prompts: list[list[int]], answers: list[list[int]], length: int, precision: str = "fp32"
) -> list[list[int]]:
    """What is made of a model that says `answers`, one word after the other."""
    cut = Parallel(context_parallel_size=2)
    settings = tiny_runs.config(tmp_path, tmp_path, decoder_seq_length=length, parallel=cut, precision=precision)

    def next_tokens(input_ids, lengths):
        assert input_ids.shape[1] % (4 * 16 if precision == "fp8" else 4) == 0
        said = lengths - torch.tensor([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            assert input_ids[row, : lengths[row]].tolist() == prompt + answers[row][: said[row]]
        return torch.tensor([answer[count] for answer, count in zip(answers, said, strict=True)])

    return [said.tolist() for said in _generate(settings, tuple(map(torch.tensor, prompts)), ENDS, next_tokens)]


def test_a_caption_ends_with_its_end(tmp_path):
    answers = [[7, 8, 2], [3, 9], [5, 6, 7, 2]]
    assert generate(tmp_path, [[1], [1, 3, 4], [1, 3]], answers, 128) == [[7, 8], [], [5, 6, 7]]


def test_sequences_are_padded_for_fp8(tmp_path, monkeypatch):
    """To 16 tokens in each of a rank's two slices. (A mock: Transformer Engine, which is not asked for.)"""
    monkeypatch.setattr(train, "require_transformer_engine", lambda *words: None)
    answers = [[7, 8, 2], [3, 9], [5, 6, 7, 2]]
    assert generate(tmp_path, [[1], [1, 3, 4], [1, 3]], answers, 128, "fp8") == [[7, 8], [], [5, 6, 7]]


def test_a_caption_ends_with_the_sequence_or_at_the_most_words(tmp_path):
    """Six positions: the word that follows the last one is known and looked at no more."""
    endless = [list(range(10, 90))] * 2
    assert generate(tmp_path, [[1, 3, 4, 5], [1] * 6], endless, 6) == [[10, 11, 12], [10]]
    (said, _) = generate(tmp_path, [[1], [1]], endless, 1024)
    assert len(said) == MAX_NEW_TOKENS


def test_of_a_conversation_the_first_answer_is_compared():
    ids, labels = torch.tensor([[1, 5, 6, 7, 8, 9]]), torch.tensor([[-100, 6, 7, -100, -100, 2]])
    prompt, answer = _prompt_and_answer(Batch(keys=["a"], input_ids=ids, labels=labels, pixels=torch.zeros(0)))
    assert (prompt.tolist(), answer.tolist()) == ([1, 5], [6, 7])
