"""What docs/architecture.md promises: the folders, one base, a short pipeline.py, and one main path. An image with no option
in use passes no code of inpainting, control nets, LoRAs or hooks."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import PROMPT
from streamdiffusion import StreamDiffusion

import streamflow
from streamflow import StreamFlow

ROOT = Path(streamflow.__file__).parent
ENTRIES = {
    "acceleration",
    "app",
    "benchmark",
    "conditioning",
    "flow",
    "image_filter",
    "image_utils",
    "io",
    "live",
    "models",
    "parallel",
    "pipeline",
    "pretrained",
    "samples",
    "stream",
    "video",
    "wrapper",
}
CALLS, FILES = 46, 10
LEFT_OUT = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>"}
OPTIONS = ("inpaint", "controlnet", "image_prompt", "lora", "hooks")


def test_the_package_has_seventeen_public_entries():
    public = {path.stem for path in ROOT.iterdir() if path.suffix in ("", ".py") and not path.name.startswith("_")}
    assert public - {"py"} == ENTRIES and len(ENTRIES) == 17


def test_the_class_has_one_base_and_its_file_is_short():
    assert StreamFlow.__bases__ == (StreamDiffusion,)
    assert len((ROOT / "pipeline.py").read_text(encoding="utf-8").splitlines()) <= 400


@pytest.fixture
def calls_of(monkeypatch):
    """`calls_of(function)`: (file, name) of every function of the package that a call of it enters."""

    def run(function):
        calls = []

        def profile(frame, event, argument):
            code = frame.f_code
            if event == "call" and code.co_name not in LEFT_OUT and Path(code.co_filename).is_relative_to(ROOT):
                calls.append((Path(code.co_filename).relative_to(ROOT).as_posix(), code.co_qualname))

        sys.setprofile(profile)
        try:
            function()
        finally:
            sys.setprofile(None)
        return calls

    return run


def test_an_image_takes_one_short_path(stream_of, calls_of):
    stream = stream_of("sd3", [2, 3])
    image = PIL.Image.new("RGB", (stream.width, stream.height), (200, 30, 60))
    for _ in range(3):
        stream(image)
    calls = calls_of(lambda: stream(image))
    assert len(calls) <= CALLS, calls
    assert len({file for file, _ in calls}) <= FILES, sorted({file for file, _ in calls})
    assert [call for call in calls if any(option in call[0] for option in OPTIONS)] == []


@pytest.mark.parametrize("call", ["txt2img", "predict_x0_batch", "frames", "stream(image)"])
def test_every_call_that_draws_enters_by_the_same_tick(call, stream_of, calls_of, picture):
    stream = stream_of("sd3", [2, 3])
    run = {
        "txt2img": lambda: stream.txt2img(),
        "predict_x0_batch": lambda: stream.predict_x0_batch(stream.frame_noise(0)),
        "frames": lambda: list(stream.frames([picture(0)])),
        "stream(image)": lambda: stream(picture(0)),
    }[call]
    calls = calls_of(run)
    assert ("stream/inputs.py", "Inputs.group") in calls
    assert ("stream/denoiser.py", "Denoiser.tick") in calls
    assert ("stream/ring.py", "Ring.push") in calls


class Inverting(StreamFlow):
    def decode_image(self, x_0_pred_out):
        return -super().decode_image(x_0_pred_out)


def test_calls_decode_by_the_decode_image_of_a_subclass_or_of_an_instance(stream_of, picture):
    """As StreamDiffusion's class does, whose users replace it."""
    stream, pipe = stream_of("sd3", [2, 3]), stream_of("sd3", [2, 3]).pipe
    other = Inverting(pipe, [2, 3], cfg_type="none")
    other.prepare(PROMPT, num_inference_steps=4)
    expected = stream(picture(0))
    assert torch.equal(other(picture(0)), -expected)
    stream.reset()
    plain = stream.decode_image
    stream.decode_image = lambda latents: plain(latents) / 2
    assert torch.equal(stream(picture(0)), expected / 2)


def test_a_stream_that_is_dropped_is_freed_at_once(stream_of):
    """Without the garbage collector, which would keep buffers on a GPU for an unknown time."""
    gc.collect()
    gc.disable()
    try:
        stream = stream_of("sd3", [2, 3])
        stream.txt2img()
        dropped = weakref.ref(stream)
        del stream
        assert dropped() is None
    finally:
        gc.enable()
