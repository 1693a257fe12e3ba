"""What a request comes to: the schedule, the stages, the prompt's cond, the weight in force and the noise. It asks the
pipeline through the adapter, keeps nothing, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamflow.changes import Prepared, Request, check_number, same_key
from streamflow.conditioning import Prompt
from streamflow.guidance import Mode
from streamflow.models.base import FlowAdapter
from streamflow.noise import NoiseSource
from streamflow.schedule import Schedule, Stages

DEFAULT_SEED = 2
RESIDUAL_GUIDANCE = 1.2


@dataclass(frozen=True)
class Planner:
    """Plans for one stream: `shape` is a frame's latent shape, `height` and `width` are pixels."""

    adapter: FlowAdapter
    mode: Mode
    shape: tuple[int, ...]
    height: int
    width: int

    def plan(self, request: Request, generator: torch.Generator | None, seed: int | None) -> Prepared:
        """What this request comes to, from nothing. Raises what is wrong with it."""
        noise, guidance = self.noise(generator, seed), self._guidance(request)
        schedule, prompt = self._read(request)
        return Prepared(request, schedule, self._pick(request, schedule), prompt, *guidance, noise)

    def change(self, asked: Prepared, request: Request, seed: int | None) -> Prepared:
        """What `asked` becomes under another request; the pipeline is asked again only where it must be."""
        noise = asked.noise if seed is None else self.noise(None, seed)
        guidance = self._guidance(request)
        name = self.adapter.guidance_argument
        schedule, prompt = asked.schedule, asked.prompt
        if not same_key(request.read_key(name), asked.request.read_key(name)):
            schedule, prompt = self._read(request)
        stages = self._pick(request, schedule)
        if stages.same_levels(asked.stages):
            stages = asked.stages
        return Prepared(request, schedule, stages, prompt, *guidance, noise)

    def noise(self, generator: torch.Generator | None, seed: int | None) -> NoiseSource:
        """Noise from a generator or from a seed; from the default seed where neither is given."""
        if generator is not None and seed is not None:
            raise ValueError("pass a generator, which is used as it is, or a seed, not both")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed must be an integer, not {seed!r}")
        if generator is None and seed is None:
            seed = DEFAULT_SEED
        return NoiseSource(self.shape, seed, generator)

    def _read(self, request: Request) -> tuple[Schedule, Prompt]:
        """Ask the pipeline what it would do with this request."""
        self.adapter.check_embeds(request.arguments)
        arguments = dict(request.arguments)
        if request.prompt is not None:
            arguments["prompt"] = request.prompt
        if "negative_prompt_embeds" not in arguments:
            arguments["negative_prompt"] = request.negative_prompt
        if self.adapter.guidance_argument != "guidance_scale" and request.guidance_scale is not None:
            arguments["guidance_scale"] = request.guidance_scale
        guided = self.mode.extra_rows(1, 1) > 0
        return self.adapter.read(arguments, request.num_inference_steps, self.height, self.width, guided)

    def _pick(self, request: Request, schedule: Schedule) -> Stages:
        if request.strength is not None:
            return schedule.pick(range(self.adapter.start_index(schedule, request.strength), len(schedule)))
        return schedule.pick(range(len(schedule)) if request.t_index_list is None else request.t_index_list)

    def _guidance(self, request: Request) -> tuple[float, float]:
        """(the pipeline's guidance_scale, the weight in force) under this request."""
        name = self.adapter.guidance_argument
        own = name == "guidance_scale"
        w = request.guidance_scale if own else request.arguments.get(name)
        check_number(name, w)
        if w is None:
            w = RESIDUAL_GUIDANCE if self.mode.carries_anchor else self.adapter.default(name)
        if self.mode.name == "none":
            w = 1.0
        scale = w if own else request.guidance_scale
        scale = self.adapter.default("guidance_scale") if scale is None else scale
        return float(scale), self.mode.weight(float(w), request.delta)
