"""The family table: which adapter speaks for which diffusers pipeline. Adapters are imported when they are used.

A family is one file with one class, a `FlowAdapter` (models/base.py). `register` adds one from outside.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamflow.models.base import FlowAdapter

FAMILIES: dict[str, Any] = {
    "sd3": "streamflow.models.sd3:StableDiffusion3",
    "flux": "streamflow.models.flux:Flux",
    "instaflow": "streamflow.models.instaflow:InstaFlow",
    "chroma": "streamflow.models.chroma:Chroma",
    "flux2": "streamflow.models.flux2:Flux2",
    "flux2-klein": "streamflow.models.flux2:Flux2Klein",
    "sana": "streamflow.models.sana:Sana",
    "lumina2": "streamflow.models.lumina2:Lumina2",
    "qwenimage": "streamflow.models.qwenimage:QwenImage",
    "sdxl": "streamflow.models.sdxl:RectifiedSDXL",
    "zimage": "streamflow.models.zimage:ZImage",
}

PIPELINES = {
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
    "RectifiedFlowPipeline": "instaflow",
    "ChromaPipeline": "chroma",
    "ChromaImg2ImgPipeline": "chroma",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2-klein",
    "SanaPipeline": "sana",
    "QwenImagePipeline": "qwenimage",
    "QwenImageImg2ImgPipeline": "qwenimage",
    "Lumina2Pipeline": "lumina2",
    "ZImagePipeline": "zimage",
    "ZImageImg2ImgPipeline": "zimage",
}

# Diffusion pipelines, by the start of their class's name, and the family of the same network once rectified.
RECTIFIED = {
    "StableDiffusionXLPipeline": ("sdxl", "SDXL"),
    "StableDiffusionXLImg2Img": ("sdxl", "SDXL"),
    "StableDiffusionPipeline": ("instaflow", "InstaFlow, 2-Rectified-Flow"),
    "StableDiffusionImg2Img": ("instaflow", "InstaFlow, 2-Rectified-Flow"),
}


def register(family: str, adapter: Any, pipelines: tuple[str, ...] = ()) -> None:
    """Add a family: `adapter` is a `FlowAdapter` subclass or `"module:Class"`, `pipelines` the names of the pipeline
    classes it speaks for. A known name is replaced."""
    FAMILIES[family] = adapter
    PIPELINES.update(dict.fromkeys(pipelines, family))


def adapter_for(pipe: Any, family: str | None = None) -> FlowAdapter:
    """The adapter of a loaded diffusers pipeline, by `family` or by the name of the pipeline's class or its bases.

    Raises:
        ValueError: the family is unknown, or the class is; both messages list what is known. A diffusion pipeline is
            refused with what to pass if its weights are rectified.
    """
    family = family or _family_of(pipe)
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: choose one of {', '.join(sorted(FAMILIES))}, or register() yours")
    return _load(FAMILIES[family])(pipe)


def _family_of(pipe: Any) -> str:
    names = [cls.__name__ for cls in type(pipe).__mro__]
    known = next((PIPELINES[name] for name in names if name in PIPELINES), None)
    if known:
        return known
    for family, models in (found for name in names for start, found in RECTIFIED.items() if name.startswith(start)):
        raise ValueError(
            f"{names[0]} with {type(pipe.scheduler).__name__} is a diffusion model, not a flow: StreamDiffusion streams it. "
            f"If its UNet was rectified ({models}), pass family={family!r}"
        )
    raise ValueError(
        f"no family is known for {names[0]}. Known pipelines: {', '.join(sorted(PIPELINES))}. "
        f"Pass family= (one of {', '.join(sorted(FAMILIES))}) or streamflow.models.register() an adapter"
    )


def _load(adapter: Any) -> type[FlowAdapter]:
    if not isinstance(adapter, str):
        return adapter
    module, _, name = adapter.partition(":")
    return getattr(import_module(module), name)


def load(model: str, **kwargs: Any) -> Any:
    """A diffusers pipeline from a hub id or a folder: `DiffusionPipeline.from_pretrained` with its own arguments."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, **kwargs)


def load_tiny_vae(model: str, device: Any, dtype: Any) -> Any:
    """An AutoencoderTiny from a hub id or a folder, on the device in the dtype, for inference."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.from_pretrained(model, torch_dtype=dtype).to(device).eval().requires_grad_(False)
