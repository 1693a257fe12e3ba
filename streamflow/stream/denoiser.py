"""The frames in flight of one stream: the engine, the queue of finished groups, the frames' numbers, and who may advance
them. Knows groups and threads; no image, no prompt's text."""

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
from streamflow.flow.guidance import Mode
from streamflow.flow.schedule import Stages
from streamflow.flow.solvers import Rule
from streamflow.stream.callbacks import Callbacks
from streamflow.stream.engine import Engine, make_engine
from streamflow.stream.frames import Order
from streamflow.stream.image_checks import RangeChecks
from streamflow.stream.model import Model
from streamflow.stream.request import NotPreparedError, Prepared
from streamflow.stream.ring import Done, Group, Observer, Settings
from streamflow.stream.update_queue import UpdateQueue

logger = logging.getLogger(__name__)


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


class Denoiser:
    """Advances frames and keeps those that are finished until they are handed out.

    state: what is drawn; None before `prepare`. engine: what keeps the frames in flight. ticks: the lock of whoever
    advances or empties the engine. finished: groups that have left, oldest first. next_id: the number of the next frame.
    last_x0: the clean latent `[1, ...]` of the frame that has left last. ranges: checks of images that have entered. queue:
    where updates wait, which is told who draws. before_step, on_empty, on_close: called before every step, when the
    engine is emptied, and on `close`.
    """

    def __init__(self, model: Model, batched: bool) -> None:
        self._model, self.batched = model, batched
        self.ticks = threading.RLock()
        self.queue = UpdateQueue()
        self.before_step: Callbacks | None = None
        self.on_empty, self.on_close = Callbacks(), Callbacks()
        self.ranges = RangeChecks()
        self.observer: Observer | None = None
        self.state: Prepared | None = None
        self.engine: Engine | None = None
        self.finished: deque[Done] = deque()
        self.next_id = 0
        self.last_x0: Tensor | None = None
        self.current_pass: Pass | None = None
        self._stepping: int | None = None  # the thread that is in a step

    # -- what may be called when ----------------------------------------------------------------------------------------

    def prepared(self) -> Prepared:
        """What is drawn. RuntimeError after `close`, NotPreparedError before `prepare`."""
        self._model.check_open()
        if self.state is None:
            raise NotPreparedError("call prepare(prompt) first")
        return self.state

    def running(self) -> Engine:
        """The engine; raises as `prepared`."""
        self.prepared()
        return self.engine

    def check_step(self, call: str) -> None:
        """RuntimeError inside a step of this thread."""
        if self._stepping is not None and self._stepping == _threads.acting_thread():
            raise RuntimeError(
                f"{call} was called inside a step, from on_step's function or a hook of the network: call it once the call "
                f"that draws has returned. Inside, update() may be called, and decode_image"
            )

    def check_free(self, call: str) -> None:
        """Raise unless this call may draw: RuntimeError inside a step of this thread or while `frames` is under way, whose
        frames it would take; as `prepared`; ValueError for an earlier image on a GPU that was out of range."""
        if self._model.closed or self.state is None:
            self.prepared()
        if self._stepping is not None:
            self.check_step(call)
        if self.current_pass is not None:
            raise RuntimeError(
                f"{call} was called while a loop over frames() is under way, whose frames it would take: let the loop end, "
                f"close() its iterator, or call reset()"
            )
        if self.ranges.pending:
            self.ranges.raise_failed()

    def end_pass(self, call: str) -> Pass | None:
        """End the pass that is under way, which is returned, with an error: this call empties the ring."""
        ended, self.current_pass = self.current_pass, None
        if ended is not None:
            ended.ended_by = call
        return ended

    # -- what is in flight ----------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """How rows are guided."""
        return self.prepared().request.mode

    @property
    def stages(self) -> int:
        """How many stages a frame goes through until it leaves, call by call: 1 without a batch."""
        return len(self.engine.settings.stages) if self.batched and self.engine is not None else 1

    @property
    def calls_behind(self) -> int:
        """How many calls of the stream return earlier frames before the one whose input was given last returns: S - 1 in a
        ring of S stages that is full, more after new noise levels or an error of the decoder, 0 without a batch."""
        return self.running().groups_in_flight + len(self.finished)

    def in_flight(self) -> int:
        """How many frames are under way or wait to be handed out, copies not counted."""
        return self.engine.in_flight + sum(len(done.ids) for done in self.finished if not done.copy)

    def next_ids(self, count: int) -> tuple[int, ...]:
        """The numbers of the next frames, which they have once they have entered."""
        return tuple(range(self.next_id, self.next_id + count))

    # -- the engine -----------------------------------------------------------------------------------------------------

    def rule(self, do_add_noise: bool) -> Rule:
        """How rows take their steps."""
        return self._model.adapter.rule(do_add_noise)

    def install(self, stages: Stages) -> None:
        """Make the engine for these stages; what was in flight has to be out before."""
        model, request = self._model, self.state.request
        settings = Settings(
            stages=stages,
            frames=model.frames,
            mode=request.mode,
            rule=self.rule(request.do_add_noise),
            shape=model.shape,
            dtype=model.dtype,
            device=model.device,
            path=model.adapter.path,
        )
        self.engine = make_engine(model.adapter, settings, self.state.weight, self.batched)
        self.engine.observer = self.observer

    def watch(self, observer: Observer | None) -> None:
        """Let this function see every step."""
        self.observer = observer
        if self.engine is not None:
            self.engine.observer = observer

    def set_batched(self, batched: bool) -> None:
        """Draw by the ring (True), or every frame to its end by itself (False), as `use_denoising_batch` of the class.

        Raises:
            TypeError: no bool. RuntimeError: before `prepare`, or frames are in flight.
        """
        check_bool("batched", batched)
        self.check_step("set_denoising_batch()")
        with self.ticks:
            self.running()
            if self.in_flight():
                raise RuntimeError(f"{self.in_flight()} frames are in flight: flush() or reset() first")
            self.batched = batched
            self.install(self.state.stages)

    # -- steps ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside the engine advances: one thread at a time, and no call from within that would advance or empty it."""
        with self.ticks:
            if self._stepping is not None:
                self.check_step("a call that draws")
            self._stepping = threading.get_ident()
            self.queue.drawn_by, self.queue.drawn_at = self._stepping, time.monotonic()
            try:
                if self.before_step is not None:
                    self.before_step()
                yield
            finally:
                self._stepping = None

    def tick(self, group: Group, of: Pass | None = None) -> None:
        """Let a group enter and everything advance by a stage. Whatever leaves is queued. `of`: the pass of `frames` that
        the group belongs to."""
        with self.step():
            if of is not None:
                of.check()
            engine = self.engine
            try:
                done = engine.push(group, self._model.velocity)
            except BaseException:
                if engine.holds(group):  # the step was taken, and what on_step's function raised came after it
                    self._entered(group, engine.leaving)
                raise
            self._entered(group, () if done is None else (done,))

    def _entered(self, group: Group, left: Sequence[Done]) -> None:
        """Number the frames that have entered, and queue the groups that have left."""
        self.next_id = max(self.next_id, 1 + max(group.ids, default=-1))
        for done in left:
            self.leave(done)

    def leave(self, done: Done) -> None:
        """Queue a group that has left the engine."""
        self.finished.append(done)
        self.last_x0 = done.x0[-1:].clone()

    def run_out(self) -> None:
        """Let what is in flight run to its end, and queue it."""
        with self.step():
            for done in self.running().drain(self._model.velocity):
                self.leave(done)

    def drained(self, ticks: Iterator[Done], of: Pass) -> bool:
        """Whether these ticks, of `drain`, let out one more group."""
        with self.step():
            of.check()
            done = next(ticks, None)
            if done is not None:
                self.leave(done)
        return done is not None

    def drain(self) -> Iterator[Done]:
        """The ticks that run out what is in flight, for `drained`."""
        return self.running().drain(self._model.velocity)

    # -- what has left --------------------------------------------------------------------------------------------------

    def oldest(self) -> Done | None:
        """The oldest finished group; it stays in the queue until `hand_out`."""
        with self.ticks:
            return self.finished[0] if self.finished else None

    def hand_out(self, given: Sequence[Done]) -> None:
        """Take these groups, the oldest, out of the queue: their caller has them."""
        with self.ticks:
            while self.finished and any(one is self.finished[0] for one in given):
                self.finished.popleft()

    @computing
    def flush(self) -> list[Tensor]:
        """The latents still in flight, groups `[F, ...]`, oldest first; empties the ring. Copies are left out. A loop over
        `frames` that is under way ends with a RuntimeError."""
        self.running()
        self.check_step("flush()")
        self.ranges.raise_failed()
        with self.ticks:
            of_loop = self.end_pass("flush()")
            if of_loop is not None:
                self.finished.extendleft(reversed(of_loop.order.undecoded))
            self.run_out()
            left = [done.x0[: len(done.ids)] for done in self.finished if not done.copy]
            self.finished.clear()
            if of_loop is not None:
                of_loop.returned = sum(map(len, left))
        return left

    @computing
    def reset(self) -> None:
        """Empty the ring and start frame ids anew, with what `prepare` and later updates set. How many frames in flight
        that dropped is logged; a pending update is kept. A loop over `frames` that is under way ends with a RuntimeError."""
        self.empty("reset()")

    def empty(self, call: str) -> None:
        """Drop what is in flight, for this call, and start frame numbers anew. How many frames that dropped is logged."""
        self._model.check_open()
        self.check_step(call)
        with self.ticks:
            self.end_pass(call)
            if self.engine is not None:
                if lost := self.in_flight():
                    logger.info("%d frames in flight were dropped; flush() before keeps them", lost)
                self.engine.reset()
            self.finished.clear()
            self.ranges.clear()
            self.next_id, self.last_x0 = 0, None
            self.on_empty()

    def close(self) -> None:
        """Drop what is in flight and all buffers. The pipe stays as it is; the stream cannot be used again."""
        self.check_step("close()")
        with self.ticks:
            if self._model.closed:
                return
            self.empty("close()")
            self.engine = self.state = None
            self._model.closed = True
            self.on_close()
