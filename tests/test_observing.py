"""Looking into a stream: `on_step` and `trace`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import never_waiting, noises, relative_error, streamed

from streamflow.acceleration import compile as compiled
from streamflow.acceleration import cuda_graph
from streamflow.flow.convention import predict_x0
from streamflow.stream.hooks import check_graphs

LOOP = {"use_denoising_batch": False}
MASK = np.pad(np.ones((20, 30)), ((9, 35), (11, 23)))


def test_every_row_of_every_step_is_seen_with_its_frame_stage_and_levels(stream_of):
    """Two frames a group, three stages, three frames: what fills and pads the ring is told apart."""
    stream, seen = stream_of("sd3", [0, 1, 3], frame_buffer_size=2), []
    stream.on_step(seen.append)
    list(stream.frames([None] * 3))
    assert [step.ids for step in seen] == [
        (0, 1, None, None, None, None),
        (2, None, 0, 1, None, None),
        (None, None, 2, None, 0, 1),
        (None, None, None, None, 2, None),
    ]
    assert all(step.stages == (0, 0, 1, 1, 2, 2) and step.last == 2 for step in seen)
    sigmas = stream._denoiser.state.stages.sigmas
    for step in seen:
        assert torch.equal(step.sigma, sigmas.repeat_interleave(2))
        assert torch.equal(step.sigma_next, torch.cat((sigmas[1:], torch.zeros(1))).repeat_interleave(2))
        assert torch.equal(step.x0, predict_x0(step.x, step.v, step.sigma))
    assert torch.equal(seen[1].x[2:], seen[0].x_next[:4]), "rows move on by a group"
    stream.on_step(None)
    list(stream.frames([None]))
    assert len(seen) == 4


def test_copies_that_fill_the_ring_are_marked(stream_of, picture):
    stream, seen = stream_of("sd3", [2, 3]), []
    stream.on_step(seen.append)
    stream(picture(0))
    stream(picture(1))
    assert [(step.ids, step.copies) for step in seen] == [
        ((0, None), (False, False)),
        ((0, 0), (True, False)),
        ((1, 0), (False, True)),
    ]


@pytest.mark.parametrize("options", [{}, LOOP], ids=["ring", "loop"])
def test_what_fn_returns_takes_the_place_of_the_latents(options, stream_of):
    """Stopped where x0 is estimated in the first stage, a frame is that estimate, whatever comes later."""

    def freeze(step):
        first = torch.tensor([stage == 0 for stage in step.stages]).reshape(-1, 1, 1, 1)
        return torch.where(first, step.x0, step.x)

    stream = stream_of("sd3", **options)
    stream.on_step(freeze)
    latents = noises(stream, 3)
    one_step = streamed(stream_of("sd3", [0]), latents)
    assert relative_error(streamed(stream, latents), one_step) <= 1e-5


def test_what_fn_may_not_return_and_the_stream_goes_on_after_its_errors(stream_of):
    stream = stream_of("sd3")
    for wrong, error, message in (
        (lambda step: 1, TypeError, "not int"),
        (lambda step: step.x0[:1], ValueError, r"\[1, 16, 8, 8\] on cpu; the latents are torch.float32 \[4, 16, 8, 8\]"),
        (lambda step: step.x0.double(), ValueError, "returned torch.float64"),
        (lambda step: 1 / 0, ZeroDivisionError, "division"),
    ):
        stream.on_step(wrong)
        with pytest.raises(error, match=message):
            stream.txt2img()
    stream.on_step(None)
    others = torch.cat(stream.flush())
    assert relative_error(others, streamed(stream_of("sd3"), noises(stream, 4))) <= 1e-5
    with pytest.raises(TypeError, match="takes a function"):
        stream.on_step("print")


def test_an_error_in_fn_leaves_no_gap_in_a_trace(stream_of):
    stream = stream_of("sd3")
    trace, calls = stream.trace(2), []

    def fails_once(step):
        calls.append(step)
        if len(calls) == stream.denoising_steps_num:  # the first frame is to leave in it
            raise OSError("no space")

    stream.on_step(fails_once)
    frames = list(noises(stream, 6))
    for latents in frames[: stream.denoising_steps_num - 1]:
        assert stream.predict_x0_batch(latents[None]) is None
    with pytest.raises(OSError, match="no space"):
        stream.predict_x0_batch(frames[-2][None])
    stream.predict_x0_batch(frames[-1][None])
    assert trace.done and all(len(one.x) == stream.denoising_steps_num + 1 for one in trace.frames.values())


def test_an_error_in_fn_while_frames_run_out_loses_no_frame(stream_of):
    def fails(step):
        raise OSError("no space")

    stream = stream_of("sd3")
    stages = stream.denoising_steps_num
    frames = list(noises(stream, 2 * stages).split(1))
    for latents in frames[: stages - 1]:
        assert stream.predict_x0_batch(latents) is None
    stream.on_step(fails)
    with pytest.raises(OSError, match="no space"):
        stream.flush()
    stream.on_step(None)
    left = [stream.predict_x0_batch(latents) for latents in frames[stages:]]
    entered = torch.cat(frames[: stages - 1] + frames[stages:])
    assert relative_error(torch.cat(left), streamed(stream_of("sd3"), entered)[:stages]) <= 1e-5


def test_under_graphs_fn_must_be_vouched_for():
    """The rule by itself; tests on a GPU use it under a real graph."""
    graphs = [("cuda-graph", cuda_graph.Options()), ("compile", compiled.Options(cuda_graph=True))]
    for kind, options in graphs:
        with pytest.raises(RuntimeError, match=r"graph_safe=True .*, or accelerate\('none'\)"):
            check_graphs(kind, options)
    check_graphs("compile", compiled.Options(cuda_graph=False))
    check_graphs("none", None)


@pytest.mark.parametrize("options", [{"frame_buffer_size": 2}, LOOP], ids=["buffer", "loop"])
def test_a_trace_holds_whole_trajectories(options, stream_of):
    stream = stream_of("sd3", cfg_type="full", **options)
    stream.txt2img(2)
    trace = stream.trace(3)
    first = stream._denoiser.next_id
    stream.txt2img(2)
    assert not trace.done
    stream.txt2img(4)
    stream.flush()
    assert trace.done and sorted(trace.frames) == [first, first + 1, first + 2]
    assert stream._denoiser.engine.observer is None, "nothing is looked at any more"
    reference = stream_of("sd3", cfg_type="full", **LOOP)
    for k, frame in trace.frames.items():
        assert torch.equal(frame.x[:1], stream.frame_noise(k))
        steps = (frame.sigma.diff().reshape(-1, 1, 1, 1) * frame.v) + frame.x[:-1]
        assert torch.equal(frame.x[1:], steps), "x_next = x + (sigma_next - sigma) v"
        assert torch.allclose(frame.x0, frame.x[:-1] - frame.sigma[:-1].reshape(-1, 1, 1, 1) * frame.v, atol=1e-6)
        assert relative_error(frame.x[-1:], reference.predict_x0_batch(frame.x[:1])) <= 1e-5
    trace = stream.trace(1)
    stream.prepare("another", num_inference_steps=4)
    stream.txt2img()
    assert not trace.frames, "prepare ends a trace"
    with pytest.raises(ValueError, match="1 or more, not 0"):
        stream.trace(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_looking_under_a_graph_never_waits(cuda_stream):
    """A function that never waits and a trace neither wait nor change a bit."""
    stream, plain = cuda_stream(), cuda_stream()
    stream.on_step(lambda step: None)
    with pytest.raises(RuntimeError, match="graph_safe=True"):
        stream.accelerate("cuda-graph")
    stream.on_step(lambda step: step.x_next.clone(), graph_safe=True)
    stream.accelerate("cuda-graph")
    with pytest.raises(RuntimeError, match="graph_safe=True"):
        stream.on_step(print)
    stream.txt2img(2)
    trace = stream.trace(2)
    with never_waiting():
        looked_at = stream.txt2img(6)
    assert torch.equal(looked_at[2:], plain.txt2img(8)[4:]) and trace.done and trace.frames[5].x.shape[0] == 5


def test_residual_noise_that_the_function_of_on_step_assigns_is_kept(stream_of, picture):
    """What is replaced in flight during a step is in force at the next one."""
    stream = stream_of("sd3", [1, 2, 3], cfg_type="self")

    def halve(step):
        stream.on_step(None)
        stream.stock_noise = stream.stock_noise * 0.5

    for k in range(3):
        stream(picture(k))
    before = stream.stock_noise
    stream.on_step(halve)
    stream(picture(3))
    fresh = stream_of("sd3", [1, 2, 3], cfg_type="self")
    for k in range(4):
        fresh(picture(k))
    assert not torch.equal(stream.stock_noise, fresh.stock_noise) and not torch.equal(before, stream.stock_noise)
