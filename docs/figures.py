"""Draw the sheets of images that the guides show, with the embedded models on a CPU.

    python docs/figures.py [sound|video]

Writes guidance.webp, steps.webp, strength.webp, mistakes.webp, control-images.webp, sound.webp and embedded-video.webp to
docs/static/, or one of the last two alone.
Needs matplotlib (env/install.py --bench) and OpenCV (env/install.py --control-images).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamflow import StreamFlowWrapper, VideoStream, models
from streamflow.conditioning.control_makers import ControlMaker
from streamflow.live.remote.sound import SoundAnalysis
from streamflow.pretrained import EXAMPLE_VIDEO_PROMPTS
from streamflow.samples import IMAGE

STATIC = Path(__file__).parent / "static"
SIZE, MARGIN, CAPTION, COLUMNS = 160, 10, 48, 3


def draw(prompt: str, *, steps: int = 4, image: Path | None = None, **options: Any) -> Image.Image:
    """One image; `options` are those of the wrapper and of `prepare`."""
    prepare = {name: options.pop(name) for name in ("strength", "guidance_scale", "negative_prompt") if name in options}
    mode = "txt2img" if image is None else "img2img"
    with StreamFlowWrapper("embedded", mode=mode, warmup=0, **{"cfg_type": "none", **options}) as wrapper:
        wrapper.prepare(prompt, num_inference_steps=steps, **prepare)
        return wrapper(str(image)) if image else wrapper()


def sheet(images: dict[str, Image.Image], name: str) -> None:
    """The images on white in rows of `COLUMNS`, each above its caption."""
    rows, wide, high = -(-len(images) // COLUMNS), SIZE + MARGIN, SIZE + MARGIN + CAPTION
    page = Image.new("RGB", (COLUMNS * wide + MARGIN, rows * high + MARGIN), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=16)
    for k, (caption, image) in enumerate(images.items()):
        x, y = MARGIN + k % COLUMNS * wide, MARGIN + k // COLUMNS * high
        page.paste(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS), (x, y))
        pen.rectangle((x - 1, y - 1, x + SIZE, y + SIZE), outline="#d0d7de")
        pen.multiline_text((x, y + SIZE + 3), caption, fill="#222222", font=font)
    page.save(STATIC / name, quality=88)


def drums(bpm: float, seconds: float, rate: int) -> np.ndarray:
    """A bass drum and a snare in turn, with a hi-hat between, in mono."""
    t, rng, samples = np.arange(rate) / rate, np.random.default_rng(0), np.zeros(round((seconds + 1) * rate))
    bass = 0.8 * np.sin(2 * np.pi * (50 * t - 3 * np.exp(-t / 0.02))) * np.exp(-t / 0.08)
    snare = 0.3 * rng.standard_normal(len(t)) * np.exp(-t / 0.05)
    hat = 0.12 * np.diff(rng.standard_normal(len(t) + 1)) * np.exp(-t / 0.015)
    for k, at in enumerate(np.arange(0.2, seconds, 30 / bpm)):
        samples[round(at * rate) :][: len(t)] += hat if k % 2 else bass if k % 4 == 0 else snare
    return samples[: round(seconds * rate)].astype(np.float32)


def sound(bpm: float = 110, seconds: float = 7, rate: int = 44100) -> None:
    """What is found in drums, block by block: onsets over the waveform, bands, and the phase of the beat."""
    import matplotlib.pyplot as plt

    samples, found, rows = drums(bpm, seconds, rate), SoundAnalysis(rate), []
    for at in range(0, len(samples), found.hop):
        found.feed(samples[at : at + found.hop])
        beat = np.nan if found.tempo is None else found.beat(found.seconds)
        rows.append((found.seconds, found.low, found.mid, found.high, beat))
    time, *bands, beat = np.array(rows).T
    beat[1:][np.diff(beat) < -0.5] = np.nan  # no line from the end of a beat to the next
    figure, (wave, levels, phase) = plt.subplots(
        3, sharex=True, figsize=(10, 5.2), height_ratios=(3, 2, 2), layout="constrained"
    )
    wave.plot(np.arange(0, len(samples), 20) / rate, samples[::20], color="#8c959f", linewidth=0.6)
    wave.vlines(found.onsets, -1, 1, color="#cf222e", linewidth=1, label="onsets")
    wave.set(ylim=(-1, 1), ylabel="samples", xlim=(0, seconds))
    wave.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for name, values, color in zip(("low", "mid", "high"), bands, ("#0969da", "#1a7f37", "#bf8700"), strict=True):
        levels.plot(time, values, color=color, linewidth=1.2, label=name)
    levels.set(ylim=(0, 1), ylabel="bands")
    levels.legend(loc="upper left", bbox_to_anchor=(1, 1))
    phase.plot(time, beat, color="#8250df", linewidth=1.4)
    phase.set(ylim=(0, 1), ylabel="beat", xlabel=f"seconds; {bpm:g} BPM are played, {found.tempo:.1f} are found at the end")
    with io.BytesIO() as png:
        figure.savefig(png, format="png", dpi=110)
        Image.open(png).convert("RGB").save(STATIC / "sound.webp", quality=88)


def control_images() -> None:
    """An image and what the makers without a model make of it."""
    image = Image.open(IMAGE).convert("RGB")
    sheet({"the input": image, **{name: ControlMaker(name)(image) for name in ("canny", "lineart")}}, "control-images.webp")


def video(cell: int = 84, columns: int = 9, step: int = 8) -> None:
    """Streams of the embedded video model: a row for each prompt, every eighth frame. In the last one the prompt changes
    after the fourth image."""
    swaying, pulsing = "a hamburger, 3d render, swaying", "a hamburger, 3d render, on a pink background, pulsing"
    rows = [(prompt, prompt) for prompt in EXAMPLE_VIDEO_PROMPTS if prompt != swaying] + [(swaying, pulsing)]
    page = Image.new("RGB", (columns * cell, len(rows) * (cell + 24)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    with VideoStream(models.load("embedded-video")) as stream:
        for k, (first, second) in enumerate(rows):
            stream.prepare(first)
            frames = list(stream.frames(4 * step))
            stream.update_prompt(second)
            frames += stream.frames((columns - 4) * step)
            y = k * (cell + 24)
            pen.text((4, y + 3), first if first == second else f"{first}, then {second}", fill="#222222", font=font)
            for column, frame in enumerate(frames[::step]):
                page.paste(frame.image.resize((cell, cell), Image.Resampling.LANCZOS), (column * cell, y + 24))
    page.save(STATIC / "embedded-video.webp", quality=88)


def main() -> int:
    alone = {"sound": sound, "video": video}
    for name in sys.argv[1:] or alone:
        alone[name]()
    if sys.argv[1:]:
        return 0
    apple, fox = "a red apple, 3d render", "a fox, 3d render"
    guided = {"negative_prompt": "flat vector", "guidance_scale": 1.2, "image": IMAGE, "strength": 0.75}
    sheet(
        {
            "the input": Image.open(IMAGE),
            "none": draw("a tangerine, 3d render", image=IMAGE, strength=0.75),
            **{kind: draw("a tangerine, 3d render", cfg_type=kind, **guided) for kind in ("full", "self", "initialize")},
        },
        "guidance.webp",
    )
    sheet({f"{n} step{'s' * (n > 1)}": draw(fox, steps=n) for n in (1, 2, 4)}, "steps.webp")
    strengths = (0.25, 0.5, 0.75, 1.0)
    sheet(
        {
            "the input": Image.open(IMAGE),
            **{f"strength {s}": draw("a tangerine, 3d render", image=IMAGE, strength=s) for s in strengths},
        },
        "strength.webp",
    )
    sheet(
        {
            "as it should be": draw(apple),
            "text, late steps:\nt_index_list=[2, 3]": draw(apple, t_index_list=[2, 3]),
            "too much guidance:\nguidance_scale=8": draw(apple, cfg_type="full", guidance_scale=8.0),
            'an unknown prompt:\n"a street at night"': draw("a street at night"),
            "the image is ignored:\nstrength=1": draw(fox, image=IMAGE, strength=1.0),
        },
        "mistakes.webp",
    )
    control_images()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
