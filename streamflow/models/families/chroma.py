"""Chroma: Flux without pooled embeddings and without embedded guidance; a mask over the tokens of prompt and image, and
true guidance in a second call (diffusers pipelines/chroma/pipeline_chroma.py, `__call__`)."""

from __future__ import annotations

from torch import Tensor

from streamflow.models.adapter import TransformerVelocity
from streamflow.models.families.flux import Packed


class ChromaVelocity(TransformerVelocity):
    """x `[rows, tokens, 64]`, t `[rows]` in 0..1000; cond: the network's own arguments, the mask over all tokens."""

    def forward(self, x: Tensor, t: Tensor, **cond: object) -> Tensor:
        return self.transformer(hidden_states=x, timestep=t.to(x.dtype) / 1000, return_dict=False, **cond)[0]


class Chroma(Packed):
    """Chroma and Chroma1-HD."""

    Velocity = ChromaVelocity
    row_inputs = ("encoder_hidden_states", "attention_mask")
    shared_inputs = ("txt_ids", "img_ids")
    widths = {"encoder_hidden_states": "joint_attention_dim"}
    embeds = {"prompt_embeds": "encoder_hidden_states"}
    guidance_in_one_call = False
    image_prompt = "streamflow.models.image_prompts:FluxImagePrompts"
    tiny_vae = "madebyollin/taef1"
    since = "0.34"
    note = "its network waits for the device: no CUDA graph"
    text_pipeline = "ChromaPipeline"
    image_pipeline = "ChromaImg2ImgPipeline"
    exportable = False  # tracing fixes the number of rows
    capturable = False  # its time embedding copies numbers from the host in every call
