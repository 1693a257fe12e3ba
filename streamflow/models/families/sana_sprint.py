"""Sana-Sprint: few steps on TrigFlow's arc, `x = cos(t) x0 + sin(t) noise`, with fresh noise at every step (diffusers
pipelines/sana/pipeline_sana_sprint.py, `__call__`, and schedulers/scheduling_scm.py, `step`).

Latents here are the pipeline's divided by the scheduler's `sigma_data`, so that noise has a deviation of 1. sigma is
`sin t / (cos t + sin t)`, which the network takes for its time: `x / (cos t + sin t)` lies on a straight line at sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamflow.flow.convention import per_row
from streamflow.flow.schedule import Schedule
from streamflow.flow.solvers import TRIGFLOW, Rule
from streamflow.models.adapter import TransformerVelocity
from streamflow.models.families.sana import Sana
from streamflow.models.probe import Recording


class SanaSprintVelocity(TransformerVelocity):
    """x float32 `[rows, 32, h, w]`, t `[rows]` the angle in 0..pi/2, `guidance` `[rows]`; returns dx / dt."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        guidance: Tensor,
        **extra: object,
    ) -> Tensor:
        time = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        s = per_row(time, x)
        length = torch.sqrt(s**2 + (1 - s) ** 2)
        x = x * length
        out = self.transformer(
            x.to(self.transformer.dtype),
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            guidance=guidance,
            timestep=time,
            return_dict=False,
            **extra,
        )[0]
        return (((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * out) / length).float()


class SanaSprint(Sana):
    """Sana-Sprint. Its guidance is embedded; steps other than 2 need `intermediate_timesteps=None`."""

    Velocity = SanaSprintVelocity
    row_inputs = ("encoder_hidden_states", "encoder_attention_mask", "guidance")
    guidance_argument = None
    text_pipeline = "SanaSprintPipeline"
    image_pipeline = "SanaSprintImg2ImgPipeline"
    note = "fresh noise at every step, one draw a frame and step"

    def schedule(self, recording: Recording, steps: int) -> Schedule:
        angles = recording.scheduler.timesteps[:-1].detach().float().cpu()
        sigmas = (torch.sin(angles) / (torch.cos(angles) + torch.sin(angles))).clamp(max=1.0)
        return Schedule(angles, torch.cat((sigmas, torch.zeros(1))), {"angle": angles})

    def rule(self, do_add_noise: bool) -> Rule:
        return TRIGFLOW.with_own_noise() if do_add_noise else TRIGFLOW

    def path(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The arc: `((1 - sigma) x0 + sigma noise) / sqrt(sigma^2 + (1 - sigma)^2)`, float32."""
        s = per_row(sigma, x0)
        return ((1 - s) * x0 + s * noise) / torch.sqrt(s**2 + (1 - s) ** 2)
