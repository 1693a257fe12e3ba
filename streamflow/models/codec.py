"""The VAE as two modules: pictures `[n, 3, H, W]` in [-1, 1] to latents in the pipeline's own `latents=` form, and back.

Scaling, shift and factor come from the VAE's config; a family whose pipeline packs its latents hands in how. What is
compiled, graphed, exported or spread over devices is `decoder` and `encoder`: tensor in, tensor out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor, nn

Layout = Callable[[Tensor], Tensor]


def _as_is(latents: Tensor) -> Tensor:
    return latents


def _factors(vae: nn.Module) -> tuple[float, float]:
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


class Decoder(nn.Module):
    """`z / scaling_factor + shift_factor`, the VAE's decode, a clamp (pipelines/stable_diffusion_3/
    pipeline_stable_diffusion_3.py, the end of `__call__`), for AutoencoderKL and AutoencoderTiny."""

    def __init__(self, vae: nn.Module, unpack: Layout):
        super().__init__()
        self.vae, self.unpack = vae, unpack
        self.scaling, self.shift = _factors(vae)

    def forward(self, latents: Tensor) -> Tensor:
        z = self.unpack(latents) / self.scaling + self.shift
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].clamp(-1.0, 1.0)


class Encoder(nn.Module):
    """The way back; of a posterior its mode, so that a still picture stays still."""

    def __init__(self, vae: nn.Module, pack: Layout):
        super().__init__()
        self.vae, self.pack = vae, pack
        self.scaling, self.shift = _factors(vae)

    def forward(self, pictures: Tensor) -> Tensor:
        z = retrieve_latents(self.vae.encode(pictures.to(self.vae.dtype)), sample_mode="argmax")
        return self.pack((z - self.shift) * self.scaling)


class Codec:
    """A VAE's decoder and encoder. `Codec(vae)`, or made of two modules with `of`."""

    def __init__(self, vae: nn.Module, pack: Layout = _as_is, unpack: Layout = _as_is):
        self.decoder: nn.Module = Decoder(vae, unpack)
        self.encoder: nn.Module = Encoder(vae, pack)

    @classmethod
    def of(cls, decoder: nn.Module, encoder: nn.Module) -> Codec:
        """A codec of these two modules."""
        codec = cls.__new__(cls)
        codec.decoder, codec.encoder = decoder, encoder
        return codec

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents, as the pipeline's `output_type="latent"` gives them, to pictures in [-1, 1]."""
        return self.decoder(latents)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] to clean latents."""
        return self.encoder(pictures)
