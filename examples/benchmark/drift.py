"""How images of a long video flicker and drift, under each kind of noise and with feedback: the embedded model on a CPU.

    python examples/benchmark/drift.py --output static/benchmarks/drift-cpu.json

Two inputs, image-to-image, 2 steps from noise level 0.5, tiny VAE, no guidance:

- still: the sample's apple at 128x128, the same image in every frame.
- pan: a window of 128x128 on a canvas of 200x128 with two apples, which wraps around. Frame n shows the position
  p(n) = n mod 200, so the content moves one whole pixel a frame and every position returns after a lap of 200 frames. The
  input itself does not flicker by the measure below.

out(n) is the output of input n, float RGB in 0 to 255. All differences are in these levels. The still has p(n) = 0.

- flicker(n): mean |out(n) - out(n - 1)| over pixels and channels. For the pan, out(n - 1) is moved by one pixel as the input
  is, and only the 127 columns that both images show count: mean |out(n)[x] - out(n - 1)[x + 1]|.
- distance(n): mean |out(n) - reference(n)|, where reference(n) is the average of those of the first 200 outputs whose input
  has the position p(n). For the still this is the average of 200 outputs, for the pan the one output of the first lap.
- colour(n): per channel, mean of out(n) - reference(n) over pixels, with sign: how far the mean colour has moved.
- drift: the mean distance over the last 200 frames, less that over frames 200 to 399. Distance alone has a part that does
  not grow, since noise that changes gives another image.
- detail: mean |difference of horizontally neighbouring pixels| over all outputs, which blur lowers. Without it, a blurred
  video would look like a gain.

Runs are spread over processes of one thread each. A figure goes beside the JSON, whose series are means over 20 frames.
Needs matplotlib: pip install "streamflow-rf[bench]".
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from streamflow import StreamFlow
from streamflow._command_line import at_least, quiet_libraries
from streamflow.benchmark.machine import machine
from streamflow.benchmark.plot import SERIES, figure, style
from streamflow.benchmark.report import rounded, write_json
from streamflow.models.loading import load
from streamflow.samples import IMAGE

SIZE, LAP, MEAN = 128, 200, 20  # pixels; frames of a lap, which are the canvas's pixels too; frames of one point of a series
STEPS, T_INDEX_LIST = 5, [2, 3]
PROMPT = "an apple, 3d render"
INPUTS = {"still": 0, "pan": 1}  # pixels a frame
WAYS: dict[str, dict[str, Any]] = {
    "fresh noise": {"noise": "frame"},
    "constant noise": {"noise": "constant"},
    "constant noise, feedback": {"noise": "constant", "feedback": 0.3},
    "interpolated noise": {"noise": "interpolated", "noise_period": 30},
}


def images(speed: int, frames: int) -> Iterator[np.ndarray]:
    """The frames of an input that moves so many pixels a frame, `[H, W, 3]` uint8."""
    canvas = Image.new("RGB", (LAP, SIZE), "white")
    with Image.open(IMAGE) as apple:
        for side, corner in ((SIZE, (0, 0)), (LAP - SIZE, (SIZE, SIZE // 3))):
            canvas.paste(apple.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), corner)
    pixels = np.asarray(canvas)
    for n in range(frames):
        yield np.ascontiguousarray(np.roll(pixels, -speed * n, axis=1)[:, :SIZE])


def measure(outputs: np.ndarray, speed: int, lap: int = LAP) -> dict[str, Any]:
    """The measures of the module's docstring. outputs: `[frames, H, W, 3]`, at least two laps."""
    count, _, width, _ = outputs.shape
    if count < 2 * lap:
        raise ValueError(f"drift is measured over at least two laps of {lap} frames, not over {count} frames")
    before, after = outputs[:-1, :, speed:], outputs[1:, :, : width - speed]
    flicker = [float(np.abs(b - a).mean()) for a, b in zip(before, after, strict=True)]
    references = outputs[:lap] if speed else outputs[:lap].mean(axis=0, keepdims=True)
    off = [one - references[n % len(references)] for n, one in enumerate(outputs)]
    distance = np.array([np.abs(one).mean() for one in off])
    colour = np.array([one.mean(axis=(0, 1)) for one in off])
    return {
        "flicker": float(np.mean(flicker)),
        "distance": {"second_lap": float(distance[lap : 2 * lap].mean()), "last_lap": float(distance[-lap:].mean())},
        "drift": float(distance[-lap:].mean() - distance[lap : 2 * lap].mean()),
        "colour_of_last_lap": colour[-lap:].mean(axis=0).tolist(),
        "detail": float(np.mean([np.abs(np.diff(one, axis=1)).mean() for one in outputs])),
        "series": {"flicker": means([flicker[0], *flicker]), "distance": means(distance), "colour": means(colour)},
    }


def means(values: Any) -> list[Any]:
    """Means over `MEAN` frames each; frames that do not fill the last one are left out."""
    values = np.asarray(values, float)
    whole = len(values) // MEAN
    return values[: whole * MEAN].reshape(whole, MEAN, *values.shape[1:]).mean(axis=1).tolist()


def run(name: str, way: str, frames: int, acceleration: str) -> dict[str, Any]:
    """One input drawn in one way."""
    torch.set_num_threads(1)
    quiet_libraries()
    speed = INPUTS[name]
    with StreamFlow(load("embedded"), T_INDEX_LIST, width=SIZE, height=SIZE, cfg_type="none", **WAYS[way]) as stream:
        stream.prepare(PROMPT, num_inference_steps=STEPS)
        stream.use_tiny_vae()
        stream.accelerate(acceleration)
        outputs = np.empty((frames, SIZE, SIZE, 3), np.float32)
        begun = time.perf_counter()
        for n, frame in enumerate(stream.frames(images(speed, frames))):
            outputs[n] = 255 * frame.wait().image.permute(1, 2, 0).numpy()
        rate = frames / (time.perf_counter() - begun)
    return {"input": name, "way": way, "images_per_s": rate, **measure(outputs, speed)}


def draw(result: dict[str, Any], file: Path) -> None:
    """A row for each input: flicker, distance and the shift of the mean colour over frames."""
    with style():
        made, grid = figure(13, 7.2, len(INPUTS), 3)
        for axes, name in zip(grid, INPUTS, strict=True):
            for k, one in enumerate(row for row in result["runs"] if row["input"] == name):
                series = one["series"]
                frames = MEAN * (np.arange(len(series["flicker"])) + 0.5)
                shift = np.mean(series["colour"], axis=1)
                for panel, values in zip(axes, (series["flicker"], series["distance"], shift), strict=True):
                    line = {"linestyle": "--" if "feedback" in one["way"] else "-", "linewidth": 1.8}
                    panel.plot(frames, values, color=SERIES[k], label=one["way"], **line)
            axes[0].set(title=f"{name}: flicker", ylabel="levels of 255")
            axes[1].set(title=f"{name}: distance from the first lap")
            axes[2].set(title=f"{name}: shift of the mean colour")
            for panel in axes[:2]:
                panel.set_ylim(bottom=0)
            for panel in axes:
                panel.axvspan(0, LAP, color="#f3f4f6")
                panel.set(xlabel="frame", xlim=(0, frames[-1] + MEAN / 2))
                panel.grid(axis="y")
        made.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
        made.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--frames", type=at_least(2 * LAP), default=1000, help="of each run (default: %(default)s)")
    p.add_argument("--processes", type=at_least(1), default=2, help="of one thread each (default: %(default)s)")
    p.add_argument("--accelerate", default="none", help="kind of acceleration (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/drift.json"), help="JSON (default: %(default)s)")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    begun, rows = time.perf_counter(), []
    with ProcessPoolExecutor(a.processes, multiprocessing.get_context("spawn")) as pool:
        given = [(name, way, a.frames, a.accelerate) for way, name in product(WAYS, INPUTS)]
        for row in pool.map(run, *zip(*given, strict=True)):
            print(
                f"{row['input']}, {row['way']}: flicker {row['flicker']:.2f}, distance {row['distance']['second_lap']:.2f} "
                f"in the second lap and {row['distance']['last_lap']:.2f} in the last, detail {row['detail']:.2f}, "
                f"{row['images_per_s']:.1f} images/s",
                flush=True,
            )
            rows.append(row)
    result = rounded(
        {
            "command": " ".join(["python examples/benchmark/drift.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine(torch.device("cpu")),
            "minutes": (time.perf_counter() - begun) / 60,
            "frames": a.frames,
            "lap": LAP,
            "prompt": PROMPT,
            "num_inference_steps": STEPS,
            "t_index_list": T_INDEX_LIST,
            "ways": WAYS,
            "runs": rows,
        }
    )
    write_json(result, a.output)
    draw(result, a.output.with_suffix(".png"))
    print(f"wrote {a.output} and {a.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
