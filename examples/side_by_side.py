"""Restyle a clip while its prompt changes, and draw input and output side by side: the README's animation.

    python examples/side_by_side.py --output outputs/side-by-side.webp
    python examples/side_by_side.py --input dance.mp4 --prompt "a fox, 3d render" --prompt "a cat, 3d render"

Every prompt has the same share of the frames. `update_prompt(scope="frame")` gives each frame the prompt that was in force
when it came in, so no image mixes two prompts. Needs PyAV: pip install "streamflow-rf[video]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from streamflow import StreamFlowWrapper
from streamflow.image_utils import postprocess_image
from streamflow.io import open_source
from streamflow.samples import CLIP

SIDE, GAP, LINE = 256, 24, 40
INK, FAINT, PAPER = (30, 30, 36), (200, 200, 208), (250, 250, 252)
PROMPTS = ("a red apple, 3d render", "a green apple, 3d render", "a tangerine, 3d render", "a peach, 3d render")


def board(before: Image.Image, after: Image.Image, prompt: str) -> Image.Image:
    """One frame of the animation: the input on the left, the output on the right, the prompt below."""
    image = Image.new("RGB", (2 * SIDE + 3 * GAP, SIDE + GAP + LINE), PAPER)
    pen = ImageDraw.Draw(image)
    for k, shown in enumerate((before, after)):
        left = GAP + k * (SIDE + GAP)
        image.paste(shown.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, GAP))
        pen.rectangle((left - 1, GAP - 1, left + SIDE, GAP + SIDE), outline=FAINT)
    low = GAP + SIDE + LINE // 2
    font = ImageFont.load_default(size=16)
    pen.text((GAP + SIDE // 2, low), "input", fill=INK, font=font, anchor="mm")
    pen.text((2 * GAP + SIDE + SIDE // 2, low), prompt, fill=INK, font=font, anchor="mm")
    return image


def clip(path: Path) -> list[Image.Image]:
    """The frames of a video, in order."""
    source = open_source(str(path))
    source.open()
    frames = [Image.fromarray(one.pixels) for one in iter(source.read, None)]
    source.close()
    return frames


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, default=CLIP, help="a video (default: the sample clip)")
    p.add_argument("--model", default="embedded", help="hub id or folder (default: %(default)s)")
    p.add_argument("--prompt", action="append", help="repeat it for several (default: four of ours)")
    p.add_argument("--repeat", type=int, default=1, help="how often each prompt sees the clip (default: %(default)s)")
    p.add_argument("--stride", type=int, default=2, help="take every n-th frame (default: %(default)s)")
    p.add_argument("--seed", type=int, default=2, help="default: %(default)s")
    p.add_argument(
        "--output", type=Path, default=Path("outputs/side-by-side.webp"), help=".webp or .gif (default: %(default)s)"
    )
    a = p.parse_args(argv)
    frames = clip(a.input)[:: a.stride] * a.repeat
    chosen = a.prompt or PROMPTS
    boards = []
    with StreamFlowWrapper(a.model, [1, 2, 3], cfg_type="none", warmup=0, seed=a.seed) as wrapper:
        wrapper.prepare(chosen[0], num_inference_steps=4)

        def camera():
            for prompt in chosen:
                wrapper.stream.update_prompt(prompt, scope="frame")
                yield from frames

        shown = ((image, prompt) for prompt in chosen for image in frames)
        for frame, (image, prompt) in zip(wrapper.stream.frames(camera()), shown, strict=True):
            boards.append(board(image, postprocess_image(frame.wait().image[None])[0], prompt))
    a.output.parent.mkdir(parents=True, exist_ok=True)
    period = 1000 * a.stride // 24
    boards[0].save(a.output, save_all=True, append_images=boards[1:], duration=period, loop=0, quality=80, method=6)
    print(f"wrote {len(boards)} frames to {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
