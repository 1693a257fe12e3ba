"""The scaling benchmark: its simulation by exact arithmetic, its results on disk whatever fails, a whole run on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "benchmark_scaling.py"
GPUS = torch.cuda.device_count()


@pytest.fixture
def module(monkeypatch):
    """`module(name)`: one of the benchmark's files."""
    for folder in (EXAMPLES, EXAMPLES / "benchmark"):
        monkeypatch.syspath_prepend(str(folder))
    return import_module


@pytest.fixture
def model(module):
    return module("scaling_model")


@pytest.fixture
def linear(model):
    """A second a row."""
    return model.Work(((1, 1.0), (8, 8.0)))


def test_work_lies_on_lines_through_its_points(model):
    work = model.Work(((4, 10.0), (1, 4.0)))
    assert [work.seconds(n) for n in (0, 1, 2, 4, 8)] == [0, 4, 6, 10, 20]
    assert model.Work(((8, 8.0),)).seconds(2) == 8  # what was not measured is not made up
    with pytest.raises(ValueError, match="one at least"):
        model.Work(())


def test_without_copies_and_host_time_it_scales_ideally(model, linear):
    for k in (1, 2, 4, 8):
        assert model.Tick(8, linear).seconds(k) == 8 / k
        assert model.Batch(64, 8, linear).seconds(k) == 64 / k
    assert model.Tick(8, linear).seconds(64) == 1  # a row cannot be parted
    assert model.Batch(64, 8, linear).seconds(64) == 1
    assert model.Tick(8, linear).seconds(3) == 3  # the largest share


def test_copies_are_paid_one_after_another_at_home(model, linear):
    link = model.Link(0.25, 0.125)
    # Sent: 0.25 + 2 bytes of each row; home computes meanwhile; three shares come back.
    assert model.Tick(4, linear, link, row_bytes=2).seconds(4) == 3 * 0.5 + 1 + 3 * 0.5
    # One piece each; that of the second GPU comes home over the road.
    assert model.Batch(2, 1, linear, link, bytes_in=2, bytes_out=6).seconds(2) == 0.5 + 1 + 1
    # Images of three GPUs wait for the same link.
    assert model.Batch(4, 1, linear, link, bytes_out=6).seconds(4) == 0.25 + 1 + 3 * 1


def test_a_slow_host_bounds_a_tick(model, linear):
    tick = model.Tick(8, linear, host=0.5, host_each=0.5)
    assert [tick.seconds(k) for k in (1, 2, 4, 8)] == [8, 4, 2, 4]
    assert [model.Batch(8, 1, linear, host=3.0).seconds(k) for k in (1, 8)] == [8 * 3, 3], "each GPU has a thread"
    assert model.Batch(8, 1, linear, host=0.5).seconds(2) == 4, "which launches while the GPU computes"


def test_the_slower_of_denoising_and_decoding_bounds_a_stream(model):
    stream = model.Stream(tick=1.0, decode=4.0)
    assert [stream.seconds(k) for k in (1, 2, 3, 5, 9, 64)] == [5, 4, 2, 1, 1, 1]
    assert model.Stream(4.0, 1.0).seconds(2) == 4
    assert model.Stream(1.0, 1.0, host=2.0).seconds(2) == 2


def figures(ms, **more):
    return {"ms": {"median": ms, "least": ms, "most": ms}, **more}


def test_the_simulation_is_compared_with_what_was_measured(model):
    costs = {"rows": 8, "piece": 4, "piece_ms": {"4": 4.0}, "bytes_in": 1, "bytes_out": 1, "host_job_ms": 0.0}
    parts = {
        "decode_rows": {"kl": {"costs": costs, "1": figures(9.0), "2": figures(4.0)}, "broken": {"costs": {"failed": "x"}}}
    }
    found = model.compare(parts)
    assert set(found["series"]) == {"decode_rows: kl"}
    one = found["series"]["decode_rows: kl"]
    assert one["simulated_ms"]["1"] == pytest.approx(9) and one["simulated_ms"]["2"] == pytest.approx(5)
    assert found["largest_off_percent"] == pytest.approx(25)
    costs["most_gpus"] = 1  # more of them were measured than have anything to do
    assert model.compare(parts)["series"]["decode_rows: kl"]["off_percent"] == {}
    assert model.compare({})["largest_off_percent"] is None


@pytest.mark.parametrize("name", ["scaling-h100x4", "scaling-h200x2", "interleave-h200x4", "tiles-h200x4"])
def test_the_simulation_is_within_a_tenth_of_every_point_that_was_measured_on_gpus(model, name):
    result = json.loads((ROOT / "static" / "benchmarks" / f"{name}.json").read_text())
    found = model.compare(result["parts"])
    assert max(len(one["off_percent"]) for one in found["series"].values()) >= 1
    assert found["largest_off_percent"] <= 10
    assert result["scaling_model"] == found, "the file holds what the present model gives"


@pytest.mark.slow
def test_rows_are_on_disk_at_once_whatever_fails(module, tmp_path):
    run_module = module("scaling_run")
    path = tmp_path / "deep" / "scaling.json"
    setup = run_module.Setup((torch.device("cpu"),) * 5, (), "embedded", "none", "none", latents=16)
    assert setup.counts == (1, 2, 4) and setup.piece == 4
    run = run_module.Run(setup, {}, path, seconds=60)

    def full():
        raise MemoryError("no room: 3 bytes")

    def mistake():
        raise KeyError("ours")

    run.row("decode_rows", "kl", 1, lambda: figures(4.0))
    run.row("decode_rows", "kl", 2, lambda: figures(2.0))
    run.row("decode_rows", "kl", 4, full)
    rows = json.loads(path.read_text())["parts"]["decode_rows"]["kl"]
    assert rows["2"]["times"]["median"] == 2 and rows["4"]["failed"] == "MemoryError: no room: 3 bytes"
    with pytest.raises(KeyError):
        run.row("decode_rows", "kl", 8, mistake)
    assert list(path.parent.iterdir()) == [path]


def test_what_has_no_time_left_is_skipped(module, tmp_path):
    script, out = module("benchmark_scaling"), tmp_path / "s.json"
    short = ["--devices", "cpu,cpu", "--model", "embedded", "--minutes", "1e-9", "--no-plot", "--output", str(out)]
    assert script.main(short) == 0
    found = json.loads(out.read_text())
    assert set(found["parts"]) == set(script.PARTS)
    assert all("skipped" in series["part"]["costs"] for series in found["parts"].values())


def test_numbers_of_devices_are_chosen(module, capsys):
    setup = partial(module("scaling_run").Setup, (torch.device("cpu"),) * 5, (), "embedded", "none", "none")
    assert setup(only=(4,)).counts == (1, 4) and setup(only=(2,)).piece == setup().piece
    with pytest.raises(SystemExit):
        module("benchmark_scaling").main(["--devices", "cpu,cpu", "--counts", "1,4", "--no-plot"])
    assert "--counts: [4] are not among (1, 2)" in capsys.readouterr().err


def test_targets_are_held_against_true_sizes_only(module):
    report = module("scaling_report")
    rows = {"1": figures(4.0), "2": figures(2.0, times={"median": 2.0, "least": 2.0, "most": 2.0})}
    result = {"model": "true-size", "parts": {"decode_rows": {"kl": rows}}, "scaling_model": {"largest_off_percent": 12.0}}
    assert [(f["found"], f["reached"]) for f in report.checked(result)] == [(2.0, True), (12.0, False)]
    assert "| reached |" in report.table(result) and "| missed |" in report.table(result)
    assert report.checked({**result, "model": "embedded"}) == []


def rows_of(found):
    return {(p, s, k): f for p, series in found["parts"].items() for s, rows in series.items() for k, f in rows.items()}


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_whole_run_on_a_cpu(tmp_path):
    out = tmp_path / "scaling.json"
    small = ["--devices", "cpu,cpu", "--model", "embedded", "--size", 64, "--quick", "--no-plot", "--output", out]
    said = run_script(*small, "--parts", "host,decode_rows,denoise_rows,decode_frames,decode_tiles,torchrun")
    found = json.loads(out.read_text())
    assert json.loads(said.splitlines()[-1]) == found
    rows = rows_of(found)
    assert not [f for f in rows.values() if "failed" in f or "skipped" in f]
    for series in (("decode_rows", "kl"), ("decode_rows", "tiny"), ("decode_frames", "network"), ("decode_tiles", "tiles")):
        assert rows[*series, "2"]["equal"] and rows[*series, "2"]["times"]["median"] > 0
    denoised = rows["denoise_rows", "embedded, 2 stages", "2"]
    assert denoised["equal_shares"] and denoised["relative_error"] < 1e-5
    by_ranks = rows["torchrun", "kl", "2"]
    assert by_ranks["equal"] and by_ranks["ranks"] == 2
    assert found["scaling_model"]["series"].keys() >= {"decode_rows: kl", "decode_frames: network", "decode_tiles: tiles"}
    if not any(Path(folder, "matplotlib").is_dir() for folder in sys.path):
        pytest.skip("the plot needs matplotlib: python env/install.py --bench")
    run_script("--plot-from", out)
    assert {path.name for path in tmp_path.iterdir()} == {
        "scaling.json",
        *(f"scaling{part}.{kind}" for part in ("", "-forecast") for kind in ("png", "svg")),
    }


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, and torch sees {GPUS}")
def test_a_run_on_two_gpus(tmp_path):
    out = tmp_path / "scaling.json"
    small = ["--devices", "cuda:0,cuda:1", "--model", "embedded", "--kind", "cuda-graph", "--quick", "--size", 128]
    parts = "links,host,decode_rows,denoise_rows,decode_frames,decode_tiles"
    run_script(*small, "--parts", parts, "--no-plot", "--output", out)
    rows = rows_of(json.loads(out.read_text()))
    assert not [f for f in rows.values() if "failed" in f or "skipped" in f]
    assert rows["links", "home to second", "costs"]["latency_ms"] > 0
    assert max(rows["decode_rows", name, "2"]["relative_error"] for name in ("kl", "tiny")) < 0.02
    assert rows["denoise_rows", "embedded, 2 stages", "2"]["relative_error_shares"] < 0.02
