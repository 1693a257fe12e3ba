"""Planning: a request becomes a schedule, stages, an encoded prompt, a guidance weight and noise. The adapter calls the
pipeline for it. A planner keeps only its cache of encoded prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from streamflow._validation import check_number
from streamflow.conditioning.blending import Cache, Weighted, as_weighted, blend, parts, shares
from streamflow.conditioning.prompt import Cond, Prompt
from streamflow.flow.guidance import Weight, mode
from streamflow.flow.noise import NoiseSource, resolve_seeds
from streamflow.flow.schedule import Schedule, Stages
from streamflow.models.adapter import FlowAdapter
from streamflow.stream.model import Model
from streamflow.stream.request import AssignedEmbeds, Prepared, Request, Seeds, is_plain, same

DEFAULT_SEED = 2
RESIDUAL_GUIDANCE = 1.2


@dataclass(frozen=True)
class Planner:
    """Plans requests for one model. cache: the schedules and prompts that were encoded since the last `plan`."""

    model: Model
    cache: Cache = field(default_factory=Cache, compare=False)

    @property
    def adapter(self) -> FlowAdapter:
        """The family's adapter."""
        return self.model.adapter

    def check_request(self, request: Request) -> None:
        """Raise ValueError for a request that this model cannot draw, whatever the pipeline says."""
        self.check(request.cfg_type, request.do_add_noise)
        if request.feedback and self.model.interleaved:
            raise ValueError(
                "feedback mixes the last image into the next frame, and frames that are drawn on several devices in turn "
                "(interleave) do not wait for each other: use feedback=0"
            )
        if not self.model.image_is_reference:
            return
        name = type(self.adapter.pipe).__name__
        start_from_it = "StreamFlow(..., image_as='start') starts from the image instead"
        if request.strength is not None:
            raise ValueError(
                f"strength is how far a frame departs from its image, and the image of {name} is a reference: frames start "
                f"from noise. Leave it out; {start_from_it}"
            )
        if request.feedback:
            raise ValueError(
                f"feedback mixes the last image into the image from which a frame starts, and frames of {name} start from "
                f"noise: noise='interpolated' keeps them alike; {start_from_it}"
            )

    def check(self, cfg_type: str, do_add_noise: bool) -> None:
        """Raise ValueError where the pipeline cannot be streamed under these settings."""
        self.adapter.check_settings(cfg_type, do_add_noise)
        if mode(cfg_type).extra_rows(1, 1):
            self.adapter.check_guided()

    def plan(self, request: Request, generator: torch.Generator | None, seed: Seeds | None) -> Prepared:
        """Plan a request from the start. Raises TypeError or ValueError for what the pipeline cannot draw."""
        self.check_request(request)
        noise, scale = self.noise(generator, seed, request.period), self._scale(request)
        self.forget_prompts()
        schedule, prompt = self._read(request)
        guidance = self._guidance(request, scale, schedule)
        return Prepared(request, schedule, self._pick(request, schedule), prompt, *guidance, noise)

    def change(self, current: Prepared, request: Request, seed: Seeds | None) -> Prepared:
        """Plan another request, starting from `current`. The pipeline encodes again only where the request needs it."""
        self.check_request(request)
        noise = current.noise.moving(request.period) if seed is None else self.noise(None, seed, request.period)
        scale, name = self._scale(request), self.adapter.guidance_argument
        schedule, prompt = current.schedule, current.prompt
        if not same(request.read_key(name), current.request.read_key(name)):
            schedule, prompt = self._read(request)
        elif any(a is not b for a, b in zip(request.assigned_embeds, current.request.assigned_embeds, strict=True)):
            prompt = self._read(request)[1]
        guidance = self._guidance(request, scale, schedule)
        stages = self._pick(request, schedule)
        if stages.same_levels(current.stages):
            stages = current.stages
        return Prepared(request, schedule, stages, prompt, *guidance, noise)

    def forget_prompts(self) -> None:
        """Clear the cache, so that prompts are encoded again."""
        self.cache.clear()
        self.adapter.texts.clear()

    def plan_again(self, current: Prepared) -> Prepared:
        """`current`, planned again with the pipeline's present text encoders and scheduler."""
        self.forget_prompts()
        again = self.plan(current.request, None, DEFAULT_SEED)
        same = again.stages.same_levels(current.stages)
        return replace(again, noise=current.noise, stages=current.stages if same else again.stages)

    def noise(self, generator: torch.Generator | None, seed: Any, period: int | None = None) -> NoiseSource:
        """Noise from a generator, from a seed or from several with weights; from the default seed where none is given. A
        seed of -1 is a random one. Of a generator and a seed, the generator; seeding it is left to the caller."""
        seed = self.seed(seed)
        if generator is not None and isinstance(seed, tuple):
            raise ValueError("a generator has one seed: pass seed as an integer, or leave the generator out")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
        if generator is None and seed is None:
            seed = DEFAULT_SEED
        return NoiseSource(self.model.shape, None if generator else seed, generator, period)

    @staticmethod
    def seed(seed: object) -> Any:
        """A seed, or seeds with weights, as a stream keeps them: `streamflow.flow.noise.resolve_seeds`."""
        return resolve_seeds(as_weighted("seed", seed, Integral, "7"))

    def read_prompt(self, request: Request) -> Prompt:
        """The prompt of a request, encoded."""
        return self._read(request)[1]

    def _read(self, request: Request) -> tuple[Schedule, Prompt]:
        """The schedule and the prompt of a request. Each text is encoded by itself."""
        schedule, prompt = self._encoded(request)
        return schedule, self._assigned(prompt, request.assigned_embeds)

    def _assigned(self, prompt: Prompt, embeds: AssignedEmbeds) -> Prompt:
        """The prompt with the embeddings that were assigned."""
        if embeds[0] is None and embeds[1] is None:
            return prompt
        name = self.adapter.embeds["prompt_embeds"]
        cond, uncond = prompt.cond, prompt.uncond
        if embeds[0] is not None:
            cond = _with_embeds(cond, name, embeds[0])
        if embeds[1] is not None and uncond is not None:
            uncond = _with_embeds(uncond, name, embeds[1])
        return replace(prompt, cond=cond, uncond=uncond)

    def _encoded(self, request: Request) -> tuple[Schedule, Prompt]:
        if not isinstance(request.prompt, tuple) and not isinstance(request.negative_prompt, tuple):
            return self._cached(request, request.prompt, request.negative_prompt)
        self.adapter.check_offers("blending")
        positive, negative = parts(request.prompt), parts(request.negative_prompt)
        one = replace(request, prompt=positive[0][0], negative_prompt=negative[0][0])
        encoded = [self._cached(replace(one, prompt=text), "prompt", text) for text, _ in positive]
        schedule, prompt = encoded[0]
        cond = self._blend(request, [prompt.cond for _, prompt in encoded], positive)
        if prompt.uncond is None:
            return schedule, Prompt(cond)
        encoded = [self._cached(replace(one, negative_prompt=text), "negative_prompt", text) for text, _ in negative]
        return schedule, Prompt(cond, self._blend(request, [prompt.negative for _, prompt in encoded], negative))

    def _blend(self, request: Request, conds: list[Cond], weighted: Weighted) -> Cond:
        weights = shares(weighted, request.normalize)
        return blend(conds, weights, request.blend, set(self.adapter.embeds.values()))

    def _cached(self, request: Request, *texts: object) -> tuple[Schedule, Prompt]:
        """As `_encode`, from the cache where these texts are in it."""
        *_, steps, scale, arguments = request.read_key(self.adapter.guidance_argument)
        key = (texts, steps, scale, request.guided, repr(sorted(arguments.items())))
        return self.cache.get(key, lambda: self._encode(request)) if is_plain(arguments) else self._encode(request)

    def _encode(self, request: Request) -> tuple[Schedule, Prompt]:
        """The schedule and the prompt of a request with one text for each prompt, by the pipeline's own code."""
        self.adapter.check_embeds(request.arguments)
        arguments = dict(request.arguments)
        if request.prompt is not None:
            arguments["prompt"] = request.prompt
        given = any(name.startswith(("negative_prompt_embeds", "negative_pooled")) for name in arguments)
        arguments["negative_prompt"] = None if given else request.negative_prompt
        if self.adapter.guidance_argument != "guidance_scale" and request.guidance_scale is not None:
            arguments["guidance_scale"] = request.guidance_scale
        return self.adapter.read(arguments, request.num_inference_steps, self.model.height, self.model.width, request.guided)

    def _pick(self, request: Request, schedule: Schedule) -> Stages:
        if request.strength is not None:
            return schedule.pick(range(self.adapter.start_index(schedule, request.strength), len(schedule)))
        return schedule.pick(range(len(schedule)) if request.t_index_list is None else request.t_index_list)

    def _scale(self, request: Request) -> float:
        """The pipeline's guidance scale: the requested one, or the default."""
        adapter, name = self.adapter, self.adapter.guidance_argument
        scale = None
        if name is not None:
            scale = request.guidance_scale if name == "guidance_scale" else request.arguments.get(name)
            check_number(name, scale)
        if request.mode.name == "none":
            return adapter.unguided
        if scale is not None:
            return float(scale)
        if request.mode.carries_anchor or name is None:
            return RESIDUAL_GUIDANCE - (1.0 - adapter.unguided)
        return adapter.default(name)

    def _guidance(self, request: Request, scale: float, schedule: Schedule) -> tuple[float, Weight]:
        """(the pipeline's guidance_scale, the weight in force) under this request."""
        adapter = self.adapter
        shown = scale
        if adapter.guidance_argument != "guidance_scale" and adapter.takes("guidance_scale"):
            shown = adapter.default("guidance_scale") if request.guidance_scale is None else request.guidance_scale
        in_force = request.mode.scale(scale, request.delta, adapter.unguided)
        return float(scale if shown is None else shown), adapter.weight(in_force, request.arguments, schedule)


def _with_embeds(cond: Cond, name: str, value: Tensor) -> Cond:
    """A cond with these embeddings as its tensor of this name. ValueError for another width, or for another number of tokens
    where other tensors of the cond depend on that."""
    own = cond.rows[name]
    fixed = cond.shared or any("mask" in one for one in cond.rows)
    if value.shape[-1] != own.shape[-1] or (fixed and value.shape != own.shape):
        raise ValueError(
            f"prompt_embeds was assigned as {list(value.shape)}, and the prompt is {list(own.shape)} now: embeddings of "
            f"another size come by update(prompt_embeds=...), with what the pipeline takes beside them"
        )
    return Cond({**cond.rows, name: value.to(own.device, own.dtype)}, cond.shared)
