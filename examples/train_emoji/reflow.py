"""Straightens the flow for few steps without guidance.

A caption in its canonical form names one image, so its flow is straight already: the student goes on learning it from
the images. A share of those rows starts from where the student itself gets to in one or two steps from the noise, so
that a later step mends what an earlier one missed. The other captions leave room; for them the trained flow first draws
pairs (noise, image) in 20 guided steps, and the student learns the straight lines between the two.

    torchrun --nproc-per-node 2 examples/train_emoji/reflow.py --pair-seconds 60 --seconds 240
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from flow import Draws, is_matrix, make_flow, schedule, velocity, velocity_loss
from flow import Recipe as FlowRecipe
from latents import CAPTIONS, KNOWN, read_table
from tqdm import tqdm
from training import Captured, Phase, Worker, load_average, mixed_precision, options, worker, write_whole


@dataclass(frozen=True)
class Recipe:
    batch: int = 384  # a worker
    lr: float = 5e-4
    pairs: float = 0.2  # share of the rows; the rest are real images
    steps: int = 20  # of the teacher
    guidance: float = 2.0  # of the teacher
    unprompted: float = 0.15  # share of the pairs without a caption
    rolled: float = 0.35  # share of the rows started from the student's own steps


def euler(velocity_at, noise: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """x0 [B, 16, 16, 16] from noise; `velocity_at(x, sigma)` takes sigma [B]."""
    x = noise
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (sigma_next - sigma) * velocity_at(x, torch.full_like(x[:, 0, 0, 0], sigma)).float()
    return x


def draw_pairs(me: Worker, args, recipe: Recipe, draws: Draws) -> dict:
    """Noise, image (float16) and token ids of as many pairs as `--pair-seconds` allow; kept in
    `work/pairs-<rank>.pt`.
    """
    path: Path = args.work / f"pairs-{me.rank}.pt"
    if path.exists():
        return {key: value.to(me.device) for key, value in torch.load(path, weights_only=True).items()}
    flow, empty = make_flow(me, args)
    load_average(args.work / "flow.pt", flow).eval()
    sigmas = schedule(recipe.steps).tolist()

    @torch.no_grad()
    def some() -> tuple:
        _, ids, _, which = draws.rows(recipe.batch, recipe.unprompted, (KNOWN, CAPTIONS))
        noise = torch.randn(recipe.batch, 16, 16, 16, device=me.device)
        weight = torch.where(which < 0, 1.0, recipe.guidance)[:, None, None, None]
        bias = draws.bias(recipe.batch)
        with mixed_precision(me):
            text, nothing = flow.text(ids), flow.text(empty.expand_as(ids).contiguous())

            def guided(x, sigma):
                v = velocity(flow.transformer, x, sigma, *text, bias).float()
                v_nothing = velocity(flow.transformer, x, sigma, *nothing, bias).float()
                return v_nothing + weight * (v - v_nothing)

            x0 = euler(guided, noise, sigmas)
        return noise.half(), x0.half(), ids.to(torch.int16)

    draw = Captured(some, me.device.type == "cuda" and not args.no_graph, warm=1)
    pairs = {"noise": [], "x0": [], "ids": []}
    began = time.monotonic()
    with tqdm(disable=not me.leads, desc="pairs", mininterval=5.0) as bar:
        while not pairs["x0"] or time.monotonic() - began < args.pair_seconds:
            for key, value in zip(pairs, draw(), strict=True):
                pairs[key].append(value.cpu())
            bar.update(recipe.batch)
    pairs = {key: torch.cat(values) for key, values in pairs.items()}
    write_whole(path, pairs)
    return {key: value.to(me.device) for key, value in pairs.items()}


def own_sigma(count: int, device) -> torch.Tensor:
    """Sigma [count] of rows that the student brings there itself: half of them as in four steps."""
    of_four = torch.where(torch.rand(count, device=device) < 0.5, *schedule(4)[1:3].tolist())
    return torch.where(torch.rand(count, device=device) < 0.5, of_four, torch.empty_like(of_four).uniform_(0.2, 0.9))


@torch.no_grad()
def roll(transformer, noise, sigma, embeds, pooled, bias) -> torch.Tensor:
    """Where the student gets from `noise` to `sigma` [B]: half of the rows in one step, half in two."""
    middle = torch.where(torch.rand_like(sigma) < 0.5, sigma, (1 + sigma) / 2)
    one = torch.ones_like(sigma)
    x = noise
    for start, end in ((one, middle), (middle, sigma)):
        v = velocity(transformer, x, start, embeds, pooled, bias).float()
        x = x + (end - start)[:, None, None, None] * v
    return x


def train(me: Worker, args, recipe: Recipe) -> None:
    flow, empty = make_flow(me, args)
    draws = Draws(read_table(args.work, me.device), empty)
    pairs = draw_pairs(me, args, recipe, draws)
    begin = args.work / "flow.pt"
    phase = Phase.start(me, args.work / "reflow.pt", flow, args, recipe.lr, is_matrix, begin=begin)
    sigma_recipe = FlowRecipe()
    few, paired = int(recipe.batch * recipe.rolled), int(recipe.batch * recipe.pairs)

    def loss_of():
        """The first `few` rows are rolled, the last `paired` are pairs, and all but those are real images."""
        real, real_ids, moved, _ = draws.rows(recipe.batch - paired, 0.0, (0, KNOWN))
        index = torch.randint(len(pairs["x0"]), (paired,), device=me.device)
        x0 = torch.cat([real, pairs["x0"][index].float()])
        noise = torch.cat([torch.randn_like(real), pairs["noise"][index].float()])
        ids = torch.cat([real_ids, pairs["ids"][index].long()])
        moved = torch.cat([moved, torch.zeros_like(index, dtype=torch.bool)])
        sigma = draws.sigma(sigma_recipe, moved)
        x = torch.lerp(x0, noise, sigma[:, None, None, None])
        weight = torch.ones_like(sigma)
        bias = draws.bias(recipe.batch)
        with mixed_precision(me):
            embeds, pooled = flow.text(ids)
            own = own_sigma(few, me.device)
            rolled = roll(flow.transformer, noise[:few], own, embeds[:few], pooled[:few], bias[:few])
            use = ~moved[:few]  # one image belongs to this noise and caption
            sigma[:few] = torch.where(use, own, sigma[:few])
            x[:few] = torch.where(use[:, None, None, None], rolled, x[:few])
            weight[:few] = torch.where(use, own.square(), 1.0)
            target = (x - x0) / sigma[:, None, None, None]
            losses = velocity_loss(flow.transformer, x, target, sigma, embeds, pooled, bias) * weight
        return losses.mean(), {"rolled": losses[:few].mean(), "pairs": losses[-paired:].mean()}

    phase.run(loss_of, args.stop_after)


if __name__ == "__main__":
    parser = options(__doc__, seconds=240)
    parser.add_argument("--pair-seconds", type=float, default=60, help="time to draw pairs, a worker")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="latents a worker and step")
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--guidance", type=float, default=Recipe.guidance)
    arguments = parser.parse_args()
    recipe = Recipe(batch=arguments.batch, lr=arguments.lr, guidance=arguments.guidance)
    with worker() as me:
        train(me, arguments, recipe)
