"""The attributes that StreamDiffusion's users read off a stream and assign. What is read is derived from what a StreamFlow
holds; what is assigned acts at the next call, or raises AttributeError with the call that does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from streamflow._validation import check_bool
from streamflow.conditioning.prompt import Cond
from streamflow.flow.convention import per_row
from streamflow.flow.guidance import mode
from streamflow.flow.schedule import check_indices
from streamflow.models.pipe_parts import check_sampling
from streamflow.models.protocols import Scheduler
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.inputs import Inputs
from streamflow.stream.model import Model
from streamflow.stream.outputs import Outputs
from streamflow.stream.request import Request, Seeds
from streamflow.stream.updates import Updates

_ANEW = "it shapes everything that the stream holds: make a new StreamFlow of the same pipe"
_MOVE = "the stream is where its pipe is: pipe.to(...), then make a new StreamFlow of it"
_SIGMAS = "it follows from the schedule: assign t_list, or call update(t_index_list=...), update(num_inference_steps=...)"
READ_ONLY = {
    **dict.fromkeys(("device", "dtype", "torch_dtype"), _MOVE),
    **dict.fromkeys(("height", "width", "latent_height", "latent_width", "frame_bff_size", "frame_buffer_size"), _ANEW),
    **dict.fromkeys(("pipe", "adapter", "family"), _ANEW),
    **dict.fromkeys(
        ("batch_size", "trt_unet_batch_size"), "it is the number of rows of the ring: assign t_list or cfg_type"
    ),
    "denoising_steps_num": "it is the length of t_list: assign t_list",
    **dict.fromkeys(("timesteps", "sub_timesteps", "sub_timesteps_tensor"), _SIGMAS),
    **dict.fromkeys(("alpha_prod_t_sqrt", "beta_prod_t_sqrt", "c_skip", "c_out"), _SIGMAS),
    "acceleration": "call accelerate(kind)",
    "controls": "call add_control(name, model), remove_control(name) or set_control_scale(name, scale)",
    "image_prompts": "call its load(...), set(image), set_scale(scale) or unload(...)",
    "loras": "call load_lora(...), set_adapters(...) or unload_lora(...)",
    **dict.fromkeys(("request", "prepared"), "call prepare(prompt) or update(...)"),
    "text_encoder": "prompts are encoded by the pipe: assign pipe.text_encoder, then prepare",
    "image_processor": "images are read by preprocess: call stream(processor.preprocess(image)) with input_range=(-1, 1)",
    "input_range": "make a new StreamFlow of the same pipe with input_range=...",
    **{
        name: f"call update({name}=...)"
        for name in (
            *("prompt", "negative_prompt", "num_inference_steps", "strength"),
            *("prompt_weights", "blend", "normalize", "noise", "noise_period", "feedback"),
        )
    },
}


class Attributes:
    """What StreamDiffusion's users read off a stream and assign. Names and shapes are StreamDiffusion's; nothing here is
    stored twice. A tensor that is read is the caller's own copy: writing into it changes nothing until it is assigned."""

    def __init__(self, model: Model, denoiser: Denoiser, updates: Updates, inputs: Inputs, outputs: Outputs) -> None:
        self._model, self._denoiser, self._updates = model, denoiser, updates
        self._inputs, self._outputs = inputs, outputs

    # -- what is drawn ------------------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """The pipeline's guidance_scale; assigning it is `update(guidance_scale=...)`."""
        return self._updates.requested().guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        self._updates.update(guidance_scale=value)

    @property
    def delta(self) -> float:
        """How strongly residual guidance acts; assigning it is `update(delta=...)`."""
        return self._updates.requested().request.delta

    @delta.setter
    def delta(self, value: float) -> None:
        self._updates.update(delta=value)

    @property
    def cfg_type(self) -> str:
        """How rows are guided. Assigning it is `update(cfg_type=...)`, and later calls of `prepare` keep it."""
        return self._updates.current("cfg_type")

    @cfg_type.setter
    def cfg_type(self, value: str) -> None:
        self._updates.keep(cfg_type=value)

    @property
    def do_add_noise(self) -> bool:
        """Whether every stage predicts x0 and adds noise again. Assigning it is `update(do_add_noise=...)`, and later calls
        of `prepare` keep it."""
        return self._updates.current("do_add_noise")

    @do_add_noise.setter
    def do_add_noise(self, value: bool) -> None:
        check_bool("do_add_noise", value)
        self._updates.keep(do_add_noise=value)

    @property
    def t_list(self) -> list[int]:
        """The steps at which a frame stops. Assigning is `update(t_index_list=...)`, which later calls of `prepare` keep."""
        if self._denoiser.state is None:
            return list(self._updates.defaults["t_index_list"] or [0])
        return list(self._updates.requested().stages.indices)

    @t_list.setter
    def t_list(self, value: Sequence[int]) -> None:
        self._updates.keep(t_index_list=check_indices(value))

    t_index_list = t_list

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has been called."""
        return self._denoiser.state is not None

    @property
    def request(self) -> Request:
        """The arguments of `prepare` as they stand now, after every `update`."""
        return self._updates.requested().request

    @property
    def use_denoising_batch(self) -> bool:
        """Whether frames share calls of the network. Assigning it is `set_denoising_batch`, which needs an empty ring."""
        return self._denoiser.batched

    @use_denoising_batch.setter
    def use_denoising_batch(self, value: bool) -> None:
        self._denoiser.set_batched(value)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the stream: its copy of the pipe's, or the one that was assigned here. Assigning one acts at the
        next call, after the frames in flight have finished, and leaves the pipe unchanged. The scheduler's own settings,
        such as `set_shift`, act at the next `prepare`."""
        return self._model.adapter.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._model.check_open()
        check_sampling(scheduler)
        before, self._model.adapter.scheduler = self._model.adapter.scheduler, scheduler
        try:
            if self._denoiser.state is not None:
                self._updates.amend(self._updates.planner.plan_again)
        except BaseException:
            self._model.adapter.scheduler = before
            raise

    @property
    def text_encoder(self) -> nn.Module | None:
        """The pipe's first text encoder."""
        return getattr(self._model.pipe, "text_encoder", None)

    @property
    def seed(self) -> Seeds | None:
        """The seed of all noise, or several with weights; None under a generator. Assigning it is `update(seed=...)`."""
        return None if self._denoiser.state is None else self._updates.requested().noise.seed

    @seed.setter
    def seed(self, value: Seeds) -> None:
        if value is None:
            raise TypeError("seed must be an integer or a list of (integer, weight), not None")
        self._updates.update(seed=value)

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of all noise; None where a seed decides it. An assigned generator acts from the next frame on."""
        return None if self._denoiser.state is None else self._updates.requested().noise.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        if self._denoiser.state is None:
            raise AttributeError("generator is set by prepare(prompt, generator=...)")
        if generator is None and self.generator is None:
            return
        make = self._updates.planner.noise
        self._updates.amend(lambda plan: replace(plan, noise=make(generator, None, plan.request.period)))

    @property
    def prompt_embeds(self) -> Tensor:
        """The embeddings of new frames' rows, `[rows, tokens, width]`: the negative prompt's, one for each row that has a
        negative twin (`batch_size` under `cfg_type="full"`, F under "initialize"), then the prompt's, `batch_size` of them.

        Assigning embeddings of one prompt, in this layout or `[1, tokens, width]` without a negative one, acts on all rows,
        until another prompt is given. ValueError where rows differ: a stream has one prompt at a time.
        """
        prompt, (count, rows) = self._updates.requested().prompt, self._next_row_counts()
        cond = self._embeds(prompt.cond).expand(count, -1, -1)
        if not rows:
            return cond.clone()
        uncond = self._embeds(prompt.negative)
        if uncond.shape[1:] != cond.shape[1:]:
            raise AttributeError(
                f"the prompt has {cond.shape[1]} tokens and the negative prompt {uncond.shape[1]}, which one tensor cannot "
                f"hold"
            )
        return torch.cat((uncond.expand(rows, -1, -1), cond))

    @prompt_embeds.setter
    def prompt_embeds(self, value: Tensor) -> None:
        own, (count, rows) = self._embeds(self._updates.requested().prompt.cond), self._next_row_counts()
        if not isinstance(value, Tensor) or value.ndim != 3 or len(value) not in (1, count, rows + count):
            raise ValueError(
                f"prompt_embeds is a tensor [{rows + count}, tokens, width] or [1, tokens, width], not "
                f"{_shape_or_type(value)}"
            )
        twins = max(0, len(value) - count)
        cond, uncond = (self._one_row(part, own) if len(part) else None for part in (value[twins:], value[:twins]))
        self._updates.assign_embeds(cond, uncond)

    def _embeds(self, cond: Cond) -> Tensor:
        name = self._model.adapter.embeds.get("prompt_embeds")
        if name is None:
            raise AttributeError(
                f"{type(self._model.adapter).__name__} calls the whole pipeline, which keeps its embeddings to itself"
            )
        return cond.rows[name]

    @staticmethod
    def _one_row(rows: Tensor, like: Tensor) -> Tensor:
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("prompt_embeds holds NaN or infinite values")
        if not bool((rows == rows[:1]).all()):
            raise ValueError(
                "the rows of prompt_embeds differ, and all frames have one prompt at a time: assign one row, or give each "
                "frame its own, update(prompt_embeds=..., scope='frame') before it"
            )
        return rows[:1].detach().to(like.device, like.dtype, copy=True)

    # -- noise --------------------------------------------------------------------------------------------------------

    @property
    def init_noise(self) -> Tensor:
        """The noise that image frames share, `[batch_size, ...]`, the same in every row. Assigning `[n, ...]` lets image
        frames that enter from now on share its first row, as StreamDiffusion's `encode_image` does."""
        noise = self._updates.requested().noise.preview().to(self._model.device, self._model.dtype)
        return noise.repeat(self.batch_size, *([1] * len(self._model.shape)))

    @init_noise.setter
    def init_noise(self, value: Tensor) -> None:
        self._model.adapter.check_offers("images")
        policy = self._updates.requested().request.noise
        if policy != "fixed":
            raise AttributeError(
                f"image frames share no noise under noise={policy!r}: update(noise='fixed') first, or update(seed=...)"
            )
        if not isinstance(value, Tensor) or tuple(value.shape[1:]) != tuple(self._model.shape) or not len(value):
            raise ValueError(
                f"init_noise is a tensor [rows, {', '.join(map(str, self._model.shape))}], not "
                f"{_shape_or_type(value)}; update(seed=...) draws another one"
            )
        self._updates.amend(lambda requested: replace(requested, noise=requested.noise.with_fixed(value[:1])))

    @property
    def stock_noise(self) -> Tensor:
        """The noise that residual guidance takes each row for, `anchor + v_uncond`, `[batch_size, ...]`, as the next call
        will for rows that go on; zeros without anchors. Assigning it moves the anchors of frames in flight; `delta`
        moderates the guidance of all."""
        noise = self._denoiser.one_ring("stock_noise").residual_noise
        if noise is None:
            return torch.zeros((self.batch_size, *self._model.shape), device=self._model.device, dtype=self._model.dtype)
        return noise.to(self._model.dtype)

    @stock_noise.setter
    def stock_noise(self, value: Tensor) -> None:
        now = self.stock_noise
        if not isinstance(value, Tensor) or value.shape != now.shape:
            raise ValueError(f"stock_noise is a tensor {list(now.shape)}, not {_shape_or_type(value)}")
        if torch.equal(value.to(now), now):
            return
        with self._denoiser.ticks:
            engine = self._denoiser.running()
            if engine.residual_noise is None or engine.waiting is None:
                raise AttributeError(
                    f"no frame in flight has a residual noise that could be changed (cfg_type {self.cfg_type!r}, "
                    f"{self._denoiser.in_flight()} frames in flight): delta=... moderates residual guidance, "
                    f"update(seed=...) draws other noise"
                )
            engine.residual_noise = value.to(self._model.device).float()
            self._outputs.redraw()

    @property
    def x_t_latent_buffer(self) -> Tensor | None:
        """The rows in flight, `[(S - 1) F, ...]`, newest first; None with one stage. Assigning a tensor of this shape
        replaces their latents; assigning None is `reset()`."""
        waiting = self._denoiser.one_ring("x_t_latent_buffer").waiting
        return None if waiting is None else waiting.clone()

    @x_t_latent_buffer.setter
    def x_t_latent_buffer(self, value: Tensor | None) -> None:
        if value is None:
            return self._denoiser.empty("reset()")
        self._denoiser.check_step("x_t_latent_buffer = ...")
        with self._denoiser.ticks:
            engine = self._denoiser.one_ring("x_t_latent_buffer")
            waiting = engine.waiting
            if waiting is None or not isinstance(value, Tensor) or value.shape != waiting.shape:
                rows = "None, there are no rows in flight" if waiting is None else list(waiting.shape)
                raise ValueError(f"x_t_latent_buffer is {rows}, not {_shape_or_type(value)}; None empties the ring")
            if engine.empty:
                raise AttributeError(
                    "no frame is in flight, so there are no latents to replace: predict_x0_batch(latents) and "
                    "txt2img(latents=...) take latents in"
                )
            engine.waiting = value.to(self._model.device, self._model.dtype)
            self._outputs.redraw()

    # -- what follows from it -------------------------------------------------------------------------------------------

    @property
    def denoising_steps_num(self) -> int:
        """S, the number of stages of the frames in flight."""
        return len(self.t_list) if self._denoiser.engine is None else len(self._denoiser.engine.settings.stages)

    @property
    def batch_size(self) -> int:
        """The rows that a call of the network advances: S F, or F without the denoising batch."""
        return self._row_counts()[0]

    @property
    def trt_unet_batch_size(self) -> int:
        """The rows of a call of the network, with those of the negative prompt."""
        return sum(self._row_counts())

    def _row_counts(self) -> tuple[int, int]:
        """(rows that are advanced, rows of the negative prompt) of a call."""
        engine = self._denoiser.engine
        return self._next_row_counts() if engine is None else engine.row_counts

    def _next_row_counts(self) -> tuple[int, int]:
        """As `_row_counts`, of the next call."""
        frames = self._model.frames
        count = len(self.t_list) * frames if self._denoiser.batched else frames
        return count, mode(self.cfg_type).extra_rows(count, frames)

    @property
    def timesteps(self) -> Tensor:
        """The whole schedule's timesteps, float32 `[N]`."""
        return self._denoiser.prepared().schedule.timesteps.to(self._model.device, copy=True)

    @property
    def sub_timesteps(self) -> list[Tensor]:
        """The stages' timesteps, one tensor each."""
        return list(self._denoiser.prepared().stages.timesteps.to(self._model.device, copy=True))

    @property
    def sub_timesteps_tensor(self) -> Tensor:
        """The timestep of each row of the denoising batch, float32 `[S F]` (`[S]` without the batch)."""
        return self._by_row(self._denoiser.prepared().stages.timesteps)

    @property
    def beta_prod_t_sqrt(self) -> Tensor:
        """How much noise is in each row: sigma, `[S F, 1, ...]`. Read-only."""
        rows = self._by_row(self._denoiser.prepared().stages.sigmas)
        return per_row(rows, torch.empty((0, *self._model.shape))).to(self._model.dtype)

    @property
    def alpha_prod_t_sqrt(self) -> Tensor:
        """How much image is in each row: 1 - sigma, `[S F, 1, ...]`. Read-only."""
        return 1.0 - self.beta_prod_t_sqrt

    @property
    def c_skip(self) -> Tensor:
        """Raises AttributeError, with the reason."""
        raise AttributeError(
            "c_skip and c_out belong to LCM's boundary condition; a flow's step is x + (sigma_next - sigma) v"
        )

    c_out = c_skip

    @property
    def inference_time_ema(self) -> float:
        """A moving average of a call's seconds; on a GPU of those that the device has finished."""
        return self._outputs.timer.average

    @inference_time_ema.setter
    def inference_time_ema(self, value: float) -> None:
        self._outputs.timer.average = value

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _by_row(self, values: Tensor) -> Tensor:
        repeats = self._model.frames if self._denoiser.batched else 1
        return values.to(self._model.device).repeat_interleave(repeats)


def _shape_or_type(value: object) -> str:
    """What a value is, for an error about its shape."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
