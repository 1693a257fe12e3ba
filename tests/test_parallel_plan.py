"""Shares and tiles: whatever the numbers, every row and every latent is somebody's exactly once."""

import random

import pytest

from streamflow.parallel.plan import chunks, grid, ramp, room_for, row_shares, shares, shares_by, spans, tiles, window_area

RANDOM = random.Random(0)
CASES = [(RANDOM.randrange(0, 200), RANDOM.randrange(1, 70)) for _ in range(200)] + [(0, 1), (1, 1), (1, 64), (64, 1)]
SIDES = [
    (size, RANDOM.randrange(1, size + 1), RANDOM.randrange(0, 40)) for size in (RANDOM.randrange(1, 300) for _ in range(200))
]


def test_any_number_of_rows_over_any_number_of_workers():
    for n, k in CASES:
        cut = shares(n, k)
        assert len(cut) == k
        assert [row for share in cut for row in share] == list(range(n))
        assert max(map(len, cut)) - min(map(len, cut)) <= 1
        assert sorted(map(len, cut), reverse=True) == list(map(len, cut))


def test_shares_follow_weights_to_less_than_a_row():
    for n, k in CASES:
        weights = [RANDOM.choice((0.0, 0.1, 1.0, 3.7)) for _ in range(k - 1)] + [1.0]
        cut = shares_by(n, weights)
        assert [row for share in cut for row in share] == list(range(n))
        assert all(abs(len(share) - n * w / sum(weights)) < 1 for share, w in zip(cut, weights, strict=True))
    assert shares_by(10, [1.0] * 3) == shares(10, 3)


@pytest.mark.parametrize("act", [lambda: shares(-1, 2), lambda: shares(3, 0), lambda: shares_by(3, [0, 0])])
def test_impossible_shares_are_refused(act):
    with pytest.raises(ValueError, match="rows cannot be shared|not all 0"):
        act()


def test_a_row_and_its_twin_stay_together():
    for n, k in CASES:
        owners = {row: i for i, ranges in enumerate(row_shares(2 * n, k, pairs=True)) for one in ranges for row in one}
        assert sorted(owners) == list(range(2 * n))
        assert all(owners[row] == owners[n + row] for row in range(n))
        assert [one for ranges in row_shares(n, k) for one in ranges] == [share for share in shares(n, k) if share]
    with pytest.raises(ValueError, match="3 rows are no pairs"):
        row_shares(3, 2, pairs=True)


def test_chunks_keep_order_and_limit():
    for n, limit in CASES:
        pieces = list(chunks(range(7, 7 + n), limit))
        assert [row for piece in pieces for row in piece] == list(range(7, 7 + n))
        assert all(1 <= len(piece) <= limit for piece in pieces)
    assert list(chunks(range(3, 9), None)) == [range(3, 9)]
    assert list(chunks(range(3, 3), None)) == []


def test_tiles_cover_once_with_their_halo_and_windows_of_one_size():
    for size, count, halo in SIDES:
        cut = spans(size, count, halo)
        assert [i for span in cut for i in span.core] == list(range(size))
        assert len({len(span.window) for span in cut}) == 1
        for span in cut:
            assert span.window.start <= max(span.core.start - halo, 0) and span.window.start >= 0
            assert span.window.stop >= min(span.core.stop + halo, size) and span.window.stop <= size
            window = [span.window.start * 8 + i for i in range(len(span.window) * 8)]
            assert window[span.cut(8)] == list(range(span.core.start * 8, span.core.stop * 8))


def test_neighbours_weights_add_up_to_one():
    for size, count, halo in SIDES[:60]:
        for blend in {0, halo // 2}:
            total = [0.0] * (size * 2)
            if blend and size // count < 2 * blend:
                continue  # a blend longer than a tile would reach past the neighbour
            for span in spans(size, count, halo):
                for i, weight in enumerate(ramp(span, size, blend, 2)):
                    assert 0 <= weight <= 1
                    total[span.window.start * 2 + i] += weight
            assert all(abs(sum_ - 1) < 1e-9 for sum_ in total)


def test_the_grid_occupies_every_worker_and_fits():
    for workers in (1, 2, 3, 5, 8):
        for room in (600, 5_000, 10**9):
            down, across = grid(96, 128, workers, 6, room)
            assert window_area(96, 128, (down, across), 6) <= room
            assert down * across % workers == 0
            assert len(tiles(96, 128, (down, across), 6)) == down * across
    assert grid(64, 64, 1, 18, 64 * 64) == (1, 1)
    assert grid(64, 128, 2, 6, 10**9) == (1, 2)  # the cut that has the least in its halos


def test_no_room_is_said_with_numbers():
    with pytest.raises(ValueError, match="halo of 18 holds 1369 latents, and memory has room for 900"):
        grid(64, 64, 2, 18, 900)
    assert room_for(1000, 2.0, share=0.5) == 250
