"""Micro batches on their way from the rank that reads to those that compute."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import fields, replace

import pytest
import torch

from megatron_patch.config.train import Parallel
from megatron_patch.data.task_encoder import Batch
from megatron_patch.model import groups
from megatron_patch.model.groups import HostGroups
from megatron_patch.training.feed import AHEAD, Feed, from_bytes, to_bytes
from tests.distributed.ranks import run_ranks

CPU = torch.device("cpu")


def batch(number: int, length: int = 8) -> Batch:
    row = torch.arange(2 * length).view(2, length) + number
    pixels = torch.full((number % 3, 3, 4, 5), number, dtype=torch.uint8)
    return Batch(keys=[f"{number}", "ключ"], input_ids=row, labels=row + 1, pixels=pixels, num_truncated=number)


@pytest.mark.parametrize("segments", [None, [3, 5]])
@pytest.mark.parametrize("number", [0, 2], ids=["no image", "images"])
def test_bytes_hold_a_batch(number, segments):
    given = replace(batch(number), segment_lengths=segments)
    data = to_bytes(given)
    assert data.dtype == torch.uint8
    found = from_bytes(data)
    for field in fields(Batch):
        one, other = getattr(given, field.name), getattr(found, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_the_wait_for_batches_is_measured():
    def slow():
        for number in range(2):
            time.sleep(0.05)
            yield batch(number)

    feed = Feed(slow(), 2, HostGroups(), takes=True, takes_pixels=True, device=CPU)
    with feed.reading() as longest:
        assert [next(feed).keys[0], next(feed).keys[0]] == ["0", "1"]
    assert longest is None
    assert feed.seconds >= 0.1


def take(lengths: list[int], takes_alone: bool) -> tuple[int | None, list[str], list[int], int]:
    """The longest, keys, numbers of pixels, and how many this rank has read, of an iteration of its own batches."""
    read = itertools.count()
    stage = groups.parallel_state.get_pipeline_model_parallel_rank()
    batches = (batch(next(read), length) for length in itertools.cycle(lengths))
    takes = not takes_alone or stage == 0
    feed = Feed(batches, len(lengths), groups.host_groups(), takes=takes, takes_pixels=stage == 0, device=CPU)
    with feed.reading() as longest:
        taken = [next(feed) for _ in range(len(lengths) if takes else 0)]
    assert not [thread for thread in threading.enumerate() if thread.name == "micro batches"]
    return longest, [one.keys[0] for one in taken], [one.pixels.numel() for one in taken], next(read)


def test_the_first_rank_reads_for_those_that_share():
    (first, second) = run_ranks(take, Parallel(tensor_model_parallel_size=2), 2, [8] * (AHEAD + 3), False)
    numbers = range(AHEAD + 3)
    assert first[:3] == second[:3] == (None, [str(n) for n in numbers], [60 * (n % 3) for n in numbers])
    assert (first[3], second[3]) == (AHEAD + 3, 0), "not one past the iteration"


@pytest.mark.parametrize("takes_alone", [False, True], ids=["both stages", "first stage alone"])
def test_stages_agree_on_the_longest(takes_alone):
    first, second = run_ranks(take, Parallel(pipeline_model_parallel_size=2), 2, [8, 24, 16], takes_alone)
    assert first == (24, ["0", "1", "2"], [0, 60, 120], 3)
    assert second == ((24, [], [], 0) if takes_alone else (24, ["0", "1", "2"], [0, 0, 0], 3))


def fail() -> list[str]:
    """What is said where the first rank cannot read its third micro batch."""

    def read():
        yield batch(0)
        yield batch(1)
        if torch.distributed.get_rank() == 0:
            raise ValueError("reading failed")
        yield batch(2)
        yield batch(3)

    feed, said = Feed(read(), 4, groups.host_groups(), takes=True, takes_pixels=True, device=CPU), []
    try:
        with feed.reading():
            for _ in range(4):
                said.append(next(feed).keys[0])
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.parametrize(
    ("cut", "before"),
    [(Parallel(tensor_model_parallel_size=2), ["0", "1"]), (Parallel(pipeline_model_parallel_size=2), [])],
    ids=["TP2", "PP2"],
)
def test_what_one_rank_cannot_read_is_raised_on_all(cut, before):
    first, second = run_ranks(fail, cut, 2)
    assert first == [*before, "ValueError: reading failed"]
    assert second == first


def test_a_thread_that_is_not_waited_for_ends():
    """The model raised: nobody takes what was read ahead."""
    feed = Feed(map(batch, itertools.count()), 9, HostGroups(), takes=True, takes_pixels=True, device=CPU)
    feed._groups = HostGroups(sharing=_Alone())

    def use() -> None:
        with feed.reading():
            next(feed)
            raise MemoryError

    with pytest.raises(MemoryError):
        use()
    feed._thread.join(10)
    assert not feed._thread.is_alive()


class _Alone:
    """A group of one: a mock of what never blocks."""

    def rank(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _one_is_not_sent(monkeypatch):
    stock = Feed._share
    monkeypatch.setattr(
        Feed, "_share", lambda self, *what: what[0] if isinstance(self._groups.sharing, _Alone) else stock(self, *what)
    )
