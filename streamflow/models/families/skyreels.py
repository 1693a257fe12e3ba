"""SkyReels-V2 with diffusion forcing: a ring of blocks along the time axis, each at its own step of the schedule."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor, _get_qkv_projections
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from streamflow._validation import check_bool
from streamflow.models.pipe_parts import base_network
from streamflow.models.protocols import Arguments, Call, Pipeline
from streamflow.models.video import CausallyDecoded, Drawn, History, VideoPlan, check_between, check_count, check_pixels

KEEP = "use_kv_cache"  # an argument of ours, beside those of the pipeline's call
EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys and values of self-attention under one prompt. layers: two tensors `[1, tokens of a window, heads, d]` for each
    layer. frames: of how many frames they are final; behind these they are overwritten in every step."""

    embeds: Tensor
    frames: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(eq=False)
class _Window:
    """The frames that are denoised together. latents: `[1, C, T, h, w]`, float32. times: the timestep of each frame in each
    step, `[steps, T]`. active: of each step, the first frame that it changes and the end. ready: how many frames the window
    began with. video: images `[1, 3, n, H, W]` before those of the first chunk. steps: those taken. given: how many frames
    are in a chunk. last: the last latents of the chunks so far, with which the next window begins. schedulers: of the blocks
    that are denoised, by their first frames. keys: by the names of the embeddings."""

    latents: Tensor
    times: Tensor
    active: list[tuple[int, int]]
    ready: int
    video: Tensor | None = None
    steps: int = 0
    given: int = 0
    last: Tensor | None = None
    schedulers: dict[int, Any] = field(default_factory=dict)
    keys: dict[str, _Keys] = field(default_factory=dict)

    def copy(self) -> _Window:
        """One to draw on, so that this one stays as it is."""
        schedulers = copy.deepcopy(self.schedulers)
        return replace(self, latents=self.latents.clone(), schedulers=schedulers, keys=dict(self.keys), video=None)


@dataclass(frozen=True)
class _Sizes:
    """In latent frames."""

    block: int
    window: int
    overlap: int


class SkyReels(CausallyDecoded):
    """`SkyReelsV2DiffusionForcingPipeline`, and those from an image and from a video.

    A chunk is a block of `causal_block_size` latent frames. It leaves as soon as its last step is done, while the blocks
    after it, `ar_step` steps behind each other, are still denoised. Window follows window as in the pipeline's call for long
    videos: the next one begins with the last `overlap_history` frames. What is carried is one window.

    Without `use_kv_cache` the network is called on the whole window, as the pipeline calls it. With it, it is called on the
    blocks that are denoised, under keys and values of the finished ones. These are exact where a block does not see the
    blocks after it (`causal_block_size` above 1), and where no noise is added to what is finished.
    """

    fps = 24.0
    lacks = dict.fromkeys(
        ("guidance_on", "viewers"), "the attention of its network is set from outside for the blocks of each chunk"
    )
    in_blocks = lacks["viewers"]
    breaks = True  # `_UnderKeys`: streams of one pipe, with and without kept keys, call the same blocks
    changeable = frozenset(
        "prompt negative_prompt prompt_embeds negative_prompt_embeds max_sequence_length guidance_scale".split()
    )

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__(pipe)
        self._dtype: torch.dtype = pipe.transformer.dtype
        self._own_block = base_network(pipe.transformer).config.num_frame_per_block
        own = inspect.Parameter(KEEP, inspect.Parameter.KEYWORD_ONLY, default=False)
        self.parameters = {**self.parameters, KEEP: own}

    def defaults(self) -> Call:
        return {**super().defaults(), "num_frames": 1}  # the pipeline's own makes `check_inputs` speak of it

    # -- what can be drawn ----------------------------------------------------------------------------------------------

    def check(self, call: Arguments) -> None:
        check_bool(KEEP, call[KEEP])
        check_between("addnoise_condition", call["addnoise_condition"], 0, 1000)
        check_count("ar_step", call["ar_step"], 0)
        for name in ("causal_block_size", "overlap_history"):
            if call[name] is not None:
                check_count(name, call[name])
        if call["overlap_history"] is None:
            raise ValueError(
                "a video without end is drawn window after window: pass overlap_history=17 or 37, the frames that a window "
                "takes from the one before it"
            )
        sizes = self._sizes(call)
        for name, frames in (("base_num_frames", sizes.window), ("overlap_history", sizes.overlap)):
            if frames % sizes.block:
                raise ValueError(
                    f"{name} {call[name]} is {frames} latent frames, which are no whole number of blocks of {sizes.block}: "
                    f"pass {name}={self._frames_near(frames, sizes.block)} or another causal_block_size"
                )
        if sizes.overlap >= sizes.window:
            raise ValueError(
                f"overlap_history {call['overlap_history']} is {sizes.overlap} latent frames, and base_num_frames "
                f"{call['base_num_frames']} is {sizes.window}: nothing would be left to draw in a window"
            )
        self._check_positions(call, sizes)
        if call[KEEP]:
            self._check_keys(call, sizes)
        self._scheduler(call)
        self._check_start(call, sizes)

    def _frames_near(self, frames: int, block: int) -> int:
        """The number of images of whole blocks, one at least."""
        return (max(frames // block, 1) * block - 1) * self.pipe.vae_scale_factor_temporal + 1

    def _check_positions(self, call: Arguments, sizes: _Sizes) -> None:
        config = base_network(self.pipe.transformer).config
        factor = self.pipe.vae_scale_factor_spatial
        latent = (sizes.window, call["height"] // factor, call["width"] // factor)
        names = ("base_num_frames", "height", "width")
        for name, size, patch in zip(names, latent, config.patch_size, strict=True):
            if size // patch > config.rope_max_seq_len:
                raise ValueError(
                    f"{name} {call[name]} needs {size // patch} positions, and the network has {config.rope_max_seq_len}"
                )

    def _check_keys(self, call: Arguments, sizes: _Sizes) -> None:
        if sizes.block == 1:
            raise ValueError(
                f"{KEEP} needs causal_block_size=2 or more: with 1 every frame sees all frames of its window, so that the "
                f"keys of finished frames depend on later ones"
            )
        if call["addnoise_condition"] > 0:
            raise ValueError(
                f"{KEEP} needs addnoise_condition=0, not {call['addnoise_condition']}: the noise on finished frames is "
                f"another one in every step"
            )
        for attention in _self_attention(self.pipe.transformer):
            kind: Any = type(attention.processor)  # that of `attention="fa3"` has the same code
            if getattr(vars(kind).get("__call__"), "__code__", None) is not SkyReelsV2AttnProcessor.__call__.__code__:
                raise ValueError(f"{KEEP} needs diffusers' own SkyReelsV2AttnProcessor in the network, not {kind.__name__}")

    def _check_start(self, call: Arguments, sizes: _Sizes) -> None:
        """The image or the video, which the pipeline's own processor reads."""
        if call.get("last_image") is not None:
            raise ValueError("last_image is the end of the last window, and a video without end has none")
        if call.get("image_embeds") is not None:
            raise ValueError("image_embeds is read by no pipeline of diffusers 0.42: pass image")
        least = (sizes.block - 1) * self.pipe.vae_scale_factor_temporal + 1
        if "image" in call:
            if sizes.block > 1:
                raise ValueError(
                    f"from an image, causal_block_size is 1, not {sizes.block}: diffusers 0.42 draws over the image of a "
                    f"larger block. Its pipeline from a video takes such blocks: pass it the image {least} times"
                )
            image = self._image(call)
            check_pixels("image", image, len(image))
        if "video" in call:
            if call["video"] is None:
                raise ValueError(f"{type(self.pipe).__name__} goes on from a video: pass video=")
            video = self._video(call)
            check_pixels("video", video, len(video))
            if video.shape[2] < least:
                raise ValueError(f"video has {video.shape[2]} frames, and a block is {least}: pass {least} or more")

    def warm_up(self, plan: VideoPlan, network: Callable[..., Any]) -> Tensor:
        """One call in each shape, in the first window and in the next one, which begins under frames of the first: with one
        prompt, and with another one for each chunk, which drops kept keys."""
        sizes = self._sizes(self.defaults() | dict(plan.call))
        outputs: dict[tuple[torch.Size, torch.Size], Tensor] = {}

        def call(**given: Any) -> tuple[Tensor]:
            x = given["hidden_states"]
            shapes = x.shape, given["encoder_hidden_states"].shape
            if shapes not in outputs:
                outputs[shapes] = network(**given)[0]
            return (torch.zeros_like(x),)  # later outputs are under keys that no call has set

        chunks = (2 * sizes.window - sizes.overlap) // sizes.block
        self.draw_first(plan, call, chunks)
        history = None
        for _ in range(chunks if plan.call.get(KEEP) else 0):
            embeds = {name: one.clone() for name in EMBEDS if (one := plan.call[name]) is not None}
            history = self.draw_first(replace(plan, call={**plan.call, **embeds}), call, 1, history).history
        return next(iter(outputs.values()))

    # -- one chunk ------------------------------------------------------------------------------------------------------

    def draw(self, plan: VideoPlan, history: History, generator: torch.Generator) -> Drawn:
        call = self.defaults() | dict(plan.call)
        sizes = self._sizes(call)
        window = history.carried
        if window is None or window.given == sizes.window:
            window = self._next_window(call, sizes, window, generator)
        else:
            window = window.copy()
        end = window.given + sizes.block
        with self._attending(sizes.block):
            while window.steps < len(window.active) and window.active[window.steps][0] < end:
                self._step(call, sizes, window, generator)
        if not torch.isfinite(window.latents).all():
            raise FloatingPointError(
                f"chunk {history.chunks}, or a block that is denoised with it, holds NaN or infinite values. The next call "
                f"draws it again: change the prompt, the guidance scale or the seed with update(), or the dtype of the pipe"
            )
        latents = window.latents[:, :, window.given : end].clone()
        last = latents if window.last is None else torch.cat([window.last, latents], dim=2)
        window.given, window.last = end, last[:, :, -sizes.overlap :].clone()
        images = sizes.block * self.pipe.vae_scale_factor_temporal
        if history.chunks == 0:
            images += 1 - self.pipe.vae_scale_factor_temporal + (0 if window.video is None else window.video.shape[2])
        left = replace(history, chunks=history.chunks + 1, carried=window)
        return Drawn(latents, self.in_scale_of_vae(latents), images, left)

    def decode(self, drawn: Drawn, frame: int | None = None) -> tuple[Tensor, History]:
        video, history = super().decode(drawn, frame)
        before = None if frame else drawn.history.carried.video
        return video if before is None else torch.cat([before.to(video.device), video.to(before.dtype)], dim=2), history

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _next_window(self, call: Call, sizes: _Sizes, before: _Window | None, generator: torch.Generator) -> _Window:
        """The window that follows, with the noise of its blocks, as the pipeline prepares it."""
        video = self._video(call) if before is None and "video" in call else None
        given = {
            "batch_size": 1,
            "num_channels_latents": base_network(self.pipe.transformer).config.in_channels,
            "height": call["height"],
            "width": call["width"],
            "num_frames": 3 * sizes.window * self.pipe.vae_scale_factor_temporal,  # more than two whole windows
            "dtype": torch.float32,
            "device": self.device,
            "generator": generator,
            "image": self._image(call) if before is None and "image" in call else None,
            "video": video,
            "video_latents": None if before is None else before.last,
            "base_latent_num_frames": sizes.window,
            "overlap_history": call["overlap_history"],
            "overlap_history_latent_frames": sizes.overlap,
            "causal_block_size": sizes.block,
            "long_video_iter": 0 if before is None else 1,
        }
        taken = inspect.signature(self._view.prepare_latents).parameters
        latents, frames, start, ready = self._view.prepare_latents(**{n: one for n, one in given.items() if n in taken})
        if ready:
            latents[:, :, :ready] = start.to(self._dtype)
        timesteps = self._scheduler(call).timesteps
        times, _, changed, _ = self._view.generate_timestep_matrix(
            frames, timesteps, frames, call["ar_step"], ready, sizes.block
        )
        spans = [row.nonzero().flatten().tolist() for row in changed]
        window = _Window(latents, times, [(span[0], span[-1] + 1) for span in spans], ready, video=video)
        if before is not None:
            window.given, window.last = sizes.overlap, before.last
        return window

    def _step(self, call: Call, sizes: _Sizes, window: _Window, generator: torch.Generator) -> None:
        """One step of every block that is denoised."""
        first, end = window.active[window.steps]
        x = window.latents.to(self._dtype, copy=True)
        times = window.times[window.steps : window.steps + 1].clone()
        if call["addnoise_condition"] > 0 and window.ready:
            noise, clean = 0.001 * call["addnoise_condition"], x[:, :, : window.ready]
            drawn = randn_tensor(clean.shape, generator=generator, device=self.device, dtype=x.dtype)
            x[:, :, : window.ready] = clean * (1.0 - noise) + drawn * noise
            times[:, : window.ready] = call["addnoise_condition"]
        v = self._velocity(call, sizes, window, EMBEDS[0], x, times)
        if call["guidance_scale"] > 1:
            unguided = self._velocity(call, sizes, window, EMBEDS[1], x, times)
            v = unguided + call["guidance_scale"] * (v - unguided)
        for start in range(first, end, sizes.block):
            frames = slice(start, start + sizes.block)
            scheduler = window.schedulers.pop(start, None) or self._scheduler(call)
            window.latents[:, :, frames] = scheduler.step(
                v[:, :, start - first : start - first + sizes.block],
                window.times[window.steps, start],
                window.latents[:, :, frames],
                return_dict=False,
            )[0]
            window.schedulers[start] = scheduler
        window.steps += 1
        begun = window.active[window.steps : window.steps + 1]
        window.schedulers = {start: one for start, one in window.schedulers.items() if begun and start >= begun[0][0]}

    def _velocity(self, call: Call, sizes: _Sizes, window: _Window, name: str, x: Tensor, times: Tensor) -> Tensor:
        """What the network gives for the frames that this step changes, under the embeddings of this name."""
        first, end = window.active[window.steps]
        embeds, network = call[name], self._view.transformer
        arguments = {
            "encoder_hidden_states": embeds.to(self._dtype),
            "enable_diffusion_forcing": True,
            "fps": [0 if call["fps"] == 16 else 1],
            "attention_kwargs": call["attention_kwargs"],
            "return_dict": False,
        }
        if not call[KEEP]:
            return network(hidden_states=x, timestep=times, **arguments)[0][:, :, first:end]
        keys = window.keys.get(name)
        if keys is None or keys.embeds is not embeds:
            keys = _Keys(embeds)
        part = slice(keys.frames, end)
        with self._under(keys, x, end, sizes.block):
            v = network(hidden_states=x[:, :, part], timestep=times[:, part], **arguments)[0]
        window.keys[name] = replace(keys, frames=first)
        return v[:, :, first - keys.frames :]

    def _scheduler(self, call: Arguments) -> Any:
        """The scheduler of a block that begins."""
        scheduler = copy.deepcopy(self._view.scheduler)
        scheduler.set_timesteps(call["num_inference_steps"], device=self.device)
        return scheduler

    def _sizes(self, call: Arguments) -> _Sizes:
        factor = self.pipe.vae_scale_factor_temporal
        window, overlap = ((call[name] - 1) // factor + 1 for name in ("base_num_frames", "overlap_history"))
        return _Sizes(call["causal_block_size"] or self._own_block, window, overlap)

    def _image(self, call: Arguments) -> Tensor:
        image = self.pipe.video_processor.preprocess(call["image"], height=call["height"], width=call["width"])
        return image.to(self.device, torch.float32)

    def _video(self, call: Arguments) -> Tensor:
        video = self.pipe.video_processor.preprocess_video(call["video"], height=call["height"], width=call["width"])
        return video.to(self.device, torch.float32)

    @contextmanager
    def _attending(self, block: int) -> Iterator[None]:
        """Inside, a block of so many frames sees itself and the blocks before it; one frame sees all. The pipeline's call
        leaves this set."""
        network: Any = base_network(self._view.transformer)
        before = network.config.num_frame_per_block
        network._set_ar_attention(block)
        try:
            yield
        finally:
            network._set_ar_attention(before)

    @contextmanager
    def _under(self, keys: _Keys, x: Tensor, end: int, block: int) -> Iterator[None]:
        """Inside, the network draws the frames from `keys.frames` to `end` under the keys of all frames before `end`."""
        network: Any = base_network(self._view.transformer)
        window = network.rope(x)
        tokens = window[0].shape[1] // x.shape[2]
        blocks = [slice(start * tokens, (start + block) * tokens) for start in range(keys.frames, end, block)]
        # copies, since compiled code depends on where a view begins
        rotations = [one[:, blocks[0].start : blocks[-1].stop].clone() for one in window]
        layers = _self_attention(network)
        before = [attention.processor for attention in layers]
        for k, attention in enumerate(layers):
            attention.set_processor(_UnderKeys(before[k], keys.layers, k, window[0].shape[1], rotations, blocks))
        try:
            yield
        finally:
            for attention, processor in zip(layers, before, strict=True):
                attention.set_processor(processor)


class _UnderKeys:
    """In the place of a layer's `SkyReelsV2AttnProcessor`, for self-attention: the tokens of these blocks of a window are
    drawn under those before them, of which `layers[k]` has the keys and values. Each block is a call of its own without a
    mask, which no fused attention kernel takes."""

    def __init__(
        self,
        own: SkyReelsV2AttnProcessor,
        layers: dict[int, tuple[Tensor, Tensor]],
        k: int,
        tokens: int,
        rotations: Sequence[Tensor],
        blocks: Sequence[slice],
    ) -> None:
        dispatch = type(own).__call__.__globals__["dispatch_attention_fn"]  # `attention="fa3"` replaces it there
        self._dispatch = partial(dispatch, backend=own._attention_backend, parallel_config=own._parallel_config)
        self._layers, self._k, self._tokens, self._rotations, self._blocks = layers, k, tokens, rotations, blocks
        self._part = slice(blocks[0].start, blocks[-1].stop)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None, attention_mask: object, rotary_emb: object
    ) -> Tensor:
        query, key, value = _get_qkv_projections(attn, hidden_states, hidden_states)
        query, key, value = (one.unflatten(2, (attn.heads, -1)) for one in (attn.norm_q(query), attn.norm_k(key), value))
        query, key = (_rotated(one, *self._rotations) for one in (query, key))
        out = self._attend(query, key, value).flatten(2, 3).type_as(query)
        for module in attn.to_out:
            out = module(out)
        return out

    @torch.compiler.disable()  # torch would compile it anew for each place in the window
    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep keys and values, `[1, n, heads, d]`, and return the attention of the queries."""
        if self._k not in self._layers:
            whole = [one.new_empty(1, self._tokens, *one.shape[2:]) for one in (key, value)]
            self._layers[self._k] = (whole[0], whole[1])
        keys, values = self._layers[self._k]
        keys[:, self._part], values[:, self._part] = key, value
        queries = query.split([block.stop - block.start for block in self._blocks], dim=1)
        before = [(keys[:, : block.stop], values[:, : block.stop]) for block in self._blocks]
        return torch.cat([self._dispatch(one, *seen) for one, seen in zip(queries, before, strict=True)], dim=1)


def _self_attention(network: Any) -> list[Any]:
    network = base_network(network)
    return [block.attn1 for block in network.blocks]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[1, n, heads, d]` turned by its positions: pairs of neighbours as complex numbers."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2).type_as(x)
