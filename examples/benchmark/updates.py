"""Frames a second while other threads change the prompt, over frames a second without them, measured in turns.

python examples/benchmark/updates.py --output updates.json
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import torch

from streamflow import StreamFlow
from streamflow.benchmark.machine import machine
from streamflow.models.loading import default_device, load


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="embedded", help="as `streamflow --model` (default: %(default)s)")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--threads", type=int, default=8, help="that update (default: %(default)s)")
    p.add_argument("--per-second", type=float, default=20.0, help="updates of each thread (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    p.add_argument("--output", type=Path, metavar="FILE", help="the figures as JSON")
    a = p.parse_args()
    logging.getLogger("streamflow").setLevel(logging.ERROR)
    stream = StreamFlow(load(a.model, device=a.device), [1, 2, 3], cfg_type="none")
    stream.prepare("a red apple, 3d render", num_inference_steps=4)
    image = torch.rand(3, stream.height, stream.width)
    rate(stream, image, 2.0)
    rounds = []
    for number in range(a.rounds):
        alone = rate(stream, image, a.seconds)
        with Updating(stream, a.threads, a.per_second) as updating:
            disturbed = rate(stream, image, a.seconds)
        rounds.append({"alone": alone, "disturbed": disturbed, "ratio": disturbed / alone, **updating.figures(a.seconds)})
        print(f"round {number + 1}: " + ", ".join(f"{name} {value:.3g}" for name, value in rounds[-1].items()), flush=True)
    ratios = sorted(one["ratio"] for one in rounds)
    print(f"rate with updates over rate without: median {ratios[len(ratios) // 2]:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    if a.output:
        asked = {name: str(value) for name, value in vars(a).items()}
        a.output.write_text(
            json.dumps({"asked": asked, "machine": machine(torch.device(a.device)), "rounds": rounds}, indent=1)
        )


def rate(stream: StreamFlow, image: torch.Tensor, seconds: float) -> float:
    """Frames a second."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        stream(image)
        count += 1
    if stream.device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


class Updating:
    """Threads that change the prompt, each to a text of its own at every update, for as long as the block lasts."""

    def __init__(self, stream: StreamFlow, threads: int, per_second: float) -> None:
        self._stream, self._period, self._stop = stream, 1 / per_second, threading.Event()
        self._waits: list[float] = []
        self._encoded = 0
        self._threads = [threading.Thread(target=self._update, args=(number,)) for number in range(threads)]
        stream.pipe.text_encoder.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._encoded += 1

    def _update(self, number: int) -> None:
        for k in range(10**9):
            if self._stop.is_set():
                return
            began = time.perf_counter()
            self._stream.update(prompt=f"image {k} of thread {number}")
            self._waits.append(time.perf_counter() - began)
            time.sleep(max(0.0, self._period - self._waits[-1]))

    def figures(self, seconds: float) -> dict[str, float]:
        """Updates and encodings a second, and the seconds that an update took."""
        waits = sorted(self._waits)
        return {
            "updates_per_second": len(waits) / seconds,
            "encodings_per_second": self._encoded / seconds,
            "update_median_s": waits[len(waits) // 2],
            "update_longest_s": waits[-1],
        }

    def __enter__(self) -> Updating:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


if __name__ == "__main__":
    main()
