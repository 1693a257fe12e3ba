"""A server that draws for many users: a Ray Serve deployment with one replica for each GPU (or CPU core). Requests that
arrive together are drawn as one denoising batch, and Ray starts more replicas while there are more requests.

    pip install 'streamflow-rf[ray]'
    python examples/ray_serve.py                  # start, request 16 images over HTTP, save them as a sheet, end
    python examples/ray_serve.py --stay           # start, and serve until Ctrl-C
    curl 'http://127.0.0.1:8000/?prompt=a+fox,+3d+render&seed=7' -o fox.png

In a cluster (`ray start --head` on one machine, `ray start --address=HOST:6379` on the others) add `--address auto`. Ray
Serve replaces a replica that ends. Its open requests are answered with status 500, and `request` repeats them, as a client
should. An image depends on its prompt and seed only, up to rounding, and not on the replica or the batch that draws it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent

import ray  # noqa: E402
from PIL import Image  # noqa: E402
from ray import serve  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402

from streamflow._command_line import Parser, at_least  # noqa: E402
from streamflow.image_utils import image_grid, postprocess_image  # noqa: E402
from streamflow.pretrained import EXAMPLE_PROMPTS, embedded  # noqa: E402

BATCH, STEPS = 8, 4


@serve.deployment(max_ongoing_requests=2 * BATCH, health_check_period_s=2, graceful_shutdown_timeout_s=5)
class Draw:
    """A replica: the embedded model on its own GPU or CPU core."""

    def __init__(self) -> None:
        import torch
        from diffusers import StableDiffusion3Pipeline

        from streamflow import StreamFlow

        pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
        self.stream = StreamFlow(pipe.to("cuda" if torch.cuda.is_available() else "cpu"), range(STEPS), cfg_type="none")
        self.stream.prepare(EXAMPLE_PROMPTS[0], num_inference_steps=STEPS, max_sequence_length=0)
        self.draw([(EXAMPLE_PROMPTS[0], 0)])  # the first image takes longest

    def draw(self, requests: list[tuple[str, int]]) -> list[bytes]:
        """PNG files of these (prompt, seed), streamed through the denoising batch and decoded together."""
        import torch

        stream, shape = self.stream, self.stream.frame_noise(0).shape
        done = []
        for prompt, seed in requests:
            stream.update_prompt(prompt, scope="frame")
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(stream.device, stream.dtype)
            done.append(stream.predict_x0_batch(noise))
        latents = torch.cat([x for x in done if x is not None] + stream.flush())
        return [as_png(image) for image in postprocess_image(stream.decode_image(latents), "pil")]

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.02)
    async def draw_batch(self, requests: list[tuple[str, int]]) -> list[bytes]:
        """The requests of 20 ms, one batch at a time."""
        return await asyncio.to_thread(self.draw, requests)

    async def __call__(self, request: Request) -> Response:
        """GET /?prompt=...&seed=...: a PNG."""
        prompt, seed = request.query_params.get("prompt", ""), request.query_params.get("seed", "2")
        if not prompt or not seed.isdecimal() or int(seed) >= 2**63:
            return Response("pass ?prompt=... and optionally &seed=..., an integer from 0 to 2**63 - 1", 400)
        return Response(await self.draw_batch((prompt, int(seed))), media_type="image/png")


def as_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def arguments() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--replicas", type=at_least(1), help="at most (default: one for each GPU, else for each CPU core)")
    p.add_argument("--port", type=at_least(1), default=8000, help="default: %(default)s")
    p.add_argument("--address", help="of a running cluster; by default Ray starts on this machine, and ends")
    p.add_argument("--stay", action="store_true", help="serve until Ctrl-C, and send no requests")
    p.add_argument("--requests", type=at_least(1), default=16, help="how many images to request (default 16)")
    p.add_argument("--output", type=Path, default=Path("outputs/ray_serve.png"), help="default: %(default)s")
    return p.parse_args()


def start(a: argparse.Namespace) -> int:
    """Deploy. Returns the largest number of replicas."""
    ray.init(address=a.address, include_dashboard=False, log_to_driver=False)
    have = ray.cluster_resources()
    gpus, cores = int(have.get("GPU", 0)), int(have["CPU"])
    most = a.replicas or gpus or cores
    if most > (gpus or cores):
        raise ValueError(
            f"--replicas {most}: each one takes a GPU or a core, and there are {gpus} GPUs and {cores} CPU cores"
        )
    autoscaling = {
        "min_replicas": 1,
        "max_replicas": most,
        "target_ongoing_requests": BATCH // 2,
        "upscale_delay_s": 2,
        "downscale_delay_s": 60,
    }
    needs = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
    serve.start(http_options={"host": "127.0.0.1", "port": a.port})
    serve.run(Draw.options(autoscaling_config=autoscaling, ray_actor_options=needs).bind())
    return most


def request(port: int, prompt: str, seed: int, patience: float = 120.0) -> bytes:
    """One image. A request that fails, since a replica ended or none is free, is repeated for `patience` seconds."""
    url = f"http://127.0.0.1:{port}/?" + urllib.parse.urlencode({"prompt": prompt, "seed": seed})
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(url, timeout=patience) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            if error.code < 500 or time.monotonic() > deadline:
                raise
            print(f"status {error.code}, trying again: {prompt}, seed {seed}", flush=True)
            time.sleep(0.5)


def request_all(a: argparse.Namespace) -> list[Any]:
    """The images of many users, who send their requests at once."""
    wanted = [(EXAMPLE_PROMPTS[k % len(EXAMPLE_PROMPTS)], k) for k in range(a.requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(2 * BATCH) as users:
        files = list(users.map(lambda one: request(a.port, *one), wanted))
    print(f"{len(files)} images, {len(files) / (time.perf_counter() - start):.2f} images/s")
    return [Image.open(io.BytesIO(file)) for file in files]


def main() -> int:
    """Exit code 0."""
    a = arguments()
    try:
        most = start(a)
        print(f"http://127.0.0.1:{a.port}/?prompt=... is served by 1 to {most} replicas", flush=True)
        if a.stay:
            while True:
                time.sleep(3600)
        a.output.parent.mkdir(parents=True, exist_ok=True)
        image_grid(request_all(a)).save(a.output)
        print(f"saved {a.output}")
    except KeyboardInterrupt:
        print("stopping")
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
