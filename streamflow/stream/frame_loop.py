"""`frames`: an iterable of inputs in, one `Frame` an input out, in order.

Mixed into `StreamFlow`, whose groups it pushes and whose finished ones it decodes; `frames.Order` keeps the order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamflow._threads import acting_thread
from streamflow.image_range import Normalized
from streamflow.stream.frames import Frame, Input, Order, Waiting
from streamflow.stream.grad_mode import computing
from streamflow.stream.ring import Done
from streamflow.stream.updates import Updates


class PassEnded(RuntimeError):
    """A call has emptied the ring under a pass of `frames`."""


@dataclass(eq=False)
class Pass:
    """One pass of `frames` over its inputs, of which `taken` came in and `answered` have their frame. `ended_by`: the call
    that has emptied the ring meanwhile, and `returned` how many of the frames that call gave to its caller."""

    order: Order
    taken: int = 0
    answered: int = 0
    returned: int = 0
    ended_by: str | None = None

    def check(self) -> None:
        """PassEnded where a call has ended this pass and inputs are not answered."""
        if self.ended_by is not None and self.taken > self.answered:
            returned = f" {self.returned} of its frames were returned there, and" if self.returned else ""
            raise PassEnded(
                f"frames() was ended by {self.ended_by}, and{returned} {self.taken - self.answered - self.returned} of its "
                f"frames were dropped: let the loop end before, or close() its iterator. update() changes what is drawn and "
                f"drops nothing"
            )


class Streaming:
    """Mixed into `StreamFlow`."""

    _pass: Pass | None = None
    _stepping: int | None = None  # the thread that is in a step
    _ticks: threading.RLock
    _finished: deque[Done]
    _asked_for: Updates

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Inside the ring advances: one thread at a time, and no call from within that would advance or empty it."""
        with self._ticks:
            self._check_step("a call that draws")
            self._stepping = acting_thread()
            self._asked_for.drawn()
            try:
                self._take_control_levels()
                yield
            finally:
                self._stepping = None

    def _check_step(self, call: str) -> None:
        """RuntimeError inside a step of this thread."""
        if self._stepping == acting_thread():
            raise RuntimeError(
                f"{call} was called inside a step, from on_step's function or a hook of the network: call it once the call "
                f"that draws has returned. Inside, update() may be called, and decode_image"
            )

    def _check_no_pass(self, call: str) -> None:
        """RuntimeError while `frames` is under way, whose frames this call would take."""
        self._check_step(call)
        if self._pass is not None:
            raise RuntimeError(
                f"{call} was called while a loop over frames() is under way, whose frames it would take: let the loop end, "
                f"close() its iterator, or call reset()"
            )

    def _end_pass(self, call: str) -> Pass | None:
        """This call empties the ring: a pass that is under way, which is returned, ends with an error."""
        now, self._pass = self._pass, None
        if now is not None:
            now.ended_by = call
        return now

    def frames(self, iterable: Iterable[Any]) -> Iterator[Frame]:
        """One `Frame` an input, in order, none primed, none lost, none doubled. An input is a picture, None for a frame
        drawn from noise, or an `Input(image, mask=..., control=...)`; `update` and `update_prompt` between inputs act as in
        other calls.

        Until the loop ends, `stream(...)`, `txt2img`, `predict_x0_batch` and another `frames` are refused; `prepare`,
        `reset`, `flush` and `close` end it. Where an error ends it, or it is left, frames that have
        entered stay under way, and `flush` gives their latents; only those of a group that was delivered in part do not.

        Raises:
            RuntimeError: frames are in flight: `flush()` them, or `prepare` anew. Another loop is under way. From the
                iterator: a call has ended the loop, with the number of frames that were dropped.
        """
        self._check_free()
        return self._frames(iterable)

    def _check_free(self) -> None:
        """RuntimeError unless `frames` may begin."""
        self._check_no_pass("frames()")
        if self._finished or not self._running().empty:
            raise RuntimeError(
                f"frames() needs an empty ring; {self._in_flight()} frames are in flight, copies not counted: "
                f"flush() or prepare() first"
            )

    @computing
    def _frames(self, iterable: Iterable[Any]) -> Iterator[Frame]:
        order = Order()
        now, left = Pass(order), False
        self._check_step("frames()")
        with self._ticks:
            self._check_free()
            self._pass = now
        try:
            yield from self._answers(iterable, order, now)
        except PassEnded:
            raise
        except GeneratorExit:
            left = True
            raise
        except Exception:
            now.check()  # what came of it is no news
            self.similar_filter.forget()  # an input that it has seen may not have entered
            raise
        finally:
            # A loop that is left may be collected in any thread, also in one for which the owner of the lock waits.
            held = self._ticks.acquire(blocking=not left)
            try:
                if self._pass is now:
                    self._pass = None
                    self._finished.extendleft(reversed(order.undelivered))
            finally:
                if held:
                    self._ticks.release()

    def _answers(self, iterable: Iterable[Any], order: Order, now: Pass) -> Iterator[Frame]:
        buffer: list[Waiting] = []
        self.similar_filter.reset()
        self.prev_image_result = None  # no later call may show it for one of these
        drawn = self._next_id
        for item in iterable:
            now.taken += 1
            now.check()
            self._ranges.raise_failed()
            while True:
                change = self._change
                if buffer and change is not None and not change.spares_waiting(self._prepared()):
                    self._push_buffer(buffer, now)  # they came in before it
                if self._take(change):
                    break
            given = item if isinstance(item, Input) else Input(item)
            shown = self._shown(given.control, 1)
            if given.image is None:
                picture, regions = self.similar_filter.forget(), self._text_regions(given.mask)
            else:
                picture = self._one_picture(given.image)
                regions, seen = self._masked(picture, given.mask)
                seen = self._seen_with(seen, shown)
            with self._ticks:
                now.check()
                (frame_id,) = self._next_ids(1)
                self._next_id += 1
            skip = picture is not None and self.similar_image_filter and self.similar_filter(seen) is None
            drawn = drawn if skip else frame_id
            order.expect(frame_id, drawn)
            if not skip:
                if buffer and (buffer[0].picture is None) != (picture is None):
                    self._push_buffer(buffer, now)
                region = regions and regions[len(buffer)]
                prompt = self._with_control(self._prepared().prompt, shown and shown.images[0])
                if picture is not None and self.frame_bff_size > 1:
                    picture = picture.clone()  # it waits, and its memory is the caller's
                buffer.append(Waiting(frame_id, picture, prompt, region))
                if len(buffer) == self.frame_bff_size:
                    self._push_buffer(buffer, now)
            yield from self._deliver(order, now)
        now.check()
        if buffer:
            self._push_buffer(buffer, now)
        yield from self._deliver(order, now)
        ticks = self._running().drain(self.velocity)
        while self._drained(ticks, now):
            yield from self._deliver(order, now)
        yield from self._deliver(order, now, last=True)
        self._ranges.raise_failed(wait=True)

    def _drained(self, ticks: Iterator[Done], now: Pass) -> bool:
        """Whether these ticks let out one more group."""
        with self._step():
            now.check()
            done = next(ticks, None)
            if done is not None:
                self._left(done)
        return done is not None

    def _push_buffer(self, buffer: list[Waiting], now: Pass) -> None:
        """Push the frames that wait for each other, the last one repeated to F rows, and empty the buffer."""
        padded = buffer + [buffer[-1]] * (self.frame_bff_size - len(buffer))
        rows, regions = tuple(one.id for one in padded), [one.region for one in padded]
        if padded[0].picture is None:
            group = self._text_group(rows, regions=regions)
        else:
            group = self._image_group(torch.cat([one.picture for one in padded]), rows, regions)
        self._push(replace(group, ids=rows[: len(buffer)], prompts=tuple(one.prompt for one in padded)), now)
        buffer.clear()

    def _deliver(self, order: Order, now: Pass, last: bool = False) -> Iterator[Frame]:
        """Decode what is finished and give what is decoded, leaving as many decodes under way as there are lanes for."""
        while self._decoding_next(order, now):
            pass
        for frame in order.ready(0 if last else self.codec.lanes, copies=self.similar_image_filter):
            now.answered += 1
            if not frame.skipped:
                self._count_finite(frame.image[None])
            yield frame

    def _decoding_next(self, order: Order, now: Pass) -> bool:
        """Whether a finished group was there, whose decoding is under way now."""
        with self._ticks:
            now.check()
            if not self._finished:
                return False
            order.decoding(self._finished[0], self._decode_later(self._finished[0]))
            self._finished.popleft()
        return True

    def _one_picture(self, x: Any) -> Normalized:
        picture = self._read_images(x)
        if len(picture) != 1:
            raise ValueError(f"frames() takes one picture at a time, not {len(picture)}")
        return picture
