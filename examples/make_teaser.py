"""Draw an animation for the documentation: frames that ride through the denoising batch, one leaving at every call.

    python examples/make_teaser.py --output static/videos/StreamFlow_teaser.gif

The upper row shows what the batch holds after each call of the network, decoded: four frames at four noise levels, each with
a prompt of its own. The large image is the frame that has just left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from streamflow import StreamFlow
from streamflow.image_utils import postprocess_image
from streamflow.pretrained import EXAMPLE_PROMPTS, embedded

CELL, BIG, GAP, LINE = 128, 288, 16, 24
INK, FAINT, PAPER = (30, 30, 36), (140, 140, 150), (250, 250, 252)


def make_stream() -> StreamFlow:
    """Four stages of the embedded model."""
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
    stream = StreamFlow(pipe, range(4), cfg_type="none")
    stream.prepare(EXAMPLE_PROMPTS[0], num_inference_steps=4, max_sequence_length=0)
    return stream


def board(waiting: list[Image.Image], sigmas: list[float], done: Image.Image | None, prompt: str) -> Image.Image:
    """One frame of the animation."""
    width = 4 * CELL + 5 * GAP
    image = Image.new("RGB", (width, 2 * LINE + CELL + BIG + 4 * GAP), PAPER)
    pen = ImageDraw.Draw(image)
    title, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    pen.text((GAP, GAP // 2), "one call of the network moves all frames on by one step", fill=INK, font=title)
    top = GAP // 2 + LINE
    for k, sigma in enumerate(sigmas):
        x = GAP + k * (CELL + GAP)
        if k < len(waiting):
            image.paste(waiting[k].resize((CELL, CELL), Image.Resampling.LANCZOS), (x, top))
        pen.rectangle((x - 1, top - 1, x + CELL, top + CELL), outline=FAINT)
        pen.text((x + CELL // 2, top + CELL + 10), f"sigma {sigma:.2f}", fill=FAINT, font=small, anchor="mm")
    left, low = (width - BIG) // 2, top + CELL + LINE
    if done is not None:
        image.paste(done.resize((BIG, BIG), Image.Resampling.LANCZOS), (left, low))
        pen.text((width // 2, low + BIG + GAP), prompt, fill=INK, font=title, anchor="mm")
    pen.rectangle((left - 1, low - 1, left + BIG, low + BIG), outline=FAINT)
    return image


@torch.no_grad()
def animate(stream: StreamFlow, prompts: list[str]) -> list[Image.Image]:
    """One board a call: what goes in, what is in flight, what has left."""
    stages = len(stream.sub_timesteps)
    sigmas = stream.beta_prod_t_sqrt.flatten().tolist()
    boards = []
    inside: list[str] = []
    for k in tqdm(range(len(prompts) + stages - 1), unit="call"):
        prompt = prompts[k % len(prompts)]
        stream.update_prompt(prompt, scope="frame")
        noise = stream.frame_noise(k)
        inside.insert(0, prompt)
        finished = stream.predict_x0_batch(noise)
        rows = torch.cat((noise, stream.x_t_latent_buffer[: min(k + 1, stages - 1)]))
        images = postprocess_image(stream.decode_image(rows))
        done = None if finished is None else postprocess_image(stream.decode_image(finished))[0]
        leaving = inside.pop() if finished is not None else ""
        boards.append(board(images, sigmas, done, leaving))
    return boards[stages - 1 :]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, default=Path("outputs/teaser.gif"), help="default: %(default)s")
    p.add_argument("--seconds", type=float, default=0.9, help="an image is shown for, default 0.9")
    a = p.parse_args()
    boards = animate(make_stream(), list(EXAMPLE_PROMPTS))
    a.output.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [one.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for one in boards]
    first.save(a.output, save_all=True, append_images=rest, duration=round(a.seconds * 1000), loop=0, optimize=True)
    print(f"saved {a.output}: {len(boards)} frames, {a.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
