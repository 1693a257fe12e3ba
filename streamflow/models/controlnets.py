"""The control nets of each family: how a net is called, its control image, and where its residuals go. Each follows its
pipeline (diffusers pipelines/controlnet_sd3, pipelines/flux/pipeline_flux_controlnet.py, pipelines/qwenimage/
pipeline_qwenimage_controlnet.py, pipelines/controlnet) but for the VAE: the mode of its posterior is taken, not a
sample, so that the latents of a still image stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamflow._validation import is_whole_number
from streamflow.conditioning.controlnet import Control, ControlRule, Residuals
from streamflow.models.families.flux import pack
from streamflow.models.protocols import VAE, Network

Encode = Callable[[Tensor], Tensor]


class SD3Control(ControlRule):
    """Called for every row with the row's own prompt. Nets with `force_zeros_for_pooled_projection` get no pooled embeddings
    and latents without the VAE's shift; nets without a position table use the network's."""

    model = "SD3ControlNetModel"
    same = (
        *("in_channels", "patch_size", "num_attention_heads", "attention_head_dim"),
        *("joint_attention_dim", "pooled_projection_dim"),
    )

    def check(self, item: Control, network: Network, others: Sequence[Control]) -> None:
        super().check(item, network, others)
        for other in others:
            if _zeroed(other) != _zeroed(item):
                raise ValueError(
                    f"force_zeros_for_pooled_projection is {_zeroed(item)} for control {item.name!r} and "
                    f"{_zeroed(other)} for {other.name!r}, and the pipeline treats all nets alike: use nets of one kind"
                )

    def ready(self, item: Control, network: Network) -> None:
        if item.net.pos_embed is None:
            embed: Any = item.net._get_pos_embed_from_transformer
            item.net.pos_embed = embed(network).to(network.device, network.dtype)

    def image(self, item: Control, images: Tensor, encode: Encode, vae: VAE) -> Tensor:
        if not _zeroed(item):
            return encode(images)
        return vae.encode(images.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor

    def call(self, item: Control, x: Tensor, t: Tensor, image: Tensor, cond: Mapping[str, Tensor]) -> Residuals:
        pooled, text = cond["pooled_projections"], cond["encoder_hidden_states"]
        (blocks,) = item.net(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=None if item.net.config.joint_attention_dim is None else text,
            pooled_projections=torch.zeros_like(pooled) if _zeroed(item) else pooled,
            controlnet_cond=image,
            return_dict=False,
        )
        return {"block_controlnet_hidden_states": blocks}


def _zeroed(item: Control) -> bool:
    return bool(item.net.config.force_zeros_for_pooled_projection)


class FluxControl(ControlRule):
    """Called once a step: under true guidance the negative prompt gets the prompt's residuals. Nets with an
    `input_hint_block` take pixels, the others packed latents; union nets take a mode."""

    model = "FluxControlNetModel"
    same = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
    blocks = ("controlnet_blocks", "controlnet_single_blocks")
    lends = ("encoder_hidden_states", "pooled_projections")

    def check(self, item: Control, network: Network, others: Sequence[Control]) -> None:
        super().check(item, network, others)
        net = item.net
        if net.config.guidance_embeds and not network.config.guidance_embeds:
            raise ValueError(f"control {item.name!r} takes a guidance scale and this network none: use a net without one")
        modes = net.config.num_mode
        if net.union and not (is_whole_number(item.mode) and 0 <= item.mode < modes):
            raise ValueError(
                f"control {item.name!r} is a union net of {modes} modes: pass one, "
                f"add_control(name, net, mode=0 to {modes - 1}), not {item.mode!r}"
            )
        for other in others:
            if _sees_pixels(other) != _sees_pixels(item):
                raise ValueError(
                    f"of controls {item.name!r} and {other.name!r} one takes pixels and one latents, and their residuals go "
                    f"to different blocks: use nets of one kind"
                )

    def image(self, item: Control, images: Tensor, encode: Encode, vae: VAE) -> Tensor:
        return images if _sees_pixels(item) else encode(images)

    def call(self, item: Control, x: Tensor, t: Tensor, image: Tensor, cond: Mapping[str, Tensor]) -> Residuals:
        net = item.net
        blocks, single = net(
            hidden_states=x,
            controlnet_cond=image,
            controlnet_mode=x.new_full((len(x), 1), item.mode or 0, dtype=torch.long) if net.union else None,
            timestep=t.to(x.dtype) / 1000,
            guidance=cond["guidance"] if net.config.guidance_embeds else None,
            pooled_projections=cond["pooled_projections"],
            encoder_hidden_states=cond["encoder_hidden_states"],
            txt_ids=cond["txt_ids"],
            img_ids=cond["img_ids"],
            return_dict=False,
        )
        return {
            "controlnet_block_samples": blocks,
            "controlnet_single_block_samples": single,
            "controlnet_blocks_repeat": _sees_pixels(item),
        }


def _sees_pixels(item: Control) -> bool:
    return item.net.input_hint_block is not None


class QwenImageControl(ControlRule):
    """Called once a step, as Flux's. Control images are encoded by the pipe's own VAE, with the pipeline's `1 / std`."""

    model = "QwenImageControlNetModel"
    same = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    lends = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def image(self, item: Control, images: Tensor, encode: Encode, vae: VAE) -> Tensor:
        z = vae.encode(images.to(vae.dtype).unsqueeze(2)).latent_dist.mode()
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values, device=z.device).view(-1, 1, 1, 1) for values in statistics)
        return pack(((z - mean) * (1.0 / std)).squeeze(2))

    def call(self, item: Control, x: Tensor, t: Tensor, image: Tensor, cond: Mapping[str, Tensor]) -> Residuals:
        blocks = item.net(
            hidden_states=x,
            controlnet_cond=image,
            timestep=t.to(x.dtype) / 1000,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_hidden_states_mask=cond.get("encoder_hidden_states_mask"),
            img_shapes=[[(1, *cond["grid"].shape)]],
            return_dict=False,
        )
        return {"controlnet_block_samples": blocks}


class UNetControl(ControlRule):
    """Stable Diffusion's and SDXL's: called for every row with the row's own prompt; takes pixels in [0, 1]."""

    model = "ControlNetModel"
    same = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
    blocks = ("controlnet_down_blocks",)

    def check(self, item: Control, network: Network, others: Sequence[Control]) -> None:
        super().check(item, network, others)
        if item.net.config.global_pool_conditions:
            raise ValueError(
                f"control {item.name!r} has global_pool_conditions, which stands for guess mode, and a stream does not "
                f"support it: use another net"
            )

    def image(self, item: Control, images: Tensor, encode: Encode, vae: VAE) -> Tensor:
        return (images + 1) / 2

    def call(self, item: Control, x: Tensor, t: Tensor, image: Tensor, cond: Mapping[str, Tensor]) -> Residuals:
        added = {name: cond[name] for name in ("text_embeds", "time_ids") if name in cond}
        down, mid = item.net(
            x,
            t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            controlnet_cond=image,
            added_cond_kwargs=added or None,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
