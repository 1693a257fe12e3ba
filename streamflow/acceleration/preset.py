"""`accelerate("max")`: measures kinds of acceleration and their options on the model itself, and keeps the fastest whose
images are close enough.

Kinds are tried by themselves. Options are added one after another to the fastest kind that has them, and an option stays
where it gains `GAIN`. What cannot run, or draws other images, is left out, with its reason. It handles kinds and their
options, not families or streams.

The kinds of `ROUNDING` compute what the plain model computes, in the same dtype, and differ from it by rounding only. Even
so the PSNR can be below 40 dB: it is 38.9 dB for Flux-schnell in bfloat16 at 1024x1024, with random weights. Their bound is
`SAME`, which is low enough for rounding and finds errors. A kind with options is compared with the same kind without
options, and its bound is `psnr`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamflow import acceleration
from streamflow._decibels import decibels
from streamflow._validation import check_number

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments

logger = logging.getLogger(__name__)
FRAMES = 8  # whose images are compared with the plain model's
SECONDS = 0.5  # of measured ticks, at least
GAIN = 1.01  # the least ratio by which an option, or a kind, must be faster than what there was before it
ROUNDING = ("cuda-graph", "compile")  # kinds whose images differ from the plain model's by rounding only
SAME = 25.0  # the least PSNR in dB of these

KINDS: dict[str, tuple[tuple[str, Arguments], ...]] = {
    "cuda": (("cuda-graph", {}), ("compile", {})),
    "cpu": (("compile", {}), ("onnxruntime", {}), ("openvino", {})),
}
OPTIONS: dict[str, dict[str, tuple[object, ...]]] = {
    "cuda": {
        "quantize": ("fp8", "int8"),
        "attention": ("fa3", "fa3-fp8", "fa4", "_native_cudnn"),
        "fuse_qkv": (True,),
    },
    "cpu": {"quantize": ("int8",)},
}

Trial = Callable[[str, Mapping[str, object]], AbstractContextManager[object]]
"""(kind, options) to a context in which the model draws in that way. Raises where it cannot."""
Ticks = Callable[[int], Iterator[Tensor]]
"""The ticks in which so many groups of frames are drawn, with the modules in force: each yields F images in [-1, 1], of the
frames that have left, or of the entering ones while none leaves."""


@dataclass(frozen=True)
class Options:
    """The options of `accelerate("max", ...)`.

    psnr: the least PSNR in dB, 0 or more, of every image of eight ticks: of a kind with options against the same kind
        without options, and of a kind that computes in another way (onnxruntime, openvino) against the plain model.

    Raises:
        TypeError, ValueError: psnr is no finite number of 0 or more.
    """

    psnr: float = 40.0

    def __post_init__(self) -> None:
        check_number("psnr", self.psnr)
        if self.psnr is None or self.psnr < 0:
            raise ValueError(f"psnr must be a number of dB of 0 or more, not {self.psnr}")

    def for_device(self, device: torch.device) -> Options:
        """These options. RuntimeError: there is no acceleration for the device."""
        if device.type not in KINDS:
            raise RuntimeError(f"accelerate('max') is for {' and '.join(KINDS)} devices, and this pipe is on {device}")
        return self


@dataclass(frozen=True)
class Measured:
    """What one way of acceleration gave.

    kind, options: those of `accelerate`. tick_ms: the median of a tick, network and decode. psnr: in dB, of the worst image
    against the plain model's, or with options against that of the kind without options; infinite for equal images.
    start_up_s: until the first tick could begin. left_out: why it cannot be chosen; empty where it can. A way that could not
    run has no figures.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tick_ms: float | None = None
    psnr: float | None = None
    start_up_s: float | None = None
    left_out: str = ""

    def __str__(self) -> str:
        name = ", ".join([self.kind, *(f"{option}={value!r}" for option, value in self.options.items())])
        figures = "" if self.tick_ms is None else f": {self.tick_ms:.2f} ms a tick, {self.psnr:.1f} dB"
        return name + figures + (f", left out: {self.left_out}" if self.left_out else "")


def measure(options: Options, device: torch.device, trial: Trial, ticks: Ticks) -> list[Measured]:
    """All ways that were measured, in order; the first is the plain model. Raises what the plain model raises."""
    with trial("none", {}):
        plain, tick_ms = _draw(ticks, device)
    found = [Measured("none", {}, tick_ms, decibels(0.0), 0.0)]
    logger.info("max: %s", found[0])
    images = {"none": plain}  # of each kind, without options

    def add(kind: str, given: Mapping[str, object], like: str, psnr: float) -> bool:
        way, drawn = _measure(kind, given, device, trial, ticks, images[like], psnr)
        if drawn is not None:
            images.setdefault(kind, drawn)
        found.append(way)
        logger.info("max: %s", way)
        return way.tick_ms is not None

    for kind, given in KINDS[device.type]:
        add(kind, given, "none", SAME if kind in ROUNDING else options.psnr)
    for name, values in OPTIONS[device.type].items():
        base = fastest([way for way in found if name in _fields(way.kind)])
        if base is None:
            continue
        for value in values:
            if add(base.kind, {**base.options, name: value}, base.kind, options.psnr) and name == "quantize":
                break  # the first kind of quantization that this network and device support
    return found


def fastest(found: list[Measured]) -> Measured | None:
    """The fastest of what was not left out; one that comes earlier, unless a later one is faster by `GAIN`."""
    best = None
    for way in found:
        if way.left_out or way.tick_ms is None:
            continue
        if best is None or best.tick_ms is None or way.tick_ms * GAIN < best.tick_ms:
            best = way
    return best


def summary(found: list[Measured], chosen: Measured) -> str:
    """What was chosen and what was left out, with the figures."""
    plain = found[0].tick_ms or 0.0
    gain = f"{plain / (chosen.tick_ms or plain):.2f} times the plain model" if plain else ""
    others = "; ".join(str(way) for way in found if way is not chosen)
    return f"max chose {chosen} ({gain}). Others: {others}"


def _measure(
    kind: str, given: Mapping[str, object], device: torch.device, trial: Trial, ticks: Ticks, like: Tensor, least: float
) -> tuple[Measured, Tensor | None]:
    """The figures of a way, and its images `[n, 3, H, W]` in [-1, 1], None where it cannot run. like: the images that they
    are compared with. least: the PSNR in dB below which the way is left out."""
    began = time.perf_counter()
    try:
        with trial(kind, given):
            start_up_s = time.perf_counter() - began
            images, tick_ms = _draw(ticks, device)
    except Exception as error:  # whatever a way raises where it cannot run: libraries have no common class of errors
        logger.debug("%s, %s cannot run", kind, given, exc_info=True)
        text = " ".join(str(error).split())
        return Measured(kind, given, left_out=f"{type(error).__name__}: {text[:200]}"), None
    psnr = min(decibels(((a - b) / 2).square().mean().item()) for a, b in zip(images, like, strict=True))
    left_out = f"less than {least:g} dB" if psnr < least else ""
    return Measured(kind, given, tick_ms, psnr, start_up_s, left_out), images


def _draw(ticks: Ticks, device: torch.device) -> tuple[Tensor, float]:
    """(the images of `FRAMES` groups, float32 `[n, 3, H, W]` in [-1, 1], the median of a tick in milliseconds)."""
    groups, seconds = [], []
    while not groups or sum(seconds) < SECONDS:
        drawn, began = [], _now(device)
        for images in ticks(FRAMES):
            seconds.append((now := _now(device)) - began)
            drawn.append(images)
            began = now
        groups = groups or drawn[-FRAMES - 1 :]  # the last ones were encoded and decoded
    return torch.cat(groups).float().clamp(-1, 1), 1e3 * median(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fields(kind: str) -> set[str]:
    """The names of the options of a kind."""
    if kind == "none":
        return set()
    return {one.name for one in dataclasses.fields(import_module(acceleration.KINDS[kind]).Options)}
