"""Those who compute for the streaming rank: itself (`Own`), and one `Peer` for every other rank. Both take a call and give
a future. Knows calls, threads and links; nothing of who gets which call.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from streamflow._threads import Thread
from streamflow.acceleration.watch import version_of
from streamflow.parallel.distributed.wire import Argument, Link, Message, Op, RankLost, Unsendable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, or of some rows of one.

    part: the module's number. positional, named: its arguments, whole. rows: which rows of them are meant; None: all.
    shared: the names of arguments without a batch dimension. ready: on CUDA, when the arguments are there.
    """

    part: int
    positional: tuple[Tensor, ...]
    named: Mapping[str, Tensor] = field(default_factory=dict)
    rows: slice | None = None
    shared: frozenset[str] = frozenset()
    ready: torch.cuda.Event | None = None

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of this argument that are meant."""
        return tensor if self.rows is None or name in self.shared else tensor[self.rows]

    def on(self, module: nn.Module) -> Tensor:
        """What the module gives."""
        named = {name: self.cut(name, tensor) for name, tensor in self.named.items()}
        return module(*(self.cut("", tensor) for tensor in self.positional), **named)


# A tensor, how often it has been written to, and the rows of it: equal ones hold the same values.
State = tuple[Tensor, int | None, slice | None]


def _state(tensor: Tensor, rows: slice | None) -> State:
    return tensor, version_of(tensor), rows


def _same(state: State, last: State | None) -> bool:
    return last is not None and last[0] is state[0] and state[1] is not None and last[1:] == state[1:]


class CallFailed(RuntimeError):
    """A module raised on another rank."""


class Own:
    """The streaming rank itself: computes at once, in the caller's thread."""

    rank = 0
    lost: str | None = None

    def __init__(self, modules: tuple[nn.Module, ...]):
        self.modules = modules

    def start(self, call: Call) -> Future[Tensor]:
        """The finished future."""
        future: Future[Tensor] = Future()
        try:
            with torch.no_grad():
                future.set_result(call.on(self.modules[call.part]))
        except Exception as error:  # a future carries whatever a module raises
            future.set_exception(error)
        return future

    def leave(self, reason: str) -> None:
        """Take no more calls."""
        self.lost = reason


class Peer:
    """Another rank, and the thread that talks to it. A peer that is lost stays: it fails every call at once.

    beat: seconds of silence after which it is asked whether it is there; it wants to hear from us as often.
    """

    def __init__(self, rank: int, link: Link, beat: float):
        self.rank, self.lost = rank, None
        self._link, self._beat = link, beat
        self._calls: queue.SimpleQueue[tuple[Call, Future[Tensor]] | None] = queue.SimpleQueue()
        self._sent: dict[tuple[int, str], State] = {}
        self._stopped = self._broken = False
        self._stream = torch.cuda.Stream(link.device) if link.device.type == "cuda" else None
        self._thread = Thread(self._run, f"streamflow rank {rank}")
        self._thread.start()

    def start(self, call: Call) -> Future[Tensor]:
        """Queue the call; the future gets its result, `CallFailed`, or `RankLost`."""
        future: Future[Tensor] = Future()
        if self._stopped:
            future.set_exception(RankLost(f"rank {self.rank} was let go"))
        else:
            self._calls.put((call, future))
        return future

    def leave(self, reason: str) -> None:
        """Take no more calls, and let the rank go."""
        self.lost = reason
        self.stop()

    def stop(self) -> None:
        """Let the rank go once what is queued is done; returns at once."""
        if not self._stopped:
            self._stopped = True
            self._calls.put(None)

    def join(self) -> None:
        """Wait until the rank has been let go, or is known to be lost."""
        self._thread.join()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                queued = self._calls.get(timeout=self._beat)
            except queue.Empty:
                self._message(Message(Op.PING))
                continue
            if queued is None:
                break
            self._settle(*queued)
        self._message(Message(Op.STOP))

    def _settle(self, call: Call, future: Future[Tensor]) -> None:
        try:
            future.set_result(self._ask(call))
        except Exception as error:  # a future carries whatever went wrong to the thread that waits for it
            future.set_exception(error)

    def _ask(self, call: Call) -> Tensor:
        if self._broken:
            raise RankLost(self.lost)
        states = {name: _state(tensor, call.rows) for name, tensor in call.named.items()}
        with self._aside(call):
            answer = self._exchange(Message(Op.CALL, call.part, tuple(self._arguments(call, states))))
        self._sent.update({(call.part, name): state for name, state in states.items()})
        if answer.op is Op.FAILED:
            raise CallFailed(answer.text)
        return answer.arguments[0].tensor

    def _message(self, message: Message) -> None:
        if not self._broken:
            with suppress(RankLost):  # said and remembered by _exchange; nobody waits for this answer
                self._exchange(message)

    def _exchange(self, message: Message) -> Message:
        try:
            return self._link.ask(message)
        except Unsendable:
            raise
        except Exception as error:  # whatever it was, the two ends may no longer agree on what comes next
            self._broken, self.lost = True, str(error)
            logger.warning("rank %d is lost, the others do its work: %s", self.rank, error)
            self._link.abandon()
            raise RankLost(str(error)) from error

    def _arguments(self, call: Call, states: Mapping[str, State]) -> Iterator[Argument]:
        """What travels: named arguments that are as they were in the last call stay where they are."""
        yield from (Argument(call.cut("", tensor)) for tensor in call.positional)
        for name, tensor in call.named.items():
            same = _same(states[name], self._sent.get((call.part, name)))
            yield Argument(None if same else call.cut(name, tensor), name, kept=same)

    @contextmanager
    def _aside(self, call: Call) -> Iterator[None]:
        """On a GPU, off the streams on which others compute."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if call.ready is not None:
                self._stream.wait_event(call.ready)
            yield
