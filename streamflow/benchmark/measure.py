"""Measures one variant: rates, times, latency, memory, start-up, and the difference of its images from the plain
pipeline's."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from streamflow._decibels import decibels
from streamflow._files import Json
from streamflow.benchmark.machine import clocks
from streamflow.benchmark.settings import TITLES
from streamflow.benchmark.subject import COMPARED, Subject
from streamflow.benchmark.timing import Round, Spread, latencies, ticks_within, timed, wait
from streamflow.benchmark.ways import VARIANTS, Way, problem
from streamflow.live.latency_modes import percentile

logger = logging.getLogger(__name__)
# The errors of models, compilers and drivers. torch, its compiler and engines raise RuntimeErrors, and out of memory is one;
# settings that a model does not support are ValueErrors, a missing library or compiler is an ImportError or an OSError, and
# images that are not finite are an ArithmeticError. Others are bugs of this package.
FAILURES = (RuntimeError, ValueError, ArithmeticError, ImportError, OSError)


def measure_all(subject: Subject) -> dict[str, Json]:
    """Every variant of the settings, by name: its figures, {"title", "skipped": reason} where it cannot be measured here, or
    {"title", "failed": error} where it raised. A failure does not end the others."""
    chosen = subject.settings.variants
    found = {}
    for name in VARIANTS if chosen is None else chosen:
        title = TITLES[name]
        if reason := problem(name, subject.settings, subject):
            found[name] = {"title": title, "skipped": reason}
            continue
        subject.reference(VARIANTS[name].tiny)
        logger.info("(%s) %s", name, title)
        found[name] = {"title": title, **attempt(f"({name})", lambda name=name: measure(subject, name))}
        if "failed" not in found[name]:
            rate, tick = (found[name][key]["median"] for key in ("images_per_s", "tick_ms"))
            start_up = found[name]["start_up_s"]
            logger.info("(%s) %.2f images/s, %.2f ms a tick, start-up %.1f s", name, rate, tick, start_up)
    return found


def attempt(label: str, call: Callable[[], Json]) -> Json:
    """The result of the call, or {"failed": error} where it raised one of `FAILURES`, which is logged in full."""
    try:
        return call()
    except FAILURES as error:
        logger.exception("%s failed", label)
        return {"failed": cause(error)}


def cause(error: BaseException, most: int = 600) -> str:
    """An error's type and the beginning of its message, in one line; compilers put the cause into the later lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def measure(subject: Subject, name: str) -> Json:
    """One variant's figures, as JSON."""
    variant, device = VARIANTS[name], subject.device
    clean(device)
    began = time.perf_counter()
    with variant.open(subject) as way:
        first = way.tick()
        wait(device)
        start_up = time.perf_counter() - began
        drawn = [first, *(way.tick() for _ in range(-(-COMPARED // way.frames) - 1))]
        difference = differences(torch.cat(drawn)[:COMPARED], subject.reference(variant.tiny))
        figures = times(subject, way)
        figures["clocks"] = clocks(device)
        figures["memory_mib"] = memory(device)
    return {
        "vae": "tiny" if variant.tiny else type(subject.pipe.vae).__name__,
        **way.details,
        "frames_per_tick": way.frames,
        "ticks_per_image": way.depth,
        "start_up_s": start_up,
        **figures,
        "difference": difference,
    }


def times(subject: Subject, way: Way) -> Json:
    """Rates, ticks, latency, and the time around the network and the decoder, over the settings' rounds."""
    s, device = subject.settings, subject.device
    count = warm(subject, way)
    rounds, bare, waits = [], [], []
    for _ in range(s.rounds):
        rounds.append(timed(way.tick, count, device))
        if way.by_hand:
            bare.append(timed(way.by_hand, count, device))
        waits += latencies(way.tick, way.depth, -(-count // 2), device)
    found = {
        "ticks_per_round": count,
        "images_per_s": rates(way, rounds),
        "tick_ms": milliseconds([seconds for r in rounds for seconds in r.each]),
        "latency_ms": milliseconds(waits),
    }
    if bare:
        found["around_network_and_decode"] = overhead([r.mean for r in rounds], [r.mean for r in bare])
    return found


def warm(subject: Subject, way: Way) -> int:
    """Run the ticks before the first round. Returns the number of ticks of a round."""
    s = subject.settings
    for _ in range(s.warmup):
        way.tick()
    return ticks_within(s.round_seconds, way.tick, s.frames, subject.device)


def rates(way: Way, rounds: list[Round]) -> dict[str, float]:
    """Images a second, with their spread over the rounds."""
    return vars(Spread.of([way.frames / r.mean for r in rounds]))


def milliseconds(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile, least and most of seconds, in milliseconds."""
    in_ms = [1e3 * value for value in values]
    return {**vars(Spread.of(in_ms)), "p95": percentile(in_ms, 0.95)}


def overhead(ticks: list[float], bare: list[float]) -> Json:
    """Ticks against the network's and decoder's calls alone, in seconds, by pairs of consecutive rounds."""
    shares = [100 * (tick / alone - 1) for tick, alone in zip(ticks, bare, strict=True)]
    return {
        "tick_ms": 1e3 * Spread.of(ticks).median,
        "by_hand_ms": 1e3 * Spread.of(bare).median,
        "percent": vars(Spread.of(shares)),
    }


def differences(drawn: Tensor, reference: Tensor) -> dict[str, float | None]:
    """Between images in [0, 1]: the largest and the mean difference, and PSNR in dB of the worst image, None where they
    are equal. `contrast` is the reference's standard deviation: images without contrast show no difference. Raises
    FloatingPointError where an image is not finite."""
    error = (drawn.float().cpu() - reference).abs()
    if not error.isfinite().all():
        raise FloatingPointError("the images are not finite")
    worst = error.square().flatten(1).mean(1).max().item()
    return {
        "largest": error.max().item(),
        "mean": error.mean().item(),
        "psnr_db": decibels(worst) if worst else None,
        "contrast": reference.std().item(),
    }


def clean(device: torch.device) -> None:
    """Free the GPU memory of earlier variants, and reset its peak."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, float] | None:
    """The peak of the tensors' memory and of torch's GPU memory, with CUDA graphs' pools; None on other devices."""
    if device.type != "cuda":
        return None
    peak = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {name: value / 2**20 for name, value in peak.items()}
