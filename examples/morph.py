"""One picture turns into another: the prompts' blend moves from the first to the second while the noise stays.

    python examples/morph.py
    python examples/morph.py --prompt "a fox, 3d render" --to "a ghost, 3d render" --frames 48 --blend linear

Writes an animated GIF that goes there and back, and with `--sheet` all frames side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from streamflow import StreamFlowWrapper
from streamflow.blending import METHODS
from streamflow.command_line import Parser, at_least
from streamflow.image_utils import image_grid, postprocess_image


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", default="a red apple, 3d render", help="the first (default: %(default)s)")
    p.add_argument("--to", default="a tangerine, 3d render", help="the second (default: %(default)s)")
    p.add_argument("--frames", type=at_least(2), default=30, help="from the one to the other (default %(default)s)")
    p.add_argument("--steps", type=at_least(1), default=4, help="default %(default)s")
    p.add_argument("--blend", choices=METHODS, default="slerp", help="default: %(default)s")
    p.add_argument("--seed", type=int, default=2, help="default %(default)s")
    p.add_argument("--model", default="embedded", help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("outputs/morph.gif"), help="default: %(default)s")
    p.add_argument("--sheet", type=Path, help="also all frames side by side")
    return p.parse_args(argv)


def morph(a: argparse.Namespace) -> Iterator[Image.Image]:
    """The frames, from the first prompt to the second."""
    wrapper = StreamFlowWrapper(
        a.model, range(a.steps), mode="txt2img", cfg_type="none", acceleration="none", seed=a.seed, warmup=0
    )
    with wrapper:
        wrapper.prepare([(a.prompt, 1.0), (a.to, 0.0)], num_inference_steps=a.steps, blend=a.blend)
        stream = wrapper.stream
        noise = stream.frame_noise(0)
        drawn = []
        for k in range(a.frames):
            share = k / (a.frames - 1)
            stream.update(prompt_weights=[1 - share, share], scope="frame")
            drawn.append(stream.predict_x0_batch(noise))
        for latents in [x for x in drawn if x is not None] + stream.flush():
            yield postprocess_image(stream.decode_image(latents))[0]


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 for arguments that cannot be."""
    a = arguments(argv)
    frames = list(morph(a))
    there_and_back = frames + frames[-2:0:-1]
    a.output.parent.mkdir(parents=True, exist_ok=True)
    there_and_back[0].save(a.output, save_all=True, append_images=there_and_back[1:], duration=60, loop=0)
    if a.sheet:
        image_grid(frames, columns=10).save(a.sheet)
    print(f"wrote {a.output}: {len(frames)} frames from {a.prompt!r} to {a.to!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
