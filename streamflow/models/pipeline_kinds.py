"""Which pipeline classes of diffusers the fallback can stream, and why it cannot stream the others. The rule reads a class's
module, the annotation of its scheduler, its name and the parameters of its call. It works for families with an adapter too,
but there it is not needed. `tests/test_classification.py` holds the answer for every class."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

# Packages of flow models whose pipelines annotate their scheduler with something else than a scheduler for flows.
FLOW_PACKAGES = frozenset("bria bria_fibo cosmos helios kandinsky6 ltx2 motif_video sana sana_video skyreels_v2 wan".split())
FROM_IMAGES = (
    "starts from an image, a mask or a control image, which a whole call of a pipeline takes only at its start: use the "
    "text-to-image pipeline of the same model"
)
SWAPS_ATTENTION = (
    "exchanges its network's attention processors while it draws, which frames in flight share: use the plain pipeline of "
    "the same model"
)
NO_IMAGE = "prepares or enlarges latents and draws nothing"
NO_LATENTS = "takes no latents, or scales those it is given, so that frames cannot be given their noise"
TEXT = "writes text"
CHUNKS = "draws videos, chunk after chunk: streamflow.VideoStream(pipe) streams it"
# Reasons that no signature shows.
EXCEPTIONS = {
    "AnyFlowFAR": CHUNKS,
    "Helios": CHUNKS,
    "HeliosPyramid": CHUNKS,
    "Diffusion": "is the base of all pipelines: pass one that draws",
    "Cosmos2TextToImage": NO_LATENTS,
    "DiffusionGemma": TEXT,
    "FluxPriorRedux": NO_IMAGE,
    "GlmImage": "draws what a language model writes, token by token, anew for every frame",
    "Ideogram4": "calls two networks in every step, and the fallback merges the calls of one",
    "LLaDA2": TEXT,
    "LTX2LatentUpsample": NO_IMAGE,
    "LTXLatentUpsample": NO_IMAGE,
    "RFD4Proteina": "designs proteins",
}


class Kind(NamedTuple):
    """name: "fallback", "not a flow" or "refused". reason: of a refusal."""

    name: str
    reason: str = ""


def kind_of(cls: type) -> Kind | None:
    """The kind of a pipeline class, or of the first of its bases that is diffusers' own; None where there is none."""
    own = _diffusers_class(cls)
    if own is None:
        return None
    name, package = own.__name__.removesuffix("Pipeline"), own.__module__.split(".")[2]
    if name in EXCEPTIONS:
        return Kind("refused", EXCEPTIONS[name])
    if ".modular_pipelines." in own.__module__:
        return Kind("refused", "is assembled of blocks and has no call of its own: use the plain pipeline of the same model")
    parts, call = (inspect.signature(function).parameters for function in (own.__init__, own.__call__))
    if package not in FLOW_PACKAGES and not ("scheduler" in parts and "Flow" in str(parts["scheduler"].annotation)):
        return Kind("not a flow")
    reasons = {
        "draws videos, all frames of one at once; a stream draws single images": (
            {"num_frames", "video"} & call.keys() or re.search("Video|Animate", name)
        ),
        "draws sound": "audio" in package or any(parameter.startswith("audio") for parameter in call),
        SWAPS_ATTENTION: package == "pag",
        FROM_IMAGES: (
            {"control_image", "images", "mask_image", "strength"} & call.keys()
            or re.search("Edit|I2I|Kontext|Layered|Refiner|Cloze", name)
        ),
        NO_LATENTS: "latents" not in call,
        "has no VAE, which every stream decodes with": "vae" not in parts,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return Kind("refused", reason) if reason else Kind("fallback")


def check_drawable(cls: type) -> None:
    """Raise ValueError, with the reason, for a pipeline class that no stream can draw with."""
    kind, own = kind_of(cls), _diffusers_class(cls)
    if kind is not None and own is not None and kind.name == "refused":
        raise ValueError(f"{own.__name__} {kind.reason}")


def _diffusers_class(cls: type) -> type | None:
    """The class or the first of its bases that is a pipeline of diffusers, except for the base that all pipelines share."""
    bases = [base for base in cls.__mro__ if base is cls or base.__name__ != "DiffusionPipeline"]
    pipelines = (base for base in bases if base.__module__.startswith("diffusers.") and base.__name__.endswith("Pipeline"))
    return next(pipelines, None)
