"""The demo script: what it prints, saves and returns. It runs here with the embedded model, in this process."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "test_demo_gen.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(demo, capsys, *argv):
    code = demo.main([str(a) for a in argv])
    return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_it_draws_with_the_embedded_model_and_agrees_with_plain_diffusers(demo, capsys, tmp_path):
    output = tmp_path / "new" / "demo.png"
    code, result = run(demo, capsys, "--frames", 5, "--device", "cpu", "--output", output)
    assert code == 0
    assert result["agree"] and result["relative_error"] <= 1e-4
    assert result["reference"] == "plain diffusers"
    assert result["streamed_images_per_s"] > 0 and result["ratio"] > 0
    sheet = Image.open(output)
    assert sheet.width > 4 * 128 and sheet.getextrema()[0][0] < 128


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(("--cfg-type", "full", "--guidance-scale", "2", "--negative-prompt", "blurry"), marks=pytest.mark.slow),
        pytest.param(("--cfg-type", "self", "--guidance-scale", "2"), marks=pytest.mark.slow),
        pytest.param(("--cfg-type", "initialize"), marks=pytest.mark.slow),
        pytest.param(("--tiny-vae", "--rounds", "2"), marks=pytest.mark.slow),
        ("--steps", "2", "--prompt", "a fox, 3d render", "--prompt", "a cat, flat vector"),
    ],
    ids=lambda argv: argv[1] if argv[0] == "--cfg-type" else argv[0],
)
def test_other_ways_agree_too(demo, capsys, tmp_path, argv):
    code, result = run(demo, capsys, "--frames", 2, "--device", "cpu", "--output", tmp_path / "o.png", *argv)
    assert code == 0, result


def test_image_to_image_agrees_with_the_image_pipeline(demo, capsys, tmp_path, picture):
    picture(1, (128, 128)).save(tmp_path / "in.png")
    more = ("--image", tmp_path / "in.png", "--strength", "0.5", "--frames", 3)
    code, result = run(demo, capsys, *more, "--device", "cpu", "--output", tmp_path / "o.png")
    assert code == 0, result


def test_it_returns_one_when_the_two_disagree(demo, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(demo.TOLERANCE, torch.float32, -1.0)
    code, result = run(demo, capsys, "--frames", 1, "--device", "cpu", "--output", tmp_path / "o.png")
    assert code == 1 and not result["agree"]


@pytest.mark.parametrize(
    "argv,words",
    [
        (("--frames", "0"), "0 is below 1"),
        (("--steps", "many"), "many"),
        (("--width", "100"), "multiple of 16"),
        (("--cfg-type", "most"), "unknown cfg_type 'most'"),
        (("--strength", "0.5"), "--strength goes with --image"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--model", "no-such-folder/at-all"), "no-such-folder/at-all"),
        (("--tensorrt", "--device", "cpu"), "engines run on NVIDIA GPUs and this pipe is on cpu"),
        (("--accelerate", "cuda-graph", "--device", "cpu"), "CUDA graphs need a CUDA device"),
        (("--dtype", "int8"), "int8"),
        (("--device", "abacus"), "abacus"),
        (("--family", "diffusion"), "unknown family 'diffusion'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_bad_value_gets_one_line_and_exit_code_two(demo, capsys, tmp_path, argv, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit_:
        demo.main([*argv, "--output", str(tmp_path / "o.png")])
    said = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2
    assert words in said[-1] and said[-1].startswith(demo.arguments([])[0].prog)
    assert not any(line.startswith("Traceback") for line in said)
    assert not (tmp_path / "o.png").exists()
