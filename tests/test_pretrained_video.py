"""The embedded video model: its folder, that plain diffusers draws with it what a stream draws, and its figures."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", minversion="0.42", reason="the folder is of a class of diffusers 0.42")
pytest.importorskip("ftfy", reason="diffusers needs it for prompts: pip install ftfy")

from diffusers import HeliosPipeline  # noqa: E402

from streamflow import VideoStream, models  # noqa: E402
from streamflow.app import config  # noqa: E402
from streamflow.app.commands import live, video  # noqa: E402
from streamflow.app.server.slot import about_models  # noqa: E402
from streamflow.app.video_model import open_video  # noqa: E402
from streamflow.io import open_source  # noqa: E402
from streamflow.models.loading import is_video  # noqa: E402
from streamflow.pretrained import EXAMPLE_VIDEO_PROMPTS, embedded_video  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(embedded_video())
LIMIT_MIB = 10
PROMPT, IMAGES = "a rose, 3d render, pulsing", 9
FILES = {
    "NOTICE",
    "README.md",
    "call.json",
    "evaluation.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def pipe():
    loaded = HeliosPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def call():
    return json.loads((FOLDER / "call.json").read_text())


def test_its_files_size_and_licences():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.relative_to(FOLDER).as_posix() for path in files} == FILES
    assert sum(path.stat().st_size for path in files) / 2**20 <= LIMIT_MIB
    notice = (FOLDER / "NOTICE").read_text()
    assert "Copyright (c) Microsoft Corporation" in notice and "Apache License, Version 2.0" in notice
    assert (FOLDER / "README.md").read_text() == (ROOT / "examples/train_video/card.md").read_text()
    assert '"pretrained/video/**"' in (ROOT / "setup.py").read_text()


def test_a_stream_without_arguments_is_the_pipelines_call_with_those_of_its_folder(pipe):
    generator = torch.Generator().manual_seed(3)
    own = pipe(PROMPT, generator=generator, num_frames=2 * IMAGES, output_type="pt", **call()).frames[0]
    stream = VideoStream(pipe, output_type="pt")
    stream.prepare(PROMPT, seed=3)
    streamed = torch.cat([chunk.images for chunk in stream.chunks(2)])
    assert streamed.shape == (2 * IMAGES, 3, 128, 128) and stream.arguments == call() | {"prompt": PROMPT}
    assert torch.equal(streamed[: len(own)], own) and len(own) > IMAGES, "which leaves out what is no multiple of four"
    assert streamed[0, :, 40:88, 56:72].std() > 0.1, "a flower on white"
    stream.update(num_inference_steps=2)
    assert stream.arguments["num_inference_steps"] == 2 and stream.arguments["width"] == 128


def test_arguments_of_a_folder_are_checked(pipe, tmp_path):
    other = copy.copy(pipe)
    other.register_to_config(_name_or_path=str(tmp_path))
    assert models.video_adapter_for(other).defaults()["guidance_scale"] == 5.0, "the pipeline's own, without a file"
    for text, error, message in (
        ('{"strength": 1}', TypeError, "HeliosPipeline takes no 'strength'"),
        ('{"num_frames": 9}', ValueError, "num_frames is no argument of a video stream"),
        ('{"width": "wide"}', TypeError, "width must be an integer"),
        ("[128]", ValueError, r"call\.json holds arguments of a pipeline's call by their names, not a list"),
        ('{"width": 1', ValueError, r"call\.json is no JSON"),
    ):
        (tmp_path / "call.json").write_text(text)
        with pytest.raises(error, match=message):
            VideoStream(other).prepare(PROMPT)


def test_it_is_known_by_its_name():
    assert is_video("embedded-video") and not is_video("embedded")
    about = about_models(config.Settings(model="embedded-video"))["model"]
    assert about["examples"] == EXAMPLE_VIDEO_PROMPTS and "in motion" in about["prompt"]
    with pytest.raises(ValueError, match="HeliosPipeline draws videos"):
        models.adapter_for(models.load("embedded-video"))


def test_the_figures_of_the_guide_are_those_of_the_report():
    report = json.loads((FOLDER / "evaluation.json").read_text())
    guide = (ROOT / "docs/guides/embedded-model.md").read_text(encoding="utf-8")
    for title, name in (
        ("from prompts", "streams"),
        ("longer, from fewer prompts", "long"),
        ("from an image of a withheld concept", "images"),
    ):
        right = " | ".join(f"{share:.1%}".replace("%", " %") for share in report[name]["right"])
        assert f"| {title} | {right} | {report[name]['near'][-1]:.1f} dB |" in guide
    assert f"with {report['prompts']} prompts" in guide
    assert f"The VAE restores withheld images to {report['vae']:.1f} dB." in guide


def loaded_by_folder(count, **arguments):
    """The first frames of a stream of the folder, as arrays."""
    stream = VideoStream(models.load(str(FOLDER)), output_type="np")
    stream.prepare(PROMPT, **arguments)
    return [frame.timed().pixels for frame in stream.frames(count)]


@pytest.mark.slow
def test_settings_draw_it_with_the_arguments_of_its_folder(tmp_path):
    Image.new("RGB", (200, 150), "red").save(tmp_path / "start.png")
    settings = {"model": "embedded-video", "prompt": PROMPT, "device": "cpu"}
    started = settings | {"num_inference_steps": 2, "video": {"image": str(tmp_path / "start.png")}}
    with open_video(config.parse(settings)) as own, open_video(config.parse(started)) as other:
        assert own.arguments == call() | {"prompt": PROMPT, "negative_prompt": ""}
        assert np.array_equal([frame.timed().pixels for frame in own.frames(IMAGES)], loaded_by_folder(IMAGES))
        assert other.arguments["image"].size == (150, 150)  # of 200 x 150, in the proportions of 128 x 128
        assert other.arguments["num_inference_steps"] == 2


@pytest.mark.slow
@pytest.mark.extras
def test_the_commands_draw_it_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av", reason="pip install av")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("no network"))
    own = ["--model", "embedded-video", "--device", "cpu", "--prompt", PROMPT, "--json"]
    assert video.main([*own, "--frames", "10", "--out", "out.mp4"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["frames"], found["size"], found["fps"]) == (10, [128, 128], 24.0)
    source = open_source("out.mp4")
    source.open()
    first = source.read().pixels.astype(int)
    source.close()
    assert np.abs(first - loaded_by_folder(1)[0]).mean() < 4, "but for the file's compression"
    (tmp_path / "video.yaml").write_text("model: embedded-video\n")
    assert live.main(["--config", "video.yaml", *own[2:], "--seconds", "1", "--out", "null"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["mode"] == "video" and shown["drawn"] > 0 and shown["errors"] == 0
