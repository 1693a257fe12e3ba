"""Draw on one rank and decode on the others: several processes, on one machine or on several.

    torchrun --nproc-per-node 2 examples/torchrun_decode.py

Two machines, each with two GPUs (the same line on both; HOST is the first one's name, and a port that is free there):

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id emoji \\
        examples/torchrun_decode.py

Every rank loads the embedded model, on its GPU or on the CPU. Rank 0 streams; finished latents go to the other ranks, one
frame each in turn, and come back as pictures in order while the next ones are drawn. Then a batch is decoded by row, on all
ranks. Both are compared with this process decoding alone, by the bit. The pictures are saved as a sheet.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from streamflow import StreamFlow
from streamflow._command_line import Parser, at_least
from streamflow.image_utils import image_grid, postprocess_image
from streamflow.parallel.distributed import Remote, local_device, served
from streamflow.parallel.plan import shares
from streamflow.pretrained import EXAMPLE_PROMPTS, embedded

STEPS = 4


def arguments() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--frames", type=at_least(1), default=16, help="how many pictures (default 16)")
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


def latents(stream: StreamFlow, frames: int) -> Iterator[Tensor]:
    """Finished latents `[1, ...]`, each frame with a prompt of its own, from the same noise at every call."""
    stream.prepare(EXAMPLE_PROMPTS[0], num_inference_steps=STEPS, max_sequence_length=0)
    for k in range(frames):
        stream.update_prompt(EXAMPLE_PROMPTS[k % len(EXAMPLE_PROMPTS)], scope="frame")
        done = stream.predict_x0_batch(stream.frame_noise(k))
        if done is not None:
            yield done
    yield from stream.flush()


def timed(pictures: Iterator[Tensor]) -> tuple[Tensor, float]:
    """(all pictures, pictures a second)."""
    start = time.perf_counter()
    drawn = torch.cat(list(pictures)).cpu()
    return drawn, len(drawn) / (time.perf_counter() - start)


def compare(stream: StreamFlow, remote: Remote, frames: int) -> tuple[Tensor, bool]:
    """(the pictures, whether the ranks together drew what this one draws alone); prints the rates."""
    decode, count = stream.codec.decode, len(remote.ranks)
    alone, rate_alone = timed(decode(x) for x in latents(stream, frames))
    by_frame, rate = timed(remote.frames("decoder", latents(stream, frames)))
    print(f"draw and decode, this rank alone:  {rate_alone:7.2f} pictures/s")
    print(f"draw here, decode on {count - 1} other(s):  {rate:7.2f} pictures/s")
    batch = torch.cat(list(latents(stream, frames)))
    parts = [batch[share.start : share.stop] for share in shares(len(batch), count) if share]
    in_parts, rate_parts = timed(decode(part) for part in parts)
    by_row, rate_rows = timed(remote.decoder(whole) for whole in (batch,))
    print(f"decode a batch, this rank alone:   {rate_parts:7.2f} pictures/s")
    print(f"decode a batch, rows on {count} rank(s):  {rate_rows:7.2f} pictures/s")
    return by_frame, torch.equal(by_frame, alone) and torch.equal(by_row, in_parts)


@torch.no_grad()
def main() -> int:
    """Exit code 0, or 1 where the pictures differ."""
    a = arguments()
    stream = make_stream()
    decoder = stream.codec.decoder
    decoder(torch.zeros(1, *stream.frame_noise(0).shape[1:], device=stream.device))  # the first call takes longest
    with served({"decoder": decoder}, timeout=a.timeout) as remote:
        if remote is None:
            return 0
        print(f"ranks {', '.join(map(str, remote.ranks))}; rank 0 on {stream.device}")
        pictures, equal = compare(stream, remote, a.frames)
    a.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(postprocess_image(pictures, "pil")).save(a.output)
    print(f"{len(pictures)} pictures, the same to the bit: {'yes' if equal else 'NO'}; saved {a.output}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
