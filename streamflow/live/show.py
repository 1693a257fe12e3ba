"""`Live`: a stream between a source and sinks, at even intervals.

Four kinds of threads with bounded queues between them: capture (`Feed`), drawing (`Drawing`), the output clock, and one for
each sink. No thread waits for a slower one, except that drawing waits for the clock under policy "every".
"""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, get_args

import numpy as np
import PIL.Image

from streamflow._queue import BoundedQueue
from streamflow._threads import Thread
from streamflow.io import Sink, SinkLost, Source, TimedImage, Writing, open_sink, open_source
from streamflow.live.draw import Drawing, DrawingThread, Drawn, Outbox, Scene
from streamflow.live.feed import SILENCE, Backoff, Feed, describe
from streamflow.live.latency_modes import Clock, ModeChooser, RealClock
from streamflow.live.pacing import Pacer
from streamflow.live.settings import LiveSettings

if TYPE_CHECKING:
    from streamflow.live.remote import Controls
    from streamflow.live.remote.keys import Keys
    from streamflow.pipeline import StreamFlow

logger = logging.getLogger(__name__)
ENDING = 30.0  # seconds for a thread to end
ATTEMPTS = 6  # failures in a row of all sinks, which take about 8 s, after which a live performance ends


@dataclass(frozen=True)
class Statistics:
    """Counters of a show. shown: images that the clock gave to the sinks. repeated: those that were shown again since
    nothing new was ready. skipped: multiples of the period that were missed. late: images that were ready after their time.
    drawn: ticks. dropped_in, dropped_out, dropped_by_sinks: images replaced by newer ones before drawing, before showing,
    and before a sink took them, or while a sink had failed. losses: of the source. errors: of the stream. not_finite:
    images with NaN or infinite values, of the stream that draws now. latency: seconds from capture to showing, median and
    95th percentile, None before there are any."""

    seconds: float
    mode: str
    shown: int
    repeated: int
    late: int
    skipped: int
    drawn: int
    dropped_in: int
    dropped_out: int
    dropped_by_sinks: int
    losses: int
    errors: int
    not_finite: int
    latency_p50: float | None
    latency_p95: float | None

    @property
    def drawn_per_second(self) -> float:
        """Images a second."""
        return self.drawn / self.seconds if self.seconds else 0.0


class Output:
    """One sink, written in a thread of its own. After `lose` it is opened again, once a pause has passed."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.failures = sink, 0
        self.error: Exception | None = None  # the last one
        self._writing: Writing | None = Writing(sink)
        self._backoff = Backoff()
        self._given = self._dropped = 0
        self._silent = False

    @property
    def dropped(self) -> int:
        """Images that the sink did not get."""
        return self._dropped + (self._writing.dropped if self._writing else 0)

    @property
    def works(self) -> bool:
        """Whether it has taken an image since it failed, or has not failed."""
        return not self.failures or (self._writing is not None and self._writing.count > 0)

    def write(self, image: TimedImage) -> None:
        """Queue an image; before it is opened again, drop it. Raises what the sink raised."""
        if self._writing is None:
            if self._backoff.left:
                self._dropped += 1
                return
            self._writing, self._given = Writing(self.sink), 0
        self._writing.write(image)
        self._given += 1
        if self.failures and self.works:
            logger.info("%s is back", type(self.sink).__name__)
            self.failures = 0
            self._backoff.reset()
        if self._writing.waiting > SILENCE and not self._silent:
            name = type(self.sink).__name__
            logger.warning("%s does not answer: a call of it has not returned for %.0f s", name, self._writing.waiting)
        self._silent = self._writing.waiting > SILENCE

    def lose(self, error: Exception) -> None:
        """Discard the thread that this error has ended, and wait longer before each attempt. `failures` counts the attempts
        since an image was last written."""
        self.error = error
        writing, self._writing = self._writing, None
        assert writing is not None, "the error is of its thread"
        writing.close()
        self._dropped += self._given - writing.count + 1
        self.failures = 1 if writing.count else self.failures + 1
        self._backoff.failed()

    def close(self) -> None:
        """Write what is queued and close the sink. Raises what it raised."""
        if self._writing is not None:
            self._writing.close()


class Sinks:
    """The sinks, each in a thread of its own. All images have the first one's size, which recordings and cameras
    need.

    hold: as `Live`'s on_error; where every sink has failed `ATTEMPTS` times in a row, the error ends all. A sink that raises
    SinkLost, which the user has closed, is left out. So is one that raises ImportError, which `close` raises then, like
    the last error of a sink that has not taken an image since.
    """

    def __init__(self, sinks: Sequence[Sink], hold: bool, keys: Keys | None = None) -> None:
        self._hold, self._keys = hold, keys
        self._outputs = [Output(sink) for sink in sinks]
        self._dropped, self._size, self._frozen = 0, None, None
        self._left_out: list[BaseException] = []
        self.error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether no sink is left, or one failed that was not to be held."""
        return not self._outputs or self.error is not None

    @property
    def dropped(self) -> int:
        """Images that a sink did not get: they were replaced by newer ones, or it had failed."""
        return self._dropped + sum(one.dropped for one in self._outputs)

    def show(self, pixels: np.ndarray) -> None:
        """Give every sink this image, or the one that the keys select."""
        image = TimedImage(self._resized(self._apply_keys(pixels)), time.monotonic())
        for one in list(self._outputs):
            try:
                one.write(image)
            except Exception as error:  # a sink's own, whatever it is
                self._lose(one, error)

    def _apply_keys(self, pixels: np.ndarray) -> np.ndarray:
        keys = self._keys
        if keys is None or not (keys.frozen or keys.black or keys.panic):
            self._frozen = None
            return pixels
        self._frozen = pixels if self._frozen is None else self._frozen
        return np.zeros_like(pixels) if keys.black and not keys.panic else self._frozen

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        size = pixels.shape[1], pixels.shape[0]
        self._size = self._size or size
        if size == self._size:
            return pixels
        return np.asarray(PIL.Image.fromarray(pixels).resize(self._size, PIL.Image.Resampling.BICUBIC))

    def _lose(self, output: Output, error: Exception) -> None:
        name = type(output.sink).__name__
        if isinstance(error, SinkLost):
            logger.info("%s ended: %s", name, error)
            self._leave_out(output)
        elif not self._hold:
            logger.error("%s failed: %s", name, describe(error))
            self._leave_out(output)
            self.error = error
        elif isinstance(error, ImportError):
            logger.error("%s is left out: %s", name, error)
            self._leave_out(output)
            self._left_out.append(error)
        else:
            if not output.failures:
                logger.error("%s failed, and is opened again after a pause: %s", name, describe(error))
            output.lose(error)
            if all(one.failures >= ATTEMPTS for one in self._outputs):
                self.error = error

    def _leave_out(self, output: Output) -> None:
        self._outputs.remove(output)
        self._dropped += output.dropped

    def close(self) -> None:
        """Write what is queued and close all; the first error is raised, after the others are closed."""
        found = self._left_out
        for one in list(self._outputs):
            try:
                one.close()
                if one.error is not None and not one.works:
                    found.append(one.error)
            except SinkLost as error:
                logger.info("%s ended: %s", type(one.sink).__name__, error)
            except BaseException as error:  # of a sink, whatever it is: the others are to be closed
                found.append(error)
            self._leave_out(one)
        if found:
            raise found[0]


class Show:
    """Plays until nothing more is drawn, the last sink is gone, or `stop`. In a `with`, it ends with the block.

    drawing: the thread that draws. outbox: what it draws into. feed: what it draws from. sinks: one or several addresses or
    objects. hold: as `Live`'s on_error. rate: images a second.
    """

    def __init__(
        self,
        drawing: DrawingThread,
        outbox: Outbox,
        feed: Feed | None,
        sinks: Sequence[Sink],
        hold: bool,
        rate: float,
        controls: Controls | None,
        clock: Clock | None,
    ) -> None:
        self._began, self._ended_at = time.monotonic(), None
        self._pacer: Pacer[Drawn] = Pacer(1 / rate, clock or RealClock())
        self._drawing, self._outbox, self._feed = drawing, outbox, feed
        self._sinks = Sinks(sinks, hold, None if controls is None else controls.keys)
        self._stopped = False
        self._shown: Drawn | None = None
        self._error: BaseException | None = None
        self._clock_thread = Thread(self._pace, "streamflow live clock")
        self._drawing.start()
        self._clock_thread.start()
        atexit.register(self._at_exit)  # a thread that computes while the interpreter ends would abort the process

    @property
    def running(self) -> bool:
        """Whether the show has not ended."""
        return self._clock_thread.is_alive()

    @property
    def intervals(self) -> list[float]:
        """Seconds from one showing to the next, the last 100,000."""
        return list(self._pacer.intervals)

    @property
    def statistics(self) -> Statistics:
        """The counters up to now, or up to the end."""
        p, d, feed = self._pacer, self._drawing, self._feed
        return Statistics(
            seconds=(self._ended_at or time.monotonic()) - self._began,
            mode=d.mode_name,
            shown=p.shown,
            repeated=p.repeated,
            late=p.late,
            skipped=p.skipped,
            drawn=d.drawn,
            dropped_in=feed.dropped if feed else 0,
            dropped_out=self._outbox.dropped,
            dropped_by_sinks=self._sinks.dropped,
            losses=feed.losses if feed else 0,
            errors=d.errors,
            not_finite=d.not_finite,
            latency_p50=d.latency(0.5),
            latency_p95=d.latency(0.95),
        )

    def stop(self) -> None:
        """End the show after what is being drawn, and close the sinks, whose files are then complete."""
        self._stopped = True  # no lock is taken here, so that Ctrl-C in this method cannot leave one held
        self.wait()

    def wait(self, timeout: float | None = None) -> Statistics:
        """Wait until the show ends, at most `timeout` seconds. Raises the error that ended it, if there was one."""
        self._clock_thread.join(timeout)
        if self._error is not None and not self._clock_thread.is_alive():
            error, self._error = self._error, None
            raise error
        return self.statistics

    def _at_exit(self) -> None:
        self._stopped = True
        self._clock_thread.join(2 * ENDING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # -- the clock's thread -----------------------------------------------------------------------------------------------

    def _pace(self) -> None:
        try:
            self._pacer.run(self._take, self._show, self._going)
        except BaseException as error:  # raised by wait()
            self._error = error
        finally:
            self._close()

    def _take(self) -> Drawn | None:
        return self._outbox.take()

    def _show(self, drawn: Drawn) -> None:
        if drawn is not self._shown:
            self._drawing.latencies.append(time.monotonic() - drawn.entered)
            self._shown = drawn
        self._sinks.show(drawn.pixels)

    def _going(self) -> bool:
        if self._stopped or self._sinks.ended:
            return False
        return self._drawing.is_alive() or len(self._outbox) > 0

    def _close(self) -> None:
        """In order: drawing, capture, sinks. The first error of all is kept."""
        self._drawing.stop()
        self._drawing.join(ENDING)
        found = [self._error, self._drawing.error, self._sinks.error]
        if self._drawing.is_alive():
            found.append(
                TimeoutError(f"the drawing thread has not ended within {ENDING:g} s: a call of the stream does not return")
            )
        for part in (self._feed, self._sinks):
            try:
                if part is not None:
                    part.close()
            except BaseException as error:  # of a source or sink, whatever it is
                found.append(error)
        atexit.unregister(self._at_exit)
        self._ended_at = time.monotonic()
        self._error = next((error for error in found if error is not None), None)


def check_show(target_fps: float, **choices: str) -> None:
    """Raise ValueError for a rate that is none, or a choice that `LiveSettings` does not have."""
    for name, value in choices.items():
        known = get_args(LiveSettings.model_fields[name].annotation)
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    if isinstance(target_fps, bool) or not isinstance(target_fps, (int, float)) or not 0 < target_fps < 1e4:
        raise ValueError(f"target_fps must be images a second, above 0 and below 10,000, not {target_fps!r}")


def all_sinks(sinks: str | Sink | Sequence[str | Sink]) -> list[Sink]:
    """The sinks as objects, those of addresses made but not opened. ValueError: an unknown address, or no sink. TypeError:
    an object that is no sink."""
    many = [sinks] if isinstance(sinks, str) or not isinstance(sinks, Sequence) else sinks
    if not many:
        raise ValueError("there is no sink: give at least one, such as 'window' or 'record:out.mp4'")
    for one in many:
        if not isinstance(one, str) and not all(callable(getattr(one, verb, None)) for verb in ("open", "write", "close")):
            raise TypeError(f"a sink is an address or an object with open, write and close, not {one!r}")
    return [open_sink(one) if isinstance(one, str) else one for one in many]


class Live(Show):
    """Runs from when it is made until the source ends, the last sink is gone, or `stop`. `StreamFlow.live` makes one. In a
    `with`, it ends with the block.

    source: an address (`streamflow.io`), an object with `open`, `read` and `close`, or None. Its images are cropped to the
        stream's proportions.
    sinks: one or several addresses or objects with `open`, `write` and `close`.
    target_fps: images a second that are shown, at even intervals: where nothing new is there, the last one again.
    policy: "newest" draws the newest image of the source and shows the newest that is drawn; "every" leaves none out, and
        the source waits.
    mode: "fed" (the ring, one tick an input), "free" (the ring, always ticking on the newest input), "sequential" (one input
        to its end); "auto" measures all three on the first image, for 2 s, and takes the one of the lowest latency among
        those that hold the rate. Measured again when size or number of stages change.
    on_error: "hold" keeps the last good image when the source, a sink or the stream raises, logs it once, and goes on after
        pauses of 0.25 s that double up to 5 s, in which source or sink are opened again; a recording goes on in a new file.
        What that cannot mend ends the show: a missing file or package, no sink left that works. "raise" ends it at any
        error. `wait()` and `stop()` raise what ended it, and what raised while it was closed.
    controls: the result of `streamflow.live.remote.open_control`: OSC, MIDI, keys.

    Raises:
        ValueError: an unknown address, policy, mode or on_error, a rate that is none, more than one frame a group.
    """

    def __init__(
        self,
        stream: StreamFlow,
        source: str | Source | None,
        sinks: str | Sink | Sequence[str | Sink],
        *,
        target_fps: float = 30.0,
        policy: str = "newest",
        mode: str = "auto",
        on_error: str = "hold",
        controls: Controls | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_show(target_fps, policy=policy, mode=mode, on_error=on_error)
        opened = open_source(source) if isinstance(source, str) else source
        outs = all_sinks(sinks)
        self._mode, self._rate, hold = mode, float(target_fps), on_error == "hold"
        self._has_source = opened is not None
        scene = self._scene(stream)
        newest = self._has_source and policy == "newest"
        outbox: BoundedQueue[Drawn] = BoundedQueue(1 if newest else 2, block=not newest)
        feed = Feed(opened, policy, hold) if opened is not None else None
        self._images = Drawing(scene, feed, outbox, hold, controls)
        super().__init__(self._images, outbox, feed, outs, hold, self._rate, controls, clock)

    def _scene(self, stream: StreamFlow) -> Scene:
        return Scene(stream, self._has_source, self._mode, ModeChooser(self._rate))

    # -- while it runs ----------------------------------------------------------------------------------------------------

    @property
    def stream(self) -> StreamFlow:
        """The stream that draws now."""
        return self._images.scene.stream

    def warm(self, stream: StreamFlow) -> Scene:
        """Another stream, prepared, made ready in the caller's thread while this one plays: its first ticks are done and
        its ring is full, so that `switch` has an image at the next tick. ValueError, RuntimeError: it cannot be drawn."""
        scene = self._scene(stream)
        image = None
        if self._has_source:
            black = np.zeros((stream.height, stream.width, 3), np.uint8)
            image = self._images.newest or TimedImage(black, time.monotonic())
            scene.mode(image)
        scene.fill(image)
        return scene

    def switch(self, scene: Scene, crossfade: float = 0.0) -> StreamFlow:
        """Draw a warmed scene from the next tick on; returns the stream that was drawn before, once no tick of it is under
        way. crossfade: seconds in which the last image of the old scene fades. The output has the first scene's size.

        A ring that was filled long ago still holds what entered then, so it is filled anew first, here.
        """
        if not 0 <= crossfade < 1e4:
            raise ValueError(f"crossfade must be seconds, 0 or more, not {crossfade!r}")
        before = self._images.scene
        if self._has_source and self._images.newest is not None:
            scene.fill(self._images.newest)
        taken = self._images.switch(scene, crossfade)
        while not taken.wait(0.05):
            if not self._images.is_alive():
                raise RuntimeError("it has ended, and the scene was not shown")
        return before.stream
