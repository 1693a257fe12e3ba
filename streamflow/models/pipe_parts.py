"""Checks that a loaded pipeline can be streamed, and the view of it that StreamDiffusion's constructor reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from streamflow.models.protocols import VAE, Network, Pipeline, Scheduler

QUANTIZED = "quantized_to"  # the attribute of layers whose plain weights were dropped when they were quantised: the kind
# Packages that a pipeline's module uses for prompts, where they are installed.
TEXT_PACKAGES: dict[str, str] = dict.fromkeys(
    (
        "AnyFlowFARPipeline",
        "HeliosPipeline",
        "HeliosPyramidPipeline",
        "PRXPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    "ftfy",
)


def base_view(pipe: Pipeline, network: nn.Module, factor: int) -> SimpleNamespace:
    """The attributes that StreamDiffusion's constructor reads, with the network under the name `unet`."""
    return SimpleNamespace(
        device=pipe.device,
        vae_scale_factor=factor,
        scheduler=SimpleNamespace(config={}),
        text_encoder=getattr(pipe, "text_encoder", None),
        unet=network,
        vae=pipe.vae,
    )


def base_network(network: Any) -> Network:
    """The network inside `torch.compile`, peft and torch's wrappers for several devices."""
    while True:
        if hasattr(network, "_orig_mod"):
            network = network._orig_mod
        elif hasattr(network, "get_base_model"):
            network = network.get_base_model()
        elif isinstance(network, nn.DataParallel):
            network = network.module
        else:
            return network


def has_image_adapters(network: Any) -> bool:
    """Whether IP-Adapters are in this network, of a family that has them."""
    network = base_network(network)
    kind = getattr(getattr(network, "config", None), "encoder_hid_dim_type", None)
    return kind == "ip_image_proj" or getattr(network, "image_proj", None) is not None


def quantized_kinds(network: nn.Module) -> set[str]:
    """The kinds of quantisation of a network's layers whose plain weights were not kept; none for plain networks."""
    return {vars(m)[QUANTIZED] for m in network.modules() if QUANTIZED in vars(m)}


def offload_layers(module: nn.Module, device: torch.device) -> None:
    """Keep the weights of a module on the CPU, in pinned memory. Each layer's are copied to this CUDA device before it runs,
    on a stream beside the current one, and are dropped afterwards."""
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(module, device, cpu, offload_type="leaf_level", use_stream=True, record_stream=True)


def check_network(network: object) -> None:
    """TypeError for what cannot be called; ValueError for a network with a cache of the step before."""
    if not callable(network):
        raise TypeError(f"a network must be a module that can be called, not {network!r}")
    if getattr(base_network(network), "is_cache_enabled", False):
        raise ValueError(
            f"this {type(base_network(network)).__name__} has a cache (enable_cache) that holds results of the step before, "
            f"and the rows of a stream are at different steps: call its disable_cache()"
        )


@dataclass(frozen=True)
class PipeParts:
    """The parts of a pipe that a stream uses. scheduler: its id and its settings. placement: the dtype and the devices."""

    network: Network
    vae: VAE | None
    controlnet: nn.Module | None
    scheduler: tuple[int, str]
    placement: str

    @classmethod
    def of(cls, pipe: Pipeline, network: str) -> PipeParts:
        """The current parts of this pipe; `network` is the attribute that holds its network. Raises ValueError where parts
        are offloaded, or where the network or the scheduler is missing."""
        check_placement(pipe)
        for name in (network, "scheduler"):
            if getattr(pipe, name, None) is None:
                raise ValueError(f"this {type(pipe).__name__} has no {name}: assign pipe.{name} first")
        net = getattr(pipe, network)
        check_network(net)
        scheduler = id(pipe.scheduler), f"{dict(pipe.scheduler.config)} {getattr(pipe.scheduler, '_shift', None)}"
        vae, base = getattr(pipe, "vae", None), base_network(net)
        apart = f", its VAE on {vae.device}" if vae is not None and vae.device != base.device else ""
        return cls(
            network=net,
            vae=vae,
            controlnet=getattr(pipe, "controlnet", None),
            scheduler=scheduler,
            placement=f"{base.dtype} on {base.device}{apart}",
        )

    def check_same_place(self, seen: PipeParts, controls: Sequence[nn.Module]) -> None:
        """Raise ValueError where the pipe has other control nets than the stream, or another device or dtype than before."""
        nets = getattr(self.controlnet, "nets", [self.controlnet] if self.controlnet is not None else [])
        if self.controlnet is not seen.controlnet and [id(net) for net in nets] != [id(net) for net in controls]:
            raise ValueError(
                "pipe.controlnet was assigned after this stream was made: call stream.remove_control(name) and "
                "stream.add_control(name, model), or make a new StreamFlow of the pipe"
            )
        if self.placement != seen.placement:
            raise ValueError(
                f"the pipe was moved, pipe.to(...), from {seen.placement} to {self.placement} after this stream was made: "
                f"make a new StreamFlow of it, or move it back"
            )


def missing_text_parts(pipe: Pipeline) -> list[str]:
    """What this pipeline lacks to encode prompts: text encoders and tokenizers that are None, and packages."""
    parts = pipe.components.items()
    missing = [name for name, part in parts if part is None and name.startswith(("text_encoder", "tokenizer"))]
    for cls in type(pipe).__mro__:
        package = TEXT_PACKAGES.get(cls.__name__)
        if package is not None and not hasattr(sys.modules[cls.__module__], package):
            missing.append(f"the package {package}")
    return missing


def cannot_encode(pipe: Pipeline, missing: Sequence[str]) -> ValueError:
    """The error for a prompt that this pipeline cannot encode without these parts."""
    return ValueError(
        f"this {type(pipe).__name__} cannot encode a prompt without {' and '.join(missing)}: put that back, or pass "
        f"prompt_embeds and what else its call takes instead of prompts"
    )


def check_dtype(wanted: torch.dtype | None, network: nn.Module, device: torch.device) -> torch.dtype:
    """The network's dtype. TypeError for what is no floating dtype, ValueError where `wanted` differs from the network's
    dtype, RuntimeError where the device cannot compute in it."""
    dtype = base_network(network).dtype
    if wanted is not None and (not isinstance(wanted, torch.dtype) or not wanted.is_floating_point):
        raise TypeError(f"torch_dtype must be a floating torch.dtype such as torch.float32, not {wanted!r}")
    if wanted not in (None, dtype):
        raise ValueError(f"torch_dtype {wanted} for a network in {dtype}: move it first, pipe.to(dtype={wanted})")
    if dtype == torch.float16 and device.type == "cpu":
        _check_half_on_cpu()
    return dtype


def _check_half_on_cpu() -> None:
    x = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    try:
        nn.functional.conv2d(x, x)
        nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        raise RuntimeError(
            "this CPU build of torch cannot compute in float16: use pipe.to(dtype=torch.float32) or torch.bfloat16"
        ) from error


def check_placement(pipe: Pipeline) -> None:
    """Raise ValueError with the remedy for a pipe that is spread over devices or offloaded, in any of diffusers' ways."""
    if getattr(pipe, "hf_device_map", None):
        raise ValueError(
            "this pipe was loaded with a device_map: load it without one and move it, pipe.to('cuda'), after "
            "pipe.reset_device_map() if it is loaded already"
        )
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    marked = {name: [one for one in part.modules() if not _MARKS.isdisjoint(vars(one))] for name, part in parts.items()}
    for is_offloaded, remedy in _OFFLOADED:
        names = [name for name, modules in marked.items() if any(map(is_offloaded, modules))]
        if is_offloaded is _by_groups:  # text encoders move when a prompt is encoded, not in every frame
            names = [name for name in names if not name.startswith("text_encoder")]
        if names:
            raise ValueError(
                f"{', '.join(names)} of this pipe are offloaded, so a stream would move them at every frame: {remedy}"
            )


def _by_device_map(module: nn.Module) -> bool:
    return len({str(device) for device in (getattr(module, "hf_device_map", None) or {}).values()}) > 1


def _by_groups(module: nn.Module) -> bool:
    return any("offload" in name for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", ()))


_MARKS = {"hf_device_map", "_hf_hook", "_diffusers_hook"}  # the attributes that accelerate and diffusers set
_OFFLOADED = (
    (_by_device_map, "load them without a device_map, or with one of a single device"),
    (
        lambda module: getattr(module, "_hf_hook", None) is not None,
        "call pipe.remove_all_hooks() and pipe.to(device), or load the pipe without enable_..._cpu_offload()",
    ),
    (_by_groups, "load the pipe without enable_group_offload(), which cannot be undone, and pipe.to(device)"),
)


def check_sampling(scheduler: Scheduler) -> None:
    """Raise TypeError for what is no scheduler, ValueError for one that changes the size of latents from step to step."""
    if not hasattr(scheduler, "config") or not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"a scheduler must be one of diffusers, not {scheduler!r}")
    if scheduler.config.get("scale_factors") or getattr(scheduler, "_scale_factors", None):
        raise ValueError(
            f"this pipe's {type(scheduler).__name__} has scale_factors, which enlarge the latents step by step, and the "
            f"rows of a stream have one size: make it with scale_factors=None"
        )
