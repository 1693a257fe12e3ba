"""AnyFlow's causal network: every chunk is drawn under all chunks before it, of which the older ones are compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from streamflow._grad_mode import computing
from streamflow.models.protocols import Arguments, Pipeline
from streamflow.models.video import CausallyDecoded, Drawn, History, VideoPlan, check_count

WARM_UP = 4  # chunks that are compiled after the first `full_chunk_limit` ones, before which nothing is compressed
PADDED = 128  # the network attends to its past in tokens padded to a multiple of this


class _ChunkDrawn(Exception):
    """Ends a call of the pipeline once the chunk is drawn."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("the chunk is drawn")
        self.latents = latents


class AnyFlowFAR(CausallyDecoded):
    """`AnyFlowFARPipeline`. A video has an end, since the network has positions for `rope_max_seq_len` latent frames, and
    what is carried grows by a chunk each time.

    The first chunk has as many latent frames as the first number of `chunk_partition`, every other as many as the second.
    Noise is drawn chunk by chunk: a stream equals the pipeline's call with these draws as its `latents`.

    A chunk is a call of the pipeline with all latents so far as `video_latents`. The pipeline computes keys and values of
    the whole past after every chunk. Only the last ones count, and the others are not computed here.
    """

    fps = 16.0
    lacks = {"guidance_on": "its network is called once for both prompts"}
    in_blocks = "its network writes keys and values into Python dictionaries that grow with the video"
    changeable = frozenset(
        "prompt negative_prompt prompt_embeds negative_prompt_embeds max_sequence_length guidance_scale attention_kwargs "
        "num_inference_steps sigmas timesteps use_mean_velocity".split()
    )

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__(pipe)
        self._encode_kv_cache = self._view.encode_kv_cache

    def check(self, call: Arguments) -> None:
        if call["use_kv_cache"] is not True:
            raise ValueError("use_kv_cache must be True: the pipeline draws no second chunk without it")
        partition = call["chunk_partition"]
        if partition is not None:
            if not isinstance(partition, Sequence) or not partition:
                raise ValueError(f"chunk_partition is a list of latent frames a chunk, not {partition!r}")
            for one in partition:
                check_count("chunk_partition", one, unit="integers")
            if any(one != partition[min(k, 1)] for k, one in enumerate(partition)):
                raise ValueError(f"the chunks of a stream have one size after the first, and chunk_partition is {partition}")
        given = call["video_latents"]
        for name in ("video", "video_latents"):
            video = call[name]
            if video is None:
                continue
            size = tuple(self._size(call).values())
            shape = [3]
            if name == "video_latents":
                factor = self.pipe.vae_scale_factor_spatial
                shape = [self.pipe.transformer.config.in_channels, *(side // factor for side in size)]
            found = list(video.shape) if isinstance(video, Tensor) else type(video).__name__
            if not isinstance(video, Tensor) or video.ndim != 5 or [len(video), *found[2:]][: 1 + len(shape)] != [1, *shape]:
                raise ValueError(f"{name} is a tensor of one video, [1, T, {', '.join(map(str, shape))}], not {found}")
            if not torch.isfinite(video).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        if call["video"] is not None:
            given = call["video"][:, :: self.pipe.vae_scale_factor_temporal]
        if given is not None and self._chunks_of(call, given.shape[1]) is None:
            sizes = ", ".join(map(str, accumulate(self._sizes(call, 4))))
            raise ValueError(f"the video has {given.shape[1]} latent frames, and whole chunks are {sizes}, ... of them")
        if self._left(call, 0 if given is None else given.shape[1]) < 1:
            least, most = self._sizes(call, 1)[0], self.pipe.transformer.config.rope_max_seq_len
            before = f" after the {given.shape[1]} of the video" if given is not None else ""
            raise ValueError(
                f"the network has positions for {most} latent frames, and no chunk of {least} fits{before}: pass smaller "
                f"chunks or a shorter video"
            )
        self._check_compressed(call)

    def _check_compressed(self, call: Arguments) -> None:
        """The network compresses all chunks but its last ones, by patches that have to fit into an image."""
        config, factor = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        if self._left(call, 0) <= config.full_chunk_limit:
            return
        for (name, size), patch in zip(self._size(call).items(), config.compressed_patch_size[1:], strict=True):
            if size // factor < patch:
                raise ValueError(
                    f"{name} {size} is {size // factor} latents, and from chunk {config.full_chunk_limit} on the network "
                    f"compresses the first chunks by {patch} latents: pass {name}={patch * factor} or more"
                )

    @computing
    def plan(self, given: Arguments, last: VideoPlan | None = None) -> VideoPlan:
        plan = super().plan(given, last)
        if plan.call.get("video") is None:
            return plan
        call = dict(plan.call)
        video = call.pop("video")
        if last is not None:
            call["video_latents"] = last.call["video_latents"]  # an update changes no video
        else:
            call["video_latents"] = self.pipe.encode_video(video, **self._size(call))
        return replace(plan, call=call)

    def warm_up(self, plan: VideoPlan, network: Callable[..., Any]) -> Tensor:
        """The first chunks, and a later one of each kind that torch compiles anew: under a past that is padded to another
        length, and under one that is not padded, up to three times as far."""
        call = plan.call
        drawn = self.draw_first(plan, network, self.pipe.transformer.config.full_chunk_limit + WARM_UP)
        latents = drawn.history.tensors["video_latents"]
        begun = self._chunks_of(call, latents.shape[1]) or 0
        before, *later = (self._tokens(call, n) for n in range(begun - 1, min(3 * begun, self._left(call, 0))))
        longer = [n for n, one in enumerate(later, begun) if one % PADDED and one // PADDED != (before - 1) // PADDED]
        whole = [n for n, one in enumerate(later, begun) if one % PADDED == 0]
        for n in longer[:1] + whole[:1]:
            past = latents.new_zeros(1, sum(self._sizes(call, n)), *latents.shape[2:])
            drawn = self.draw_first(plan, network, 1, History(n, {"video_latents": past}))
        return drawn.latents

    def _tokens(self, call: Arguments, chunks: int) -> int:
        """How many tokens so many chunks are, of which the last ones are not compressed."""
        config, factor = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        sizes, height, width = self._sizes(call, chunks), *(side // factor for side in self._size(call).values())
        full, small = (
            (height // patch[1]) * (width // patch[2]) for patch in (config.patch_size, config.compressed_patch_size)
        )
        compressed = max(chunks - config.full_chunk_limit + 1, 0)
        return sum(sizes[:compressed]) * small + sum(sizes[compressed:]) * full

    def length(self, plan: VideoPlan) -> int:
        given = plan.call.get("video_latents")
        return self._left(plan.call, 0 if given is None else given.shape[1])

    def _left(self, call: Arguments, frames: int) -> int:
        """How many chunks can follow so many latent frames."""
        first, other = self._sizes(call, 2)
        return 1 + (self.pipe.transformer.config.rope_max_seq_len - first) // other - (self._chunks_of(call, frames) or 0)

    def draw(self, plan: VideoPlan, history: History, generator: torch.Generator) -> Drawn:
        call = dict(plan.call)
        past = history.tensors.get("video_latents", call.get("video_latents"))
        frames = 0 if past is None else past.shape[1]
        index = self._chunks_of(call, frames) or 0
        config = self.pipe.transformer.config
        sizes = self._sizes(call, max(index + 2, config.full_chunk_limit - 1))  # one more, before which the call ends
        factor = self.pipe.vae_scale_factor_temporal
        noise = self.pipe.prepare_latents(
            1,
            config.in_channels,
            num_frames=(sizes[index] - 1) * factor + 1,
            dtype=torch.float32,
            device=self.device,
            generator=generator,
            **self._size(call),
        )
        latents = noise.new_zeros(*noise.shape[:2], sum(sizes), *noise.shape[3:])
        latents[:, :, frames : frames + sizes[index]] = noise
        call.update(video_latents=past, latents=latents, chunk_partition=sizes, num_frames=(sum(sizes) - 1) * factor + 1)
        drawn = self._until_drawn(call, index, generator)[:, : frames + sizes[index]]
        first = 0 if history.chunks == 0 else frames  # the given video leaves with the first chunk
        own = drawn[:, first:].permute(0, 2, 1, 3, 4)
        images = own.shape[2] * factor - (factor - 1 if history.chunks == 0 else 0)
        left = replace(history, chunks=history.chunks + 1, tensors={"video_latents": drawn.clone()})
        return Drawn(own.clone(), self.in_scale_of_vae(own), images, left)

    def _until_drawn(self, call: Arguments, index: int, generator: torch.Generator) -> Tensor:
        """Call the pipeline until chunk `index` is drawn. Returns the latents up to there, `[1, T, C, h, w]`."""

        def encode(kv_cache: Any, kv_cache_flag: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if kwargs["chunk_idx"] == index:
                raise _ChunkDrawn(kwargs["output"])
            if kwargs["chunk_idx"] == index - 1:
                return self._encode_kv_cache(kv_cache, kv_cache_flag, *args, **kwargs)
            kv_cache_flag["num_cached_chunks"] += 1
            return kv_cache

        vars(self._view)["encode_kv_cache"] = encode
        try:
            self._call(call, generator)
        except _ChunkDrawn as done:
            return done.latents
        raise RuntimeError(f"the pipeline's call has ended before chunk {index}")

    def _size(self, call: Arguments) -> dict[str, int]:
        return {name: call.get(name, self.parameters[name].default) for name in ("height", "width")}

    def _sizes(self, call: Arguments, count: int) -> list[int]:
        """The latent frames of the first `count` chunks."""
        partition = call.get("chunk_partition") or self.pipe.transformer.config.chunk_partition
        return [partition[min(k, 1, len(partition) - 1)] for k in range(count)]

    def _chunks_of(self, call: Arguments, frames: int) -> int | None:
        """How many chunks have this many latent frames; None: no whole number of chunks."""
        first, other = self._sizes(call, 2)
        if frames < first:
            return 0 if frames == 0 else None
        return None if (frames - first) % other else 1 + (frames - first) // other
