"""What a request comes to: the schedule, the stages, the prompt's cond, the weight in force and the noise. It asks the
pipeline through the adapter, keeps nothing, and changes nothing."""

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
from streamflow.stream.request import AssignedEmbeds, Prepared, Request, is_plain, same

DEFAULT_SEED = 2
RESIDUAL_GUIDANCE = 1.2


@dataclass(frozen=True)
class Planner:
    """Plans for one model. `cache` holds what prompts became since the last `plan`."""

    model: Model
    cache: Cache = field(default_factory=Cache, compare=False)

    @property
    def adapter(self) -> FlowAdapter:
        """The family's adapter."""
        return self.model.adapter

    def check(self, cfg_type: str, do_add_noise: bool) -> None:
        """Raise ValueError where the pipeline cannot be streamed under these settings."""
        self.adapter.check_settings(cfg_type, do_add_noise)
        if mode(cfg_type).extra_rows(1, 1):
            self.adapter.check_guided()

    def plan(self, request: Request, generator: torch.Generator | None, seed: int | None) -> Prepared:
        """What this request comes to, from nothing. Raises what is wrong with it."""
        self.check(request.cfg_type, request.do_add_noise)
        noise, scale = self.noise(generator, seed, request.period), self._scale(request)
        self.forget_prompts()
        schedule, prompt = self._read(request)
        guidance = self._guidance(request, scale, schedule)
        return Prepared(request, schedule, self._pick(request, schedule), prompt, *guidance, noise)

    def change(self, asked: Prepared, request: Request, seed: int | None) -> Prepared:
        """What `asked` becomes under another request; the pipeline is asked again only where it must be."""
        self.check(request.cfg_type, request.do_add_noise)
        noise = asked.noise.moving(request.period) if seed is None else self.noise(None, seed, request.period)
        scale, name = self._scale(request), self.adapter.guidance_argument
        schedule, prompt = asked.schedule, asked.prompt
        if not same(request.read_key(name), asked.request.read_key(name)):
            schedule, prompt = self._read(request)
        elif any(a is not b for a, b in zip(request.assigned_embeds, asked.request.assigned_embeds, strict=True)):
            prompt = self._read(request)[1]
        guidance = self._guidance(request, scale, schedule)
        stages = self._pick(request, schedule)
        if stages.same_levels(asked.stages):
            stages = asked.stages
        return Prepared(request, schedule, stages, prompt, *guidance, noise)

    def forget_prompts(self) -> None:
        """Encode prompts anew when they are asked for again."""
        self.cache.clear()
        self.adapter.texts.clear()

    def plan_again(self, asked: Prepared) -> Prepared:
        """`asked` as the pipeline's text encoders and scheduler make it now."""
        self.forget_prompts()
        again = self.plan(asked.request, None, DEFAULT_SEED)
        same = again.stages.same_levels(asked.stages)
        return replace(again, noise=asked.noise, stages=asked.stages if same else again.stages)

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
    def seed(seed: Any) -> Any:
        """A seed, or seeds with weights, as a stream keeps them: `streamflow.flow.noise.resolve_seeds`."""
        return resolve_seeds(as_weighted("seed", seed, Integral, "7"))

    def _read(self, request: Request) -> tuple[Schedule, Prompt]:
        """What the pipeline would do with this request, of which it is asked text by text."""
        schedule, prompt = self._encoded(request)
        return schedule, self._assigned(prompt, request.assigned_embeds)

    def _assigned(self, prompt: Prompt, embeds: AssignedEmbeds) -> Prompt:
        """The prompt with embeddings that were assigned in the place of its own."""
        if embeds[0] is None and embeds[1] is None:
            return prompt
        name = self.adapter.embeds.get("prompt_embeds")
        cond, uncond = (
            one if one is None or value is None else Cond({**one.rows, name: _fitting(value, one, name)}, one.shared)
            for one, value in zip((prompt.cond, prompt.uncond), embeds, strict=True)
        )
        return replace(prompt, cond=cond, uncond=uncond)

    def _encoded(self, request: Request) -> tuple[Schedule, Prompt]:
        if not isinstance(request.prompt, tuple) and not isinstance(request.negative_prompt, tuple):
            return self._ask(request, request.prompt, request.negative_prompt)
        self.adapter.check_offers("blending")
        positive, negative = parts(request.prompt), parts(request.negative_prompt)
        one = replace(request, prompt=positive[0][0], negative_prompt=negative[0][0])
        asked = [self._ask(replace(one, prompt=text), "prompt", text) for text, _ in positive]
        cond = self._blend(request, [prompt.cond for _, prompt in asked], positive)
        if asked[0][1].uncond is None:
            return asked[0][0], Prompt(cond)
        against = [self._ask(replace(one, negative_prompt=text), "negative_prompt", text) for text, _ in negative]
        return asked[0][0], Prompt(cond, self._blend(request, [prompt.uncond for _, prompt in against], negative))

    def _blend(self, request: Request, conds: list[Cond], weighted: Weighted) -> Cond:
        weights = shares(weighted, request.normalize)
        return blend(conds, weights, request.blend, set(self.adapter.embeds.values()))

    def _ask(self, request: Request, *texts: str | None) -> tuple[Schedule, Prompt]:
        """As `_read`, of one prompt and one negative prompt; kept under these texts, since weights change more often."""
        *_, steps, scale, arguments = request.read_key(self.adapter.guidance_argument)
        key = (texts, steps, scale, request.guided, repr(sorted(arguments.items())))
        return self.cache.get(key, lambda: self._encode(request)) if is_plain(arguments) else self._encode(request)

    def _encode(self, request: Request) -> tuple[Schedule, Prompt]:
        """Ask the pipeline what it would do with this request."""
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
        """The pipeline's guidance scale that is asked for, by name or by default."""
        adapter, name = self.adapter, self.adapter.guidance_argument
        scale = request.guidance_scale if name == "guidance_scale" else request.arguments.get(name)
        check_number(name, scale)
        if request.mode.name == "none":
            return adapter.unguided
        if scale is not None:
            return float(scale)
        return RESIDUAL_GUIDANCE - (1.0 - adapter.unguided) if request.mode.carries_anchor else adapter.default(name)

    def _guidance(self, request: Request, scale: float, schedule: Schedule) -> tuple[float, Weight]:
        """(the pipeline's guidance_scale, the weight in force) under this request."""
        adapter = self.adapter
        shown = scale
        if adapter.guidance_argument != "guidance_scale":
            shown = adapter.default("guidance_scale") if request.guidance_scale is None else request.guidance_scale
        in_force = request.mode.scale(scale, request.delta, adapter.unguided)
        return float(scale if shown is None else shown), adapter.weight(in_force, request.arguments, schedule)


def _fitting(value: Tensor, cond: Cond, name: str) -> Tensor:
    """Embeddings in the place of those of this name. ValueError for another width, or for another number of tokens where
    other tensors of the cond depend on that."""
    own = cond.rows[name]
    fixed = cond.shared or any("mask" in one for one in cond.rows)
    if value.shape[-1] != own.shape[-1] or (fixed and value.shape != own.shape):
        raise ValueError(
            f"prompt_embeds was assigned as {list(value.shape)}, and the prompt is {list(own.shape)} now: embeddings of "
            f"another size come by update(prompt_embeds=...), with what the pipeline takes beside them"
        )
    return value.to(own.device, own.dtype)
