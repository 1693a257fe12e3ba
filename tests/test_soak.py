"""The soak (`pytest -m soak`: half an hour on two cores), and that its judges find what they look for."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from random_pipelines import random_pipeline

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmark"
pytest.importorskip("psutil", reason="the soak needs the extra web")


@pytest.fixture
def module(monkeypatch):
    """`module(name)`: one of the soak's files."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module


def test_acts_cover_all_frames_and_images_keep_their_number(module):
    acts = module("soak_acts")
    played = list(acts.acts(range(100, 400), seed=1))
    assert [number for act in played for number in act.numbers] == list(range(100, 400))
    assert any(a.prompt != b.prompt for a, b in pairwise(played)) and len({act.size for act in played}) > 2
    for act in played:
        for number in (act.numbers.start, 65535):
            shown = act.image(number).resize((64, 64), 1)
            assert act.image(number).size == act.size and acts.number_of(np.asarray(shown) / 255) == number
        mask = act.mask_of(64, 48)
        assert mask.shape == (48, 64) and not mask[:12, :16].any()


@pytest.mark.parametrize("answers", [[1, 2], [0, 1], [0, 2, 1], [0, 1, 0, 2], [0, 1, 2, 3], []])
def test_what_is_missing_or_out_of_order_is_found(module, answers):
    check = module("soak_acts").check_answers
    check([0, 0, 1, 2, 2], range(3))
    with pytest.raises(RuntimeError, match="where frames 0 to 2 went in"):
        check(answers, range(3))


def test_memory_is_told_from_the_first_warm_sample_on(module):
    flatness = module("soak").flatness
    samples = [(100, 50, 0), (600, 100, 0), (1000, 101, 0), (1500, 97, 0)]
    assert flatness(samples, 1) == pytest.approx((-0.03, 0.01))
    assert flatness(samples[:1], 1) == (None, None)


def test_sessions_hold_every_frame_once(module):
    split = module("soak").split
    assert split(range(3, 10), 3) == [range(3, 5), range(5, 7), range(7, 10)]
    assert split(range(2), 4) == [range(0, 1), range(1, 2)] and split(range(0), 4) == []


CUDA = pytest.param(
    ["--device", "cuda", "--model", "embedded", "--acceleration", "cuda-graph"],
    marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    id="cuda",
)


@pytest.mark.soak
@pytest.mark.parametrize("arguments", [pytest.param(None, id="cpu"), CUDA])
def test_ten_thousand_frames(tmp_path, arguments):
    if arguments is None:
        random_pipeline("sd3").save_pretrained(tmp_path / "model")
        arguments = ["--model", tmp_path / "model"]
    pytest.importorskip("uvicorn", reason="the server needs the extra web")
    file = tmp_path / "soak.json"
    command = [sys.executable, FOLDER / "soak.py", "--output", file, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    found = json.loads(file.read_text())
    assert found["kept"] and {part["frames"] for part in found["parts"].values()} == {10_000}
    assert file.with_suffix(".png").exists()


PLAY = """
import os, signal, sys, threading, time
from streamflow.app.cli import main
from streamflow import StreamFlowWrapper
way = sys.argv[1]
flags = ["--device", "cpu", "--warmup", "0", "--acceleration.kind", "none", "--out", "null", "--live.target-fps", "30"]
if way == "seconds":
    raise SystemExit(main(["live", *flags, "--seconds", "0.3"]))
if way == "clip":
    raise SystemExit(main(["live", *flags, "--in", sys.argv[2], "--live.policy", "every"]))
if way == "interrupt":
    def interrupt():
        while "streamflow live clock" not in [one.name for one in threading.enumerate()]:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    raise SystemExit(main(["live", *flags]))
wrapper = StreamFlowWrapper("embedded", [0, 1], device="cpu", warmup=0, acceleration="none")
show = wrapper.stream.live(None, "null", target_fps=30)
show.wait(0.3)
"""


@pytest.mark.soak
def test_two_hundred_starts_and_stops_of_a_live_show(tmp_path):
    """Four ways to end, in turn: after some seconds, at the source's end, by Ctrl-C, and by leaving the program while it
    plays. None may abort: a thread that outlives the interpreter ends the process with SIGABRT."""
    for k in range(3):
        PIL.Image.new("RGB", (128, 128), (60 * k, 90, 200)).save(tmp_path / f"{k}.png")

    def play(way):
        command = [sys.executable, "-c", PLAY, way, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return way, done.returncode, done.stderr[-2000:]

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(play, ["seconds", "clip", "interrupt", "leave"] * 50))
    assert not [one for one in ended if one[1]]
