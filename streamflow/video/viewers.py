"""Several viewers of one model: each has a video of its own, in a thread of its own, and the network is called for all."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from streamflow._threads import Flag
from streamflow._validation import check_bool
from streamflow.models import video_adapter_for
from streamflow.models.video import VideoAdapter, VideoPlan
from streamflow.video.acceleration import Prepared, VideoModules
from streamflow.video.stream import VideoStream

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


class VideoViewers:
    """Streams of one model for several viewers, each with a prompt, a seed, a history and a step of its own.

        viewers = VideoViewers(pipe)
        anna, ben = viewers.add(), viewers.add()
        anna.prepare("a lighthouse in a storm", seed=1)
        ben.prepare("a cat in the snow", seed=2)

    Each viewer is a `VideoStream`, and is drawn in a thread of its own. While several are inside of a chunk, the network is
    called for all of them at once: a viewer is rows of its batch, whatever its step. So a viewer's chunks are those of a
    stream alone within the rounding of a batch. With `batch=False` the network is called for one after another, and they
    are equal to the bit.

    A viewer may join, leave or fail at any time; the others do not wait for it, and stay as they are. Viewers see the parts
    that `pipe` has now. They share its network, and each decodes by itself with the weights of its VAE.

    Inside of a chunk, so in a `postprocess`, any viewer may be updated, and viewers that were added earlier may be closed,
    prepared or drawn. For one that was added later, or for all, this raises RuntimeError, since it might wait for this very
    chunk.

    Raises:
        ValueError: a pipeline that cannot be streamed, with the reason. NotImplementedError: one whose network cannot be
        shared.
    """

    def __init__(self, pipe: Any, *, batch: bool = True) -> None:
        check_bool("batch", batch)
        adapter = video_adapter_for(pipe)
        adapter.check_offers("viewers")
        self._pipe = copy.copy(pipe)
        self._modules = VideoModules(adapter.device)
        self._meeting = Meeting(partial(self._modules.call_network, pipe.transformer), batch)
        self._encoding = threading.Lock()
        self._viewers: list[_Viewer] = []
        self._numbers = itertools.count()
        self._closed = False

    def add(self, **options: Any) -> VideoStream:
        """Another viewer. options: those of `VideoStream`. Closing it lets go of it."""
        self._check_open()
        viewer = _Viewer(self, self._pipe, **options)
        self._viewers.append(viewer)
        if self._closed:  # by another thread, meanwhile
            viewer.close()
        self._check_open()
        return viewer

    @property
    def viewers(self) -> tuple[VideoStream, ...]:
        """Those that are not closed."""
        return tuple(self._viewers)

    def accelerate(self, kind: str = "auto", **options: object) -> None:
        """Make the network faster for all viewers, as `VideoStream.accelerate`; the VAE stays as it is. Waits for the chunks
        that are being drawn. Each number of rows is compiled or captured when it first occurs."""
        self._check_open()
        with ExitStack() as stack:
            for viewer in reversed(self.viewers):  # the order in which chunks may wait for each other
                stack.enter_context(viewer._alone())
            with self._meeting.computing:
                self._check_open()
                self._modules.accelerator.accelerate(kind, **options)

    @property
    def acceleration(self) -> str:
        """As `VideoStream.acceleration`."""
        return self._modules.accelerator.kind

    def close(self) -> None:
        """Close all viewers, and undo the acceleration. May be called twice. RuntimeError inside of a chunk of a viewer."""
        for viewer in self.viewers:
            viewer._check_outside()
        self._closed = True
        for viewer in self.viewers:
            viewer.close()
        with self._meeting.computing:
            self._modules.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("these viewers are closed: make others of the pipe")

    def _check_may_wait(self, number: int) -> None:
        """Raise RuntimeError inside of a chunk that waits for other viewers, or that a viewer of this number may wait for.

        Chunks wait for viewers with smaller numbers only, and `accelerate` takes viewers in the same order. So no two
        threads wait for each other.
        """
        if self._meeting.is_inside() or any(one.number < number and one._in_chunk() for one in tuple(self._viewers)):
            raise RuntimeError(
                "this thread draws or decodes a chunk of another viewer, for which this viewer may wait: inside of it, only "
                "update() and update_prompt() act on viewers that were added later. Call this outside of the chunk"
            )

    def _remove(self, viewer: _Viewer) -> None:
        """Forget a viewer that is closed."""
        if viewer in self._viewers:
            self._viewers.remove(viewer)


class _Viewer(VideoStream):
    """A stream whose network is that of all viewers."""

    def __init__(self, owner: VideoViewers, pipe: Any, **options: Any) -> None:
        if "guidance_on" in options:
            raise TypeError("guidance_on is for a stream alone: viewers share one network, on one device")
        own = copy.copy(pipe)
        vars(own)["vae"] = copy.copy(pipe.vae)  # the same weights; what it keeps while it works is its own
        super().__init__(own, **options)
        self.number = next(owner._numbers)  # how many viewers were added before
        self._owner, self._modules, self._encoding = owner, owner._modules, owner._encoding
        self._chunks.network = owner._meeting.inside

    def accelerate(self, kind: str = "auto", **options: object) -> None:
        """RuntimeError: all viewers have one network."""
        raise RuntimeError(f"all viewers have one network: call accelerate({kind!r}) of their VideoViewers")

    def _check_outside(self) -> None:
        super()._check_outside()
        self._owner._check_may_wait(self.number)

    def _plan(self, adapter: VideoAdapter, given: Mapping[str, Any], last: VideoPlan | None = None) -> VideoPlan:
        if adapter.network.plain is not self._owner._pipe.transformer:
            raise RuntimeError("all viewers have one network, and this viewer's pipe has another: make viewers of that pipe")
        return super()._plan(adapter, given, last)

    def _connect(self, prepared: Prepared) -> None:
        with self._owner._meeting.computing:
            self._modules.connect(replace(prepared, decodes=False), anew=False)
        prepared.adapter.network.call = self._owner._meeting

    def _disconnect(self) -> None:
        self._owner._remove(self)
