"""The morph example: from the one picture to the other in small steps."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

from streamflow.image_utils import pil2tensor

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples/morph.py"))


def test_a_morph_goes_from_one_picture_to_the_other_and_back(tmp_path, capsys):
    output, sheet = tmp_path / "new" / "morph.gif", tmp_path / "sheet.png"
    assert EXAMPLE["main"](f"--frames 5 --steps 2 --output {output} --sheet {sheet}".split()) == 0
    assert "5 frames from 'a red apple, 3d render'" in capsys.readouterr().out
    with Image.open(output) as gif:
        assert gif.n_frames == 8 and gif.info["loop"] == 0
        frames = []
        for k in range(8):
            gif.seek(k)
            frames.append(pil2tensor(gif.convert("RGB")))
    whole = (frames[4] - frames[0]).norm()
    from_first = [(frame - frames[0]).norm() / whole for frame in frames]
    assert whole > 5 and from_first[1] < 0.9 and from_first[1:4] == sorted(from_first[1:4])
    assert all(abs(from_first[4 + k] - from_first[4 - k]) < 0.1 for k in range(1, 4))
    assert Image.open(sheet).width > Image.open(sheet).height


@pytest.mark.parametrize("wrong", ["--frames 1", "--steps 0", "--blend cubic"])
def test_what_cannot_be_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as refused:
        EXAMPLE["main"](wrong.split())
    assert refused.value.code == 2 and wrong.split()[0] in capsys.readouterr().err
