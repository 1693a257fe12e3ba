"""Every example runs as its head says, and draws; with the embedded model, small numbers, and weights made here."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamflow import StreamFlowWrapper

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
LARGER = {"benchmark_scaling.py", "make_samples.py", "make_teaser.py", "ray_batch.py", "ray_serve.py", "side_by_side.py"}
LARGER |= {"torchrun_decode.py"}  # tools
TRAINING = ("train_emoji", "train_edit", "train_video")
SHORT = [
    path
    for path in sorted(FOLDER.rglob("*.py"))
    if path.name not in LARGER and path.parent.name not in TRAINING and path.name not in ("benchmark.py", "server.py")
    and (path.parent.name != "benchmark" or path.name in ("single.py", "multi.py"))
]  # fmt: skip
NAMES = [str(path.relative_to(FOLDER)) for path in SHORT]


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"example_{name[:-3].replace('/', '_').replace('-', '_')}", FOLDER / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_its_head_has_its_command_and_it_is_short(name, capsys):
    text = (FOLDER / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert re.search(rf"^ *python examples/{name}", ast.get_docstring(tree), re.MULTILINE)
    code = [line for line in text.splitlines() if line.strip()]
    assert 15 <= len(code) <= 60, f"{len(code)} lines"
    with pytest.raises(SystemExit) as ended:
        loaded(name).main(["--help"])
    assert ended.value.code == 0 and f"examples/{name}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with what the examples read: images, a video, a LoRA and a control net for the embedded model."""
    import torch
    from random_pipelines.control import random_control
    from test_loras import write_lora

    from streamflow import models

    folder = tmp_path_factory.mktemp("examples")
    (folder / "photos").mkdir()
    for k in range(3):
        pixels = np.full((96, 128, 3), 255, np.uint8)
        pixels[20:76, 10 + 30 * k : 60 + 30 * k] = (200, 30, 30 + 60 * k)
        Image.fromarray(pixels).save(folder / "photos" / f"{k}.png")
    pipe = models.load("embedded", device="cpu", dtype=torch.float32)
    random_control(pipe.transformer).save_pretrained(folder / "control")
    loaded("edit/random_klein.py").main(["--output", str(folder / "klein")])
    write_lora(pipe, {"transformer": ["to_q", "to_v"]}, str(folder / "lora"), seed=0)
    return folder


def runs(there):
    """name: (arguments, what is made: a file or the number of images in a folder)."""
    photo, photos = str(there / "photos/0.png"), str(there / "photos")
    lora, control = str(there / "lora"), str(there / "control")
    edit = ["--model", str(there / "klein"), "--size", "128", "128"]
    return {
        "edit/folder.py": (["--input", photos, "--style", photo, *edit], "outputs/edited", 3),
        "edit/style_morph.py": (["--input", photo, "--frames", "5", *edit], "outputs/style_morph.gif", 1),
        "txt2img/single.py": (["--count", "2"], "outputs/txt2img", 2),
        "txt2img/multi.py": (["--calls", "2", "--frame-buffer-size", "2"], "outputs/txt2img-multi", 4),
        "img2img/single.py": (["--input", photo, "--strength", "0.5"], "outputs/img2img.png", 1),
        "img2img/multi.py": (["--input", photos, "--strength", "0.5"], "outputs/restyled", 3),
        "optimal-performance/multi.py": (["--count", "4", "--frame-buffer-size", "2"], "outputs/multi.png", 1),
        "guidance.py": ([], "outputs/guidance.png", 1),
        "seed_walk.py": (["--frames", "3", "--seeds", "2", "3"], "outputs/seed_walk.gif", 1),
        "morph.py": (["--frames", "6"], "outputs/morph.gif", 1),
        "inpaint.py": (["--input", photo], "outputs/inpaint.png", 1),
        "lora.py": (["--lora", lora, "--strengths", "0", "1"], "outputs/lora.png", 1),
        "controlnet.py": (["--control-net", control, "--images", photos], "outputs/controlnet", 3),
        "multi_gpu_decode.py": (["--devices", "cpu", "cpu", "--count", "3"], "outputs/decode.png", 1),
        "real_models.py": (["embedded", "--count", "1"], "outputs", 1),
        "own_family.py": ([], "outputs/own_family.png", 1),
        "video_stream.py": (["--frames", "9"], "outputs/video_stream.webp", 1),
        "make_samples.py": ([], "outputs/samples", 1),
        "side_by_side.py": (["--stride", "24", "--prompt", "a tangerine, 3d render"], "outputs/side-by-side.webp", 1),
        "with_compile.py": (["--acceleration", "none"], "outputs/with_compile.png", 1),
    }


NOT_DRAWING = ("benchmark/single.py", "benchmark/multi.py", "optimal-performance/single.py", "vid2vid/main.py")
NOT_DRAWING += ("webcam/main.py", "screen/main.py", "with_tensorrt.py", "edit/random_klein.py", "edit/webcam.py")
NOT_DRAWING += ("gradio/app.py",)  # tests/test_gradio.py
DRAWING = sorted({*NAMES, "make_samples.py", "side_by_side.py"} - set(NOT_DRAWING))


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWING)
def test_it_draws_and_says_where(name, there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, made, count = runs(there)[name]
    steps = [] if name in ("real_models.py", "own_family.py", "make_samples.py", "side_by_side.py") else ["--steps", "2"]
    assert loaded(name).main([*arguments, *steps]) == 0
    assert made in capsys.readouterr().out
    files = sorted(Path(made).glob("*.png")) if Path(made).is_dir() else [Path(made)]
    assert len(files) == count
    for file in files:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) >= 128 and pixels.std() > 10, file


@pytest.mark.slow
def test_the_walk_passes_the_seeds_own_images_and_they_differ(tmp_path):
    made = tmp_path / "walk.webp"
    assert loaded("seed_walk.py").main(["--frames", "2", "--output", str(made)]) == 0
    with Image.open(made) as file:
        frames = [np.asarray(file.convert("RGB"), np.float32) for k in range(file.n_frames) if file.seek(k) is None]
    assert len(frames) == 8
    faces = frames[::2]
    assert min(np.abs(one - other).mean() for one, other in combinations(faces, 2)) > 3
    with StreamFlowWrapper("embedded", mode="txt2img", cfg_type="none", warmup=0) as wrapper:
        for k, seed in enumerate((2, 3, 8, 11)):
            wrapper.prepare("a face, 3d render", num_inference_steps=4, seed=seed)
            own = np.asarray(wrapper(), np.float32)
            off = [np.abs(own - face).mean() for face in faces]
            assert off.index(min(off)) == k and off[k] < 3, off  # the file is compressed


@pytest.mark.slow
def test_the_kept_half_of_an_inpainted_image_is_the_image(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loaded("inpaint.py").main(["--input", str(there / "photos/0.png"), "--steps", "2"]) == 0
    given = np.asarray(Image.open(there / "photos/0.png").resize((128, 128)))
    drawn = np.asarray(Image.open("outputs/inpaint.png"))
    assert np.abs(drawn[:, 64:].astype(int) - given[:, 64:]).max() <= 1
    assert np.abs(drawn[:, :64].astype(int) - given[:, :64]).mean() > 5


@pytest.mark.slow
def test_the_lora_shows_and_strength_zero_is_none_of_it(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--lora", str(there / "lora"), "--strengths", "0", "1", "0", "--steps", "1"]
    assert loaded("lora.py").main(arguments) == 0
    none, full, again = np.split(np.asarray(Image.open("outputs/lora.png")).astype(int), 3, axis=1)
    assert np.array_equal(none, again) and np.abs(none - full).max() > 10


@pytest.mark.slow
@pytest.mark.extras
def test_a_video_a_camera_and_a_screen(there, tmp_path, monkeypatch, capsys):
    pytest.importorskip("av", reason="pip install av")
    from test_io import record

    from streamflow.io import open_source

    monkeypatch.chdir(tmp_path)
    record(tmp_path / "in.mp4", 4)
    assert loaded("vid2vid/main.py").main(["--input", "in.mp4", "--steps", "2", "--strength", "0.5"]) == 0
    video = open_source("outputs/vid2vid.mp4")
    video.open()
    assert [one.pixels.shape for one in iter(video.read, None)] == [(112, 144, 3)] * 4 and video.rate == 10
    video.close()
    photo = str(there / "photos/0.png")
    live = ["--steps", "2", "--fps", "2"]
    restyled = ["--strength", "0.5", "--seconds", "7"]
    assert loaded("webcam/main.py").main(["--source", f"image:{photo}", "--sink", "folder:seen", *live, *restyled]) == 0
    assert "mode='" in capsys.readouterr().out and len(list(Path("seen").glob("*.png"))) >= 2
    edit = ["--model", str(there / "klein"), "--size", "128", "128", "--style", photo, "--acceleration", "none"]
    source = ["--source", f"image:{photo}", "--sink", "folder:edited", "--seconds", "5"]
    assert loaded("edit/webcam.py").main([*source, *edit, *live]) == 0
    assert "mode='" in capsys.readouterr().out and len(list(Path("edited").glob("*.png"))) >= 2
    assert loaded("optimal-performance/single.py").main(["--sink", "null", "--seconds", "3", *live]) == 0
    assert float(capsys.readouterr().out.split()[0]) > 0
    if os.environ.get("DISPLAY"):
        part = ["--width", "64", "--height", "64", "--sink", "null", "--seconds", "7", "--steps", "2", "--strength", "0.5"]
        assert loaded("screen/main.py").main(part) == 0


@pytest.mark.slow
def test_benchmarks_end_with_json_and_tensorrt_says_what_it_needs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loaded("benchmark/single.py").main(["--iterations", "2", "--steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] > 0
    assert loaded("benchmark/multi.py").main(["--iterations", "2", "--steps", "2", "--frame-buffer-sizes", "1", "2"]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["images_per_second"]) == {"1", "2"}
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA|GPU"):
            loaded("with_tensorrt.py").main(["--steps", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_family.py", "txt2img/single.py", "guidance.py"])
def test_the_command_in_its_head_runs_by_itself(name, tmp_path):
    command = re.search(rf"^ *python (examples/{name}.*)$", (FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE)[1]
    script, *arguments = shlex.split(command)
    run = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "outputs").rglob("*.png"))
