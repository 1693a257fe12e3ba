"""The engine of families that draw with whole calls of a pipeline (`streamflow.models.fallback`): every frame is one call,
in a coroutine that stops at each call of the network. The adapter makes the calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol
from weakref import finalize

import torch
from torch import Tensor

from streamflow.conditioning.prompt import Prompt
from streamflow.flow.schedule import Stages
from streamflow.models.protocols import Arguments, Function
from streamflow.stream.coroutine import Coroutine
from streamflow.stream.ring import Done, Engine, Group, Settings

FrameCall = Coroutine[Arguments, Tensor]  # one frame: its requests are calls of the network
MergedNetwork = Function  # the arguments of several calls, a list, to their outputs
Groups = deque[tuple[Group, list[FrameCall]]]


class Caller(Protocol):
    """An adapter that draws a frame with one call of a pipeline, as `streamflow.models.fallback.adapter.Fallback` does."""

    def draw(self, prompt: object, latents: Tensor, call_network: Function, /) -> Tensor:
        """The clean latents of the frame that starts from these latents."""
        ...


class PipelineCalls(Engine):
    """Every frame is a call of the pipeline. A group enters with `push` and leaves when its calls have returned, first in,
    first out: after as many pushes as a call of the pipeline makes calls of its network. Finished groups stay after an
    error, and leave at the next push.

    Where a pipeline raises, its group is dropped, the call of the stream raises that error, and the others stay in flight.
    Where the network raises, nothing changes, and the next push calls it again.
    """

    def __init__(self, adapter: Caller, settings: Settings, to_the_end: bool):
        super().__init__(settings)
        self._adapter, self._to_the_end = adapter, to_the_end
        self._groups: Groups = deque()
        self.depth = 1 if to_the_end else len(settings.stages)
        self.row_counts = len(settings.stages) * settings.frames, 0  # a row for each frame and stage
        sigma = settings.stages.sigmas[:1].to(settings.device)
        self.first_sigma = sigma.reshape(-1, *([1] * len(settings.shape)))
        self._finalize = finalize(self, _stop, self._groups)

    @property
    def groups(self) -> Sequence[Group | None]:
        """The groups in flight, newest first."""
        return [group for group, _ in reversed(self._groups)]

    def reset(self) -> None:
        """Stop all frames, and wait for their threads to end."""
        _stop(self._groups)

    def set_levels(self, stages: Stages) -> None:
        raise NotImplementedError("a frame that is a call of its pipeline keeps its noise levels")

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        raise NotImplementedError("a frame that is a call of its pipeline keeps its prompt")

    def push(self, group: Group, network: MergedNetwork) -> Done | None:
        with _stopping(self._groups):
            self._enter(group)
            self._tick(network)
            while self._to_the_end and not self._is_done():
                self._tick(network)
        return self._leave() if self._is_done() else None

    def drain(self, network: MergedNetwork) -> Iterator[Done]:
        while self._groups:
            with _stopping(self._groups):
                while not self._is_done():
                    self._tick(network)
            yield self._leave()

    def _enter(self, group: Group) -> None:
        calls: list[FrameCall] = []
        self._groups.append((group, calls))
        for x, prompt in zip(group.x.split(1), group.prompts, strict=True):
            calls.append(Coroutine(partial(self._adapter.draw, prompt, x), x.device))
            calls[-1].resume()
        self._drop_failed()

    def _tick(self, network: MergedNetwork) -> None:
        """Make the pending calls of the network, and let each frame run to its next call or to its end."""
        waiting = [call for _, calls in self._groups for call in calls if not call.done]
        for call, output in zip(waiting, network([call.request or {} for call in waiting]), strict=True):
            call.resume(output)
        self._drop_failed()

    def _drop_failed(self) -> None:
        """Drop the groups with a frame whose pipeline has raised, and raise the first error."""
        failed = [entry for entry in self._groups if any(call.error for call in entry[1])]
        for entry in failed:
            self._groups.remove(entry)
        if failed:
            _stop(deque(failed))
            raise next(call.error for call in failed[0][1] if call.error)

    def _is_done(self) -> bool:
        return bool(self._groups) and all(call.done for call in self._groups[0][1])

    def _leave(self) -> Done:
        group, calls = self._groups.popleft()
        x0 = torch.cat([call.result for call in calls])
        return Done(x0, ids=group.ids, copy=group.copy, finish=group.finish)


def _stop(groups: Groups) -> None:
    """Stop all calls of these groups, and empty the list."""
    with ExitStack() as stack:  # runs every callback, even after one that raises
        while groups:
            for call in groups.pop()[1]:
                stack.callback(call.stop)


@contextmanager
def _stopping(groups: Groups) -> Iterator[None]:
    """Stops all frames after an interruption, which can leave them in any state."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _stop(groups)
        raise
