"""Latency against rate: the age of an image when it is finished, for cameras of several rates and for each mode of feeding
a stream (`streamflow.live.latency_modes`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from streamflow._files import Json
from streamflow.benchmark.measure import attempt, clean
from streamflow.benchmark.subject import Subject
from streamflow.benchmark.timing import wait
from streamflow.live.latency_modes import Measured, RealClock, choose_mode, fed, free, play, sequential
from streamflow.pipeline import StreamFlow

logger = logging.getLogger(__name__)
INPUT_RATES = (24, 30, 60)  # camera frames a second
STAGES = (1, 2, 4)
IMAGES = 8  # different images of the camera


def measure_latency(subject: Subject) -> Json:
    """Rate and latency of each mode, and the mode that `auto` takes, for every number of stages and input rate. Images are
    drawn one at a time, image-to-image, with the tiny VAE where there is one."""
    s, tiny = subject.settings, subject.tiny is not None
    rows = []
    for stages in STAGES:
        logger.info("latency, %d stages", stages)
        at = subject.under(replace(s, steps=stages, frame_buffer_size=1))
        found = attempt(f"latency at {stages} stages", lambda at=at: {"rates": measure_rates(at, tiny)})
        rows += [{"stages": stages, **row} for row in found.get("rates", [found])]
    vae = "tiny" if tiny else "own"
    return {"vae": vae, "acceleration": s.kind, "seconds": s.latency_seconds, "rows": rows}


def measure_rates(subject: Subject, tiny: bool) -> list[Json]:
    """One row for each input rate."""
    s = subject.settings
    found: dict[int, list[Measured]] = {rate: [] for rate in INPUT_RATES}
    for batched in (True, False):
        clean(subject.device)
        with subject.stream(tiny, batched, skipped=1) as stream:
            stream.accelerate(s.kind)
            tick = ticking(stream)
            for _ in range(1 + s.warmup):
                tick(0)
            modes = (fed(tick, s.steps), free(tick, s.steps)) if batched else (sequential(tick),)
            for rate in INPUT_RATES:
                found[rate] += [play(mode, RealClock(), 1 / rate, s.latency_seconds) for mode in modes]
    return [row(rate, modes) for rate, modes in found.items()]


def ticking(stream: StreamFlow) -> Callable[[int], None]:
    """A tick of the stream on a camera image, which waits until the device has finished."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, stream.height, stream.width, 3), dtype=np.uint8)

    def tick(frame: int) -> None:
        stream(images[frame % IMAGES])
        wait(stream.device)

    return tick


def row(rate: int, modes: list[Measured]) -> Json:
    """The modes at one input rate, times in milliseconds."""
    figures = {
        m.name: {"images_per_s": m.rate, "p50_ms": 1e3 * m.p50, "p95_ms": 1e3 * m.p95, "images": m.images} for m in modes
    }
    return {"input_rate": rate, "modes": figures, "auto": choose_mode(modes, rate).name}
