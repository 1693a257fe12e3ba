"""Tiny VAEs: small autoencoders that take a model's own latents, from https://github.com/madebyollin/taesd.

Most are `AutoencoderTiny` folders of diffusers. Those of Flux.2 and Sana have another architecture and are published as bare
weights; they are built here, so that the codec finds on them what it finds on an `AutoencoderTiny`. All take the latents in
the scale in which the network draws them. Which family takes which is said in the families' files (`tiny_vae`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import Tensor, nn

from streamflow.models.protocols import VAE, Pipeline

UPSTREAM = "https://github.com/madebyollin/taesd"


def _conv(given: int, made: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(given, made, 3, padding=1, **options)


def _blocks(width: int, count: int, kind: Callable[..., nn.Module] = AutoencoderTinyBlock) -> list[nn.Module]:
    return [kind(width, width, "relu") for _ in range(count)]


class PooledBlock(AutoencoderTinyBlock):
    """A block that first adds what a group norm over the whole picture says."""

    def __init__(self, given: int, made: int, activation: str):
        super().__init__(given, made, activation)
        wide = 4 * given
        self.pool = nn.Sequential(
            nn.Conv2d(given, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU(), nn.Conv2d(wide, given, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


class TinyFlux2(AutoencoderTiny):
    """taef2: as `AutoencoderTiny`, with pooled blocks where the picture is smallest. Its latents are normalised already, so
    the batch norm, whose statistics the codec of Flux.2 undoes, is the identity."""

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
    """taesana: 32 pixels a latent, wider where the picture is smallest."""

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
        for given, made in zip(widths, widths[1:], strict=False):
            decoder += [*_blocks(given, 3), nn.Upsample(scale_factor=2), _conv(given, made, bias=False)]
        self.decoder.layers = nn.Sequential(*decoder, *_blocks(width, 1), _conv(width, 3))


@dataclass(frozen=True)
class Upstream:
    """Weights as upstream publishes them. files: their names; make: the model; rename: from (file's number, key) to a key of
    the model's."""

    files: tuple[str, ...]
    make: Callable[[], AutoencoderTiny]
    rename: Callable[[int, str], str]

    def read(self, folder: Path) -> AutoencoderTiny:
        """The model, with the weights in this folder."""
        vae = self.make()
        weights = {self.rename(i, key): value for i, file in enumerate(self.files) for key, value in _read(folder / file)}
        statistics = {key: value for key, value in vae.state_dict().items() if key.startswith("bn.")}
        vae.load_state_dict({**statistics, **weights})
        return vae


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file).items()
    return torch.load(file, map_location="cpu", weights_only=True).items()


def _as_is(_: int, key: str) -> str:
    return key


def _sequential(file: int, key: str) -> str:
    """Upstream's decoder begins with a clamp, which here is no layer."""
    index, _, rest = key.partition(".")
    return f"encoder.layers.{index}.{rest}" if file == 0 else f"decoder.layers.{int(index) - 1}.{rest}"


PUBLISHED: Mapping[str, Upstream] = {
    "taef2": Upstream(("taef2.safetensors",), TinyFlux2, _as_is),
    "taesana": Upstream(("taesana_encoder.pth", "taesana_decoder.pth"), TinySana, _sequential),
}


def load(where: str) -> AutoencoderTiny:
    """A tiny VAE from a hub id or a folder: of diffusers, or upstream's own weights of a kind in `PUBLISHED`.

    Raises:
        OSError: there is none, or the hub cannot be reached. RuntimeError: weights of another architecture.
    """
    here = Path(where)
    if here.is_dir():
        for upstream in PUBLISHED.values():
            if all((here / file).is_file() for file in upstream.files):
                return upstream.read(here)
    kind = PUBLISHED.get(where.rpartition("/")[2])
    if kind is not None and not here.exists():
        from huggingface_hub import hf_hub_download

        return kind.read(Path(hf_hub_download(where, kind.files[0])).parent)
    return AutoencoderTiny.from_pretrained(where)


def known_place(pipe: Pipeline, known: str | None) -> str | None:
    """Where the tiny VAE of a pipe can be loaded from: the folder `vae_tiny` beside its own, or the hub id of its
    family's."""
    own = Path(str(getattr(pipe, "name_or_path", None) or "")) / "vae_tiny"
    if own.is_dir():
        return str(own)
    return known if known is not None and "/" in known else None


def find(pipe: Pipeline, known: str | None) -> str:
    """As `known_place`.

    Raises:
        ValueError: none is known, or it is not on the hub; with where to get it, if anywhere.
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
