"""A video stream in sinks: chunks come at once, and every frame leaves once, in order, whatever disturbs it."""

import threading
import time

import numpy as np
import pytest
from conftest import slow
from test_live import Kept, distinct, until
from test_video import FRAMES, embeds, hooked, stream_of

from streamflow import VideoStream
from streamflow.live.remote import Control, Mapping, open_control
from streamflow.live.video import ChunkQueue

FAST = 100.0  # frames a second


def own(pipe, count, **call):
    """The first frames of a stream that nothing disturbs, uint8."""
    return [frame.timed().pixels for frame in stream_of(pipe, "np", **call).frames(count)]


def same(some, others):
    return len(some) == len(others) and all(map(np.array_equal, some, others))


def check_shown(kept, frames, show):
    """Every frame leaves once and in order. Only those are missing that a slow sink has not taken in time."""
    shown, missing, frames = distinct(kept.pictures), 0, iter(frames)
    for picture in shown:
        while not np.array_equal(picture, next(frames)):
            missing += 1
    assert missing <= show.statistics.dropped_by_sinks


def expected(show, pipe, **call):
    return own(pipe, show.statistics.shown - show.statistics.repeated, **call)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [one.name for one in threading.enumerate() if one.name.startswith(("streamflow live", "writing"))]


@pytest.fixture
def pipe(pipes):
    return pipes("helios")


@pytest.mark.parametrize("output_type", ["np", slow("pil"), slow("pt")])
def test_every_frame_leaves_once_and_in_order_until_the_sink_is_closed(output_type, pipe):
    kept = Kept(fails=40)
    with stream_of(pipe, output_type).live(kept, target_fps=FAST) as show:
        found = show.wait()
    assert len(distinct(kept.pictures)) > 2 * FRAMES
    check_shown(kept, expected(show, pipe), show)
    assert kept.closed == 1 and not show.running and found.mode == "video" and found.errors == 0
    assert found.drawn == (found.shown - found.repeated) + found.dropped_out


def test_drawing_waits_for_the_show(pipe):
    """One chunk plays, one waits; a third one is drawn once the first has played."""
    kept = Kept()
    stream = stream_of(pipe, "np")
    with stream.live(kept, target_fps=20) as show:
        until(lambda: show.statistics.drawn == 2 * FRAMES)
        shown = show.statistics.shown
        until(lambda: show.statistics.drawn == 3 * FRAMES or show.statistics.shown > shown + 3)
        assert show.statistics.shown >= FRAMES or show.statistics.drawn == 2 * FRAMES
        until(lambda: show.statistics.drawn == 3 * FRAMES)
        assert FRAMES <= show.statistics.shown <= 2 * FRAMES
        show.stop()
    found = show.statistics
    assert found.drawn == (found.shown - found.repeated) + found.dropped_out and found.latency_p50 > 0
    assert stream().id == found.drawn // FRAMES, "the stream goes on behind what was drawn"


def test_a_prompt_acts_at_the_border_of_the_next_chunk(pipe):
    stream, kept = stream_of(pipe, "np"), Kept()

    def act(call):
        if call == 3:  # of two steps a chunk: inside of chunk 1
            stream.update(prompt_embeds=embeds(5))

    with hooked(pipe, act), stream.live(kept, target_fps=FAST) as show:
        until(lambda: show.statistics.shown - show.statistics.repeated > 3 * FRAMES)
        show.stop()
    twin = stream_of(pipe, "np")
    frames = [frame.timed().pixels for frame in twin.frames(2 * FRAMES)]
    twin.update(prompt_embeds=embeds(5))
    frames += [frame.timed().pixels for frame in twin.frames(3 * FRAMES)]
    check_shown(kept, frames, show)
    assert not np.array_equal(frames[2 * FRAMES], own(pipe, 2 * FRAMES + 1)[-1])


@pytest.mark.parametrize("error", ["nan", slow("raised")])
def test_a_chunk_that_fails_is_drawn_again_and_no_frame_is_lost(error, pipe, caplog):
    stream, kept = stream_of(pipe, "np"), Kept()

    def act(call):
        if call in (2, 4):  # twice in chunk 1
            if error == "raised":
                raise OSError("no memory left")
            return float("nan") if call == 2 else None

    with hooked(pipe, act), stream.live(kept, target_fps=FAST) as show:
        until(lambda: len(distinct(kept.pictures)) > 2 * FRAMES)
        show.stop()
    found = show.statistics
    check_shown(kept, expected(show, pipe), show)
    assert (found.errors, found.not_finite) == ((1, 1) if error == "nan" else (2, 0))
    assert caplog.text.count("the last image stays") == 1


def test_without_holding_the_error_is_raised_after_the_frames_before_it_are_shown(pipe):
    stream, kept = stream_of(pipe, "np"), Kept()
    with hooked(pipe, lambda call: float("nan") if call == 4 else None), pytest.raises(FloatingPointError, match="chunk 2"):
        with stream.live(kept, target_fps=FAST, on_error="raise") as show:
            show.wait()
    assert show.statistics.shown - show.statistics.repeated == 2 * FRAMES and kept.closed == 1
    check_shown(kept, own(pipe, 2 * FRAMES), show)


@pytest.mark.slow
def test_a_sink_that_fails_is_opened_again_and_the_others_get_every_frame(pipe):
    failing, kept = Kept(fails=5, error=OSError), Kept()
    with stream_of(pipe, "np").live([failing, kept], target_fps=FAST) as show:
        until(lambda: len(distinct(kept.pictures)) > FRAMES and show.statistics.dropped_by_sinks)
        failing.fails = None
        before = len(failing.pictures)
        until(lambda: len(failing.pictures) > before)
        show.stop()
    check_shown(kept, expected(show, pipe), show)
    assert failing.closed == 2


@pytest.mark.slow
def test_a_video_that_ends_is_shown_to_its_last_frame(pipes):
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0, "prompt_embeds": embeds()}
    pipe, kept = pipes("anyflow-far", rope_max_seq_len=4), Kept()
    streams = [VideoStream(pipe, output_type="np") for _ in range(2)]
    for stream in streams:
        stream.prepare(seed=3, **call)
    whole = [frame.timed().pixels for frame in streams[0].frames()]
    with streams[1].live(kept, target_fps=FAST) as show:
        found = show.wait()
    assert found.drawn == len(whole) == found.shown - found.repeated and found.dropped_out == 0
    check_shown(kept, whole, show)


def test_frames_that_a_loop_has_left_come_first(pipe):
    stream, kept = stream_of(pipe, "np"), Kept()
    taken = [frame.timed().pixels for frame in stream.frames(4)]
    with stream.live(kept, target_fps=FAST) as show:
        until(lambda: len(distinct(kept.pictures)) > FRAMES)
        show.stop()
    assert same(taken, own(pipe, 4))
    check_shown(kept, own(pipe, 4 + show.statistics.shown)[4:], show)


@pytest.mark.slow
def test_a_knob_acts_at_the_next_chunk_and_what_a_video_has_not_is_dropped(pipe, caplog):
    stream, kept = stream_of(pipe, "np"), Kept()
    with open_control(Control(), stream.update) as controls:
        for field in ("seed", "delta"):
            controls._knobs.add(Mapping(address=f"osc:/{field}", field=field, range=(0, 10)))
        with stream.live(kept, target_fps=FAST, controls=controls) as show:
            until(lambda: show.statistics.drawn)
            for field in ("seed", "delta"):
                controls.receive(f"osc:/{field}", 0.7)
            until(lambda: stream.seed == 7)
            until(lambda: "delta = 7.0 is refused and dropped" in caplog.text)
            show.stop()
    assert show.statistics.errors == 0


@pytest.mark.slow
def test_a_pause_stops_at_a_frame_and_goes_on_with_the_next(pipe):
    stream, kept = stream_of(pipe, "np"), Kept()
    with open_control(Control(), stream.update) as controls, stream.live(kept, target_fps=200, controls=controls) as show:
        until(lambda: len(kept.pictures) > 2)
        for pause in (lambda: controls.keys.press("space"), lambda: show.pause(not show._paused_by_call)):
            pause()
            time.sleep(0.02)  # a frame that was taken before is shown
            shown = show.statistics
            until(lambda at=shown.repeated: show.statistics.repeated > at + 20)
            now = show.statistics
            assert now.shown - now.repeated == shown.shown - shown.repeated and now.drawn <= shown.drawn + FRAMES
            pause()
            until(lambda at=shown: show.statistics.shown - show.statistics.repeated > at.shown - at.repeated)
        show.stop()
    check_shown(kept, expected(show, pipe), show)


def test_frames_leave_at_the_rate_at_which_the_last_chunk_was_drawn_where_that_is_slower(pipe):
    with stream_of(pipe, "np").live(Kept(), target_fps=50) as show:
        show._set_pace(0.1)
        slower = show.rate
        show._set_pace(0.001)
        assert slower == pytest.approx(10 / 1.02) and show.rate == 50


def test_the_queue_holds_what_plays_and_one_chunk_more():
    queue = ChunkQueue()
    assert queue.take() is None and queue.wait_for_room(0)
    queue.put([1, 2])
    assert not queue.wait_for_room(0) and queue.take() == 1 and queue.wait_for_room(0)
    queue.put([3, 4])
    assert not queue.wait_for_room(0) and [queue.take() for _ in range(2)] == [2, 3] and queue.wait_for_room(0)
    queue.close()
    assert not queue.wait_for_room(0) and not queue.put([5]) and len(queue) == 1
    queue.clear()
    assert queue.dropped == 1 and queue.take() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": []}, "there is no sink"),
        ({"sinks": "somewhere:3"}, "unknown sink"),
        ({"target_fps": 0}, "above 0 and below"),
        ({"on_error": "go on"}, "choose one of hold, raise"),
    ],
)
def test_what_cannot_be_shown_is_refused(options, message, pipe):
    with pytest.raises(ValueError, match=message):
        stream_of(pipe, "np").live(**{"sinks": "null", **options})


def test_a_stream_without_images_or_without_a_prompt_is_refused(pipe):
    with pytest.raises(ValueError, match='output_type="latent"'):
        stream_of(pipe).live("null")
    for sinks in (5, None, [object()]):
        with pytest.raises(TypeError, match="a sink is an address or an object with open, write and close"):
            stream_of(pipe, "np").live(sinks)
    with pytest.raises(RuntimeError, match="call prepare"):
        VideoStream(pipe).live("null")
