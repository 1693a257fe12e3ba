"""The commands `video` and `live` with a video model, loaded from a folder: real files, decoded again."""

import importlib.util
import json
import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.anyflow import pipeline_anyflow_far
from diffusers.pipelines.helios import pipeline_helios
from PIL import Image
from random_pipelines import random_pipeline
from test_io import all_of, record

from streamflow import VideoStream, models
from streamflow.app import config
from streamflow.app.commands import live, video
from streamflow.app.commands.video import SECONDS
from streamflow.app.config import Settings
from streamflow.app.video_model import VideoScenes, arguments_of, check_live, open_video
from streamflow.image_utils import cropped
from streamflow.io import TimedImage, open_source
from streamflow.io.recorder import Recorder
from streamflow.models.loading import is_video
from streamflow.models.tiny_video import TinyVideoDecoder

FRAMES = 9
SHORT = "{num_latent_frames_per_chunk: 3}"
QUICK = ["--json", "--device", "cpu", "--prompt", "a fox", "--steps", "1", "--width", "32", "--height", "32"]


def extras(test):
    """A test that needs PyAV."""
    lacking = importlib.util.find_spec("av") is None
    return pytest.mark.extras(pytest.mark.skipif(lacking, reason="pip install av")(test))


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (pipeline_helios, pipeline_anyflow_far):
        monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(family)`: a pipeline with random weights, as save_pretrained writes it."""
    kept = tmp_path_factory.mktemp("models")

    def saved(family, **changes):
        if not (kept / family).exists():
            random_pipeline(family, **changes).save_pretrained(kept / family)
        return str(kept / family)

    return saved


def said(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def own(model, count, **call):
    """The first frames of this model in a stream of its own, as arrays."""
    stream = VideoStream(models.load(model), output_type="np")
    given = {"prompt": "a fox", "height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
    stream.prepare(**{**given, "num_latent_frames_per_chunk": 3, **call})
    return [frame.timed().pixels for frame in stream.frames(count)]


def coded(frames, rate):
    """What is left of frames in a file of this rate."""
    with closing(Recorder("own.mp4", rate, clock=False)) as recorder:
        recorder.open()
        for frame in frames:
            recorder.write(TimedImage(frame, 0.0))
    return decoded("own.mp4")


def decoded(path):
    return np.stack([one.pixels for one in all_of(open_source(path))])


@extras
def test_frames_of_a_video_model_are_written_at_its_rate(folder, capsys):
    model = folder("helios")
    assert video.main([*QUICK, "--model", model, "--video.arguments", SHORT, "--frames", "20", "--out", "out.mp4"]) == 0
    found = said(capsys)
    assert {**found, "seconds": 0} == {
        **{"file": "out.mp4", "frames": 20, "size": [32, 32], "fps": 24.0, "ended": False, "interrupted": False},
        "seconds": 0,
    }
    assert all_of(source := open_source("out.mp4")) and source.rate == 24
    assert np.array_equal(decoded("out.mp4"), coded(own(model, 20), 24))


@extras
@pytest.mark.slow
def test_seconds_at_another_rate_and_what_it_goes_on_from(folder, capsys, tmp_path):
    model = folder("helios")
    image = np.arange(64 * 40 * 3, dtype=np.uint32).reshape(40, 64, 3).astype(np.uint8)
    Image.fromarray(image).save("start.png")
    record(tmp_path / "clip.mp4", 12)
    clip = [Image.fromarray(cropped(one, 32, 32)) for one in decoded("clip.mp4")]
    starts = {
        "--image": ("start.png", {"image": Image.fromarray(cropped(image, 32, 32))}),
        "--video": ("clip.mp4", {"video": clip}),
    }
    plain = coded(own(model, 10), 20)
    for option, (file, call) in starts.items():
        given = ["--model", model, "--video.arguments", SHORT, "--seconds", "0.5", "--fps", "20", option, file]
        assert video.main([*QUICK, *given, "--out", "out.mp4", "--overwrite"]) == 0
        assert said(capsys)["frames"] == 10 and all_of(source := open_source("out.mp4")) and source.rate == 20
        made = decoded("out.mp4")
        assert np.array_equal(made, coded(own(model, 10, **call), 20)) and not np.array_equal(made, plain)


@extras
@pytest.mark.slow
def test_a_video_that_ends_before_is_whole(folder, capsys):
    model = folder("anyflow-far", rope_max_seq_len=4)
    arguments = [*QUICK, "--model", model, "--out", "out.mp4"]
    assert video.main([*arguments, "--seconds", "30"]) == 0
    found = said(capsys)
    assert found["ended"] and found["fps"] == 16 and len(all_of(open_source("out.mp4"))) == found["frames"] == 13


@extras
@pytest.mark.slow
def test_an_interrupted_video_keeps_what_is_drawn(folder, capsys, monkeypatch):
    class Stop:
        received = False

        def remember(self):
            threading.Timer(0.3, setattr, (self, "received", True)).start()

    arguments = {"num_latent_frames_per_chunk": 3}
    settings = config.parse({"model": folder("helios"), "width": 32, "height": 32, "num_inference_steps": 1})
    settings = settings.model_copy(update={"video": settings.video.model_copy(update={"arguments": arguments})})
    found = video.draw(settings, video.Path("out.mp4"), Stop(), seconds=1000, quiet=True)
    assert found["interrupted"] and not found["ended"] and len(all_of(open_source("out.mp4"))) == found["frames"]


@pytest.mark.slow
def test_it_is_accelerated_and_decoded_as_the_settings_say(folder):
    torch.save(TinyVideoDecoder().state_dict(), "tiny.pth")
    given = {
        "model": folder("helios"),
        "device": "cpu",
        "width": 32,
        "height": 32,
        "num_inference_steps": 1,
        "prompt": "a fox",
    }
    given |= {"video": {"arguments": {"num_latent_frames_per_chunk": 3}}, "tiny_vae": "tiny.pth", "devices": ["cpu"]}
    with (
        open_video(config.parse({**given, "acceleration": {"kind": "compile"}})) as fast,
        open_video(config.parse(given)) as own,
    ):
        assert fast.acceleration == "compile" and own.acceleration == "none" and isinstance(own.vae, TinyVideoDecoder)
        assert np.allclose(fast().images, own().images, atol=1e-4)


def test_kept_keys_are_accelerated_too(folder):
    windows = {"causal_block_size": 2, "base_num_frames": 13, "overlap_history": 5, "use_kv_cache": True}
    given = {"model": folder("skyreels"), "device": "cpu", "width": 32, "height": 32, "prompt": "a fox"}
    given |= {"num_inference_steps": 2, "seed": 3, "video": {"arguments": {**windows, "ar_step": 1}}}
    with open_video(config.parse(given)) as own:
        assert own.acceleration == "none"
        expected = own().images
    with open_video(config.parse({**given, "acceleration": {"kind": "compile", "options": {"backend": "eager"}}})) as fast:
        assert fast.acceleration == "compile" and np.allclose(fast().images, expected, atol=1e-4)


REFUSED = [
    (video, ["--control-maker", "canny"], "a video model does not use it"),
    (video, ["--in", "a.mp4"], "--in: a video model restyles no video"),
    (video, ["--reference", "a.png", "--t-index-list", "[0]"], "--reference: a video model does not use it"),
    (video, ["--accelerate", "tensorrt"], "--accelerate: the networks of video models are not exported"),
    (video, ["--tiny-vae", "true"], "--tiny-vae: a video model takes the path of a file of TAEHV"),
    (video, ["--tiny-vae", "no.pth"], "no.pth"),
    (video, ["--devices", "[cpu, cpu]"], "--devices: a video model takes one more device"),
    (video, ["--guidance-scale", "5"], "--guidance-scale: 5 needs guidance, and cfg_type is none"),
    (video, ["--cfg-type", "self"], "--cfg-type: a video model takes none or full"),
    (video, ["--prompt", "[[a, 1], [b, 1]]"], "--prompt: a video model draws one text"),
    (video, ["--video.arguments", "{seed: 3}"], "--video.arguments: seed has a setting of its own"),
    (video, ["--video.arguments", "{strength: 3}"], "HeliosPipeline takes no 'strength'"),
    (video, ["--image", "no.png"], "there is no file no.png"),
    (video, ["--width", "47"], "divisible by 16"),
    (video, ["--out", "out.gif"], "ends in one of .mp4, .mkv"),
    (live, ["--in", "camera:0", "--live.mode", "fed"], "--in: a video model does not use it"),
    (live, ["--live.policy", "every"], "--live.policy: a video model does not use it"),
    (live, ["--learn", "delta"], "a knob of a video model cannot change 'delta'"),
]


@pytest.mark.parametrize(("command", "argv", "message"), REFUSED, ids=lambda one: one[0] if isinstance(one, list) else "")
def test_what_a_video_model_does_not_take_is_refused(command, argv, message, folder, capsys):
    out = [] if "--out" in argv else ["--out", "null" if command is live else "out.mp4"]
    assert command.main([*QUICK, "--model", folder("helios"), *out, *argv]) in (1, 2)
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("command", "argv"),
    [(video, ["--frames", "3"]), (video, ["--fps", "3"]), (video, ["--image", "a.png"]), (live, ["--video.image", "a.png"])],
    ids=str,
)
def test_what_a_model_of_images_does_not_take_is_refused(command, argv, capsys):
    assert command.main(["--json", "--out", "null" if command is live else "out.mp4", *argv]) == 2
    assert f"{argv[0]}: embedded is no video model" in capsys.readouterr().err


@extras
def test_a_show_of_a_video_model_is_recorded(folder, capsys):
    model = folder("helios")
    arguments = ["--video.arguments", SHORT, "--live.target-fps", "20", "--seconds", "1"]
    assert live.main([*QUICK, "--model", model, *arguments, "--out", "null", "--record", "out.mp4"]) == 0
    found = said(capsys)
    assert found["mode"] == "video" and found["errors"] == 0 and found["wrote"] == ["out.mp4"]
    assert found["drawn"] == found["shown"] - found["repeated"] + found["dropped_out"] and found["drawn"] % FRAMES == 0
    assert found["shown"] - found["dropped_by_sinks"] <= len(decoded("out.mp4")) <= found["shown"]


def test_scenes_change_the_prompt_from_the_next_chunk_on(folder):
    model = folder("helios")
    given = {"model": model, "width": 32, "height": 32, "num_inference_steps": 1}
    scenes = [config.parse({**given, "prompt": text}) for text in ("a fox", "a lighthouse")]
    stream = VideoStream(models.load(model), output_type="np")
    stream.prepare(**arguments_of(scenes[0]), num_latent_frames_per_chunk=3)
    changing = VideoScenes(stream, scenes)
    frames = list(stream.frames(FRAMES))
    assert changing.next(0.5) and not VideoScenes(stream, scenes[:1]).next()
    frames += list(stream.frames(FRAMES))
    plain = own(model, 2 * FRAMES)
    drawn = [frame.timed().pixels for frame in frames]
    assert all(map(np.array_equal, drawn[:FRAMES], plain)) and not np.array_equal(drawn[FRAMES], plain[FRAMES])
    for wrong, message in (
        ({"width": 64}, "scene 2 has another width"),
        ({"cfg_type": "full"}, "scene 2: guidance_scale must be given in every scene"),
    ):
        with pytest.raises(ValueError, match=message):
            check_live(scenes[0], [config.parse({**given, **wrong})], None)


def test_a_model_is_known_by_its_index(folder, tmp_path):
    (tmp_path / "net.safetensors").touch()
    (tmp_path / "empty").mkdir()
    for model in ("embedded", "nowhere", str(tmp_path / "net.safetensors"), str(tmp_path / "empty"), "/no/such/folder"):
        assert not is_video(model)
    assert is_video(folder("helios"))
    assert SECONDS > 0 and Settings().video.arguments == {}
