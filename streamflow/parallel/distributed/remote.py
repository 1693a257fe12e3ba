"""The streaming rank's side: modules that share their rows with other ranks, and calls that other ranks make while this one
goes on. Who gets what, in what order it comes back, and who does it again where a rank fails. Knows no transport.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor, nn

from streamflow.parallel.distributed.workers import Call, Own, Peer
from streamflow.parallel.plan import shares

logger = logging.getLogger(__name__)


class Pending:
    """A call under way. `rank`: who has it now."""

    def __init__(self, remote: Remote, worker: Own | Peer, call: Call):
        self._remote, self._call, self._worker = remote, call, worker
        self._causes: dict[int, str] = {}
        self._future: Future[Tensor] = worker.start(call)

    @property
    def rank(self) -> int:
        """Of the process that decodes."""
        return self._worker.rank

    def done(self) -> bool:
        """Whether `result` returns at once, if the rank did not fail."""
        return self._future.done()

    def wait(self) -> None:
        """Return when the rank that has it is done with it, or has failed."""
        self._future.exception()

    def result(self) -> Tensor:
        """Wait for the result. Where the rank is lost or its module raises, another one computes it.

        Raises:
            RuntimeError: every rank failed; names each one's cause.
        """
        while (error := self._future.exception()) is not None:
            self._causes[self.rank] = f"{type(error).__name__}: {error}"
            self._worker = self._remote.another(self._causes, error)
            self._future = self._worker.start(self._call)
        self._remote.let_go(self._causes)
        value = self._future.result()
        if value.is_cuda:  # made on a side stream, used on the caller's
            value.record_stream(torch.cuda.current_stream(value.device))
        return value


class SharedModule(nn.Module):
    """Stands in the place of a module (`local`). Called, it shares its rows with the other ranks; `submit` gives them whole
    calls. Arguments have their batch in the first dimension; results come back on this rank's device, in order."""

    def __init__(self, remote: Remote, name: str, local: nn.Module):
        super().__init__()
        self.local, self.name = local, name
        self._remote = remote

    def forward(self, *positional: Tensor, **named: Tensor) -> Tensor:
        return self._remote.by_rows(self.name, *positional, **named)

    @property
    def lanes(self) -> int:
        """How many calls can be under way at once: one a rank, but for this one where there are others."""
        return max(1, len(self._remote.ranks) - 1)

    def submit(self, *positional: Tensor, **named: Tensor) -> Pending:
        """As `Remote.submit`."""
        return self._remote.submit(self.name, *positional, **named)


class Remote:
    """What the streaming rank holds: every served module as an attribute (`remote.decoder`), and `submit` and `frames`.

    One thread calls it, the one that streams.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], peers: Sequence[Peer], shared: frozenset[str] = frozenset(), depth: int = 2
    ):
        self._own, self._peers, self._depth = Own(tuple(modules.values())), tuple(peers), depth
        self._shared_names = shared
        self._numbers = {name: number for number, name in enumerate(modules)}
        self._modules = {name: SharedModule(self, name, module) for name, module in modules.items()}
        self._in_flight: deque[Pending] = deque()
        self._turn = 0
        self._closed = False

    def __getattr__(self, name: str) -> SharedModule:
        modules = self.__dict__.get("_modules", {})
        if name not in modules:
            raise AttributeError(f"no module {name!r} is served: there are {', '.join(modules)}")
        return modules[name]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that compute, this one first."""
        return tuple(worker.rank for worker in self._living())

    def by_rows(self, name: str, *positional: Tensor, **named: Tensor) -> Tensor:
        """Equal contiguous shares of the rows, one a rank, this one included; the result is whole and in order.

        Raises:
            ValueError: no rows. RuntimeError: every rank failed, or closed.
        """
        call = self._call(name, positional, named)
        rows = len(positional[0])
        if not rows:
            raise ValueError(f"{name} got no rows: {list(positional[0].shape)}")
        workers = self._living()
        given = [
            (worker, slice(s.start, s.stop)) for worker, s in zip(workers, shares(rows, len(workers)), strict=True) if s
        ]
        # This rank's share is computed as soon as it is started, so it comes last: the others are at work by then.
        started = [Pending(self, worker, replace(call, rows=share)) for worker, share in reversed(given)]
        results = [pending.result() for pending in reversed(started)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def submit(self, name: str, *positional: Tensor, **named: Tensor) -> Pending:
        """Have a whole call computed by the other ranks in turn, while this one goes on. Waits while each of them has as
        many calls as it may (`served`'s in_flight). Without other ranks it is computed here, at once."""
        call = self._call(name, positional, named)
        while len(self._under_way()) >= self._room:
            self._in_flight[0].wait()
        peers = [worker for worker in self._living() if worker.rank] or [self._own]
        self._turn += 1
        pending = Pending(self, peers[self._turn % len(peers)], call)
        self._in_flight.append(pending)
        return pending

    def frames(self, name: str, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        """`submit` each input; the results in order, each as soon as it and all before it are there. As many are under way
        as `submit` allows, so a slow reader or a slow rank makes the inputs wait."""
        waiting: deque[Pending] = deque()
        for item in inputs:
            waiting.append(self.submit(name, item))
            while waiting and (waiting[0].done() or len(waiting) >= self._room):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Let all ranks go, and wait until they have left or are known to be lost. What is under way is finished first."""
        self._closed = True
        for peer in self._peers:
            peer.stop()
        for peer in self._peers:
            peer.join()

    # -- for Pending ----------------------------------------------------------------------------------------------------

    def another(self, causes: Mapping[int, str], last: BaseException) -> Own | Peer:
        """A worker that has not failed at this call; RuntimeError where there is none."""
        for worker in self._living():
            if worker.rank not in causes:
                return worker
        told = "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items()))
        raise RuntimeError(f"every rank failed: {told}") from last

    def let_go(self, causes: Mapping[int, str]) -> None:
        """Drop ranks that failed at what another one then could do."""
        for worker in (self._own, *self._peers):
            if worker.rank in causes and worker.lost is None:
                logger.warning("rank %d is dropped, the others do its work: %s", worker.rank, causes[worker.rank])
                worker.leave(causes[worker.rank])

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _call(self, name: str, positional: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Call:
        if self._closed:
            raise RuntimeError("the ranks have been let go: call inside the `with served(...)` block")
        ready = None
        if positional[0].is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(positional[0].device))
        return Call(self._numbers[name], positional, named, shared=self._shared_names, ready=ready)

    def _living(self) -> list[Own | Peer]:
        """Those who take calls, this rank first. With none left this rank tries again."""
        return [worker for worker in (self._own, *self._peers) if worker.lost is None] or [self._own]

    @property
    def _room(self) -> int:
        """How many calls may be under way by `submit`."""
        return self._depth * max(1, len(self._living()) - 1)

    def _under_way(self) -> deque[Pending]:
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.popleft()
        return self._in_flight
