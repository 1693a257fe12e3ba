"""Any diffusers pipeline, without an adapter: every frame is a call of the unmodified pipeline, stopped wherever it calls
its network. A tick answers what all frames under way have asked, with one call of the network where that can be, and lets
each run on to its next one, so that frames at different steps advance together and one leaves a tick. The solver, the
guidance and the decoding are the pipeline's own; nothing is known of its conventions.

What that costs: the pipeline's Python for every frame, one call of the network a tick where an adapter merges the two of a
step's guidance (then a frame takes twice as many ticks), and whatever needs a look inside: see `Rendezvous.lacks`.
"""

from __future__ import annotations

import copy
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.conditioning.prompt import Cond, Prompt
from streamflow.flow.schedule import Schedule, Stages
from streamflow.flow.solvers import EULER, Rule
from streamflow.models.adapter import FlowAdapter
from streamflow.models.codec import Codec
from streamflow.models.fallback.merged_calls import OneByOne, Together
from streamflow.models.pipeline_kinds import check_drawable
from streamflow.models.probe import encoding, once

# Arguments that every call gets, where the pipeline takes them: the size that was asked for is the size that is drawn.
ALWAYS = {"use_resolution_binning": False, "return_dict": False}
OWN = ("scheduler", "guider")  # components that change while they draw, so that every frame has its own
PACKAGES = {"PRXPipeline": "ftfy"}  # what a pipeline's module imports, where it is installed, to clean prompts
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True, eq=False)
class Asked(Prompt):
    """What a frame's call of the pipeline gets. `arguments`: all but its noise; `texts`: prompts already encoded."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole(Schedule):
    """The schedule that the pipeline's scheduler shows, whatever it is; frames take all of its steps."""

    def __post_init__(self) -> None:
        """The scheduler steps along it, so nothing is asked of it here."""

    def pick(self, t_index_list: Sequence[int]) -> Stages:
        if list(t_index_list) != list(range(len(self))):
            raise ValueError(
                f"family 'rendezvous' draws with whole calls of the pipeline, which take all {len(self)} steps, not "
                f"t_index_list {list(t_index_list)}: leave it out and set num_inference_steps"
            )
        return super().pick(t_index_list)


class _Reached(Exception):
    """Raised in place of the scheduler's first step; never leaves this module."""

    def __init__(self, scheduler: Any, sample: Tensor):
        super().__init__()
        self.scheduler, self.sample = scheduler, sample


def frame_generator(latents: Tensor) -> torch.Generator:
    """The generator of the frame that starts from these latents, on the CPU, for pipelines that draw more noise on the
    way: a function of the latents alone."""
    return torch.Generator().manual_seed(zlib.crc32(latents.detach().float().cpu().contiguous().numpy().tobytes()))


class Rendezvous(FlowAdapter):
    """The adapter of pipelines that have none. `cfg_type` is "full", the pipeline as its arguments say, or "none", the
    same with a `guidance_scale` (or `true_cfg_scale`) of 1. Frames are the same whatever else is under way; a frame is drawn
    from the stream's noise as every other family's, and what its pipeline draws on the way from `frame_generator`."""

    Velocity = Together
    engine = "pipeline_calls"
    guidance_argument = None
    exportable = False
    row_inputs = ()
    embeds: Mapping[str, str] = {}
    lacks = {
        "accelerate": "compile the pipeline's network yourself, pipe.transformer.compile(), which frames then share",
        "on_step": "pass callback_on_step_end, the pipeline's own, to prepare",
        "stages": "call predict_x0_batch, which takes a frame through one tick",
        "update now": "frames under way keep what they began with: pass scope='frame'",
        "images": "only frames drawn from noise can be streamed: use a family with an adapter",
        "shard_denoiser": "run a stream on each device",
        "blending": "update the prompt with scope='frame'",
    }

    def __init__(self, pipe: Any):
        check_drawable(type(pipe))
        self.network = _network_name(pipe)
        self._texts: dict[str, Any] = {}
        self._basis: Mapping[str, Any] = {"prompt": ""}  # what the pipeline is asked with where the prompt does not matter
        super().__init__(pipe)
        for name in ("vae", "image_processor"):
            if getattr(pipe, name, None) is None:
                raise ValueError(f"{type(pipe).__name__} has no {name}, which the rendezvous decodes with")

    def rebuild(self, network: nn.Module) -> None:
        super().rebuild(network)
        self.bind = self.velocity.bind

    def row_by_row(self, guided: bool) -> OneByOne:
        """The network called frame by frame, as the pipelines call it."""
        return OneByOne(self.net)

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        return _first(self.pipe, "vae_scale_factor", "vae_scale_factor_spatial")

    @property
    def default_size(self) -> int:
        size = getattr(self.pipe, "default_sample_size", None)
        if size is not None:
            return size * self.factor
        size = self.default("height")
        if not size:
            raise ValueError(f"{type(self.pipe).__name__} names no default size: pass width and height")
        return size

    @property
    def _lacking(self) -> list[str]:
        """What the pipeline would need to encode a prompt, and does not have."""
        parts = self.pipe.components
        lacking = [name for name in ("text_encoder", "tokenizer") if parts.get(name, self) is None]
        for kind in type(self.pipe).__mro__:
            package = PACKAGES.get(kind.__name__)
            if package is not None and not hasattr(sys.modules[kind.__module__], package):
                lacking.append(f"the package {package}")
        return lacking

    def settle(self, arguments: Mapping[str, Any], prompt: Any) -> None:
        if not self._lacking:
            self._basis = {"prompt": ""}
        elif prompt is not None:
            raise ValueError(
                f"this {type(self.pipe).__name__} cannot encode a prompt without {' and '.join(self._lacking)}: put that "
                f"back, or pass prompt_embeds and what else its call takes in the place of prompts"
            )
        else:
            self._basis = {name: value for name, value in arguments.items() if "prompt" in name}

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """As the base class's. Of a pipeline that cannot encode prompts it is found once `settle` has seen embeddings; ()
        before."""
        if "prompt" in self._basis and self._lacking:
            return ()
        asked = Asked(Cond({}), arguments=self._call(self._basis, 2, height, width), texts=self._texts)
        latents = self._first_step(asked).sample
        back = self._without_steps(self.pipe.vae, latents, asked.arguments, "latent")
        if not isinstance(back, Tensor) or back.shape != latents.shape or not torch.equal(back, latents):
            raise ValueError(
                f"{type(self.pipe).__name__} takes latents in another form than it starts from or returns, so frames "
                f"cannot be given their noise: it needs an adapter"
            )
        if not 0.75 < (deviation := latents.float().std().item()) < 1.25:
            raise ValueError(
                f"{type(self.pipe).__name__} starts from noise of standard deviation {deviation:.2g}, and frames from 1: it "
                f"needs an adapter"
            )
        self.latent_dtype = latents.dtype
        return tuple(latents.shape[1:])

    def codec(self, vae: nn.Module, height: int, width: int) -> Codec:
        """The pipeline's own decoding: its call without a single step."""

        def images(vae: nn.Module, latents: Tensor) -> Tensor:
            return self._without_steps(vae, latents, self._call(self._basis, 2, height, width), "pt")

        return Codec.of(_Decoder(vae, images, (height, width)), _NoEncoder(self))

    # -- what the pipeline would do ------------------------------------------------------------------------------------

    def check_settings(self, cfg_type: str, do_add_noise: bool) -> None:
        if cfg_type not in ("full", "none"):
            raise ValueError(f"cfg_type {cfg_type!r} is not the pipeline's own: family 'rendezvous' takes 'full' or 'none'")
        if cfg_type == "none" and self._scale_name is None:
            raise ValueError(f"{type(self.pipe).__name__} has no guidance scale to set to 1: choose cfg_type='full'")
        if do_add_noise:
            raise ValueError(
                "do_add_noise is for adapters: under family 'rendezvous' the pipeline's scheduler takes the steps"
            )

    def rule(self, do_add_noise: bool) -> Rule:
        """The pipeline's scheduler takes the steps; of the stream, no rule needs more noise."""
        return EULER

    def check_guided(self) -> None:
        """The pipeline guides as its arguments say."""

    def default(self, name: str | None) -> Any:
        parameter = self._parameters().get(name)
        return 1.0 if parameter is None or parameter.default in (None, parameter.empty) else parameter.default

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        super().check_arguments({name: value for name, value in arguments.items() if not name.startswith("callback_on")})

    def start_index(self, schedule: Schedule, strength: float) -> int:
        self.check_offers("images")

    def read(
        self, arguments: Mapping[str, Any], steps: int, height: int, width: int, guided: bool
    ) -> tuple[Schedule, Prompt]:
        """(Schedule, Prompt). The pipeline is run up to its first step, so that what it refuses is refused here."""
        arguments = dict(arguments)
        if guided:
            self._settle_negative_prompt(arguments)
        else:
            arguments.pop("negative_prompt")
            arguments[self._scale_name] = 1.0
        asked = Asked(Cond({}), arguments=self._call(arguments, steps, height, width))
        return _schedule(self._first_step(asked).scheduler), asked

    def _settle_negative_prompt(self, arguments: dict[str, Any]) -> None:
        if "negative_prompt" not in self._parameters() and arguments.pop("negative_prompt", None):
            raise ValueError(f"{type(self.pipe).__name__} takes no negative_prompt")

    @property
    def _scale_name(self) -> str | None:
        return next((name for name in ("true_cfg_scale", "guidance_scale") if name in self._parameters()), None)

    def _call(self, arguments: Mapping[str, Any], steps: int, height: int, width: int) -> dict[str, Any]:
        """The arguments of a call of the pipeline, without its noise."""
        call = {**ALWAYS, **arguments, "num_inference_steps": steps, "height": height, "width": width}
        known = self._parameters()
        missing = [name for name in ("latents", "output_type", "height") if name not in known]
        if missing:
            raise ValueError(
                f"{type(self.pipe).__name__} takes no {missing[0]}, which the rendezvous sets: it needs an adapter"
            )
        return {name: value for name, value in call.items() if name in known}

    # -- calls of the pipeline ------------------------------------------------------------------------------------------

    def draw(self, asked: Asked, latents: Tensor, ask: Callable[[Any], Any]) -> Tensor:
        """One frame, from its noise `[1, ...]` to its clean latents: a call of the pipeline that asks for every answer of
        its network."""
        twin = self._twin(asked.texts, lambda *args, **kwargs: ask(self.bind(*args, **kwargs)))
        return self._run(twin, asked.arguments, latents, "latent")

    def _run(self, twin: Any, arguments: Mapping[str, Any], latents: Tensor | None, output_type: str) -> Any:
        generator = torch.Generator().manual_seed(0) if latents is None else frame_generator(latents)
        if "generator" in signature(twin.scheduler.step).parameters:  # not every pipeline hands it on
            twin.scheduler.step = partial(_drawing_from, generator, twin.scheduler.step)
        call = {**arguments, "latents": latents, "output_type": output_type}
        if "generator" in self._parameters():
            call["generator"] = generator
        return twin(**call)[0]

    def _twin(self, texts: dict[str, Any], forward: Callable[..., Any], **parts: Any) -> Any:
        """A copy of the pipeline with its own scheduler and guider, and another forward of its network."""
        twin = copy.copy(self.pipe)
        named = {**self.pipe.components, "scheduler": self.scheduler}
        own = {name: copy.deepcopy(part) for name, part in named.items() if name.endswith(OWN)}
        quiet = {"_progress_bar_config": {"disable": True}}
        vars(twin).update({**own, **quiet, self.network: _stand_in(self.net, forward), **parts})
        if hasattr(twin, "encode_prompt"):
            vars(twin)["encode_prompt"] = once(_locked(twin.encode_prompt, self.pipe), texts)
        return twin

    def _first_step(self, asked: Asked) -> Any:
        """The pipeline's first step: its `scheduler` as it is then, and the `sample` that it goes on from."""
        twin = self._twin(asked.texts, self.net)
        own = signature(twin.scheduler.step)

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Reached(twin.scheduler, own.bind(*args, **kwargs).arguments["sample"])

        twin.scheduler.step = stop
        try:
            self._run(twin, asked.arguments, None, "latent")
        except _Reached as reached:
            return reached
        raise RuntimeError(f"{type(self.pipe).__name__} ended without a step of its scheduler: it needs an adapter")

    def _without_steps(self, vae: nn.Module, latents: Tensor, call: Mapping[str, Any], output_type: str) -> Tensor:
        """What the pipeline makes of latents that need no more steps."""
        twin = self._twin(self._texts, _unasked, vae=vae)
        scheduler, own = twin.scheduler, twin.scheduler.set_timesteps

        @wraps(own)  # pipelines look which arguments it takes
        def none(*args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            scheduler.timesteps = scheduler.timesteps[:0]

        scheduler.set_timesteps = none
        return self._run(twin, call, latents, output_type)

    def _text_to_image(self, pipe: Any) -> Any:
        return pipe


class _Decoder(nn.Module):
    """Clean latents `[n, ...]` to pictures `[n, 3, H, W]` in [-1, 1]."""

    def __init__(self, vae: nn.Module, pictures: Callable[..., Tensor], size: tuple[int, int]):
        super().__init__()
        self.vae, self._pictures, self._size = vae, pictures, size

    def forward(self, latents: Tensor) -> Tensor:
        pictures = torch.cat([self._pictures(self.vae, one) for one in latents.split(1)]) * 2.0 - 1.0
        if tuple(pictures.shape) != (len(latents), 3, *self._size):
            raise ValueError(f"the pipeline draws pictures {list(pictures.shape)} where {list(self._size)} was asked for")
        return pictures


class _NoEncoder(nn.Module):
    def __init__(self, adapter: Rendezvous):
        super().__init__()
        self._adapter = adapter

    def forward(self, images: Tensor) -> Tensor:
        self._adapter.check_offers("images")


def _stand_in(network: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """The network to a pipeline, of the same class with the same parts, but calls of it are calls of `forward`."""
    stand_in = copy.copy(network)
    vars(stand_in).update({name: OrderedDict() for name in HOOKS}, forward=forward, _compiled_call_impl=None)
    return stand_in


def _locked(function: Callable[..., Any], pipe: Any) -> Callable[..., Any]:
    """The function, by one thread at a time."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with encoding(pipe):
            return function(*args, **kwargs)

    return call


def _drawing_from(generator: torch.Generator, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return step(*args, **{"generator": generator, **kwargs})


def _network_name(pipe: Any) -> str:
    parts = pipe.components.items()
    names = [name for name, part in parts if name.startswith(("transformer", "unet")) and isinstance(part, nn.Module)]
    if len(names) != 1:
        raise ValueError(
            f"{type(pipe).__name__} has {' and '.join(names) or 'neither a transformer nor a unet'}: frames meet at the "
            f"calls of one network"
        )
    return names[0]


def _first(holder: Any, *names: str) -> Any:
    return next(getattr(holder, name) for name in names if hasattr(holder, name))


def _unasked(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the pipeline calls its network outside of its steps: it needs an adapter")


def _schedule(scheduler: Any) -> Whole:
    timesteps = scheduler.timesteps.detach().float().cpu()
    sigmas = torch.as_tensor(getattr(scheduler, "sigmas", timesteps / 1000)).detach().float().cpu()[: len(timesteps)]
    return Whole(timesteps, torch.cat((sigmas, torch.zeros(1))))
