"""Stable Diffusion 3 and 3.5: time is raw 0..1000, the network's output is the velocity, guidance is one call with
[negative, prompt] (diffusers pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py, `__call__`)."""

from __future__ import annotations

from torch import Tensor

from streamflow.models.adapter import FlowAdapter, TransformerVelocity


class SD3Velocity(TransformerVelocity):
    """x `[rows, 16, h, w]`, t `[rows]` in 0..1000, float32; extra: more arguments of the network."""

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, **extra: object
    ) -> Tensor:
        return self.transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
            **extra,
        )[0]


class StableDiffusion3(FlowAdapter):
    """SD3, SD3.5 and other models of their pipeline."""

    Velocity = SD3Velocity
    row_inputs = ("encoder_hidden_states", "pooled_projections")
    widths = {"encoder_hidden_states": "joint_attention_dim", "pooled_projections": "pooled_projection_dim"}
    control = "streamflow.models.controlnets:SD3Control"
    image_prompt = "streamflow.models.image_prompts:SD3ImagePrompts"
    tiny_vae = "madebyollin/taesd3"
    note = "skip-layer guidance refused"
    text_pipeline = "StableDiffusion3Pipeline"
    image_pipeline = "StableDiffusion3Img2ImgPipeline"
    refused = frozenset(
        f"skip_{name}" for name in ("guidance_layers", "layer_guidance_scale", "layer_guidance_stop", "layer_guidance_start")
    )

    @property
    def multiple(self) -> int:
        return self.factor * self.base.config.patch_size

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        largest = self.base.config.pos_embed_max_size * self.multiple
        if max(height, width) > largest:
            raise ValueError(f"{width}x{height} is larger than this network's position table: at most {largest} a side")
