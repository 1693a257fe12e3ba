"""No frame is lost silently: calls that empty the ring under `frames`, errors of the decoder, calls inside a step."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPT, slow
from random_pipelines import random_pipeline
from random_pipelines.control import random_control

from streamflow import StreamFlow
from streamflow.parallel import shard_vae
from streamflow.parallel.pool import DecodeError
from streamflow.stream.frames import Input
from streamflow.stream.outputs import FiniteCheck

EMPTYING = {
    "prepare": lambda stream: stream.prepare(PROMPT, num_inference_steps=4),
    "reset": lambda stream: stream.reset(),
    "flush": lambda stream: stream.flush(),
    "close": lambda stream: stream.close(),
}
DRAWING = {
    "stream(image)": lambda stream, image: stream(image),
    "txt2img": lambda stream, image: stream.txt2img(),
    "predict_x0_batch": lambda stream, image: stream.predict_x0_batch(stream.frame_noise(0)),
    "frames": lambda stream, image: stream.frames([image]),
}


def endless(picture):
    while True:
        yield picture(0)


# -- calls that empty the ring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", EMPTYING)
@pytest.mark.parametrize(
    "options", [{}, slow({"frame_buffer_size": 2}), {"use_denoising_batch": False}], ids=["ring", "two", "loop"]
)
def test_a_call_that_empties_the_ring_ends_the_loop_with_the_number_of_frames(call, options, stream_of, picture):
    stream, got = stream_of("sd3", [1, 2, 3], cfg_type="none", **options), []
    with pytest.raises(RuntimeError, match=rf"ended by {call}\(\), and .*\d+ of its frames were dropped") as error:
        for frame in stream.frames(picture(k) for k in range(30)):
            got.append(frame.id)
            if len(got) == 5:
                entered = stream._denoiser.next_id
                returned = EMPTYING[call](stream) or ()
    dropped = int(str(error.value).split(" of its frames were dropped")[0].split()[-1])
    assert got == list(range(len(got))), "what was decoded by then still comes"
    returned = sum(map(len, returned))
    assert dropped == entered - len(got) - returned + 1, "those in flight, and the input that came in after"
    assert call != "flush" or options.get("use_denoising_batch") is False or returned


def test_a_loop_that_has_all_its_frames_ends_without_an_error(stream_of, picture):
    stream = stream_of("sd3", [1, 2, 3], cfg_type="none")
    got = 0
    for _ in stream.frames([picture(k) for k in range(5)]):
        got += 1
        if got == 5:
            stream.prepare(PROMPT, num_inference_steps=4)
    assert got == 5 and [frame.id for frame in stream.frames([picture(0)] * 2)] == [0, 1]


def test_an_input_that_resets_the_stream_ends_the_loop_too(stream_of, picture):
    stream = stream_of("sd3", [1, 2, 3], cfg_type="none")

    def inputs():
        yield picture(0)
        stream.reset()
        yield picture(1)

    with pytest.raises(RuntimeError, match="2 of its frames were dropped"):
        list(stream.frames(inputs()))


@pytest.mark.parametrize("call", ["prepare", "reset", "flush", "close"])
def test_a_thread_that_empties_the_ring_ends_the_loop(call, stream_of, picture):
    for _ in range(5):
        stream, got = stream_of("sd3", [1, 2, 3], cfg_type="none"), []
        begun = threading.Event()
        thread = threading.Thread(target=lambda stream=stream, begun=begun: (begun.wait(20), EMPTYING[call](stream)))
        thread.start()
        with pytest.raises(RuntimeError, match=rf"ended by {call}\(\)"):
            for frame in stream.frames(endless(picture)):
                got.append(frame.id)
                begun.set()
        thread.join()
        assert got == list(range(len(got)))


@pytest.mark.parametrize("call", DRAWING)
def test_calls_that_would_take_the_loops_frames_are_refused_and_it_goes_on(call, stream_of, picture):
    stream, twin = (stream_of("sd3", [1, 2, 3], cfg_type="none") for _ in range(2))
    pictures, drawn = [picture(k) for k in range(6)], []
    for frame in stream.frames(pictures):
        drawn.append(frame.image)
        with pytest.raises(RuntimeError, match="a loop over frames\\(\\) is running"):
            DRAWING[call](stream, pictures[0])
    assert all(torch.equal(a, b.image) for a, b in zip(drawn, twin.frames(pictures), strict=True))


def test_of_two_iterators_the_second_is_refused_also_where_both_were_made_before(stream_of, picture):
    stream = stream_of("sd3", [1, 2, 3], cfg_type="none")
    one, two = stream.frames([picture(0)] * 4), stream.frames([picture(1)] * 4)
    next(one)
    with pytest.raises(RuntimeError, match="is running"):
        next(two)
    assert len(list(one)) == 3
    assert len(list(stream.frames([picture(1)] * 4))) == 4


def test_a_loop_that_is_left_gives_the_stream_free_and_its_frames_to_flush(stream_of, picture):
    stream = stream_of("sd3", [1, 2, 3], cfg_type="none")
    for _ in stream.frames(endless(picture)):
        break
    gc.collect()
    with pytest.raises(RuntimeError, match="2 frames are in flight"):
        stream.frames([picture(0)])
    assert len(stream.flush()) == 2
    assert stream(picture(0)).shape == (1, 3, 64, 64)


# -- errors of the decoder ---------------------------------------------------------------------------------------------


class Full:
    """Raises at these calls of the decoder."""

    def __init__(self, pipe, *at):
        self.calls, self.at = 0, at
        self.hook = pipe.vae.decoder.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.calls in self.at:
            raise torch.OutOfMemoryError("no memory for the decoder")


@pytest.fixture
def made():
    def make(**options):
        stream = StreamFlow(random_pipeline("sd3"), [1, 2, 3], cfg_type="none", **options)
        stream.prepare(PROMPT, num_inference_steps=4)
        return stream

    return make


def attempts(count, call):
    """What this many calls give; those that raise for want of memory are made again."""
    got, failed = [], 0
    while len(got) < count:
        try:
            got.append(call(len(got)))
        except torch.OutOfMemoryError:
            failed += 1
            assert failed < 20
    return got


def missing(wanted, got):
    return [k for k, one in enumerate(wanted) if not any(torch.allclose(one, other, atol=1e-5) for other in got)]


@pytest.mark.parametrize("filtered", [False, True])
def test_a_frame_whose_decoding_fails_comes_at_the_next_call(filtered, made, picture):
    pictures = [picture(k) for k in range(8)]
    wanted = [frame.image.clone() for frame in made().frames(pictures)]
    stream = made()
    if filtered:
        stream.enable_similar_image_filter(0.999, 100)
    full = Full(stream.pipe, 3, 6, 7)
    got = [one[0].clone() for one in attempts(8, lambda k: stream(pictures[k]))]
    full.hook.remove()
    got += [stream.decode_image(one)[0] for one in stream.flush()]
    assert missing(wanted, got) == []


def test_a_decoder_that_goes_on_failing_takes_no_more_inputs(made, picture):
    stream = made()
    stream(picture(0))
    full = Full(stream.pipe, *range(1, 11))
    for _ in range(10):
        with pytest.raises(torch.OutOfMemoryError):
            stream(picture(1))
    assert stream._denoiser.in_flight() <= 3 and stream._denoiser.next_id == 2
    for _ in range(3):
        stream(picture(1))
    full.hook.remove()


def test_images_of_text_whose_decoding_fails_come_next(made):
    wanted = list(made().txt2img(batch_size=6))
    stream = made()
    Full(stream.pipe, 2)
    got = torch.cat(attempts(3, lambda k: stream.txt2img(batch_size=2)))
    assert missing(wanted, list(got)) == []


def test_frames_keeps_what_could_not_be_decoded_for_flush(made, picture):
    pictures = [picture(k) for k in range(6)]
    wanted = [frame.image.clone() for frame in made().frames(pictures)]
    stream, got = made(), []
    Full(stream.pipe, 3)
    with pytest.raises(torch.OutOfMemoryError):
        for frame in stream.frames(pictures):
            got.append(frame.image)
    entered = stream._denoiser.next_id
    got += [stream.decode_image(one)[0] for one in stream.flush()]
    assert len(got) == entered and missing(wanted[:entered], got) == []


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("bad", [3, 4, 6])
@pytest.mark.slow
def test_with_several_decoders_what_was_decoded_before_still_comes(devices, bad, made, picture):
    pictures = [picture(k) for k in range(8)]
    wanted = [frame.image.clone() for frame in made().frames(pictures)]
    latents = []
    plain = made()
    hook = plain.pipe.vae.decoder.register_forward_pre_hook(lambda _, given: latents.append(given[0].clone()))
    list(plain.frames(pictures))
    hook.remove()
    stream, got = made(), []

    def fail(_, given):
        if torch.allclose(given[0], latents[bad], atol=1e-4):
            raise torch.OutOfMemoryError("no memory for the decoder")

    hook = stream.pipe.vae.decoder.register_forward_pre_hook(fail)
    stream.vae = shard_vae(stream.vae, ["cpu"] * devices)
    with pytest.raises(DecodeError, match="no memory for the decoder"):
        for frame in stream.frames(pictures):
            got.append(frame.image)
    entered = stream._denoiser.next_id
    stream.vae = plain.pipe.vae
    got += [stream.decode_image(one)[0] for one in stream.flush()]
    assert missing(wanted[:entered], got) == []


@pytest.mark.parametrize("devices", [slow(1), 3])
def test_a_loop_that_is_left_by_an_error_leaves_every_frame_that_was_not_delivered(devices, made, picture):
    pictures = [picture(k) for k in range(8)]
    wanted = [frame.image.clone() for frame in made().frames(pictures)]
    stream, got = made(), []
    stream.vae = shard_vae(stream.vae, ["cpu"] * devices)
    with pytest.raises(KeyError):
        for frame in stream.frames(pictures):
            got.append(frame.image)
            if len(got) == 3:
                raise KeyError("the caller's own")
    gc.collect()
    entered = stream._denoiser.next_id
    got += [stream.decode_image(one)[0] for one in stream.flush()]
    assert len(got) == entered and missing(wanted[:entered], got) == []


def test_flush_inside_a_loop_gives_what_is_being_decoded_too(made, picture):
    pictures = [picture(k) for k in range(8)]
    wanted = [frame.image.clone() for frame in made().frames(pictures)]
    stream, got, left = made(), [], []
    stream.vae = shard_vae(stream.vae, ["cpu"] * 3)
    with pytest.raises(RuntimeError, match="were returned there"):
        for frame in stream.frames(pictures):
            got.append(frame.image)
            if len(got) == 3:
                left, entered = stream.flush(), stream._denoiser.next_id
    got += [stream.decode_image(one)[0] for one in left]
    assert len(got) == entered and missing(wanted[:entered], got) == []


# -- calls from inside a step ------------------------------------------------------------------------------------------

INSIDE = {
    **EMPTYING,
    "stream(image)": lambda stream: stream(torch.zeros(3, 64, 64)),
    "txt2img": lambda stream: stream.txt2img(),
    "predict_x0_batch": lambda stream: stream.predict_x0_batch(stream.frame_noise(0)),
    "frames": lambda stream: stream.frames([None]),
    "set_denoising_batch": lambda stream: stream.set_denoising_batch(False),
}


@pytest.mark.parametrize("options", [{}, slow({"use_denoising_batch": False})], ids=["ring", "loop"])
@pytest.mark.parametrize("call", INSIDE)
def test_a_call_from_on_step_is_one_clear_error_and_the_stream_goes_on(call, options, stream_of):
    stream, twin = (stream_of("sd3", [1, 2, 3], cfg_type="none", **options) for _ in range(2))
    stream.on_step(lambda step: INSIDE[call](stream))
    name = call if "(" in call else f"{call}()"
    with pytest.raises(RuntimeError, match="was called inside a step") as error:
        stream.txt2img()
    assert str(error.value).startswith(name)
    stream.on_step(None)
    twin.txt2img()
    assert torch.isfinite(stream.txt2img()).all()
    stream.prepare(PROMPT, num_inference_steps=4)
    twin.prepare(PROMPT, num_inference_steps=4)
    assert torch.equal(stream.txt2img(), twin.txt2img())


def test_a_hook_of_the_network_and_a_step_of_the_pipelines_own_are_inside_too(stream_of, pipes):
    stream = stream_of("sd3", [1, 2, 3], cfg_type="none")
    hook = stream.pipe.transformer.register_forward_pre_hook(lambda *_: stream.reset())
    with pytest.raises(RuntimeError, match=r"reset\(\) was called inside a step"):
        stream.txt2img()
    hook.remove()
    own = StreamFlow(pipes("cogview4"), cfg_type="none", family="fallback", width=64, height=64)
    with own:
        own.prepare(PROMPT, num_inference_steps=2, callback_on_step_end=lambda *_: own.reset() or {})
        with pytest.raises(RuntimeError, match=r"reset\(\) was called inside a step"):
            own.txt2img()


@pytest.mark.parametrize("call", ["close", "flush", "next", "collect"])
def test_the_pipelines_own_callback_waits_for_no_lock_of_the_thread_it_works_for(call, pipes):
    """It runs in a thread of its own, for which the drawing thread waits. Python collects garbage in any thread."""
    own, armed = StreamFlow(pipes("cogview4"), cfg_type="none", family="fallback", width=64, height=64), []

    def callback(*_):
        for act in armed:
            act()
        return {}

    own.prepare(PROMPT, num_inference_steps=2, callback_on_step_end=callback)
    if call == "collect":
        cycle = [own.frames(endless(lambda _: None))]
        cycle.append(cycle)
        next(cycle[0])
        del cycle
        armed.append(gc.collect)
        assert len(own.flush()) == 1
        return
    waiting = own.frames([None])
    armed.append({"close": own.close, "flush": own.flush, "next": lambda: next(waiting)}[call])
    with pytest.raises(RuntimeError, match="was called inside a step"):
        own.txt2img()
    armed.clear()
    own.close()


def test_update_and_decode_image_may_be_called_inside_a_step(stream_of):
    stream, seen = stream_of("sd3", [1, 2, 3], cfg_type="none"), []

    def fn(step):
        seen.append(stream.decode_image(step.x0[:1]))
        stream.update(seed=len(seen))

    stream.on_step(fn)
    stream.txt2img()
    assert len(seen) == 3 and seen[0].shape == (1, 3, 64, 64)


# -- images that are not finite ----------------------------------------------------------------------------------------


def test_images_that_are_not_finite_are_said_once_and_counted(made, picture, caplog):
    stream = made()
    stream(picture(0))
    assert stream.not_finite == 0 and not caplog.records
    bias = stream.pipe.transformer.proj_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    drawn = [stream(picture(k)) for k in range(4)]
    bad = sum(not torch.isfinite(one).all() for one in drawn)
    assert bad == stream.not_finite >= 2
    stream.flush()
    bad += len(list(stream.frames([picture(0)] * 2)))
    assert stream.not_finite == bad
    assert [r.getMessage() for r in caplog.records if "NaN" in r.getMessage()][1:] == []
    with torch.no_grad():
        bias.copy_(kept)
    stream.reset()
    assert torch.isfinite(stream.txt2img()).all() and stream.not_finite == bad


def test_images_that_are_not_finite_are_counted_once_by_threads_that_read_at_once():
    """A copy from a GPU that arrives while the statistics are read in another thread."""
    both, check, gpu = threading.Barrier(2), FiniteCheck(), torch.device("cuda", 0)

    def arrived() -> bool:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.1)  # until the other thread is here too, if it may be
        return True

    check._copies[gpu] = SimpleNamespace(arrived=arrived, value=lambda: torch.tensor(3))
    with ThreadPoolExecutor(2) as threads:
        assert max(one.result() for one in [threads.submit(check.read) for _ in range(2)]) == check.known == 3


def test_after_an_image_that_is_not_finite_the_filter_skips_nothing(made, picture):
    stream = made()
    stream.enable_similar_image_filter(0.5, 100)
    bias = stream.pipe.vae.decoder.conv_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
        assert not torch.isfinite(stream(picture(0))).any()
        bias.copy_(kept)
    drawn = [stream(picture(0)) for _ in range(3)]
    assert all(torch.isfinite(one).all() and one.std() > 0.01 for one in drawn)


# -- the last frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["frames", "flush"])
def test_a_control_scale_acts_on_frames_that_run_out(call, made, picture):
    def drawn(scale):
        stream, out = made(), []
        stream.add_control("edges", random_control(stream.pipe.transformer), 1.0)
        given = {"edges": picture(9)}
        if call == "flush":
            for k in range(3):
                stream(picture(k), control=given)
            stream.set_control_scale("edges", scale)
            return torch.cat(stream.flush())
        for frame in stream.frames([Input(picture(k), control=given) for k in range(3)]):
            out.append(frame.image)
            stream.set_control_scale("edges", scale)
        return torch.stack(out[1:])

    assert (drawn(1.0) - drawn(0.0)).abs().max() > 1e-4


def test_how_many_calls_behind(made, picture):
    stream = made()
    assert stream.calls_behind == 0
    for k in range(3):
        stream(picture(k))
    assert stream.calls_behind == 2
    stream.update(t_index_list=[3])
    stream(picture(1))
    behind = stream.calls_behind
    assert behind == 2
    last = made()
    last.update(t_index_list=[3])
    expected = last(picture(5))
    got = [stream(picture(5)) for _ in range(behind + 1)]
    assert torch.allclose(got[behind], expected, atol=1e-5)
    stream.flush()
    assert stream.calls_behind == 0
