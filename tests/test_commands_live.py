"""The command `live` and its scenes, with the embedded model."""

import gc
import json
import os
import re
import signal
import threading
import time
import wave
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import slow
from diffusers.pipelines.helios import pipeline_helios
from PIL import Image
from random_pipelines import random_pipeline
from test_io import record

from streamflow.app import config, scenes
from streamflow.app.commands import live
from streamflow.app.config import Settings
from streamflow.pretrained import embedded

QUICK = ["--json", "--warmup", "0", "--acceleration.kind", "none", "--num-inference-steps", "2"]
BRIEF = ["--live.target-fps", "20", "--seconds", "0.1"]
FULL, RESTYLED, OSC = ("--cfg-type", "full"), ("--in", "{folder}"), ("--control.osc", "127.0.0.1:0")
VIDEO = ("--model", "{video_model}", "--width", "64", "--height", "64")
# Each option of `streamflow live --help`: its value, and the options that it needs. {...}: a file of the fixture `files`.
OPTIONS = {
    "--config": ("{settings}",),
    "--json": (),
    "--in": ("{folder}",),
    "--out": ("{drawn}/",),
    "--record": ("{record}",),
    "--seconds": ("0.2",),
    "--learn": ("seed", *OSC),
    "--model": ("{model}",),
    "--family": ("sd3",),
    "--device": ("cpu",),
    "--dtype": ("bfloat16",),
    "--devices": ("[cpu, cpu]",),
    "--offload-text-encoders": ("true",),
    "--split": ("frames", "--devices", "[cpu, cpu]"),
    "--mode": ("img2img", *RESTYLED),
    "--prompt": ("[[a red apple, 0.6], [a fox, 0.4]]",),
    "--negative-prompt": ("blurry", *FULL),
    "--num-inference-steps": ("3",),
    "--steps": ("3",),
    "--t-index-list": ("[0, 1]",),
    "--strength": ("0.6", *RESTYLED),
    "--cfg-type": ("self",),
    "--guidance-scale": ("2.5", *FULL),
    "--delta": ("0.5", "--cfg-type", "initialize"),
    "--seed": ("7",),
    "--width": ("64",),
    "--height": ("64",),
    "--frame-buffer-size": ("2",),
    "--use-denoising-batch": ("false",),
    "--do-add-noise": ("true",),
    "--tiny-vae": ("true",),
    "--references": ("['{style}']",),
    "--reference": ("{style}",),
    "--loras": ('{{"{lora}": 0.5}}',),
    "--controlnet.net": ("{net}", "--controlnet.maker", "canny", *RESTYLED),
    "--control-net": ("{net}", "--control-maker", "canny", *RESTYLED),
    "--controlnet.maker": ("lineart", "--control-net", "{net}", *RESTYLED),
    "--control-maker": ("canny", "--control-net", "{net}", *RESTYLED),
    "--controlnet.maker-model": ("owner/name", "--control-net", "{net}", "--control-maker", "canny", *RESTYLED),
    "--controlnet.scale": ("0.5", "--control-net", "{net}", "--control-maker", "canny", *RESTYLED),
    "--acceleration.kind": ("auto",),
    "--accelerate": ("auto",),
    "--acceleration.options": ("{{threads: 1}}", "--acceleration.kind", "onnxruntime"),
    "--similar-image-filter.threshold": ("0.9", *RESTYLED),
    "--similar-image-filter.max-skip-frame": ("3", *RESTYLED),
    "--warmup": ("1",),
    "--video.image": ("{style}", *VIDEO),
    "--video.video": ("{clip}", *VIDEO),
    "--video.arguments": ("{{keep_first_frame: true}}", *VIDEO),
    "--live.source": ("{folder}",),
    "--live.sinks": ('["null", "{drawn}/"]',),
    "--live.target-fps": ("15",),
    "--live.policy": ("every", *RESTYLED),
    "--live.mode": ("free", *RESTYLED),
    "--live.on-error": ("raise",),
    "--live.crossfade": ("0.1",),
    "--live.scenes": ('["{settings}"]',),
    "--control.osc": ("127.0.0.1:0",),
    "--control.page": ("0",),
    "--osc-page": ("0",),
    "--control.midi": ("no such port",),
    "--control.sound": ('["audio:{folder}/../tone.wav"]', "--control.mappings", "[{{address: 'audio:level', field: seed}}]"),
    "--control.mappings": ("[{{address: 'osc:/w', field: seed, range: [1, 8]}}]", *OSC),
    "--control.keys": ("{{x: panic}}",),
}
OTHER_NAMES = {
    "--steps": "--num-inference-steps",
    "--accelerate": "--acceleration.kind",
    "--control-net": "--controlnet.net",
    "--control-maker": "--controlnet.maker",
    "--osc-page": "--control.page",
}
REFUSED = {
    "--offload-text-encoders": "the device is cpu",
    "--frame-buffer-size": "draws frame by frame",
    "--control.midi": "MIDI",
    "--references": "takes no reference images",
    "--reference": "takes no reference images",
    "--controlnet.maker-model": "control maker 'canny' needs no model",
}
NO_SETTING = ("--config", "--json", "--in", "--out", "--record", "--seconds", "--learn")  # what these do is seen elsewhere


@pytest.fixture(autouse=True)
def frozen():
    """What `live` gave back to garbage collection is left out of it again, as in the other modules."""
    yield
    gc.freeze()


def run(capsys, *argv):
    code = live.main([*QUICK, *map(str, argv)])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_prompt_is_drawn_without_a_source(capsys):
    code, said = run(capsys, "--out", "null", "--seconds", 1.5, "--live.target-fps", 4)
    assert code == 0 and said["mode"] == "text" and said["shown"] >= 2 and said["errors"] == 0
    assert said["shown"] - said["repeated"] <= said["drawn"]


def test_images_of_a_folder_are_restyled_into_another(capsys, tmp_path):
    given, made = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    for k in range(4):
        Image.new("RGB", (128, 128), (60 * k, 90, 200)).save(given / f"{k}.png")
    said = run(capsys, "--in", given, "--out", f"{made}/", "--live.policy", "every", "--live.mode", "fed")[1]
    assert said["drawn"] == 4 and said["mode"] == "fed" and said["latency_p95"] > 0 and said["wrote"] == [str(made)]
    pictures = [np.asarray(Image.open(file)) for file in sorted(made.iterdir())]
    assert len(pictures) == said["shown"] - said["dropped_by_sinks"] and pictures[0].shape == (128, 128, 3)
    assert pictures[0].std() > 5


@pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGTERM])
def test_a_signal_ends_a_show_with_exit_code_0(number, capsys, signal_handlers):
    def interrupt():
        while "streamflow live clock" not in [one.name for one in threading.enumerate()]:
            time.sleep(0.005)
        for _ in range(3):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    threading.Thread(target=interrupt, daemon=True).start()
    code, said = run(capsys, "--out", "null")
    assert code == 0 and said["errors"] == 0
    assert "streamflow live clock" not in [one.name for one in threading.enumerate()]


@pytest.mark.slow
def test_the_next_scene_is_warmed_and_shown_by_its_key(capsys, tmp_path, monkeypatch):
    """The key is pressed once some images are out; both scenes draw, the second one with its own prompt and size."""
    file, drawn = tmp_path / "b.yaml", []
    config.save(config.parse({"prompt": "a fox, 3d render", "width": 64, "height": 64, "warmup": 0}), file)
    real = live._watch

    def watch(show, scenes_, keys, *rest):
        keys.press("n")
        real(show, scenes_, keys, *rest)
        drawn.append((show.stream.width, show.stream._denoiser.state.request.prompt))

    monkeypatch.setattr(live, "_watch", watch)
    code, said = run(
        capsys, "--out", "null", "--seconds", 12, "--live.scenes", f"[{file}]", "--live.crossfade", 0, "--live.target-fps", 2
    )
    assert code == 0 and drawn == [(64, "a fox, 3d render")] and said["errors"] == 0


def test_a_scene_that_does_not_fit_is_refused_with_the_numbers(tmp_path, monkeypatch):
    (tmp_path / "net.safetensors").write_bytes(bytes(3000))
    assert scenes.weights_on_disk(str(tmp_path)) == 3000 and scenes.weights_on_disk("owner/name") == 0
    monkeypatch.setattr(scenes, "free_bytes", lambda device: 2000)
    with pytest.raises(MemoryError, match="beside the scene that plays: 2,000 bytes are free, its files alone have 3,000"):
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
        (["--in", "camera:0", "--t-index-list", "!!int ''"], "a tag (!name) is not allowed"),
        (["--in", "camera:0", "--t-index-list", "[]", "--acceleration.kind", "none"], "--t-index-list is empty"),
        (["--config", "/dev/null/a.yaml"], "Not a directory"),
        (["--config", "/proc/self/mem"], "Input/output error"),
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


@pytest.mark.parametrize(
    "argv", [slow(["--record", "{file}/out.mp4"]), slow(["--out", "folder:{file}"]), ["--out", "{file}/"]], ids=str
)
def test_a_sink_that_never_worked_is_exit_code_1(argv, tmp_path, capsys):
    if "--record" in argv:
        pytest.importorskip("av")
    (tmp_path / "file").touch()
    given = [one.format(file=tmp_path / "file") for one in argv]
    assert live.main([*QUICK, *BRIEF, "--out", "null", *given]) == 1
    said = capsys.readouterr()
    assert "streamflow live: error: " in said.err and "file" in said.err and not said.out


def test_every_option_that_the_help_shows_is_tried(capsys):
    with pytest.raises(SystemExit):
        live.main(["--help-all"])
    options = capsys.readouterr().out.split("options:")[1]
    assert set(re.findall(r"^ +(--[a-z.-]+)", options, re.MULTILINE)) - {"--help-all"} == set(OPTIONS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by the names that `OPTIONS` uses."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from random_pipelines.control import random_control

    from streamflow.models.loading import load

    folder = tmp_path_factory.mktemp("live")
    (folder / "in").mkdir()
    for k in range(3):
        Image.new("RGB", (128, 128), (60 * k, 90, 200)).save(folder / "in" / f"{k}.png")
    with wave.open(str(folder / "tone.wav"), "wb") as tone:
        tone.setparams((1, 2, 8000, 0, "NONE", ""))
        tone.writeframes(np.int16(2e4 * np.sin(np.arange(8000))).tobytes())
    config.save(config.parse({"prompt": "a fox, 3d render", "warmup": 0}), folder / "b.yaml")
    pipe = load("embedded")
    random_control(pipe.transformer).save_pretrained(folder / "net")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    type(pipe).save_lora_weights(folder / "lora", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    names = {"folder": "in", "style": "in/0.png", "settings": "b.yaml", "lora": "lora", "drawn": "out", "record": "out.mp4"}
    random_pipeline("helios").save_pretrained(folder / "helios")
    record(folder / "clip.mp4", 40)
    names |= {"video_model": "helios", "clip": "clip.mp4"}
    return {"model": embedded(), "net": str(folder / "net")} | {name: str(folder / file) for name, file in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_the_help_is_in_force_or_refused_in_one_line(option, files, capsys, monkeypatch):
    monkeypatch.setattr(pipeline_helios, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    played, play = [], live.play

    def spy(settings, *rest, **named):
        played.append(settings)
        return play(settings, *rest, **named)

    monkeypatch.setattr(live, "play", spy)
    given = [value.format(**files) for value in OPTIONS[option]]
    sink = [] if option in ("--out", "--live.sinks") else ["--out", "null"]
    code = live.main([*QUICK, *BRIEF, *sink, option, *given])
    said = capsys.readouterr()
    if option in REFUSED:
        assert code in (1, 2) and REFUSED[option] in said.err and "Traceback" not in said.err
        return
    found = json.loads(said.out.splitlines()[-1])
    assert code == 0 and found["shown"] >= 1 and found["errors"] == 0
    monkeypatch.setattr(live, "play", lambda settings, *rest, **named: played.append(settings) or {})
    live.main([*QUICK, *BRIEF, "--out", "null"])
    name = OTHER_NAMES.get(option, option)
    with_it, without = (reduce(_field, name[2:].split("."), settings) for settings in played)
    assert option in NO_SETTING or with_it != without


def _field(section, name):
    return getattr(section, name.replace("-", "_"), None)
