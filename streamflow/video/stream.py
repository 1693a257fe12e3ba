"""A video without end: each chunk is drawn under what the chunks before have left, and equals the pipeline's own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from streamflow._grad_mode import computing
from streamflow._validation import check_number, is_whole_number, whole_number
from streamflow.flow.noise import resolve_seeds
from streamflow.models import video_adapter_for
from streamflow.models.video import History, VideoAdapter, VideoPlan
from streamflow.video.chunks import Chunk, VideoFrame

if TYPE_CHECKING:
    from streamflow.io import Sink
    from streamflow.live.remote import Controls
    from streamflow.live.video import VideoLive

logger = logging.getLogger(__name__)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SCOPES = ("now", "frame")
DEFAULT_SEED = 2
T = TypeVar("T")


@dataclass(eq=False)
class _Video:
    """What is drawn since a call of `prepare`. plan, new_seed: of the next chunk; an update replaces them, and a chunk reads
    them once. begin: the generator's state before the first chunk."""

    adapter: VideoAdapter
    plan: VideoPlan
    generator: torch.Generator
    begin: torch.Tensor
    seed: int | None
    new_seed: int | None = None
    updates: int = 0


class VideoStream:
    """Streams a loaded video pipeline of diffusers chunk after chunk, without end.

        stream = VideoStream(pipe)
        stream.prepare("a lighthouse in a storm", height=384, width=640)
        for frame in stream.frames():
            show(frame.image)

    Chunk k equals chunk k of the pipeline's own call with the same arguments and generator, of any length above k. What is
    carried from chunk to chunk has a constant size; AnyFlow's grows, and its videos have an end.

    One thread draws. `update` and `update_prompt` may be called from any thread, and act at the next chunk; `prepare`,
    `reset`, `flush` and `close` wait for the chunk that is being drawn. The pipeline stays unchanged, and may be called
    between two chunks. Several streams of one pipe are drawn in one thread, in turn, since its VAE keeps what it decodes.

    A chunk counts once it is decoded and finite. Where something raises before that, the stream stays as it was before the
    chunk, and the next call draws the same chunk again.

    Args:
        pipe: a diffusers pipeline of `streamflow.models.VIDEO_PIPELINES`, on its device, in its dtype.
        output_type: of images: "pil", "np" or "pt" (in [0, 1]); "latent" decodes nothing.
        fps: frames a second, from which frames have their times. None: the model's own.

    Raises:
        ValueError: a pipeline that cannot be streamed, with the reason; a bad output_type or fps.
    """

    def __init__(self, pipe: Any, *, output_type: str = "pil", fps: float | None = None) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}: choose one of {', '.join(map(repr, OUTPUT_TYPES))}")
        check_number("fps", fps)
        if fps is not None and fps <= 0:
            raise ValueError(f"fps must be above 0, not {fps}")
        self.pipe: Any = pipe
        self.output_type = output_type
        own = video_adapter_for(pipe).fps
        self.fps = float(own if fps is None else fps)
        self._drawing = threading.Lock()  # held while a chunk is drawn, and by what would disturb it
        self._updating = threading.Lock()  # held while an update is checked and encoded; taken after `_drawing`
        self._slot = threading.Lock()  # of what the next chunk takes; taken after both
        self._drawn_by: int | None = None
        self._video: _Video | None = None
        self._closed = False
        self._waiting: deque[VideoFrame] = deque()
        self._restart()

    # -- what is drawn --------------------------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **arguments: Any,
    ) -> None:
        """Set what is drawn. The next chunk is the first one; a loop over chunks or frames that is running ends.

        Args:
            prompt, negative_prompt: texts; or `prompt_embeds` and `negative_prompt_embeds` of one video.
            seed: of a generator on the pipe's device. Default 2; -1 stands for a random one, which is logged.
            generator: draws all noise; used as it is, or seeded with `seed` first where both are given.
            arguments: others of the pipeline's call: `height`, `width`, `guidance_scale`, ...; `image` or `video` is what
                the video goes on from, where the pipeline takes it.

        Raises:
            TypeError, ValueError: for what the stream or the pipeline cannot take; then nothing has changed.
        """
        self._check_open()
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is one torch.Generator, not {type(generator).__name__}")
        seed = _seed(DEFAULT_SEED if seed is None and generator is None else seed)
        adapter = video_adapter_for(self.pipe)
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        plan = adapter.plan({name: text for name, text in texts.items() if text is not None} | arguments)
        with self._alone(), self._updating:
            self._check_open()
            generator = generator or torch.Generator(adapter.device)
            if seed is not None:
                generator.manual_seed(seed)
            self._video = _Video(adapter, plan, generator, generator.get_state(), seed)
            self._restart()

    def update(self, *, scope: str = "now", seed: int | None = None, **arguments: Any) -> int:
        """Change what is drawn from the next chunk on; a chunk that is being drawn stays as it is. From any thread.

        Args:
            scope: "now" or "frame", as in `StreamFlow.update`; here both mean the next chunk.
            seed: seeds the generator anew before the next chunk.
            arguments: prompt, negative_prompt, guidance_scale, and what else of the pipeline's call may change from chunk to
                chunk (`VideoAdapter.changeable`).

        Returns the update's number since `prepare`, counted from 1.

        Raises:
            TypeError, ValueError: for what cannot be; then nothing has changed. RuntimeError: before `prepare`.
        """
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(map(repr, SCOPES))}")
        seed = _seed(seed)
        with self._updating:
            video = self._prepared()
            changeable = video.adapter.changeable & video.adapter.parameters.keys()
            for name in arguments:
                if name not in changeable:
                    others = ", ".join(sorted(changeable))
                    raise ValueError(f"{name} cannot change from chunk to chunk: call prepare() anew. These can: {others}")
            given = {name: value for name, value in video.plan.given.items() if name not in _replaced(arguments)}
            plan = video.adapter.plan(given | arguments, video.plan)
            with self._slot:
                video.plan = plan
                video.new_seed = video.new_seed if seed is None else seed
                video.updates += 1
                return video.updates

    def update_prompt(self, prompt: str, negative_prompt: str | None = None, *, scope: str = "now", **arguments: Any) -> int:
        """Change the prompt from the next chunk on. The negative prompt stays unless a new one is given. Returns the number
        of the update."""
        texts = {"prompt": prompt} if negative_prompt is None else {"prompt": prompt, "negative_prompt": negative_prompt}
        return self.update(scope=scope, **texts, **arguments)

    @property
    def seed(self) -> int | None:
        """The seed of what is drawn, or None where a generator was given without one. RuntimeError before `prepare`."""
        video = self._prepared()
        return video.seed if video.new_seed is None else video.new_seed

    # -- draw -----------------------------------------------------------------------------------------------------------

    def __call__(self) -> Chunk:
        """Draw the next chunk.

        Raises:
            RuntimeError: before `prepare`, after `close`, or where frames of the last chunk wait for `frames`.
            FloatingPointError: the chunk holds NaN or infinite values.
        """
        with self._alone():
            return self._next_chunk()

    def chunks(self, most: int | None = None) -> Iterator[Chunk]:
        """Chunk after chunk, `most` of them or without end. A loop that is left loses nothing: the next one goes on with the
        next chunk. `prepare`, `reset` and `close` end a loop: RuntimeError at its next chunk."""
        return self._loop(self._next_chunk, most)

    def frames(self, most: int | None = None) -> Iterator[VideoFrame]:
        """Frame after frame, `most` of them or without end. A loop that is left loses nothing: the next one goes on with the
        next frame, and `flush` gives those that were drawn already. `prepare`, `reset` and `close` end a loop: RuntimeError
        at its next frame."""
        if self.output_type == "latent":
            raise ValueError('frames() gives images, and this stream has output_type="latent": use chunks()')
        return self._loop(self._next_frame, most)

    def flush(self) -> list[VideoFrame]:
        """The frames that were drawn and not yet given by `frames`, in order."""
        with self._alone():
            self._prepared()
            frames = list(self._waiting)
            self._waiting.clear()
            return frames

    def live(
        self,
        sinks: str | Sink | Sequence[str | Sink],
        *,
        target_fps: float | None = None,
        on_error: str = "hold",
        controls: Controls | None = None,
    ) -> VideoLive:
        """Show the video in sinks, its frames at even intervals. Begins at once, in threads of its own, and returns.

            with stream.live(["window", "record:out.mp4"]) as show:
                stream.update_prompt("a lighthouse on a calm morning")
                print(show.wait())  # its Statistics, when the window was closed

        `streamflow.live.video.VideoLive` describes the arguments and errors.
        """
        from streamflow.live.video import VideoLive

        return VideoLive(self, sinks, target_fps=target_fps, on_error=on_error, controls=controls)

    def reset(self) -> None:
        """Begin anew with what `prepare` and `update` have set: the next chunk is chunk 0, from the seed, or from the state
        that the generator had at `prepare`. Frames that wait are dropped."""
        with self._alone(), self._slot:
            video = self._prepared()
            if video.new_seed is None and video.seed is None:
                video.generator.set_state(video.begin)
            elif video.new_seed is None:
                video.new_seed = video.seed
            self._restart()

    def close(self) -> None:
        """Let go of the pipeline and of what was carried. The stream cannot be used after it. May be called twice."""
        with self._alone(), self._updating:
            self._closed = True
            self.pipe = self._video = None
            self._restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------------------------

    @computing
    def _draw(self) -> Chunk:
        video, history, began = self._prepared(), self._history, time.perf_counter()
        video.adapter.check_placed()
        plan, seed = self._take(video)
        before = video.generator.get_state()
        try:
            if seed is not None:
                video.generator.manual_seed(seed)
            drawn = video.adapter.draw(plan, history, video.generator)
            _check_finite("latents", drawn.latents, history.chunks)
            images, left = None, drawn.history
            if self.output_type != "latent":
                decoded, left = video.adapter.decode(drawn)
                _check_finite("images", decoded, history.chunks)
                images = video.adapter.convert(decoded, self.output_type)
        except BaseException:
            video.generator.set_state(before)
            with self._slot:
                video.new_seed = seed if video.new_seed is None else video.new_seed
            raise
        chunk = Chunk(history.chunks, self._images, images, drawn.latents, self.fps, time.perf_counter() - began)
        self._history = left
        self._images += drawn.images
        return chunk

    def _take(self, video: _Video) -> tuple[VideoPlan, int | None]:
        """What the next chunk is drawn with, and the seed of an update that no chunk has taken."""
        with self._slot:
            most = video.adapter.length(video.plan)
            if most is not None and self._history.chunks >= most:
                raise RuntimeError(f"the video has ended after {most} chunks, the most that its network has positions for")
            seed, video.new_seed = video.new_seed, None
            video.seed = video.seed if seed is None else seed
            return video.plan, seed

    def _next_frame(self) -> VideoFrame:
        if not self._waiting:
            self._waiting.extend(self._draw().frames())
        return self._waiting.popleft()

    def _loop(self, draw: Callable[[], T], most: int | None) -> Iterator[T]:
        """Call `draw` again and again, `most` times or until a call begins anew."""
        if most is not None:
            whole_number("most", most, 0, wrong_type=TypeError)
        self._prepared()
        start = self._start

        def drawn() -> Iterator[T]:
            while True:
                with self._alone():
                    video = self._prepared()
                    if self._start is not start:
                        raise RuntimeError("prepare() or reset() has ended this loop: begin another one")
                    most = video.adapter.length(video.plan)
                    if not self._waiting and most is not None and self._history.chunks >= most:
                        return
                    one = draw()
                yield one

        return islice(drawn(), most)

    def _next_chunk(self) -> Chunk:
        if self._waiting:
            chunk = self._waiting[0].chunk
            raise RuntimeError(f"{len(self._waiting)} frames of chunk {chunk} wait: go on with frames(), or flush() them")
        return self._draw()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for the chunk that another thread draws. RuntimeError inside of a chunk that this thread draws."""
        if self._drawn_by == threading.get_ident():
            raise RuntimeError("a chunk is being drawn by this thread: only update() and update_prompt() act inside of it")
        with self._drawing:
            try:
                self._drawn_by = threading.get_ident()
                yield
            finally:
                self._drawn_by = None

    def _restart(self) -> None:
        """Forget the chunks so far."""
        if self._waiting:
            logger.info("%d frames of the last chunk are dropped", len(self._waiting))
            self._waiting.clear()
        self._start = object()
        self._history = History()
        self._images = 0

    def _prepared(self) -> _Video:
        self._check_open()
        if self._video is None:
            raise RuntimeError("call prepare(prompt, ...) first")
        return self._video

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this video stream is closed: make another one of the pipe")


def _check_finite(kind: str, tensor: Tensor, chunk: int) -> None:
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(
            f"the {kind} of chunk {chunk} hold NaN or infinite values. The chunk was dropped, and the next call draws it "
            f"again: change the prompt, the guidance scale or the seed with update(), or the dtype of the pipe"
        )


def _seed(seed: object) -> int | None:
    """A seed as an integer, -1 as a random one. TypeError for anything else."""
    if seed is not None and not is_whole_number(seed):
        raise TypeError(f"seed must be an integer, not {seed!r}")
    return resolve_seeds(seed)


def _replaced(arguments: Mapping[str, Any]) -> set[str]:
    """The arguments that are left out once these are given: a text replaces its embeddings, and the other way round."""
    pairs = {"prompt": "prompt_embeds", "negative_prompt": "negative_prompt_embeds"}
    pairs |= {embeds: text for text, embeds in pairs.items()}
    return {pairs[name] for name in arguments if name in pairs}
