"""A video without end: each chunk is drawn under what the chunks before have left, and equals the pipeline's own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from streamflow._validation import check_number, whole_number
from streamflow.models import video_adapter_for
from streamflow.models.pipe_parts import base_network
from streamflow.models.tiny_video import TinyVideoDecoder
from streamflow.parallel.replicas import Devices
from streamflow.video.acceleration import Prepared, VideoModules
from streamflow.video.chunks import Chunk, VideoFrame
from streamflow.video.decoding import DecodeElsewhere, DecodeInPlace, Decoding, Output, one_device
from streamflow.video.drawing import Chunks
from streamflow.video.guidance import PairedCalls
from streamflow.video.requests import Requests
from streamflow.video.state import Video

if TYPE_CHECKING:
    from streamflow.io import Sink
    from streamflow.live.remote import Controls
    from streamflow.live.video import VideoLive

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODES = ("chunk", "frame")
T = TypeVar("T")


class VideoStream:
    """Streams a loaded video pipeline of diffusers chunk after chunk, without end.

        stream = VideoStream(pipe)
        stream.prepare("a lighthouse in a storm", height=384, width=640)
        for frame in stream.frames():
            show(frame.image)

    Chunk k equals chunk k of the pipeline's own call with the same arguments and generator, of any length above k. What is
    carried from chunk to chunk has a constant size; AnyFlow's grows, and its videos have an end.

    One thread draws. `update` and `update_prompt` may be called from any thread, and act at the next chunk that is not
    begun; `prepare`, `reset`, `flush`, `accelerate` and `close` wait for the chunk that is being drawn. The pipeline stays
    unchanged, and may be called between two chunks. Several streams of one pipe are drawn in one thread, in turn, since its
    VAE keeps what it decodes; `VideoViewers` has streams for a thread each.

    A chunk counts once it is decoded and finite. Where something raises before that, the stream stays as it was before the
    chunk, and the next call draws the same chunk again.

    Args:
        pipe: a diffusers pipeline of `streamflow.models.VIDEO_PIPELINES`, on its device, in its dtype.
        output_type: of images: "pil", "np" or "pt" (in [0, 1]); "latent" decodes nothing.
        fps: frames a second, from which frames have their times. None: the model's own. With a `postprocess` that changes
            the number of images, the frames a second of what it returns.
        decode_on: a device such as "cuda:1", on which a copy of the VAE decodes in a thread of its own while the next chunk
            is drawn. The stream is then one chunk ahead, from its second chunk on: a call draws chunk k + 1 while chunk k is
            decoded, and gives chunk k. Tensors of "pt" are on that device.
        guidance_on: a device such as "cuda:1", which has a copy of the network. In each step of a chunk with guidance it
            computes one of the two calls of the network, at the same time as the pipe's own device computes the other.
        postprocess: a function of the images of a chunk, as `output_type` says, that returns the images that are given in
            their place; their number may be another one (frame interpolation). It is called in the thread that decodes, and
            once more with the same chunk where something has raised.

    Raises:
        ValueError: a pipeline that cannot be streamed, with the reason; a bad output_type, fps or device.
        TypeError: a `postprocess` that is no function. NotImplementedError: guidance_on for a network that is called once.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        output_type: str = "pil",
        fps: float | None = None,
        decode_on: Devices | None = None,
        guidance_on: Devices | None = None,
        postprocess: Callable[[Any], Any] | None = None,
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}: choose one of {', '.join(map(repr, OUTPUT_TYPES))}")
        check_number("fps", fps)
        if fps is not None and not 0 < fps < 10_000:
            raise ValueError(f"fps must be frames a second, above 0 and below 10,000, not {fps}")
        if postprocess is not None and not callable(postprocess):
            raise TypeError(f"postprocess is a function of a chunk's images, not {postprocess!r}")
        for name, value in (("decode_on", decode_on), ("postprocess", postprocess)):
            if value is not None and output_type == "latent":
                raise ValueError(f'{name} is for images, and this stream has output_type="latent"')
        adapter = video_adapter_for(pipe)
        self.pipe: Any = pipe
        self.output_type = output_type
        self.fps = float(adapter.fps if fps is None else fps)
        output = Output(output_type, postprocess, rescaled=fps is not None)
        self._decoding: Decoding = DecodeInPlace(output) if decode_on is None else DecodeElsewhere(output, decode_on)
        self._chunks = Chunks(self._decoding, self.fps)
        if guidance_on is not None:
            adapter.check_offers("guidance_on")
        self._modules = VideoModules(adapter.device, None if guidance_on is None else one_device("guidance_on", guidance_on))
        self._drawing = threading.Lock()  # held while a chunk is drawn, and by what would disturb it
        self._updating = threading.Lock()  # held while an update is made; taken after `_drawing`
        self._requests = Requests()  # takes a lock of its own, after both
        self._drawn_by: int | None = None
        self._video: Video | None = None
        self._closed = False

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
            generator: all noise is drawn by a copy of it, in its present state, or seeded with `seed` where both are given.
                It stays as it is, and may be given to several streams.
            arguments: others of the pipeline's call: `height`, `width`, `guidance_scale`, ...; `image` or `video` is what
                the video goes on from, where the pipeline takes it. A file `call.json` in the folder that the pipeline was
                loaded from has their defaults; without it they are those of the pipeline's call.

        Raises:
            TypeError, ValueError, MemoryError: for what the stream or the pipeline cannot take; then nothing has changed.
            Whatever acceleration raises; then the stream is prepared, without acceleration.
        """
        self._check_open()
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        given = {name: text for name, text in texts.items() if text is not None} | arguments
        video = self._requests.first(self.pipe, given, seed, generator)
        with self._alone():
            self._check_open()
            self._decoding.wait()  # before `_updating` is held, since a postprocess may call update()
            with self._updating:
                decoding = self._decoding.prepare(video.adapter)
                try:
                    self._connect(Prepared(video.adapter, decoding, video.request.plan, self.output_type != "latent"))
                finally:
                    self._begin(video)

    def update(self, *, scope: str = "now", seed: int | None = None, **arguments: Any) -> int:
        """Change what is drawn from the next chunk on; a chunk that is begun stays as it is. From any thread.

        Args:
            scope: "now" or "frame", as in `StreamFlow.update`; here both mean the next chunk.
            seed: seeds the generator anew before the next chunk.
            arguments: prompt, negative_prompt, guidance_scale, and what else of the pipeline's call may change from chunk to
                chunk (`VideoAdapter.changeable`).

        Returns the update's number since `prepare`, counted from 1.

        Raises:
            TypeError, ValueError: for what cannot be; then nothing has changed. RuntimeError: before `prepare`.
        """
        with self._updating:
            video = self._prepared()
            video.request = self._requests.changed(video, scope, seed, arguments)
            return video.request.updates

    def update_prompt(self, prompt: str, negative_prompt: str | None = None, *, scope: str = "now", **arguments: Any) -> int:
        """Change the prompt from the next chunk on. The negative prompt stays unless a new one is given. Returns the number
        of the update."""
        texts = {"prompt": prompt} if negative_prompt is None else {"prompt": prompt, "negative_prompt": negative_prompt}
        return self.update(scope=scope, **texts, **arguments)

    @property
    def seed(self) -> int | None:
        """The seed of what is drawn, or None where a generator was given without one. RuntimeError before `prepare`."""
        return self._prepared().request.seed

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that the next chunk is drawn with, without those that have that call's own
        defaults. RuntimeError before `prepare`."""
        return dict(self._prepared().request.plan.given)

    # -- acceleration ---------------------------------------------------------------------------------------------------

    def accelerate(self, kind: str = "auto", **options: object) -> None:
        """Make the network and the VAE faster, as `StreamFlow.accelerate`, with the same kinds, options and errors.

        kind: "none" undoes all; "cuda-graph" replays recorded launches; "compile" is torch.compile of the network, by its
            repeated blocks where it has them, with a CUDA graph on top on CUDA; "auto" is "compile" on CUDA, else "none";
            "max" measures which of these is fastest for this model. Video networks are not exported, so "tensorrt",
            "onnxruntime" and "openvino" are refused. Of the networks of AnyFlow and SkyReels "compile" compiles the blocks
            alone, without a CUDA graph, and "cuda-graph" is refused.
        options: those of the kind, such as `quantize="fp8"` (`streamflow.acceleration.<kind>.Options`).

        Of the VAE the decoder of one latent frame is compiled, on a GPU only, since it takes minutes on a CPU. A VAE that
        decodes each chunk by itself gets a CUDA graph. Called before `prepare`, it takes effect there. A shape
        that no call at the start has is compiled or captured in the first one that has it. What was changed in the network
        is put back by "none" and by `close`.

        Raises:
            ValueError, TypeError: an unknown kind or option. RuntimeError: this device cannot do it. NotImplementedError:
            the family cannot be accelerated so. Whatever compilation raises; then the stream is not accelerated.
        """
        with self._alone():
            self._check_open()
            self._decoding.wait()
            self._modules.accelerator.accelerate(kind, **options)

    @property
    def acceleration(self) -> str:
        """The kind in force: "none", "cuda-graph" or "compile". "max" before `prepare`."""
        return self._modules.accelerator.kind

    @property
    def acceleration_measured(self) -> tuple[Any, ...]:
        """What `accelerate("max")` has measured (`streamflow.acceleration.preset.Measured`)."""
        return self._modules.accelerator.measured

    @property
    def vae(self) -> Any:
        """What decodes from the next `prepare` on: a `TinyVideoDecoder` that was assigned, or `stream.pipe.vae`. ValueError
        for a decoder of other latents, with the numbers."""
        self._check_open()
        return self.pipe.vae if self._requests.tiny is None else self._requests.tiny

    @vae.setter
    def vae(self, vae: Any) -> None:
        self._check_open()
        own = vae is self.pipe.vae
        if not own:
            video_adapter_for(self.pipe).use_tiny_vae(vae)
        self._requests.tiny = None if own else vae

    def use_tiny_vae(self, path: str | Path) -> None:
        """Decode with a tiny VAE, much faster and a little coarser, from the next `prepare` on. The pipe keeps its own VAE,
        which encodes what a video goes on from. `stream.vae = stream.pipe.vae` goes back to it.

        path: a file of TAEHV's weights, `.pth` or `.safetensors`, for the latents of the pipe's VAE: `taew2_1` for Wan 2.1's
            (`streamflow.models.tiny_video`).

        Raises:
            OSError: there is no such file. ValueError: it has other weights, or is for other latents. Nothing has changed.
        """
        self._check_open()
        network = base_network(self.pipe.transformer)
        self.vae = TinyVideoDecoder.from_file(path).to(self.pipe._execution_device, network.dtype)

    # -- draw -----------------------------------------------------------------------------------------------------------

    def __call__(self) -> Chunk:
        """Draw the next chunk.

        Raises:
            RuntimeError: before `prepare`, after `close`, or where frames of the last chunk wait for `frames`.
            FloatingPointError: the chunk holds NaN or infinite values. Whatever the pipeline raises.
        """
        with self._alone():
            return self._next_chunk()

    def chunks(self, most: int | None = None) -> Iterator[Chunk]:
        """Chunk after chunk, `most` of them or without end. A loop that is left loses nothing: the next one goes on with the
        next chunk. `prepare`, `reset` and `close` end a loop: RuntimeError at its next chunk."""
        return self._loop(self._next_chunk, most)

    def frames(self, most: int | None = None, *, decode: str = "chunk") -> Iterator[VideoFrame]:
        """Frame after frame, `most` of them or without end. A loop that is left loses nothing: the next one goes on with the
        next frame, and `flush` gives those that were drawn already. `prepare`, `reset` and `close` end a loop: RuntimeError
        at its next frame.

        decode: "chunk" gives the frames of a chunk once all of it is decoded. "frame" gives the images of each latent frame
            once they are decoded, before the VAE decodes the next latent frame: the same images to the bit, the first of
            them earlier. It needs a causal VAE, which is not accelerated then: where chunks are decoded compiled, the
            images differ by rounding. It calls `postprocess` with the images of one latent frame. With `decode_on` it acts
            on the first chunk, as the others are decoded while a chunk is drawn.

        Raises:
            ValueError: another `decode`, a VAE with tiling, or a stream of latents. TypeError: `most` is no integer.
            NotImplementedError: decode="frame" with a VAE that is not causal. RuntimeError: before `prepare`.
        """
        if self.output_type == "latent":
            raise ValueError('frames() gives images, and this stream has output_type="latent": use chunks()')
        if decode not in DECODES:
            raise ValueError(f"unknown decode {decode!r}: choose one of {', '.join(map(repr, DECODES))}")
        if decode == "frame":
            self._prepared().adapter.frame_decoder()
        return self._loop(partial(self._next_frame, decode == "frame"), most)

    def flush(self) -> list[VideoFrame]:
        """The frames that were drawn and not yet given, in order; with `decode_on`, also those of the chunk ahead. The rest
        of a chunk of which `frames(decode="frame")` has given images is decoded first."""
        with self._alone():
            video = self._prepared()
            while video.state.early:
                self._chunks.next_frames(video, one_by_one=True)
            frames = video.state.frames
            if video.state.ahead is not None:
                frames += self._chunks.finish(video, video.state.ahead, kept=frames)[1]
            video.state = replace(video.state, frames=())
            return list(frames)

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
        that the generator had at `prepare`. Frames that wait, and a chunk ahead, are dropped."""
        with self._alone(), self._updating:
            video = self._prepared()
            video.log_dropped()
            video.state = video.first_state()

    def close(self) -> None:
        """Let go of the pipeline and of what was carried, and undo the acceleration. The stream cannot be used after it. May
        be called twice."""
        with self._alone():
            self._closed = True
            self._decoding.close()  # before `_updating` is held, since a postprocess may call update()
            with self._updating:
                self._begin(None)
                self.pipe = self._requests.tiny = None
                self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _next_chunk(self) -> Chunk:
        video = self._prepared()
        state = video.state
        if state.early:
            chunk = state.position.history.chunks
            raise RuntimeError(f"chunk {chunk} was given in part: go on with frames(), or flush() the rest of it")
        if frames := state.frames:
            raise RuntimeError(f"{len(frames)} frames of chunk {frames[0].chunk} wait: go on with frames(), or flush() them")
        return self._chunks.next(video, frames=False)

    def _next_frame(self, one_by_one: bool) -> VideoFrame:
        video = self._prepared()
        while not video.state.frames:  # a chunk that is decoded again has given its first images already
            self._chunks.next_frames(video, one_by_one)
        frame, *rest = video.state.frames
        video.state = replace(video.state, frames=tuple(rest))
        return frame

    def _loop(self, draw: Callable[[], T], most: int | None) -> Iterator[T]:
        """Call `draw` again and again, `most` times or until a call begins anew."""
        if most is not None:
            whole_number("most", most, 0, wrong_type=TypeError, most=sys.maxsize)
        start = self._prepared().state.start

        def drawn() -> Iterator[T]:
            while True:
                with self._alone():
                    video = self._prepared()
                    state = video.state
                    if state.start is not start:
                        raise RuntimeError("prepare() or reset() has ended this loop: begin another one")
                    if not state.frames and state.ahead is None and state.failed is None and not video.has_more:
                        return
                    one = draw()
                yield one

        return islice(drawn(), most)

    def _connect(self, prepared: Prepared) -> None:
        """Have what was prepared draw and decode with the modules in force."""
        self._modules.connect(prepared)
        if self._modules.sharded:
            paired = PairedCalls(prepared.adapter.network.call, prepared.adapter)
            prepared.adapter.network.call, self._chunks.network = paired, paired.inside

    def _disconnect(self) -> None:
        """Undo the acceleration."""
        self._modules.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for the chunk that another thread draws. Raises as `_check_outside`."""
        self._check_outside()
        with self._drawing:
            try:
                self._drawn_by = threading.get_ident()
                yield
            finally:
                self._drawn_by = None

    def _check_outside(self) -> None:
        """Raise RuntimeError inside of a chunk that this thread draws or decodes."""
        if self._in_chunk():
            raise RuntimeError("this thread draws or decodes a chunk: only update() and update_prompt() act inside of it")

    def _in_chunk(self) -> bool:
        return self._drawn_by == threading.get_ident() or self._decoding.in_own_thread()

    def _begin(self, video: Video | None) -> None:
        """Draw this one from now on."""
        if self._video is not None:
            self._video.log_dropped()
        self._video = video

    def _prepared(self) -> Video:
        self._check_open()
        if self._video is None:
            raise RuntimeError("call prepare(prompt, ...) first")
        return self._video

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this video stream is closed: make another one of the pipe")
