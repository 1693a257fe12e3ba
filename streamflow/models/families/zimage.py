"""Z-Image and Z-Image-Turbo: time rises from 0 (noise) to 1, the network's output is the opposite of the velocity, it takes
lists of latents and prompts of any length, and latents stay in float32 (diffusers pipelines/z_image/pipeline_z_image.py,
`__call__`)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from streamflow.conditioning.prompt import Cond, Prompt
from streamflow.flow.guidance import ALWAYS, NEVER, Weight
from streamflow.flow.schedule import Schedule
from streamflow.models.adapter import FlowAdapter, TransformerVelocity
from streamflow.models.probe import Recording
from streamflow.models.protocols import Arguments, Call

EMBEDS = "encoder_hidden_states"  # the network's cap_feats, under the name of all other families


class ZImageVelocity(TransformerVelocity):
    """x float32 `[rows, 16, h, w]`, t `[rows]` in 0..1000, embeddings `[rows, tokens, width]`."""

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **extra: object) -> Tensor:
        out = self.transformer(
            list(x.to(self.transformer.dtype).unsqueeze(2).unbind()),
            (1000 - t) / 1000,
            list(encoder_hidden_states.unbind()),
            return_dict=False,
            **extra,
        )[0]
        return -torch.stack(out).squeeze(2).float()


class ZImage(FlowAdapter):
    """The pipeline guides by `v + guidance_scale (v - v_negative)` from 0 on, so w is 1 + guidance_scale. A prompt and a
    negative prompt of as many tokens share a call of the network, as in the pipeline; of other lengths each has its own."""

    sample = "x"
    time = "t"
    Velocity = ZImageVelocity
    row_inputs = (EMBEDS,)
    widths = {EMBEDS: "cap_feat_dim"}
    embeds = {"prompt_embeds": EMBEDS}
    unguided = 0.0
    latent_dtype = torch.float32
    tiny_vae = "madebyollin/taef1"
    since = "0.39"
    note = "its scale s guides with w = 1 + s"
    text_pipeline = "ZImagePipeline"
    image_pipeline = "ZImageImg2ImgPipeline"
    exportable = False  # lists, and complex numbers, which ONNX does not have
    default_size: int = 1024  # type: ignore[assignment]

    @property
    def multiple(self) -> int:
        return self.factor * 2

    def check_embeds(self, arguments: Arguments) -> None:
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = arguments.get(name)
            if embeds is not None and len(embeds) != 1:
                raise ValueError(f"{name} holds {len(embeds)} prompts: a stream takes one at a time, in a list")
            if embeds is not None:
                self._check_embeds(name, EMBEDS, embeds[0][None], 1)

    def weight(self, scale: float, arguments: Arguments, schedule: Schedule) -> Weight:
        cap = float(arguments.get("cfg_normalization") or 0.0)
        rule = partial(_guide, scale=scale, cap=cap)
        return Weight(1.0 + scale, rule, _until(schedule, arguments.get("cfg_truncation", 1.0)))

    def _record(self, arguments: Call, steps: int, height: int, width: int, guided: bool) -> Recording:
        arguments.pop("cfg_truncation", None)  # else the first step might not use the negative prompt
        return super()._record(arguments, steps, height, width, guided)

    def _prompt(self, recording: Recording, guided: bool) -> Prompt:
        """The pipeline calls its network with [prompt, negative]."""
        (call,) = recording.calls
        self._inputs({name: value for name, value in call.items() if name != "cap_feats"})
        return Prompt(*(Cond({EMBEDS: embeds[None].detach()}) for embeds in call["cap_feats"]))


def _guide(v_cond: Tensor, v_uncond: Tensor, w: float, *, scale: float, cap: float) -> Tensor:
    """`v + scale (v - v_negative)`; where cap is above 0, each frame's length is limited to cap times that of v."""
    v = v_cond + scale * (v_cond - v_uncond)
    if cap <= 0.0:
        return v
    longest, length = _lengths(v_cond) * cap, _lengths(v)
    return torch.where(length > longest, v * (longest / length), v)


def _lengths(v: Tensor) -> Tensor:
    """Each row's norm, `[rows, 1, ...]`, computed row by row as in the pipeline, for bit-equal results."""
    return torch.stack([torch.linalg.vector_norm(row) for row in v]).reshape(-1, *([1] * (v.ndim - 1)))


def _until(schedule: Schedule, truncation: float | None) -> float:
    """The sigma of the last guided step: the pipeline does not guide steps with `1 - t / 1000` above `truncation`."""
    if truncation is None or truncation > 1.0:
        return ALWAYS
    guided = [i for i, t in enumerate((1000 - schedule.timesteps) / 1000) if t.item() <= truncation]
    return schedule.sigmas[guided[-1]].item() if guided else NEVER
