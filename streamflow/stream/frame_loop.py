"""`frames`: an iterable of inputs in, one `Frame` an input out, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from streamflow._grad_mode import computing
from streamflow.image_utils import Images
from streamflow.stream.denoiser import Denoiser, Pass, PassEnded
from streamflow.stream.frames import Frame, Input, Order, Waiting
from streamflow.stream.inputs import Inputs, Read
from streamflow.stream.model import Model
from streamflow.stream.outputs import Outputs
from streamflow.stream.updates import Updates

InputsOfFrames = Iterable[Images | Input | None]


class FrameLoop:
    """Passes of `frames`, one at a time."""

    def __init__(self, model: Model, denoiser: Denoiser, updates: Updates, inputs: Inputs, outputs: Outputs) -> None:
        self._model, self._denoiser, self._updates = model, denoiser, updates
        self._inputs, self._outputs = inputs, outputs

    def frames(self, iterable: InputsOfFrames) -> Iterator[Frame]:
        """One `Frame` an input, in order, none primed, none lost, none doubled. An input is an image, None for a frame
        drawn from noise, or an `Input(image, mask=..., control=..., reference=..., image_prompt=...)`; `update` and
        `update_prompt` between inputs act as in other calls.

        Until the loop ends, `stream(...)`, `txt2img`, `predict_x0_batch` and another `frames` are refused; `prepare`,
        `reset`, `flush` and `close` end it. Where an error ends it, or it is left, frames that have entered stay in flight,
        and `flush` gives their latents; only those of a group that was delivered in part do not.

        Raises:
            RuntimeError: frames are in flight: `flush()` them, or `prepare` anew. Another loop is running. From the
                iterator: a call has ended the loop, with the number of frames that were dropped.
        """
        self._check_empty()
        return self._frames(iterable)

    def _check_empty(self) -> None:
        """RuntimeError unless `frames` may begin."""
        denoiser = self._denoiser
        denoiser.check_free("frames()")
        self._inputs.reader.ranges.raise_failed()
        if denoiser.finished or not denoiser.running().empty:
            raise RuntimeError(
                f"frames() needs an empty ring; {denoiser.in_flight()} frames are in flight, copies not counted: "
                f"flush() or prepare() first"
            )

    @computing
    def _frames(self, iterable: InputsOfFrames) -> Iterator[Frame]:
        denoiser, order = self._denoiser, Order()
        now, left = Pass(order), False
        denoiser.check_step("frames()")
        with denoiser.ticks:
            self._check_empty()
            denoiser.current_pass = now
        try:
            yield from self._answers(iterable, order, now)
        except PassEnded:
            raise
        except GeneratorExit:
            left = True
            raise
        except Exception:
            now.check()  # an error that follows from the end of the pass is not reported
            self._outputs.similar_filter.forget()  # an input that it has seen may not have entered
            raise
        finally:
            # A loop that is left may be collected in any thread, also in one for which the owner of the lock waits.
            held = denoiser.ticks.acquire(blocking=not left)
            try:
                if denoiser.current_pass is now:
                    denoiser.current_pass = None
                    denoiser.put_back(order.undelivered)
            finally:
                if held:
                    denoiser.ticks.release()

    def _answers(self, iterable: InputsOfFrames, order: Order, now: Pass) -> Iterator[Frame]:
        denoiser, outputs, frames = self._denoiser, self._outputs, self._model.frames
        buffer: list[Waiting] = []
        outputs.similar_filter.reset()
        outputs.prev_image_result = None  # no later call may show it for one of these
        drawn = denoiser.next_id
        for item in iterable:
            now.taken += 1
            now.check()
            self._take_update(buffer, now)
            given = item if isinstance(item, Input) else Input(item)
            starts = given.image is not None and not self._model.image_is_reference  # from its image
            joins = bool(buffer) and (buffer[0].image is not None) == starts  # the group that waits
            row = len(buffer) if joins else 0
            if given.image is None:
                read = Read(None, None, self._inputs.conditions(given.conditions, None, range(row, row + 1)))
            else:
                read = self._inputs.read(given.image, given.conditions, row)
            with denoiser.ticks:
                now.check()
                frame_id = denoiser.take_id()
            skip = self._skips(read)
            drawn = drawn if skip else frame_id
            order.expect(frame_id, drawn)
            if not skip:
                if buffer and not joins:
                    self._push(buffer, now)
                image = read.images
                if image is not None and frames > 1:
                    image = image.clone()  # it waits, and its memory is the caller's
                entries = {one.name: entries[0] for one, entries in read.conditions}
                buffer.append(Waiting(frame_id, image, denoiser.prepared().prompt, entries))
                if len(buffer) == frames:
                    self._push(buffer, now)
            yield from self._deliver(order, now)
        now.check()
        if buffer:
            self._push(buffer, now)
        yield from self._deliver(order, now)
        ticks = denoiser.drain()
        while denoiser.drained(ticks, now):
            yield from self._deliver(order, now)
        yield from self._deliver(order, now, last=True)
        self._inputs.reader.ranges.raise_failed(wait=True)

    def _take_update(self, buffer: list[Waiting], now: Pass) -> None:
        """Let a pending update act. Frames that wait for their group and that it would change enter before it."""
        while True:
            change = self._updates.pending
            if buffer and change is not None and not change.spares_waiting(self._denoiser.prepared()):
                self._push(buffer, now)
            if self._updates.take_one(change):
                return

    def _skips(self, read: Read) -> bool:
        """Whether the similarity filter skips a frame. A frame without an image is never skipped, nor the one after it."""
        if read.seen is None:
            self._outputs.similar_filter.forget()
            return False
        return self._outputs.similar_image_filter and self._outputs.skips(self._inputs.compared(read.seen, read.conditions))

    def _push(self, buffer: list[Waiting], now: Pass) -> None:
        """Let the frames that wait for each other enter, the last one repeated to F rows, and empty the buffer."""
        padded = buffer + [buffer[-1]] * (self._model.frames - len(buffer))
        names = {name for one in padded for name in one.conditions}
        conditions = [
            (one, [frame.conditions.get(one.name) for frame in padded])
            for one in self._inputs.conditioners
            if one.active or one.name in names
        ]
        images = [one.image for one in padded if one.image is not None]  # of all frames, or of none
        rows, prompts = tuple(one.id for one in padded), tuple(one.prompt for one in padded)
        group = self._inputs.group(rows, conditions, torch.cat(images) if images else None, prompts=prompts)
        self._denoiser.tick(replace(group, ids=rows[: len(buffer)]), now)
        buffer.clear()

    def _deliver(self, order: Order, now: Pass, last: bool = False) -> Iterator[Frame]:
        """Decode what is finished and give what is decoded, leaving as many decodes in flight as there are lanes for."""
        while self._decode_next(order, now):
            pass
        lanes = 0 if last else self._model.codec.lanes
        for frame in order.ready(lanes, copies=self._outputs.similar_image_filter):
            now.answered += 1
            if not frame.skipped:
                self._outputs.count_finite(frame.image[None])
            yield frame

    def _decode_next(self, order: Order, now: Pass) -> bool:
        """Start decoding the oldest finished group; False where there is none."""
        finished = self._denoiser.finished
        with self._denoiser.ticks:
            now.check()
            if not finished:
                return False
            order.decoding(finished[0], self._outputs.decode_later(finished[0]))
            finished.popleft()
        return True
