"""Steps are measured after a warm-up over all batches, from the first weights; running out of memory is told."""

from __future__ import annotations

import pytest
import torch


class Counting:
    """A contestant whose loss is the number of its steps since it was reset."""

    start = ()
    kept_bytes = 0

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.taken: list[tuple] = []
        self.since_reset = 0

    def reset(self) -> None:
        self.since_reset = 0

    def step(self, *batches: object) -> float:
        self.taken.append(batches)
        self.since_reset += 1
        if len(self.taken) == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")
        return float(self.since_reset)


def test_all_batches_pass_twice_before_the_first_measured_step():
    from timing import Memory, measure

    contestant, batches = Counting(), [["a"], ["b", "b"], ["c"]]
    result = measure(contestant, batches, 4, Memory())
    once = [("a",), ("b", "b"), ("c",)]
    assert contestant.taken == [*once, *once, *once, ("a",)]
    assert result.losses == [1.0, 2.0, 3.0]
    assert len(result.seconds) == len(result.cpu_seconds) == 4
    assert result.device_seconds == []
    assert result.median() > 0


@pytest.mark.parametrize("fails_at", [1, 8])
def test_running_out_of_memory_is_told(fails_at):
    from timing import Memory, measure

    result = measure(Counting(fails_at), [["a"], ["b"], ["c"]], 4, Memory())
    assert result.problem == "out of memory: CUDA out of memory. Tried to allocate 1 GiB."


def test_a_round_begins_with_the_same_weights_and_leaves_out_its_first_step():
    from contest import run_round
    from timing import Result

    contestant, result = Counting(), Result()
    for _ in range(2):
        run_round(contestant, ["a", "b", "c"], result)
        assert result.losses == [1.0, 2.0, 3.0]
    assert len(result.seconds) == 4
