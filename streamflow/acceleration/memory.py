"""Moves a pipeline from the CPU to a device that has little memory: its network quantised layer by layer on the way, and its
text encoders left on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from streamflow.acceleration.compile import repeated_blocks
from streamflow.acceleration.quantize import quantize_on

if TYPE_CHECKING:
    from streamflow.models.protocols import Pipeline


def place(
    pipe: Pipeline,
    device: torch.device | str,
    *,
    quantize: str | None = None,
    offload_text_encoders: bool = False,
    family: str | None = None,
) -> Pipeline:
    """Move a pipeline that is on the CPU to a device, and return it.

    Args:
        device: such as "cuda".
        quantize: "fp8", "fp8-tensor" or "int8": the matrices of the network's blocks in eight bits
            (`streamflow.acceleration.quantize`). They are moved and quantised one at a time, and the plain weights are not
            kept, so the device never holds the plain network. It streams eagerly and under every `accelerate` that leaves
            the weights as they are.
        offload_text_encoders: text encoders stay on the CPU, in pinned memory. When a prompt is encoded, each layer is
            copied to the device before it runs, while the layer before it computes, and is dropped afterwards
            (`diffusers.hooks.apply_group_offloading`).
        family: of a pipeline whose class does not tell it.

    Raises:
        ValueError, RuntimeError, ImportError: what cannot be quantised, or what this device does not support.
    """
    from streamflow.models import adapter_for
    from streamflow.models.pipe_parts import offload_layers

    device = torch.device(device)
    if offload_text_encoders and device.type != "cuda":
        raise ValueError(f"offload_text_encoders keeps text encoders off a GPU, and the device is {device}: leave it out")
    if quantize is not None:
        network = adapter_for(pipe, family).base
        quantize_on(device, network, repeated_blocks(network), quantize)
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        if offload_text_encoders and name.startswith("text_encoder"):
            offload_layers(part, device)
        else:
            nn.Module.to(part, device)
    if pipe.device.type != device.type:
        raise RuntimeError(
            "this diffusers takes the device of the text encoders for the pipeline's: upgrade it, pip install -U diffusers, "
            "or leave offload_text_encoders out"
        )
    return pipe
