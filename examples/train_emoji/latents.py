"""Encodes every training image in many ways (as it is, moved, on named backgrounds, recoloured) with captions for
each.

Writes `work/latents-<rank>.pt` per worker and the tokenizer; the flow then trains without touching an image again.

    torchrun --nproc-per-node 2 examples/train_emoji/latents.py
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from captions import BACKGROUNDS, HUES, canonical, known_share, plain_name, ways_to_ask
from networks import SHIPPED, TINY, build_vae, load_tokenizer, token_ids, train_tokenizer
from pack import Pack, background_rgb, can_recolour, compose, placement, recolour, row_weights, training_pack
from tqdm import tqdm
from training import Worker, load_average, options, worker, write_whole
from vae import encoded, read_factors

CAPTIONS = 8  # a latent
KNOWN = known_share(CAPTIONS)  # of them, the first ones, are canonical: they name one image
KINDS = {  # name: (how many of each image, share of the training draws)
    "plain": (1, 0.52),
    "moved": (4, 0.07),
    "backed": (7, 0.20),
    "moved and backed": (4, 0.09),
    "recoloured": (4, 0.08),
    "recoloured and backed": (2, 0.04),
}


@dataclass(frozen=True)
class Variant:
    """One way to show an image. An empty `colour` keeps its own."""

    row: int
    kind: str
    background: str
    colour: str


@dataclass
class Table:
    """Latents float16 [M, 16, 16, 16], scaled and shifted; token ids int16 [M, CAPTIONS, T]; weight [M]; moved bool
    [M].
    """

    latent: torch.Tensor
    ids: torch.Tensor
    weight: torch.Tensor
    moved: torch.Tensor


def other_colours(row: dict, labels: set[str]) -> list[str]:
    """Colours that the image can take without becoming another concept of the pack."""
    return [c for c in HUES if c != row["color"] and f"{c} {plain_name(row)}".lower() not in labels]


def plan(rows: list[dict], seed: int = 0) -> list[Variant]:
    rng = random.Random(seed)
    labels = {row["label"].lower() for row in rows}
    colours = [name for name in BACKGROUNDS if name != "white"]
    variants = []
    for index, row in enumerate(rows):
        for kind, (count, _) in KINDS.items():
            if "recoloured" in kind and not can_recolour(row):
                continue
            backs = rng.sample(colours, count) if "backed" in kind else ["white"] * count
            free = other_colours(row, labels)
            tints = rng.sample(free, min(count, len(free))) if "recoloured" in kind else [""] * count
            variants += [Variant(index, kind, back, tint) for back, tint in zip(backs, tints, strict=False)]
    return variants


def variant_weights(variants: list[Variant], rows: list[dict]) -> torch.Tensor:
    """How often each variant is drawn, float32 [M]: its image's weight, shared out by `KINDS`."""
    weights = row_weights(rows)
    return torch.tensor([weights[v.row].item() * KINDS[v.kind][1] / KINDS[v.kind][0] for v in variants])


def show(pack: Pack, variants: list[Variant]) -> torch.Tensor:
    """Images [B, 3, 128, 128] in [-1, 1] of some variants."""
    device = pack.rgba.device
    rgba = pack.rgba[torch.tensor([v.row for v in variants], device=device)]
    tinted = torch.tensor([bool(v.colour) for v in variants], device=device)
    if tinted.any():
        hue = torch.tensor([HUES[v.colour] for v in variants if v.colour], device=device)
        rgba[tinted] = recolour(rgba[tinted], hue)
    moved = torch.tensor(["moved" in v.kind for v in variants], device=device)
    scale = torch.where(moved, torch.empty(len(variants), device=device).uniform_(0.8, 1.0), 1.0)
    shift = torch.empty(len(variants), 2, device=device).uniform_(-7, 7) * moved[:, None]
    return compose(rgba, background_rgb([v.background for v in variants], device), placement(scale, shift))


@torch.no_grad()
def encode(me: Worker, vae, factors: dict, pack: Pack, variants: list[Variant]) -> torch.Tensor:
    """float16 [M, 16, 16, 16] on the host: the posterior means, shifted and scaled as the SD3 pipeline expects them."""
    pieces = []
    for start in tqdm(range(0, len(variants), 256), disable=not me.leads, desc="latents", mininterval=5.0):
        mean = encoded(me, vae, show(pack, variants[start : start + 256]))
        pieces.append(((mean - factors["shift_factor"]) * factors["scaling_factor"]).half().cpu())
    return torch.cat(pieces)


def tokenizer_for(me: Worker, rows: list[dict], size: int, folder: Path):
    if me.leads and not folder.exists():
        texts = [text for row in rows for text in [canonical(row), *row["keywords"]]] + [
            f"{canonical(row, colour, back)} of in style"
            for row in rows[::7]
            for colour in ["", *HUES]
            for back in BACKGROUNDS
        ]
        train_tokenizer(texts, size, folder)
    me.barrier()
    return load_tokenizer(folder)


def build(me: Worker, args) -> None:
    shape = TINY if args.tiny else SHIPPED
    pack = training_pack(args.data, args.holdout, args.limit)
    tokenizer = tokenizer_for(me, pack.rows, shape.vocabulary, args.work / "tokenizer")
    everything = plan(pack.rows)
    weights = variant_weights(everything, pack.rows)[me.rank :: me.count].clone()
    variants = everything[me.rank :: me.count]
    rng = random.Random(me.rank)
    texts = [text for v in variants for text in ways_to_ask(rng, pack.rows[v.row], v.colour, v.background, CAPTIONS)]
    ids = token_ids(tokenizer, texts).view(len(variants), CAPTIONS, -1).to(torch.int16)
    vae = load_average(args.work / "vae.pt", build_vae(shape)).to(me.device).eval()
    factors = read_factors(args.work)
    latent = encode(me, vae, factors, Pack(pack.rows, pack.rgba.to(me.device)), variants)
    moved = torch.tensor(["moved" in v.kind for v in variants])
    write_whole(args.work / f"latents-{me.rank}.pt", {"latent": latent, "ids": ids, "weight": weights, "moved": moved})
    me.barrier()


def read_table(work: Path, device) -> Table:
    """All workers' parts, on the device."""
    parts = [torch.load(path, weights_only=True) for path in sorted(work.glob("latents-*.pt"))]
    if not parts:
        raise FileNotFoundError(f"no latents in {work}: run latents.py first")
    return Table(**{key: torch.cat([part[key] for part in parts]).to(device) for key in parts[0]})


if __name__ == "__main__":
    with worker() as me:
        build(me, options(__doc__).parse_args())
