"""Draw on one rank and decode on all: several processes, on one machine or on several.

    torchrun --nproc-per-node 2 examples/torchrun_decode.py

Two machines, each with two GPUs (the same line on both; HOST is the first one's name, and a port that is free there):

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id emoji \\
        examples/torchrun_decode.py

Every rank loads the embedded model, on its GPU or on the CPU. Rank 0 draws, and a batch of finished latents is decoded by
row, on all ranks. The images are compared to the bit with this process decoding the same shares alone, and saved as a sheet.
A rank that ends, ends the run with an error. `multi_gpu_decode.py --ray 2` decodes on Ray, which replaces lost processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from streamflow import StreamFlow
from streamflow._command_line import Parser, at_least
from streamflow.image_utils import image_grid, postprocess_image
from streamflow.parallel.distributed import local_device, served
from streamflow.parallel.plan import shares
from streamflow.pretrained import EXAMPLE_PROMPTS, embedded

STEPS = 4


def arguments() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--frames", type=at_least(1), default=16, help="how many images (default 16)")
    p.add_argument("--timeout", type=at_least(1), default=60, help="seconds after which a silent rank is lost (default 60)")
    p.add_argument("--output", type=Path, default=Path("outputs/torchrun_decode.png"), help="default: %(default)s")
    return p.parse_args()


def make_stream() -> StreamFlow:
    """The embedded model in four steps, on this rank's device."""
    diffusers_logging.disable_progress_bar()
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
    stream = StreamFlow(pipe.to(local_device()), range(STEPS), cfg_type="none")
    stream.prepare(EXAMPLE_PROMPTS[0], num_inference_steps=STEPS, max_sequence_length=0)
    return stream


def latents(stream: StreamFlow, frames: int) -> Tensor:
    """Finished latents `[frames, ...]`, each frame with a prompt of its own."""
    done = []
    for k in range(frames):
        stream.update_prompt(EXAMPLE_PROMPTS[k % len(EXAMPLE_PROMPTS)], scope="frame")
        done.append(stream.predict_x0_batch(stream.frame_noise(k)))
    return torch.cat([x for x in done if x is not None] + stream.flush())


def timed(decode: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """(the images, images per second)."""
    start = time.perf_counter()
    images = decode().cpu()
    return images, len(images) / (time.perf_counter() - start)


@torch.no_grad()
def main() -> int:
    """Exit code 0, or 1 where the images differ."""
    a = arguments()
    stream = make_stream()
    decoder = stream.codec.decoder
    decoder(torch.zeros(1, *stream.frame_noise(0).shape[1:], device=stream.device))  # the first call takes longest
    with served({"decoder": decoder}, timeout=a.timeout) as remote:
        if remote is None:
            return 0
        ranks, batch = dist.get_world_size(), latents(stream, a.frames)
        parts = [batch[rows.start : rows.stop] for rows in shares(len(batch), ranks) if rows]
        alone, rate_alone = timed(lambda: torch.cat([decoder(part) for part in parts]))
        images, rate = timed(lambda: remote.decoder(batch))
    print(f"decode on this rank alone: {rate_alone:7.2f} images/s, on {stream.device}")
    print(f"decode on {ranks} rank(s):      {rate:7.2f} images/s")
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(postprocess_image(images, "pil")).save(a.output)
    equal = torch.equal(images, alone)
    print(f"{len(images)} images, the same to the bit: {'yes' if equal else 'NO'}; saved {a.output}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
