"""The VAE as one module: pictures `[n, 3, H, W]` in [-1, 1] to latents in the pipeline's own `latents=` form, and back.

Scaling, shift and factor come from the VAE's config; a family whose pipeline packs its latents hands in how.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor, nn

Layout = Callable[[Tensor], Tensor]


def _as_is(latents: Tensor) -> Tensor:
    return latents


class Codec(nn.Module):
    """`decode` and `encode` for AutoencoderKL and AutoencoderTiny, `z / scaling_factor + shift_factor` and back
    (pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py, the end of `__call__`)."""

    def __init__(self, vae: nn.Module, pack: Layout = _as_is, unpack: Layout = _as_is):
        super().__init__()
        self.vae = vae
        self.pack, self.unpack = pack, unpack
        self.scaling = vae.config.scaling_factor
        self.shift = getattr(vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents, as the pipeline's `output_type="latent"` gives them, to pictures, clamped to [-1, 1]."""
        z = self.unpack(latents) / self.scaling + self.shift
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures to clean latents; the posterior's mode, so that a still picture stays still."""
        z = retrieve_latents(self.vae.encode(pictures.to(self.vae.dtype)), sample_mode="argmax")
        return self.pack((z - self.shift) * self.scaling)

    forward = decode
