"""Video models at their true size, with random weights: frames a second and the first frame of a stream, against the
pipeline's own call in the same run. Memory and drift over a long stream.

python examples/benchmark/video.py --models helios-14b --output video.json
python examples/benchmark/video.py --models helios-14b --ways compile-fp8 --decode-on home cuda:1 --long 200
python examples/benchmark/video.py --models tiny --device cpu --dtype float32 --ways eager --chunks 2

A round of a stream begins a video anew: its first two chunks, then `--chunks` more, whose rate is `frames_per_s`. The
pipeline's call draws its first chunk and `--chunks` more. `times_the_pipeline` compares the time until as many images are
there: `first_s`, and the others at `frames_per_s`. `first_frame_s` is the time to the first image where the first chunk is
decoded frame by frame (`frames(decode="frame")`). `vae_s` is a decode of a chunk alone, by the plain VAE. The rounds of the
pipeline come first, then those of one way after another. With `--long` the last way draws on: the allocated memory after
each chunk, and the mean and the standard deviation of its images in [0, 1].
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
    HeliosDMDScheduler,
    HeliosPyramidPipeline,
    HeliosTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from streamflow import VideoStream
from streamflow._command_line import at_least
from streamflow.benchmark.full_size import random_module
from streamflow.benchmark.machine import clocks, machine
from streamflow.benchmark.measure import FAILURES, cause, clean, memory
from streamflow.benchmark.report import rounded, write_json
from streamflow.benchmark.timing import Spread, timed, wait
from streamflow.models.loading import DTYPES, default_device
from streamflow.models.tiny_video import TinyVideoDecoder

logger = logging.getLogger(__name__)
WAN_13B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}  # of the Wan 2.1 1.3B that both networks follow
TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "rope_dim": (4, 4, 4)}
TINY_VAE = {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
HELIOS = {"guidance_scale": 1.0, "pyramid_num_inference_steps_list": [2, 2, 2], "is_amplify_first_chunk": True}
SKYREELS = {"num_inference_steps": 30, "guidance_scale": 1.0, "ar_step": 5, "causal_block_size": 5}
SKYREELS |= {"base_num_frames": 97, "overlap_history": 17}


@dataclass(frozen=True)
class Setup:
    """How a stream is drawn. kind, options: of `accelerate`. call: more arguments of `prepare`. tiny_vae: TAEHV decodes."""

    kind: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    tiny_vae: bool = False


KEPT = {"use_kv_cache": True}
FA3 = Setup("compile", {"quantize": "fp8", "attention": "fa3"})
HOME = "home"  # decodes where the network is
WAYS = {
    "eager": Setup(),
    "kept-keys": Setup(call=KEPT),
    "kept-keys-compile": Setup("compile", call=KEPT),
    "kept-keys-compile-fp8": Setup("compile", {"quantize": "fp8"}, KEPT),
    "kept-keys-compile-fp8-fa3": replace(FA3, call=KEPT),
    "tiny-vae": Setup(tiny_vae=True),
    "cuda-graph": Setup("cuda-graph"),
    "compile": Setup("compile"),
    "compile-fp8": Setup("compile", {"quantize": "fp8"}),
    "compile-fp8-fa3": FA3,
    "compile-fp8-fa3-fp8": Setup("compile", {"quantize": "fp8", "attention": "fa3-fp8"}),
    "compile-fp8-fa3-tiny-vae": replace(FA3, tiny_vae=True),
}
ACCELERATED = ("eager", "compile", "compile-fp8")


@dataclass(frozen=True)
class Model:
    """A video model. kind, network, vae: the network's class, and the configs. call: arguments of its pipeline's call.
    frames: images of a chunk after the first. length: arguments of the pipeline's call that draws so many chunks, or a few
    more. ways: those that are measured unless others are chosen. options: of the pipeline."""

    pipeline: Callable[..., Any]
    kind: type
    scheduler: Callable[[], Any]
    call: Mapping[str, Any]
    frames: int
    length: Callable[[int], dict[str, Any]]
    network: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = ACCELERATED
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
        """The pipeline with random weights and without text encoders."""
        parts = {
            "transformer": random_module(self.kind, self.network, device, dtype),
            "vae": random_module(AutoencoderKLWan, self.vae, device, vae_dtype),
        }
        pipe = self.pipeline(text_encoder=None, tokenizer=None, scheduler=self.scheduler(), **parts, **self.options)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def length_of_anyflow(chunks: int) -> dict[str, Any]:
    """A latent frame, then three a chunk."""
    return {"num_frames": 1 + 12 * (chunks - 1), "chunk_partition": [1] + [3] * (chunks - 1)}


def length_of_skyreels(chunks: int) -> dict[str, Any]:
    """Whole windows: five chunks in the first one, four in any other."""
    return {"num_frames": 97 + 80 * -(-max(0, chunks - 5) // 4)}


def scheduler_of_helios() -> Any:
    return HeliosDMDScheduler(gamma=0.33)  # diffusers' 1/3 is singular on some devices


MODELS = {
    "helios-14b": Model(
        HeliosPyramidPipeline,
        HeliosTransformer3DModel,
        scheduler_of_helios,
        {**HELIOS, "height": 384, "width": 640},
        frames=33,
        length=lambda chunks: {"num_frames": 33 * chunks},
        options={"is_distilled": True},
    ),
    "anyflow-far-1.3b": Model(
        AnyFlowFARPipeline,
        AnyFlowFARTransformer3DModel,
        lambda: FlowMapEulerDiscreteScheduler(shift=5.0),
        {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 480, "width": 832},
        frames=12,
        length=length_of_anyflow,
        network=WAN_13B,
    ),
    "skyreels-df-1.3b": Model(
        SkyReelsV2DiffusionForcingPipeline,
        SkyReelsV2Transformer3DModel,
        lambda: UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
        {**SKYREELS, "height": 480, "width": 832},
        frames=20,
        length=length_of_skyreels,
        network=WAN_13B,
        ways=("eager", "kept-keys", "kept-keys-compile", "kept-keys-compile-fp8"),
    ),
    "tiny": Model(
        HeliosPyramidPipeline,
        HeliosTransformer3DModel,
        scheduler_of_helios,
        {**HELIOS, "height": 64, "width": 64, "num_latent_frames_per_chunk": 3},
        frames=9,
        length=lambda chunks: {"num_frames": 9 * chunks},
        network=TINY,
        vae=TINY_VAE,
        options={"is_distilled": True},
    ),
}


class Stream:
    """A way: a stream of the pipeline, warm. decode_on: a second device, or `HOME`."""

    def __init__(self, pipe: Any, model: Model, call: dict[str, Any], way: str, decode_on: str) -> None:
        setup, other = WAYS[way], None if decode_on == HOME else decode_on
        self._call, self._frames = {**call, **setup.call}, model.frames
        self._devices = {pipe._execution_device, torch.device(other or pipe._execution_device)}
        self.stream = VideoStream(pipe, output_type="pt", decode_on=other)
        if setup.tiny_vae:
            like = pipe.transformer
            self.stream.vae = random_module(TinyVideoDecoder, {}, like.device, like.dtype)
        try:
            self.stream.accelerate(setup.kind, **setup.options)
            began = time.perf_counter()
            self.round(2)
            self.start_s = time.perf_counter() - began
        except BaseException:
            self.stream.close()  # the next way gets the pipeline as it was
            raise

    def round(self, chunks: int) -> dict[str, float]:
        """A video anew, twice. Seconds until the first image, where it is decoded by itself, and until the first chunk is
        decoded; frames a second of the chunks after the second one."""
        began = self._anew()
        next(self.stream.frames(decode="frame"))
        image = self._now()
        again = self._anew()
        self.first_images = len(self.stream().images)
        first = self._now()
        self.stream()  # with a second device it draws two chunks: from here on the stream is one ahead
        full = self._now()
        for _ in range(chunks):
            self.stream()
        rate = chunks * self._frames / (self._now() - full)
        return {"first_frame_s": image - began, "first_s": first - again, "frames_per_s": rate}

    def _anew(self) -> float:
        """Prepare. Returns the time before it."""
        began = self._now()
        self.stream.prepare(seed=2, **self._call)
        return began

    def _now(self) -> float:
        """The time once every device is done."""
        for device in self._devices:
            wait(device)
        return time.perf_counter()

    def drift(self, chunks: int) -> dict[str, list[float]]:
        """Draw on. By chunk: mean and standard deviation of the images, and the allocated memory in MiB."""
        device = self.stream.pipe._execution_device
        found: dict[str, list[float]] = {"mean": [], "std": [], "allocated_mib": []}
        self.stream.prepare(seed=2, **self._call)
        for chunk in self.stream.chunks(chunks):
            images = chunk.images.float()
            found["mean"].append(images.mean().item())
            found["std"].append(images.std().item())
            if device.type == "cuda":
                found["allocated_mib"].append(torch.cuda.memory_allocated(device) / 2**20)
            if chunk.id % 20 == 0:
                logger.info("chunk %d: %s", chunk.id, {name: values[-1:] for name, values in found.items()})
        return found


def own_call(pipe: Any, model: Model, call: dict[str, Any], chunks: int) -> tuple[float, int]:
    """The pipeline's own call of the first chunk and `chunks` more, none of which comes before the last one: its seconds,
    and how many images it gives."""
    device = pipe._execution_device
    generator = torch.Generator(device).manual_seed(2)
    wait(device)
    began = time.perf_counter()
    video = pipe(prompt=None, **call, **model.length(chunks + 1), generator=generator, output_type="pt").frames[0]
    wait(device)
    return time.perf_counter() - began, len(video)


def measure(model: Model, a: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """All ways of a model, one after another. keep: takes the figures after each way and after the long stream."""
    device = torch.device(a.device)
    pipe = model.make(device, DTYPES[a.dtype], DTYPES[a.vae_dtype])
    embeds = torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[a.dtype])
    call = {**model.call, "prompt_embeds": embeds}
    chunk = _latents(pipe, model, device)
    found: dict[str, Any] = {"call": dict(model.call), "frames_of_a_chunk": model.frames, "ways": {}}
    found["vae_s"] = vars(Spread.of(timed(lambda: pipe.vae.decode(chunk, return_dict=False), 3, device).each))
    short = {"num_inference_steps": 1} if "num_inference_steps" in call else {}
    own_call(pipe, model, call | short, 1)  # warms up
    calls = [own_call(pipe, model, call, a.chunks) for _ in range(a.rounds)]
    own, images = Spread.of([seconds for seconds, _ in calls]).median, calls[0][1]
    found["images_of_the_call"] = images

    def add(name: str, rounds: list[dict[str, float]], first_images: int, **more: Any) -> None:
        figures = {name: vars(Spread.of([one[name] for one in rounds])) for name in rounds[0]}
        rest = images - first_images
        times = Spread.of([own / (one["first_s"] + rest / one["frames_per_s"]) for one in rounds])
        found["ways"][name] = {**more, **figures, "times_the_pipeline": vars(times)}
        logger.info("%s: %.2f frames/s, %.2f times", name, figures["frames_per_s"]["median"], times.median)
        keep(found)

    add("pipeline", [{"first_s": seconds, "frames_per_s": images / seconds} for seconds, _ in calls], images)
    last = None
    for way, place in product(a.ways or model.ways, a.decode_on):
        name = way if place == HOME else f"{way}, decoded on {place}"
        if last is not None:
            last.stream.close()
            last = None
        clean(device)
        try:
            last = Stream(pipe, model, call, way, place)
            rounds = [last.round(a.chunks) for _ in range(a.rounds)]
            add(name, rounds, last.first_images, start_s=last.start_s, memory_mib=memory(device))
        except (*FAILURES, TypeError) as error:  # TypeError: the pipeline does not take an argument of this way
            found["ways"][name] = {"failed": cause(error)}
            logger.info("%s failed: %s", name, found["ways"][name]["failed"])
            keep(found)
    if a.long and last is not None and "failed" not in found["ways"][name]:
        found["long"] = last.drift(a.long)
        keep(found)
    if last is not None:
        last.stream.close()


def _latents(pipe: Any, model: Model, device: torch.device) -> Tensor:
    """Random latents of a chunk, as the VAE decodes them."""
    frames = -(-model.frames // pipe.vae_scale_factor_temporal)
    sides = [model.call[name] // pipe.vae_scale_factor_spatial for name in ("height", "width")]
    return torch.randn(1, pipe.vae.config.z_dim, frames, *sides, device=device, dtype=pipe.vae.dtype)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=MODELS, default=["helios-14b"], help="default: helios-14b")
    p.add_argument("--ways", nargs="+", choices=WAYS, help="default: those that the model can be drawn in")
    p.add_argument(
        "--decode-on",
        nargs="+",
        default=[HOME],
        metavar="DEVICE",
        help="where each way decodes: home, or a device that decodes while the next chunk is drawn (default: home)",
    )
    p.add_argument("--chunks", type=at_least(1), default=4, help="chunks a round after the first (default: %(default)s)")
    p.add_argument("--rounds", type=at_least(1), default=3, help="default: %(default)s")
    p.add_argument("--long", type=at_least(0), default=0, metavar="CHUNKS", help="chunks of the long stream")
    p.add_argument("--device", default=default_device(), help="default: %(default)s")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the network (default: %(default)s)")
    p.add_argument("--vae-dtype", choices=DTYPES, default="float32", help="of the VAE (default: %(default)s)")
    p.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here, after each model")
    a = p.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(a.device)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "dtype": a.dtype,
        "vae_dtype": a.vae_dtype,
    }
    result |= {"machine": machine(device), "clocks": clocks(device), "models": {}}

    def keep(name: str, found: dict[str, Any]) -> None:
        result["models"][name] = found
        write_json(result, a.output)

    for name in a.models:
        clean(device)
        try:
            measure(MODELS[name], a, partial(keep, name))
        except FAILURES as error:
            keep(name, {**result["models"].get(name, {}), "failed": cause(error)})
            logger.info("%s failed: %s", name, cause(error))
    print(json.dumps(rounded(result), allow_nan=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
