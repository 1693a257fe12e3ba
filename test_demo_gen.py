"""Draw images with a rectified-flow model twice: with the plain diffusers pipeline, one after another, and streamed
through the denoising batch from the same noise. Checks that both agree, saves a contact sheet and prints how fast each was.

    python test_demo_gen.py
    python test_demo_gen.py --prompt "a turtle, flat vector, on a sky blue background" --steps 8
    python test_demo_gen.py --image photo.png --strength 0.75 --prompt "a red apple, 3d render"
    python test_demo_gen.py --model stabilityai/stable-diffusion-3.5-medium --steps 28 --cfg-type full --dtype bfloat16

The last line is JSON. Exit code: 0, 1 when the two disagree, 2 for a bad argument.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, which nothing here needs

import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from streamflow import StreamFlow, acceleration, models, pretrained  # noqa: E402
from streamflow._command_line import Parser, at_least  # noqa: E402
from streamflow.image_utils import numpy_to_pil, postprocess_image, pt_to_numpy  # noqa: E402
from streamflow.models.loading import DTYPES, default_device, prompt_defaults  # noqa: E402

KINDS = ("none", "auto", "cuda-graph", "compile", "tensorrt", "onnxruntime", "openvino")
# How far apart two orders of the same sums may be, ||a - b|| / ||b|| of the worst image.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def arguments(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="hub id or folder of a diffusers pipeline (default: the embedded emoji model)")
    p.add_argument("--family", help="rectified-flow family, where the pipeline's class does not tell")
    p.add_argument("--prompt", action="append", help="repeat it for several, drawn in turn (default: sixteen of ours)")
    p.add_argument("--negative-prompt", default="", help="what --cfg-type full and initialize steer away from")
    p.add_argument("--steps", type=at_least(1), default=4, help="Euler steps an image (default 4)")
    p.add_argument("--frames", type=at_least(1), default=16, help="how many images (default 16)")
    p.add_argument("--rounds", type=at_least(1), default=1, help="repeat both ways, to see the spread (default 1)")
    p.add_argument("--width", type=at_least(1), help="pixels (default: the model's)")
    p.add_argument("--height", type=at_least(1), help="pixels (default: the model's)")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, float16 elsewhere")
    p.add_argument("--seed", type=int, default=2, help="default 2")
    p.add_argument("--cfg-type", default="none", help="none, full, self or initialize (default none)")
    p.add_argument("--guidance-scale", type=float, help="default: the pipeline's own")
    p.add_argument("--image", type=Path, help="image-to-image: an image to start from")
    p.add_argument("--strength", type=float, help="how much of --image is redrawn, 0 to 1 (default 0.75)")
    p.add_argument("--tiny-vae", action="store_true", help="decode with the embedded model's tiny VAE, both ways")
    p.add_argument("--accelerate", choices=KINDS, default="none", help="how the streamed way is made faster (default none)")
    p.add_argument("--tensorrt", dest="accelerate", action="store_const", const="tensorrt", help="--accelerate tensorrt")
    p.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="default: %(default)s")
    a = p.parse_args(argv)
    if a.strength is not None and a.image is None:
        p.error("--strength goes with --image")
    if a.tiny_vae and a.model:
        p.error("--tiny-vae is the embedded model's; leave out --model")
    if a.dtype is None:
        a.dtype = "float32" if a.device == "cpu" else "float16"
    return p, a


@dataclass
class Run:
    """What one way of drawing gave: images `[frames, 3, H, W]` in [0, 1], seconds in all, seconds from each image to
    the next, and seconds from input to image."""

    images: Tensor
    total: float
    intervals: list[float]
    latencies: list[float]

    @property
    def rate(self) -> float:
        """Images a second once the first is there."""
        return 1.0 / median(self.intervals)


def load(a: argparse.Namespace) -> Any:
    """The pipeline, on its device, in its dtype."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = models.load(a.model or "embedded", dtype=DTYPES[a.dtype])
    pipe.set_progress_bar_config(disable=True)
    if a.tiny_vae:
        pipe.vae = diffusers.AutoencoderTiny.from_pretrained(pretrained.embedded_tiny_vae(), dtype=DTYPES[a.dtype])
    return pipe.to(a.device)


def make_stream(a: argparse.Namespace, pipe: Any, batched: bool = True) -> StreamFlow:
    """A prepared stream; `batched=False` draws frame by frame."""
    stream = StreamFlow(
        pipe,
        width=a.width,
        height=a.height,
        cfg_type=a.cfg_type,
        use_denoising_batch=batched,
        family=a.family,
    )
    start = {"strength": a.strength or 0.75} if a.image else {}
    stream.prepare(
        a.prompt[0],
        a.negative_prompt,
        a.steps,
        guidance_scale=a.guidance_scale,
        seed=a.seed,
        **start,
        **prompt_defaults(pipe),
    )
    return stream


def draw_streamed(a: argparse.Namespace, stream: StreamFlow, title: str) -> Run:
    """Every frame through the stream, each with its own prompt."""
    image = Image.open(a.image).convert("RGB") if a.image else None

    def inputs() -> Iterator[Any]:
        for k in range(a.frames):
            stream.update_prompt(a.prompt[k % len(a.prompt)], scope="frame")
            yield image

    bar = tqdm(stream.frames(inputs()), total=a.frames, desc=title, unit="image")
    return _timed((postprocess_image(frame.wait().image[None], "pt"), frame.latency_s) for frame in bar)


def draw_with_pipeline(a: argparse.Namespace, pipe: Any, stream: StreamFlow, title: str) -> Run:
    """Every frame with the plain diffusers pipeline, from the noise that the stream takes."""
    target, fixed = pipe, {"output_type": "pt", "num_inference_steps": a.steps, **prompt_defaults(pipe)}
    fixed |= {"height": stream.height, "width": stream.width}
    parameters = inspect.signature(type(pipe).__call__).parameters
    if a.cfg_type == "full":
        fixed |= {"negative_prompt": a.negative_prompt}
        fixed |= {} if a.guidance_scale is None else {"guidance_scale": a.guidance_scale}
    elif "true_cfg_scale" not in parameters:
        fixed |= {"guidance_scale": 1.0}
    if a.image:
        target = getattr(diffusers, stream.adapter.image_pipeline)(**pipe.components)
        target.set_progress_bar_config(disable=True)
        image = Image.open(a.image).convert("RGB").resize((stream.width, stream.height), Image.Resampling.LANCZOS)
        fixed |= {"image": image, "strength": a.strength or 0.75}

    def images() -> Iterator[tuple[Tensor, float]]:
        for k in tqdm(range(a.frames), desc=title, unit="image"):
            start = time.perf_counter()
            latents = stream.encode_image(stream.preprocess(image)) if a.image else stream.frame_noise(k)
            drawn = target(prompt=a.prompt[k % len(a.prompt)], latents=latents, **fixed).images
            _wait(drawn)
            yield drawn, time.perf_counter() - start

    return _timed(images())


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _timed(drawn: Iterator[tuple[Tensor, float]]) -> Run:
    start = time.perf_counter()
    images, marks, latencies = [], [], []
    for image, latency in drawn:
        marks.append(time.perf_counter())
        images.append(image.float().cpu())
        latencies.append(latency)
    intervals = [b - a for a, b in zip(marks, marks[1:], strict=False)] or [marks[0] - start]
    return Run(torch.cat(images), marks[-1] - start, intervals, latencies)


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| of the worst image; infinite where one is not finite."""
    error = ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max().item()
    return error if error == error else float("inf")


def contact_sheet(drawn: Tensor, captions: list[str], columns: int = 4) -> Image.Image:
    """Images in a grid, each with its caption under it."""
    images = numpy_to_pil(pt_to_numpy(drawn))
    side = max(192, images[0].width)
    scale = side / images[0].width
    tile = (side, round(images[0].height * scale))
    font = ImageFont.load_default(size=14)
    margin, line, lines = 14, 18, 3
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = tile[0] + margin, tile[1] + margin + line * lines
    sheet = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = margin + k % columns * cell[0], margin + k // columns * cell[1]
        sheet.paste(image.resize(tile, Image.Resampling.LANCZOS) if tile != image.size else image, (x, y))
        pen.rectangle((x - 1, y - 1, x + tile[0], y + tile[1]), outline=(225, 225, 225))
        for i, text in enumerate(_wrap(caption, font, tile[0])[:lines]):
            pen.text((x, y + tile[1] + 4 + i * line), text, fill=(40, 40, 40), font=font)
    return sheet


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def report(a: argparse.Namespace, rounds: list[tuple[Run, Run]], reference: str) -> dict[str, Any]:
    """The figures of all rounds, for people on the way and as a dict."""
    ratios = [streamed.rate / plain.rate for plain, streamed in rounds]
    plain, streamed = rounds[-1]
    error = max(relative_error(s.images, p.images) for p, s in rounds)
    difference = max((s.images - p.images).abs().max().item() for p, s in rounds)
    tolerance = TOLERANCE[torch.bfloat16 if a.accelerate == "openvino" else DTYPES[a.dtype]]
    intervals = sorted(seconds for _, run in rounds for seconds in run.intervals)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "model": a.model or "embedded",
        "device": a.device,
        "dtype": a.dtype,
        "threads": torch.get_num_threads(),
        "steps": a.steps,
        "frames": a.frames,
        "cfg_type": a.cfg_type,
        "accelerate": a.accelerate,
        "reference": reference,
        "sequential_images_per_s": round(median(p.rate for p, _ in rounds), 3),
        "streamed_images_per_s": round(median(s.rate for _, s in rounds), 3),
        "ratio": round(median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratio_with_fill_and_drain": round(median(p.total / s.total for p, s in rounds), 3),
        "streamed_p95_s": round(intervals[min(len(intervals) - 1, int(0.95 * len(intervals)))], 4),
        "latency_sequential_s": round(median(plain.latencies), 4),
        "latency_streamed_s": round(median(streamed.latencies), 4),
        "relative_error": error,
        "largest_difference": difference,
        "tolerance": tolerance,
        "agree": error <= tolerance,
        "output": str(a.output),
    }
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)" if len(ratios) > 1 else ""
    print(f"\none after another, {reference}: {result['sequential_images_per_s']:.2f} images/s")
    print(f"streamed: {result['streamed_images_per_s']:.2f} images/s, {result['ratio']:.2f} times{spread}")
    print(f"with filling and draining the ring, {a.frames} images: {result['ratio_with_fill_and_drain']:.2f} times")
    print(f"latency {result['latency_streamed_s']:.3f} s streamed, {result['latency_sequential_s']:.3f} s one by one")
    verdict = "they agree" if result["agree"] else f"THEY DISAGREE: the bound is {tolerance:g}"
    print(f"largest difference {difference:.2e} of 1, relative error {error:.2e}: {verdict}")
    print(f"saved {a.output}")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser, a = arguments(argv)
    a.prompt = a.prompt or list(pretrained.EXAMPLE_PROMPTS)
    try:
        pipe = load(a)
        stream = make_stream(a, pipe)
        own_rule = a.cfg_type in ("self", "initialize") or not stream.adapter.is_reference
        loop = make_stream(a, pipe, batched=False) if own_rule else None
        if a.image:
            Image.open(a.image).verify()
        kind = acceleration.resolve(a.accelerate, pipe.device)
        acceleration.check_options(kind, pipe.device, {})
    except (ValueError, TypeError, NotImplementedError, OSError, RuntimeError) as error:
        parser.error(str(error))
    reference = "StreamFlow's own loop" if loop else "plain diffusers"
    rounds = []
    for _ in range(a.rounds):
        for fresh in filter(None, (stream, loop)):
            fresh.reset()
        stream.accelerate("none")  # it may act on the pipe's own modules, which both ways use
        if loop:
            plain = draw_streamed(a, loop, "one by one")
        else:
            plain = draw_with_pipeline(a, pipe, stream, "one by one")
        stream.accelerate(kind)
        rounds.append((plain, draw_streamed(a, stream, "streamed  ")))
    a.output.parent.mkdir(parents=True, exist_ok=True)
    captions = [a.prompt[k % len(a.prompt)] for k in range(a.frames)]
    contact_sheet(rounds[-1][1].images, captions).save(a.output)
    result = report(a, rounds, reference)
    print(json.dumps(result))
    return 0 if result["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
