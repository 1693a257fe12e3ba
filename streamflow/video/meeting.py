"""A network that several threads call, and that is called for all of them at once. Knows no streams."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from streamflow._threads import Flag

logger = logging.getLogger(__name__)


class Meeting:
    """A network that several threads call. It waits until every thread that is inside of a chunk has called it, and then
    computes all calls at once, each as rows of a batch.

    Calls whose other arguments differ, or whose rows have other shapes, are computed one after another. A thread that joins
    meanwhile takes part from the next time on, and one that leaves is not waited for. Nothing waits for a thread that is
    not inside of a chunk.

    network: takes arguments by name, `hidden_states` first, and returns a tuple. batch: False computes every call by itself,
    as soon as it comes. computing: held while the network is called.
    """

    def __init__(self, network: Callable[..., Any], batch: bool) -> None:
        self.computing = threading.Lock()
        self._network, self._batch = network, batch
        self._lock = threading.Lock()  # of all below, held for moments only
        self._inside: set[int] = set()  # identifiers of threads
        self._waiting: list[_Call] = []
        self._leader: _Call | None = None

    @contextmanager
    def inside(self, _: object = None) -> Iterator[None]:
        """Around a chunk: the network waits for this thread's calls."""
        thread = threading.get_ident()
        try:
            with self._lock:
                self._inside.add(thread)
            yield
        finally:
            with self._lock:
                self._inside.discard(thread)
                self._choose_leader()

    def is_inside(self) -> bool:
        """Whether this thread is inside of a chunk."""
        return threading.get_ident() in self._inside

    def __call__(self, **given: Any) -> Any:
        """The network's outputs for one thread's rows. Raises what the network raises for these rows."""
        if not self._batch:
            with self.computing:
                return self._network(**given)
        call = _Call(given)
        try:
            with self._lock:
                self._waiting.append(call)
                self._choose_leader()
            call.woken.wait()
            if call.led:
                with self.computing:
                    compute(self._network, call.led)
        finally:
            self._withdraw(call)
        if call.error is not None:
            raise call.error
        return call.outputs

    def _choose_leader(self) -> None:
        """Wake one of those that wait, to compute all of their calls, where all have come and none computes."""
        if self._leader is None and self._waiting and len(self._waiting) >= len(self._inside):
            self._leader, self._waiting[-1].led = self._waiting[-1], self._waiting
            self._waiting = []
            self._leader.woken.set()

    def _withdraw(self, call: _Call) -> None:
        """A call that is done, or whose thread was interrupted. Others that it should have computed wait again."""
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            if self._leader is call:
                self._leader = None
                self._waiting[:0] = [one for one in call.led if one is not call and not one.woken.is_set()]
            self._choose_leader()


class _Call:
    """One thread's call. woken: set once it is computed, or its thread is to compute `led`."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.woken = Flag()
        self.led: list[_Call] = []
        self.outputs: Any = None
        self.error: Exception | None = None

    @property
    def rows(self) -> int:
        return len(self.given["hidden_states"])

    def fits(self, other: _Call) -> bool:
        """Whether the rows of both can be in one batch."""
        return self.given.keys() == other.given.keys() and all(
            self._fits(one, other.given[name], other.rows) for name, one in self.given.items()
        )

    def _fits(self, one: object, other: object, rows: int) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            alike = (one.shape[1:], one.dtype, one.device) == (other.shape[1:], other.dtype, other.device)
            return alike and bool(one.dim()) and len(one) == self.rows and len(other) == rows
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((one, other))):
            return False
        return bool(one == other)

    def finish(self, compute: Callable[[], Any]) -> None:
        """Keep what is computed, or why it cannot be."""
        try:
            self.outputs = compute()
        except Exception as error:  # raised in the thread that has called
            self.error = error
        self.woken.set()


def compute(network: Callable[..., Any], calls: Sequence[_Call]) -> None:
    """Compute calls, those that fit together in one batch. Where a batch raises, each of its calls is computed by itself, so
    that an error is raised for the rows that it comes from."""
    left = list(calls)
    while left:
        batch = [one for one in left if one is left[0] or one.fits(left[0])]
        left = [one for one in left if one not in batch]
        if len(batch) > 1:
            try:
                outputs = _batched(network, batch)
            except Exception:
                logger.warning("a batch of %d calls has failed, and each is computed by itself", len(batch), exc_info=True)
            else:
                for one, own in zip(batch, outputs, strict=True):
                    one.finish(partial(tuple, own))
                continue
        for one in batch:
            one.finish(partial(network, **one.given))


def _batched(network: Callable[..., Any], calls: Sequence[_Call]) -> Iterator[tuple[Tensor, ...]]:
    """The outputs of each call, of one call of the network with all rows."""
    names = calls[0].given
    together = {n: [one.given[n] for one in calls] for n in names}
    given = {n: torch.cat(them) if isinstance(them[0], Tensor) else them[0] for n, them in together.items()}
    sizes = [one.rows for one in calls]
    return zip(*(output.split(sizes) for output in network(**given)), strict=True)
