"""The VAE as two modules: pictures `[n, 3, H, W]` in [-1, 1] to latents in the pipeline's own `latents=` form, and back.

Scaling and shift come from the VAE's config; a family whose pipeline packs its latents, or normalises them in another way,
hands in how. What is compiled, graphed, exported or spread over devices is `decoder` and `encoder`: tensor in, tensor out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor, nn

Layout = Callable[[Tensor], Tensor]


def _factors(vae: nn.Module) -> tuple[float, float]:
    """(scaling, shift); 1 and 0 for VAEs whose normalisation is the family's layout's."""
    return getattr(vae.config, "scaling_factor", None) or 1.0, getattr(vae.config, "shift_factor", None) or 0.0


def _mode(encoded: Any) -> Tensor:
    return encoded.latent if hasattr(encoded, "latent") else retrieve_latents(encoded, sample_mode="argmax")


class Normalized(nn.Module):
    """Latents with a mean and a standard deviation per channel, `[channels, ...]` broadcast against `[n, channels, ...]`.
    In the dtype of what it is given, as the pipelines do."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.detach().clone(), persistent=False)
        self.register_buffer("std", std.detach().clone(), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """From the VAE's own scale."""
        return (z - self.mean.to(z.dtype)) / self.std.to(z.dtype)

    def undo(self, latents: Tensor) -> Tensor:
        """To the VAE's own scale."""
        return latents * self.std.to(latents.dtype) + self.mean.to(latents.dtype)


class Decoder(nn.Module):
    """In the VAE's dtype `z / scaling_factor + shift_factor`, the VAE's decode, a clamp (pipelines/stable_diffusion_3/
    pipeline_stable_diffusion_3.py, the end of `__call__`)."""

    def __init__(self, vae: nn.Module, unpack: Layout | None = None):
        super().__init__()
        self.vae, self.unpack = vae, unpack
        self.scaling, self.shift = _factors(vae)

    def forward(self, latents: Tensor) -> Tensor:
        z = latents.to(self.vae.dtype)
        if self.unpack is not None:
            z = self.unpack(z)
        z = z / self.scaling + self.shift
        return self.vae.decode(z, return_dict=False)[0].clamp(-1.0, 1.0)


class Encoder(nn.Module):
    """The way back; of a posterior its mode, so that a still picture stays still."""

    def __init__(self, vae: nn.Module, pack: Layout | None = None):
        super().__init__()
        self.vae, self.pack = vae, pack
        self.scaling, self.shift = _factors(vae)

    def forward(self, images: Tensor) -> Tensor:
        z = _mode(self.vae.encode(images.to(self.vae.dtype)))
        z = (z - self.shift) * self.scaling
        return z if self.pack is None else self.pack(z)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Pictures that are there already, in the form of those that are on their way."""

    pictures: Tensor

    def done(self) -> bool:
        """Whether it is there: always."""
        return True

    def result(self) -> Tensor:
        """The pictures."""
        return self.pictures


class Codec:
    """A VAE's decoder and encoder. `Codec(vae)`, or made of two modules with `of`."""

    def __init__(self, vae: nn.Module, pack: Layout | None = None, unpack: Layout | None = None):
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

    @property
    def lanes(self) -> int:
        """How many decodes can be under way beside the stream, on other devices or in other processes; 0: none."""
        return getattr(self.decoder, "lanes", 0)

    def decode_later(self, latents: Tensor) -> Any:
        """Start decoding. What comes back has `result()`, which gives the pictures, and `done()`."""
        return self.decoder.submit(latents) if self.lanes else Decoded(self.decode(latents))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1] to clean latents."""
        return self.encoder(pictures)
