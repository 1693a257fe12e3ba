"""PeRFlow: Stable Diffusion 1.5's and XL's UNets as a flow in windows of time, straight inside each (Yan et al., Piecewise
Rectified Flow, arXiv 2405.07510; the rule is that of magic-research/piecewise-rectified-flow src/scheduler_perflow.py).

sigma is the time, t / 1000, and dx / dsigma is a window's straight line, `(x_end - x) / (sigma_end - sigma)`. The network
predicts noise, from which the window's end follows: `x_end = lambda x + eta noise`. So one step is affine in x and in the
network's output, with coefficients that depend on the stage alone. Images are noised as Stable Diffusion does, not on a
straight line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from streamflow.flow.convention import per_row
from streamflow.flow.schedule import Schedule
from streamflow.flow.solvers import AFFINE, Rule
from streamflow.models.adapter import FlowAdapter
from streamflow.models.families.instaflow import InstaFlow, RectifiedUNetVelocity
from streamflow.models.families.sdxl import RectifiedSDXL, RectifiedSDXLVelocity
from streamflow.models.probe import Recording
from streamflow.models.protocols import Pipeline

TRAINED = 1000  # the network was trained at the times 1 to 1000
BETAS = (0.00085, 0.012)  # Stable Diffusion's, from the first time to the last, linear in their roots


class PeRFlowVelocity(RectifiedUNetVelocity):
    """The UNet's output, noise or velocity, with the UNet's own sign."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return -super().forward(*args, **kwargs)


@dataclass(frozen=True)
class Windows:
    """The windows in which the flow is straight, the noisiest first. alphas: float32 `[1000]`, the cumulative products of
    1 - beta. prediction: a key of `SOLVERS`."""

    count: int
    prediction: str
    alphas: Tensor

    def __post_init__(self) -> None:
        if self.prediction not in SOLVERS:
            raise ValueError(
                f"PeRFlow's prediction_type is one of {', '.join(SOLVERS)}, not {self.prediction!r}: set it in the config "
                f"of the pipe's PeRFlowScheduler"
            )

    def times(self, steps: int) -> tuple[list[int], tuple[int, ...]]:
        """(the times 0..1000 of `steps` steps, falling; the steps at which windows start). The steps are divided evenly, and
        the noisiest windows take the remainder. ValueError for fewer steps than windows."""
        if steps < self.count:
            raise ValueError(
                f"num_inference_steps {steps} for a flow of {self.count} windows, each straight by itself: one step cannot "
                f"cross from one into the next, so take {self.count} or more"
            )
        times: list[int] = []
        firsts = []
        for k in range(self.count):
            share = steps // self.count + (k < steps % self.count)
            start, end = (self.count - k) / self.count, (self.count - k - 1) / self.count
            firsts.append(len(times))
            times += (np.linspace(start, end, share, endpoint=False) * TRAINED).astype(int).tolist()
        return times, tuple(firsts)

    def velocity(self, time: int) -> tuple[float, float]:
        """(A, B) with dx / dsigma = A x + B output, at this time, where output is the network's."""
        t = time / TRAINED
        k = next(k for k in range(self.count) if t - 0.1 / TRAINED > (self.count - k - 1) / self.count)
        start, end = (self.count - k) / self.count, (self.count - k - 1) / self.count
        ends = (float(self.alphas[max(int(round(edge * TRAINED, 6)) - 1, 0)]) for edge in (start, end))
        solved = SOLVERS[self.prediction](*ends)
        if solved is None:
            return 0.0, 1.0
        scale, eta = solved
        below = scale * (t - start) + (end - t)
        return (scale * (end - start) / below - 1) / (end - t), eta / below


def _ddim(start: float, end: float) -> tuple[float, float]:
    """DDIM over a whole window: `x_end = scale x_start + eta noise`, by the alphas at its start and its end."""
    scale = (end / start) ** 0.5
    return scale, (1 - end) ** 0.5 - scale * (1 - start) ** 0.5


def _diff(start: float, end: float) -> tuple[float, float]:
    """The noise added from the window's end to its start: `x_start = g x_end + sqrt(1 - g^2) noise`."""
    g2 = start / end
    return g2**-0.5, -(((1 - g2) / g2) ** 0.5)


# The network's prediction, and how a window's end follows from its start; None: the network predicts the velocity.
SOLVERS = {"ddim_eps": _ddim, "diff_eps": _diff, "velocity": lambda start, end: None}


class _PeRFlow(FlowAdapter):
    """The part that both networks share. The settings are those of a PeRFlowScheduler, or else of the published models: 4
    windows, Stable Diffusion's betas, and `prediction`."""

    prediction: ClassVar[str]
    _on_device: tuple[torch.device, Tensor] | None = None

    def _windows(self) -> Windows:
        scheduler: Any = self.scheduler
        if type(scheduler).__name__ != "PeRFlowScheduler":
            betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TRAINED) ** 2
            return Windows(4, self.prediction, torch.cumprod(1.0 - betas, dim=0))
        config = scheduler.config
        span = config.get("t_noise", 1), config.get("t_clean", 0)
        if span != (1, 0) or config.get("num_train_timesteps", TRAINED) != TRAINED:
            raise ValueError(f"PeRFlow streams from time 1 to 0 with {TRAINED} training times, not with {dict(config)}")
        return Windows(config["num_time_windows"], config["prediction_type"], scheduler.alphas_cumprod.float().cpu())

    def schedule(self, recording: Recording, steps: int) -> Schedule:
        windows = self._windows()
        times, firsts = windows.times(steps)
        a, b = torch.tensor([windows.velocity(time) for time in times], dtype=torch.float64).T
        timesteps = torch.tensor(times, dtype=torch.float32)
        sigmas = torch.cat((timesteps / TRAINED, torch.zeros(1)))
        return Schedule(timesteps, sigmas, {"x": a, "v": b}, firsts)

    def rule(self, do_add_noise: bool) -> Rule:
        return AFFINE

    def check_settings(self, cfg_type: str, do_add_noise: bool) -> None:
        super().check_settings(cfg_type, do_add_noise)
        if do_add_noise:
            raise ValueError(
                "do_add_noise=True needs the image predicted at every stage, and a PeRFlow network predicts the end of its "
                "window: leave do_add_noise out"
            )

    def path(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """As Stable Diffusion noises: `sqrt(alpha) x0 + sqrt(1 - alpha) noise`, alpha of the time 1000 sigma."""
        if self._on_device is None or self._on_device[0] != x0.device:
            alphas = torch.cat((torch.ones(1), self._windows().alphas))
            self._on_device = x0.device, alphas.to(x0.device)
        alpha = self._on_device[1][(sigma * TRAINED).round().long()].to(x0.dtype)
        alpha = per_row(alpha, x0)
        return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


class PeRFlow(_PeRFlow, InstaFlow):
    """PeRFlow of Stable Diffusion 1.5: a `StableDiffusionPipeline` with its UNet, whatever the scheduler."""

    Velocity = PeRFlowVelocity
    prediction = "diff_eps"
    is_reference = False
    note = "compared with PeRFlow's own scheduler in diffusers' loop; every window's start must stay in t_index_list"

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        if self.base.config.get("addition_embed_type") == "text_time":
            raise ValueError("this is SDXL's UNet: pass family='perflow-sdxl'")


class PeRFlowSDXLVelocity(RectifiedSDXLVelocity):
    """The output of SDXL's UNet, with the UNet's own sign."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -super().forward(*args, **kwargs)


class PeRFlowSDXL(_PeRFlow, RectifiedSDXL):
    """PeRFlow of Stable Diffusion XL."""

    Velocity = PeRFlowSDXLVelocity
    prediction = "ddim_eps"
    is_reference = False
    note = PeRFlow.note
