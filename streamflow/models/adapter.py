"""What a family is to the rest of the library: a velocity module, a codec, a schedule, and what a prompt becomes.

Everything that differs between families (signs, time scales, packings, names) is said in a subclass, and nowhere else.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from streamflow.conditioning.controlnet import LEVELS, Controls
from streamflow.conditioning.prompt import Cond, Prompt
from streamflow.flow.convention import add_noise
from streamflow.flow.guidance import Weight
from streamflow.flow.schedule import Schedule
from streamflow.flow.solvers import BY_SCHEDULER, Rule, rule_of
from streamflow.models.codec import Codec
from streamflow.models.pipe_parts import base_network, check_sampling
from streamflow.models.probe import Recording, encoding, record
from streamflow.models.row_by_row import RowByRow

# Arguments of a pipeline's __call__ that the stream gives itself.
RESERVED = frozenset(
    "prompt negative_prompt num_inference_steps guidance_scale height width latents generator output_type return_dict "
    "num_images_per_prompt callback_on_step_end callback_on_step_end_tensor_inputs callback callback_steps image "
    "strength timesteps".split()
)

TEXT_PARTS = ("text_encoder", "tokenizer")
INSTEAD = {
    "callback_on_step_end": "on_step(fn) calls a function after every step, with every row's latents",
    "callback": "on_step(fn) calls a function after every step, with every row's latents",
}
ASKS_FOR_NOTHING = {"num_images_per_prompt": 1, "use_resolution_binning": False}  # what happens anyway


class FlowAdapter:
    """One family's conventions. A subclass states the class attributes and gives `latent_shape`.

    network: the pipeline's attribute that holds the network; `sample` and `time`: that network's first two arguments.
    Velocity: the nn.Module class made of the network, `forward(x, t, **cond) -> v = dx/dsigma`; x `[rows, ...]` in the
        pipeline's own `latents=` form, t `[rows]` as the pipeline's scheduler lists timesteps, cond tensors only.
    row_inputs / shared_inputs: the network's arguments that a prompt sets, with and without a batch dimension.
    widths: for a row input, the entry of the network's config that its last dimension must equal.
    embeds: the pipeline's names for given embeddings, and which row input each becomes; `negative_` before a name likewise.
    guidance_argument: the pipeline's name for its scale of classifier-free guidance; None where it has none.
    unguided: the largest such scale at which the pipeline does not guide; w is 1 there, and grows with the scale.
    guidance_in_one_call: the pipeline calls its network once a step with [negative, prompt], not twice.
    latent_dtype: what the pipeline keeps its latents in between steps; None: in the network's dtype.
    vae_channels: the entry of the VAE's config that says how many channels its latents have.
    control: the rules of its control nets, `module:Class`; None: diffusers has none for this family.
    tiny_vae: where a small VAE of the same latents is published, a hub id, or a key of `models.tiny_vae.PUBLISHED`.
    since: the first diffusers whose pipelines of this family a stream follows.
    note: what differs from the pipeline, what is refused and why, in a few words: for the README's table.
    text_pipeline / image_pipeline: diffusers class names, the plain text-to-image one and the one whose
        `get_timesteps` turns a strength into a start index; Stable Diffusion 3's where a family has no image pipeline.
    refused: arguments of the pipeline that change its loop in a way a stream does not follow.
    exportable: the network takes tensors only, so it can be exported.
    lacks: what a stream of this family does not offer, and what to do instead.
    capturable: the network never waits for its device, so that a CUDA graph can hold it.
    free_size: one network in memory serves pictures of any size, as a UNet does.
    engine: what keeps its frames in flight, a key of `streamflow.stream.engine.ENGINES`.
    is_reference: the pipeline's own `__call__` draws what the stream draws; not where only its parts are used.
    """

    network: ClassVar[str] = "transformer"
    sample: ClassVar[str] = "hidden_states"
    time: ClassVar[str] = "timestep"
    Velocity: ClassVar[type[nn.Module]]
    row_inputs: ClassVar[tuple[str, ...]]
    shared_inputs: ClassVar[tuple[str, ...]] = ()
    widths: ClassVar[Mapping[str, str]] = {}
    embeds: ClassVar[Mapping[str, str]] = {
        "prompt_embeds": "encoder_hidden_states",
        "pooled_prompt_embeds": "pooled_projections",
    }
    guidance_argument: ClassVar[str | None] = "guidance_scale"
    unguided: ClassVar[float] = 1.0
    guidance_in_one_call: ClassVar[bool] = True
    latent_dtype: ClassVar[torch.dtype | None] = None
    vae_channels: ClassVar[str] = "latent_channels"
    control: ClassVar[str | None] = None
    tiny_vae: ClassVar[str | None] = None
    since: ClassVar[str] = "0.33"
    note: ClassVar[str] = ""
    text_pipeline: ClassVar[str]
    image_pipeline: ClassVar[str] = "StableDiffusion3Img2ImgPipeline"
    refused: ClassVar[frozenset[str]] = frozenset()
    exportable: ClassVar[bool] = True
    lacks: ClassVar[Mapping[str, str]] = {}
    capturable: ClassVar[bool] = True
    free_size: ClassVar[bool] = False
    is_reference: ClassVar[bool] = True
    engine: ClassVar[str] = "ring"
    controls: Controls | None = None

    def __init__(self, pipe: Any):
        if getattr(pipe, self.network, None) is None:
            raise ValueError(
                f"{type(pipe).__name__} has no {self.network}, which {type(self).__name__} calls: pass another family="
            )
        self._given = pipe
        self.pipe = self._text_to_image(pipe)
        self.scheduler = copy.deepcopy(pipe.scheduler)  # whose schedule is read; the stream's own
        self.texts: dict[str, Any] = {}  # what prompts were encoded to
        self.rebuild(getattr(pipe, self.network))

    @property
    def base(self) -> nn.Module:
        """The network without what compiles or adapts it."""
        return base_network(self.net)

    def rebuild(self, network: nn.Module) -> None:
        """Make the velocity of another network of the same family."""
        self.net = network
        velocity = self.Velocity(network)
        self.velocity = self.controls.over(velocity) if self.controls else velocity

    def follow_pipe(self) -> None:
        """Take over the parts that the pipe has now. The network and the codec are the stream's to rebuild."""
        if self.pipe is self._given:
            return
        for name, part in self.pipe.components.items():
            if getattr(self._given, name, None) is not part:
                setattr(self.pipe, name, getattr(self._given, name))

    def set_controls(self, controls: Controls | None) -> None:
        """Make the velocity with these control nets, or with none."""
        self.controls = controls
        self.shared_inputs = (*type(self).shared_inputs, *((LEVELS,) if controls else ()))
        self.exportable = type(self).exportable and not controls  # torch.export has no free sizes for arguments by **name
        self.rebuild(self.net)

    def row_by_row(self, guided: bool) -> RowByRow:
        """The velocity in the very calls that the pipeline makes, frame by frame; `guided` under `cfg_type="full"`."""
        return RowByRow(self.velocity, guided and self.guidance_in_one_call, self.shared_inputs)

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide, from the VAE's config."""
        return self.pipe.vae_scale_factor

    @property
    def multiple(self) -> int:
        """What width and height must be multiples of, in pixels."""
        return self.factor

    @property
    def default_size(self) -> int:
        """The pipeline's default width and height in pixels."""
        return self.pipe.default_sample_size * self.factor

    def size_like(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in these proportions, with about as many pixels as the default size."""
        scale = self.default_size / math.sqrt(width * height)
        return tuple(max(1, round(scale * side / self.multiple)) * self.multiple for side in (width, height))

    @property
    def latent_channels(self) -> int:
        """The channels that the VAE must have."""
        return self.base.config.in_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one frame's latent, as the pipeline takes `latents=`, without the batch dimension."""
        return self.latent_channels, height // self.factor, width // self.factor

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError where the pipeline could not draw this size."""
        for name, size in (("height", height), ("width", width)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an integer number of pixels, not {size!r}")
            if size <= 0 or size % self.multiple:
                below = max(self.multiple, size // self.multiple * self.multiple)
                raise ValueError(f"{name} must be a positive multiple of {self.multiple} pixels, not {size}: try {below}")

    def codec(self, vae: nn.Module, height: int, width: int) -> Codec:
        """The codec of this VAE for pictures of this size."""
        self.check_vae(vae)
        return Codec(vae)

    def check_vae(self, vae: nn.Module) -> None:
        """Raise ValueError where a VAE's latents are not of the network's kind."""
        channels = getattr(vae.config, self.vae_channels, None)
        if channels != self.latent_channels:
            raise ValueError(
                f"this {type(vae).__name__} has {channels or 'no'} latent channels, the network draws "
                f"{self.latent_channels}: load the VAE that belongs to this family"
            )

    # -- latents --------------------------------------------------------------------------------------------------------

    path = staticmethod(add_noise)
    """Clean latents x0 on their way to `noise`, all `[rows, ...]`, at levels sigma; by default the straight line."""

    def latent_mask(self, mask: Tensor, height: int, width: int) -> Tensor:
        """A mask `[n, 1, height, width]` in the form of latents, by nearest neighbour as the pipelines take it (diffusers
        pipelines/stable_diffusion_3/pipeline_stable_diffusion_3_inpaint.py, `prepare_mask_latents`)."""
        return interpolate(mask, self.latent_shape(height, width)[-2:])

    # -- what the pipeline would do ------------------------------------------------------------------------------------

    def read(
        self, arguments: Mapping[str, Any], steps: int, height: int, width: int, guided: bool
    ) -> tuple[Schedule, Prompt]:
        """(Schedule, Prompt) for the pipeline's own call with these arguments. `guided`: with a negative prompt's cond.

        Raises what the pipeline raises about its arguments; NotImplementedError for one that reaches the network and
        that this family does not stream; ValueError for embeddings of a wrong width or of several prompts.
        """
        try:
            with encoding(self.pipe):
                recording = self._record(dict(arguments), steps, height, width, guided)
        except (TypeError, AttributeError) as error:
            parts = self.pipe.components.items()
            lacking = [name for name, part in parts if part is None and name.startswith(TEXT_PARTS)]
            if arguments.get("prompt") is None or not lacking or "NoneType" not in str(error):
                raise
            raise ValueError(
                f"this {type(self.pipe).__name__} has no {', '.join(lacking)} and could not encode its prompt ({error}): "
                f"put that back, or pass prompt_embeds and what else its call takes in the place of prompts"
            ) from error
        return self.schedule(recording, steps), self._prompt(recording, guided)

    def schedule(self, recording: Recording, steps: int) -> Schedule:
        """The schedule; by default the one that the pipeline's scheduler holds."""
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

    def weight(self, scale: float, arguments: Mapping[str, Any], schedule: Schedule) -> Weight:
        """The guidance weight at this scale of `guidance_argument`, with all that the pipeline does to what it guides.
        `arguments` are the pipeline's own, as far as given; `schedule` says at which steps it guides."""
        return Weight(scale)

    def check_settings(self, cfg_type: str, do_add_noise: bool) -> None:
        """Raise ValueError where the stream would not follow the pipeline under these settings."""
        check_sampling(self.scheduler)

    def rule(self, do_add_noise: bool) -> Rule:
        """How rows take their steps: as the pipeline's scheduler does, or re-noised with the frames' own noise."""
        return rule_of(type(self.scheduler).__name__, self.scheduler.config, do_add_noise)

    def check_offers(self, feature: str) -> None:
        """Raise NotImplementedError for what a stream of this family does not offer, with the remedy."""
        if feature in self.lacks:
            raise NotImplementedError(f"{type(self).__name__} does not offer {feature}: {self.lacks[feature]}")

    def check_guided(self) -> None:
        """Raise ValueError where the pipeline knows no negative prompt, which "full" and "initialize" need."""
        if self.guidance_argument is None:
            raise ValueError(
                f"{type(self.pipe).__name__} has no classifier-free guidance, only what is embedded in its network: choose "
                f"cfg_type='none', or 'self' for images"
            )

    def settle(self, arguments: Mapping[str, Any], prompt: Any) -> None:
        """Take note of what a `prepare` brings before anything is planned; ValueError where that cannot be drawn."""

    def start_index(self, schedule: Schedule, strength: float) -> int:
        """The first step of image-to-image at this strength, read off the image pipeline's own `get_timesteps`."""
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
        import diffusers

        holder = _TimestepHolder(schedule)
        get_timesteps = getattr(diffusers, self.image_pipeline).get_timesteps
        timesteps, _ = get_timesteps(holder, len(schedule), strength, "cpu")
        if not len(timesteps):
            raise ValueError(
                f"strength {strength} of {len(schedule)} steps leaves no step to take: "
                f"raise it to {1 / len(schedule):.3g} or raise num_inference_steps"
            )
        return len(schedule) - len(timesteps)

    def default(self, name: str) -> Any:
        """The pipeline's own default for one of its arguments."""
        return self._parameters()[name].default

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise TypeError for names that are not the pipeline's, or that the stream sets itself."""
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

    def check_embeds(self, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError for embeddings, passed by the pipeline's own names, that do not fit the network."""
        for name, value in arguments.items():
            given = self.embeds.get(name.removeprefix("negative_"))
            if given and isinstance(value, Tensor):
                self._check_embeds(name, given, value, 1)

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        parameters = dict(inspect.signature(type(self.pipe).__call__).parameters)
        parameters.pop("self", None)
        return parameters

    def _text_to_image(self, pipe: Any) -> Any:
        """The pipe itself, or the text-to-image one of the same parts if it starts from an image or has control nets.
        Prompts are encoded by the pipe's own method, which a subclass may have changed."""
        if "strength" not in inspect.signature(type(pipe).__call__).parameters and not hasattr(pipe, "controlnet"):
            return pipe
        import diffusers

        parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
        text = getattr(diffusers, self.text_pipeline)(**parts)
        vars(text)["encode_prompt"] = pipe.encode_prompt
        return text

    def _record(self, arguments: dict[str, Any], steps: int, height: int, width: int, guided: bool) -> Recording:
        if guided:
            arguments[self.guidance_argument] = max(2.0, arguments.get(self.guidance_argument) or 0.0)
            self._settle_negative_prompt(arguments)
        else:
            arguments.pop("negative_prompt", None)
            if "negative_prompt" in self._parameters():
                arguments["negative_prompt"] = None
            if self.guidance_argument:
                arguments[self.guidance_argument] = self.unguided
        dtype = self.latent_dtype or self.base.dtype
        latents = torch.zeros(1, *self.latent_shape(height, width), device=self.pipe.device, dtype=dtype)
        size = {"height": height, "width": width, "latents": latents, "num_inference_steps": steps}
        return record(self.pipe, self.network, self.sample, self.scheduler, self.texts, **size, **arguments)

    def _settle_negative_prompt(self, arguments: dict[str, Any]) -> None:
        """Leave out an empty negative prompt where the pipeline takes none; refuse another one, and none at all."""
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

    def _inputs(self, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a recorded call that belong to the prompt; an unforeseen one is refused by name."""
        plain = {self.sample, self.time, "return_dict"}
        inputs = {}
        for name, value in call.items():
            if name in plain or value is None or (isinstance(value, dict) and not value):
                continue
            if name not in self.row_inputs + self.shared_inputs:
                raise NotImplementedError(
                    f"{type(self.pipe).__name__} hands its network {name!r}, which StreamFlow does not stream for "
                    f"{type(self).__name__}: leave out the argument that sets it"
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

    def _check_embeds(self, called: str, name: str, value: Tensor, count: int) -> None:
        if len(value) != count:
            raise ValueError(f"{called} holds {len(value) // count} prompts: a stream takes one prompt at a time")
        width = self.base.config[self.widths[name]] if name in self.widths else value.shape[-1]
        if value.shape[-1] != width:
            raise ValueError(
                f"{called} is {value.shape[-1]} wide, this network's {self.widths[name]} is {width}: "
                f"pass embeddings made by this pipeline's own text encoders"
            )


class _TimestepHolder:
    """What `get_timesteps` of an image pipeline needs of `self`."""

    def __init__(self, schedule: Schedule):
        self.scheduler = self
        self.timesteps, self.sigmas, self.order = schedule.timesteps, schedule.sigmas, 1

    def set_begin_index(self, index: int) -> None:
        """The holder takes no step."""
