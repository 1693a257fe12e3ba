"""The family of any diffusers pipeline without an adapter. Every frame is a call of the unmodified pipeline, which runs in a
coroutine that stops at each call of the network. A tick answers the pending calls of all frames in flight, with one call of
the network where possible, and resumes each coroutine up to its next one. So frames at different steps advance together, and
one leaves at every tick. The solver, the guidance and the decoding are the pipeline's own.

The cost: the pipeline's Python runs for every frame, and where the pipeline calls its network twice a step for guidance, a
frame takes twice as many ticks. Features that need access to the pipeline's loop are missing: see `Fallback.lacks`.
"""

from __future__ import annotations

import copy
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from streamflow.conditioning.prompt import Cond, Prompt
from streamflow.flow.schedule import Schedule, Stages
from streamflow.flow.solvers import EULER, Rule
from streamflow.models.adapter import FlowAdapter
from streamflow.models.codec import Codec
from streamflow.models.fallback.merged_calls import MergedCalls, SeparateCalls
from streamflow.models.pipe_parts import cannot_encode, missing_text_parts
from streamflow.models.pipeline_kinds import check_drawable
from streamflow.models.probe import Texts, encoding, once
from streamflow.models.protocols import VAE, Arguments, Call, Function, Network, Pipeline, Scheduler

# Arguments of every call, where the pipeline takes them.
ALWAYS = {"use_resolution_binning": False, "return_dict": False}
STATEFUL = ("scheduler", "guider")  # components with a state of their own in every call
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True, eq=False)
class CallPrompt(Prompt):
    """The arguments of a frame's call of the pipeline, without its noise. texts: prompts that are encoded already."""

    arguments: Arguments = field(default_factory=dict)
    texts: Texts = field(default_factory=Texts)


@dataclass(frozen=True)
class FullSchedule(Schedule):
    """The schedule of the pipeline's scheduler. Frames take all of its steps."""

    def __post_init__(self) -> None:
        """Every schedule is accepted: the scheduler itself takes the steps."""

    def pick(self, t_index_list: Sequence[int]) -> Stages:
        if list(t_index_list) != list(range(len(self))):
            raise ValueError(
                f"family 'fallback' draws with whole calls of the pipeline, which take all {len(self)} steps, not "
                f"t_index_list {list(t_index_list)}: leave it out and set num_inference_steps"
            )
        return super().pick(t_index_list)


class _FirstStep(Exception):
    """Raised instead of the scheduler's first step; never leaves this module."""

    def __init__(self, scheduler: Scheduler, sample: Tensor):
        super().__init__()
        self.scheduler, self.sample = scheduler, sample


def frame_generator(latents: Tensor) -> torch.Generator:
    """The generator, on the CPU, of the frame that starts from these latents, for pipelines that draw more noise in their
    steps. It depends on the latents alone."""
    return torch.Generator().manual_seed(zlib.crc32(latents.detach().float().cpu().contiguous().numpy().tobytes()))


class Fallback(FlowAdapter):
    """The adapter of pipelines that have none. `cfg_type` is "full", the pipeline as its arguments say, or "none", the
    same with a `guidance_scale` (or `true_cfg_scale`) of 1. A frame does not depend on the other frames in flight. Its
    initial noise is the stream's, as in every family; noise that the pipeline draws later comes from `frame_generator`."""

    Velocity = MergedCalls
    engine = "pipeline_calls"
    guidance_argument = None
    exportable = False
    row_inputs = ()
    embeds = {}
    lacks = {
        "accelerate": "compile the pipeline's network yourself, pipe.transformer.compile(), which frames then share",
        "on_step": "pass callback_on_step_end, the pipeline's own, to prepare",
        "stages": "call predict_x0_batch, which takes a frame through one tick",
        "update now": "frames in flight keep their arguments: pass scope='frame'",
        "images": "only frames drawn from noise can be streamed: use a family with an adapter",
        "shard_denoiser": "run a stream on each device",
        "interleave": "run a stream on each device",
        "blending": "update the prompt with scope='frame'",
    }

    def __init__(self, pipe: Pipeline):
        check_drawable(type(pipe))
        self.network = _network_name(pipe)
        self._texts = Texts()
        self._basis: Arguments = {"prompt": ""}  # arguments of calls whose result does not depend on the prompt
        super().__init__(pipe)
        for name in ("vae", "image_processor"):
            if getattr(pipe, name, None) is None:
                raise ValueError(f"{type(pipe).__name__} has no {name}, with which family 'fallback' decodes")

    def row_by_row(self, guided: bool) -> SeparateCalls:
        """The network called frame by frame, as the pipelines call it."""
        return SeparateCalls(self.net)

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        names = ("vae_scale_factor", "vae_scale_factor_spatial")
        return next(getattr(self.pipe, name) for name in names if hasattr(self.pipe, name))

    @property
    def default_size(self) -> int:
        size = getattr(self.pipe, "default_sample_size", None)
        if size is not None:
            return size * self.factor
        size = self.default("height")
        if not size:
            raise ValueError(f"{type(self.pipe).__name__} has no default size: pass width and height")
        return size

    @property
    def _missing(self) -> list[str]:
        """As `missing_text_parts`, without numbered parts such as text_encoder_3, which pipelines can do without."""
        return [name for name in missing_text_parts(self.pipe) if not name[-1].isdigit()]

    def settle(self, arguments: Arguments, prompt: object) -> None:
        missing = self._missing
        if missing and prompt is not None:
            raise cannot_encode(self.pipe, missing)
        embeddings = {name: value for name, value in arguments.items() if "prompt" in name}
        self._basis = embeddings if missing else {"prompt": ""}

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """As the base class's. () for a pipeline that cannot encode prompts, until `settle` has got embeddings."""
        if "prompt" in self._basis and self._missing:
            return ()
        prompt = CallPrompt(Cond({}), arguments=self._call(self._basis, 2, height, width), texts=self._texts)
        latents = self._first_step(prompt).sample
        returned = self._without_steps(self.pipe.vae, latents, prompt.arguments, "latent")
        if not isinstance(returned, Tensor) or returned.shape != latents.shape or not torch.equal(returned, latents):
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

    def codec(self, vae: VAE, height: int, width: int) -> Codec:
        """The pipeline's own decoding: its call without a single step."""

        def decode(vae: VAE, latents: Tensor) -> Tensor:
            return self._without_steps(vae, latents, self._call(self._basis, 2, height, width), "pt")

        return Codec.of(_Decoder(vae, decode, (height, width)), _NoEncoder(self))

    # -- settings and arguments of the pipeline --------------------------------------------------------------------------

    def check_settings(self, cfg_type: str, do_add_noise: bool) -> None:
        if cfg_type not in ("full", "none"):
            raise ValueError(f"cfg_type {cfg_type!r} is not the pipeline's own: family 'fallback' takes 'full' or 'none'")
        if cfg_type == "none" and self._scale_name is None:
            raise ValueError(f"{type(self.pipe).__name__} has no guidance scale to set to 1: choose cfg_type='full'")
        if do_add_noise:
            raise ValueError(
                "do_add_noise is for adapters: under family 'fallback' the pipeline's scheduler takes the steps"
            )

    def rule(self, do_add_noise: bool) -> Rule:
        """Not used: the pipeline's scheduler takes the steps."""
        return EULER

    def check_guided(self) -> None:
        """The pipeline guides as its arguments say."""

    def default(self, name: str | None) -> Any:
        parameter = self._parameters().get(name) if name else None
        return 1.0 if parameter is None or parameter.default in (None, parameter.empty) else parameter.default

    def check_arguments(self, arguments: Arguments) -> None:
        super().check_arguments({name: value for name, value in arguments.items() if not name.startswith("callback_on")})

    def start_index(self, schedule: Schedule, strength: float) -> NoReturn:
        raise self.not_offered("images")

    def read(self, arguments: Arguments, steps: int, height: int, width: int, guided: bool) -> tuple[Schedule, Prompt]:
        """(Schedule, Prompt). The pipeline is run up to its first step, so that it checks its arguments."""
        call = dict(arguments)
        if guided:
            self._settle_negative_prompt(call)
        elif scale := self._scale_name:
            del call["negative_prompt"]
            call[scale] = 1.0
        prompt = CallPrompt(Cond({}), arguments=self._call(call, steps, height, width))
        return _schedule(self._first_step(prompt).scheduler), prompt

    def _settle_negative_prompt(self, arguments: Call) -> None:
        if "negative_prompt" not in self._parameters() and arguments.pop("negative_prompt", None):
            raise ValueError(f"{type(self.pipe).__name__} takes no negative_prompt")

    @property
    def _scale_name(self) -> str | None:
        return next((name for name in ("true_cfg_scale", "guidance_scale") if name in self._parameters()), None)

    def _call(self, arguments: Arguments, steps: int, height: int, width: int) -> Call:
        """The arguments of a call of the pipeline, without its noise."""
        call = {**ALWAYS, **arguments, "num_inference_steps": steps, "height": height, "width": width}
        known = self._parameters()
        missing = [name for name in ("latents", "output_type", "height") if name not in known]
        if missing:
            raise ValueError(
                f"{type(self.pipe).__name__} takes no {missing[0]}, which family 'fallback' sets: it needs an adapter"
            )
        return {name: value for name, value in call.items() if name in known}

    # -- calls of the pipeline ------------------------------------------------------------------------------------------

    def draw(self, prompt: CallPrompt, latents: Tensor, call_network: Function) -> Tensor:
        """One frame, from its noise `[1, ...]` to its clean latents. `call_network` takes the arguments of a call of the
        network by name and returns the network's output."""
        bind = signature(self.net.forward).bind
        copied = self._copy(prompt.texts, lambda *args, **kwargs: call_network(bind(*args, **kwargs).arguments))
        return self._run(copied, prompt.arguments, latents, "latent")

    def _run(self, pipe: Pipeline, arguments: Arguments, latents: Tensor | None, output_type: str) -> Any:
        generator = torch.Generator().manual_seed(0) if latents is None else frame_generator(latents)
        if "generator" in signature(pipe.scheduler.step).parameters:  # not every pipeline passes it to its scheduler
            pipe.scheduler.step = _with_default_generator(pipe.scheduler.step, generator)
        call = {**arguments, "latents": latents, "output_type": output_type}
        if "generator" in self._parameters():
            call["generator"] = generator
        return pipe(**call)[0]

    def _copy(self, texts: Texts, forward: Function, **parts: nn.Module) -> Pipeline:
        """A copy of the pipeline with its own scheduler and guider, and another forward of its network."""
        copied = copy.copy(self.pipe)
        named = {**self.pipe.components, "scheduler": self.scheduler}
        own = {name: copy.deepcopy(part) for name, part in named.items() if name.endswith(STATEFUL)}
        quiet = {"_progress_bar_config": {"disable": True}}
        vars(copied).update({**own, **quiet, self.network: _with_forward(self.net, forward), **parts})
        if hasattr(copied, "encode_prompt"):
            vars(copied)["encode_prompt"] = once(_locked(copied.encode_prompt, self.pipe), texts)
        return copied

    def _first_step(self, prompt: CallPrompt) -> _FirstStep:
        """The pipeline's first step: the `scheduler`, and the `sample` that the step starts from."""
        copied = self._copy(prompt.texts, self.net)
        own = signature(copied.scheduler.step)

        def stop(*args: object, **kwargs: object) -> NoReturn:
            raise _FirstStep(copied.scheduler, own.bind(*args, **kwargs).arguments["sample"])

        copied.scheduler.step = stop
        try:
            self._run(copied, prompt.arguments, None, "latent")
        except _FirstStep as step:
            return step
        raise RuntimeError(f"{type(self.pipe).__name__} ended without a step of its scheduler: it needs an adapter")

    def _without_steps(self, vae: VAE, latents: Tensor, call: Arguments, output_type: str) -> Tensor:
        """The pipeline's output for latents that need no more steps."""
        copied = self._copy(self._texts, _refuse_call, vae=vae)
        scheduler, own = copied.scheduler, copied.scheduler.set_timesteps

        @wraps(own)  # pipelines inspect its signature
        def set_no_timesteps(*args: object, **kwargs: object) -> None:
            own(*args, **kwargs)
            scheduler.timesteps = scheduler.timesteps[:0]

        scheduler.set_timesteps = set_no_timesteps
        return self._run(copied, call, latents, output_type)

    def _text_to_image(self, pipe: Pipeline) -> Pipeline:
        return pipe


class _Decoder(nn.Module):
    """Clean latents `[n, ...]` to images `[n, 3, H, W]` in [-1, 1]."""

    def __init__(self, vae: VAE, decode: Callable[[VAE, Tensor], Tensor], size: tuple[int, int]):
        super().__init__()
        self.vae, self._decode, self._size = vae, decode, size

    def forward(self, latents: Tensor) -> Tensor:
        images = torch.cat([self._decode(self.vae, row) for row in latents.split(1)]) * 2.0 - 1.0
        if tuple(images.shape) != (len(latents), 3, *self._size):
            raise ValueError(f"the pipeline draws images {list(images.shape)} when called with the size {list(self._size)}")
        return images

    def unscaled(self, latents: Tensor) -> Tensor:
        """The latents as they are: how the pipeline brings them to the VAE's scale is part of its decoding."""
        return latents


class _NoEncoder(nn.Module):
    def __init__(self, adapter: Fallback):
        super().__init__()
        self._adapter = adapter

    def forward(self, images: Tensor) -> NoReturn:
        raise self._adapter.not_offered("images")


def _with_forward(network: Network, forward: Function) -> Network:
    """A copy of the network with the same class and parts, whose calls are calls of `forward`."""
    copied = copy.copy(network)
    vars(copied).update({name: OrderedDict() for name in HOOKS}, forward=forward, _compiled_call_impl=None)
    return copied


def _locked(function: Function, pipe: Pipeline) -> Function:
    """The function, called by one thread at a time."""

    @wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        with encoding(pipe):
            return function(*args, **kwargs)

    return call


def _with_default_generator(step: Function, generator: torch.Generator) -> Function:
    return lambda *args, **kwargs: step(*args, **{"generator": generator, **kwargs})


def _network_name(pipe: Pipeline) -> str:
    parts = pipe.components.items()
    names = [name for name, part in parts if name.startswith(("transformer", "unet")) and isinstance(part, nn.Module)]
    if len(names) != 1:
        raise ValueError(
            f"{type(pipe).__name__} has {' and '.join(names) or 'neither a transformer nor a unet'}: family 'fallback' "
            f"needs one network"
        )
    return names[0]


def _refuse_call(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("the pipeline calls its network outside of its steps: it needs an adapter")


def _schedule(scheduler: Scheduler) -> FullSchedule:
    timesteps = scheduler.timesteps.detach().float().cpu()
    sigmas = torch.as_tensor(getattr(scheduler, "sigmas", timesteps / 1000)).detach().float().cpu()[: len(timesteps)]
    return FullSchedule(timesteps, torch.cat((sigmas, torch.zeros(1))))
