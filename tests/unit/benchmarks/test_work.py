"""Packed and padded batches of the same samples hold as many tokens, and attention compares within samples alone."""

from __future__ import annotations

import pytest


def test_counts_of_packed_samples():
    from inputs import make_batch
    from packing import pack
    from work import count_pairs, count_tokens, mean_work

    padded = make_batch("tiny", 3, seed=0, length=128)
    packed = pack(padded)
    assert count_tokens(packed) == count_tokens(padded) < 3 * 128
    assert count_pairs(padded) == 3 * 128**2
    assert count_pairs(packed) == sum(length**2 for length in packed.segment_lengths)
    assert mean_work([padded]).num_labels == mean_work([packed]).num_labels
    assert mean_work([padded]).num_images == mean_work([packed]).num_images == 3


@pytest.mark.parametrize("size", ["7B", "100M", "tiny"])
def test_every_sample_fits_in_the_longest(size):
    from inputs import CAPTION, PROMPT, SIZES

    needed = PROMPT + SIZES[size].num_image_tokens + CAPTION[1] - 1
    assert needed <= SIZES[size].longest < needed + 64


def test_largest_difference():
    from work import largest_difference

    assert largest_difference([[1.0, 2.0]]) == 0
    assert largest_difference([[1.0, 2.0], [1.0, 2.5], [0.0, 2.0]]) == 1
    with pytest.raises(ValueError, match=r"shorter|longer"):
        largest_difference([[1.0], [1.0, 2.0]])
