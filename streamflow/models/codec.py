"""The VAE as two modules: images `[n, 3, H, W]` in [-1, 1] to latents in the pipeline's own `latents=` form, and back.

Scaling and shift come from the VAE's config. A family whose pipeline packs its latents, or normalises them in another way,
passes functions that do it. `decoder` and `encoder` take a tensor and return a tensor, so they can be compiled, graphed,
exported and spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor, nn

from streamflow.models.protocols import VAE, Config

Layout = Callable[[Tensor], Tensor]


def _factors(config: Config) -> tuple[float, float]:
    """(scaling, shift); 1 and 0 for VAEs whose latents the family's layout normalises."""
    return getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0


class Normalized(nn.Module):
    """Latents with a mean and a standard deviation per channel, `[channels, ...]` broadcast against `[n, channels, ...]`.
    Computes in the dtype of its input, as the pipelines do."""

    mean: Tensor
    std: Tensor

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


class SingleFrames(VAE):
    """A video VAE for single frames: images, and latents to decode, without a dimension of time."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae
        self.config, self.dtype = vae.config, vae.dtype

    def encode(self, images: Tensor) -> object:
        """The posterior of images `[n, 3, H, W]`; its latents have a dimension of time."""
        return self.vae.encode(images.unsqueeze(2))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Images of latents `[n, channels, h, w]`."""
        return (self.vae.decode(z.unsqueeze(2), return_dict=return_dict)[0].squeeze(2),)


class Decoder(nn.Module):
    """In the VAE's dtype `z / scaling_factor + shift_factor`, the VAE's decode, a clamp (pipelines/stable_diffusion_3/
    pipeline_stable_diffusion_3.py, the end of `__call__`)."""

    def __init__(self, vae: VAE, unpack: Layout | None = None):
        super().__init__()
        self.vae, self.unpack = vae, unpack
        self.scaling, self.shift = _factors(vae.config)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(self.unscaled(latents), return_dict=False)[0].clamp(-1.0, 1.0)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the pipeline's form to those that the VAE decodes, `[n, channels, h, w]` in its own scale and dtype."""
        z = latents.to(self.vae.dtype)
        if self.unpack is not None:
            z = self.unpack(z)
        return z / self.scaling + self.shift


class Encoder(nn.Module):
    """Images to latents. Takes the mode of a posterior, so that the latents of a still image stay the same."""

    def __init__(self, vae: VAE, pack: Layout | None = None):
        super().__init__()
        self.vae, self.pack = vae, pack
        self.scaling, self.shift = _factors(vae.config)

    def forward(self, images: Tensor) -> Tensor:
        encoded = self.vae.encode(images.to(self.vae.dtype))
        z = encoded.latent if hasattr(encoded, "latent") else retrieve_latents(encoded, sample_mode="argmax")
        z = (z - self.shift) * self.scaling
        return z if self.pack is None else self.pack(z)


class Decode(Protocol):
    """A decode that may still run, on another device or in another process."""

    def done(self) -> bool:
        """Whether the images are ready."""
        ...

    def result(self) -> Tensor:
        """The images `[n, 3, H, W]` in [-1, 1]; waits for them."""
        ...


@dataclass(frozen=True, eq=False)
class Decoded:
    """A finished decode."""

    images: Tensor

    def done(self) -> bool:
        """Always True."""
        return True

    def result(self) -> Tensor:
        """The images."""
        return self.images


class Codec:
    """A VAE's decoder and encoder. `Codec(vae)`, or made of two modules with `of`. uploads: the encoder takes images of the
    host too, and encodes them beside what its GPU computes."""

    uploads = False

    def __init__(self, vae: VAE, pack: Layout | None = None, unpack: Layout | None = None):
        self.decoder: Any = Decoder(vae, unpack)  # replaced by compiled, sharded and graphed modules
        self.encoder: nn.Module = Encoder(vae, pack)

    @classmethod
    def of(cls, decoder: nn.Module, encoder: nn.Module) -> Codec:
        """A codec of these two modules."""
        codec = cls.__new__(cls)
        codec.decoder, codec.encoder = decoder, encoder
        codec.uploads = getattr(encoder, "uploads", False)
        return codec

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents, as the pipeline's `output_type="latent"` gives them, to images in [-1, 1]."""
        return self.decoder(latents)

    @property
    def lanes(self) -> int:
        """How many decodes can run beside the stream, on other devices or in other processes; 0: none."""
        return getattr(self.decoder, "lanes", 0)

    def decode_later(self, latents: Tensor) -> Decode:
        """Start decoding, beside the stream where the decoder has `lanes`; otherwise the decode is done on return."""
        return self.decoder.submit(latents) if self.lanes else Decoded(self.decode(latents))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to clean latents."""
        return self.encoder(images)
