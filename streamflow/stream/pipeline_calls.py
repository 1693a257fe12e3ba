"""The engine of families that draw with whole calls of a pipeline (`streamflow.models.fallback`): every frame is one call,
stopped wherever it calls the network. Knows coroutines and groups; the adapter says what a call is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import torch

from streamflow.stream.coroutine import Strand
from streamflow.stream.ring import Done, Group, Settings


class PipelineCalls:
    """The frames in flight, with the ring's verbs. A group enters with `push` and leaves when its calls have returned,
    first in, first out: after as many pushes as a call of the pipeline makes calls of its network.

    Where a pipeline raises, its group is lost, the call of the stream raises that error, and the others stay in flight;
    where the network raises, nothing has changed, and the next push asks it again.
    """

    waiting = None
    anchors = None

    def __init__(self, adapter: Any, settings: Settings, to_the_end: bool):
        self._adapter, self.settings, self._to_the_end = adapter, settings, to_the_end
        self._groups: deque[tuple[Group, list[Strand]]] = deque()
        self.weight = 1.0
        self.observer = None
        self.rows = SimpleNamespace(count=len(settings.stages) * settings.frames, extra=0)
        self.stages = [self.rows]
        self._finalize = finalize(self, _stop, self._groups)

    @property
    def in_flight(self) -> int:
        """How many frames are under way."""
        return sum(len(group.ids) for group, _ in self._groups)

    @property
    def groups_in_flight(self) -> int:
        """How many groups are under way."""
        return len(self._groups)

    @property
    def empty(self) -> bool:
        """Whether none is in flight."""
        return not self._groups

    leaving: tuple[Done, ...] = ()  # after an error, what is done stays and leaves at the next push

    def holds(self, group: Group) -> bool:
        """Whether this very group is under way."""
        return any(one is group for one, _ in self._groups)

    def reset(self) -> None:
        """Stop all frames, and wait for their threads to end."""
        _stop(self._groups)

    def push(self, group: Group, network: Callable[..., list[Any]]) -> Done | None:
        """Take F new frames in, let all make one call of the network, and return the oldest group if it is done."""
        with _stopping(self._groups):
            self._enter(group)
            self._tick(network)
            while self._to_the_end and not self._is_done():
                self._tick(network)
        return self._leave()

    def flush(self, network: Callable[..., list[Any]]) -> list[Done]:
        """Run what is in flight to its end, oldest first. Empties the engine."""
        return list(self.drain(network))

    def drain(self, network: Callable[..., list[Any]]) -> Iterator[Done]:
        """As `flush`, one group after another, each when it is done."""
        while self._groups:
            with _stopping(self._groups):
                while not self._is_done():
                    self._tick(network)
            yield self._leave()

    def _enter(self, group: Group) -> None:
        begun: list[Strand] = []
        self._groups.append((group, begun))
        for x, prompt in zip(group.x.split(1), group.prompts, strict=True):
            begun.append(Strand(partial(self._adapter.draw, prompt, x), x.device))
            begun[-1].answer()
        self._drop_failed()

    def _tick(self, network: Callable[..., list[Any]]) -> None:
        """Answer what all frames have asked, and let each go on to its next question or to its end."""
        asking = [strand for _, strands in self._groups for strand in strands if not strand.over]
        for strand, answer in zip(asking, network([strand.question for strand in asking]), strict=True):
            strand.answer(answer)
        self._drop_failed()

    def _drop_failed(self) -> None:
        """Let go of groups with a frame whose pipeline has raised, and raise what the first of them did."""
        failed = [entry for entry in self._groups if any(strand.error for strand in entry[1])]
        for entry in failed:
            self._groups.remove(entry)
        if failed:
            _stop(deque(failed))
            raise next(strand.error for strand in failed[0][1] if strand.error)

    def _is_done(self) -> bool:
        return bool(self._groups) and all(strand.over for strand in self._groups[0][1])

    def _leave(self) -> Done | None:
        if not self._is_done():
            return None
        group, strands = self._groups.popleft()
        return Done(torch.cat([strand.result for strand in strands]), group.ids, group.copy, group.finish)


def _stop(groups: deque[tuple[Group, list[Strand]]]) -> None:
    """End all threads of these groups, and forget the groups."""
    with ExitStack() as stack:  # which goes on where one fails
        while groups:
            for strand in groups.pop()[1]:
                stack.callback(strand.stop)


@contextmanager
def _stopping(groups: deque[tuple[Group, list[Strand]]]) -> Iterator[None]:
    """Inside, an interruption, of which nobody knows what it left half done, ends all frames."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _stop(groups)
        raise
