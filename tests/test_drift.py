"""The measures of examples/benchmark/drift.py, on outputs for which they are known."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmark"
pytest.importorskip("matplotlib", reason="the benchmark's figure needs the extra bench")


@pytest.fixture
def drift(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("drift")


def panned(drift, frames):
    return np.stack(list(drift.images(1, frames))).astype(np.float32)


def test_the_input_of_the_pan_moves_one_pixel_a_frame_and_has_no_flicker(drift):
    found = drift.measure(panned(drift, 2 * drift.LAP), speed=1)
    assert found["flicker"] == found["drift"] == 0 and found["distance"] == {"second_lap": 0, "last_lap": 0}
    assert found["detail"] > 0 and found["series"]["colour"] == [[0, 0, 0]] * (2 * drift.LAP // drift.MEAN)
    still = panned(drift, 3)
    assert np.abs(still[1:] - still[:-1]).mean() > 0


def test_flicker_drift_and_colour_of_outputs_that_change_as_known(drift):
    level = np.arange(40, dtype=np.float32)  # rises by one a frame, in red by two
    outputs = level[:, None, None, None] * np.array([2, 1, 1], np.float32) * np.ones((1, 4, 6, 1), np.float32)
    still, pan = (drift.measure(outputs, speed, lap=10) for speed in (0, 1))
    assert still["flicker"] == pan["flicker"] == pytest.approx(4 / 3)
    assert still["detail"] == 0 and still["drift"] == pytest.approx(4 / 3 * 20)
    assert still["distance"] == pytest.approx({"second_lap": 4 / 3 * 10, "last_lap": 4 / 3 * 30})
    assert pan["distance"] == pytest.approx({"second_lap": 4 / 3 * 10, "last_lap": 4 / 3 * 30})
    assert pan["colour_of_last_lap"] == pytest.approx([60, 30, 30])
    assert still["series"]["flicker"] == pytest.approx([4 / 3] * 2)


def test_outputs_that_change_without_drift_have_distance_only(drift):
    outputs = np.random.default_rng(0).normal(128, 20, (60, 16, 16, 3)).astype(np.float32)
    found = drift.measure(outputs, speed=0, lap=20)
    assert found["flicker"] > found["distance"]["last_lap"] > 10 and abs(found["drift"]) < 0.5


def test_less_than_two_laps_are_refused(drift):
    with pytest.raises(ValueError, match="two laps of 10 frames, not over 19 frames"):
        drift.measure(np.zeros((19, 4, 4, 3), np.float32), speed=0, lap=10)


def test_the_figure_has_a_row_for_each_input(drift, tmp_path):
    series = {"flicker": [1, 2], "distance": [3, 4], "colour": [[0, 0, 0], [1, -1, 3]]}
    runs = [{"input": name, "way": way, "series": series} for name in drift.INPUTS for way in drift.WAYS]
    drift.draw({"runs": runs}, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 10_000
