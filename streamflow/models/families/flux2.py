"""Flux.2 and Flux.2 Klein: latents are 2x2 patches, `[128, h, w]`, which the network takes as tokens; time is
t / 1000 after a cast to the latents' dtype; the VAE's latents are normalised patch by patch with the statistics of its batch
norm (diffusers pipelines/flux2/pipeline_flux2.py and pipeline_flux2_klein.py, `__call__`).

Clean latents leave a stream in the form in which noise enters it. The pipelines' own `output_type="latent"` differs: Flux.2
returns tokens, and Klein the input of its VAE.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from streamflow.models.adapter import FlowAdapter, TransformerVelocity
from streamflow.models.codec import Codec, Normalized
from streamflow.models.families.flux import Packed
from streamflow.models.protocols import VAE


class Flux2Velocity(TransformerVelocity):
    """x `[rows, 128, h, w]`, t `[rows]` in 0..1000, ids `[1, tokens, 4]`; references `[rows, n, 128]`: more tokens, whose
    velocity is left out; extra: more arguments of the network."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
        guidance: Tensor | None = None,
        references: Tensor | None = None,
        reference_ids: Tensor | None = None,
        **extra: object,
    ) -> Tensor:
        hidden = tokens = x.flatten(2).transpose(1, 2)
        if references is not None and reference_ids is not None:
            hidden, img_ids = torch.cat((tokens, references), 1), torch.cat((img_ids, reference_ids), 1)
        out = self.transformer(
            hidden_states=hidden,
            timestep=t.to(x.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
            **extra,
        )[0]
        if references is not None:
            out = out[:, : tokens.shape[1]]
        return out.transpose(1, 2).reshape(x.shape)


class Flux2(Packed):
    """The only guidance is a number embedded in the network, one of the prompt's row inputs."""

    Velocity = Flux2Velocity
    row_inputs = ("encoder_hidden_states", "guidance")
    shared_inputs = ("txt_ids", "img_ids", "reference_ids")
    widths = {"encoder_hidden_states": "joint_attention_dim"}
    guidance_argument = None
    guidance_in_one_call = False
    reference = "streamflow.models.references:Flux2References"
    tiny_vae = "madebyollin/taef2"
    since = "0.36"
    note = "latents stay in their `latents=` form; no negative prompt: `full`, `initialize` refused"
    text_pipeline = "Flux2Pipeline"
    latent_mask = FlowAdapter.latent_mask

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.base.config.in_channels, height // self.multiple, width // self.multiple

    def codec(self, vae: VAE, height: int, width: int) -> Codec:
        self.check_vae(vae)
        statistics: Any = vae.bn
        mean = statistics.running_mean.view(-1, 1, 1)
        std = torch.sqrt(statistics.running_var.view(-1, 1, 1) + vae.config.batch_norm_eps)
        return Codec(vae, _Pack(mean, std), _Unpack(mean, std))

    def check_vae(self, vae: VAE) -> None:
        super().check_vae(vae)
        if not hasattr(vae, "bn"):
            raise ValueError(
                f"this {type(vae).__name__} has no batch norm, whose statistics normalise the latents of Flux.2: "
                f"use an AutoencoderKLFlux2"
            )


class Flux2Klein(Flux2):
    """Klein guides in two calls, against the empty prompt or `negative_prompt_embeds`; a distilled one does not guide."""

    guidance_argument = "guidance_scale"
    since = "0.37"
    note = "latents stay in their `latents=` form; a negative prompt as embeddings only; distilled: `full` refused"
    text_pipeline = "Flux2KleinPipeline"

    def check_guided(self) -> None:
        if self.pipe.config.is_distilled:
            raise ValueError(
                f"this {type(self.pipe).__name__} is distilled and draws without classifier-free guidance: choose "
                f"cfg_type='none', or 'self' for images"
            )


class _Pack(Normalized):
    """From the VAE's latents `[n, 32, 2 h, 2 w]` to normalised patches `[n, 128, h, w]`."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(Flux2Pipeline._patchify_latents(z))


class _Unpack(Normalized):
    """From normalised patches to the VAE's latents."""

    def forward(self, latents: Tensor) -> Tensor:
        return Flux2Pipeline._unpatchify_latents(self.undo(latents))
