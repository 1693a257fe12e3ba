"""The command `live` and its scenes, with the embedded model."""

import json

import numpy as np
import pytest
from PIL import Image

from streamflow import config, scenes
from streamflow.commands import live
from streamflow.config import Settings

QUICK = ["--json", "--warmup", "0", "--acceleration.kind", "none", "--num-inference-steps", "2"]


def run(capsys, *argv):
    code = live.main([*QUICK, *map(str, argv)])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_prompt_is_drawn_without_a_source(capsys):
    code, said = run(capsys, "--out", "null", "--seconds", 3, "--live.target-fps", 2)
    assert code == 0 and said["mode"] == "text" and said["shown"] >= 2 and said["errors"] == 0
    assert said["shown"] - said["repeated"] <= said["drawn"]


def test_pictures_of_a_folder_are_restyled_into_another(capsys, tmp_path):
    given, made = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    for k in range(4):
        Image.new("RGB", (128, 128), (60 * k, 90, 200)).save(given / f"{k}.png")
    said = run(capsys, "--in", given, "--out", f"{made}/", "--live.policy", "every", "--live.mode", "fed")[1]
    assert said["drawn"] == 4 and said["mode"] == "fed" and said["latency_p95"] > 0
    pictures = [np.asarray(Image.open(file)) for file in sorted(made.iterdir())]
    assert len(pictures) == said["shown"] - said["dropped_by_sinks"] and pictures[0].shape == (128, 128, 3)
    assert pictures[0].std() > 5


@pytest.mark.slow
def test_the_next_scene_is_warmed_and_shown_by_its_key(capsys, tmp_path, monkeypatch):
    """The key is pressed once some pictures are out; both scenes draw, the second one with its own prompt and size."""
    file, drawn = tmp_path / "b.yaml", []
    config.save(config.parse({"prompt": "a fox, 3d render", "width": 64, "height": 64, "warmup": 0}), file)
    real = live._watch

    def watch(show, scenes_, keys, *rest):
        keys.press("n")
        real(show, scenes_, keys, *rest)
        drawn.append((show.stream.width, show.stream._state.request.prompt))

    monkeypatch.setattr(live, "_watch", watch)
    code, said = run(
        capsys, "--out", "null", "--seconds", 12, "--live.scenes", f"[{file}]", "--live.crossfade", 0, "--live.target-fps", 2
    )
    assert code == 0 and drawn == [(64, "a fox, 3d render")] and said["errors"] == 0


def test_a_scene_that_does_not_fit_is_refused_with_the_numbers(tmp_path, monkeypatch):
    (tmp_path / "net.safetensors").write_bytes(bytes(3000))
    assert scenes.weights_on_disk(str(tmp_path)) == 3000 and scenes.weights_on_disk("owner/name") == 0
    monkeypatch.setattr(scenes, "_free", lambda device: 2000)
    with pytest.raises(MemoryError, match="beside what plays: 2,000 bytes are free, its files alone have 3,000"):
        scenes.open_scene(Settings(model=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--in", "nothing:3"], "unknown source 'nothing:3'"),
        (["--out", "somewhere:3"], "unknown sink"),
        (["--live.policy", "some"], "live.policy: Input should be 'newest' or 'every'"),
        (["--in", "camera:0", "--mode", "txt2img"], "mode is txt2img, and there is a source"),
        (["--mode", "img2img"], "mode is img2img, and there is no source"),
        (["--live.scenes", "[nowhere.yaml]"], "nowhere.yaml"),
        (["--seconds", "0"], "not a number above 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line_and_no_success(argv, message, capsys):
    try:
        code = live.main(argv)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code in (1, 2) and message in said and "Traceback" not in said
