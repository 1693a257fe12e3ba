"""A stream between a source and sinks: images in order, errors held, scenes switched, and everything closed."""

import logging
import threading
import time

import numpy as np
import pytest
from conftest import slow

from streamflow.io import InvalidSource, SinkLost, SourceLost, TimedImage
from streamflow.live import feed as feeds
from streamflow.live.feed import Feed
from streamflow.live.show import Sinks

WAIT = 20  # seconds, after which a thread that should have gone on has not


class Camera:
    """Gives grey images as fast as they are read, up to `most`; is unplugged before those numbered in `lost`."""

    def __init__(self, most=None, lost=(), error=SourceLost):
        self.most, self.lost, self.error = most, set(lost), error
        self.count = self.opened = self.closed = 0

    def open(self):
        self.opened += 1

    def read(self):
        if self.count in self.lost:
            self.lost.remove(self.count)
            raise self.error("unplugged")
        if self.count == self.most:
            return None
        self.count += 1
        time.sleep(0.005)
        return TimedImage(np.full((64, 64, 3), 7 * self.count % 256, np.uint8), time.monotonic())

    def close(self):
        self.closed += 1


class Kept:
    """Keeps what it is given, and fails at the image numbered `fails`."""

    def __init__(self, fails=None, error=SinkLost):
        self.pictures, self.fails, self.error, self.closed = [], fails, error, 0

    def open(self):
        pass

    def write(self, picture):
        if len(self.pictures) == self.fails:
            raise self.error("gone")
        self.pictures.append(picture.pixels)

    def close(self):
        self.closed += 1


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def distinct(pictures):
    """The images without repetitions."""
    return [one for k, one in enumerate(pictures) if not k or not np.array_equal(one, pictures[k - 1])]


@pytest.fixture
def stream(stream_of):
    return stream_of("sd3", [1, 2], cfg_type="none")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [one.name for one in threading.enumerate() if one.name.startswith(("streamflow live", "reading", "writing"))]


def test_every_image_is_drawn_and_shown_in_order_as_the_loop_draws_them(stream, stream_of):
    camera, kept, other = Camera(most=6), Kept(), Kept()
    with stream.live(camera, [kept, other], target_fps=200, policy="every", mode="sequential") as show:
        found = show.wait()
    twin = stream_of("sd3", [1, 2], cfg_type="none", use_denoising_batch=False)
    from streamflow.image_utils import uint8_pixels

    own = [uint8_pixels(twin(np.full((64, 64, 3), 7 * k % 256, np.uint8)))[0] for k in range(1, 7)]
    assert all(np.array_equal(a, b) for a, b in zip(distinct(kept.pictures), own, strict=True))
    assert found.drawn == 6 and found.dropped_in == found.dropped_out == found.errors == found.losses == 0
    assert found.shown == len(kept.pictures) + found.dropped_by_sinks // 2 and found.shown - found.repeated == 6
    assert found.mode == "sequential" and found.latency_p50 <= found.latency_p95
    assert camera.closed and kept.closed == other.closed == 1 and not show.running


@pytest.mark.parametrize("mode", ["fed", "free"])
def test_the_ring_restyles_too_and_a_prompt_reaches_it(stream, mode):
    kept = Kept()
    with stream.live(Camera(), kept, target_fps=100, mode=mode) as show:
        until(lambda: len(kept.pictures) > 3)
        stream.update_prompt("another one")
        drawn = show.statistics.drawn
        until(lambda: show.statistics.drawn > drawn + 4)
        show.stop()
    assert show.statistics.mode == mode and len(distinct(kept.pictures)) > 3


def test_auto_measures_the_modes_and_takes_one(stream, caplog):
    caplog.set_level(logging.INFO, "streamflow.live.latency_modes")
    kept = Kept()
    with stream.live(Camera(), kept, target_fps=10) as show:
        until(lambda: kept.pictures)
        show.stop()
    said = [record.getMessage() for record in caplog.records if record.name == "streamflow.live.latency_modes"]
    assert said[0].startswith(f"mode {show.statistics.mode}:") and said[1].startswith("runner-up")


@pytest.mark.parametrize("mode", [slow("auto"), "fed", "free", "sequential"])
def test_a_clip_of_twelve_frames_comes_out_whole(stream, mode):
    """Measuring uses up none of them, and the last ones leave the ring when the source ends."""
    camera, kept = Camera(most=12), Kept()
    with stream.live(camera, kept, target_fps=30, policy="every", mode=mode) as show:
        found = show.wait()
    assert found.dropped_in == found.dropped_out == 0
    assert len(distinct(kept.pictures)) == 12 or found.dropped_by_sinks


@pytest.mark.parametrize("change", ["an error of the decoder", "one at the end", "fewer stages"])
def test_a_clip_comes_out_whole_whatever_happens_on_the_way(change, stream):
    camera, kept, calls = Camera(most=8), Kept(), []

    def decoding(*_):
        calls.append(1)
        if change == "an error of the decoder" and len(calls) == 4 or change == "one at the end" and camera.count == 8:
            if "failed" not in calls:
                calls.append("failed")
                raise RuntimeError("no memory for the decoder")
        if change == "fewer stages" and len(calls) == 4:
            stream.update(t_index_list=[2])

    hook = stream.pipe.vae.decoder.register_forward_pre_hook(decoding)
    with stream.live(camera, kept, target_fps=30, policy="every", mode="fed") as show:
        found = show.wait()
    hook.remove()
    assert len(distinct(kept.pictures)) == 8 or found.dropped_by_sinks


def test_live_is_refused_while_a_loop_over_frames_is_under_way(stream, picture):
    loop = stream.frames([picture(0)] * 3)
    next(loop)
    with pytest.raises(RuntimeError, match=r"live\(\) was called while a loop over frames"):
        stream.live(Camera(), Kept())
    loop.close()
    stream.reset()


def test_the_similarity_filter_keeps_no_frame_of_a_clip_in_the_ring(stream):
    class Noise(Camera):
        def read(self):
            picture = super().read()
            rng = np.random.default_rng(self.count)
            return picture and TimedImage(rng.integers(0, 256, (64, 64, 3), np.uint8), picture.time)

    camera, kept = Noise(most=5), Kept()
    stream.enable_similar_image_filter(0.99, max_skip_frame=100)
    with stream.live(camera, kept, target_fps=100, policy="every", mode="fed") as show:
        show.wait()
    assert len(distinct(kept.pictures)) == 5


def test_text_is_drawn_as_fast_as_it_is_shown_and_no_faster(stream):
    kept = Kept()
    with stream.live(None, kept, target_fps=100) as show:
        until(lambda: len(kept.pictures) > 5)
        show.stop()
    found = show.statistics
    assert found.dropped_out == 0 and found.drawn <= found.shown - found.repeated + 4 and found.mode == "text"


def test_a_source_that_is_lost_holds_the_last_image_and_comes_back(stream, caplog):
    camera, kept = Camera(lost=[3, 4]), Kept()
    with stream.live(camera, kept, target_fps=50, mode="fed") as show:
        until(lambda: camera.count > 6 and len(distinct(kept.pictures)) > 2)
        show.stop()
    assert camera.opened == camera.closed == 3 and show.statistics.losses in (1, 2) and show.statistics.repeated
    assert [r.levelname for r in caplog.records if "the source is lost" in r.getMessage()].count("WARNING") in (1, 2)


def test_without_holding_the_error_is_raised_after_all_is_closed(stream):
    camera, kept = Camera(lost=[2]), Kept()
    with pytest.raises(SourceLost, match="unplugged"), stream.live(camera, kept, mode="fed", on_error="raise") as show:
        show.wait()
    assert camera.closed == 1 and kept.closed == 1


def test_a_stream_that_raises_holds_too(stream, caplog, monkeypatch):
    camera, kept, real, fails = Camera(), Kept(), stream.velocity, iter([False, False, True, True])

    def velocity(*args, **kwargs):
        if next(fails, False):
            raise RuntimeError("out of luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(stream, "velocity", velocity)
    with stream.live(camera, kept, target_fps=50, mode="fed") as show:
        until(lambda: show.statistics.errors == 2 and show.statistics.drawn > 4)
        show.stop()
    assert sum("out of luck" in record.getMessage() for record in caplog.records) == 1, "each message is logged once"
    monkeypatch.setattr(stream, "velocity", velocity)
    fails = iter([True])
    with pytest.raises(RuntimeError, match="out of luck"), stream.live(camera, kept, mode="fed", on_error="raise") as show:
        show.wait()


def test_a_sink_that_ends_leaves_the_others_and_the_last_one_ends_all(stream):
    first, second = Kept(fails=2), Kept(fails=6)
    with stream.live(Camera(), [first, second], target_fps=100, mode="fed") as show:
        found = show.wait()
    assert len(first.pictures) == 2 and len(second.pictures) == 6 and found.shown >= 6


def failing(error, *calls):
    """A method that raises in the calls of these numbers, in all where there are none; `calls`: how many there were."""

    def method(*arguments):
        method.calls += 1
        if not calls or method.calls in calls:
            raise error

    method.calls = 0
    return method


def errors_of_libraries():
    """Errors of every kind that sources and sinks raise, and that are no OSError for the most part."""
    import http.client

    import PIL

    found = [RuntimeError("r"), ValueError("v"), KeyError("k"), MemoryError("m"), TimeoutError("t"), OSError(28, "full")]
    found += [PIL.UnidentifiedImageError("p"), http.client.BadStatusLine("b"), FileNotFoundError("f"), StopIteration()]
    try:
        import av

        return [*found, av.error.InvalidDataError(1, "a")]
    except ImportError:
        return found


@pytest.mark.parametrize("error", errors_of_libraries(), ids=lambda error: type(error).__name__)
@pytest.mark.slow
def test_whatever_a_source_raises_is_a_loss_from_which_it_comes_back(error, caplog):
    camera = Camera(lost=[2, 3], error=lambda _: error)
    feed = Feed(camera, "every", hold=True)
    pictures = []
    until(lambda: pictures.append(feed.next(0.05)) or camera.count > 5)
    feed.close()
    assert not feed.ended and feed.losses == 2 and camera.opened == camera.closed == 3
    said = [one.getMessage() for one in caplog.records if "the source is lost" in one.getMessage()]
    assert len(said) == 2 and all(type(error).__name__ in one for one in said)


@pytest.mark.parametrize("error", errors_of_libraries(), ids=lambda error: type(error).__name__)
@pytest.mark.slow
def test_what_open_raises_is_retried_but_for_a_file_that_never_was_there(error):
    camera = Camera()
    camera.open = failing(error, 1, 2)
    feed = Feed(camera, "every", hold=True)
    if isinstance(error, FileNotFoundError):
        with pytest.raises(FileNotFoundError):
            until(lambda: feed.next(0.05))
        feed.close()
    else:
        until(lambda: feed.next(0.05))
        feed.close()
        assert feed.losses == 1 and camera.open.calls == 3


@pytest.mark.parametrize(
    "error", [InvalidSource("no such monitor"), ImportError("no av"), KeyboardInterrupt(), SystemExit(3)]
)
def test_what_a_retry_cannot_mend_is_raised_though_it_is_held(error, stream):
    camera, kept = Camera(), Kept()
    camera.open = failing(error)
    with pytest.raises(type(error)), stream.live(camera, kept, mode="fed") as show:
        until(lambda: not show.running)
    assert camera.closed == kept.closed == 1


@pytest.mark.parametrize("hold", ["hold", "raise"])
def test_an_error_of_a_source_s_close_is_raised_after_all_images_are_shown(hold, stream):
    camera, kept = Camera(most=4), Kept()
    camera.close = failing(ValueError("not closed"))
    with (
        pytest.raises(ValueError, match="not closed"),
        stream.live(camera, kept, target_fps=50, policy="every", mode="fed", on_error=hold) as show,
    ):
        until(lambda: not show.running)
        assert len(distinct(kept.pictures)) == 4
    assert camera.opened == 1 and kept.closed == 1


def test_a_source_that_is_lost_when_the_end_comes_is_no_error_of_stop(stream):
    camera, kept = Camera(), Kept()
    camera.read = failing(ValueError("always"))
    with stream.live(camera, kept, mode="fed") as show:
        until(lambda: camera.opened > 2)
        show.stop()
    assert show.statistics.losses == 1 and camera.opened == camera.closed
    feed = Feed(camera, "every", hold=False)
    until(lambda: feed._reading.done)
    with pytest.raises(ValueError, match="always"):
        feed.close()


def test_a_source_that_does_not_answer_is_logged_and_stop_says_so(stream, caplog, monkeypatch):
    monkeypatch.setattr(feeds, "SILENCE", 0.2)
    camera, kept, answer = Camera(), Kept(), threading.Event()
    camera.read = answer.wait
    show = stream.live(camera, kept, mode="fed")
    until(lambda: any("does not answer" in one.getMessage() for one in caplog.records))
    real = show._feed._reading.close
    monkeypatch.setattr(show._feed._reading, "close", lambda: real(0.1))
    with pytest.raises(TimeoutError, match="does not answer"):
        show.stop()
    assert kept.closed == 1
    answer.set()
    until(lambda: camera.closed)
    until(lambda: show._feed._reading.done)


def test_an_error_of_the_stream_that_looks_like_one_of_the_source_is_held_too(stream, monkeypatch):
    camera, kept, real, fails = Camera(), Kept(), stream.velocity, iter([False, True, True])

    def velocity(*args, **kwargs):
        if next(fails, False):
            raise ConnectionResetError("a worker is gone")
        return real(*args, **kwargs)

    monkeypatch.setattr(stream, "velocity", velocity)
    with stream.live(camera, kept, target_fps=50, mode="fed") as show:
        until(lambda: show.statistics.errors == 2 and show.statistics.drawn > 3)
        show.stop()
    assert show.statistics.losses == 0


def shown_to(*sinks, hold=True):
    """Sinks that are shown an image every few milliseconds until the condition holds."""
    outputs = Sinks(sinks, hold)

    def show_until(condition):
        pixels = np.zeros((4, 4, 3), np.uint8)
        until(lambda: outputs.ended or outputs.show(pixels) or condition())

    return outputs, show_until


@pytest.mark.parametrize("error", errors_of_libraries(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["open", "write"])
@pytest.mark.slow
def test_a_sink_that_raises_is_opened_again_while_the_others_go_on(method, error, caplog):
    class Once(Kept):
        def fail(self):
            if not self.closed:
                raise error

        def open(self):
            if method == "open":
                self.fail()

        def write(self, picture):
            if method == "write" and len(self.pictures) == 2:
                self.fail()
            super().write(picture)

    caplog.set_level(logging.INFO, "streamflow.live.show")
    once, kept = Once(), Kept()
    outputs, show_until = shown_to(once, kept)
    show_until(lambda: "Once is back" in caplog.text)
    assert not outputs.ended and len(kept.pictures) > len(once.pictures) > 0 and once.closed == 1
    assert outputs.dropped >= len(kept.pictures) - len(once.pictures) - 1
    outputs.close()
    assert once.closed == 2 and kept.closed == 1
    assert [one.levelname for one in caplog.records if "Once failed" in one.getMessage()] == ["ERROR"]


@pytest.mark.parametrize("error", errors_of_libraries(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("shown", [0, 3])
def test_a_sink_that_has_failed_when_all_is_closed_is_an_error(shown, error):
    class Broken(Kept):
        def write(self, picture):
            if len(self.pictures) == shown:
                raise error
            super().write(picture)

    broken, kept = Broken(), Kept()
    outputs, show_until = shown_to(broken, kept)
    show_until(lambda: broken.closed and len(kept.pictures) > 5)
    assert not outputs.ended
    with pytest.raises(type(error)) as raised:
        outputs.close()
    assert raised.value is error and kept.closed == 1 and len(broken.pictures) == shown


def test_what_ends_a_sink_for_good_and_what_ends_all(monkeypatch):
    monkeypatch.setattr(feeds, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(feeds, "FIRST_PAUSE", 0.01)
    closed, missing, kept = Kept(fails=1), Kept(fails=0, error=ImportError), Kept()
    outputs, show_until = shown_to(closed, missing, kept)
    show_until(lambda: len(outputs._outputs) == 1)
    with pytest.raises(ImportError, match="gone"):
        outputs.close()
    assert closed.closed == missing.closed == kept.closed == 1
    broken = Kept(fails=1, error=OSError)
    outputs, show_until = shown_to(broken)
    show_until(lambda: False)
    assert isinstance(outputs.error, OSError) and broken.closed == 6
    with pytest.raises(OSError, match="gone"):
        outputs.close()
    outputs, show_until = shown_to(Kept(fails=1, error=KeyError), hold=False)
    show_until(lambda: False)
    assert isinstance(outputs.error, KeyError)


@pytest.mark.parametrize("error", [ValueError("not finished"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_of_a_sink_s_close_is_raised_by_stop_after_all_are_closed(error, stream):
    first, second = Kept(), Kept()
    first.close = failing(error)
    with pytest.raises(type(error)), stream.live(Camera(), [first, second], mode="fed") as show:
        until(lambda: first.pictures and second.pictures)
        show.stop()
    assert first.close.calls == second.closed == 1 and not show.running


@pytest.mark.slow
@pytest.mark.attack
def test_a_show_ends_with_the_error_of_its_only_sink_once_that_has_failed_for_seconds(stream):
    broken = Kept(fails=1, error=OSError)
    with pytest.raises(OSError, match="gone"), stream.live(Camera(), broken, target_fps=100, mode="fed") as show:
        show.wait()
    assert broken.closed > 3


def test_a_scene_is_warmed_while_the_other_plays_and_shown_at_the_next_tick(stream, stream_of):
    kept = Kept()
    second = stream_of("flux", [0, 1], cfg_type="none")
    with stream.live(Camera(), kept, target_fps=50, mode="fed") as show:
        until(lambda: kept.pictures)
        scene = show.warm(second)
        drawn = show.statistics.drawn
        until(lambda: show.statistics.drawn > drawn)  # the first one goes on
        assert show.stream is stream
        assert show.switch(scene, crossfade=0.2) is stream and show.stream is second
        drawn = show.statistics.drawn
        until(lambda: show.statistics.drawn > drawn + 2)
        with pytest.raises(ValueError, match="crossfade must be seconds"):
            show.switch(scene, crossfade=-1)
        show.stop()
    with pytest.raises(RuntimeError, match="it has ended"):
        show.switch(scene)


def test_a_crossfade_goes_from_the_last_image_to_the_new_ones(monkeypatch):
    from streamflow.live import draw

    now = [10.0]
    monkeypatch.setattr(draw.time, "monotonic", lambda: now[0])
    drawing = draw.Drawing(None, None, draw.BoundedQueue(1, block=False), True)
    drawing.last = draw.Drawn(np.full((2, 2, 3), 200, np.uint8), 0.0)
    drawing.switch("scene", 2.0)
    drawing._take_scene()
    new, seen = np.full((2, 2, 3), 100, np.uint8), []
    for now[0] in (10.0, 10.5, 11.0, 12.0, 13.0):
        seen.append(int(drawing._crossfaded(new)[0, 0, 0]))
    assert seen == [200, 175, 150, 100, 100]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "some"}, "unknown policy 'some': choose one of newest, every"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"on_error": "ignore"}, "unknown on_error"),
        ({"target_fps": 0}, "target_fps must be images a second, above 0"),
        ({"target_fps": float("nan")}, "target_fps must be"),
        ({"sinks": []}, "there is no sink"),
        ({"source": "nothing:1"}, "unknown source 'nothing:1'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_begins(stream, changes, message):
    arguments = {"source": None, "sinks": "null", **changes}
    with pytest.raises(ValueError, match=message):
        stream.live(arguments.pop("source"), arguments.pop("sinks"), **arguments)


def test_groups_of_frames_and_streams_that_are_not_prepared_are_refused(stream_of, pipes):
    from streamflow import StreamFlow

    with pytest.raises(ValueError, match="frame_buffer_size=2"):
        stream_of("sd3", [1, 2], frame_buffer_size=2).live(None, "null")
    with pytest.raises(RuntimeError, match="prepare"):
        StreamFlow(pipes("sd3"), [1], cfg_type="none").live(None, "null")


def test_ring_and_loop_change_places_between_frames_only(stream, stream_of, picture):
    ring = stream(picture(1))
    stream(picture(2))
    with pytest.raises(RuntimeError, match="1 frames are in flight: flush"):
        stream.set_denoising_batch(False)
    stream.reset()
    stream.set_denoising_batch(False)
    loop = stream(picture(1))
    assert stream.batch_size == stream_of("sd3", [1, 2], cfg_type="none", use_denoising_batch=False).batch_size
    assert float((ring - loop).abs().max()) < 1e-4
    with pytest.raises(TypeError, match="True or False"):
        stream.set_denoising_batch(1)
