"""Tiny VAEs: small autoencoders for a model's own latents, from https://github.com/madebyollin/taesd.

Most are `AutoencoderTiny` folders of diffusers. Those of Flux.2 and Sana have another architecture and are published as bare
weights; they are subclasses of `AutoencoderTiny` here. All take latents in the network's scale. A family names its tiny VAE
in `tiny_vae`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import Tensor, nn

from streamflow.models.protocols import VAE, Pipeline

UPSTREAM = "https://github.com/madebyollin/taesd"


def _conv(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


def _blocks(width: int, count: int, kind: Callable[..., nn.Module] = AutoencoderTinyBlock) -> list[nn.Module]:
    return [kind(width, width, "relu") for _ in range(count)]


class PooledBlock(AutoencoderTinyBlock):
    """A block that first adds a group norm over the whole image."""

    def __init__(self, channels_in: int, channels_out: int, activation: str):
        super().__init__(channels_in, channels_out, activation)
        wide = 4 * channels_in
        self.pool = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False),
            nn.GroupNorm(4, wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels_in, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


class TinyFlux2(AutoencoderTiny):
    """taef2: as `AutoencoderTiny`, with pooled blocks at the lowest resolution. Its latents are normalised already, so the
    batch norm, whose statistics the codec of Flux.2 uses, is the identity."""

    def __init__(self, width: int = 64):
        super().__init__(
            latent_channels=32, encoder_block_out_channels=(width,) * 4, decoder_block_out_channels=(width,) * 4
        )
        for layers, first in ((self.encoder.layers, 11), (self.decoder.layers, 2)):
            for i, block in enumerate(_blocks(width, 3, PooledBlock), first):
                layers[i] = block
        self.bn = nn.BatchNorm2d(4 * 32, eps=0.0, affine=False)
        self.register_to_config(batch_norm_eps=0.0)


class TinySana(AutoencoderTiny):
    """taesana: a latent is 32 pixels wide, and low resolutions have more channels."""

    def __init__(self, width: int = 64):
        widths = (4 * width, 2 * width, width, width, width, width)
        super().__init__(
            latent_channels=32,
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            num_encoder_blocks=(0,) * 6,
            num_decoder_blocks=(0,) * 6,
        )
        encoder = [_conv(3, width // 2, stride=2), nn.ReLU(), _conv(width // 2, width, stride=2), nn.ReLU()]
        encoder += _blocks(width, 1)
        for _ in range(3):
            encoder += [_conv(width, width, stride=2, bias=False), *_blocks(width, 3)]
        self.encoder.layers = nn.Sequential(*encoder, _conv(width, 32))
        decoder = [_conv(32, widths[0]), nn.ReLU()]
        for wide, narrow in zip(widths, widths[1:], strict=False):
            decoder += [*_blocks(wide, 3), nn.Upsample(scale_factor=2), _conv(wide, narrow, bias=False)]
        self.decoder.layers = nn.Sequential(*decoder, *_blocks(width, 1), _conv(width, 3))


@dataclass(frozen=True)
class Upstream:
    """Weights in upstream's format: their files, the model, and `rename(index of the file, key)` to a key of the model."""

    files: tuple[str, ...]
    make: Callable[[], AutoencoderTiny]
    rename: Callable[[int, str], str]

    def read(self, folder: Path) -> AutoencoderTiny:
        """The model with the weights in this folder."""
        vae = self.make()
        files = [read_weights(folder / file) for file in self.files]
        weights = {self.rename(i, key): value for i, one in enumerate(files) for key, value in one.items()}
        statistics = {key: value for key, value in vae.state_dict().items() if key.startswith("bn.")}
        vae.load_state_dict({**statistics, **weights})
        return vae


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a `.safetensors` file, or of one of torch, on the CPU.

    Raises:
        OSError: there is no such file. ValueError: it has anything else.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch has no common class of errors for the bytes of another file
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{file} is no file of weights: {reason}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise ValueError(f"{file} holds other things than tensors by name")
    return weights


def _sequential(file: int, key: str) -> str:
    """Layers are numbered from 0 in both files, and upstream's decoder begins with a clamp, which is no layer here."""
    index, _, rest = key.partition(".")
    return f"encoder.layers.{index}.{rest}" if file == 0 else f"decoder.layers.{int(index) - 1}.{rest}"


PUBLISHED: Mapping[str, Upstream] = {
    "taef2": Upstream(("taef2.safetensors",), TinyFlux2, lambda file, key: key),
    "taesana": Upstream(("taesana_encoder.pth", "taesana_decoder.pth"), TinySana, _sequential),
}


def load(model: str) -> AutoencoderTiny:
    """A tiny VAE from a hub id or a folder, in diffusers' format or one of `PUBLISHED`.

    Raises:
        OSError: there is none, or the hub cannot be reached. RuntimeError: the weights are of another architecture.
    """
    here = Path(model)
    if here.is_dir():
        for upstream in PUBLISHED.values():
            if all((here / file).is_file() for file in upstream.files):
                return upstream.read(here)
    kind = PUBLISHED.get(model.rpartition("/")[2])
    if kind is not None and not here.exists():
        from huggingface_hub import hf_hub_download

        return kind.read(Path(hf_hub_download(model, kind.files[0])).parent)
    return AutoencoderTiny.from_pretrained(model)


def known_place(pipe: Pipeline, known: str | None) -> str | None:
    """The folder or the hub id of a pipe's tiny VAE: the folder `vae_tiny` next to its own, or its family's hub id."""
    own = Path(str(getattr(pipe, "name_or_path", None) or "")) / "vae_tiny"
    if own.is_dir():
        return str(own)
    return known if known is not None and "/" in known else None


def find(pipe: Pipeline, known: str | None) -> str:
    """The folder or the hub id of a pipe's tiny VAE.

    Raises:
        ValueError: none is known, or it is not on the hub; the message says where it is published.
    """
    place = known_place(pipe, known)
    if place is not None:
        return place
    if known is None:
        raise ValueError(
            f"no tiny VAE is known for {type(pipe).__name__}: pass use_tiny_vae(path) with an AutoencoderTiny of its "
            f"latents, a folder or a hub id"
        )
    raise ValueError(
        f"{known}, the tiny VAE for {type(pipe).__name__}, is not on the hub: put "
        f"{' and '.join(PUBLISHED[known].files)} of {UPSTREAM} into a folder and pass use_tiny_vae(folder)"
    )


def check_scale(vae: VAE, factor: int) -> None:
    """Raise ValueError unless a latent of this VAE is `factor` pixels wide."""
    pixels = 2 ** (len(vae.config.decoder_block_out_channels) - 1)
    if pixels != factor:
        raise ValueError(
            f"a latent of this {type(vae).__name__} is {pixels} pixels wide, one of this pipeline {factor}: "
            f"load the tiny VAE that belongs to this family"
        )
