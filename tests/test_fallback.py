"""Without an adapter a stream draws what the pipeline draws: to the bit with the network called frame by frame, and within
rounding in one call. No frame's fault harms another, and no thread is left behind."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPT, noises, relative_error, streamed
from random_pipelines import random_pipeline
from torch import nn

from streamflow import StreamFlow
from streamflow.models.fallback.adapter import Fallback, frame_generator
from streamflow.models.fallback.merged_calls import MergedCalls, SeparateCalls
from streamflow.parallel.rows import shard_denoiser
from streamflow.stream.coroutine import Coroutine

FRAMES, SIZE = 6, {"height": 64, "width": 64}
BLURRY = {"negative_prompt": "blurry"}
EXACT = {"use_resolution_binning": False}  # what the stream sets where a pipeline takes it
BINLESS = {"complex_human_instruction": None}

# family: prepare's and the pipeline's arguments, changes of the random pipeline, the pipeline's alone
PLAIN = {
    "sd3": (BLURRY, {"scheduler": {"stochastic_sampling": True}}, {}),
    "cogview4": (BLURRY, {}, {}),
    "sana-dpm": ({**BINLESS, **BLURRY}, {}, EXACT),
}
SLOW = {
    "flux": ({"guidance_scale": 2.5}, {}, {}),
    "qwenimage": ({"true_cfg_scale": 3.0, **BLURRY}, {}, {}),
    "zimage": (BLURRY, {}, {}),
    "sana-unipc": ({**BINLESS, **BLURRY}, {}, EXACT),
    "auraflow": (BLURRY, {}, {}),
    "hidream": (BLURRY, {}, {}),
    "hunyuan-image": (BLURRY, {}, {}),
    "kandinsky5": (BLURRY, {}, {}),
    "prx": (BLURRY, {}, EXACT),
    "omnigen": ({"guidance_scale": 2.0}, {}, {}),
    "bria": (BLURRY, {}, {}),
    "ernie": (BLURRY, {}, {}),
    "lumina": (BLURRY, {}, {}),
    "ovis": (BLURRY, {}, {}),
}


@pytest.fixture
def optional_parts(monkeypatch):
    """What two pipelines import to tidy texts and to read images, neither of which matters here."""
    from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
    from diffusers.pipelines.prx import pipeline_prx

    nothing = SimpleNamespace(Compose=list, Lambda=id, ToTensor=list, Normalize=dict)
    monkeypatch.setattr(processor_omnigen, "transforms", nothing, raising=False)
    processor = processor_omnigen.OmniGenMultiModalProcessor
    monkeypatch.setattr(pipeline_omnigen, "OmniGenMultiModalProcessor", processor, raising=False)
    monkeypatch.setattr(pipeline_prx, "ftfy", SimpleNamespace(fix_text=str), raising=False)


def fallback(pipe, steps=2, cfg_type="full", frames=1, prepare=None, **options) -> StreamFlow:
    stream = StreamFlow(pipe, cfg_type=cfg_type, family="fallback", frame_buffer_size=frames, **SIZE, **options)
    stream.prepare(PROMPT, num_inference_steps=steps, **(prepare or {}))
    return stream


def pipelines_own(pipe, latents, steps=2, **arguments):
    """What the pipeline draws from each of these latents, one after another. Some draw from the global state."""
    call = {"prompt": PROMPT, "num_inference_steps": steps, "output_type": "latent", "return_dict": False, **SIZE}
    drawn = []
    for x in latents.split(1):
        generator = frame_generator(x)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            drawn.append(pipe(**{**call, **arguments}, latents=x, generator=generator)[0])
    return torch.cat(drawn)


def waiting_threads() -> int:
    return sum(thread.name == "streamflow frame" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert waiting_threads() == 0


def check(family, pipes, caplog, steps=2):
    prepare, changes, only_call = (PLAIN | SLOW)[family]
    pipe = pipes(family, **changes)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda net, given, said: calls.append(1))
    with fallback(pipe, steps, frames=2, prepare=prepare) as stream:
        latents = noises(stream, FRAMES)
        own = pipelines_own(pipe, latents, steps, **prepare, **only_call)
        stream.velocity = stream.adapter.row_by_row(True)
        calls.clear()
        assert torch.equal(streamed(stream, latents), own)
        one_by_one = len(calls)
        stream.velocity = MergedCalls(pipe.transformer)
        assert relative_error(streamed(stream, latents), own) <= 1e-4
        calls.clear()
        assert relative_error(streamed(stream, latents), own) <= 1e-4
        assert len(calls) <= one_by_one / 2, "frames never met"
        assert stream.decode_image(own[:1]).shape == (1, 3, 64, 64)
    handle.remove()
    assert "stay separate" not in caplog.text
    assert relative_error(own[:1], own[1:2]) > 0.05, "frames that are alike would prove nothing"


@pytest.mark.parametrize("family", PLAIN)
def test_frames_are_the_pipelines_own(family, pipes, caplog):
    check(family, pipes, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_frames_of_every_family_are_the_pipelines_own(family, pipes, caplog, optional_parts):
    check(family, pipes, caplog)


@pytest.mark.parametrize("cfg_type", ["none", "full"])
def test_an_adapter_draws_the_same(cfg_type, pipes):
    """The fallback knows nothing of a family, and so is an oracle for its adapter."""
    pipe = pipes("sd3")
    prepare = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "blurry", "seed": 7}
    drawn = []
    for family in ("sd3", "fallback"):
        with StreamFlow(pipe, cfg_type=cfg_type, family=family, frame_buffer_size=2, **SIZE) as stream:
            stream.prepare(PROMPT, **prepare)
            stream.velocity = stream.adapter.row_by_row(cfg_type == "full")
            latents = streamed(stream, noises(stream, 4))
            stream.reset()
            drawn.append((latents, stream.txt2img(4)))
    (own, own_pictures), (whole, whole_pictures) = drawn
    if cfg_type == "full":
        assert torch.equal(whole, own)
    assert relative_error(whole, own) <= 1e-6
    assert (whole_pictures - own_pictures).abs().max() <= 1e-5


def test_one_frame_leaves_a_tick_and_every_frame_has_its_number(pipes):
    """CogView4 calls its network twice a step, so a frame of 2 steps is in flight for 4 ticks."""
    pipe = pipes("cogview4")
    with fallback(pipe) as stream:
        latents = noises(stream, 6)
        left = [stream.predict_x0_batch(x) is not None for x in latents.split(1)]
        assert left == [False] * 3 + [True] * 3
        assert len(stream.flush()) == 3 and stream.flush() == []
        stream.reset()
        shown = list(stream.frames([None] * 5))
        assert [frame.id for frame in shown] == list(range(5))
        own = stream.decode_image(pipelines_own(pipe, latents[:5], negative_prompt=""))
        assert (torch.stack([frame.image for frame in shown]) - own).abs().max() <= 1e-4
    with fallback(pipe, use_denoising_batch=False) as sequential:
        assert (sequential.txt2img()[0] - own[0]).abs().max() <= 1e-4
        assert sequential.flush() == []


def test_a_new_prompt_is_of_frames_that_enter_from_then_on(pipes):
    pipe = pipes("sd3")
    with fallback(pipe, prepare={"guidance_scale": 3.0}) as stream:
        stream.velocity = stream.adapter.row_by_row(True)
        latents = noises(stream, 4)
        first = [stream.predict_x0_batch(x) for x in latents[:2].split(1)]
        stream.update_prompt("a turtle", scope="frame")
        stream.update(guidance_scale=5.0, scope="frame")
        later = [stream.predict_x0_batch(x) for x in latents[2:].split(1)]
        drawn = torch.cat([x for x in (*first, *later, *stream.flush()) if x is not None])
        own = pipelines_own(pipe, latents[:2], negative_prompt="", guidance_scale=3.0)
        new = pipelines_own(pipe, latents[2:], negative_prompt="", guidance_scale=5.0, prompt="a turtle")
        assert torch.equal(drawn, torch.cat((own, new)))
        stream.update(num_inference_steps=1, scope="frame")
        assert torch.equal(
            stream.predict_x0_batch(latents[:1]),
            pipelines_own(pipe, latents[:1], 1, prompt="a turtle", negative_prompt="", guidance_scale=5.0),
        )


def test_what_cannot_be_is_refused_by_name_and_changes_nothing(pipes, picture):
    pipe = pipes("sd3")
    for settings, said in {
        ("self", False): "cfg_type 'self' is not the pipeline's own",
        ("initialize", False): "cfg_type 'initialize' is not the pipeline's own",
        ("full", True): "do_add_noise is for adapters",
    }.items():
        with pytest.raises(ValueError, match=said):
            StreamFlow(pipe, cfg_type=settings[0], do_add_noise=settings[1], family="fallback", **SIZE)
    with fallback(pipe) as stream:
        latents = noises(stream, 3)
        first = stream.predict_x0_batch(latents[:1])
        refusals = {
            "accelerate": lambda: stream.accelerate("compile"),
            "on_step": lambda: stream.on_step(print),
            "stages": lambda: stream.unet_step(latents[:2], torch.ones(2)),
            "update now": lambda: stream.update_prompt("a turtle"),
            "images": lambda: stream(picture()),
            "shard_denoiser": lambda: shard_denoiser(stream),
        }
        for name, refused in refusals.items():
            with pytest.raises(NotImplementedError, match=f"does not offer {name}: .+"):
                refused()
        with pytest.raises(NotImplementedError, match="does not offer on_step"):
            stream.trace(1)
        with pytest.raises(NotImplementedError, match="does not offer images"):
            stream.update(strength=0.5, scope="frame")
        with pytest.raises(ValueError, match="take all 2 steps, not t_index_list .1."):
            stream.update(t_index_list=[1], scope="frame")
        with pytest.raises(TypeError, match="no argument 'nonsense'"):
            stream.prepare(PROMPT, nonsense=1)
        drawn = [first, *(stream.predict_x0_batch(x) for x in latents[1:].split(1)), *stream.flush()]
        assert relative_error(torch.cat(drawn[1:]), pipelines_own(pipe, latents, negative_prompt="")) <= 1e-6
    two = {"transformer": nn.Linear(1, 1), "transformer_2": nn.Linear(1, 1)}
    with pytest.raises(ValueError, match="transformer and transformer_2"):
        Fallback(SimpleNamespace(components=two))


def test_a_frame_whose_pipeline_raises_is_lost_and_the_others_go_on(pipes):
    pipe, ended = pipes("sd3"), []

    def raising(own, step, t, given):
        ended.append(step)
        if ended == [0, 1]:
            raise ArithmeticError("this frame's own")
        return given

    with fallback(pipe, 3, prepare={"callback_on_step_end": raising}) as stream:
        latents = noises(stream, 4)
        with pytest.raises(ArithmeticError, match="this frame's own"):
            for x in latents.split(1):
                stream.predict_x0_batch(x)
        assert stream._denoiser.engine.in_flight == 1 and waiting_threads() == 1
        left = torch.cat(stream.flush())
        assert relative_error(left, pipelines_own(pipe, latents[1:2], 3, negative_prompt="")) <= 1e-6


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_network_that_raises_is_asked_again_and_an_interruption_ends_all(error, pipes):
    pipe = pipes("sd3")
    with fallback(pipe) as stream:
        latents, network = noises(stream, 3), stream.velocity

        class Failing(nn.Module):
            def forward(self, calls):
                raise error("once")

        stream.predict_x0_batch(latents[:1])
        stream.velocity = Failing()
        with pytest.raises(error, match="once"):
            stream.predict_x0_batch(latents[1:2])
        stream.velocity = network
        going_on = error is RuntimeError
        assert waiting_threads() == 2 * going_on
        drawn = [stream.predict_x0_batch(latents[2:]), *stream.flush()]
        drawn = torch.cat([x for x in drawn if x is not None])
        own = pipelines_own(pipe, latents if going_on else latents[2:], negative_prompt="")
        assert relative_error(drawn, own) <= 1e-6


def test_no_thread_outlives_its_stream(pipes):
    stream = fallback(pipes("sd3"), 3)
    stream.predict_x0_batch(noises(stream, 1))
    assert waiting_threads() == 1
    stream.prepare(PROMPT, num_inference_steps=3)
    assert waiting_threads() == 0
    stream.txt2img()
    stream.close()
    assert waiting_threads() == 0
    forgotten = fallback(pipes("sd3"), 3)
    forgotten.txt2img()
    assert waiting_threads() == 2
    del forgotten
    gc.collect()
    assert waiting_threads() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_frames_keep_to_the_callers_cuda_stream(full_float32):
    """Every frame's thread works on the stream of whoever ticks, and in its order."""
    pipe = random_pipeline("sd3").to("cuda")
    with fallback(pipe, 3, prepare=BLURRY) as stream, torch.cuda.stream(torch.cuda.Stream()):
        latents = noises(stream, 4)
        stream.velocity = stream.adapter.row_by_row(True)
        own = pipelines_own(pipe, latents, 3, **BLURRY)
        assert torch.equal(streamed(stream, latents), own)
        stream.velocity = MergedCalls(pipe.transformer)
        assert relative_error(streamed(stream, latents), own) <= 1e-4


LEFT = """
from streamflow import StreamFlow
from random_pipelines import random_pipeline
stream = StreamFlow(random_pipeline("sd3"), cfg_type="full", family="fallback", height=64, width=64)
stream.prepare("a cat", num_inference_steps=3)
stream.txt2img()
print(stream._denoiser.engine.in_flight)
"""


@pytest.mark.slow
def test_an_interpreter_ends_with_frames_in_flight():
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", LEFT], env=env, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr


def test_a_coroutine_runs_only_while_it_is_waited_for_and_can_be_stopped(monkeypatch):
    received = []

    def stubborn(ask):
        while True:
            try:
                received.append(ask(len(received)))
            except Exception:
                received.append("caught")

    def started(function):
        coroutine = Coroutine(function, torch.device("cpu"))
        coroutine.resume()
        return coroutine

    first = started(stubborn)
    assert first.request == 0 and received == []
    first.resume("a")
    assert first.request == 1 and received == ["a"] and not first.done
    first.stop()
    assert first.done and received == ["a"]
    with torch.inference_mode():
        assert started(lambda ask: torch.ones(1)).result.is_inference()
    monkeypatch.setattr("streamflow.stream.coroutine.STOP_SECONDS", 0.05)
    gate = threading.Event()

    def slow_to_end(ask):
        try:
            ask(0)
        finally:
            gate.wait()

    Coroutine(slow_to_end, torch.device("cpu")).stop()  # before it has started
    second = started(slow_to_end)
    with pytest.raises(RuntimeError, match="still runs"):
        second.stop()
    gate.set()
    second._thread.join()


class Net(nn.Module):
    """Takes whatever may come: rows, a time for all of them, lists, tables without a batch dimension."""

    def __init__(self, mixes: bool = False, most: int = 99):
        super().__init__()
        self.mixes, self.most, self.sizes = mixes, most, []

    def forward(self, x, t, table, parts=None, scale=1.0):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise RuntimeError(f"at most {self.most} rows")
        y = scale * x * t.reshape(-1, 1) + table.sum() + (x.mean() if self.mixes else 0)
        return y, [one + 1 for one in parts or []]


def calls_of(net, **changes):
    """Three calls of two rows each."""
    bind = inspect.signature(net.forward).bind
    generator = torch.Generator().manual_seed(0)
    given = {"table": torch.arange(5.0), "parts": None, **changes}
    return [bind(torch.randn(2, 4, generator=generator), torch.tensor(1.0 + k), **given).arguments for k in range(3)]


def equal(answers, others):
    pairs = zip(answers, others, strict=True)
    return all(torch.equal(a, b) and all(map(torch.equal, c, d)) for (a, c), (b, d) in pairs)


def test_calls_of_one_form_are_merged_and_others_stay_separate(caplog):
    net = Net()
    merged, separate = MergedCalls(net), SeparateCalls(net)
    listed = calls_of(net, parts=[torch.ones(3), torch.zeros(3)])
    mixed = [calls_of(net)[0], listed[0], calls_of(net)[1], listed[1], calls_of(net, scale=2.0)[2]]
    for _ in range(2):
        net.sizes.clear()
        assert equal(merged(mixed), separate(mixed))
    assert sorted(net.sizes[: -len(mixed)]) == [2, 4, 4], "the second time each form is one call"
    assert "stay separate" not in caplog.text


@pytest.mark.parametrize("net", [Net(mixes=True), Net(most=2)], ids=["rows mix", "refuses"])
def test_a_network_whose_output_depends_on_the_batch_gets_separate_calls_and_a_warning(net, caplog):
    merged = MergedCalls(net)
    for _ in range(2):
        net.sizes.clear()
        assert equal(merged(calls_of(net)), SeparateCalls(net)(calls_of(net)))
    assert net.sizes[:3] == [2, 2, 2] and len(net.sizes) == 6
    assert caplog.text.count("calls of Net stay separate") == 1


def test_calls_with_different_tables_stay_separate(caplog):
    net = Net()
    calls = [dict(call, table=torch.arange(5.0) + k) for k, call in enumerate(calls_of(net))]
    assert equal(MergedCalls(net)(calls), SeparateCalls(net)(calls))
    assert "table [5] has no batch dimension of 2 and differs" in caplog.text
