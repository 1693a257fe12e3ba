"""The base class of families. It makes a velocity module, a codec, a schedule and encoded prompts of a pipeline.

Everything that differs between families (signs, time scales, packings, names) is in the subclasses.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from streamflow._validation import is_whole_number
from streamflow.conditioning.controlnet import LEVELS, ControlledVelocity, Controls
from streamflow.conditioning.image_prompt import ImagePrompting, ImagePromptVelocity
from streamflow.conditioning.prompt import Cond, Prompt
from streamflow.flow.convention import add_noise
from streamflow.flow.guidance import Weight
from streamflow.flow.schedule import Schedule
from streamflow.flow.solvers import BY_SCHEDULER, Rule, rule_of
from streamflow.models.codec import Codec
from streamflow.models.pipe_parts import (
    base_network,
    cannot_encode,
    check_sampling,
    has_image_adapters,
    missing_text_parts,
)
from streamflow.models.probe import Recording, Texts, encoding, record
from streamflow.models.protocols import VAE, Arguments, Call, Network, Pipeline
from streamflow.models.row_by_row import RowByRow

# Arguments of a pipeline's __call__ that the stream sets itself.
RESERVED = frozenset(
    "prompt negative_prompt num_inference_steps guidance_scale height width latents generator output_type return_dict "
    "num_images_per_prompt callback_on_step_end callback_on_step_end_tensor_inputs callback callback_steps image "
    "strength timesteps".split()
)

_STYLE = "image_prompts.load(...) loads an adapter, which stream(image, image_prompt=style) or image_prompts.set(style) uses"
INSTEAD = {
    **{f"{which}ip_adapter_image{what}": _STYLE for which in ("", "negative_") for what in ("", "_embeds")},
    "callback_on_step_end": "on_step(fn) calls a function after every step, with every row's latents",
    "callback": "on_step(fn) calls a function after every step, with every row's latents",
}
ASKS_FOR_NOTHING = {"num_images_per_prompt": 1, "use_resolution_binning": False}  # values that change nothing


class TransformerVelocity(nn.Module):
    """The base class of velocities of a transformer; a subclass gives `forward(x, t, **cond)`."""

    def __init__(self, transformer: Network):
        super().__init__()
        self.transformer = transformer


class FlowAdapter:
    """One family's conventions. A subclass sets the class attributes and overrides what differs.

    network: the pipeline's attribute that holds the network; `sample` and `time`: that network's first two arguments.
    Velocity: the nn.Module class made of the network, `forward(x, t, **cond) -> v = dx/dsigma`; x `[rows, ...]` in the
        pipeline's own `latents=` form, t `[rows]` as the pipeline's scheduler lists timesteps, cond tensors only.
    row_inputs, shared_inputs: the network's arguments that a prompt sets, with and without a batch dimension.
    widths: for a row input, the entry of the network's config that its last dimension must equal.
    embeds: the pipeline's names for embeddings passed by the caller, and the row input that each becomes; the same names
        with the prefix `negative_` are the negative prompt's.
    guidance_argument: the pipeline's name for its scale of classifier-free guidance, or None.
    unguided: the largest scale at which the pipeline does not guide; w is 1 there, and grows with the scale.
    guidance_in_one_call: the pipeline calls its network once a step with [negative, prompt], not twice.
    latent_dtype: the dtype of the pipeline's latents between steps; None: the network's.
    vae_channels: the entry of the VAE's config that holds the number of channels of its latents.
    control: the `ControlRule` of the family's control nets, `module:Class`; None: diffusers has none.
    reference: the `ReferenceRule` of the pipeline's reference images, `module:Class`; None: it takes none. Where it is set,
        the pipeline's `image=` is a reference.
    image_prompt: the `ImagePromptRule` of the family's IP-Adapters, `module:Class`; None: diffusers has none.
    tiny_vae: a small VAE of the same latents, a hub id or a key of `models.tiny_vae.PUBLISHED`.
    since: the oldest diffusers that is supported for this family.
    note: differences from the pipeline and what is refused, for the table in docs/models.md.
    text_pipeline, image_pipeline: names of diffusers classes, the text-to-image pipeline and the one whose
        `get_timesteps` turns a strength into a start index; Stable Diffusion 3's where a family has no image pipeline.
    refused: arguments of the pipeline that change its loop, which a stream does not support.
    exportable: the network takes tensors only, so it can be exported.
    lacks: features that a stream of this family does not have, and what to do instead.
    capturable: the network never synchronises with its device, so a CUDA graph can capture it.
    free_size: one network in memory draws images of any size, as a UNet does.
    engine: the engine that holds its frames in flight, a key of `streamflow.stream.engine.ENGINES`.
    is_reference: the pipeline's own `__call__` draws the same images as the stream.
    """

    network: str = "transformer"
    sample: ClassVar[str] = "hidden_states"
    time: ClassVar[str] = "timestep"
    Velocity: ClassVar[type[nn.Module]]
    row_inputs: ClassVar[tuple[str, ...]]
    shared_inputs: tuple[str, ...] = ()
    widths: ClassVar[Mapping[str, str]] = {}
    embeds: ClassVar[Mapping[str, str]] = {
        "prompt_embeds": "encoder_hidden_states",
        "pooled_prompt_embeds": "pooled_projections",
    }
    guidance_argument: ClassVar[str | None] = "guidance_scale"
    unguided: ClassVar[float] = 1.0
    guidance_in_one_call: ClassVar[bool] = True
    latent_dtype: torch.dtype | None = None
    vae_channels: ClassVar[str] = "latent_channels"
    control: ClassVar[str | None] = None
    reference: ClassVar[str | None] = None
    image_prompt: ClassVar[str | None] = None
    tiny_vae: ClassVar[str | None] = None
    since: ClassVar[str] = "0.33"
    note: ClassVar[str] = ""
    text_pipeline: ClassVar[str]
    image_pipeline: ClassVar[str] = "StableDiffusion3Img2ImgPipeline"
    refused: ClassVar[frozenset[str]] = frozenset()
    exportable: bool = True
    lacks: ClassVar[Mapping[str, str]] = {}
    capturable: ClassVar[bool] = True
    free_size: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True
    engine: ClassVar[str] = "ring"
    controls: Controls | None = None
    image_prompts: ImagePrompting | None = None

    def __init__(self, pipe: Pipeline):
        if getattr(pipe, self.network, None) is None:
            raise ValueError(
                f"{type(pipe).__name__} has no {self.network}, which {type(self).__name__} calls: pass another family="
            )
        self._given = pipe
        self.pipe = self._text_to_image(pipe)
        self.scheduler = copy.deepcopy(pipe.scheduler)  # the stream's own; schedules are read from it
        self.texts = Texts()  # encoded prompts
        self.rebuild(getattr(pipe, self.network))

    @property
    def base(self) -> Network:
        """The network inside wrappers such as `torch.compile` and peft."""
        return base_network(self.net)

    def rebuild(self, network: Network) -> None:
        """Make the velocity module of another network of the same family."""
        self.net = network
        velocity: nn.Module = self.Velocity(network)
        if self.image_prompts:
            velocity = ImagePromptVelocity(velocity, self.image_prompts)
        self.velocity = self.own_velocity = ControlledVelocity(velocity, self.controls) if self.controls else velocity

    def check_network(self, network: Network) -> None:
        """Raise ValueError for a network that has no adapters of image prompts where this one has some, or the reverse."""
        if self.image_prompts is None:
            if self.image_prompt is not None and has_image_adapters(network):
                raise ValueError(
                    f"an IP-Adapter was loaded into this {type(network).__name__} after the stream was made: load it by "
                    f"image_prompts.load(...), or make a new StreamFlow of the pipe"
                )
        elif base_network(network) is not self.base or not self.image_prompts.intact():
            raise ValueError(
                f"the network has adapters of image prompts, and would be replaced, or has lost them to the pipe's own "
                f"methods: image_prompts.unload() first, assign the {type(network).__name__}, and load them again"
            )

    def follow_pipe(self) -> None:
        """Use the parts that the pipe has now. The stream rebuilds the network and the codec."""
        if self.pipe is self._given:
            return
        for name, part in self.pipe.components.items():
            if getattr(self._given, name, None) is not part:
                setattr(self.pipe, name, getattr(self._given, name))

    def set_controls(self, controls: Controls | None) -> None:
        """Make the velocity with these control nets, or with none."""
        self.controls = controls
        self.shared_inputs = (*type(self).shared_inputs, *((LEVELS,) if controls else ()))
        self._rebuild()

    def set_image_prompts(self, prompting: ImagePrompting | None) -> None:
        """Make the velocity with these adapters of image prompts, which are in the network, or with none."""
        self.image_prompts = prompting
        self._rebuild()

    def _rebuild(self) -> None:
        added = self.controls or self.image_prompts
        self.exportable = type(self).exportable and not added  # torch.export has no dynamic shapes for **arguments
        self.rebuild(self.net)

    def row_by_row(self, guided: bool) -> nn.Module:
        """The velocity with the pipeline's own calls of the network, frame by frame; `guided` under `cfg_type="full"`."""
        return RowByRow(self.velocity, guided and self.guidance_in_one_call, self.shared_inputs)

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """The width of a latent in pixels, from the VAE's config."""
        return self.pipe.vae_scale_factor

    @property
    def multiple(self) -> int:
        """The number of pixels that width and height must be multiples of."""
        return self.factor

    @property
    def default_size(self) -> int:
        """The pipeline's default width and height in pixels."""
        return self.pipe.default_sample_size * self.factor

    def size_like(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in these proportions, with about as many pixels as the default size."""
        scale = self.default_size / math.sqrt(width * height)
        width, height = (max(1, round(scale * side / self.multiple)) * self.multiple for side in (width, height))
        return width, height

    @property
    def latent_channels(self) -> int:
        """The channels that the VAE must have."""
        return self.base.config.in_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one frame's latent, as the pipeline takes `latents=`, without the batch dimension."""
        return self.latent_channels, height // self.factor, width // self.factor

    def check_size(self, height: int, width: int) -> None:
        """Raise TypeError or ValueError where the pipeline cannot draw this size."""
        for name, size in (("height", height), ("width", width)):
            if not is_whole_number(size):
                raise TypeError(f"{name} must be an integer number of pixels, not {size!r}")
            if size <= 0 or size % self.multiple:
                below = max(self.multiple, size // self.multiple * self.multiple)
                raise ValueError(f"{name} must be a positive multiple of {self.multiple} pixels, not {size}: try {below}")

    def codec(self, vae: VAE, height: int, width: int) -> Codec:
        """The codec of this VAE for images of this size."""
        self.check_vae(vae)
        return Codec(vae)

    def check_vae(self, vae: VAE) -> None:
        """Raise ValueError for a VAE whose latents are not the network's."""
        channels = getattr(vae.config, self.vae_channels, None)
        if channels != self.latent_channels:
            raise ValueError(
                f"this {type(vae).__name__} has {channels or 'no'} latent channels, the network draws "
                f"{self.latent_channels}: load the VAE that belongs to this family"
            )

    # -- latents --------------------------------------------------------------------------------------------------------

    path = staticmethod(add_noise)
    """Clean latents x0 noised to the noise levels sigma, all `[rows, ...]`; by default on a straight line to `noise`."""

    def latent_mask(self, mask: Tensor, height: int, width: int) -> Tensor:
        """A mask `[n, 1, height, width]` in the form of latents, resized by nearest neighbour as the pipelines do (diffusers
        pipelines/stable_diffusion_3/pipeline_stable_diffusion_3_inpaint.py, `prepare_mask_latents`)."""
        return interpolate(mask, self.latent_shape(height, width)[-2:])

    # -- settings and arguments of the pipeline --------------------------------------------------------------------------

    def read(self, arguments: Arguments, steps: int, height: int, width: int, guided: bool) -> tuple[Schedule, Prompt]:
        """(Schedule, Prompt) for the pipeline's own call with these arguments. `guided`: with a negative prompt's cond.

        Raises what the pipeline raises about its arguments; NotImplementedError for an input of the network that this family
        does not support; ValueError for embeddings of a wrong width or of several prompts, and for prompts that the pipeline
        cannot encode.
        """
        try:
            with encoding(self.pipe):
                recording = self._record(dict(arguments), steps, height, width, guided)
        except (TypeError, AttributeError) as error:
            missing = missing_text_parts(self.pipe)
            if arguments.get("prompt") is None or not missing or "NoneType" not in str(error):
                raise
            raise cannot_encode(self.pipe, missing) from error
        return self.schedule(recording, steps), self._prompt(recording, guided)

    def schedule(self, recording: Recording, steps: int) -> Schedule:
        """The schedule of so many steps; by default the one that the pipeline's scheduler has set."""
        scheduler = recording.scheduler
        name, config = type(scheduler).__name__, scheduler.config
        if name not in BY_SCHEDULER or config.get("invert_sigmas"):
            shift = ", shift=pipe.scheduler.config.flow_shift" if "flow_shift" in config else ""
            raise ValueError(
                f"{name}{' with invert_sigmas' if config.get('invert_sigmas') else ''} does not step by Euler along "
                f"falling sigmas: give the pipeline a FlowMatchEulerDiscreteScheduler, made with "
                f"FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config{shift})"
            )
        return recording.schedule

    def weight(self, scale: float, arguments: Arguments, schedule: Schedule) -> Weight:
        """The guidance weight at this scale of `guidance_argument`, with the pipeline's own rule of guidance. arguments: of
        the pipeline's call. schedule: for families that guide some steps only."""
        return Weight(scale)

    def check_settings(self, cfg_type: str, do_add_noise: bool) -> None:
        """Raise ValueError for settings that this family does not support."""
        check_sampling(self.scheduler)

    def rule(self, do_add_noise: bool) -> Rule:
        """The solver of the pipeline's scheduler, or with do_add_noise the one that re-noises with the frames' own noise."""
        return rule_of(type(self.scheduler).__name__, self.scheduler.config, do_add_noise)

    def check_offers(self, feature: str) -> None:
        """Raise NotImplementedError, with the remedy, for a feature that a stream of this family does not have."""
        if feature in self.lacks:
            raise self.not_offered(feature)

    def not_offered(self, feature: str) -> NotImplementedError:
        """The error for a feature that a stream of this family does not have."""
        return NotImplementedError(f"{type(self).__name__} does not offer {feature}: {self.lacks[feature]}")

    def check_guided(self) -> None:
        """Raise ValueError where the pipeline takes no negative prompt, which "full" and "initialize" need."""
        if self.guidance_argument is None:
            raise ValueError(
                f"{type(self.pipe).__name__} has no classifier-free guidance, only what is embedded in its network: choose "
                f"cfg_type='none', or 'self' for images"
            )

    def settle(self, arguments: Arguments, prompt: object) -> None:
        """Read the arguments of a `prepare` before it is planned; ValueError where they cannot be drawn."""

    def start_index(self, schedule: Schedule, strength: float) -> int:
        """The index of image-to-image's first step at this strength, by the image pipeline's own `get_timesteps`."""
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
        import diffusers

        holder = SimpleNamespace(timesteps=schedule.timesteps, sigmas=schedule.sigmas, order=1)
        holder.scheduler, holder.set_begin_index = holder, lambda index: None  # what `get_timesteps` reads of a pipeline
        get_timesteps = getattr(diffusers, self.image_pipeline).get_timesteps
        timesteps, _ = get_timesteps(holder, len(schedule), strength, "cpu")
        if not len(timesteps):
            raise ValueError(
                f"strength {strength} of {len(schedule)} steps leaves no step to take: "
                f"raise it to {1 / len(schedule):.3g} or raise num_inference_steps"
            )
        return len(schedule) - len(timesteps)

    def takes(self, name: str) -> bool:
        """Whether the pipeline has this argument."""
        return name in self._parameters()

    def default(self, name: str) -> Any:
        """The pipeline's own default for one of its arguments."""
        return self._parameters()[name].default

    def check_arguments(self, arguments: Arguments) -> None:
        """Raise TypeError for arguments that the pipeline does not have or that the stream sets itself, and
        NotImplementedError for those that a stream does not support."""
        known = self._parameters()
        for name in arguments:
            if name in INSTEAD:
                raise TypeError(f"{name} is not passed on to {type(self.pipe).__name__}: {INSTEAD[name]}")
            if name in RESERVED:
                raise TypeError(f"{name} cannot be passed on to {type(self.pipe).__name__}: the stream sets it itself")
            if name in self.refused:
                raise NotImplementedError(f"{name} changes the pipeline's own loop, which a stream does not follow")
            if name not in known:
                free = ", ".join(sorted(set(known) - RESERVED))
                raise TypeError(f"{type(self.pipe).__name__} takes no argument {name!r}; it takes {free}")

    def check_embeds(self, arguments: Arguments) -> None:
        """Raise ValueError for embeddings, under the pipeline's own names, that do not fit the network."""
        for name, value in arguments.items():
            row_input = self.embeds.get(name.removeprefix("negative_"))
            if row_input and isinstance(value, Tensor):
                self._check_embeds(name, row_input, value, 1)

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        parameters = dict(inspect.signature(type(self.pipe).__call__).parameters)
        parameters.pop("self", None)
        return parameters

    def _text_to_image(self, pipe: Pipeline) -> Pipeline:
        """The pipe itself, or a text-to-image pipeline of the same parts if it starts from an image or has control nets.
        Prompts are encoded by the pipe's own method, which a subclass may override."""
        if "strength" not in inspect.signature(type(pipe).__call__).parameters and not hasattr(pipe, "controlnet"):
            return pipe
        import diffusers

        parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
        text = getattr(diffusers, self.text_pipeline)(**parts)
        vars(text)["encode_prompt"] = pipe.encode_prompt
        return text

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        scale = self.guidance_argument
        if scale:
            arguments[scale] = max(2.0, arguments.get(scale) or 0.0) if guided else self.unguided
        if guided:
            self._settle_negative_prompt(arguments)
        else:
            arguments.pop("negative_prompt", None)
            if "negative_prompt" in self._parameters():
                arguments["negative_prompt"] = None
        dtype = self.latent_dtype or self.base.dtype
        latents = torch.zeros(1, *self.latent_shape(height, width), device=self.pipe.device, dtype=dtype)
        size = {"height": height, "width": width, "latents": latents, "num_inference_steps": steps}
        return record(self.pipe, self.network, self.sample, self.scheduler, self.texts, **size, **arguments)

    def _settle_negative_prompt(self, arguments: Call) -> None:
        """Drop an empty negative prompt where the pipeline takes none, refuse any other; elsewhere it is "" by default."""
        name = type(self.pipe).__name__
        if "negative_prompt" not in self._parameters():
            if arguments.pop("negative_prompt", None):
                raise ValueError(f"{name} takes no negative_prompt text, only an empty one: pass negative_prompt_embeds")
        elif arguments.get("negative_prompt") is None and arguments.get("negative_prompt_embeds") is None:
            arguments["negative_prompt"] = ""  # as the pipelines do

    def _prompt(self, recording: Recording, guided: bool) -> Prompt:
        calls = [self._inputs(call) for call in recording.calls]
        if not guided:
            return Prompt(self._cond(calls[0], 0, 1))
        if self.guidance_in_one_call:
            return Prompt(self._cond(calls[0], 1, 2), self._cond(calls[0], 0, 2))
        return Prompt(self._cond(calls[0], 0, 1), self._cond(calls[1], 0, 1))

    def _inputs(self, call: Arguments) -> dict[str, Tensor]:
        """The tensors of a recorded call that belong to the prompt; any other argument is refused by name."""
        plain = {self.sample, self.time, "return_dict"}
        inputs = {}
        for name, value in call.items():
            if name in plain or value is None or (isinstance(value, dict) and not value):
                continue
            if name not in self.row_inputs + self.shared_inputs:
                raise NotImplementedError(
                    f"{type(self.pipe).__name__} passes {name!r} to its network, which {type(self).__name__} does not "
                    f"stream: leave out the argument that sets it"
                )
            inputs[name] = value
        return inputs

    def _cond(self, inputs: Mapping[str, Tensor], row: int, count: int) -> Cond:
        rows = {name: value for name, value in inputs.items() if name in self.row_inputs}
        for name, value in rows.items():
            self._check_embeds(name, name, value, count)
        return Cond(
            {name: value[row : row + 1].detach() for name, value in rows.items()},
            {name: value.detach() for name, value in inputs.items() if name in self.shared_inputs},
        )

    def _check_embeds(self, label: str, name: str, value: Tensor, count: int) -> None:
        if len(value) != count:
            raise ValueError(f"{label} holds {len(value) // count} prompts: a stream takes one prompt at a time")
        width = self.base.config[self.widths[name]] if name in self.widths else value.shape[-1]
        if value.shape[-1] != width:
            raise ValueError(
                f"{label} is {value.shape[-1]} wide, this network's {self.widths[name]} is {width}: "
                f"pass embeddings made by this pipeline's own text encoders"
            )
