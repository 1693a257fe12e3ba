"""Rectified Stable Diffusion XL: InstaFlow's times and sign with SDXL's UNet, which also takes pooled embeddings
and sizes (diffusers pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py, `__call__`, for the UNet's inputs;
gnobitab/InstaFlow code/pipeline_rf.py for the loop). The pipeline's own scheduler is not used."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from streamflow.models.codec import Codec
from streamflow.models.families.instaflow import InstaFlow, RectifiedUNetVelocity
from streamflow.models.protocols import VAE, Arguments


class RectifiedSDXLVelocity(RectifiedUNetVelocity):
    """As InstaFlow's, with pooled embeddings `[rows, width]` and sizes and crop `[rows, 6]`."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        added_cond_kwargs: Mapping[str, object] | None = None,
        **extra: object,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids, **(added_cond_kwargs or {})}
        return super().forward(x, t, encoder_hidden_states, added_cond_kwargs=added, **extra)


class RectifiedSDXL(InstaFlow):
    """A rectified `StableDiffusionXLPipeline`; sigma_i = 1 - i / N and t_i = 1000 sigma_i."""

    Velocity = RectifiedSDXLVelocity
    row_inputs = ("encoder_hidden_states", "text_embeds", "time_ids")
    embeds = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
    tiny_vae = "madebyollin/taesdxl"
    note = "selected by `family`, since SDXL's own weights are no flow"
    text_pipeline = "StableDiffusionXLPipeline"
    image_pipeline = "StableDiffusionXLImg2ImgPipeline"
    refused = InstaFlow.refused | {"denoising_end"}

    def codec(self, vae: VAE, height: int, width: int) -> Codec:
        """As the pipeline, a VAE in float16 with `force_upcast` in its config is copied to float32."""
        self.check_vae(vae)
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae = copy.deepcopy(vae).float()
        return Codec(vae)

    def check_vae(self, vae: VAE) -> None:
        super().check_vae(vae)
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ValueError(
                f"this {type(vae).__name__} normalises by latents_mean, which is not done here: use SDXL's own VAE"
            )

    def _inputs(self, call: Arguments) -> dict[str, Tensor]:
        plain = {name: value for name, value in call.items() if name != "added_cond_kwargs"}
        return super()._inputs({**plain, **call["added_cond_kwargs"]})
