"""Draws the chunks of a video, one after another, and keeps where it stands. Knows nothing of threads that wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from streamflow._grad_mode import computing
from streamflow.models.video import VideoPlan
from streamflow.video.chunks import Chunk, VideoFrame, numbered
from streamflow.video.decoding import Decoding, check_finite
from streamflow.video.state import Begun, Position, State, Video


class Chunks:
    """Draws the next chunk of a video. decoding: where chunks are decoded. fps: from which frames have their times.

    A video goes on by one assignment of its state, once a chunk is decoded and finite. network: makes a context in which
    the network may be called for a plan.
    """

    network: Callable[[VideoPlan], AbstractContextManager[object]] = nullcontext

    def __init__(self, decoding: Decoding, fps: float) -> None:
        self._decoding, self._fps = decoding, fps

    def next_frames(self, video: Video, one_by_one: bool) -> None:
        """Put the next frames among those that wait: of a chunk or, with `one_by_one`, of one latent frame, where the chunk
        is not decoded already. A chunk that has begun with single latent frames goes on with them."""
        state = video.state
        if state.early or (one_by_one and (state.position.history.chunks == 0 or not self._decoding.ahead)):
            self._next_latent_frame(video)
        else:
            self.next(video, frames=True)

    def _next_latent_frame(self, video: Video) -> None:
        """Decode one more latent frame. Where a chunk is drawn and decoded again, its first images are left out, as many as
        have become frames already."""
        state = video.state
        begun = state.ahead
        if begun is None:
            drawn = replace(self.draw(video, state.position), frame=0)
            begun = self._decoding.begin(drawn, state.position.history.memory)
        assert begun.fetch is not None and begun.frame is not None, "its decoding has begun"
        try:
            decoded = begun.fetch()
        except Exception:
            video.state = replace(state, ahead=None)
            raise
        chunk, first = state.position.history.chunks, state.images + begun.images
        own = tuple(numbered(decoded.images, first, self._fps, chunk))[max(state.early - begun.images, 0) :]
        images = begun.images + len(decoded.images)
        early = max(images, state.early)
        if begun.frame + 1 < begun.drawn.frames:
            begun = self._decoding.begin(replace(begun, frame=begun.frame + 1, images=images), decoded.memory)
            video.state = replace(state, ahead=begun, frames=state.frames + own, early=early)
            return
        history = replace(begun.left.history, memory=decoded.memory)
        video.state = State(
            position=replace(begun.left, history=history),
            images=state.images + early,
            frames=state.frames + own,
            start=state.start,
        )

    def next(self, video: Video, frames: bool) -> Chunk:
        """The next chunk. frames: keep its frames among those that wait."""
        state = video.state
        if state.failed is not None:
            video.state = replace(state, failed=None)
            raise state.failed
        begun = state.ahead
        if begun is None:
            begun = self._decoding.begin(self.draw(video, state.position), state.position.history.memory)
        first = state.position.history.chunks == 0  # is given as soon as it is decoded
        if first or not self._decoding.ahead:
            return self.finish(video, begun, frames=frames)[0]
        video.state = replace(state, ahead=begun)
        following = failed = None
        if video.has_more:
            try:
                following = self.draw(video, begun.left)
            except Exception as error:  # raised by the call that would give that chunk
                failed = error
        return self.finish(video, begun, following, failed, frames)[0]

    @computing
    def draw(self, video: Video, start: Position) -> Begun:
        """Draw the chunk that follows. The generator goes on from `start`, and is put back there where something raises."""
        began, request, adapter = time.perf_counter(), video.request, video.adapter
        adapter.check_placed()
        most = adapter.length(request.plan)
        if most is not None and start.history.chunks >= most:
            raise RuntimeError(f"the video has ended after {most} chunks, the most that its network has positions for")
        try:
            video.generator.set_state(start.rng)
            if request.seed is not None and request.seeded > start.seeded:
                video.generator.manual_seed(request.seed)
            with self.network(request.plan):
                drawn = adapter.draw(request.plan, start.history, video.generator)
            check_finite("latents", drawn.latents, start.history.chunks)
        except BaseException:
            video.generator.set_state(start.rng)
            raise
        left = Position(drawn.history, video.generator.get_state(), request.seeded)
        return Begun(drawn, left, time.perf_counter() - began)

    def finish(
        self,
        video: Video,
        begun: Begun,
        following: Begun | None = None,
        failed: Exception | None = None,
        frames: bool = False,
        kept: tuple[VideoFrame, ...] = (),
    ) -> tuple[Chunk, tuple[VideoFrame, ...]]:
        """Wait for the images of a chunk, and go on to the one that follows, if it is drawn. Returns the chunk and its
        frames. kept: frames that still wait."""
        state, history = video.state, begun.left.history
        assert begun.fetch is not None, "its decoding has begun"
        try:
            decoded = begun.fetch()
        except Exception:
            video.state = replace(state, ahead=None)
            raise
        seconds = begun.seconds + decoded.seconds
        chunk = Chunk(history.chunks - 1, state.images, decoded.images, begun.drawn.latents, self._fps, seconds)
        own = tuple(chunk.frames())
        if following is not None:
            following = self._decoding.begin(following, decoded.memory)
        video.state = State(
            position=replace(begun.left, history=replace(history, memory=decoded.memory)),
            images=state.images + (begun.drawn.images if decoded.images is None else len(own)),
            ahead=following,
            failed=failed,
            frames=own if frames else kept,
            start=state.start,
        )
        return chunk, own
