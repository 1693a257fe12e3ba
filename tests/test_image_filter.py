"""The similarity filter: seeded, capped, and of StreamDiffusion's odds."""

from __future__ import annotations

import random

import pytest
import torch
from streamdiffusion.image_filter import SimilarImageFilter as Original

from streamflow.image_filter import SimilarImageFilter


def picture(k: int) -> torch.Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(k))


def near(x: torch.Tensor, similarity: float) -> torch.Tensor:
    """An image at this cosine similarity to x."""
    x = x.flatten()
    other = torch.randn(len(x), generator=torch.Generator().manual_seed(9))
    other -= (other @ x) / (x @ x) * x
    other *= x.norm() / other.norm()
    return (similarity * x + (1 - similarity**2) ** 0.5 * other).reshape(1, 3, 8, 8)


def skipped(make: SimilarImageFilter, pictures) -> list[bool]:
    return [make(x) is None for x in pictures]


@pytest.mark.parametrize("most", [0, 1, 3, 10])
def test_equal_frames_are_skipped_and_at_most_so_many_in_a_row(most):
    x = picture(0)
    drawn_then_skipped = [False] + [True] * most
    assert skipped(SimilarImageFilter(0.9, most), [x] * (3 * (most + 1))) == drawn_then_skipped * 3


def test_a_drawn_frame_resets_the_count():
    a, b = picture(0), -picture(1)
    assert skipped(SimilarImageFilter(0.9, 2), [a, a, a, b, b, b, a, a, a, a]) == [
        *(False, True, True),
        *(False, True, True),
        *(False, True, True, False),
    ]


@pytest.mark.parametrize("threshold", [1, 1.0, 1.5])
def test_a_threshold_of_one_or_more_never_skips(threshold):
    assert not any(skipped(SimilarImageFilter(threshold), [picture(0)] * 20))


def test_frames_below_the_threshold_are_never_skipped():
    x = picture(0)
    make = SimilarImageFilter(0.9, 10_000)
    make(x)
    for _ in range(50):
        assert make(near(x, 0.89)) is not None
        make.prev_tensor = x


def test_the_odds_rise_linearly_as_in_streamdiffusion():
    x = picture(0)
    for similarity in (0.93, 0.95, 0.99):
        ours, theirs = SimilarImageFilter(0.9, 10**9, seed=1), Original(0.9, 10**9)
        counts = [0, 0]
        random.seed(1)
        for _ in range(400):
            for i, make in enumerate((ours, theirs)):
                make.prev_tensor = x
                counts[i] += make(near(x, similarity)) is None
        expected = 400 * (similarity - 0.9) / 0.1
        assert abs(counts[0] - expected) < 40 and abs(counts[1] - expected) < 40


def test_its_random_numbers_are_its_own_and_seeded():
    x = picture(0)
    run = [x, *[near(x, 0.95)] * 30]

    def pattern(seed: int) -> list[bool]:
        make = SimilarImageFilter(0.9, 5, seed=seed)
        first = skipped(make, run)
        make.reset()
        assert make.prev_tensor is None and make.skip_count == 0
        assert skipped(make, run) == first
        return first

    state, torch_state = random.getstate(), torch.get_rng_state()
    assert pattern(3) == pattern(3)
    assert len({tuple(pattern(seed)) for seed in range(5)}) > 1
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)


def test_a_frame_of_another_size_is_drawn():
    make = SimilarImageFilter(0.5)
    assert skipped(make, [torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 16), torch.ones(1, 3, 8, 16)]) == [False, False, True]


def test_the_frame_compared_with_is_a_copy():
    make, x = SimilarImageFilter(0.9), picture(0)
    make(x)
    x.neg_()
    assert make(x) is not None


def test_bad_settings_are_refused_and_change_nothing():
    make = SimilarImageFilter(0.9, 4)
    with pytest.raises(ValueError, match="0 or more, not -0.1"):
        make.set_threshold(-0.1)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        make.set_max_skip_frame(-1)
    assert (make.threshold, make.max_skip_frame) == (0.9, 4)
