"""Sweeps over settings: the denoising batch's speed-up over the sequential loop at each value, and the roofline: the images
a second of a device that only multiplies matrices, at the rate that it reaches on large ones."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamflow._files import Json
from streamflow.benchmark.machine import clocks
from streamflow.benchmark.measure import attempt, clean, rates, warm
from streamflow.benchmark.report import ratio
from streamflow.benchmark.settings import Settings, with_value
from streamflow.benchmark.subject import Subject
from streamflow.benchmark.timing import Spread, timed, wait
from streamflow.benchmark.ways import streamed

logger = logging.getLogger(__name__)
Key = tuple[str | int | None, ...]
Known = dict[Key, Json]
SIDE, SIDE_ELSEWHERE = 8192, 1024  # of the matrices on CUDA, so large that launches and edges are negligible, and elsewhere
ROUNDS, CALLS = 7, 5


def points(settings: Settings) -> list[tuple[str, int | str, Settings]]:
    """The points of all sweeps: the swept setting, its value, and the settings with it."""
    swept = settings.sweep.items()
    return [(name, value, with_value(settings, name, value)) for name, values in swept for value in values]


def measure_sweeps(subject: Subject) -> Json:
    """The matrix rate, and for every value of a swept setting a point: rates of the sequential loop (one frame after
    another) and of the ring, both with the best acceleration that the settings allow, their ratio, and the roofline.
    Settings that occur in several sweeps are measured once."""
    s = subject.settings
    rate = matrix_rate(subject.device, subject.pipe.dtype)
    known: Known = {}
    found: dict[str, list[Json]] = {name: [] for name in s.sweep}
    for name, value, settings in points(s):
        logger.info("sweep %s=%s", name, value)
        at = subject.under(settings)
        point = attempt(f"{name}={value}", lambda at=at: measure_point(at, rate["flops_per_s"]["median"], known))
        found[name].append({"value": value, **point})
    return {"vae": s.sweep_vae, "acceleration": s.kind, "matrix_rate": rate, **found}


def measure_point(subject: Subject, flops_per_s: float, known: Known) -> Json:
    """Both rates at these settings, in images a second; `known` holds the measurements of earlier points."""
    s, tiny = subject.settings, subject.settings.sweep_vae == "tiny"
    shape = s.steps, s.width, s.height, s.cfg_type

    def once(key: Key, measure: Callable[[], Json]) -> Json:
        if key not in known:
            known[key] = measure()
        return known[key]

    sequential = once(("sequential", *shape), lambda: rate_of(subject, tiny, batched=False))
    ring = once(("ring", *shape, s.frame_buffer_size), lambda: rate_of(subject, tiny, batched=True))
    work = once(("flops", *shape, s.frame_buffer_size), lambda: flops(subject, tiny))
    roofs = {
        "network_images_per_s": flops_per_s / work["network"],
        "with_decoder_images_per_s": flops_per_s / (work["network"] + work["decoder"]),
    }
    return {
        "sequential": sequential,
        "ring": ring,
        "ratio": ratio(ring["images_per_s"], sequential["images_per_s"]),
        "flops_per_image": work,
        "roofline": roofs,
    }


def rate_of(subject: Subject, tiny: bool, batched: bool) -> Json:
    """Images a second of the ring or of the sequential loop, with their spread."""
    clean(subject.device)
    with streamed(subject, subject.settings.kind, tiny, batched, anchored=True) as way:
        count = warm(subject, way)
        rounds = [timed(way.tick, count, subject.device) for _ in range(subject.settings.rounds)]
        found = {
            "images_per_s": rates(way, rounds),
            "network_rows": way.details["network_rows"],
            "clocks": clocks(subject.device),
        }
    logger.info("  %s: %.2f images/s", "ring" if batched else "sequential", found["images_per_s"]["median"])
    return found


def matrix_rate(device: torch.device, dtype: torch.dtype) -> Json:
    """Floating-point operations a second of a square matrix product, warm: median, least and most over rounds."""
    side = SIDE if device.type == "cuda" else SIDE_ELSEWHERE
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    for _ in range(CALLS):
        multiply()
    wait(device)
    rates = [2 * side**3 / timed(multiply, CALLS, device).mean for _ in range(ROUNDS)]
    return {"flops_per_s": vars(Spread.of(rates)), "side": side, "dtype": str(dtype).removeprefix("torch.")}


def flops(subject: Subject, tiny: bool) -> dict[str, float]:
    """The operations of one image of the denoising batch in the network and in the decoder. They are counted from shapes,
    without computing: matrix products, convolutions, and the two matrix products of attention."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with subject.stream(tiny) as stream:
        counted = {}
        parts = stream.parts()
        assert parts is not None, "the stream is prepared"
        for part in (parts.velocity, parts.decoder):
            counter = FlopCounterMode(display=False)
            with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
                part.call()
            counted[part.name] = counter.get_total_flops() / stream.frame_bff_size
    return {"network": counted["velocity"], "decoder": counted["decoder"]}
