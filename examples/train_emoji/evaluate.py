"""Measures an exported folder with the plain diffusers pipeline, and draws contact sheets.

    python examples/train_emoji/evaluate.py --model streamflow/pretrained/emoji --json
    streamflow/pretrained/emoji/evaluation.json

Recognition: an image counts when its nearest neighbour, by pixel distance at 32x32 among all training images of
its style (for a withheld concept: and the withheld ones), is the prompted concept. Noise is drawn on the CPU from the
prompt's index as the seed.
"""

import argparse
import json
import runpy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import STYLES, canonical
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from pack import Pack, background_rgb, compose, read_pack, withheld
from PIL import Image, ImageDraw
from tqdm import tqdm
from training import HERE, options

GROUPS = ("animals & nature", "food & drink", "objects", "travel & places", "activities")
STEPS = (1, 2, 4, 8, 28)


@dataclass(frozen=True)
class Question:
    """A prompt and the concept and style that its image must be nearest to, on the background it names."""

    prompt: str
    label: str
    style: str
    background: str = "white"


def seen_questions(pack: Pack, hidden: dict, count: int) -> list[Question]:
    """`count` concepts that training saw in 3d, drawn evenly from the five groups and evenly within each."""
    questions = []
    for group in GROUPS:
        rows = [r for r in pack.rows if r["style"] == "3d" and r["group"] == group and not withheld(r, hidden)]
        picked = [rows[int(i * len(rows) / (count // len(GROUPS)))] for i in range(count // len(GROUPS))]
        questions += [Question(canonical(row), row["label"], "3d") for row in picked]
    return questions


def withheld_questions(pack: Pack, hidden: dict, style: str) -> list[Question]:
    rows = [row for row in pack.rows if row["style"] == style and withheld(row, hidden)]
    return [Question(canonical(row), row["label"], style) for row in rows]


def read_question(prompt: str, pack: Pack) -> Question:
    """The question that a canonical prompt asks."""
    start, _, end = prompt.partition(", on ")
    background = end.removesuffix(" background").removeprefix("an ").removeprefix("a ") or "white"
    row = next((row for row in pack.rows if row["caption"] == start), None)
    if row is None:
        raise ValueError(f"no image of the pack is captioned {start!r}")
    return Question(prompt, row["label"], row["style"], background)


@torch.no_grad()
def draw(pipe, prompts: list[str], steps: int, zero_tokens: int = 0, guidance: float = 0.0, seed: int = 0, batch: int = 50):
    """Images [N, 3, 128, 128] in [0, 1] on the host; image i's noise comes from seed + i."""
    shape = (1, pipe.transformer.config.in_channels, 16, 16)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(prompts))])
    drawn = []
    for start in range(0, len(prompts), batch):
        few = slice(start, start + batch)
        images = pipe(
            prompts[few], num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=zero_tokens,
            latents=noise[few].to(pipe.device, pipe.dtype), output_type="pt",
        ).images  # fmt: skip
        drawn.append(images.float().cpu())
    return torch.cat(drawn)


def shrink(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, 128, 128] -> [N, 3072], the 32x32 pixels that recognition compares."""
    return F.avg_pool2d(images, images.shape[-1] // 32).flatten(1)


class Judge:
    """Names the nearest image of a pack."""

    def __init__(self, pack: Pack):
        self.pack, self.shelves = pack, {}

    def shelf(self, style: str, background: str) -> tuple[torch.Tensor, list[str]]:
        if (style, background) not in self.shelves:
            of_style = self.pack.select(lambda row: row["style"] == style)
            images = (compose(of_style.rgba, background_rgb([background], of_style.rgba.device)) + 1) / 2
            self.shelves[style, background] = shrink(images), [row["label"] for row in of_style.rows]
        return self.shelves[style, background]

    def answers(self, images: torch.Tensor, questions: list[Question]) -> list[str]:
        names = []
        for image, question in zip(shrink(images), questions, strict=True):
            pixels, labels = self.shelf(question.style, question.background)
            names.append(labels[(pixels - image).square().sum(1).argmin()])
        return names

    def score(self, images: torch.Tensor, questions: list[Question]) -> float:
        """Share named rightly, 0 to 1."""
        right = [a == q.label for a, q in zip(self.answers(images, questions), questions, strict=True)]
        return sum(right) / len(right)


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """dB of each image, pixels in [0, 1]."""
    return -10 * torch.log10((made - wanted).square().mean((1, 2, 3)) + 1e-10)


def sharpness(images: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return ((images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2).item()


def true_images(pack: Pack, questions: list[Question]) -> torch.Tensor:
    index = {(row["label"], row["style"]): i for i, row in enumerate(pack.rows)}
    rgba = pack.rgba[[index[q.label, q.style] for q in questions]]
    return (compose(rgba, background_rgb([q.background for q in questions], rgba.device)) + 1) / 2


@torch.no_grad()
def judge_vae(pipe, twin: AutoencoderTiny | None, pack: Pack) -> dict:
    """PSNR of the reconstructions of 3d images on white, and of the twin's decode against the KL decode."""
    config = pipe.vae.config
    chosen = pack.select(lambda row: row["style"] == "3d")
    own, between, latents_apart = [], [], []
    for start in range(0, len(chosen.rows), 32):
        images = compose(chosen.rgba[start : start + 32], torch.ones(1, 3)).to(pipe.device)
        mean = pipe.vae.encode(images).latent_dist.mean
        decoded = pipe.vae.decode(mean).sample.clamp(-1, 1)
        own.append(psnr((decoded + 1) / 2, (images + 1) / 2))
        if twin is not None:
            latent = (mean - config.shift_factor) * config.scaling_factor
            between.append(psnr((twin.decode(latent).sample.clamp(-1, 1) + 1) / 2, (decoded + 1) / 2))
            latents_apart.append((twin.encode(images).latents - latent).square().mean((1, 2, 3)))
    report = {"psnr_3d": torch.cat(own).mean().item(), "psnr_3d_lowest": torch.cat(own).min().item()}
    if twin is not None:
        report |= {
            "twin_psnr_to_kl_decode": torch.cat(between).mean().item(),
            "twin_latent_error": torch.cat(latents_apart).mean().sqrt().item(),
        }
    return report


def contact_sheet(columns: list[torch.Tensor], heads: list[str], names: list[str], across: int = 2) -> Image.Image:
    """Images of one prompt side by side, `across` prompts in a row, with the prompt under them."""
    size, text, head = 128, 14, 16
    width = size * len(columns)
    rows = -(-len(names) // across)
    sheet = Image.new("RGB", (width * across + 8 * (across - 1), head + rows * (size + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(names):
        left, top = (place % across) * (width + 8), head + (place // across) * (size + text)
        for column, (images, title) in enumerate(zip(columns, heads, strict=True)):
            pixels = (images[place].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (left + column * size, top))
            if place < across:
                pen.text((left + column * size + 4, 2), title, fill="black")
        pen.text((left + 4, top + size), name, fill="black")
    return sheet


def recognition(pipe, judge: Judge, pack: Pack, questions: list[Question], steps, **how) -> dict:
    """Score, PSNR to the training image and relative sharpness at each number of steps."""
    true = true_images(pack, questions)
    report = {}
    for count in tqdm(steps, desc=str(how or "recognition")):
        images = draw(pipe, [q.prompt for q in questions], count, **how)
        report[str(count)] = {
            "named": round(judge.score(images, questions), 4),
            "median_psnr_to_the_image": round(psnr(images, true).median().item(), 2),
            "sharpness_of_the_true": round(sharpness(images) / sharpness(true), 3),
        }
    return report


def write_reference(judge: Judge, path: Path) -> None:
    """16x16 pixels (uint8 [N, 768]) and labels of every 3d training image, for tests that have no pack."""
    pixels, labels = judge.shelf("3d", "white")
    pixels = F.avg_pool2d(pixels.view(-1, 3, 32, 32), 2).flatten(1)
    np.savez_compressed(path, pixels=(pixels * 255).round().byte().numpy(), labels=np.array(labels))


@dataclass(frozen=True)
class Bench:
    """What every section of the report needs."""

    args: argparse.Namespace
    pipe: StableDiffusion3Pipeline
    pack: Pack
    hidden: dict

    @cached_property
    def trained(self) -> Pack:
        return self.pack.select(lambda row: not withheld(row, self.hidden))

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.trained)

    @cached_property
    def judge_of_all(self) -> Judge:
        return Judge(self.pack)

    @cached_property
    def seen_prompts(self) -> list[Question]:
        return seen_questions(self.pack, self.hidden, self.args.prompts)

    def vae(self) -> dict:
        folder = self.args.model / "vae_tiny"
        twin = AutoencoderTiny.from_pretrained(folder).to(self.pipe.device) if folder.exists() else None
        return judge_vae(self.pipe, twin, self.trained)

    def seen(self) -> dict:
        scores = recognition(self.pipe, self.judge, self.pack, self.seen_prompts, self.args.steps)
        return {"prompts": len(self.seen_prompts), **scores}

    def seen_256_zero_tokens(self) -> dict:
        return recognition(self.pipe, self.judge, self.pack, self.seen_prompts, [4], zero_tokens=256)

    def withheld_3d(self) -> dict:
        questions = withheld_questions(self.pack, self.hidden, "3d")
        scores = recognition(self.pipe, self.judge_of_all, self.pack, questions, self.args.steps)
        return {"prompts": len(questions), **scores}

    def withheld_noto(self) -> dict:
        questions = withheld_questions(self.pack, self.hidden, "noto")
        scores = recognition(self.pipe, self.judge_of_all, self.pack, questions, [4])
        return {"prompts": len(questions), **scores}

    def styles(self) -> dict:
        """Every eighth concept of the five groups in each style, at 4 steps."""
        report = {}
        for style in STYLES:
            rows = [row for row in self.trained.rows if row["style"] == style and row["group"] in GROUPS][::8]
            questions = [Question(canonical(row), row["label"], style) for row in rows]
            report[style] = recognition(self.pipe, self.judge, self.pack, questions, [4])["4"]
        return report

    def examples(self) -> dict:
        """What the images of EXAMPLE_PROMPTS are named, and the contact sheets."""
        prompts = runpy.run_path(str(self.args.examples))["EXAMPLE_PROMPTS"]
        questions = [read_question(prompt, self.trained) for prompt in prompts]
        drawn = {count: draw(self.pipe, list(prompts), count) for count in self.args.steps}
        if self.args.sheets:
            self.draw_sheets(list(prompts), drawn)
        named = {str(count): self.judge.answers(images, questions) for count, images in drawn.items()}
        right = {count: sum(a == q.label for a, q in zip(names, questions, strict=True)) for count, names in named.items()}
        return {"prompts": prompts, "named_rightly": right, "named": named}

    def draw_sheets(self, prompts: list[str], drawn: dict[int, torch.Tensor]) -> None:
        folder = self.args.sheets
        folder.mkdir(parents=True, exist_ok=True)
        heads = [f"{count} steps" if count > 1 else "1 step" for count in drawn]
        contact_sheet([*drawn.values()], heads, prompts).save(folder / "steps.png", optimize=True)
        few = withheld_questions(self.pack, self.hidden, "3d")[::4]
        sides = [true_images(self.pack, few), *(draw(self.pipe, [q.prompt for q in few], n) for n in (4, 28))]
        sheet = contact_sheet(sides, ["never shown", "4 steps", "28 steps"], [q.prompt for q in few], 3)
        sheet.save(folder / "withheld.png", optimize=True)


SECTIONS = ("vae", "seen", "seen_256_zero_tokens", "withheld_3d", "withheld_noto", "styles", "examples")


def evaluate(args) -> dict:
    """The report's sections that `args.sections` names, over those already in `args.json`."""
    pipe = StableDiffusion3Pipeline.from_pretrained(args.model, text_encoder_3=None, tokenizer_3=None)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 on a GPU too
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(args, pipe, read_pack(args.data), json.loads(args.holdout.read_text()))
    if args.reference:
        write_reference(bench.judge, args.reference)
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    found = {name: getattr(bench, name)() for name in args.sections}
    return {name: (known | found)[name] for name in SECTIONS if name in known | found}


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the exported folder")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    parser.add_argument("--sheets", type=Path, help="write contact sheets into this folder")
    parser.add_argument("--reference", type=Path, help="write 16x16 pixels of the 3d images here, for the tests")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="measure only these anew")
    parser.add_argument("--examples", type=Path, default=HERE.parents[1] / "streamflow" / "pretrained" / "__init__.py")
    arguments = parser.parse_args()
    result = json.dumps(evaluate(arguments), indent=1)
    if arguments.json:
        arguments.json.write_text(result + "\n")
    print(result)
