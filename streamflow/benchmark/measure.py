"""One way of drawing, measured: rates, times, latency, memory, start-up, and how far its pictures are from the plain
pipeline's."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamflow.benchmark.machine import clocks
from streamflow.benchmark.subject import COMPARED, Subject
from streamflow.benchmark.timing import Spread, latencies, ticks_within, timed, wait
from streamflow.benchmark.ways import VARIANTS, Way, problem
from streamflow.live.latency_modes import percentile

logger = logging.getLogger(__name__)
# What models, compilers and drivers raise where they cannot: torch's errors, its compiler's and out of memory among them,
# and those of engines are RuntimeErrors; what a model does not draw is a ValueError; a missing library or compiler is an
# ImportError or an OSError; pictures that are not finite are an ArithmeticError. Anything else is a mistake of ours.
FAILURES = (RuntimeError, ValueError, ArithmeticError, ImportError, OSError)


def measure_all(subject: Subject) -> dict[str, dict[str, Any]]:
    """Every variant that was asked for, by name; {"title", "skipped": why} where one cannot be measured here, {"title",
    "failed": what} where it raised: a failure is a result too, and does not take the others along."""
    asked = subject.settings.variants
    wanted = tuple(VARIANTS) if asked is None else asked
    found = {}
    for name in wanted:
        variant = VARIANTS[name]
        if why := problem(name, subject.settings, subject):
            found[name] = {"title": variant.title, "skipped": why}
            continue
        subject.reference(variant.tiny)
        logger.info("(%s) %s", name, variant.title)
        found[name] = {"title": variant.title, **attempt(f"({name})", lambda name=name: measure(subject, name))}
        if "failed" not in found[name]:
            logger.info("(%s) %s", name, in_short(found[name]))
    return found


def attempt(what: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the call gives, or {"failed": why} where it raised one of `FAILURES`, which is logged in full."""
    try:
        return call()
    except FAILURES as error:
        logger.exception("%s failed", what)
        return {"failed": cause(error)}


def cause(error: BaseException, most: int = 600) -> str:
    """An error's kind and the beginning of what it says, in one line; compilers put the cause into the later lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def in_short(figures: dict[str, Any]) -> str:
    """A variant's figures in one line."""
    rate, tick = figures["pictures_per_s"]["median"], figures["tick_ms"]["median"]
    return f"{rate:.2f} pictures/s, {tick:.2f} ms a tick, start-up {figures['start_up_s']:.1f} s"


def measure(subject: Subject, name: str) -> dict[str, Any]:
    """One variant's figures, as JSON takes them."""
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
        "ticks_per_picture": way.depth,
        "start_up_s": start_up,
        **figures,
        "difference": difference,
    }


def times(subject: Subject, way: Way) -> dict[str, Any]:
    """Rates, ticks, latency, and what is around the network and the decoder, over the settings' rounds."""
    s, device = subject.settings, subject.device
    count = warm(subject, way)
    rounds, bare, waits = [], [], []
    for _ in range(s.rounds):
        rounds.append(timed(way.tick, count, device))
        if way.by_hand:
            bare.append(timed(way.by_hand, count, device))
        waits += latencies(way.tick, way.depth, -(-count // 2), device)
    rates = Spread.of([way.frames / r.mean for r in rounds])
    found = {
        "ticks_per_round": count,
        "pictures_per_s": vars(rates),
        "tick_ms": milliseconds([seconds for r in rounds for seconds in r.each]),
        "latency_ms": milliseconds(waits),
    }
    if bare:
        found["around_network_and_decode"] = overhead([r.mean for r in rounds], [r.mean for r in bare])
    return found


def warm(subject: Subject, way: Way) -> int:
    """Take the ticks before the first round; how many a round takes then."""
    s = subject.settings
    for _ in range(s.warmup):
        way.tick()
    return ticks_within(s.round_seconds, way.tick, s.frames, subject.device)


def steady_rate(subject: Subject, way: Way) -> Spread:
    """Pictures a second over the settings' rounds, and nothing else."""
    count = warm(subject, way)
    rounds = [timed(way.tick, count, subject.device) for _ in range(subject.settings.rounds)]
    return Spread.of([way.frames / r.mean for r in rounds])


def milliseconds(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile, least and most of seconds, in milliseconds."""
    in_ms = [1e3 * value for value in values]
    return {**vars(Spread.of(in_ms)), "p95": percentile(in_ms, 0.95)}


def overhead(ticks: list[float], bare: list[float]) -> dict[str, Any]:
    """Ticks against the network's and decoder's calls alone, seconds, in pairs that followed one another."""
    shares = [100 * (tick / alone - 1) for tick, alone in zip(ticks, bare, strict=True)]
    return {
        "tick_ms": 1e3 * Spread.of(ticks).median,
        "by_hand_ms": 1e3 * Spread.of(bare).median,
        "percent": vars(Spread.of(shares)),
    }


def differences(drawn: Tensor, reference: Tensor) -> dict[str, float | None]:
    """Between pictures in [0, 1]: the largest and the mean difference, and PSNR in dB of the worst picture, None where they
    are equal. `contrast` is the reference's standard deviation: without contrast no difference could show. Raises
    FloatingPointError where a picture is not finite."""
    error = (drawn.float().cpu() - reference).abs()
    if not error.isfinite().all():
        raise FloatingPointError("the pictures are not finite")
    worst = error.square().flatten(1).mean(1).max().item()
    return {
        "largest": error.max().item(),
        "mean": error.mean().item(),
        "psnr_db": -10 * math.log10(worst) if worst else None,
        "contrast": reference.std().item(),
    }


def clean(device: torch.device) -> None:
    """Give back the GPU memory that earlier ways left, and measure its peak from here."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, float] | None:
    """The most that tensors held, and the most that torch took from the GPU, CUDA graphs' pools included."""
    if device.type != "cuda":
        return None
    most = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {name: value / 2**20 for name, value in most.items()}
