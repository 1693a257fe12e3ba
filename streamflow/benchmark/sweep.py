"""One setting after another: how the denoising batch's gain over the sequential loop grows, and where it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from streamflow.benchmark.machine import clocks
from streamflow.benchmark.measure import attempt, clean, steady_rate
from streamflow.benchmark.report import ratio
from streamflow.benchmark.roofline import flops, matrix_rate
from streamflow.benchmark.settings import Settings, with_value
from streamflow.benchmark.subject import Subject
from streamflow.benchmark.ways import streamed

logger = logging.getLogger(__name__)
Point = dict[str, Any]


def points(settings: Settings) -> list[tuple[str, int | str, Settings]]:
    """All that is to be measured: the swept setting, its value, and the settings with it."""
    swept = settings.sweep.items()
    return [(name, value, with_value(settings, name, value)) for name, values in swept for value in values]


def measure_sweeps(subject: Subject) -> dict[str, Any]:
    """The matrix rate, and for every swept setting a point a value: rates of the sequential loop (one frame after another)
    and of the ring, both with the best acceleration that the settings allow, their ratio, and the roofline. Settings that
    occur in several sweeps are measured once."""
    s = subject.settings
    rate = matrix_rate(subject.device, subject.pipe.dtype)
    known: dict[tuple, Any] = {}
    found: dict[str, list[Point]] = {name: [] for name in s.sweep}
    for name, value, settings in points(s):
        logger.info("sweep %s=%s", name, value)
        at = subject.under(settings)
        point = attempt(f"{name}={value}", lambda at=at: measure_point(at, rate["flops_per_s"]["median"], known))
        found[name].append({"value": value, **point})
    return {"vae": s.sweep_vae, "acceleration": s.kind, "matrix_rate": rate, **found}


def measure_point(subject: Subject, flops_per_s: float, known: dict[tuple, Any]) -> Point:
    """Both rates at these settings, in pictures a second; `known` holds what earlier points have measured."""
    s, tiny = subject.settings, subject.settings.sweep_vae == "tiny"
    shape = s.steps, s.width, s.height, s.cfg_type

    def once(key: tuple, measure: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = measure()
        return known[key]

    sequential = once(("sequential", *shape), lambda: rate_of(subject, tiny, batched=False))
    ring = once(("ring", *shape, s.frame_buffer_size), lambda: rate_of(subject, tiny, batched=True))
    work = once(("flops", *shape, s.frame_buffer_size), lambda: flops(subject, tiny))
    roofs = {
        "network_pictures_per_s": flops_per_s / work["network"],
        "with_decoder_pictures_per_s": flops_per_s / (work["network"] + work["decoder"]),
    }
    return {
        "sequential": sequential,
        "ring": ring,
        "ratio": ratio(ring["pictures_per_s"], sequential["pictures_per_s"]),
        "flops_per_picture": work,
        "roofline": roofs,
    }


def rate_of(subject: Subject, tiny: bool, batched: bool) -> dict[str, Any]:
    """Pictures a second, with their spread, of one way."""
    clean(subject.device)
    with streamed(subject, subject.settings.kind, tiny, batched, anchored=True) as way:
        rate = vars(steady_rate(subject, way))
        found = {"pictures_per_s": rate, "network_rows": way.details["network_rows"], "clocks": clocks(subject.device)}
    logger.info("  %s: %.2f pictures/s", "ring" if batched else "sequential", found["pictures_per_s"]["median"])
    return found
