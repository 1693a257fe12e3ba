"""Small control nets of diffusers with random weights, for the networks of the random pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel
from torch import nn

from random_pipelines import wake

ATTENTION = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim")

# By the network's class: the class of its control nets, the config entries that both share, and the control nets' own.
KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...], dict[str, Any]]] = {
    "SD3Transformer2DModel": (
        SD3ControlNetModel,
        (
            *(*ATTENTION, "pooled_projection_dim", "caption_projection_dim"),
            *("patch_size", "sample_size", "pos_embed_max_size"),
        ),
        {"num_layers": 2, "force_zeros_for_pooled_projection": False},
    ),
    "FluxTransformer2DModel": (
        FluxControlNetModel,
        (*ATTENTION, "pooled_projection_dim", "guidance_embeds", "axes_dims_rope"),
        {"num_layers": 1, "num_single_layers": 1},
    ),
    "QwenImageTransformer2DModel": (QwenImageControlNetModel, (*ATTENTION, "axes_dims_rope"), {"num_layers": 1}),
    "UNet2DConditionModel": (
        ControlNetModel,
        (
            *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "norm_num_groups"),
            *("cross_attention_dim", "attention_head_dim", "use_linear_projection", "addition_embed_type"),
            *("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
        ),
        {"conditioning_embedding_out_channels": (8, 8, 8, 8)},
    ),
}


def random_control(network: nn.Module, seed: int = 0, **changes: Any) -> nn.Module:
    """A control net for this network, in its dtype and on its device, whose weights are a function of `seed`. changes:
    entries of its config to replace."""
    name = type(network).__name__
    if name not in KINDS:
        raise ValueError(f"no control net is known for {name}: choose a network of {', '.join(KINDS)}")
    cls, shared, own = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = wake(cls(**{**{key: network.config[key] for key in shared}, **own, **changes}))
    return net.to(network.device, network.dtype)
