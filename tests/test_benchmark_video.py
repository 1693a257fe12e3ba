"""examples/benchmark/video.py with small networks: every model is drawn, and the figures are written down."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmark"
EXTREMES = (("most", "least"), ("least", "most"))
pytestmark = pytest.mark.slow


@pytest.fixture
def video(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = import_module("video")
    network = {name: value for name, value in module.TINY.items() if name != "rope_dim"}
    for name in ("anyflow-far-1.3b", "skyreels-df-1.3b"):
        model = module.MODELS[name]
        steps = {"num_inference_steps": 6} if "ar_step" in model.call else {}
        call = {**model.call, "height": 64, "width": 64, **steps}
        monkeypatch.setitem(module.MODELS, name, replace(model, network=network, vae=module.TINY_VAE, call=call))
    return module


@pytest.mark.parametrize(("model", "first_images"), [("tiny", 9), ("anyflow-far-1.3b", 1), ("skyreels-df-1.3b", 17)])
def test_ways_and_the_long_stream_are_written_down(model, first_images, video, tmp_path, capsys):
    path = tmp_path / "new" / "video.json"
    ways = [one for one in video.MODELS[model].ways if "compile" not in one] + ["tiny-vae"] * (model == "tiny")
    options = ["--device", "cpu", "--dtype", "float32", "--chunks", "2", "--rounds", "2", "--long", "3", "--ways", *ways]
    assert video.main(["--models", model, *options, "--output", str(path)]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written == json.loads(capsys.readouterr().out.splitlines()[-1])
    found = written["models"][model]
    assert found["ways"].keys() == {"pipeline", *ways} and len(found["long"]["mean"]) == 3
    seconds = found["ways"]["pipeline"]["first_s"]["median"]
    for name, way in found["ways"].items():
        assert 0 < way["first_s"]["least"] <= way["first_s"]["most"] and way["frames_per_s"]["median"] > 0
        rest = 0 if name == "pipeline" else found["images_of_the_call"] - first_images
        least, most = (seconds / (way["first_s"][a] + rest / way["frames_per_s"][b]) for a, b in EXTREMES)
        assert least - 1e-3 <= way["times_the_pipeline"]["median"] <= most + 1e-3, "the time until as many images are there"


def test_a_model_that_fails_is_written_down_as_failed(video, monkeypatch, capsys):
    broken = replace(video.MODELS["tiny"], call={**video.MODELS["tiny"].call, "height": 65})
    monkeypatch.setitem(video.MODELS, "tiny", broken)
    assert video.main(["--models", "tiny", "--device", "cpu", "--dtype", "float32", "--ways", "eager"]) == 0
    assert "65" in json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["tiny"]["failed"]


def test_a_way_that_fails_leaves_the_pipeline_as_it_was_and_the_others_are_measured(video, monkeypatch, capsys):
    closed, plain_close = [], video.VideoStream.close

    def close(stream):
        closed.append(stream)
        plain_close(stream)

    monkeypatch.setattr(video.VideoStream, "close", close)
    options = ["--device", "cpu", "--dtype", "float32", "--chunks", "1", "--rounds", "1", "--ways", "kept-keys", "eager"]
    assert video.main(["--models", "tiny", *options, "--decode-on", "home", "cpu"]) == 0
    ways = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["tiny"]["ways"]
    assert [name for name, one in ways.items() if "failed" in one] == ["kept-keys", "kept-keys, decoded on cpu"]
    assert "use_kv_cache" in ways["kept-keys"]["failed"] and {"eager", "eager, decoded on cpu"} <= ways.keys()
    assert len(closed) == 4
