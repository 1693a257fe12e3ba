"""The morph example: from the one image to the other in small steps, and back."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from streamflow.image_utils import pil2tensor

EXAMPLE = Path(__file__).parents[1] / "examples/morph.py"


@pytest.mark.slow
def test_a_morph_goes_from_one_image_to_the_other_and_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(EXAMPLE))["main"]([]) == 0
    assert "30 frames from 'a red apple, 3d render'" in capsys.readouterr().out
    frames = []
    with Image.open("outputs/morph.gif") as gif:
        assert gif.n_frames == 58 and gif.info["loop"] == 0
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(pil2tensor(gif.convert("RGB")))
    whole = (frames[29] - frames[0]).norm()
    from_first = [float((frame - frames[0]).norm() / whole) for frame in frames]
    assert whole > 5 and from_first[0:30:5] == sorted(from_first[0:30:5])
    assert max(float((b - a).norm() / whole) for a, b in pairwise(frames)) < 0.5
    assert all(abs(from_first[29 + k] - from_first[29 - k]) < 0.1 for k in range(1, 29))
