"""`VideoLive`: a video stream shown in sinks. Its frames come a chunk at once, and leave at even intervals.

Knows video streams by their calls; no pipeline. Drawing, clock and sinks have threads of their own, as in `show`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streamflow._queue import BoundedQueue
from streamflow.io import Sink
from streamflow.live.draw import PATIENCE, DrawingThread, Drawn
from streamflow.live.latency_modes import Clock
from streamflow.live.show import Show, all_sinks, check_show

if TYPE_CHECKING:
    from streamflow.live.remote import Controls
    from streamflow.video import VideoStream

SLOWER = 1.02  # times the time that a frame takes to draw: chunks that take this much longer than the last are not late


class ChunkQueue:
    """Frames between drawing and clock: those of the chunk that plays, and one more chunk. So a chunk is drawn while the one
    before plays, and a change of the prompt is never more than two chunks away."""

    def __init__(self) -> None:
        self._waiting: BoundedQueue[list[Drawn]] = BoundedQueue(1, block=True)
        self._playing: deque[Drawn] = deque()
        self.dropped = 0
        self.wait_for_room, self.put, self.close = self._waiting.wait_for_room, self._waiting.put, self._waiting.close

    def take(self) -> Drawn | None:
        """The next frame, None where there is none. In the clock's thread only, as `clear`."""
        if not self._playing:
            self._playing.extend(self._waiting.take() or ())
        return self._playing.popleft() if self._playing else None

    def clear(self) -> None:
        """Drop what is queued, and count it."""
        while self.take() is not None:
            self.dropped += 1

    def __len__(self) -> int:
        return len(self._playing) + len(self._waiting)


class VideoDrawing(DrawingThread):
    """Draws chunk after chunk into a queue, the next one as soon as the last one plays.

    set_pace: called with the seconds that each frame of the last chunk took, before the chunk is queued.
    """

    def __init__(
        self,
        stream: VideoStream,
        queue: ChunkQueue,
        hold: bool,
        set_pace: Callable[[float], object],
        controls: Controls | None,
    ) -> None:
        super().__init__(queue.close, hold, controls)
        self.mode_name = "video"
        self._stream, self._queue, self._set_pace = stream, queue, set_pace
        self._left = stream.flush()  # frames that are drawn and not queued
        self._ended = False
        self._not_finite = 0

    @property
    def not_finite(self) -> int:
        """How many chunks had NaN or infinite values."""
        return self._not_finite

    def _goes_on(self) -> bool:
        return not self._ended

    def _draw(self) -> None:
        if not self._queue.wait_for_room(PATIENCE):
            return
        began = time.monotonic()
        if not self._left:
            chunk = next(self._stream.chunks(1), None)
            if chunk is None:
                self._ended = True
                return
            self._left = list(chunk.frames())
        drawn = [Drawn(frame.timed().pixels, began) for frame in self._left]
        self._left = []
        self._backoff.reset()
        self.drawn += len(drawn)
        self._set_pace((time.monotonic() - began) / len(drawn))
        if not self._queue.put(drawn):
            self._queue.dropped += len(drawn)

    def _hold_error(self, error: Exception) -> None:
        self._not_finite += isinstance(error, FloatingPointError)
        super()._hold_error(error)


class VideoLive(Show):
    """Shows a prepared video stream from when it is made until the video ends, the last sink is gone, or `stop`.
    `VideoStream.live` makes one. In a `with`, it ends with the block.

    The first frame is shown once the first chunk is decoded. While a chunk plays, the next one is drawn; then drawing waits
    until that one plays. So `stream.update_prompt`, which may be called at any time, is seen after two chunks at most.

    Frames leave at `target_fps` or, where a chunk takes longer to draw than to play, at the rate at which the last chunk was
    drawn, less 2 %. Where the next chunk is later still, the last frame is shown again (`repeated`). No frame is left out.

    sinks: one or several addresses or objects with `open`, `write` and `close`.
    target_fps: frames a second; None: the stream's `fps`.
    on_error: "hold" keeps the last frame when a chunk or a sink raises, logs it once, and tries again after pauses of 0.25 s
        that double up to 5 s. A chunk that has failed is drawn again, so that nothing is lost. What that cannot mend ends
        the show. "raise" ends it at any error. `wait()` and `stop()` raise what ended it, and what raised while it closed.
    controls: the result of `streamflow.live.remote.open_control`: OSC, MIDI, keys. Its update is the stream's.

    In `statistics`, drawn counts frames, and not_finite chunks with NaN. The latency of a frame is from the moment at which
    its chunk begins to be drawn until it is shown. dropped_out counts frames that were drawn and not shown when it ended.

    Raises:
        ValueError: an unknown address or on_error, a rate that is none, a stream with output_type "latent". RuntimeError:
            before the stream's `prepare`.
    """

    def __init__(
        self,
        stream: VideoStream,
        sinks: str | Sink | Sequence[str | Sink],
        *,
        target_fps: float | None = None,
        on_error: str = "hold",
        controls: Controls | None = None,
        clock: Clock | None = None,
    ) -> None:
        rate = stream.fps if target_fps is None else target_fps
        check_show(rate, on_error=on_error)
        if stream.output_type == "latent":
            raise ValueError('a show needs images, and this stream has output_type="latent"')
        outs, hold, self.stream = all_sinks(sinks), on_error == "hold", stream
        self._shortest, self._paused_by_call = 1 / rate, False
        self._keys = None if controls is None else controls.keys
        self._queue = ChunkQueue()
        drawing = VideoDrawing(stream, self._queue, hold, self._set_pace, controls)
        super().__init__(drawing, self._queue, None, outs, hold, rate, controls, clock)

    @property
    def rate(self) -> float:
        """Frames a second that are shown now."""
        return 1 / self._pacer.period

    def pause(self, paused: bool) -> None:
        """Show the same frame until it is called with False. Up to one more chunk is drawn meanwhile."""
        self._paused_by_call = paused

    def _set_pace(self, seconds: float) -> None:
        self._pacer.period = max(self._shortest, SLOWER * seconds)

    def _take(self) -> Drawn | None:
        paused = self._paused_by_call or (self._keys is not None and self._keys.paused)
        return None if paused else self._queue.take()

    def _close(self) -> None:
        super()._close()
        self._queue.clear()
