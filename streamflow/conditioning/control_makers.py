"""Control images made from images: edges, lines, depth, poses. A maker is any function of an image; `ControlMaker` has those
that control nets are usually trained with. Knows images; no network of a stream, no stream."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import torch

from streamflow.image_utils import Maker
from streamflow.io.protocols import need

CANNY = 100, 200  # the thresholds with which Canny control nets are trained
BLUR = 3.0  # pixels: what is darker than its surroundings of about this size belongs to a line
FLOOR, GAIN = 8, 4.0  # of lines, in 255ths: noise below the floor is no line, and faint lines are made bright
DARK = 32  # added to all pixels, in 255ths: what is black has no lines, and the noise of dark images has few
Load = Callable[[str, torch.device], Maker]  # of a model on a device


def _canny() -> Maker:
    """White edges on black, by Canny's detector."""
    cv2 = _opencv()
    return lambda image: PIL.Image.fromarray(cv2.Canny(np.asarray(image.convert("L")), *CANNY))


def _lineart() -> Maker:
    """White lines on black: how much darker each pixel is than its blurred surroundings."""
    cv2 = _opencv()

    def make(image: PIL.Image.Image) -> PIL.Image.Image:
        gray = np.asarray(image.convert("L"), np.float32) + DARK
        darker = 255 * (1 - gray / cv2.GaussianBlur(gray, (0, 0), BLUR))
        return PIL.Image.fromarray((GAIN * (darker - FLOOR)).clip(0, 255).astype(np.uint8))

    return make


def _opencv() -> Any:
    return need("cv2", "'streamflow-rf[control-images]'")


def _depth(model: str, device: torch.device) -> Maker:
    from transformers import pipeline

    estimate: Any = pipeline("depth-estimation", model=model, device=device)
    return lambda image: estimate(image)["depth"]


def _detector(kind: str) -> Load:
    """Loads a detector of controlnet_aux."""

    def load(model: str, device: torch.device) -> Maker:
        return getattr(need("controlnet_aux", "controlnet-aux"), kind).from_pretrained(model).to(device)

    return load


PLAIN: dict[str, Callable[[], Maker]] = {"canny": _canny, "lineart": _lineart}
WITH_MODEL: dict[str, tuple[Load, str]] = {  # how it is loaded, and an example of a model
    "depth": (_depth, "depth-anything/Depth-Anything-V2-Small-hf"),
    "soft-edge": (_detector("HEDdetector"), "lllyasviel/Annotators"),
    "pose": (_detector("OpenposeDetector"), "lllyasviel/Annotators"),
}


def check_maker(name: str, model: str | None) -> None:
    """Raise ValueError for an unknown name, a name without the model that it needs, or with one that it does not need."""
    if name not in PLAIN and name not in WITH_MODEL:
        known = ", ".join((*PLAIN, *WITH_MODEL))
        raise ValueError(f"no control maker is named {name!r}: choose one of {known}, or pass a function of an image")
    if name in PLAIN and model is not None:
        raise ValueError(f"control maker {name!r} needs no model, and {model!r} was given: leave it out")
    if name in WITH_MODEL and not model:
        _, example = WITH_MODEL[name]
        raise ValueError(
            f"control maker {name!r} needs a model, a hub id or a folder: pass ControlMaker({name!r}, "
            f"model={example!r}), control_maker_model= of the wrapper, or --controlnet.maker-model"
        )


class ControlMaker:
    """Makes control images of one kind: `maker(image)` is the control image of a PIL image, in its size, in mode RGB. May be
    called from several threads; it makes one image at a time.

    name: "canny" or "lineart", made by OpenCV; "depth" (near is bright), made by transformers' `depth-estimation`;
        "soft-edge" (HED) or "pose" (OpenPose), made by the package controlnet_aux.
    model: of "depth", "soft-edge" and "pose": a hub id or a folder. It is loaded here.
    device: of the model; None: a GPU where there is one. On a GPU it runs on a CUDA stream of its own.

    Raises:
        ValueError: an unknown name, a name without the model that it needs, or with one that it does not need. ImportError:
            a package is missing, with the command that installs it. OSError: the model cannot be loaded.
    """

    def __init__(self, name: str, model: str | None = None, device: torch.device | str | None = None) -> None:
        check_maker(name, model)
        self.name, self.model = name, model
        self._lock = threading.Lock()  # a model is not called twice at a time
        self._side: torch.cuda.Stream | None = None
        if name in PLAIN:
            self._make = PLAIN[name]()
            return
        assert model, "as check_maker has found"
        load, _ = WITH_MODEL[name]
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._make = load(model, where)
        if where.type == "cuda":
            torch.cuda.synchronize(where)  # the weights are there before the other stream uses them
            self._side = _side_stream(where)

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        with self._lock, torch.cuda.stream(self._side):  # without a CUDA stream the latter does nothing
            made = self._make(image)
        made = made.convert("RGB")
        return made if made.size == image.size else made.resize(image.size, PIL.Image.Resampling.BICUBIC)

    def __repr__(self) -> str:
        return f"ControlMaker({self.name!r}{'' if self.model is None else f', model={self.model!r}'})"


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream of all makers on this device."""
    return torch.cuda.Stream(device)


@cache
def _named(name: str) -> ControlMaker:
    return ControlMaker(name)


def as_maker(given: object) -> Maker | None:
    """The maker that this stands for, a name or a function; None for images. Raises as `ControlMaker`."""
    if isinstance(given, str):
        return _named(given)
    return given if callable(given) else None
