"""`accelerate("max")`: the fastest way whose images are close enough is chosen, what is left out has its reason and its
figures, and the frames in flight do not notice."""

import logging
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import PROMPT, relative_error, slow
from random_pipelines import random_pipeline
from torch import nn

from streamflow import StreamFlow, acceleration
from streamflow.acceleration import check_options, preset
from streamflow.acceleration.preset import Measured, Options, fastest, measure

CPU = torch.device("cpu")
EAGER = ("compile", {"backend": "eager"})  # dynamo's own tracing, without inductor's minutes


@pytest.fixture
def ways(monkeypatch):
    """`ways(*kinds, **options)`: what "max" tries on a CPU, in the place of its own table."""

    def set_ways(*kinds, **options):
        monkeypatch.setitem(preset.KINDS, "cpu", kinds)
        monkeypatch.setitem(preset.OPTIONS, "cpu", options)
        monkeypatch.setattr(preset, "SECONDS", 0.0)

    return set_ways


class Ways:
    """A model whose ticks take a given time and whose images have a given error, by kind and options; an exception in the
    place of both is raised where the way starts."""

    def __init__(self, table):
        self.table, self.now = table, None

    @contextmanager
    def trial(self, kind, options):
        found = self.table[kind, *options.values()]
        if isinstance(found, Exception):
            raise found
        self.now = found
        yield
        self.now = None

    def ticks(self, groups):
        seconds, error = self.now
        for _ in range(groups):
            time.sleep(seconds)
            yield torch.full((1, 3, 4, 4), 2 * error)  # of a range of 2, from -1 to 1


def test_the_fastest_combination_is_chosen_and_each_refusal_has_its_reason(ways):
    ways(("compile", {}), ("onnxruntime", {}), quantize=("fp8", "int8"), attention=("fa3", "fa4"), fuse_qkv=(True,))
    model = Ways(
        {
            ("none",): (0.04, 0.0),
            ("compile",): (0.02, 0.03),  # 30.5 dB from the plain model, by rounding
            ("onnxruntime",): ImportError("not  installed"),
            ("compile", "fp8"): RuntimeError("no such GPU"),
            ("compile", "int8"): (0.01, 0.035),
            ("compile", "int8", "fa3"): (0.005, 0.05),
            ("compile", "int8", "fa4"): (0.005, 0.032),
            ("compile", "int8", "fa4", True): (0.01, 0.032),
        }
    )
    found = measure(Options(), CPU, model.trial, model.ticks)
    chosen = fastest(found)
    assert (chosen.kind, chosen.options) == ("compile", {"quantize": "int8", "attention": "fa4"})
    assert chosen.psnr == pytest.approx(54.0, abs=0.1) and 4 < chosen.tick_ms < 9
    reasons = {tuple(way.options.values()): way.left_out for way in found if way.kind == "compile" and way.left_out}
    assert reasons == {("fp8",): "RuntimeError: no such GPU", ("int8", "fa3"): "less than 40 dB"}
    assert found[2] == Measured("onnxruntime", {}, left_out="ImportError: not installed")
    text = preset.summary(found, chosen)
    assert "max chose compile, quantize='int8', attention='fa4': " in text and "times the plain model" in text
    assert "attention='fa3': " in text and "34.0 dB, left out: less than 40 dB" in text


def test_the_first_quantization_that_runs_is_the_only_one_and_a_small_gain_is_none(ways):
    ways(("compile", {}), quantize=("fp8", "int8"))
    model = Ways({("none",): (0.01, 0), ("compile",): (0.02, 0), ("compile", "fp8"): (0.03, 0)})
    found = measure(Options(), CPU, model.trial, model.ticks)
    assert [way.kind for way in found] == ["none", "compile", "compile"] and fastest(found) is found[0]
    same = [Measured("none", {}, 10.0, 50.0), Measured("compile", {}, 9.95, 50.0)]
    assert fastest(same) is same[0] and fastest([]) is None


def test_an_error_of_the_plain_model_is_raised_and_images_that_are_not_finite_are_left_out(ways):
    ways(("compile", {}))
    with pytest.raises(RuntimeError, match="broken"):
        model = Ways({("none",): RuntimeError("broken")})
        measure(Options(), CPU, model.trial, model.ticks)
    model = Ways({("none",): (0.0, 0.0), ("compile",): (0.0, float("nan"))})
    assert measure(Options(), CPU, model.trial, model.ticks)[1].left_out == "less than 25 dB"


@pytest.mark.parametrize("kind, least", [("compile", 25), ("cuda-graph", 25), ("onnxruntime", 40), ("openvino", 40)])
def test_kinds_that_only_round_differently_have_a_bound_of_their_own(kind, least, ways):
    ways((kind, {}))
    for error, left_out in ((0.03, "" if least == 25 else "less than 40 dB"), (0.1, f"less than {least} dB"), (0.005, "")):
        model = Ways({("none",): (0.0, 0.0), (kind,): (0.0, error)})
        assert measure(Options(), CPU, model.trial, model.ticks)[1].left_out == left_out


def make_stream(family="sd3", stages=2, **options):
    stream = StreamFlow(random_pipeline(family), range(stages), **{"cfg_type": "none", **options})
    stream.prepare(PROMPT, num_inference_steps=stages)
    return stream


@pytest.mark.parametrize(
    "options", [{}, {"use_denoising_batch": False}, {"cfg_type": "full", "frame_buffer_size": 2}], ids=str
)
def test_the_trial_draws_as_the_stream_does(options):
    stream = make_stream(**options)
    *_, first, second, encoded = stream._steps.trial(2)
    generator, frames = torch.Generator().manual_seed(0), stream.frame_bff_size
    count = 3 if stream.use_denoising_batch else 2
    noises = [torch.randn(frames, *stream._model.shape, generator=generator) for _ in range(count)]
    own = [x0 for noise in noises if (x0 := stream.predict_x0_batch(noise)) is not None][:2]
    for image, x0 in zip((first, second), own, strict=True):
        assert torch.equal(image, stream.decode_image(x0))
    given = 2 * torch.rand(frames, 3, stream.height, stream.width, generator=generator) - 1
    assert torch.equal(encoded, stream.decode_image(stream._model.encode(given)))


@pytest.mark.parametrize("value", [slow(float("nan")), 0.5])
def test_an_encoder_that_is_wrong_is_not_chosen(value, ways, monkeypatch):
    ways(EAGER)
    stream, made = make_stream(), acceleration.accelerate

    class Wrong(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, images):
            return self.encoder(images) + value

    def accelerate(kind, parts, options):
        found = made(kind, parts, options)
        return replace(found, modules={**found.modules, "encoder": Wrong(found.modules["encoder"])})

    monkeypatch.setattr(stream._accelerator, "_accelerate", accelerate)
    stream.accelerate("max")
    assert stream.acceleration == "none" and "less than 25 dB" in stream.acceleration_measured[1].left_out


@pytest.mark.slow
def test_a_stream_goes_on_by_what_was_chosen(ways, caplog):
    ways(EAGER, ("cuda-graph", {}))
    stream, twin = make_stream(), make_stream()
    images = [stream.txt2img() for _ in range(2)]
    with caplog.at_level(logging.INFO, "streamflow"):
        stream.accelerate("max")
    images += [stream.txt2img() for _ in range(3)]
    for image in images:
        assert relative_error(image, twin.txt2img()) < 1e-4
    plain, compiled, graph = stream.acceleration_measured
    assert stream.acceleration == fastest(list(stream.acceleration_measured)).kind
    assert (plain.kind, plain.psnr, compiled.kind) == ("none", float("inf"), "compile") and compiled.psnr > 80
    assert graph.left_out.startswith("RuntimeError: CUDA graphs need a CUDA device") and graph.tick_ms is None
    assert "max chose" in caplog.text and "left out: RuntimeError" in caplog.text
    stream.accelerate("none")
    stream.reset()
    twin.reset()
    assert torch.equal(stream.txt2img(), twin.txt2img())


def test_a_bound_that_nothing_meets_leaves_the_plain_model(ways, monkeypatch):
    ways(EAGER)
    monkeypatch.setattr(preset, "SAME", 300.0)
    stream, twin = make_stream(), make_stream()
    stream.accelerate("max")
    assert stream.acceleration == "none"
    assert stream.acceleration_measured[1].left_out == "less than 300 dB"
    assert torch.equal(stream.txt2img(), twin.txt2img())


def test_before_prepare_it_waits_for_shapes_and_its_choice_stays(ways, monkeypatch):
    ways(EAGER)
    monkeypatch.setattr(preset, "GAIN", 0.0)  # any way is faster than this
    stream = StreamFlow(random_pipeline("sd3"), [0, 1], cfg_type="none")
    stream.accelerate("max")
    assert stream.acceleration == "max" and stream.acceleration_measured == ()
    stream.prepare(PROMPT, num_inference_steps=2)
    assert stream.acceleration == "compile"
    measured = stream.acceleration_measured
    stream.vae = stream.pipe.vae
    assert stream.acceleration == "compile" and stream.acceleration_measured is measured
    stream.accelerate("none")


def test_what_cannot_be_is_refused():
    with pytest.raises(TypeError, match="has no option quantize; it has psnr"):
        check_options("max", CPU, {"quantize": "fp8"})
    with pytest.raises(TypeError, match="psnr"):
        check_options("max", CPU, {"psnr": "high"})
    for psnr in (None, -1):
        with pytest.raises(ValueError, match=f"psnr must be a number of dB of 0 or more, not {psnr}"):
            check_options("max", CPU, {"psnr": psnr})
    with pytest.raises(RuntimeError, match="is for cuda and cpu devices, and this pipe is on meta"):
        check_options("max", torch.device("meta"), {})


@pytest.mark.slow
def test_on_a_cpu_the_real_ways_are_measured():
    stream = make_stream("flux", 4)
    before = stream.txt2img()
    stream.accelerate("max")
    compiled = next(way for way in stream.acceleration_measured if way.kind == "compile")
    assert compiled.psnr > 80 and not compiled.left_out
    stream.reset()
    assert relative_error(stream.txt2img(), before) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_on_a_gpu_graphs_are_chosen(cuda_stream, monkeypatch):
    monkeypatch.setitem(preset.KINDS, "cuda", (("cuda-graph", {}), ("compile", {"cuda_graph": False, "backend": "eager"})))
    monkeypatch.setitem(preset.OPTIONS, "cuda", {"attention": ("_native_math", "fa3")})
    stream = cuda_stream("sd3", dtype=torch.bfloat16)
    before = stream.txt2img().float()
    stream.accelerate("max", psnr=30)
    assert stream.acceleration == "cuda-graph"
    assert [way.kind for way in stream.acceleration_measured][:3] == ["none", "cuda-graph", "compile"]
    stream.reset()
    assert relative_error(stream.txt2img().float(), before) < 0.05
    stream.accelerate("none")
    stream.reset()
    assert torch.equal(stream.txt2img().float(), before)
