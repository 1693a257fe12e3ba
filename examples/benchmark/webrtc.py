"""Latency from a webcam's frame to the shown image in Chromium, over WebRTC and over the WebSocket of one server.

    python examples/benchmark/webrtc.py --flips 60 --output static/benchmarks/webrtc-cpu.json

`streamflow serve` restyles a video of one grey, 640x480 at 30 frames a second, which takes the place of the webcam on the
page, with settings under which its brightness is kept. The grey flips between dark and bright at random times. The latency
of a flip is the time from its first frame until the page shows an image of the new brightness. The two transports take
turns. Needs the extras web and webrtc, playwright and Chromium. The last line is the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, sync_playwright

from streamflow._command_line import above
from streamflow.benchmark.machine import machine
from streamflow.benchmark.report import rounded, write_json
from streamflow.live.latency_modes import percentile

SETTINGS = "mode=image&steps=8&strength=0.05"
TURN = 20  # flips of one transport, before the other has its turn
WAIT_MS = (1000, 2000)  # between two flips
TRANSPORTS = {"WebRTC": "webrtc", "WebSocket": "websocket"}
WEBCAM = """
const webcam = Object.assign(document.createElement("canvas"), { width: 640, height: 480 }), pen = webcam.getContext("2d");
let bright = false;
setInterval(() => {
  pen.fillStyle = bright ? "#d7d7d7" : "#282828";
  pen.fillRect(0, 0, 640, 480);
}, 1000 / 30);
navigator.mediaDevices.getUserMedia = async () => webcam.captureStream(30);
const shown = () => document.getElementById("output").getContext("2d").getImageData(64, 64, 1, 1).data[1] > 128;
window.flip = () => new Promise((done, failed) => {
  bright = !bright;
  const began = performance.now();
  const look = () => {
    const milliseconds = performance.now() - began;
    if (shown() === bright) done(milliseconds);
    else if (milliseconds > 20000) failed(new Error("the flip was not shown within 20 s"));
    else requestAnimationFrame(look);
  };
  look();
});
"""


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A server of the embedded model in a process of its own; its URL, once it is ready."""
    options = ["--port", "0", "--json", "--device", "cpu", "--server.max-viewers", "1", "--cfg-type", "none"]
    command = [sys.executable, "-c", "from streamflow.app.cli import main; main()", "serve", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        while True:
            try:
                urllib.request.urlopen(f"{url}/health/ready").close()
                break
            except urllib.error.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def turn(browser: Browser, url: str, transport: str, count: int, dice: random.Random) -> tuple[list[float], float]:
    """So many flips on a page of its own: (the latency of each in ms, images a second)."""
    page = browser.new_page()
    page.add_init_script(WEBCAM)
    page.goto(f"{url}/?transport={TRANSPORTS[transport]}#{SETTINGS}")
    page.click("button[data-source=camera]")
    page.wait_for_function("name => document.getElementById('transport').textContent.startsWith(name)", arg=transport)
    page.wait_for_timeout(4000)
    each, rates = [], []
    for _ in range(count):
        each.append(page.evaluate("flip()"))
        page.wait_for_timeout(dice.uniform(*WAIT_MS))
        rates.append(float(page.text_content("#fps") or "nan"))
    assert (page.text_content("#transport") or "").startswith(transport), "the transport has changed meanwhile"
    page.close()
    time.sleep(2)  # until its slot is free
    return each, sum(rates) / len(rates)


def measure(url: str, count: int) -> dict[str, Any]:
    """So many flips by each transport, in turns."""
    dice = random.Random(1)
    latencies: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    rates: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        while (left := count - len(latencies["WebSocket"])) > 0:
            for name in TRANSPORTS:
                each, rate = turn(browser, url, name, min(TURN, left), dice)
                latencies[name] += each
                rates[name].append(rate)
        browser.close()
    return {
        name: {
            "flips": len(each),
            "median_ms": percentile(each, 0.5),
            "p95_ms": percentile(each, 0.95),
            "images_per_s": sum(rates[name]) / len(rates[name]),
            "each_ms": each,
        }
        for name, each in latencies.items()
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--flips", type=above(0), default=60, help="of each transport (default 60)")
    p.add_argument("--output", type=Path, help="write the JSON here")
    a = p.parse_args(argv)
    with serving() as url:
        load = os.getloadavg()[0]
        found = measure(url, round(a.flips))
    result = rounded(
        {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(torch.device("cpu")),
            "load_average_before": load,
            **found,
        }
    )
    write_json(result, a.output)
    short = {name: {k: v for k, v in result[name].items() if k != "each_ms"} for name in TRANSPORTS}
    print(json.dumps({**result, **short}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
