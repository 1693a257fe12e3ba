"""Solvers: a table of rules for the step of a row. A rule defines the coefficients that it needs of every stage, whether
rows need noise, the step, the estimate of the image, and the network's output that leads to a given image.

A rule's `levels` hold float32 tensors, one entry a stage; a step gets them as `at`, `[rows, 1, ...]`, on the device, so
that it is arithmetic alone: no table is looked up and the host does not wait. Rules handle rows and noise levels, not
schedulers or networks. The network's output is called v, though it is not a velocity in every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamflow.flow.convention import euler, predict_x0, renoise, velocity_from
from streamflow.flow.schedule import Stages

At = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """One row of the table. levels: what a step needs of the stages besides sigma, sigma_next and dt, `[S]` by name.

    noise: "none"; "own", the noise that the frame started from; or "fresh", one draw a frame and stage.
    step(x, v, at, noise): x at sigma_next. x0(x, v, at): the estimate of the image, float32. toward(x, x0, at): the v that
    leads to x0, float32. All `[rows, ...]`.
    """

    name: str
    noise: str
    step: Callable[[Tensor, Tensor, At, Tensor | None], Tensor]
    x0: Callable[[Tensor, Tensor, At], Tensor] = lambda x, v, at: predict_x0(x, v, at["sigma"])
    toward: Callable[[Tensor, Tensor, At], Tensor] = lambda x, x0, at: velocity_from(x, x0, at["sigma"])
    levels: Callable[[Stages], dict[str, Tensor]] = lambda stages: {}

    def with_own_noise(self) -> Rule:
        """This rule with the noise that the frame started from in place of fresh noise."""
        return replace(self, noise="own")


def _renoise(x: Tensor, v: Tensor, at: At, noise: Tensor | None) -> Tensor:
    """The stochastic step. Without noise, as in a single step outside of a stream, it is Euler's."""
    return euler(x, v, at["dt"]) if noise is None else renoise(x, v, at["sigma"], at["sigma_next"], noise)


# -- affine: where the velocity is A x + B v, with A and B of the stage's time -----------------------------------------


def _affine_levels(stages: Stages) -> dict[str, Tensor]:
    """One Euler step, folded: `x + dt (A x + B v) = (1 + dt A) x + (dt B) v`; A and B are the schedule's coefficients."""
    a, b = stages.coefficients["x"].double(), stages.coefficients["v"].double()
    sigma = stages.sigmas.double()
    dt = stages.sigmas_next.double() - sigma
    exact = {"step_x": 1 + dt * a, "step_v": dt * b, "x0_x": 1 - sigma * a, "x0_v": -sigma * b}
    return {name: value.float() for name, value in exact.items()}


def _affine(x: Tensor, v: Tensor, at: At, noise: Tensor | None) -> Tensor:
    return (at["step_x"] * x.float() + at["step_v"] * v.float()).to(v.dtype)


def _affine_x0(x: Tensor, v: Tensor, at: At) -> Tensor:
    return at["x0_x"] * x.float() + at["x0_v"] * v.float()


def _affine_toward(x: Tensor, x0: Tensor, at: At) -> Tensor:
    return (x0 - at["x0_x"] * x.float()) / at["x0_v"]


# -- TrigFlow: x = cos(angle) x0 + sin(angle) noise ----------------------------------------------------------------------


def _angles(stages: Stages) -> dict[str, Tensor]:
    """Cosines and sines here and at the next stage, the last stage's next angle being 0; number by number, as
    diffusers' SCMScheduler takes them, since a whole vector is rounded differently."""
    here = stages.coefficients["angle"]
    there = torch.cat((here[1:], here.new_zeros(1)))
    functions = {"cos": (torch.cos, here), "sin": (torch.sin, here)}
    functions |= {"cos_next": (torch.cos, there), "sin_next": (torch.sin, there)}
    return {name: torch.stack([function(a) for a in angles]) for name, (function, angles) in functions.items()}


def _trig(x: Tensor, v: Tensor, at: At, noise: Tensor | None) -> Tensor:
    """SCMScheduler.step: the estimate of the image, with noise added again. Without noise it is a DDIM step of the flow."""
    x0 = _trig_x0(x, v, at)
    noise = at["sin"] * x + at["cos"] * v if noise is None else noise
    return (at["cos_next"] * x0 + at["sin_next"] * noise).to(v.dtype)


def _trig_x0(x: Tensor, v: Tensor, at: At) -> Tensor:
    return at["cos"] * x.float() - at["sin"] * v


def _trig_toward(x: Tensor, x0: Tensor, at: At) -> Tensor:
    return (at["cos"] * x.float() - x0) / at["sin"]


EULER = Rule("euler", "none", lambda x, v, at, noise: euler(x, v, at["dt"]))
STOCHASTIC = Rule("stochastic", "fresh", _renoise)
AFFINE = Rule("affine", "none", _affine, _affine_x0, _affine_toward, _affine_levels)
TRIGFLOW = Rule("trigflow", "fresh", _trig, _trig_x0, _trig_toward, _angles)

# What a scheduler of diffusers does at every step, by its class; a True in its config under the second name changes it.
BY_SCHEDULER = {
    "FlowMatchEulerDiscreteScheduler": (EULER, {"stochastic_sampling": STOCHASTIC}),
    "FlowMatchLCMScheduler": (STOCHASTIC, {}),
}


def rule_of(scheduler: str, config: Mapping[str, object], own_noise: bool) -> Rule:
    """The rule of a scheduler's class; Euler where it has none. own_noise: re-noise with the frame's first noise."""
    if own_noise:
        return STOCHASTIC.with_own_noise()
    rule, settings = BY_SCHEDULER.get(scheduler, (EULER, {}))
    return next((other for name, other in settings.items() if config.get(name)), rule)
