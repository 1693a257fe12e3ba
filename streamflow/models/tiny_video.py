"""Tiny decoders of video latents: TAEHV, by the path of its weights, from https://github.com/madebyollin/taehv.

They take latents as the network draws them, to which the VAE's `latents_mean` and `latents_std` are not applied. They are
causal: a block sees a frame and the frame before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt, prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamflow._grad_mode import computing
from streamflow.models.causal_codec import Memory, only, take_part
from streamflow.models.tiny_vae import read_weights

UPSTREAM = "https://github.com/madebyollin/taehv"


def _conv(channels_in: int, channels_out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Latents in (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block of a frame and the frame before it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width),
            nn.ReLU(inplace=True),
            _conv(width, width),
            nn.ReLU(inplace=True),
            _conv(width, width),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class Grow(nn.Module):
    """`frames` frames of each one."""

    def __init__(self, width: int, frames: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyVideoDecoder(nn.Module):
    """A decoder of TAEHV, for the latents of one causal VAE: `taew2_1` for Wan 2.1 and Qwen-Image, `taew2_2` for Wan 2.2 5B,
    `taehv` for Hunyuan Video, ...

        decoder = TinyVideoDecoder.from_file("taew2_1.pth").to("cuda", torch.bfloat16)
        images, memory = decoder.decode(latents)

    The first latent of a video is one image, any other `frames` images. A latent is `pixels` wide. Latents are decoded one
    after another, so a video in parts equals the whole video to the bit. The networks of `taecvx` and `taeh3` are the same,
    and the VAEs that they stand for divide a video in other ways, which is not done here.

    Args:
        latent_channels: of the latents.
        patch_size: how many pixels wide an output of the last layer is.
        growth: how many frames each of the three stages makes of one.
        widths: channels of the stages and of the last layer.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        growth: Sequence[int] = (1, 2, 2),
        widths: Sequence[int] = (256, 128, 64, 64),
    ):
        super().__init__()
        self.latent_channels, self.patch_size = latent_channels, patch_size
        self.pixels, self.frames = 8 * patch_size, prod(growth)
        layers: list[nn.Module] = [SoftClamp(), _conv(latent_channels, widths[0]), nn.ReLU(inplace=True)]
        for (width, following), count in zip(pairwise(widths), growth, strict=True):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, count), _conv(width, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(inplace=True), _conv(widths[-1], 3 * patch_size**2))

    @classmethod
    def from_file(cls, path: str | Path) -> TinyVideoDecoder:
        """The decoder of a published file, `.pth` or `.safetensors`, in float32 on the CPU. The encoder of the file is not
        read. All sizes are read off the weights.

        Raises:
            OSError: there is no such file. ValueError: it has other weights, with those that were expected.
        """
        weights = {key: value for key, value in read_weights(Path(path)).items() if not key.startswith("encoder.")}
        found = {key: list(value.shape) for key, value in weights.items()}
        with torch.device("meta"):
            decoder = cls._of_shapes(found)
        expected = {key: list(value.shape) for key, value in decoder.state_dict().items()}
        wrong = [key for key in dict.fromkeys((*expected, *found)) if expected.get(key) != found.get(key)]
        if wrong:
            key = wrong[0]
            raise ValueError(
                f"{path} is no decoder of TAEHV ({UPSTREAM}): {key} is {found.get(key, 'missing')} in the file and "
                f"{expected.get(key, 'missing')} in the decoder, and {len(wrong) - 1} other tensors differ. Its 'super' and "
                f"'wide' files have other layers"
            )
        decoder.load_state_dict(weights, assign=True)
        return decoder.float().eval().requires_grad_(False)

    @classmethod
    def _of_shapes(cls, shapes: dict[str, list[int]]) -> TinyVideoDecoder:
        """A decoder of these shapes, or Wan 2.1's where they are of no decoder."""
        first, *stages, last = (
            shapes.get(f"decoder.{key}.weight", []) for key in ("1", "7.conv", "13.conv", "19.conv", "22")
        )
        if any(len(shape) != 4 or 0 in shape for shape in (first, *stages, last)):
            return cls()
        return cls(
            latent_channels=first[1],
            patch_size=isqrt(last[0] // 3),
            growth=[shape[0] // shape[1] for shape in stages],
            widths=[*(shape[1] for shape in stages), last[1]],
        )

    @computing
    def decode(self, latents: Tensor, memory: Memory | None = None, frame: int | None = None) -> tuple[Tensor, Memory]:
        """Decode the latents `[n, C, T, h, w]` that follow those of this memory. memory: None for a first part. frame: the
        index of the only latent frame to decode, with the memory of the frames before it.

        Returns images `[n, 3, T', H, W]` in [-1, 1], in the dtype of the weights, and the memory for the next part or frame.

        Raises:
            TypeError, ValueError: the latents or the memory do not fit, with the numbers.
        """
        latents, kept = take_part(self, latents, self.latent_channels, next(self.parameters()).dtype, memory)
        left_out = self.frames - 1 if kept is None else 0
        images = []
        for latent in only(latents, frame).unbind(dim=2):
            frames, kept = self(latent, kept)
            images.append(frames)
        return torch.cat(images, dim=2)[:, :, left_out:], Memory.of(self, latents, kept or ())

    def forward(self, latent: Tensor, kept: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decode one latent `[n, C, h, w]`. kept: the last frame that each block has seen; None before the first latent.
        Returns images `[n, 3, frames, H, W]` in [-1, 1], and what the blocks keep."""
        x, new = latent, []
        for layer in self.decoder:
            if not isinstance(layer, MemoryBlock):
                x = layer(x)
                continue
            frames = x.unflatten(0, (len(latent), -1))
            before = torch.zeros_like(frames[:, :1]) if kept is None else kept[len(new)]
            new.append(frames[:, -1:].clone())
            x = layer(x, torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1))
        images = functional.pixel_shuffle(x, self.patch_size).clamp(0, 1) * 2 - 1
        return images.unflatten(0, (len(latent), -1)).transpose(1, 2), tuple(new)
