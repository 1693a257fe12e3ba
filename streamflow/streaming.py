"""`frames`: an iterable of inputs in, one `Frame` an input out, in order.

Mixed into `StreamFlow`, whose groups it pushes and whose finished ones it decodes; `streamflow.frames` keeps the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from streamflow.frames import Frame, Input, Order, Waiting
from streamflow.grad_mode import computing
from streamflow.image_range import Normalized


class Streaming:
    """Mixed into `StreamFlow`."""

    def frames(self, iterable: Iterable[Any]) -> Iterator[Frame]:
        """One `Frame` an input, in order, none primed, none lost, none doubled. An input is a picture, None for a frame
        drawn from noise, or an `Input(image, mask=..., control=...)`; `update` and `update_prompt` between inputs act as in
        other calls.

        Raises:
            RuntimeError: frames are in flight: `flush()` them, or `prepare` anew.
        """
        if self._finished or not self._running().empty:
            raise RuntimeError(
                f"frames() needs an empty ring; {self._in_flight()} frames are in flight, copies not counted: "
                f"flush() or prepare() first"
            )
        return self._frames(iterable)

    @computing
    def _frames(self, iterable: Iterable[Any]) -> Iterator[Frame]:
        order = Order()
        buffer: list[Waiting] = []
        self.similar_filter.reset()
        self.prev_image_result = None  # no later call may show it for one of these
        drawn = self._next_id
        for item in iterable:
            self._ranges.raise_failed()
            change = self._change
            if buffer and change is not None and not change.spares_waiting(self._state):
                self._push_buffer(buffer)  # they came in before it
            self._take_change()
            given = item if isinstance(item, Input) else Input(item)
            shown = self._shown(given.control, 1)
            if given.image is None:
                picture, regions = self.similar_filter.forget(), self._text_regions(given.mask)
            else:
                picture = self._one_picture(given.image)
                regions, seen = self._masked(picture, given.mask)
                seen = self._seen_with(seen, shown)
            (frame_id,) = self._next_ids(1)
            self._next_id += 1
            skip = picture is not None and self.similar_image_filter and self.similar_filter(seen) is None
            drawn = drawn if skip else frame_id
            order.expect(frame_id, drawn)
            if not skip:
                if buffer and (buffer[0].picture is None) != (picture is None):
                    self._push_buffer(buffer)
                region = regions and regions[len(buffer)]
                prompt = self._with_control(self._state.prompt, shown and shown.images[0])
                if picture is not None and self.frame_bff_size > 1:
                    picture = picture.clone()  # it waits, and its memory is the caller's
                buffer.append(Waiting(frame_id, picture, prompt, region))
                if len(buffer) == self.frame_bff_size:
                    self._push_buffer(buffer)
            yield from self._deliver(order)
        if buffer:
            self._push_buffer(buffer)
        yield from self._deliver(order)
        for done in self._by_tick(self._engine.drain(self.velocity)):
            self._left(done)
            yield from self._deliver(order)
        yield from self._deliver(order, last=True)
        self._ranges.raise_failed(wait=True)

    def _push_buffer(self, buffer: list[Waiting]) -> None:
        """Push the frames that wait for each other, the last one repeated to F rows, and empty the buffer."""
        padded = buffer + [buffer[-1]] * (self.frame_bff_size - len(buffer))
        rows, regions = tuple(one.id for one in padded), [one.region for one in padded]
        if padded[0].picture is None:
            group = self._text_group(rows, regions=regions)
        else:
            group = self._image_group(torch.cat([one.picture for one in padded]), rows, regions)
        self._push(replace(group, ids=rows[: len(buffer)], prompts=tuple(one.prompt for one in padded)))
        buffer.clear()

    def _deliver(self, order: Order, last: bool = False) -> Iterator[Frame]:
        """Decode what is finished and give what is decoded, leaving as many decodes under way as there are lanes for."""
        while self._finished:
            done = self._finished.popleft()
            order.decoding(done.ids, self._decode_later(done))
        yield from order.ready(0 if last else self.codec.lanes, copies=self.similar_image_filter)

    def _one_picture(self, x: Any) -> Normalized:
        picture = self._read_images(x)
        if len(picture) != 1:
            raise ValueError(f"frames() takes one picture at a time, not {len(picture)}")
        return picture
