"""Measures a folder that train.py wrote, with the plain diffusers pipeline.

    python examples/train_video/evaluate.py --model .cache/video/model --json .cache/video/model.json --sheets .cache/video

`vae`: dB of held-out chunks after encoding and decoding. `next`: dB of the chunk that follows a true history, of named and
of held-out images, beside that of the VAE alone and of the last image repeated. `streams`: what is drawn from prompts alone,
`--chunks` chunks of it; `images`: what is drawn from an image of a held-out concept; `long`: the same as `streams`, over
`--long` chunks. For these,

- `right` is how often an image is nearest to the concept of its prompt, of all that are compared, each in all poses of its
  motion, after the first chunk, in the middle and at the end; `near` is the distance to that concept in dB, at 32 x 32;
- `border` is the mean change from image to image at the borders of chunks, by that inside of chunks; `true_border` is that
  of true clips; `moving` is the mean change in the last tenth of the chunks by that in the first tenth;
- `mean` and `contrast` are how far the mean and the standard deviation of the images move from the first tenth to the last,
  in values of 0 to 1.

`seconds` is a chunk at batch 1 on this device. With --sheets, contact sheets and an animation are written.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import emoji_folder  # noqa: F401
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS
from clips import (
    CHUNKS,
    IMAGES,
    MOTIONS,
    PERIODS,
    SPEEDS,
    Scenes,
    frames_of,
    held_out,
    poses,
    prompt_of,
    render,
    training_images,
)
from diffusers import HeliosPipeline
from pack import Pack, background_rgb, compose, placement, read_pack
from PIL import Image, ImageDraw
from video_model import CALL, LATENTS, Codec, embeddings

SMALL = 32  # pixels of a side at which images are compared
PHASES = 24  # poses of a motion that are compared


def decibels(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of images in [-1, 1], [B, ...]: the mean of their PSNR."""
    error = ((made - wanted) / 2).square().flatten(1).mean(1).clamp(min=1e-10)
    return round(float(-10 * torch.log10(error).mean()), 2)


@dataclass(frozen=True)
class Case:
    """What is drawn: a row of the pack, its motion, speed and background."""

    row: int
    motion: str
    speed: str
    background: str

    def prompt(self, pack: Pack, named: bool) -> str:
        return prompt_of(pack.rows[self.row], self.motion, self.speed, self.background, named)


def some_cases(rows: list[int], most: int) -> list[Case]:
    """`most` of these rows, evenly spread, with all motions, speeds and some backgrounds in turn."""
    chosen = [rows[int(i * len(rows) / min(most, len(rows)))] for i in range(min(most, len(rows)))]
    grounds = ("white", "sky blue", "white", "lavender", "white", "mint", "white", "navy")
    return [
        Case(row, MOTIONS[1 + i % (len(MOTIONS) - 1)], list(SPEEDS)[i // 5 % len(SPEEDS)], grounds[i % len(grounds)])
        for i, row in enumerate(chosen)
    ]


class Bench:
    def __init__(self, pipe: HeliosPipeline, pack: Pack, named: int):
        self.pipe, self.named, self.device = pipe, named, pipe._execution_device
        self.pack = Pack(pack.rows, pack.rgba.to(self.device))
        self.codec = Codec.of(pipe.vae)
        layers = self.pack.rgba.float()
        layers = torch.cat([layers[:, :3] * layers[:, 3:] / 255, layers[:, 3:]], 1)
        small = F.adaptive_avg_pool2d(layers, SMALL)
        colour = small[:, :3] * 255 / small[:, 3:].clamp(min=1)
        self.small = torch.cat([colour, small[:, 3:]], 1).clamp(0, 255)

    # -- truth -------------------------------------------------------------------------------------------------------------

    def true(self, cases: list[Case], first: torch.Tensor, count: int) -> torch.Tensor:
        """True images [B, 3, count, 128, 128] in [-1, 1] from frame `first` [B] on."""

        def both(values, dtype=torch.long):
            return torch.tensor(values, dtype=dtype, device=self.device)[:, None].expand(-1, 2)

        motion = [MOTIONS.index(case.motion) for case in cases]
        speed = [list(SPEEDS).index(case.speed) for case in cases]
        period = [PERIODS[m] * SPEEDS[case.speed] for m, case in zip(motion, cases, strict=True)]
        nothing = [0.0] * len(cases)
        ground = both([list(BACKGROUNDS).index(case.background) for case in cases])
        still, row = both(nothing, torch.float32), both([case.row for case in cases])
        switch = torch.full((len(cases),), 10**6, device=self.device)
        scenes = Scenes(row, ground, both(motion), both(speed), still, both(period, torch.float32), still + 1, switch)
        time = first.to(self.device)[:, None] + frames_of(count, self.device)
        return render(self.pack.rgba, background_rgb(list(BACKGROUNDS), self.device), scenes, time)

    @torch.no_grad()
    def vae(self, cases: list[Case]) -> float:
        chunks = self.true(cases, torch.arange(len(cases)) * 5, IMAGES)
        return decibels(self.codec.decode(self.codec.encode(chunks)), chunks)

    @torch.no_grad()
    def next(self, cases: list[Case], named: bool) -> dict:
        """The chunk after six true ones."""
        past = 6
        clip = self.true(cases, torch.zeros(len(cases)), (past + 1) * IMAGES)
        chunks = clip.unflatten(2, (past + 1, IMAGES)).transpose(1, 2).flatten(0, 1)
        latents = self.codec.encode(chunks).unflatten(0, (len(cases), past + 1)).transpose(1, 2).flatten(2, 3)
        known, wanted = latents[:, :, :-LATENTS], clip[:, :, -IMAGES:]
        drawn = self.call(
            cases, named, 1, output_type="latent", image_latents=known[:, :, :1], video_latents=known,
            add_noise_to_image_latents=False, add_noise_to_video_latents=False,
        )  # fmt: skip
        return {
            "drawn": decibels(self.codec.decode(drawn[:, :, -LATENTS:]), wanted),
            "vae": decibels(self.codec.decode(latents[:, :, -LATENTS:]), wanted),
            "repeated": decibels(clip[:, :, -IMAGES - 1 : -IMAGES].expand_as(wanted), wanted),
        }

    # -- what is drawn -----------------------------------------------------------------------------------------------------

    def call(self, cases: list[Case], named: bool, chunks: int, **more) -> torch.Tensor:
        embeds = embeddings(self.pipe, [case.prompt(self.pack, named) for case in cases])
        generator = torch.Generator(self.device).manual_seed(0)
        return self.pipe(prompt_embeds=embeds, num_frames=chunks * IMAGES, generator=generator, **CALL, **more).frames

    def stream(self, cases: list[Case], named: bool, chunks: int) -> torch.Tensor:
        """Images [B, T, 3, 128, 128] in [0, 1]; with `named` of the prompts alone, else from their first true image."""
        if named:
            return self.call(cases, True, chunks, output_type="pt")
        first = self.true(cases, torch.zeros(len(cases)), 1)[:, :, 0]
        image = first / 2 + 0.5
        return self.call(cases, False, chunks, output_type="pt", image=image)

    def distances(self, images: torch.Tensor, case: Case, rows: list[int]) -> torch.Tensor:
        """Mean squared distance [N, K] of images [N, 3, 128, 128] in [0, 1] to each of these rows, in its nearest pose."""
        motion = torch.full((PHASES,), MOTIONS.index(case.motion), device=self.device)
        angle = torch.arange(PHASES, device=self.device) * 2 * math.pi / PHASES * (2 if case.motion == "bouncing" else 1)
        right, down, turn, scale = poses(motion, angle, torch.ones_like(angle)).unbind(-1)
        place = placement(scale, torch.stack([right, down], -1), turn)
        ground = background_rgb([case.background], self.device)
        many = self.small[rows].repeat_interleave(PHASES, 0)
        candidates = compose(many, ground, place.repeat(len(rows), 1, 1)) / 2 + 0.5
        found = F.adaptive_avg_pool2d(images, SMALL).flatten(1)
        squares = torch.cdist(found, candidates.flatten(1)).square() / found.shape[1]
        return squares.unflatten(1, (len(rows), PHASES)).amin(2)

    def judged(self, images: torch.Tensor, cases: list[Case], rows: list[int]) -> dict:
        """The report of streams [B, T, 3, 128, 128]."""
        last = images.shape[1] - 1
        at = [IMAGES - 1, last // 2, last]
        off = [self.distances(some[at], case, rows) for some, case in zip(images, cases, strict=True)]
        index = torch.tensor([rows.index(case.row) for case in cases], device=self.device)
        off = torch.stack(off)  # [B, 3, K]
        own = off.gather(2, index[:, None, None].expand(-1, len(at), 1))[..., 0]
        tenth = max(1, last // IMAGES // 10) * IMAGES
        change = images.diff(dim=1).abs().mean((2, 3, 4))
        early, late = images[:, :tenth], images[:, -tenth:]
        border, true_border = (by_border(one) for one in (change, self.true_change(cases, 4 * IMAGES)))
        return {
            "right": [round(float(one), 3) for one in (off.argmin(2) == index[:, None]).float().mean(0)],
            "near": [round(float(one), 2) for one in (-10 * torch.log10(own)).mean(0)],
            "border": border,
            "true_border": true_border,
            "moving": round(float(change[:, -tenth:].mean() / change[:, :tenth].mean()), 3),
            "mean": round(float((late.mean((1, 2, 3, 4)) - early.mean((1, 2, 3, 4))).abs().mean()), 4),
            "contrast": round(float((late.std((2, 3, 4)).mean(1) - early.std((2, 3, 4)).mean(1)).abs().mean()), 4),
        }

    def true_change(self, cases: list[Case], frames: int) -> torch.Tensor:
        clip = self.true(cases, torch.zeros(len(cases)), frames) / 2
        return clip.diff(dim=2).abs().mean((1, 3, 4))

    def seconds(self, case: Case, chunks: int = 3) -> float:
        taken = []
        for _ in range(chunks):
            began = time.perf_counter()
            self.call([case], True, 1, output_type="pt").sum().item()
            taken.append(time.perf_counter() - began)
        return round(statistics.median(taken), 3)


def by_border(change: torch.Tensor) -> float:
    """Changes [B, T - 1] from image to image: their mean at the borders of chunks by that inside."""
    border = torch.arange(1, change.shape[1] + 1, device=change.device) % IMAGES == 0
    if not border.any():
        return 1.0
    return round(float(change[:, border].mean() / change[:, ~border].mean()), 3)


# -- what is looked at -----------------------------------------------------------------------------------------------------


def to_pil(image: torch.Tensor) -> Image.Image:
    """[3, H, W] in [0, 1]"""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def sheet(images: torch.Tensor, labels: list[str], columns: list[int], cell: int = 96) -> Image.Image:
    """Rows of streams [B, T, 3, H, W] at the frames `columns`, each under its prompt."""
    whole = Image.new("RGB", (cell * len(columns), (cell + 14) * len(labels)), "white")
    pen = ImageDraw.Draw(whole)
    for i, label in enumerate(labels):
        pen.text((2, i * (cell + 14) + 1), f"{label}   (images {', '.join(map(str, columns))})", fill="black")
        for k, column in enumerate(columns):
            whole.paste(to_pil(images[i, column]).resize((cell, cell)), (k * cell, i * (cell + 14) + 14))
    return whole


def animate(images: torch.Tensor, path: Path, cell: int = 96) -> None:
    """Streams [B, T, 3, H, W] beside each other, as a GIF."""
    side = math.ceil(len(images) ** 0.5)
    small = F.interpolate(images.flatten(0, 1), (cell, cell), mode="area").unflatten(0, images.shape[:2])
    frames = []
    for k in range(images.shape[1]):
        frame = Image.new("RGB", (side * cell, math.ceil(len(images) / side) * cell), "white")
        for i, some in enumerate(small):
            frame.paste(to_pil(some[k]), (i % side * cell, i // side * cell))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0)


def evaluate(args) -> dict:
    pipe = HeliosPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    whole = read_pack(args.data)
    known, named = training_images(whole, args.concepts, 1)
    held = held_out(whole)
    pack = Pack(known.rows[:named] + held.rows, torch.cat([known.rgba[:named], held.rgba]))
    bench = Bench(pipe, pack, named)
    known_rows, held_rows = list(range(named)), list(range(named, len(pack.rows)))
    known_cases, held_cases = some_cases(known_rows, args.most), some_cases(held_rows, args.most)
    report = {"device": str(args.device), "prompts": len(known_cases)}

    def note(**found) -> None:
        report.update(found)
        print(json.dumps(found), flush=True)

    note(vae=bench.vae(held_cases))
    note(next={"named": bench.next(known_cases, True), "held out": bench.next(held_cases, False)})
    streams = bench.stream(known_cases, True, args.chunks)
    note(streams=bench.judged(streams, known_cases, known_rows))
    images = bench.stream(held_cases, False, args.chunks)
    note(images=bench.judged(images, held_cases, known_rows + [case.row for case in held_cases]))
    long_cases = known_cases[:: max(1, len(known_cases) // args.few)][: args.few]
    long = bench.stream(long_cases, True, args.long)
    note(long=bench.judged(long, long_cases, known_rows))
    note(seconds=bench.seconds(known_cases[0]))
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
        few = slice(0, 16)

        def spread(count: int) -> list[int]:
            early = list(range(0, min(count, 5 * IMAGES), 4))
            return early + [count - 1] if count <= 5 * IMAGES else early[:11] + [count // 4, count // 2, count - 1]

        labels = [case.prompt(pack, True) for case in known_cases[few]]
        sheet(streams[few], labels, spread(streams.shape[1])).save(args.sheets / "streams.png")
        labels = [f"{pack.rows[case.row]['label']}: {case.prompt(pack, False)}" for case in held_cases[few]]
        sheet(images[few], labels, spread(images.shape[1])).save(args.sheets / "images.png")
        labels = [case.prompt(pack, True) for case in long_cases]
        sheet(long, labels, [int(i * (long.shape[1] - 1) / 13) for i in range(14)]).save(args.sheets / "long.png")
        animate(torch.cat([streams[:12], images[:4]])[:, : CHUNKS * IMAGES], args.sheets / "streams.gif")
    return report


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".cache/emoji/pack128.tar"), help="what train_emoji/data.py wrote")
    parser.add_argument("--model", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--most", type=int, default=60, help="prompts, and images of held-out concepts")
    parser.add_argument("--chunks", type=int, default=30, help="chunks of each")
    parser.add_argument("--few", type=int, default=8, help="prompts of the long streams")
    parser.add_argument("--long", type=int, default=200, help="chunks of each")
    parser.add_argument("--concepts", type=int, default=0, help="as in training")
    parser.add_argument("--json", type=Path, help="where the report is written")
    parser.add_argument("--sheets", type=Path, help="a folder for what is looked at")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = parsed(given)
    report = evaluate(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
