"""The family table: the adapter of each diffusers pipeline class. Adapters are imported when they are used.

A family is one file with one class, a `FlowAdapter` (models/adapter.py). `register` adds one from outside the package.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderTiny

    from streamflow.conditioning.controlnet import ControlRule
    from streamflow.conditioning.reference import ReferenceRule
    from streamflow.models.adapter import FlowAdapter
    from streamflow.models.image_prompts import ImagePromptRule
    from streamflow.models.protocols import Pipeline
    from streamflow.models.video import VideoAdapter

FAMILIES: dict[str, str | type[FlowAdapter]] = {
    "sd3": "streamflow.models.families.sd3:StableDiffusion3",
    "flux": "streamflow.models.families.flux:Flux",
    "flux-kontext": "streamflow.models.families.flux:FluxKontext",
    "instaflow": "streamflow.models.families.instaflow:InstaFlow",
    "chroma": "streamflow.models.families.chroma:Chroma",
    "flux2": "streamflow.models.families.flux2:Flux2",
    "flux2-klein": "streamflow.models.families.flux2:Flux2Klein",
    "flux2-klein-kv": "streamflow.models.families.flux2_kv:Flux2KleinKV",
    "sana": "streamflow.models.families.sana:Sana",
    "sana-sprint": "streamflow.models.families.sana_sprint:SanaSprint",
    "lumina2": "streamflow.models.families.lumina2:Lumina2",
    "qwenimage": "streamflow.models.families.qwenimage:QwenImage",
    "qwenimage-edit": "streamflow.models.families.qwenimage:QwenImageEdit",
    "qwenimage-edit-plus": "streamflow.models.families.qwenimage:QwenImageEditPlus",
    "sdxl": "streamflow.models.families.sdxl:RectifiedSDXL",
    "perflow": "streamflow.models.families.perflow:PeRFlow",
    "perflow-sdxl": "streamflow.models.families.perflow:PeRFlowSDXL",
    "zimage": "streamflow.models.families.zimage:ZImage",
    "bria-fibo": "streamflow.models.families.bria_fibo:BriaFibo",
    "bria-fibo-edit": "streamflow.models.families.bria_fibo:BriaFiboEdit",
    "fallback": "streamflow.models.fallback.adapter:Fallback",
}

# The names of the pipeline classes of each family, without "Pipeline".
_NAMES = {
    "sd3": "StableDiffusion3 StableDiffusion3Img2Img StableDiffusion3Inpaint StableDiffusion3ControlNet",
    "flux": "Flux FluxImg2Img FluxInpaint FluxControlNet FluxControlNetImg2Img",
    "instaflow": "RectifiedFlow",
    "flux-kontext": "FluxKontext",
    "chroma": "Chroma ChromaImg2Img ChromaInpaint",
    "flux2": "Flux2",
    "flux2-klein": "Flux2Klein",
    "flux2-klein-kv": "Flux2KleinKV",
    "sana": "Sana",
    "sana-sprint": "SanaSprint SanaSprintImg2Img",
    "qwenimage": "QwenImage QwenImageImg2Img QwenImageControlNet QwenImageInpaint",
    "qwenimage-edit": "QwenImageEdit",
    "qwenimage-edit-plus": "QwenImageEditPlus",
    "lumina2": "Lumina2",
    "zimage": "ZImage ZImageImg2Img ZImageInpaint",
    "bria-fibo": "BriaFibo",
    "bria-fibo-edit": "BriaFiboEdit",
    "fallback": "AuraFlow Bria CogView4 ErnieImage HiDreamImage HunyuanImage Kandinsky5T2I Lumina OmniGen OvisImage PRX",
}
PIPELINES = {f"{name}Pipeline": family for family, names in _NAMES.items() for name in names.split()}

# The adapters of the video pipelines that `streamflow.VideoStream` draws chunk after chunk.
VIDEO_PIPELINES: dict[str, str] = {
    "AnyFlowFARPipeline": "streamflow.models.families.anyflow_far:AnyFlowFAR",
    "HeliosPipeline": "streamflow.models.families.helios:Helios",
    "HeliosPyramidPipeline": "streamflow.models.families.helios:Helios",
    "SkyReelsV2DiffusionForcingPipeline": "streamflow.models.families.skyreels:SkyReels",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "streamflow.models.families.skyreels:SkyReels",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "streamflow.models.families.skyreels:SkyReels",
}

# Diffusion pipelines by the start of their class's name: the family of the rectified network, and published models.
RECTIFIED = {
    "StableDiffusionXLPipeline": ("sdxl", "SDXL"),
    "StableDiffusionXLImg2Img": ("sdxl", "SDXL"),
    "StableDiffusionXLControlNet": ("sdxl", "SDXL"),
    "StableDiffusionControlNet": ("instaflow", "InstaFlow, 2-Rectified-Flow"),
    "StableDiffusionPipeline": ("instaflow", "InstaFlow, 2-Rectified-Flow"),
    "StableDiffusionImg2Img": ("instaflow", "InstaFlow, 2-Rectified-Flow"),
}


def register(family: str, adapter: str | type[FlowAdapter], pipelines: tuple[str, ...] = ()) -> None:
    """Add a family, or replace it: a `FlowAdapter` or `"module:Class"`, and the names of its pipeline classes."""
    FAMILIES[family] = adapter
    PIPELINES.update(dict.fromkeys(pipelines, family))


def adapter_for(pipe: Pipeline, family: str | None = None) -> FlowAdapter:
    """The adapter of a loaded diffusers pipeline, by `family` or by the names of the pipeline's class and its bases.

    Raises:
        ValueError: the family or the class is unknown; both messages list the known ones. For a diffusion pipeline the
            message names the family to pass if its weights are rectified.
    """
    return adapter_class(family or _family_of(pipe))(pipe)


def video_adapter_for(pipe: Pipeline) -> VideoAdapter:
    """The adapter of a loaded video pipeline, by the names of the pipeline's class and its bases. ValueError for any other
    pipeline, with the reason or with the known ones; ImportError: diffusers is too old for this one."""
    known = next((VIDEO_PIPELINES[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in VIDEO_PIPELINES), None)
    if known is None:
        from streamflow.models.video_kinds import why_not

        raise ValueError(why_not(type(pipe), VIDEO_PIPELINES))
    return _named(known)(pipe)


def _family_of(pipe: Pipeline) -> str:
    names = [cls.__name__ for cls in type(pipe).__mro__]
    known = next((PIPELINES[name] for name in names if name in PIPELINES), None)
    if known:
        return known
    if type(getattr(pipe, "scheduler", None)).__name__ == "PeRFlowScheduler":
        return "perflow-sdxl" if any("XL" in name for name in names) else "perflow"
    for family, models in (found for name in names for start, found in RECTIFIED.items() if name.startswith(start)):
        raise ValueError(
            f"{names[0]} with {type(pipe.scheduler).__name__} is a diffusion model, not a flow: StreamDiffusion streams it. "
            f"If its UNet was rectified ({models}), pass family={family!r}"
        )
    from streamflow.models.pipeline_kinds import check_drawable, kind_of

    check_drawable(type(pipe))
    kind = kind_of(type(pipe))
    if kind is not None and kind.name == "not a flow":
        raise ValueError(f"{names[0]} is a diffusion or consistency model, not a flow")
    raise ValueError(
        f"no family is known for {names[0]}. Known pipelines: {', '.join(sorted(PIPELINES))}. "
        f"Pass family='fallback', which draws with whole calls of any pipeline, or another family= (one of "
        f"{', '.join(sorted(FAMILIES))}), or streamflow.models.register() an adapter"
    )


def adapter_class(family: str) -> type[FlowAdapter]:
    """The adapter class of a family. ValueError lists the known families; ImportError: diffusers is too old for this one."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: choose one of {', '.join(sorted(FAMILIES))}, or register() yours")
    adapter = FAMILIES[family]
    if not isinstance(adapter, str):
        return adapter
    try:
        return _named(adapter)
    except ImportError as error:
        raise ImportError(
            f"family {family!r} needs a newer diffusers than {version('diffusers')} ({error}): pip install -U diffusers"
        ) from error


def _named(where: str) -> Any:
    """What is named `"module:Class"`."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


@cache
def _rule(where: str) -> Any:
    """The rule that is named `"module:Class"`, one for all streams, since rules have no state."""
    return _named(where)()


def takes_references(pipe: Pipeline, family: str | None = None) -> bool:
    """Whether the images of this pipeline's calls are references (`FlowAdapter.reference`)."""
    return adapter_class(family or _family_of(pipe)).reference is not None


def control_rule(adapter: FlowAdapter) -> ControlRule:
    """The rule of this family's control nets. NotImplementedError where diffusers has none."""
    if adapter.control is None:
        raise NotImplementedError(f"diffusers has no control nets that {type(adapter).__name__} streams")
    return _rule(adapter.control)


def reference_rule(adapter: FlowAdapter) -> ReferenceRule:
    """The rule of this family's reference images. NotImplementedError where the pipeline takes none."""
    if adapter.reference is None:
        raise NotImplementedError(
            f"{type(adapter.pipe).__name__} takes no reference images: pass the image itself, stream(image), or use a "
            f"pipeline that does, such as Flux2KleinPipeline or FluxKontextPipeline"
        )
    return _rule(adapter.reference)


def image_prompt_rule(adapter: FlowAdapter) -> ImagePromptRule:
    """The rule of this family's IP-Adapters. NotImplementedError where diffusers has none; ImportError: diffusers is too
    old."""
    if adapter.image_prompt is None:
        raise NotImplementedError(f"diffusers has no IP-Adapter for {type(adapter.pipe).__name__} that is streamed")
    try:
        return _rule(adapter.image_prompt)
    except ImportError as error:
        raise ImportError(
            f"image prompts need a newer diffusers than {version('diffusers')} ({error}): pip install -U diffusers"
        ) from error


def load(model: str = "embedded", **kwargs: object) -> Pipeline:
    """A diffusers pipeline: an embedded one, or from a hub id, a folder or a file (`streamflow.models.loading.load`)."""
    return import_module("streamflow.models.loading").load(model, **kwargs)


def load_tiny_vae(model: str, device: torch.device | str, dtype: torch.dtype) -> AutoencoderTiny:
    """A tiny VAE from a hub id or a folder (`streamflow.models.tiny_vae.load`), on the device in the dtype."""
    from streamflow.models.tiny_vae import load

    vae: Any = load(model)
    return vae.to(device, dtype).eval().requires_grad_(False)
