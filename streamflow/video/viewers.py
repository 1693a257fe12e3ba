"""Several viewers of one model: each has a video of its own, in a thread of its own, and the network is called for all."""

from __future__ import annotations

import copy
import itertools
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self

from streamflow._validation import check_bool
from streamflow.models import video_adapter_for
from streamflow.video.acceleration import Prepared, VideoModules
from streamflow.video.meeting import Meeting
from streamflow.video.requests import Requests
from streamflow.video.stream import VideoStream


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
            for viewer in sorted(self._viewers, key=lambda one: -one.number):  # the order of `_check_may_wait`
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
        self._owner, self._modules = owner, owner._modules
        self._requests = Requests(owner._encoding, owner._pipe.transformer)
        self._chunks.network = owner._meeting.inside

    def accelerate(self, kind: str = "auto", **options: object) -> None:
        """RuntimeError: all viewers have one network."""
        raise RuntimeError(f"all viewers have one network: call accelerate({kind!r}) of their VideoViewers")

    def _check_outside(self) -> None:
        super()._check_outside()
        self._owner._check_may_wait(self.number)

    def _connect(self, prepared: Prepared) -> None:
        with self._owner._meeting.computing:
            self._modules.connect(replace(prepared, decodes=False), anew=False)
        prepared.adapter.network.call = self._owner._meeting

    def _disconnect(self) -> None:
        self._owner._remove(self)
