"""The frames in flight of one stream: the engine, the queue of finished groups, the numbers of frames, and the lock of the
thread that advances them. It handles groups, not images or prompt texts."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from streamflow import _threads
from streamflow._grad_mode import computing
from streamflow._validation import check_bool
from streamflow.stream.callbacks import Callbacks
from streamflow.stream.engine import make_engine
from streamflow.stream.frames import Order
from streamflow.stream.model import Model
from streamflow.stream.request import Change, NotPreparedError, Prepared
from streamflow.stream.ring import Done, Engine, Group, Observer, Settings
from streamflow.stream.update_queue import UpdateQueue

logger = logging.getLogger(__name__)


class PassEnded(RuntimeError):
    """Raised by the iterator of `frames` after another call has emptied the ring."""


@dataclass(eq=False)
class Pass:
    """One pass of `frames` over its inputs. taken: the number of inputs read. answered: the number of frames yielded.
    ended_by: the call that has emptied the ring during the pass. returned: the number of frames that this call returned."""

    order: Order
    taken: int = 0
    answered: int = 0
    returned: int = 0
    ended_by: str | None = None

    def check(self) -> None:
        """Raise PassEnded if a call has ended this pass and inputs have no frame yet."""
        if self.ended_by is not None and self.taken > self.answered:
            returned = f" {self.returned} of its frames were returned there, and" if self.returned else ""
            raise PassEnded(
                f"frames() was ended by {self.ended_by}, and{returned} {self.taken - self.answered - self.returned} of its "
                f"frames were dropped: let the loop end before, or close() its iterator. update() changes what is drawn and "
                f"drops nothing"
            )


class Denoiser:
    """Advances frames, and keeps the finished ones until they are handed out.

    state: what is drawn; None before `prepare`. engine: holds the frames in flight. ticks: the lock of the thread that
    advances or empties the engine. finished: groups that have left the engine, oldest first. next_id: the number of the next
    frame. last_x0: the clean latent `[1, ...]` of the last frame that has left. queue: of updates, in which the denoiser
    records the thread that draws. before_flush, before_step, on_empty, on_close: functions that are called
    before `flush`, before every step, when the engine is emptied, and on `close`.
    """

    def __init__(self, model: Model, batched: bool) -> None:
        self._model, self.batched = model, batched
        self.ticks = threading.RLock()
        self.queue = UpdateQueue()
        self.before_step, self.before_flush = Callbacks(), Callbacks()
        self.on_empty, self.on_close = Callbacks(), Callbacks()
        self.observer: Observer | None = None
        self.state: Prepared | None = None
        self.engine: Engine | None = None
        self.finished: deque[Done] = deque()
        self.next_id = 0
        self.last_x0: Tensor | None = None
        self.current_pass: Pass | None = None
        self._stepping: int | None = None  # the thread that is in a step
        model.before_change.add(self._check_change)
        model.after_change.add(self._follow_devices)

    # -- what may be called when ----------------------------------------------------------------------------------------

    def prepared(self) -> Prepared:
        """`state`. Raises RuntimeError after `close`, NotPreparedError before `prepare`."""
        if self.state is None:
            raise self._not_ready()
        return self.state

    def running(self) -> Engine:
        """`engine`. Raises as `prepared`."""
        if self.engine is None:
            raise self._not_ready()
        return self.engine

    def one_ring(self, name: str) -> Engine:
        """`engine`, to read what belongs to one ring. RuntimeError where frames are drawn on several devices in turn."""
        engine = self.running()
        if engine.devices:
            raise RuntimeError(
                f"{name} belongs to one ring, and this stream draws on {len(engine.devices)} devices in turn: "
                f"stream.velocity = stream.velocity.source draws on one"
            )
        return engine

    def drawing(self) -> tuple[Prepared, Engine]:
        """(`state`, `engine`). Raises as `prepared`."""
        if self.state is None or self.engine is None:
            raise self._not_ready()
        return self.state, self.engine

    def _not_ready(self) -> RuntimeError:
        self._model.check_open()
        return NotPreparedError("call prepare(prompt) first")

    def check_step(self, call: str) -> None:
        """Raise RuntimeError inside a step of this thread."""
        if self._stepping is not None and self._stepping in (threading.get_ident(), _threads.acting_thread()):
            raise RuntimeError(
                f"{call} was called inside a step, from on_step's function or a hook of the network: call it once the call "
                f"that draws has returned. Inside, update() may be called, and decode_image"
            )

    def check_free(self, call: str) -> None:
        """Raise unless this call may draw: RuntimeError inside a step of this thread, or during a loop over `frames`, which
        would lose frames to the call; as `prepared`."""
        if self.state is None:
            raise self._not_ready()
        if self._stepping is not None:
            self.check_step(call)
        if self.current_pass is not None:
            raise RuntimeError(
                f"{call} was called while a loop over frames() is running, and would take its frames: let the loop end, "
                f"close() its iterator, or call reset()"
            )

    def end_pass(self, call: str) -> Pass | None:
        """End the present pass with an error, because this call empties the ring. Returns the pass."""
        ended, self.current_pass = self.current_pass, None
        if ended is not None:
            ended.ended_by = call
        return ended

    # -- what is in flight ----------------------------------------------------------------------------------------------

    @property
    def stages(self) -> int:
        """The number of calls from a frame's entering to its leaving: its stages, or 1 without the denoising batch; times
        the number of devices that draw frames in turn."""
        return 1 if self.engine is None else self.engine.depth

    @property
    def calls_behind(self) -> int:
        """The number of calls that return earlier frames before the last input's frame returns: S - 1 in a full ring of S
        stages, more after new noise levels or an error of the decoder, 0 without the denoising batch."""
        return self.running().groups_in_flight + len(self.finished)

    def in_flight(self) -> int:
        """The number of frames in flight or waiting to be handed out, without copies."""
        return self.running().in_flight + sum(len(done.ids) for done in self.finished if not done.copy)

    def next_ids(self, count: int) -> tuple[int, ...]:
        """The numbers of the next frames. They are taken once the frames have entered."""
        return tuple(range(self.next_id, self.next_id + count))

    def take_id(self) -> int:
        """Take the number of the next frame, before it enters."""
        self.next_id += 1
        return self.next_id - 1

    # -- the engine -----------------------------------------------------------------------------------------------------

    def begin(self, state: Prepared) -> None:
        """Draw this, by a new engine. The old engine must be empty."""
        self.state, model, request = state, self._model, state.request
        settings = Settings(
            stages=state.stages,
            frames=model.frames,
            mode=request.mode,
            rule=model.adapter.rule(request.do_add_noise),
            shape=model.shape,
            dtype=model.dtype,
            device=model.device,
            path=model.adapter.path,
        )
        self.engine = make_engine(model.adapter, settings, state.weight, self.batched, model.interleaved)
        self.engine.observer = self.observer

    def _check_change(self) -> None:
        """RuntimeError before a part is replaced while frames are in flight on several devices."""
        if self._model.interleaved and self.engine is not None and self.engine.in_flight:
            raise RuntimeError(
                f"{self.engine.in_flight} frames are in flight on several devices (interleave): flush() or reset() before "
                f"the network or the VAE is replaced"
            )

    def _follow_devices(self) -> None:
        """Draw on the devices of the present network."""
        if self.state is not None and self.engine is not None and self.engine.devices != self._model.interleaved:
            self.begin(self.state)

    def needs_engine(self, change: Change) -> bool:
        """Whether an update needs another engine: for other guidance, other steps, or levels for later frames alone."""
        settings, request = self.running().settings, change.target.request
        fits = settings.mode is request.mode and settings.rule == self._model.adapter.rule(request.do_add_noise)
        return not fits or (change.target.stages is not self.prepared().stages and not change.levels_now)

    def take(self, change: Change, before: Prepared, new_engine: bool) -> None:
        """Draw what an update says in the place of `before`, by a new engine or by the one that runs."""
        target = change.target
        if new_engine:
            self.begin(target)
        engine = self.running()
        if target.stages is not before.stages and not new_engine:
            engine.set_levels(target.stages)
        if change.entries:
            engine.set_prompt(target.prompt, change.entries)
        engine.weight = target.weight

    def watch(self, observer: Observer | None) -> None:
        """Call this function after every step; None: no function."""
        self.observer = observer
        if self.engine is not None:
            self.engine.observer = observer

    def set_batched(self, batched: bool) -> None:
        """Draw by the ring (True), or every frame to its end by itself (False), as `use_denoising_batch` of the class.

        Raises:
            TypeError: no bool. RuntimeError: frames are in flight, or after `close`.
        """
        check_bool("batched", batched)
        self.check_step("set_denoising_batch()")
        self._model.check_open()
        with self.ticks:
            if self.state is not None and self.in_flight():
                raise RuntimeError(f"{self.in_flight()} frames are in flight: flush() or reset() first")
            self.batched = batched
            if self.state is not None:
                self.begin(self.state)

    # -- steps ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context in which the engine advances, for one thread at a time. Calls inside it that advance it too raise."""
        with self.ticks:
            if self._stepping is not None:
                self.check_step("a call that draws")
            self._stepping = threading.get_ident()
            self.queue.drawn_by, self.queue.drawn_at = self._stepping, time.monotonic()
            try:
                if self.before_step.methods:
                    self.before_step()
                yield
            finally:
                self._stepping = None

    def tick(self, group: Group, of: Pass | None = None) -> None:
        """Let a group enter and all frames advance by one stage. The group that leaves is queued. of: the pass of `frames`
        that the group belongs to."""
        with self.step():
            if of is not None:
                of.check()
            engine = self.engine
            if engine is None:
                raise self._not_ready()
            left: Sequence[Done] | None = None  # None: the group has not entered
            try:
                done = engine.push(group, self._model.velocity)
                left = () if done is None else (done,)
            except BaseException:
                if engine.holds(group):  # the step was taken, and what on_step's function raised came after it
                    left = engine.leaving
                raise
            finally:
                if left is not None:
                    self.next_id = max(self.next_id, 1 + max(group.ids, default=-1))
                    for one in left:
                        self.leave(one)

    def leave(self, done: Done) -> None:
        """Queue a group that has left the engine."""
        self.finished.append(done)
        self.last_x0 = done.x0[-1:].clone()

    def run_out(self) -> None:
        """Run the frames in flight to their end, and queue them."""
        with self.step():
            for done in self.running().drain(self._model.velocity):
                self.leave(done)

    def drained(self, ticks: Iterator[Done], of: Pass) -> bool:
        """Run the next of these ticks, of `drain`. Returns whether a group has left."""
        with self.step():
            of.check()
            done = next(ticks, None)
            if done is not None:
                self.leave(done)
        return done is not None

    def drain(self) -> Iterator[Done]:
        """The ticks that run the frames in flight to their end, for `drained`."""
        return self.running().drain(self._model.velocity)

    # -- what has left --------------------------------------------------------------------------------------------------

    def oldest(self) -> Done | None:
        """The oldest finished group; it stays in the queue until `hand_out`."""
        with self.ticks:
            return self.finished[0] if self.finished else None

    def put_back(self, groups: Sequence[Done]) -> None:
        """Queue these groups again, before the others."""
        self.finished.extendleft(reversed(groups))

    def take_oldest(self) -> Done | None:
        """Remove the oldest finished group from the queue, and return it."""
        with self.ticks:
            return self.finished.popleft() if self.finished else None

    def hand_out(self, given: Sequence[Done]) -> None:
        """Remove these groups, the oldest, from the queue. Their caller has them."""
        with self.ticks:
            while self.finished and any(one is self.finished[0] for one in given):
                self.finished.popleft()

    @computing
    def flush(self) -> list[Tensor]:
        """The latents still in flight, groups `[F, ...]`, oldest first; empties the ring. Copies are left out. A loop over
        `frames` that is running ends with a RuntimeError."""
        self.running()
        self.check_step("flush()")
        self.before_flush()
        with self.ticks:
            of_loop = self.end_pass("flush()")
            if of_loop is not None:
                self.put_back(of_loop.order.undecoded)
            self.run_out()
            left = [done.x0[: len(done.ids)] for done in self.finished if not done.copy]
            self.finished.clear()
            if of_loop is not None:
                of_loop.returned = sum(map(len, left))
        return left

    @computing
    def reset(self) -> None:
        """Empty the ring and start frame ids anew, with what `prepare` and later updates set. How many frames in flight
        that dropped is logged; a pending update is kept. A loop over `frames` that is running ends with a RuntimeError."""
        self.empty("reset()")

    def empty(self, call: str) -> None:
        """Drop the frames in flight and restart frame numbers at 0. call: the call that does it, for errors."""
        self._model.check_open()
        self.check_step(call)
        with self.ticks:
            self.end_pass(call)
            if self.engine is not None:
                if lost := self.in_flight():
                    logger.info("%d frames in flight were dropped; flush() before keeps them", lost)
                self.engine.reset()
            self.finished.clear()
            self.next_id, self.last_x0 = 0, None
            self.on_empty()

    def close(self) -> None:
        """Drop what is in flight and all buffers. The pipe stays as it is; the stream cannot be used again."""
        self.check_step("close()")
        with self.ticks:
            if self._model.closed:
                return
            try:
                self.empty("close()")
                self.on_close()
            finally:  # a stream is closed even where putting the pipe back has failed
                self._model.closed = True
                self.engine = self.state = None
