"""Video pipelines that draw chunk after chunk, as `streamflow.video` uses them.

A chunk is a call of the pipeline itself: it is given what the chunks before have left, and it stops before it decodes. So
every argument acts as in the pipeline's own call, and no line of the pipeline is written again here. SkyReels is the
exception: its chunks share calls of the network.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from streamflow._files import read_json, read_text
from streamflow._grad_mode import computing
from streamflow._validation import check_bool, check_number, whole_number
from streamflow.models.causal_codec import KINDS, CausalCodec, Memory
from streamflow.models.pipe_parts import base_network, cannot_encode, check_placement, missing_text_parts
from streamflow.models.protocols import VAE, Arguments, Call, Pipeline
from streamflow.models.tiny_video import TinyVideoDecoder
from streamflow.models.whole_decoder import WholeDecoder

# Arguments of a pipeline's call that are the stream's own, with the reason.
REFUSED = {
    "num_frames": "a stream has no end: take as many chunks as you need",
    "num_videos_per_prompt": "a stream draws one video",
    "output_type": "pass it to VideoStream(pipe, output_type=...)",
    "return_dict": "a stream gives chunks and frames",
    "latents": "the noise comes from seed= or generator=",
    "callback_on_step_end": "the stream reads the pipeline's tensors with it",
    "callback_on_step_end_tensor_inputs": "the stream reads the pipeline's tensors with it",
}
PARTS = ("transformer", "vae", "scheduler")
PRESET = "call.json"  # in a pipeline's folder: arguments of its call for requests without them
LARGEST = 2**16  # of what is counted in a request: pixels, frames, steps, tokens
TEXTS = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "max_sequence_length")


@dataclass(frozen=True, eq=False)
class History:
    """What the chunks so far leave to the next one. chunks: how many they are. tensors: by the names of the arguments of the
    pipeline's call that take them. memory: of a VAE that decodes every chunk after the one before. carried: what else an
    adapter carries."""

    chunks: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory | None = None
    carried: Any = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A chunk that is not decoded. latents: `[1, C, T, h, w]` as the network draws them. scaled: the same as the VAE takes
    them. images: how many images it decodes to. history: what it leaves to the next chunk."""

    latents: Tensor
    scaled: Tensor
    images: int
    history: History

    @property
    def frames(self) -> int:
        """T: how many latent frames the chunk has."""
        return self.scaled.shape[2]


@dataclass(frozen=True, eq=False)
class VideoPlan:
    """A checked request. given: its arguments, in memory of their own. call: those of the pipeline's call, with embeddings
    in the place of texts."""

    given: Arguments
    call: Arguments


class Undecoded:
    """In the place of a VAE: it encodes as the VAE does, and keeps what it is given to decode."""

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self.latents: Tensor | None = None
        # diffusers walks over all modules for these, and its call asks for them several times
        self.device, self.dtype = _place(vae)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Keep the latents, and return them."""
        self.latents = latents
        return (latents,)


class Redirected(nn.Module):
    """In the place of a module: it is called as `call`, and all else is the module's own.

    plain: the module. call: a function like it; the module itself at first.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(plain=plain, call=plain)  # no child: the module belongs to the pipeline

    plain: nn.Module
    call: Callable[..., Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["plain"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class VideoAdapter(ABC):
    """A loaded video pipeline, called for one chunk at a time. The pipeline stays usable and unchanged.

    fps: frames a second that the model was made for. changeable: the arguments that may change from chunk to chunk, of those
    that the pipeline's call has. read: the names of local variables of that call that `_call` returns. parameters: of that
    call, by name. preset: arguments for requests without them, from the pipeline's folder. vae: the pipeline's. tiny: what
    decodes in its place, or None. network: what the pipeline calls for its network; assigning `network.call` replaces it for
    this adapter alone. decoder: the VAE's, of chunks that are decoded by themselves; likewise. call_decoder: as that of a
    `CausalCodec`, for what is decoded by latent frames. lacks: features that streams of this family do not have, with the
    reason. in_blocks: why only the blocks of the network can be compiled; None: it is a function of tensors.
    breaks: graph breaks are allowed in these blocks.

    Raises:
        ValueError: where made, for a pipeline that is offloaded, whose network has a cache, or with a bad `PRESET` file.
    """

    fps: ClassVar[float]
    changeable: ClassVar[frozenset[str]]
    read: ClassVar[tuple[str, ...]] = ()
    lacks: ClassVar[Mapping[str, str]] = {}
    in_blocks: ClassVar[str | None] = None
    breaks: ClassVar[bool] = False

    def __init__(self, pipe: Pipeline) -> None:
        check_placement(pipe)
        for name in PARTS:
            if getattr(pipe, name, None) is None:
                raise ValueError(f"this {type(pipe).__name__} has no {name}: assign pipe.{name} first")
        if getattr(base_network(pipe.transformer), "is_cache_enabled", False):
            raise ValueError(
                f"this {type(pipe.transformer).__name__} has a cache (enable_cache) that depends on the steps of the chunk "
                f"before: call its disable_cache()"
            )
        self.pipe = pipe
        self.device: torch.device = pipe._execution_device
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        self.preset = _preset(pipe)
        self.vae = pipe.vae
        self.tiny: TinyVideoDecoder | None = None
        self.network, self.decoder = Redirected(pipe.transformer), Redirected(WholeDecoder(pipe.vae))
        self.network.device, self.network.dtype = _place(pipe.transformer)  # as in `Undecoded`
        self.call_decoder: Callable[..., Tensor] | None = None
        self._vae = Undecoded(pipe.vae)
        own = (pipe.transformer, self.network), (pipe.vae, self._vae)
        # modules, their places, and those of their first parameters, which are read faster
        self.placed = [(module, (view.device, view.dtype), _first_place(module)) for module, view in own]
        self._view = copy.copy(pipe)
        vars(self._view).update(
            transformer=self.network,
            vae=self._vae,
            scheduler=copy.deepcopy(pipe.scheduler),
            check_inputs=lambda *_, **__: None,  # `plan` has called the pipeline's own
            maybe_free_model_hooks=lambda: None,
            _callback_tensor_inputs=list(self.read),
            _progress_bar_config={"disable": True},
        )

    def check_placed(self) -> None:
        """Raise RuntimeError where the network or the VAE was moved since this was made. One that was replaced in the
        pipeline is no matter: it acts once an adapter is made of the pipeline again."""
        for module, before, first in self.placed:
            if _first_place(module) != first and (now := _place(module)) != before:
                was, is_now = (f"on {device} in {dtype}" for device, dtype in (before, now))
                raise RuntimeError(
                    f"the {type(module).__name__} was {was} at prepare(), and is {is_now} now: call prepare() anew"
                )

    def use_tiny_vae(self, tiny: TinyVideoDecoder) -> None:
        """Decode with this one in the place of the pipeline's VAE. TypeError or ValueError where it does not fit."""
        if not isinstance(tiny, TinyVideoDecoder):
            raise TypeError(f"the VAE is the pipe's own or a TinyVideoDecoder, not {type(tiny).__name__}")
        pipe, device = self.pipe, next(tiny.parameters()).device
        found = tiny.latent_channels, tiny.pixels, tiny.frames
        needed = pipe.vae.config.z_dim, pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        if found != needed:
            own, other = ("{} channels, {} pixels and {} frames".format(*one) for one in (needed, found))
            raise ValueError(
                f"a latent of this {type(pipe).__name__} has {own}, and one of the tiny VAE {other}: load the file that was "
                f"made for the pipe's VAE"
            )
        if device != self.device:
            raise ValueError(f"the tiny VAE is on {device} and the pipe on {self.device}: call use_tiny_vae() again")
        self.tiny = tiny

    def defaults(self) -> Call:
        """The arguments of the pipeline's call as they are where none is given; None for those that it needs."""
        own = {name: one.default for name, one in self.parameters.items() if name != "self"}
        return {name: None if value is inspect.Parameter.empty else value for name, value in own.items()} | self.preset

    def check_offers(self, feature: str) -> None:
        """Raise NotImplementedError, with the reason, for a feature that a stream of this family does not have."""
        if feature in self.lacks:
            raise NotImplementedError(f"{type(self.pipe).__name__} does not offer {feature}: {self.lacks[feature]}")

    @computing
    def example(self, plan: VideoPlan) -> tuple[Call, Drawn]:
        """The arguments of the last call of the network in a first chunk, and that chunk, drawn by a network that returns
        zeros. The network itself is not called."""
        found: Call = {}

        def record(**given: Any) -> tuple[Tensor]:
            found.update(given)
            return (torch.zeros_like(given["hidden_states"]),)

        drawn = self.draw_first(plan, record, 1)
        return found, drawn

    @computing
    def draw_first(self, plan: VideoPlan, network: Callable[..., Any], chunks: int, history: History | None = None) -> Drawn:
        """Draw the first chunks, or those after `history`, at most so many, with this function in the place of the network.
        Returns the last one."""
        probe = type(self)(self.pipe)  # this one may be drawing
        probe.network.call = network
        most, generator = self.length(plan), torch.Generator(self.device).manual_seed(0)
        drawn = probe.draw(plan, history or History(), generator)
        for _ in range(1, chunks if most is None else min(chunks, most)):
            drawn = probe.draw(plan, drawn.history, generator)
        return drawn

    def warm_up(self, plan: VideoPlan, network: Callable[..., Any]) -> Tensor:
        """Have this function called in all shapes in which chunks call the network. Returns a tensor that it has drawn."""
        return self.draw_first(plan, network, 1).latents

    @abstractmethod
    def draw(self, plan: VideoPlan, history: History, generator: torch.Generator) -> Drawn:
        """Draw the chunk that follows these chunks."""

    @abstractmethod
    def check(self, call: Arguments) -> None:
        """Raise ValueError for what this family cannot stream. `call` has all arguments of the pipeline's call."""

    @computing
    def plan(self, given: Arguments, last: VideoPlan | None = None) -> VideoPlan:
        """Check a request and encode its texts, unless they are those of `last`.

        Raises:
            TypeError, ValueError: for what the pipeline's call or a stream does not take.
        """
        own = {name: _own(value) for name, value in (self.preset | dict(given)).items()}
        kind = type(self.pipe).__name__
        for name in own:
            if name in REFUSED:
                raise ValueError(f"{name} is no argument of a video stream: {REFUSED[name]}")
            if name not in self.parameters:
                taken = sorted(self.parameters.keys() - REFUSED.keys() - {"self", "generator"})
                raise TypeError(f"{kind} takes no {name!r}; it takes {', '.join(taken)}")
        call = self.defaults() | own
        _check_numbers(call, self.pipe.scheduler.config.num_train_timesteps)
        for name in ("image", "video"):
            images = call.get(name)
            if (isinstance(images, Sequence) and not images) or 0 in getattr(images, "shape", ()):
                raise ValueError(f"{name} is {list(getattr(images, 'shape', []))}, and holds no image")
        for name in TEXTS[:2]:
            if call[name] is not None and call[f"{name}_embeds"] is not None:
                raise ValueError(f"pass {name} or {name}_embeds, not both")
        self.pipe.check_inputs(**{name: call[name] for name in inspect.signature(self.pipe.check_inputs).parameters})
        for name in TEXTS[:2]:
            if call[name] is not None and not isinstance(call[name], str):
                raise ValueError(f"{name} is one text, since a stream draws one video, not {call[name]!r}")
        self._check_embeds(call)
        self.check(call)
        if last is not None and all(_same(given.get(name), last.given.get(name)) for name in (*TEXTS, "guidance_scale")):
            texts = {name: last.call[name] for name in TEXTS[2:4]}
        else:
            texts = self._encode(call)
        return VideoPlan(own, {name: value for name, value in own.items() if name not in TEXTS} | texts)

    @computing
    def decode(self, drawn: Drawn, frame: int | None = None) -> tuple[Tensor, History]:
        """The images of a chunk, `[1, 3, T, H, W]` in [-1, 1], and what it leaves to the next chunk once it is decoded.

        frame: the index of the only latent frame to decode, with the history that the frame before it has left. Frame by
        frame the images are the same to the bit. Raises as `frame_decoder`.
        """
        if frame is not None:
            video, memory = self.frame_decoder().decode(self._to_decode(drawn), drawn.history.memory, frame)
            return video, replace(drawn.history, memory=None if frame + 1 == drawn.frames else memory)
        if self.tiny is not None:
            return self.tiny.decode(drawn.latents)[0], drawn.history
        return self.decoder(drawn.scaled), drawn.history

    def frame_decoder(self) -> CausalCodec | TinyVideoDecoder:
        """What decodes a chunk frame by frame.

        Raises:
            NotImplementedError: the VAE is not causal. ValueError: it has tiling.
        """
        if self.tiny is not None:
            return self.tiny
        if not CausalCodec.fits(self.vae):
            raise NotImplementedError(
                f"a chunk is decoded frame by frame by a causal VAE ({' or '.join(KINDS)}), and this "
                f'{type(self.pipe).__name__} has an {type(self.vae).__name__}: use frames(decode="chunk")'
            )
        return CausalCodec(self.vae, self.call_decoder)

    def length(self, plan: VideoPlan) -> int | None:
        """How many chunks can be drawn; None: without end."""
        return None

    def convert(self, video: Tensor, output_type: str) -> Any:
        """What `decode` returns as the pipeline's `output_type`, without the dimension of videos."""
        return self.pipe.video_processor.postprocess_video(video, output_type)[0]

    def scaled(self) -> Tensor:
        """The latents that the last call of the pipeline would have decoded."""
        latents, self._vae.latents = self._vae.latents, None
        assert latents is not None, "the pipeline's call has decoded nothing"
        return latents

    def _to_decode(self, drawn: Drawn) -> Tensor:
        """The latents of a chunk in the scale of what decodes them."""
        return drawn.scaled if self.tiny is None else drawn.latents

    def _call(self, call: Arguments, generator: torch.Generator) -> tuple[Tensor, Call]:
        """Call the pipeline. Returns its latents, and its local variables of the names in `read`."""
        found: Call = {}

        def keep(_: object, step: int, timestep: Tensor, tensors: Call) -> Call:
            found.update(tensors)
            return {}

        latents = self._view(
            **call,
            generator=generator,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=list(self.read),
        )[0]
        return latents, found

    def _encode(self, call: Arguments) -> Call:
        guided = call["guidance_scale"] > 1
        texts = {name: call[name] for name in TEXTS}
        to_encode = texts["prompt"] is not None or (guided and texts["negative_prompt_embeds"] is None)
        if to_encode and (missing := missing_text_parts(self.pipe)):
            raise cannot_encode(self.pipe, missing)
        embeds = self.pipe.encode_prompt(**texts, do_classifier_free_guidance=guided, device=self.device)
        used = embeds if guided else (embeds[0], None)  # AnyFlow's call fails on negative embeddings without guidance
        return {name: None if one is None else one.to(self.device) for name, one in zip(TEXTS[2:4], used, strict=True)}

    def _check_embeds(self, call: Arguments) -> None:
        width = base_network(self.pipe.transformer).config.text_dim
        for name in TEXTS[2:4]:
            embeds = call[name]
            if embeds is None:
                continue
            if not isinstance(embeds, Tensor):
                raise TypeError(f"{name} is a tensor [1, n, {width}], not {type(embeds).__name__}")
            if not embeds.is_floating_point():
                raise TypeError(f"{name} is a floating-point tensor, not {embeds.dtype}")
            if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[1] == 0 or embeds.shape[2] != width:
                raise ValueError(f"{name} is [1, n, {width}], since a stream draws one video, not {list(embeds.shape)}")
            if not torch.isfinite(embeds).all():
                raise ValueError(f"{name} holds NaN or infinite values")


class CausallyDecoded(VideoAdapter):
    """A pipeline that decodes its whole video at once, with a causal VAE: here chunk after chunk, from what the VAE's layers
    keep of the chunks before.

    Raises:
        TypeError, ValueError: where made, for another VAE, or one with tiling.
    """

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__(pipe)
        CausalCodec(pipe.vae)

    def decode(self, drawn: Drawn, frame: int | None = None) -> tuple[Tensor, History]:
        video, memory = self.frame_decoder().decode(self._to_decode(drawn), drawn.history.memory, frame)
        return video, replace(drawn.history, memory=memory)

    def in_scale_of_vae(self, latents: Tensor) -> Tensor:
        """As the pipeline's call ends: in the VAE's dtype and scale."""
        config, latents = self.vae.config, latents.to(self.vae.dtype)
        shape = (1, config.z_dim, 1, 1, 1)
        mean, std = (torch.tensor(one).view(shape).to(latents) for one in (config.latents_mean, config.latents_std))
        return latents / (1.0 / std) + mean


def check_pixels(name: str, images: Tensor, count: int) -> None:
    """Raise ValueError unless these are the finite pixels of one video."""
    if count != 1:
        raise ValueError(f"{name}: a stream draws one video, and these are {count} of them")
    if images.shape[1] != 3:
        raise ValueError(f"{name} has {images.shape[1]} channels, and the VAE takes 3: pass RGB, as by image.convert('RGB')")
    if not torch.isfinite(images).all():
        raise ValueError(f"{name} holds NaN or infinite values")


def _preset(pipe: Pipeline) -> Call:
    """What `PRESET` holds in the folder that this pipeline was loaded from; nothing where there is no such file. ValueError:
    it holds no object of JSON."""
    folder = pipe.name_or_path
    if folder is None or not (file := Path(folder) / PRESET).is_file():
        return {}
    try:
        found = read_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds arguments of a pipeline's call by their names, not a {type(found).__name__}")
    return found


def _place(module: Any) -> tuple[torch.device, torch.dtype]:
    """A model's device and dtype. Its own `device` would look for modules offloaded by groups, which are refused."""
    return next(module.parameters()).device, module.dtype


def _first_place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of its first parameter, without those that `from_pretrained` keeps in float32. For the
    module's own `device` and `dtype` diffusers walks over all of them."""
    kept: Sequence[str] = getattr(module, "_keep_in_fp32_modules", None) or ()
    first = next(one for name, one in module.named_parameters() if not any(part in name for part in kept))
    return first.device, first.dtype


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _check_numbers(call: Arguments, trained: int) -> None:
    """TypeError or ValueError for what no pipeline takes. trained: timesteps that the schedule has."""
    check_number("guidance_scale", call["guidance_scale"])
    if call["guidance_scale"] is None:
        raise TypeError("guidance_scale must be a number, not None: 1 is without guidance")
    sizes = "height width num_inference_steps num_latent_frames_per_chunk max_sequence_length base_num_frames fps"
    for name in sizes.split():
        if name in call:
            check_count(name, call[name])
    for name, value in call.items():
        if name.startswith("add_noise_to_") or name == "use_mean_velocity":
            check_bool(name, value)
        elif name.endswith(("_sigma_min", "_sigma_max")):
            check_between(name, value, 0, 1)
    for name, most in (("sigmas", 1), ("timesteps", trained)):
        if call.get(name) is not None:
            _check_levels(name, call[name], most)
    if not isinstance(call.get("attention_kwargs"), Mapping | None):
        raise TypeError(f"attention_kwargs is a mapping or None, not {type(call['attention_kwargs']).__name__}")


def check_count(name: str, value: object, least: int = 1, unit: str = "an integer") -> None:
    """TypeError or ValueError unless this is an integer from `least` to `LARGEST`. unit: "integers" for one of a list."""
    whole_number(name, value, least, unit, wrong_type=TypeError, most=LARGEST)


def check_between(name: str, value: Any, least: float, most: float) -> None:
    """TypeError or ValueError unless this is a number in these bounds."""
    check_number(name, value)
    if value is None or not least <= value <= most:
        raise ValueError(f"{name} is a number from {least} to {most}, not {value}")


def _check_levels(name: str, value: Any, most: float) -> None:
    """TypeError or ValueError unless these are one number or more, in one dimension, from 0 to `most`."""
    try:
        numbers = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is a list of numbers, not {value!r}") from error
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(f"{name} is a list of one number or more, not {value!r}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    if not ((numbers >= 0) & (numbers <= most)).all():
        raise ValueError(f"{name} are from 0 to {most}, and these are from {numbers.min():g} to {numbers.max():g}")
