"""What a request comes to: the schedule, the stages, the prompt's cond, the weight in force and the noise. It asks the
pipeline through the adapter, keeps nothing, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from streamflow.blending import Cache, Weighted, as_weighted, blend, parts, shares
from streamflow.changes import Prepared, Request, check_number, same_key
from streamflow.conditioning import Cond, Prompt
from streamflow.guidance import Mode, Weight
from streamflow.models.base import FlowAdapter
from streamflow.noise import NoiseSource
from streamflow.schedule import Schedule, Stages

DEFAULT_SEED = 2
RESIDUAL_GUIDANCE = 1.2


@dataclass(frozen=True)
class Planner:
    """Plans for one stream: `shape` is a frame's latent shape, `height` and `width` are pixels; `noise_period` is that of
    requests by `prepare`. `cache` holds what prompts became since the last `plan`."""

    adapter: FlowAdapter
    mode: Mode
    shape: tuple[int, ...]
    height: int
    width: int
    noise_period: int = 30
    cache: Cache = field(default_factory=Cache, compare=False)

    def __post_init__(self) -> None:
        if self._guided:
            self.adapter.check_guided()

    @property
    def _guided(self) -> bool:
        """Whether a negative prompt takes part."""
        return self.mode.extra_rows(1, 1) > 0

    def plan(self, request: Request, generator: torch.Generator | None, seed: int | None) -> Prepared:
        """What this request comes to, from nothing. Raises what is wrong with it."""
        noise, scale = self.noise(generator, seed, request.period), self._scale(request)
        self.cache.clear()
        schedule, prompt = self._read(request)
        guidance = self._guidance(request, scale, schedule)
        return Prepared(request, schedule, self._pick(request, schedule), prompt, *guidance, noise)

    def change(self, asked: Prepared, request: Request, seed: int | None) -> Prepared:
        """What `asked` becomes under another request; the pipeline is asked again only where it must be."""
        noise = asked.noise.moving(request.period) if seed is None else self.noise(None, seed, request.period)
        scale, name = self._scale(request), self.adapter.guidance_argument
        schedule, prompt = asked.schedule, asked.prompt
        if not same_key(request.read_key(name), asked.request.read_key(name)):
            schedule, prompt = self._read(request)
        guidance = self._guidance(request, scale, schedule)
        stages = self._pick(request, schedule)
        if stages.same_levels(asked.stages):
            stages = asked.stages
        return Prepared(request, schedule, stages, prompt, *guidance, noise)

    def encoded_anew(self, asked: Prepared) -> Prepared:
        """`asked` with its prompts as the text encoders make them now."""
        self.cache.clear()
        return replace(asked, prompt=self._read(asked.request)[1])

    def noise(self, generator: torch.Generator | None, seed: Any, period: int | None = None) -> NoiseSource:
        """Noise from a generator, from a seed or from several with weights; from the default seed where none is given."""
        seed = as_weighted("seed", seed, int, "7")
        if generator is not None and seed is not None:
            raise ValueError("pass a generator, which is used as it is, or a seed, not both")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, tuple))):
            raise TypeError(f"seed must be an integer or a list of (integer, weight), not {seed!r}")
        if generator is None and seed is None:
            seed = DEFAULT_SEED
        return NoiseSource(self.shape, seed, generator, period)

    def _read(self, request: Request) -> tuple[Schedule, Prompt]:
        """What the pipeline would do with this request, of which it is asked text by text."""
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
        return self.cache.get((texts, steps, scale, tuple(arguments.items())), lambda: self._encode(request))

    def _encode(self, request: Request) -> tuple[Schedule, Prompt]:
        """Ask the pipeline what it would do with this request."""
        self.adapter.check_embeds(request.arguments)
        arguments = dict(request.arguments)
        if request.prompt is not None:
            arguments["prompt"] = request.prompt
        given = "negative_prompt_embeds" in arguments
        arguments["negative_prompt"] = None if given else request.negative_prompt
        if self.adapter.guidance_argument != "guidance_scale" and request.guidance_scale is not None:
            arguments["guidance_scale"] = request.guidance_scale
        return self.adapter.read(arguments, request.num_inference_steps, self.height, self.width, self._guided)

    def _pick(self, request: Request, schedule: Schedule) -> Stages:
        if request.strength is not None:
            return schedule.pick(range(self.adapter.start_index(schedule, request.strength), len(schedule)))
        return schedule.pick(range(len(schedule)) if request.t_index_list is None else request.t_index_list)

    def _scale(self, request: Request) -> float:
        """The pipeline's guidance scale that is asked for, by name or by default."""
        adapter, name = self.adapter, self.adapter.guidance_argument
        scale = request.guidance_scale if name == "guidance_scale" else request.arguments.get(name)
        check_number(name, scale)
        if self.mode.name == "none":
            return adapter.unguided
        if scale is not None:
            return float(scale)
        return RESIDUAL_GUIDANCE - (1.0 - adapter.unguided) if self.mode.carries_anchor else adapter.default(name)

    def _guidance(self, request: Request, scale: float, schedule: Schedule) -> tuple[float, Weight]:
        """(the pipeline's guidance_scale, the weight in force) under this request."""
        adapter = self.adapter
        shown = scale
        if adapter.guidance_argument != "guidance_scale":
            shown = adapter.default("guidance_scale") if request.guidance_scale is None else request.guidance_scale
        in_force = self.mode.scale(scale, request.delta, adapter.unguided)
        return float(scale if shown is None else shown), adapter.weight(in_force, request.arguments, schedule)
