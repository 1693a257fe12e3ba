"""The commands `video` and `morph`, with the embedded model: every frame, its time, its sound; mistakes are told."""

import importlib.util
import json
import signal

import numpy as np
import pytest
from PIL import Image
from test_io import all_of, packets, record, with_sound

from streamflow import image_utils
from streamflow.app.commands import morph, video
from streamflow.conditioning.blending import METHODS
from streamflow.image_utils import cropped
from streamflow.io import open_source


def extras(test):
    """A test that needs PyAV."""
    lacking = importlib.util.find_spec("av") is None
    return pytest.mark.extras(pytest.mark.skipif(lacking, reason="pip install av")(test))


QUICK = ["--json", "--warmup", "0", "--acceleration.kind", "none", "--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@extras
def test_a_video_is_restyled_frame_by_frame_with_its_times_and_its_sound(capsys, tmp_path):
    given = with_sound(tmp_path / "in.mp4", 0.5)
    assert video.main([*QUICK, "--in", "in.mp4", "--out", "out.mkv"]) == 0
    found = said(capsys)
    assert {**found, "seconds": 0} == {
        **{"file": "out.mkv", "frames": 5, "size": [144, 112], "sound": True, "interrupted": False},
        "seconds": 0,
    }
    made = all_of(open_source("out.mkv"))
    assert [round(one.pts, 2) for one in made] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert made[0].pixels.shape == (112, 144, 3)
    sound = packets(given)
    assert 0 < len(packets("out.mkv")) <= len(sound) and packets("out.mkv") == sound[: len(packets("out.mkv"))]
    levels = [one.pixels[60:, 80:].mean() for one in made]  # each of its own frame, which is brighter than the one before
    assert levels == sorted(levels) and levels[-1] - levels[0] > 20


@extras
def test_an_interrupted_video_keeps_what_is_drawn(capsys, tmp_path, monkeypatch, signal_handlers):
    record(tmp_path / "in.mp4", 9)
    real, count = image_utils.uint8_pixels, []

    def interrupted(image):
        count.append(1)
        if len(count) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(image)

    monkeypatch.setattr(image_utils, "uint8_pixels", interrupted)
    arguments = [*QUICK, "--in", "in.mp4", "--out", "out.mp4", "--width", "64", "--height", "64", "--no-sound"]
    assert video.main(arguments) == 130
    found = said(capsys)
    assert (found["frames"], found["size"], found["sound"], found["interrupted"]) == (3, [64, 64], False, True)
    assert len(all_of(open_source("out.mp4"))) == 3


@extras
def test_what_a_video_cannot_be_is_one_line_and_nothing_is_lost(capsys, tmp_path):
    record(tmp_path / "in.mp4", 2)
    (tmp_path / "text.mp4").write_text("no video")
    before = (tmp_path / "in.mp4").read_bytes()
    for code, arguments, says in (
        (2, ["--in", "in.mp4", "--out", "in.mp4"], "is there already"),
        (2, ["--in", "in.mp4", "--out", "in.mp4", "--overwrite"], "is what is read"),
        (2, ["--in", "in.mp4", "--out", "out.mp4", "--mode", "txt2img"], "unrecognized arguments: --mode"),
        (1, ["--in", "in.mp4", "--out", "text.mp4/out.mp4"], "text.mp4"),
        (1, ["--in", "gone.mp4", "--out", "out.mp4"], "no such file: gone.mp4"),
        (1, ["--in", "text.mp4", "--out", "out.mp4"], "cannot be read as a video"),
        (2, ["--in", "in.mp4", "--out", "out.avi"], "ends in one of .mp4, .mkv"),
    ):
        try:
            found = video.main([*QUICK, *arguments])
        except SystemExit as ended:
            found = ended.code
        err = capsys.readouterr().err
        assert found == code and says in err and "Traceback" not in err
    assert (tmp_path / "in.mp4").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "text.mp4"]


def test_the_middle_is_kept():
    wide = np.arange(6 * 12 * 3, dtype=np.uint8).reshape(6, 12, 3)
    assert np.array_equal(cropped(wide, 100, 100), wide[:, 3:9])
    assert np.array_equal(cropped(wide, 8, 1), wide[2:4])  # 12 x 1.5, rounded
    assert cropped(wide, 10, 5).shape == wide.shape and cropped(wide, 1, 1000).shape == (6, 1, 3)


def test_a_morph_goes_over_all_prompts_and_back(capsys, tmp_path):
    prompts = ["a red apple, 3d render", "a tangerine, 3d render", "a fox, 3d render"]
    assert morph.main([*QUICK, *prompts, "--frames", "3", "--output", "new/m.gif", "--sheet", "new/sheet.png"]) == 0
    found = said(capsys)
    assert (found["drawn"], found["frames"]) == (6, 10)
    with Image.open("new/m.gif") as gif:
        assert gif.n_frames == 10 and gif.info["loop"] == 0
    assert Image.open("new/sheet.png").width > Image.open("new/sheet.png").height


@extras
def test_a_morph_as_a_video_ends_at_the_last_prompt(capsys):
    assert morph.main([*QUICK, "a fox", "a ghost", "--frames", "4", "--one-way", "--rate", "8", "--output", "m.mp4"]) == 0
    source = open_source("m.mp4")
    pictures = [one.pixels.astype(int) for one in all_of(source)]
    assert said(capsys)["frames"] == len(pictures) == 4 and source.rate == 8
    way = [np.abs(one - pictures[0]).mean() for one in pictures]
    assert way[1:] == sorted(way[1:]) and way[3] > 5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["a fox"], "two or more"),
        (["a", "b", "--prompt", "c"], "unrecognized arguments: --prompt"),
        (["a", "b", "--output", "m.png"], "ends in .gif, .mp4 or .mkv"),
        (["a", "b", "--blend", "cubic"], "--blend"),
        (["a", "b", "--frames", "1"], "--frames"),
    ],
)
def test_what_a_morph_cannot_be_is_refused(wrong, says, capsys):
    assert tuple(METHODS) == morph.BLENDS
    with pytest.raises(SystemExit) as refused:
        morph.main(wrong)
    assert refused.value.code == 2 and says in capsys.readouterr().err
