"""Measures a folder that train.py wrote, with the plain diffusers pipeline, on the concepts that training did not see.

    python examples/train_edit/evaluate.py --data .cache/edit/data --model .cache/edit/model --json .cache/edit/model.json

`styles`: the reference is a held-out concept in one style, the target the same concept in another style with its outline.
`doodles`: the reference is a doodle of a held-out image. `outline` is the intersection over union of the foregrounds of
output and target, and `style` how often the output is nearer to its target than to the concept in any other style, all
moved onto the target's place. `reference_style` is the same for the reference itself, and `vae_style` for the target
after encoding and decoding: the least and the most to expect. Targets whose foreground a white background hides are left
out. `seconds` is an image on this device, at batch 1. With --sheets, contact sheets are written: references, outputs and
targets, and ten doodles drawn with ImageDraw in every style.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import emoji_modules
import torch
import torch.nn.functional as F
from captions import STYLES, canonical
from diffusers import Flux2KleinPipeline
from doodles import doodle
from edit_model import TOKENS
from hand_drawn import DOODLES, draw
from pack import Pack, read_pack
from pack_data import NAME
from pairs import find_partners, on_paper, onto, overlap, placed, split
from PIL import Image, ImageDraw
from scores import COMPARED, foreground, nearest, outline_agreement

SEEN = 0.95  # least agreement of a target's foreground with its own mask


def to_pil(image: torch.Tensor) -> Image.Image:
    """[3, H, W] in [0, 1]"""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def evenly(things: list, most: int) -> list:
    """At most `most` of some things, evenly spread; all of them where it is 0."""
    return things if not most or len(things) <= most else [things[int(i * len(things) / most)] for i in range(most)]


@dataclass(frozen=True)
class Case:
    """A reference [3, H, W] in [0, 1], its target, the target's image in the pack and the reference's style."""

    reference: torch.Tensor
    target: torch.Tensor
    row: int
    source: str


class Judge:
    """The held-out images, and what an output is compared with."""

    def __init__(self, pack: Pack):
        self.pack, self.styles = pack, list(STYLES)
        self.partners = find_partners(pack)
        self.known: dict[int, torch.Tensor] = {}  # candidates by row
        self.still = torch.eye(2, 3)[None]
        layers = placed(pack.rgba, self.still.expand(len(pack.rows), -1, -1))
        self.images = on_paper(layers, torch.ones(1, 3))
        self.layers, self.masks = layers, layers[:, 3:] > 0.5
        self.visible = (overlap(foreground(self.images), self.masks) >= SEEN).tolist()

    def moved(self, row: int, k: int) -> tuple[torch.Tensor, int]:
        """Partner k of an image, moved onto it, and the partner's row."""
        other = int(self.partners.index[row, k])
        place = onto(self.partners.align[row, k][None], self.still)
        return on_paper(placed(self.pack.rgba[other][None], place), torch.ones(1, 3))[0], other

    def style_cases(self, most: int = 0) -> list[Case]:
        """A case for every partner of every image; with `most`, at most so many, evenly spread."""
        which = [(row, k) for row, seen in enumerate(self.visible) if seen for k in range(int(self.partners.count[row]))]
        cases = []
        for row, k in evenly(which, most):
            reference, other = self.moved(row, k)
            cases.append(Case(reference, self.images[row], row, self.pack.rows[other]["style"]))
        return cases

    def doodle_cases(self, most: int = 0) -> list[Case]:
        """A doodle of every image, the same ones every time."""
        cases = []
        for row in evenly([row for row, seen in enumerate(self.visible) if seen], most):
            torch.manual_seed(row)
            reference = doodle(self.layers[row][None], torch.ones(1, 3))[0]
            cases.append(Case(reference, self.images[row], row, "doodle"))
        return cases

    def candidates(self, row: int) -> torch.Tensor:
        """The concept of an image in each of the styles [K, 3, 64, 64], moved onto the image; NaN where it has no such."""
        if row in self.known:
            return self.known[row]
        found = torch.full((len(self.styles), *self.images.shape[1:]), torch.nan)
        found[self.styles.index(self.pack.rows[row]["style"])] = self.images[row]
        for k in range(int(self.partners.count[row])):
            image, other = self.moved(row, k)
            found[self.styles.index(self.pack.rows[other]["style"])] = image
        self.known[row] = F.adaptive_avg_pool2d(found, COMPARED)
        return self.known[row]

    def right_style(self, images: torch.Tensor, cases: list[Case]) -> torch.Tensor:
        """Bool [N]: nearest to the concept in the target's style."""
        found = nearest(images, torch.stack([self.candidates(case.row) for case in cases]))
        wanted = [self.styles.index(self.pack.rows[case.row]["style"]) for case in cases]
        return found == torch.tensor(wanted)


@dataclass(frozen=True)
class Bench:
    pipe: Flux2KleinPipeline
    steps: int
    tokens: int

    def edit(self, image: Image.Image, prompt: str, seed: int) -> torch.Tensor:
        """[3, H, W] in [0, 1], from noise that is drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        images = self.pipe(
            image, prompt, num_inference_steps=self.steps, guidance_scale=1.0, max_sequence_length=self.tokens,
            generator=generator, output_type="pt",
        ).images  # fmt: skip
        return images[0].float().cpu()

    def edits(self, judge: Judge, cases: list[Case], named: bool) -> torch.Tensor:
        rows = [judge.pack.rows[case.row] for case in cases]
        prompts = [canonical(row) if named else STYLES[row["style"]] for row in rows]
        return torch.stack([self.edit(to_pil(case.reference), prompts[i], i) for i, case in enumerate(cases)])

    @torch.no_grad()
    def through_vae(self, images: torch.Tensor) -> torch.Tensor:
        vae, found = self.pipe.vae, []
        for some in images.split(16):
            latent = vae.encode((some * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
            found.append(vae.decode(latent).sample.float().cpu() / 2 + 0.5)
        return torch.cat(found).clamp(0, 1)

    def measure(self, judge: Judge, cases: list[Case], named: bool) -> tuple[dict, torch.Tensor]:
        """The report of some cases, and the outputs."""
        outputs = self.edits(judge, cases, named)
        targets = torch.stack([case.target for case in cases])
        references = torch.stack([case.reference for case in cases])
        device = self.pipe.device
        agreement = outline_agreement(outputs.to(device), targets.to(device)).cpu()
        style = judge.right_style(outputs, cases).float()
        tables: dict[str, list[int]] = {}
        for i, case in enumerate(cases):
            tables.setdefault(f"{case.source} to {judge.pack.rows[case.row]['style']}", []).append(i)
        report = {
            "cases": len(cases),
            "outline": agreement.mean().item(),
            "outline_lowest_tenth": agreement.quantile(0.1).item(),
            "style": style.mean().item(),
            "reference_outline": outline_agreement(references.to(device), targets.to(device)).mean().item(),
            "reference_style": judge.right_style(references, cases).float().mean().item(),
            "vae_style": judge.right_style(self.through_vae(targets), cases).float().mean().item(),
            "by_styles": {
                name: {"cases": len(some), "outline": agreement[some].mean().item(), "style": style[some].mean().item()}
                for name, some in sorted(tables.items())
            },
        }
        return rounded(report), outputs

    def seconds(self, rounds: int) -> dict:
        """Of an image: reading the prompt, encoding the reference, the steps, decoding."""
        image, taken = draw("a house"), []
        for i in range(rounds + 2):
            began = time.perf_counter()
            self.edit(image, "a house, 3d render", i)
            taken.append(time.perf_counter() - began)
        taken = sorted(taken[2:])
        return {
            "median": round(statistics.median(taken), 4), "p95": round(taken[int(0.95 * len(taken))], 4), "rounds": rounds,
            "device": str(self.pipe.device), "threads": torch.get_num_threads(), "steps": self.steps,
        }  # fmt: skip


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def sheet(columns: list[list[Image.Image]], heads: list[str], names: list[str]) -> Image.Image:
    """Columns of images with a head each, the name of a row under its images."""
    size, text = columns[0][0].width, 16
    found = Image.new("RGB", (len(columns) * (size + 4), text + len(names) * (size + text)), "white")
    pen = ImageDraw.Draw(found)
    for x, (images, head) in enumerate(zip(columns, heads, strict=True)):
        pen.text((x * (size + 4) + 4, 2), head, fill="black")
        for y, image in enumerate(images):
            found.paste(image, (x * (size + 4), text + y * (size + text)))
    for y, name in enumerate(names):
        pen.text((4, text + y * (size + text) + size + 1), name, fill="black")
    return found


def drawn_sheet(bench: Bench) -> Image.Image:
    """Every hand-drawn doodle in every style, and in two styles without its name."""
    doodles = [draw(name) for name in DOODLES]
    prompts = [(f"{style}, named", lambda name, style=style: f"{name}, {style}") for style in STYLES.values()]
    prompts += [(style, lambda name, style=style: style) for style in list(STYLES.values())[:2]]
    columns = [
        [to_pil(bench.edit(image, prompt(name), i)) for i, (name, image) in enumerate(zip(DOODLES, doodles, strict=True))]
        for _, prompt in prompts
    ]
    return sheet([doodles, *columns], ["doodle", *(head for head, _ in prompts)], list(DOODLES))


def evaluate(args) -> dict:
    pipe = Flux2KleinPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(pipe, args.steps, args.tokens)
    _, held_out = split(read_pack(args.data / NAME), emoji_modules.HOLDOUT)
    judge = Judge(held_out)
    report = {"steps": args.steps, "tokens": args.tokens, "images_left_out": judge.visible.count(False)}
    all_cases = {"styles": judge.style_cases(args.most), "doodles": judge.doodle_cases(args.most)}
    for name, cases in all_cases.items():
        for named in (False, True):
            section = f"{name}, {'named' if named else 'style alone'}"
            report[section], outputs = bench.measure(judge, cases, named)
            print(section, json.dumps({k: v for k, v in report[section].items() if k != "by_styles"}), flush=True)
            if args.sheets:
                some = evenly(list(range(len(cases))), 16)
                columns = [[to_pil(cases[i].reference) for i in some], [to_pil(outputs[i]) for i in some],
                           [to_pil(cases[i].target) for i in some]]  # fmt: skip
                rows = [judge.pack.rows[cases[i].row] for i in some]
                names = [f"{cases[i].source}: {row['label']}" for i, row in zip(some, rows, strict=True)]
                path = args.sheets / f"{name}_{'named' if named else 'style'}.png"
                sheet(columns, ["reference", "output", "target"], names).save(path)
    if args.sheets:
        drawn_sheet(bench).save(args.sheets / "drawn.png")
    return report | {"seconds": bench.seconds(args.rounds)}


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"the folder with {NAME}")
    parser.add_argument("--model", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    parser.add_argument("--sheets", type=Path, help="write contact sheets into this folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="max_sequence_length; 512 is the pipeline's default")
    parser.add_argument("--most", type=int, default=0, help="at most so many cases of each kind, evenly spread (0: all)")
    parser.add_argument("--rounds", type=int, default=30, help="images that are timed")
    return parser.parse_args(given)


if __name__ == "__main__":
    arguments = parsed()
    torch.backends.cudnn.allow_tf32 = False  # float32 on a GPU too
    if arguments.sheets:
        arguments.sheets.mkdir(parents=True, exist_ok=True)
    result = json.dumps(evaluate(arguments), indent=1)
    if arguments.json:
        arguments.json.write_text(result + "\n")
    print(result)
