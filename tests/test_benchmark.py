"""The benchmark: every way draws the same images, figures are complete and multiply up, sizes are the published ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import slow
from random_pipelines import random_pipeline, random_tiny_vae
from torch import nn

from streamflow.benchmark import full_size as sizes
from streamflow.benchmark import latency, main, plot, sweep, ways
from streamflow.benchmark.command import check, sized
from streamflow.benchmark.measure import differences, measure_all
from streamflow.benchmark.report import factors, failures, ratios, table
from streamflow.benchmark.settings import TITLES, Settings, parse
from streamflow.benchmark.subject import COMPARED, GUIDANCE, PROMPT, Subject, load
from streamflow.benchmark.timing import latencies, timed
from streamflow.benchmark.ways import CHAIN, VARIANTS

QUICK = Settings(width=64, height=64, rounds=1, frames=1, round_seconds=0.01, warmup=0, compile=False)
ON_CPU = ("1", "1t", "3", "6")
CPU = torch.device("cpu")
FIGURES = {
    *("title", "vae", "frames_per_tick", "ticks_per_image", "start_up_s", "ticks_per_round", "images_per_s"),
    *("tick_ms", "latency_ms", "clocks", "memory_mib", "difference"),
}


@pytest.fixture(scope="module")
def subject_of():
    """`subject_of(family, **settings)`: a tiny random model to measure."""

    def make(family: str, **settings) -> Subject:
        pipe = random_pipeline(family)
        kind = "instaflow" if family == "instaflow" else None
        if kind:
            pipe.scheduler = sizes.RectifiedFlowScheduler()
        made = replace(QUICK, **settings)
        arguments = {"prompt": PROMPT, "negative_prompt": "blurry"}
        arguments |= {"max_sequence_length": 0} if family == "sd3" else {}
        return Subject(made, pipe, arguments, random_tiny_vae(pipe.vae.config.latent_channels), kind)

    return make


@pytest.mark.parametrize("family,cfg_type,frames", [slow("sd3", "full", 2), ("instaflow", "self", 2)])
def test_every_way_draws_the_images_of_the_plain_pipeline(subject_of, family, cfg_type, frames):
    subject = subject_of(family, cfg_type=cfg_type, frame_buffer_size=frames)
    found = measure_all(subject)
    assert list(found) == list(VARIANTS) == list(TITLES)
    assert {name for name, f in found.items() if "images_per_s" in f} == set(ON_CPU)
    for name in ON_CPU:
        difference = found[name]["difference"]
        assert difference["largest"] <= 1e-4, name
        assert difference["contrast"] > 1e-2, name
    assert all(found[name]["skipped"] for name in set(VARIANTS) - set(ON_CPU))


@pytest.mark.parametrize("split,decoders", [(None, 2), ("rows", 3), ("frames", 3)])
def test_several_devices_draw_the_same(subject_of, split, decoders):
    subject = subject_of("sd3", frame_buffer_size=2)
    with ways.spread(subject, "none", split, ["cpu"] * 3) as way:
        drawn = torch.cat([way.tick() for _ in range(2)])
        assert len(drawn) == 2 * way.frames == 4 and way.details["decoders"] == decoders
        assert differences(drawn[:COMPARED], subject.reference(False))["largest"] <= 1e-4


def test_compiled_ways_draw_the_same(subject_of):
    """With a compiler that changes nothing, which needs no C++: what is measured is the path, not the compiler."""
    subject = subject_of("sd3", compile=True, variants=("2", "2t", "5", "6"))
    before = {name: p.clone() for name, p in subject.pipe.transformer.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda module, **_: module)
        patch.setattr(nn.Module, "compile", lambda module, **_: None)
        found = measure_all(subject)
    assert [f["acceleration"] for f in found.values()] == ["compile"] * 4
    assert all(f["difference"]["largest"] <= 1e-4 for f in found.values())
    after = dict(subject.pipe.transformer.named_parameters())
    assert all(torch.equal(p, after[name]) and p.stride() == after[name].stride() for name, p in before.items())


def test_no_variants_are_an_answer_too(subject_of):
    assert parse(["--variants", "none"])[1].variants == ()
    assert measure_all(subject_of("sd3", variants=())) == {}


def test_a_failure_is_a_row_of_its_own(subject_of):
    subject = subject_of("sd3", variants=("1", "3"))

    def broken(*_):
        raise RuntimeError("no such luck")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "3", replace(VARIANTS["3"], open=broken))
        found = measure_all(subject)
    assert "no such luck" in found["3"]["failed"] and "images_per_s" in found["1"]


def test_factors_multiply_to_the_total_and_shares_to_a_hundred():
    rates = dict(zip(CHAIN[:5], (2.0, 3.0, 5.0, 4.0, 20.0), strict=True)) | {"1t": 2.5}
    found = {
        name: {"title": name, "images_per_s": {"median": r, "least": 0.9 * r, "most": 1.1 * r}} for name, r in rates.items()
    }
    found["7"] = {"title": "7", "skipped": "not here"}
    made = factors(found)
    assert made["total"] == 10.0
    assert math.isclose(math.prod(step["factor"] for step in made["steps"]), 10.0)
    assert math.isclose(sum(step["share"] for step in made["steps"]), 100.0)
    assert ratios(found)["6/1t"]["median"] == 8.0
    assert ratios(found)["6/1t"]["least"] < 8.0 < ratios(found)["6/1t"]["most"]
    assert "6/2t" not in ratios(found)
    assert factors({"1": found["1"]}) == {"total": 1.0, "steps": []}


def test_a_sweep_measures_each_setting_once_and_keeps_the_others(monkeypatch):
    """What fails is a point that failed; the others go on."""
    counted = []

    def rate_of(subject, tiny, batched):
        s = subject.settings
        counted.append((s.steps, s.width, s.height, s.frame_buffer_size if batched else 1, s.cfg_type, batched))
        if s.width == 100:
            raise torch.OutOfMemoryError("too large\nby far")
        median = s.frame_buffer_size * (10.0 if batched else 8.0 / s.steps)
        return {"images_per_s": {"median": median, "least": 0.9 * median, "most": 1.1 * median}, "network_rows": 1}

    monkeypatch.setattr(sweep, "rate_of", rate_of)
    monkeypatch.setattr(sweep, "flops", lambda subject, tiny: {"network": 10.0 * subject.settings.steps, "decoder": 10.0})
    rate = {"flops_per_s": {"median": 4000.0, "least": 1.0, "most": 5000.0}, "side": 8, "dtype": "float32"}
    monkeypatch.setattr(sweep, "matrix_rate", lambda device, dtype: rate)
    values = {"steps": (1, 4), "size": (64, 100), "buffer": (1, 2), "cfg": ("none", "self", "full")}
    pipe = SimpleNamespace(device=CPU, dtype=torch.float32)
    found = sweep.measure_sweeps(Subject(replace(QUICK, sweep=values), pipe, {}))
    assert {name: [p["value"] for p in found[name]] for name in values} == {n: list(v) for n, v in values.items()}
    assert len(counted) == len(set(counted)) == 2 * 4 + 1 + 1  # one for two frames a tick, one that failed
    assert found["size"][1] == {"value": 100, "failed": "OutOfMemoryError: too large by far"}
    assert found["steps"][1] == {**found["cfg"][0], "value": 4} == {**found["buffer"][0], "value": 4}
    first, fourth = found["steps"]
    assert (first["ratio"]["median"], fourth["ratio"]["median"]) == (1.25, 5.0)
    assert fourth["ratio"]["least"] == pytest.approx(5 * 0.9 / 1.1)
    assert first["roofline"] == {"network_images_per_s": 400.0, "with_decoder_images_per_s": 200.0}
    assert fourth["roofline"] == {"network_images_per_s": 100.0, "with_decoder_images_per_s": 80.0}


@pytest.mark.parametrize("family", ["sd3", slow("flux"), slow("instaflow")])
def test_flops_are_what_torch_counts_and_grow_with_the_rows(subject_of, family):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    subject = subject_of(family)
    found = sweep.flops(subject, tiny=True)
    counter = FlopCounterMode(display=False)
    with subject.stream(tiny=True) as stream, sdpa_kernel(SDPBackend.MATH), counter:
        stream.parts().velocity.call()
    assert found["network"] == counter.get_total_flops() > 0 and found["decoder"] > 0
    for change, times in (({"steps": 8, "frame_buffer_size": 2}, 2), ({"cfg_type": "full"}, 2)) * (family == "sd3"):
        other = sweep.flops(subject.under(replace(subject.settings, **change)), tiny=True)
        assert other["network"] == times * found["network"] and other["decoder"] == found["decoder"]


def test_self_guidance_is_swept_with_anchors(subject_of):
    """Without anchors that guidance would do nothing, and its cost would not show."""
    from streamflow.benchmark.ways import with_anchors

    with subject_of("sd3", cfg_type="self", frame_buffer_size=2).stream(tiny=True) as stream:
        assert with_anchors(stream)().shape == (2, 3, 64, 64)
        assert stream._denoiser.engine.anchors is not None and stream._denoiser.engine.anchors.known is None


def test_latency_of_all_modes_at_all_rates(subject_of, monkeypatch):
    monkeypatch.setattr(latency, "STAGES", (1, 3))
    subject = subject_of("sd3", latency=True, latency_seconds=0.01)
    found = latency.measure_latency(subject)
    assert [(row["stages"], row["input_rate"]) for row in found["rows"]] == [(s, r) for s in (1, 3) for r in (24, 30, 60)]
    for row in found["rows"]:
        assert set(row["modes"]) == {"fed", "free", "sequential"} and row["auto"] in row["modes"]
        assert all(m["images"] >= 1 and 0 < m["p50_ms"] <= m["p95_ms"] for m in row["modes"].values())


def point(value, ring: float = 3.0) -> dict:
    def spread(x: float) -> dict:
        return {"median": x, "least": 0.9 * x, "most": 1.1 * x}

    roof = {"network_images_per_s": 40.0, "with_decoder_images_per_s": 30.0}
    rates = {"ring": {"images_per_s": spread(ring)}, "sequential": {"images_per_s": spread(2.0)}}
    return {"value": value, **rates, "ratio": spread(ring / 2), "roofline": roof}


def result_of(**sweeps) -> dict:
    rate = {"flops_per_s": {"median": 1e12, "least": 1e12, "most": 1e12}, "side": 8192, "dtype": "float16"}
    about = {"model": "m", "width": 64, "height": 64, "steps": 4, "dtype": "float16", "cfg_type": "none"}
    rest = {"machine": {"device": "d"}, "variants": {}, "factors": {"total": 1.0, "steps": []}, "ratios": {}}
    return {**about, **rest, "sweeps": {"vae": "own", "acceleration": "compile", "matrix_rate": rate, **sweeps}}


def test_failed_points_are_in_the_table_and_not_in_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    out_of_memory = {"value": 1024, "failed": "OutOfMemoryError: too much"}
    result = result_of(size=[point(512), point(256), out_of_memory], cfg=[point("none"), point("full")], buffer=[point(2)])
    assert failures(result) == ["OutOfMemoryError: too much"]
    text = table(result)
    assert "| 1024 | failed: OutOfMemoryError" in text and "| 512 | 2.00 | 3.00 (2.70, 3.30) | 1.50 (1.35, 1.65) |" in text
    assert "1 TFLOP/s" in text
    paths = plot.draw(result, tmp_path, "m")
    assert [path.name for path in paths] == ["m-sweeps.png", "m-sweeps.svg"] and all(path.stat().st_size for path in paths)
    assert plot.draw(result_of(size=[out_of_memory]), tmp_path, "m") == []


def test_guidance_is_the_pipelines_own(subject_of):
    for family, name in (("sd3", "guidance_scale"), ("flux", "true_cfg_scale")):
        subject = subject_of(family, cfg_type="full")
        with subject.stream(tiny=False) as stream:
            assert subject.call(stream)[name] == GUIDANCE
            assert stream._denoiser.state.weight == GUIDANCE


def test_differences():
    black, white = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert differences(black, black) == {"largest": 0.0, "mean": 0.0, "psnr_db": None, "contrast": 0.0}
    assert differences(black, white)["psnr_db"] == 0.0
    assert math.isclose(differences(black + 0.1, black)["psnr_db"], 20.0, rel_tol=1e-5)
    with pytest.raises(FloatingPointError):
        differences(black * math.nan, white)


def test_timing_counts_what_it_calls():
    calls = []
    found = timed(lambda: calls.append(1), 7, CPU)
    assert len(calls) == len(found.each) == 7 and math.isclose(sum(found.each), found.total)
    assert len(latencies(lambda: calls.append(1), 4, 5, CPU)) == 5 and len(calls) == 7 + 8


@pytest.mark.parametrize(
    "model,parameters,vae",
    [
        ("sd15", 859.52e6, 83.65e6),
        ("sdxl", 2.5675e9, 83.65e6),
        ("sd3-medium", 2.028e9, 83.82e6),
        ("flux-schnell", 11.89e9, 83.82e6),
    ],
)
def test_full_sizes_are_the_published_ones(model, parameters, vae):
    pipe = sizes.full_size(model, "meta")
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert math.isclose(sum(p.numel() for p in network.parameters()), parameters, rel_tol=1e-3)
    assert math.isclose(sum(p.numel() for p in pipe.vae.parameters()), vae, rel_tol=1e-3)
    assert {p.dtype for part in (network, pipe.vae) for p in part.parameters()} == {sizes.size_of(model).dtype}
    tiny = sizes.full_size_tiny_vae(model, "meta")
    assert math.isclose(sum(p.numel() for p in tiny.parameters()), 2.45e6, rel_tol=1e-2)
    assert torch.get_default_dtype() == torch.float32


def test_a_small_network_with_random_weights_streams(monkeypatch):
    """The path of `--random-weights`, embeddings in place of prompts, with fewer and narrower layers."""
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    flux = sizes.SIZES["flux-schnell"]
    config = {**flux.config, **small, "axes_dims_rope": (4, 4, 8)}
    size = replace(flux, config=config, make_vae=lambda **_: random_pipeline("flux").vae)
    monkeypatch.setitem(sizes.SIZES, "flux-schnell", size)
    state = torch.get_rng_state()
    settings = replace(QUICK, model="flux-schnell", random_weights=True, variants=("1t", "6"))
    found = measure_all(load(settings))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(f["difference"]["largest"] <= 1e-4 and f["difference"]["contrast"] > 0.01 for f in found.values())


@pytest.mark.slow
def test_the_command_writes_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "SIDE_ELSEWHERE", 64)
    monkeypatch.setattr(latency, "STAGES", (1,))
    pipe = random_pipeline("instaflow")
    pipe.save_pretrained(tmp_path / "model")
    random_tiny_vae(4).save_pretrained(tmp_path / "tiny")
    command = f"--model {tmp_path}/model --family instaflow --tiny-vae {tmp_path}/tiny --device cpu --width 64 --height 64"
    argv = [*command.split(), *"--rounds 1 --frames 1 --round-seconds 0.01 --warmup 0 --no-compile --no-plot".split()]
    argv += "--sweep steps=2,2 --sweep cfg=self --sweep-vae tiny --latency --latency-seconds 0.01".split()
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    written = json.loads((tmp_path / "out" / "model-64x64-4steps.json").read_text())
    assert written == result
    known = {"command", "import_cpu_s", "compile_cache_before", "load_s"}
    assert known | {"machine", "variants", "factors", "ratios", "dtype"} <= set(result)
    assert [p["value"] for p in result["sweeps"]["steps"]] == [2] and len(result["latency"]["rows"]) == 3
    assert "| steps an image |" in out and "| guidance |" in out and "| input frames/s |" in out
    assert {"device", "packages", "python", "threads"} <= set(result["machine"])
    assert set(result["variants"]) == set(VARIANTS)
    for name in ON_CPU:
        assert FIGURES <= set(result["variants"][name])
    assert "around_network_and_decode" in result["variants"]["3"]
    assert table(result) in out and (tmp_path / "out" / "model-64x64-4steps.md").read_text().strip() == table(result)


def test_a_sweep_that_the_model_cannot_do_is_refused_before_it_starts(subject_of):
    subject = sized(subject_of("sd3", width=None, height=None, sweep={"size": (90,)}))
    assert subject.settings.width == subject.settings.height == 64
    with pytest.raises(ValueError, match="--sweep size=90: .*multiple"):
        check(subject)
    subject.tiny = None
    with pytest.raises(ValueError, match="--tiny-vae"):
        check(subject.under(replace(subject.settings, sweep={"steps": (1,)}, sweep_vae="tiny")))


@pytest.mark.parametrize(
    "argv,said",
    [
        (["--model", "dalle", "--random-weights"], "sd15, sd3-medium, flux-schnell"),
        (["--model", "sd15"], "--random-weights"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--variants", "1,11"], "unknown '11'"),
        (["--steps", "0"], "below 1"),
        (["--width", "64"], "go together"),
        (["--device", "toaster"], "toaster"),
        (["--dtype", "int8"], "invalid choice"),
        (["--cfg-type", "initialize"], "invalid choice"),
        (["--round-seconds", "-1"], "above 0"),
        (["--sweep", "colour=1,2"], "steps, size, buffer, cfg"),
        (["--sweep", "steps"], "NAME=VALUE"),
        (["--sweep", "steps=1,0"], "below 1"),
        (["--sweep", "steps=1,two"], "'two'"),
        (["--sweep", "steps="], "''"),
        (["--sweep", "cfg=none,loud"], "'loud'"),
        (["--sweep", "steps=1", "--sweep", "steps=2"], "twice"),
        (["--sweep", "cfg=none", "--sweep-vae", "huge"], "invalid choice"),
        (["--latency", "--latency-seconds", "0"], "above 0"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--no-plot", *argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert said in lines[-1] and lines[-1].startswith("streamflow benchmark: error:")


def test_without_matplotlib_there_are_no_plots_and_one_line_says_so_before_anything_is_loaded(monkeypatch, capsys):
    def load(settings):
        assert not settings.plot
        raise ValueError("it would load now")

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    monkeypatch.setattr("streamflow.benchmark.command.load", load)
    with pytest.raises(SystemExit):
        main(["--model", "sd15", "--random-weights", "--device", "cpu"])
    first, *_, last = capsys.readouterr().err.strip().splitlines()
    assert first == 'no plots: matplotlib is not installed: pip install "streamflow-rf[bench]"'
    assert last.endswith("it would load now")
