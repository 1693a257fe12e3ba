"""The decoder of a video VAE as a function of tensors, plain and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn

from streamflow.models.pipe_parts import base_network

if TYPE_CHECKING:
    from streamflow.models.protocols import VAE


class WholeDecoder(nn.Module):
    """The decoder of a VAE as a function of tensors: latents `[1, C, T, h, w]` to images `[1, 3, T', H, W]`."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]

    def compiled(self, compile: Callable[[nn.Module], nn.Module]) -> WholeDecoder:
        """The same, with the module compiled that decodes one latent frame. Compiled whole, each frame would be traced anew.
        The weights are shared, and the VAE stays as it is."""
        vae = base_network(self.vae)
        compiled = compile(_traceable(vae.get_submodule("decoder")))
        return WholeDecoder(_copied(vae, {"decoder": _OfOneLayout(compiled)}))


class _OfOneLayout(nn.Module):
    """Calls a module with latents in one memory layout: a slice of a longer chunk has other strides, for which torch would
    compile the module anew."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: Tensor, **given: Any) -> Tensor:
        return self.module(latents.contiguous(), **given)


class _Upsampling(WanResample):
    """A `WanResample` that torch.compile can trace. Its own code compares tensors with a text, which torch 2.11 cannot
    trace."""

    def forward(self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None) -> Tensor:
        if feat_cache is None or feat_idx is None or self.mode != "upsample3d":
            return super().forward(x, feat_cache, feat_idx)
        index = feat_idx[0]
        feat_idx[0] += 1
        kept = feat_cache[index]
        if kept is None:  # the first frame of a video, which becomes one image
            feat_cache[index] = "Rep"
        else:
            last = x[:, :, -2:].clone()
            second = isinstance(kept, str)
            if last.shape[2] < 2:
                last = torch.cat([torch.zeros_like(last) if second else kept[:, :, -1:], last], dim=2)
            doubled = self.time_conv(x) if second else self.time_conv(x, kept)
            feat_cache[index] = last
            x = doubled.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        images = self.resample(x.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (len(x), -1)).transpose(1, 2)


def _copied(module: Any, children: dict[str, nn.Module]) -> Any:
    """A module that shares everything with this one except these children."""
    own = copy.copy(module)
    own._modules = {**module._modules, **children}
    return own


def _traceable(module: nn.Module) -> nn.Module:
    """A module of the same weights that torch.compile can trace, without what torch.compile has made of it."""
    module = base_network(module)
    children = {name: _traceable(child) for name, child in module.named_children()}
    own = _copied(module, children)
    if type(own) is WanResample:
        own.__class__ = _Upsampling
    return own
