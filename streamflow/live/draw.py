"""Live drawing: images go through a scene's stream, tick by tick, in the mode that holds the target rate.

Knows streams by their calls, modes and feeds; no sink and no output clock. `DrawingThread` is what it shares with videos.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streamflow._queue import BoundedQueue
from streamflow._threads import Flag, Thread
from streamflow.image_utils import cropped, uint8_pixels
from streamflow.io import TimedImage
from streamflow.live.feed import Backoff, Feed, describe
from streamflow.live.latency_modes import Mode, ModeChooser, fed, free, percentile, sequential

if TYPE_CHECKING:
    from streamflow.live.remote import Controls
    from streamflow.pipeline import StreamFlow

logger = logging.getLogger(__name__)
PATIENCE = 0.05  # seconds for which a thread waits for input before it checks its state
ATTEMPTS = 3  # failures in a row, after the source's end, after which the remaining images are dropped
LATENCIES = 1000  # images whose latency is kept


@dataclass(frozen=True, eq=False)
class Drawn:
    """A finished image, uint8 `[H, W, 3]`. entered: `time.monotonic()` of its input's capture."""

    pixels: np.ndarray
    entered: float


class Outbox(Protocol):
    """Finished images on their way to the clock's thread. dropped: images that are never shown."""

    @property
    def dropped(self) -> int:
        """How many."""
        ...

    def take(self) -> Drawn | None:
        """Remove the next image without waiting; None where there is none."""

    def __len__(self) -> int: ...


class Scene:
    """A prepared stream and how it is ticked: S ticks lie between an image that enters and its result.

    takes_images: whether images go in; otherwise it draws from noise.
    """

    def __init__(self, stream: StreamFlow, takes_images: bool, mode: str, chooser: ModeChooser) -> None:
        if stream.frame_bff_size != 1:
            raise ValueError(f"live draws frame by frame, and this stream has frame_buffer_size={stream.frame_bff_size}")
        self.stream, self.takes_images = stream, takes_images
        self._mode, self._chooser = mode, chooser
        self._entered: deque[float] = deque()
        self.batched = stream.use_denoising_batch

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.stream.width, self.stream.height

    def mode(self, image: TimedImage) -> Mode:
        """The mode to draw in. Under "auto" it is measured on this image, once for each size and number of stages."""
        stages = max(1, self.stream.denoising_steps_num)

        def modes() -> list[Mode]:
            def tick(batched: bool) -> Callable[[int], Drawn]:
                return lambda _: self.tick(image, batched, filtered=False)

            return [fed(tick(True), stages), free(tick(True), stages), sequential(tick(False))]

        if self._mode == "auto":
            chosen = self._chooser.choose(*self.size, stages, modes)
        else:
            chosen = next(mode for mode in modes() if mode.name == self._mode)
        self._batch(chosen.name != "sequential")
        return chosen

    def _batch(self, batched: bool) -> None:
        if batched != self.batched:
            self.stream.reset()
            self.stream.set_denoising_batch(batched)
            self.batched = batched

    def tick(self, image: TimedImage | None, batched: bool | None = None, filtered: bool = True) -> Drawn:
        """One tick. Return the result of what entered S ticks ago.

        batched: as a ring or sequentially; None: as before. filtered: whether the similarity filter may skip the image.
        """
        if not filtered:
            self.stream.similar_filter.reset()
        self._batch(self.batched if batched is None else batched)
        began = time.monotonic() if image is None else image.time
        out = self.stream.txt2img() if image is None else self.stream(cropped(image.pixels, *self.size))
        if len(self._entered) != (behind := self.stream.calls_behind):  # an empty ring, or one of another length
            self._entered = deque([began] * behind)
        self._entered.append(began)
        return Drawn(uint8_pixels(out)[0], self._entered.popleft())

    def fill(self, image: TimedImage | None) -> None:
        """Empty the ring and fill it with this image, so that the next tick gives one at once."""
        self.stream.reset()
        self._entered.clear()
        self.tick(image)


class DrawingThread(Thread):
    """Draws turn after turn until it is stopped, there is nothing more to draw, or an error is raised that is not held.

    close: of the queue that it draws into. hold: an error of the stream is logged once a message and the drawing goes on,
    after a pause; the last image stays. `error` is what ended it otherwise.
    """

    def __init__(self, close: Callable[[], object], hold: bool, controls: Controls | None = None) -> None:
        super().__init__(self._draw_all, "streamflow live drawing")
        self.hold, self.controls = hold, controls
        self.drawn = self.errors = 0
        self.error: BaseException | None = None
        self.latencies: deque[float] = deque(maxlen=LATENCIES)
        self.mode_name = ""
        self._close = close
        self._ending = threading.Event()
        self._logged: set[str] = set()
        self._backoff = Backoff()

    def stop(self) -> None:
        """End after what is being drawn."""
        self._ending.set()
        self._close()

    def _draw_all(self) -> None:
        try:
            while not self._ending.is_set() and self._goes_on():
                self._turn()
            self._finish()
        except BaseException as error:  # raised by whoever waits for the end
            self.error = error
        finally:
            self._close()

    def _turn(self) -> None:
        if self._backoff.left:
            self._ending.wait(min(self._backoff.left, PATIENCE))
            return
        try:
            if not self._paused():
                self._draw()
        except Exception as error:
            if not self._may_hold(error):
                raise
            self._hold_error(error)

    @property
    def not_finite(self) -> int:
        """How many images, or chunks of a video, had NaN or infinite values."""
        raise NotImplementedError

    def _goes_on(self) -> bool:
        """Whether there is more to draw."""
        raise NotImplementedError

    def _draw(self) -> None:
        """Draw once, if there is something to draw now."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Draw what is left when nothing more comes."""

    def _may_hold(self, error: Exception) -> bool:
        return self.hold

    def _paused(self) -> bool:
        """Apply the knobs. Return whether a key has paused the drawing."""
        if self.controls is None:
            return False
        self.controls.tick(time.monotonic())
        if self.controls.keys.paused:
            self._ending.wait(PATIENCE)
        return self.controls.keys.paused

    def _hold_error(self, error: Exception) -> None:
        self.errors += 1
        message = describe(error)
        if message not in self._logged:
            self._logged.add(message)
            logger.warning("drawing failed, the last image stays, and it goes on: %s", message)
        self._backoff.failed()

    def latency(self, share: float) -> float | None:
        """Seconds from capture to showing that this share of the last images did not exceed."""
        kept = list(self.latencies)
        return percentile(kept, share) if kept else None


class Drawing(DrawingThread):
    """Takes images from a feed (None: draws from noise) and puts the results into an outbox, until the source ends."""

    def __init__(
        self, scene: Scene, feed: Feed | None, outbox: BoundedQueue[Drawn], hold: bool, controls: Controls | None = None
    ) -> None:
        super().__init__(outbox.close, hold, controls)
        self.scene, self.feed, self.outbox = scene, feed, outbox
        self.newest: TimedImage | None = None
        self.last: Drawn | None = None
        self._feed_error: Exception | None = None
        self._next: tuple[Scene, float, Flag] | None = None
        self._fade: tuple[np.ndarray, float, float] | None = None

    @property
    def not_finite(self) -> int:
        """Images with NaN or infinite values, of the stream that draws now."""
        return self.scene.stream.not_finite

    def switch(self, scene: Scene, crossfade: float) -> Flag:
        """Draw this scene from the next tick on. Return a flag that is set then."""
        taken = Flag()
        self._next = scene, crossfade, taken
        return taken

    def _goes_on(self) -> bool:
        return self.feed is None or not self.feed.ended

    def _finish(self) -> None:
        if self.scene.takes_images and self.newest is not None:
            self._drain(self.newest)

    def _drain(self, newest: TimedImage) -> None:
        """Finish the images that entered before the source ended. An error is held, `ATTEMPTS` times at most."""
        left, failures = self.scene.stream.calls_behind, 0
        while left > 0 and not self._ending.is_set():
            try:
                self._put(self.scene.tick(newest, filtered=False))
            except Exception as error:
                failures += 1
                if not self.hold or failures == ATTEMPTS:
                    raise
                self._hold_error(error)
                self._ending.wait(self._backoff.left)
                continue
            left, failures = left - 1, 0
            self._backoff.reset()

    def _turn(self) -> None:
        self._take_scene()
        super()._turn()

    def _may_hold(self, error: Exception) -> bool:
        return self.hold and error is not self._feed_error

    def _next_image(self, feed: Feed, timeout: float) -> TimedImage | None:
        """As `Feed.next`; what that raises, the feed itself does not hold, so it ends the drawing."""
        try:
            return feed.next(timeout)
        except Exception as error:
            self._feed_error = error
            raise

    def _draw(self) -> None:
        scene = self.scene
        if not scene.takes_images:
            self.mode_name = "text"
        elif not self._input(scene):
            return
        drawn = scene.tick(self.newest if scene.takes_images else None)
        self._backoff.reset()
        self._put(drawn)

    def _put(self, drawn: Drawn) -> None:
        self.drawn += 1
        self.last = Drawn(self._crossfaded(drawn.pixels), drawn.entered)
        self.outbox.put(self.last)

    def _input(self, scene: Scene) -> bool:
        """Whether there is an image to draw now: a new one, or under "free" the newest again."""
        feed = self.feed
        assert feed is not None, "a scene that takes images has a feed"
        if self.newest is None:
            self.newest = self._next_image(feed, PATIENCE)
            if self.newest is None:
                return False
            feed.pause(True)  # while modes are measured
            try:
                self.mode_name = scene.mode(self.newest).name
            finally:
                feed.pause(False)
            return True
        mode = scene.mode(self.newest)
        self.mode_name = mode.name
        new = self._next_image(feed, PATIENCE if mode.waits else 0)
        self.newest = new or self.newest
        return new is not None or not (mode.waits or feed.ended)

    def _take_scene(self) -> None:
        if self._next is None:
            return
        (self.scene, crossfade, taken), self._next = self._next, None
        if crossfade > 0 and self.last is not None:
            self._fade = self.last.pixels, time.monotonic(), crossfade
        taken.set()

    def _crossfaded(self, pixels: np.ndarray) -> np.ndarray:
        """The image, mixed with the last one of the scene before while it fades."""
        if self._fade is None:
            return pixels
        old, began, seconds = self._fade
        share = (time.monotonic() - began) / seconds
        if share >= 1 or old.shape != pixels.shape:
            self._fade = None
            return pixels
        return (old + share * (pixels.astype(np.float32) - old)).round().astype(np.uint8)
