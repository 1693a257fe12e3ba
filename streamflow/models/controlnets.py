"""The control nets of each family: how a net is called, what it sees of a picture, and where its residuals go. Each follows
its pipeline (diffusers pipelines/controlnet_sd3, pipelines/flux/pipeline_flux_controlnet.py, pipelines/qwenimage/
pipeline_qwenimage_controlnet.py, pipelines/controlnet) but for the VAE: of its posterior the mode is taken, not a draw, so
that a still picture stays still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from streamflow.conditioning.controlnet import Control, ControlRule, Residuals
from streamflow.models.families.flux import pack

Encode = Callable[[Tensor], Tensor]


class SD3Control(ControlRule):
    """Asked for every row with the row's own prompt. Nets with `force_zeros_for_pooled_projection` see no pooled embeddings
    and latents without the VAE's shift; those without a table of positions share the network's."""

    model = "SD3ControlNetModel"
    same = (
        *("in_channels", "patch_size", "num_attention_heads", "attention_head_dim"),
        *("joint_attention_dim", "pooled_projection_dim"),
    )

    def check(self, item: Control, network: nn.Module, others: Sequence[Control]) -> None:
        super().check(item, network, others)
        for other in others:
            if _zeroed(other) != _zeroed(item):
                raise ValueError(
                    f"force_zeros_for_pooled_projection is {_zeroed(item)} for control {item.name!r} and "
                    f"{_zeroed(other)} for {other.name!r}, which the pipeline cannot tell apart: take nets of one kind"
                )

    def ready(self, item: Control, network: nn.Module) -> None:
        if item.net.pos_embed is None:
            item.net.pos_embed = item.net._get_pos_embed_from_transformer(network).to(network.device, network.dtype)

    def image(self, item: Control, pictures: Tensor, encode: Encode, vae: nn.Module) -> Tensor:
        if not _zeroed(item):
            return encode(pictures)
        return vae.encode(pictures.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor

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
    """Asked once a step: true guidance gives the negative prompt the prompt's residuals. Nets with an `input_hint_block`
    see pixels, the others packed latents; union nets are told their mode."""

    model = "FluxControlNetModel"
    same = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
    blocks = ("controlnet_blocks", "controlnet_single_blocks")
    lends = ("encoder_hidden_states", "pooled_projections")

    def check(self, item: Control, network: nn.Module, others: Sequence[Control]) -> None:
        super().check(item, network, others)
        net = item.net
        if net.config.guidance_embeds and not network.config.guidance_embeds:
            raise ValueError(f"control {item.name!r} takes a guidance scale and this network none: take a net without one")
        modes = net.config.num_mode
        if net.union and (isinstance(item.mode, bool) or not isinstance(item.mode, int) or not 0 <= item.mode < modes):
            raise ValueError(
                f"control {item.name!r} is a union net of {modes} modes: say which, "
                f"add_control(name, net, mode=0 to {modes - 1}), not {item.mode!r}"
            )
        for other in others:
            if _sees_pixels(other) != _sees_pixels(item):
                raise ValueError(
                    f"of controls {item.name!r} and {other.name!r} one sees pixels and one latents, and their residuals go "
                    f"to different blocks: take nets of one kind"
                )

    def image(self, item: Control, pictures: Tensor, encode: Encode, vae: nn.Module) -> Tensor:
        return pictures if _sees_pixels(item) else encode(pictures)

    def call(self, item: Control, x: Tensor, t: Tensor, image: Tensor, cond: Mapping[str, Tensor]) -> Residuals:
        net = item.net
        blocks, single = net(
            hidden_states=x,
            controlnet_cond=image,
            controlnet_mode=torch.full((len(x), 1), item.mode, dtype=torch.long, device=x.device) if net.union else None,
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
    """Asked once a step, as Flux's. Pictures are always encoded by the pipe's own VAE, with the pipeline's `1 / std`."""

    model = "QwenImageControlNetModel"
    same = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    lends = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def image(self, item: Control, pictures: Tensor, encode: Encode, vae: nn.Module) -> Tensor:
        z = vae.encode(pictures.to(vae.dtype).unsqueeze(2)).latent_dist.mode()
        given = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(one, device=z.device).view(-1, 1, 1, 1) for one in given)
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
    """Stable Diffusion's and SDXL's: asked for every row with the row's own prompt; sees pixels in [0, 1]."""

    model = "ControlNetModel"
    same = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
    blocks = ("controlnet_down_blocks",)

    def check(self, item: Control, network: nn.Module, others: Sequence[Control]) -> None:
        super().check(item, network, others)
        if item.net.config.global_pool_conditions:
            raise ValueError(
                f"control {item.name!r} was trained with global_pool_conditions, which means guess mode, and a stream knows "
                f"none: take another net"
            )

    def image(self, item: Control, pictures: Tensor, encode: Encode, vae: nn.Module) -> Tensor:
        return (pictures + 1) / 2

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
