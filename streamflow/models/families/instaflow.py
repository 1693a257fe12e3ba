"""InstaFlow and 2-Rectified-Flow: Stable Diffusion 1.5's UNet, rectified. Time falls from 1000 to 0 in equal steps of
1000 / N, and the network predicts data - noise, the opposite of our sign (gnobitab/InstaFlow code/pipeline_rf.py, the
denoising loop). The pipeline's own scheduler is not used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamflow.flow.schedule import Schedule
from streamflow.models.adapter import FlowAdapter
from streamflow.models.probe import Recording
from streamflow.models.protocols import Call, Network

# The pipeline's default, which every scheduler supports; the schedule is not read from it.
PIPELINE_STEPS = 50


class RectifiedUNetVelocity(nn.Module):
    """x `[rows, 4, h, w]`, t `[rows]` in 0..1000, float32; extra: more arguments of the network."""

    def __init__(self, unet: Network):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **extra: object) -> Tensor:
        return -self.unet(x, t, encoder_hidden_states=encoder_hidden_states, return_dict=False, **extra)[0]


class InstaFlow(FlowAdapter):
    """A rectified `StableDiffusionPipeline`; sigma_i = 1 - i / N and t_i = 1000 sigma_i."""

    network = "unet"
    sample = "sample"
    Velocity = RectifiedUNetVelocity
    row_inputs = ("encoder_hidden_states",)
    widths = {"encoder_hidden_states": "cross_attention_dim"}
    control = "streamflow.models.controlnets:UNetControl"
    image_prompt = "streamflow.models.image_prompts:UNetImagePrompts"
    tiny_vae = "madebyollin/taesd"
    note = "compared with InstaFlow's own loop: no pipeline of diffusers draws it"
    text_pipeline = "StableDiffusionPipeline"
    image_pipeline = "StableDiffusionImg2ImgPipeline"
    is_reference = False
    free_size = True
    refused = frozenset(("sigmas", "eta", "guidance_rescale"))

    @property
    def default_size(self) -> int:
        return self.base.config.sample_size * self.factor

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        return super()._record(arguments, PIPELINE_STEPS, height, width, guided)

    def schedule(self, recording: Recording, steps: int) -> Schedule:
        sigmas = torch.tensor([1.0 - i / steps for i in range(steps + 1)])
        timesteps = torch.tensor([(1.0 - i / steps) * 1000.0 for i in range(steps)])
        return Schedule(timesteps, sigmas)
