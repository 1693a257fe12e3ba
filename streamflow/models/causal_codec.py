"""A causal video VAE, decoded part after part: what its convolutions keep of one part is handed to the next."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from streamflow._grad_mode import computing

Memory = tuple[Any, ...]  # what each convolution keeps: a tensor, or a mark of the first frames; empty before the first part


class CausalCodec:
    """The decoder of an `AutoencoderKLWan`.

    A video that is decoded in parts equals the same video decoded at once; `post_quant_conv` alone may round differently on
    fewer frames, by about 2e-7. The memory belongs to the caller, so one VAE decodes any number of videos.

    Raises:
        ValueError: where made, for a VAE with tiling, whose tiles would each need a memory.
    """

    def __init__(self, vae: Any) -> None:
        if vae.use_tiling:
            raise ValueError("a VAE with tiling decodes whole videos only: call pipe.vae.disable_tiling()")
        self._vae = vae
        self._convolutions = sum(isinstance(module, nn.Conv3d) for module in vae.decoder.modules())

    @computing
    def decode(self, latents: Tensor, memory: Memory = ()) -> tuple[Tensor, Memory]:
        """Decode the latents `[n, C, T, h, w]` that follow those of this memory, to images `[n, 3, T', H, W]` in [-1, 1].
        The first latent of a video is one image, any other four."""
        kept = list(memory) if memory else [None] * self._convolutions
        images = []
        for k, frame in enumerate(self._vae.post_quant_conv(latents).split(1, dim=2)):
            first = not memory and k == 0
            images.append(self._vae.decoder(frame, feat_cache=kept, feat_idx=[0], first_chunk=first))
        video = torch.cat(images, dim=2)
        if self._vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self._vae.config.patch_size)
        return video.clamp(-1.0, 1.0), tuple(kept)
