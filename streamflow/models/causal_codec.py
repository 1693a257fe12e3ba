"""Causal video VAEs, encoded and decoded part after part: what the layers keep of one part is handed to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn

from streamflow._grad_mode import computing
from streamflow._validation import whole_number

KINDS = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
GROUP = 4  # images that these VAEs encode at once, after the first image of a video


@dataclass(frozen=True, eq=False)
class Memory:
    """What a codec keeps of a video, for the part that follows. It belongs to the caller. No codec writes into it, so a
    video can be continued from the same memory more than once.

    network: the encoder or decoder that made it. size: the number of videos, the height and the width of a part. dtype and
    device: of a part. kept: what each layer keeps.
    """

    network: nn.Module
    size: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kept: tuple[Any, ...]

    @classmethod
    def of(cls, network: nn.Module, part: Tensor, kept: tuple[Any, ...]) -> Memory:
        """The memory of this network after this part, `[n, channels, T, h, w]`."""
        return cls(network, (len(part), *part.shape[3:]), part.dtype, part.device, kept)


def take_part(
    network: nn.Module, part: Tensor, channels: int, dtype: torch.dtype, memory: Memory | None
) -> tuple[Tensor, tuple[Any, ...] | None]:
    """A part of a video in this dtype, and what the layers of the network have kept for it (None before the first part).

    Raises:
        TypeError, ValueError: the part is not `[n, channels, T, h, w]`, or the memory is not of this network or not of such
            parts.
    """
    name = type(network).__name__
    if not isinstance(part, Tensor) or not part.is_floating_point():
        raise TypeError(f"{name} takes a floating-point tensor, not {getattr(part, 'dtype', type(part).__name__)}")
    if part.ndim != 5 or part.shape[1] != channels or 0 in part.shape:
        raise ValueError(f"{name} takes [n, {channels}, T, height, width], not {list(part.shape)}")
    part = part.to(dtype)
    if memory is None:
        return part, None
    if not isinstance(memory, Memory):
        raise TypeError(f"memory is the Memory of the part before, or None for a first part, not {type(memory).__name__}")
    if memory.network is not network:
        raise ValueError(
            f"this memory is of another network ({type(memory.network).__name__}): pass the one that the same method of the "
            f"same codec returned with the part before"
        )
    new = Memory.of(network, part, memory.kept)
    if (memory.size, memory.dtype, memory.device) != (new.size, new.dtype, new.device):
        before, now = (f"{list(one.size)} in {one.dtype} on {one.device}" for one in (memory, new))
        raise ValueError(f"this memory is of parts [n, height, width] = {before}, and this part is {now}")
    return part, memory.kept


def only(latents: Tensor, frame: int | None) -> Tensor:
    """The frame of this index of latents `[n, C, T, h, w]`, as `[n, C, 1, h, w]`; None: all frames. TypeError: the index is
    no integer. ValueError: there is no such frame."""
    if frame is None:
        return latents
    k = whole_number("frame", frame, 0, "the index of a latent frame", wrong_type=TypeError, most=latents.shape[2] - 1)
    return latents[:, :, k : k + 1]


class CausalCodec:
    """The encoder and the decoder of an `AutoencoderKLWan` or an `AutoencoderKLQwenImage`, for videos in parts.

        codec, memory = CausalCodec(pipe.vae), None
        for part in parts:
            images, memory = codec.decode(part, memory)

    A video in parts gives what the VAE gives for the whole video. The encoder and the decoder are equal to the bit. The
    VAE's convolution of 1 x 1 x 1 at the latents (`quant_conv`, `post_quant_conv`) may round differently for another number
    of frames, by 2e-7 in float32. One VAE can process any number of videos in turn: each has a memory of its own.

    Latents are in the VAE's own scale: without `latents_mean` and `latents_std`.

    Args:
        vae: the VAE.
        call_decoder: a function that is called in the place of the VAE's decoder, with the decoder and its arguments: one
            latent frame and what the layers have kept.

    Raises:
        TypeError: a VAE of another class. ValueError: tiling is enabled, here or in a later call, since each tile would need
            a memory.
    """

    def __init__(self, vae: Any, call_decoder: Callable[..., Tensor] | None = None) -> None:
        if not self.fits(vae):
            raise TypeError(f"a CausalCodec is made of an {' or an '.join(KINDS)}, not of {type(vae).__name__}")
        self._vae, self._call_decoder = vae, call_decoder
        self._patch = vae.config.get("patch_size")
        self._first = {"first_chunk": True} if KINDS[0] in _names(vae) else {}  # what its decoder takes
        self._check_tiling()

    @staticmethod
    def fits(vae: Any) -> bool:
        """Whether a codec can be made of this VAE, by its class."""
        return not _names(vae).isdisjoint(KINDS)

    @computing
    def encode(self, images: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Encode the images `[n, 3, T, H, W]` in [-1, 1] that follow those of this memory.

        The first image of a video is one latent, and so are four others. So a first part has 1, 5, 9, ... images, and any
        other a multiple of four. memory: None for a first part.

        Returns the modes of the latents, `[n, C, T', h, w]`, and the memory for the next part.

        Raises:
            TypeError, ValueError: the images or the memory do not fit, with the numbers.
        """
        self._check_tiling()
        encoder = self._vae.encoder
        channels = encoder.conv_in.in_channels // (self._patch or 1) ** 2
        images, kept = take_part(encoder, images, channels, self._vae.dtype, memory)
        first, count = int(kept is None), images.shape[2]
        if (count - first) % GROUP:
            expected = "1, 5, 9, ... in the first part" if first else "a multiple of 4 after the first part"
            raise ValueError(f"the number of images is {expected} of a video, not {count}")
        x = images if self._patch is None else patchify(images, self._patch)
        new, moments = _list(kept, encoder), []
        for group in x.split([1] * first + [GROUP] * (count // GROUP), dim=2):
            moments.append(encoder(group, feat_cache=new, feat_idx=[0]))
        latents = self._vae.quant_conv(torch.cat(moments, dim=2)).chunk(2, dim=1)[0]
        return latents, Memory.of(encoder, images, tuple(new))

    @computing
    def decode(self, latents: Tensor, memory: Memory | None = None, frame: int | None = None) -> tuple[Tensor, Memory]:
        """Decode the latents `[n, C, T, h, w]` that follow those of this memory.

        The first latent of a video is one image, any other four. memory: None for a first part. frame: the index of the only
        latent frame to decode, with the memory of the frames before it. A part that is decoded frame by frame equals the
        part that is decoded at once, to the bit.

        Returns images `[n, 3, T', H, W]` in [-1, 1], and the memory for the next part or frame.

        Raises:
            TypeError, ValueError: the latents or the memory do not fit, with the numbers.
        """
        self._check_tiling()
        decoder = self._vae.decoder
        latents, kept = take_part(decoder, latents, self._vae.config.z_dim, self._vae.dtype, memory)
        call = decoder if self._call_decoder is None else partial(self._call_decoder, decoder)
        new, images = _list(kept, decoder), []
        x = self._vae.post_quant_conv(latents)  # of all, since it rounds differently for another number of frames
        for k, latent in enumerate(only(x, frame).split(1, dim=2)):
            first = self._first if kept is None and k == 0 else {}
            images.append(call(latent, feat_cache=new, feat_idx=[0], **first))
        video = torch.cat(images, dim=2)
        if self._patch is not None:
            video = unpatchify(video, self._patch)
        return video.clamp(-1.0, 1.0), Memory.of(decoder, latents, tuple(new))

    def _check_tiling(self) -> None:
        if self._vae.use_tiling:
            raise ValueError("a VAE with tiling processes whole videos only: call pipe.vae.disable_tiling()")


def _names(vae: Any) -> set[str]:
    return {cls.__name__ for cls in type(vae).__mro__}


def _list(kept: tuple[Any, ...] | None, network: nn.Module) -> list[Any]:
    """A list of what each layer has kept, for the network to replace its entries."""
    return [None] * sum(isinstance(module, nn.Conv3d) for module in network.modules()) if kept is None else list(kept)
