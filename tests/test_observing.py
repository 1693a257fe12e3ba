"""Looking into a stream (`on_step`, `trace`), and stopping it and going on elsewhere (`state_dict`)."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import never_waiting, noises, relative_error, streamed

from streamflow import StreamFlow
from streamflow.acceleration import compile as compiled
from streamflow.acceleration import cuda_graph
from streamflow.flow import predict_x0
from streamflow.models.random_control import random_control
from streamflow.models.random_weights import random_pipeline
from streamflow.observing import check_graphs
from streamflow.resuming import OF_STREAM

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
    sigmas = stream._state.stages.sigmas
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
    first = stream._next_id
    stream.txt2img(2)
    assert not trace.done
    stream.txt2img(4)
    stream.flush()
    assert trace.done and sorted(trace.frames) == [first, first + 1, first + 2]
    assert stream._engine.observer is None, "nothing is looked at any more"
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


STREAMS = {
    "full": dict(family="sd3", t_index_list=[0, 1, 2, 3], cfg_type="full"),
    "self-renoise-buffer": dict(
        family="sd3", t_index_list=[1, 2, 3], cfg_type="self", do_add_noise=True, frame_buffer_size=2
    ),
    "initialize": dict(family="sd3", t_index_list=[1, 2, 3], cfg_type="initialize", noise="frame"),
    "flux": dict(
        family="flux",
        t_index_list=[0, 1, 2, 3],
        cfg_type="full",
        prepare={"negative_prompt": "blurry", "true_cfg_scale": 3.0},
    ),
    "stochastic": dict(family="sd3", t_index_list=[1, 2, 3], changes={"scheduler": {"stochastic_sampling": True}}),
    "loop": dict(family="sd3", t_index_list=[1, 3], **LOOP),
}

PLAIN = ("full", "self-renoise-buffer")


def some_calls(stream, picture, start):
    """What four calls and a flush give: pictures, one with a mask, and text; the similarity filter has a say."""
    same = [picture(start)] * stream.frame_bff_size
    other = [picture(start + 1)] * stream.frame_bff_size
    drawn = [stream(same), stream(same), stream(other, mask=MASK), stream.txt2img()]
    return [*drawn, *stream.flush()]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in PLAIN)) for n in STREAMS])
def test_a_saved_stream_goes_on_with_the_same_bits_elsewhere(name, stream_of, picture):
    """Saved to a file in mid-stream: prompts, masks and finished frames on their way, an update that waits, a picture that
    the filter will know. Loaded into a stream that was prepared otherwise and has a frame in flight."""

    def group(k):
        return [picture(k)] * stream.frame_bff_size

    options = STREAMS[name]
    prepare = {"generator": torch.Generator().manual_seed(3)} if name == "full" else {"seed": 5}
    stream = stream_of(**{**options, "prepare": {**options.get("prepare", {}), **prepare}})
    stream.enable_similar_image_filter(threshold=0.9)
    some_calls(stream, picture, 0)
    stream.txt2img()
    stream.update_prompt("a green pear", scope="frame")
    stream(group(1), mask=MASK)
    stream.update(num_inference_steps=5)
    stream.inpaint(picture(4), MASK, paste=False)
    stream(group(2), mask=MASK)
    stream(group(3))
    stream.update(guidance_scale=1.7)
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    expected = some_calls(stream, picture, 3)
    other = stream_of(**options)
    other.inpaint(picture(1), MASK)
    other(group(5))
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    given = some_calls(other, picture, 3)
    assert len(given) == len(expected) and all(map(torch.equal, given, expected))
    assert other.update(seed=1) == 4, "updates go on being counted"


def test_a_state_of_another_stream_is_refused_with_all_differences_and_nothing_changes(stream_of):
    made = stream_of("flux", frame_buffer_size=2, cfg_type="full")
    made.txt2img()
    stream, untouched = stream_of("sd3"), stream_of("sd3")
    for one in (stream, untouched):
        one.txt2img()
    with pytest.raises(ValueError) as refused:
        stream.load_state_dict(made.state_dict())
    for told in (
        "family 'Flux', here 'StableDiffusion3'",
        "latents [16, 64], here [16, 8, 8]",
        "cfg_type 'full', here 'none'",
    ):
        assert told in str(refused.value)
    assert "frame_buffer_size 2, here 1" in str(refused.value) and "width" not in str(refused.value)
    with pytest.raises(TypeError, match="takes what state_dict"):
        stream.load_state_dict({})
    with pytest.raises(ValueError, match="format 0"):
        stream.load_state_dict({**stream.state_dict(), "format": 0})
    assert torch.equal(stream.txt2img(), untouched.txt2img())


def test_a_state_needs_a_prepared_stream_and_loading_it_does_not(stream_of, pipes):
    fresh = StreamFlow(pipes("sd3"), [0, 1, 2, 3], cfg_type="none")
    with pytest.raises(RuntimeError, match="prepare"):
        fresh.state_dict()
    stream = stream_of("sd3")
    first = stream.txt2img()
    state = stream.state_dict()
    second = stream.txt2img()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.txt2img(), second) and not torch.equal(first, second)
    assert torch.equal(fresh.txt2img(), stream.txt2img()), "a state is a copy: neither stream's calls have changed it"
    fresh.load_state_dict(state)
    assert torch.equal(fresh.txt2img(), second)
    stream.prepare("a pear", num_inference_steps=4, sigmas=np.linspace(1, 0.25, 4))
    with pytest.raises(TypeError, match="cannot hold a ndarray"):
        stream.state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_looking_under_a_graph_and_going_on_with_the_same_bits(cuda_stream):
    """A vouched-for fn and a trace neither wait nor change a bit; a state holds the same for the same graphs."""
    stream, file = cuda_stream(), io.BytesIO()
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
        state = stream.state_dict()
        looked_at = stream.txt2img(6)
    assert trace.done and trace.frames[5].x.shape[0] == 5
    torch.save(state, file)
    stream.on_step(None)
    stream.prepare("another prompt", num_inference_steps=4)
    stream.txt2img()
    for where in ("cpu", "cuda"):
        file.seek(0)
        stream.load_state_dict(torch.load(file, weights_only=True, map_location=where))
        assert torch.equal(stream.txt2img(6), looked_at)


@pytest.mark.slow
def test_control_nets_are_gone_on_with_by_name_and_their_scale_still_acts_on_what_was_loaded(picture):
    """The nets themselves are no part of a state, as the pipeline is none; without them it is refused."""

    def controlled(name, scale):
        pipe = random_pipeline("sd3")
        stream = StreamFlow(pipe, [0, 1, 2], cfg_type="full")
        stream.add_control(name, random_control(pipe.transformer), scale)
        stream.prepare("a pear", num_inference_steps=3)
        stream.txt2img(control={name: picture(0)})
        return stream

    def going_on(stream):
        stream.set_control_scale("edges", 0.3)
        return stream.flush()

    stream, other = controlled("edges", 0.7), controlled("edges", 0.1)
    state = stream.state_dict()
    other.load_state_dict(state)
    assert other.controls == {"edges": 0.7}
    expected = going_on(stream)
    assert len(expected) == 2 and all(map(torch.equal, going_on(other), expected))
    with pytest.raises(ValueError, match=r"controls \['edges'\], here \['depth'\]"):
        controlled("depth", 0.7).load_state_dict(state)


NOT_OF_A_STATE = {
    "set where the stream is made": "_batched _cfg_type _check _do_add_noise _feedback _indices _input_range _noise_policy "
    "_planner _resize _shape adapter device dtype frame_bff_size height width latent_height latent_width image_processor "
    "pipe",
    "parts of the pipeline": "_plain_codec _vae codec _accelerated _acceleration _blank",
    "held by itself, or follows from what is": "_engine _held_noise _levels_of",
    "of this process": "_constructed _ranges _seen _callers _slot _ticks _timer _said _traces _on_step _graph_safe _closed "
    "_pass _stepping _finite _asked_for",
}


def test_whatever_a_stream_holds_is_saved_or_named_here(stream_of):
    """A new attribute belongs into `resuming.OF_STREAM` or into the table above."""
    stream = stream_of("sd3")
    mixed_in = [cls for cls in type(stream).__mro__ if cls.__module__.startswith("streamflow.")]
    plain = {n for cls in mixed_in for n, v in vars(cls).items() if not n.startswith("__") and not hasattr(v, "__get__")}
    assert {*vars(stream), *plain} - {*OF_STREAM, *" ".join(NOT_OF_A_STATE.values()).split()} == set()
