"""`StreamFlow`'s side of a live performance: the call that begins one, and the switch between ring and loop.

Knows the stream's engine; what a source, a sink and a clock are is `streamflow.live`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamflow.io import Sink, Source
    from streamflow.live.show import Live


class Performing:
    """Mixed into `StreamFlow`."""

    def live(
        self,
        source: str | Source | None,
        sinks: str | Sink | Sequence[str | Sink],
        *,
        target_fps: float = 30.0,
        policy: str = "newest",
        mode: str = "auto",
        on_error: str = "hold",
        controls: Any = None,
    ) -> Live:
        """Restyle a source live; draw from noise without one. Begins at once, in threads of its own, and returns.

            with stream.live("camera:0", ["window", "record:out.mp4"], target_fps=30) as show:
                stream.update_prompt("a fox, 3d render")
                print(show.wait())  # its Statistics, when the window was closed

        On a CPU it draws faster where the stream was prepared in a thread that has ended (`streamflow.scenes.aside`).

        source: an address (`streamflow.io`), an object with `open`, `read` and `close`, or None. Its pictures are cropped to
            the stream's proportions.
        sinks: one or several addresses or objects with `open`, `write` and `close`.
        target_fps: pictures a second that are shown, at even intervals: where nothing new is there, the last one again.
        policy: "newest" draws the newest picture of the source and shows the newest that is drawn; "every" leaves none out,
            and the source waits.
        mode: "fed" (the ring, one tick an input), "free" (the ring, always ticking on the newest input), "sequential" (one
            input to its end); "auto" measures all three on the first picture, for 2 s, and takes the one of the lowest
            latency among those that hold the rate. Measured again when size or number of stages change.
        on_error: "hold" keeps the last good picture when the source, a sink or the stream raises, says so once, and goes on
            after pauses of 0.25 s that double up to 5 s, in which source or sink are opened again; a recording goes on in a
            new file. What that cannot mend ends it: a missing file or package, no sink left that works. "raise" ends at any
            error. `wait()` and `stop()` raise what ended it, and what raised while it was closed.
        controls: what `streamflow.control.open_control` gives: OSC, MIDI, keys.

        Raises:
            RuntimeError: before `prepare` or after `close`. ValueError: an unknown address, policy, mode or on_error, a rate
                that is none, more than one frame a group.
        """
        from streamflow.live.show import Live

        self._running()
        self._check_no_pass("live()")
        return Live(
            *(self, source, sinks),
            target_fps=target_fps,
            policy=policy,
            mode=mode,
            on_error=on_error,
            controls=controls,
        )

    def set_denoising_batch(self, batched: bool) -> None:
        """Draw by the ring (True), or every frame to its end by itself (False), as `use_denoising_batch` of the class.

        Raises:
            TypeError: no bool. RuntimeError: before `prepare`, or frames are in flight.
        """
        if not isinstance(batched, bool):
            raise TypeError(f"batched must be True or False, not {batched!r}")
        self._check_step("set_denoising_batch()")
        with self._ticks, self._callers:
            self._running()
            if self._in_flight():
                raise RuntimeError(f"{self._in_flight()} frames are in flight: flush() or reset() first")
            self._batched = batched
            self._install(self._state.stages)
