"""Sana: latents of 32 channels, 32 pixels wide, kept in float32, time is raw 0..1000 times the network's `timestep_scale`
(diffusers pipelines/sana/pipeline_sana.py, `__call__`).

Sana ships with a DPM solver of second order, whose steps use the step before, which a stream's rows do not keep. So the
pipeline needs a FlowMatchEulerDiscreteScheduler, and the error says how to make it. The flow is the same, and the same
number of steps draws a somewhat coarser image. Images have the requested size; resolution binning is off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamflow.models.adapter import FlowAdapter, TransformerVelocity
from streamflow.models.probe import Recording
from streamflow.models.protocols import Call

MULTIPLE = 32  # the pipeline takes sizes divisible by this, whatever the VAE


class SanaVelocity(TransformerVelocity):
    """x float32 `[rows, 32, h, w]`, t `[rows]` in 0..1000, mask `[rows, tokens]`; extra: more of the network's arguments."""

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, **extra: object
    ) -> Tensor:
        out = self.transformer(
            x.to(self.transformer.dtype),
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=t * self.transformer.config.timestep_scale,
            return_dict=False,
            **extra,
        )[0]
        return out[:, : x.shape[1]].float()  # the other channels are a learned sigma


class Sana(FlowAdapter):
    """Sana and Sana 1.5; Sana-Sprint is `SanaSprint`."""

    Velocity = SanaVelocity
    row_inputs = ("encoder_hidden_states", "encoder_attention_mask")
    widths = {"encoder_hidden_states": "caption_channels"}
    latent_dtype = torch.float32
    tiny_vae = "taesana"
    note = "drawn by Euler; its DPM solver is refused with the line that replaces it"
    text_pipeline = "SanaPipeline"
    refused = frozenset(("use_resolution_binning",))

    @property
    def multiple(self) -> int:
        return max(MULTIPLE, self.factor * self.base.config.patch_size)

    @property
    def default_size(self) -> int:
        return self.default("height")

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        return super()._record({**arguments, "use_resolution_binning": False}, steps, height, width, guided)
