"""How even the images of a live stream come: the embedded model at half of what this machine can draw.

    python examples/benchmark/pacing.py --minutes 5 --output static/benchmarks/pacing-cpu.json

    python examples/benchmark/pacing.py --switch --minutes 1 --output static/benchmarks/switch-cpu.json

First the stream draws as fast as it can for a while, which gives its capacity; then it plays live, from a source that moves,
at half that rate (`StreamFlow.live`, policy "newest"), and every interval from one showing to the next is kept. A figure of
the intervals goes beside the JSON, which is the last line too. With --switch a second scene is loaded and warmed at a third
of the time and shown at two thirds, and what counts are the intervals from one new image to the next, around the switch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamflow._command_line import above
from streamflow.app.config import Settings
from streamflow.app.scenes import aside, open_scene
from streamflow.benchmark.machine import machine
from streamflow.benchmark.report import rounded, write_json
from streamflow.io import TimedImage
from streamflow.live.latency_modes import percentile
from streamflow.wrapper import StreamFlowWrapper

WITHIN = 0.2  # of the period


class Moving:
    """A red square that goes from side to side, 30 images a second."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height

    def open(self) -> None:
        self.count, self.start = 0, time.monotonic()

    def read(self) -> TimedImage:
        self.count += 1
        time.sleep(max(0.0, self.start + self.count / 30 - time.monotonic()))
        pixels = np.full((self.height, self.width, 3), 255, np.uint8)
        side = self.width // 2
        left = int((self.width - side) * abs((self.count / 90) % 2 - 1))
        pixels[side // 2 : side // 2 + side, left : left + side] = (220, 40, 30)
        return TimedImage(pixels, time.monotonic())

    def close(self) -> None:
        pass


class News:
    """A sink that notes when an image came that was not the last one again."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last: Any = None

    def open(self) -> None:
        pass

    def write(self, image: TimedImage) -> None:
        if image.pixels is not self._last:
            self.times.append(image.time)
        self._last = image.pixels

    def close(self) -> None:
        pass


def capacity(stream: Any, seconds: float) -> float:
    """Images a second that the stream draws when nothing else is asked of it."""
    image = np.zeros((stream.height, stream.width, 3), np.uint8)
    stream(image)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        stream(image)
        count += 1
    found = count / (time.perf_counter() - begun)
    stream.reset()
    return found


def play(stream: Any, rate: float, seconds: float) -> dict[str, Any]:
    """So many seconds live, and how even they were."""
    with stream.live(Moving(stream.width, stream.height), "null", target_fps=rate, mode="fed") as show:
        show.wait(seconds)
        show.stop()
        intervals, found = show.intervals, show.statistics
    off = [abs(one * rate - 1) for one in intervals]
    return {
        "intervals": len(intervals),
        "share_within_20_percent": sum(one <= WITHIN for one in off) / len(off),
        "interval_ms": {name: 1e3 * percentile(intervals, q) for name, q in QUANTILES.items()},
        "statistics": vars(found),
        "each_ms": [1e3 * one for one in intervals],
    }


def switch(wrapper: StreamFlowWrapper, settings: Settings, rate: float, seconds: float) -> dict[str, Any]:
    """So many seconds live with another scene in the middle; the longest waits for a new image, in periods."""
    stream, news = wrapper.stream, News()
    with stream.live(Moving(stream.width, stream.height), news, target_fps=rate, mode="fed") as show:
        show.wait(seconds / 3)
        began = time.monotonic()
        with open_scene(settings) as second:
            scene = aside(show.warm, second.stream)
            warmed = time.monotonic()
            show.wait(max(0.0, began + seconds / 3 - warmed))
            asked = time.monotonic()
            aside(show.switch, scene)
            shown = time.monotonic()
            show.wait(seconds / 3)
            show.stop()
    waits = [(b, (b - a) * rate) for a, b in pairwise(news.times)]
    period = 1 / rate
    return {
        "loaded_and_warm_after_s": warmed - began,
        "switched_after_s": shown - asked,
        "longest_wait_periods": {
            "before": max(wait for at, wait in waits if at < began),
            "while_it_was_loaded_and_warmed": max(wait for at, wait in waits if began <= at < warmed + period),
            "at_the_switch": max(wait for at, wait in waits if asked <= at < shown + 3 * period),
            "after": max(wait for at, wait in waits if at >= shown + 3 * period),
        },
        "statistics": vars(show.statistics),
    }


QUANTILES = {"least": 0.0, "p1": 0.01, "median": 0.5, "p99": 0.99, "most": 1.0}


def draw(result: dict[str, Any], file: Path) -> None:
    """How long each interval between two images was, as a histogram in periods."""
    from streamflow.benchmark.plot import OURS, figure, style

    period, each = result["period_ms"], np.asarray(result["each_ms"])
    with style():
        made, axes = figure(8, 3.6)
        shares = each / period
        edge = max(0.05, 1.1 * float(np.abs(shares - 1).max()))
        axes.hist(shares, bins=np.linspace(1 - edge, 1 + edge, 41), color=OURS)
        axes.set(xlabel=f"interval between two images, in periods of {period:.0f} ms", ylabel="intervals")
        share = 100 * result["share_within_20_percent"]
        axes.set_title(f"{len(each)} intervals, {share:.0f} % of them within 20 % of the period", loc="left")
        axes.grid(axis="y")
        made.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=above(0), default=5.0, help="default 5")
    p.add_argument("--share", type=above(0), default=0.5, help="of the capacity that is asked for (default 0.5)")
    p.add_argument("--switch", action="store_true", help="measure the change of a scene instead")
    p.add_argument("--output", type=Path, help="write the JSON here, and a figure beside it")
    a = p.parse_args(argv)
    settings = Settings(mode="img2img", t_index_list=(1, 2, 3), warmup=2, device="cpu")
    other = settings.model_copy(update={"prompt": "a fox, 3d render"})
    with open_scene(settings) as wrapper:
        found = aside(capacity, wrapper.stream, 10)
        rate = a.share * found
        result = rounded(
            {
                "command": " ".join(["python", *sys.argv]),
                "machine": machine(torch.device("cpu")),
                "capacity_per_s": found,
                "rate_per_s": rate,
                "period_ms": 1e3 / rate,
                **(switch(wrapper, other, rate, 60 * a.minutes) if a.switch else play(wrapper.stream, rate, 60 * a.minutes)),
            }
        )
    write_json(result, a.output)
    if a.output and not a.switch:
        draw(result, a.output.with_suffix(".png"))
    print(json.dumps({name: value for name, value in result.items() if name != "each_ms"}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
