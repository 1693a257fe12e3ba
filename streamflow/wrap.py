"""What a loaded pipeline must be before it can be streamed, and how StreamDiffusion's constructor is shown it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def base_view(pipe: Any, network: torch.nn.Module, factor: int) -> SimpleNamespace:
    """What StreamDiffusion's constructor looks at, with the network under the name it knows."""
    return SimpleNamespace(
        device=pipe.device,
        vae_scale_factor=factor,
        scheduler=SimpleNamespace(config={}),
        text_encoder=getattr(pipe, "text_encoder", None),
        unet=network,
        vae=pipe.vae,
    )


def check_dtype(wanted: torch.dtype | None, network: torch.nn.Module, device: torch.device) -> torch.dtype:
    """The network's dtype; TypeError, ValueError or RuntimeError where another one is wanted or it cannot be had."""
    dtype = network.dtype
    if wanted is not None and (not isinstance(wanted, torch.dtype) or not wanted.is_floating_point):
        raise TypeError(f"torch_dtype must be a floating torch.dtype such as torch.float32, not {wanted!r}")
    if wanted not in (None, dtype):
        raise ValueError(f"torch_dtype {wanted} for a network in {dtype}: move it first, pipe.to(dtype={wanted})")
    if dtype == torch.float16 and device.type == "cpu":
        _check_half_on_cpu()
    return dtype


def _check_half_on_cpu() -> None:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    try:
        torch.nn.functional.conv2d(one, one)
        torch.nn.functional.scaled_dot_product_attention(one, one, one)
    except RuntimeError as error:
        raise RuntimeError(
            "this CPU build of torch cannot compute in float16: use pipe.to(dtype=torch.float32) or torch.bfloat16"
        ) from error


def check_placement(pipe: Any) -> None:
    """Raise ValueError with the remedy for a pipe that is spread over devices or offloaded."""
    if getattr(pipe, "hf_device_map", None):
        raise ValueError("this pipe was loaded with a device_map: load it without one and move it, pipe.to('cuda')")
    hooked = [name for name, part in pipe.components.items() if getattr(part, "_hf_hook", None) is not None]
    if hooked:
        raise ValueError(
            f"{', '.join(hooked)} of this pipe are offloaded, so a stream would move them at every frame: call "
            f"pipe.remove_all_hooks() and pipe.to(device), or load the pipe without enable_..._cpu_offload()"
        )


def check_sampling(scheduler: Any, do_add_noise: bool) -> None:
    """Raise ValueError where the pipeline's scheduler re-noises at every step and the stream would not."""
    if scheduler.config.get("stochastic_sampling") and not do_add_noise:
        raise ValueError(
            "this pipe's scheduler has stochastic_sampling, which adds noise at every step: pass do_add_noise=True, which "
            "does the same with each frame's own noise, or a scheduler without it"
        )
