"""Lumina Image 2.0: time rises from 0 (noise) to 1, the network's output is the opposite of the velocity, true guidance is a
second call, rescaled along the width to the length of the prompt's own velocity, and switched off after a share of the steps
(diffusers pipelines/lumina2/pipeline_lumina2.py, `__call__`)."""

from __future__ import annotations

from torch import Tensor

from streamflow.flow.convention import guide
from streamflow.flow.guidance import ALWAYS, NEVER, Weight, renormalized
from streamflow.flow.schedule import Schedule
from streamflow.models.adapter import FlowAdapter, TransformerVelocity
from streamflow.models.probe import Recording
from streamflow.models.protocols import Arguments, Call


class Lumina2Velocity(TransformerVelocity):
    """x `[rows, 16, h, w]`, t `[rows]` in 0..1000; cond: the network's own arguments."""

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return -self.transformer(hidden_states=x, timestep=1 - t / 1000, return_dict=False, **cond)[0]


class Lumina2(FlowAdapter):
    """`cfg_normalization` and `cfg_trunc_ratio` are the pipeline's own; the ratio counts steps of the whole schedule."""

    Velocity = Lumina2Velocity
    row_inputs = ("encoder_hidden_states", "encoder_attention_mask")
    widths = {"encoder_hidden_states": "cap_feat_dim"}
    embeds = {"prompt_embeds": "encoder_hidden_states"}
    guidance_in_one_call = False
    tiny_vae = "madebyollin/taef1"
    note = "its network waits for the device in every call: no CUDA graph"
    text_pipeline = "Lumina2Pipeline"
    exportable = capturable = False  # the network reads the mask's lengths on the host

    @property
    def multiple(self) -> int:
        return self.factor * self.base.config.patch_size

    def weight(self, scale: float, arguments: Arguments, schedule: Schedule) -> Weight:
        normalize = arguments.get("cfg_normalization", self.default("cfg_normalization"))
        ratio = arguments.get("cfg_trunc_ratio", self.default("cfg_trunc_ratio"))
        guided = sum((i + 1) / len(schedule) <= ratio for i in range(len(schedule)))
        until = schedule.sigmas[guided - 1].item() if guided else NEVER
        return Weight(scale, renormalized if normalize else guide, until if guided < len(schedule) else ALWAYS)

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        arguments.pop("cfg_trunc_ratio", None)  # else the first step might not use the negative prompt
        return super()._record(arguments, steps, height, width, guided)
