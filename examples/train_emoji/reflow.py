"""Straightens the flow for few steps without guidance.

Two stages. First the trained flow draws pairs (noise, picture) in 20 steps, guided where a caption leaves room. Then
a copy of it is trained on straight lines between them, mixed with real pictures. A share of the rows starts from
where the student itself gets to in one or two steps from the noise, so that a later step mends what an earlier one
missed.

    torchrun --nproc-per-node 2 examples/train_emoji/reflow.py --pair-seconds 60 --seconds 240
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from flow import Recipe as FlowRecipe
from flow import draw_bias, draw_rows, draw_sigma, is_matrix, make_flow, schedule, velocity, velocity_loss
from latents import CAPTIONS, Table, read_table
from tqdm import tqdm
from training import Phase, Worker, load_average, mixed_precision, options, worker, write_whole

KNOWN = (CAPTIONS * 5 + 7) // 8  # captions below this index are canonical


@dataclass(frozen=True)
class Recipe:
    batch: int = 384  # a worker; half of it pairs, half real pictures
    lr: float = 5e-4
    steps: int = 20  # of the teacher
    guidance_known: float = 1.0  # of the teacher, where the caption names one picture
    guidance_open: float = 2.0  # and where it does not
    rolled: float = 0.25  # share of rows started from the student's own steps


@torch.no_grad()
def guided_euler(transformer, noise, sigmas, text, nothing, guidance, bias) -> torch.Tensor:
    """x0 [B, 16, 16, 16] from noise. `text` and `nothing` are (embeds, pooled) of captions and of none; guidance
    [B].
    """
    x = noise
    weight = guidance[:, None, None, None]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        at = sigma.expand(len(x))
        v = velocity(transformer, x, at, *text, bias).float()
        if (guidance != 1).any():
            v_nothing = velocity(transformer, x, at, *nothing, bias).float()
            v = v_nothing + weight * (v - v_nothing)
        x = x + (sigma_next - sigma) * v
    return x


def draw_pairs(me: Worker, args, recipe: Recipe, table: Table) -> dict:
    """Noise, picture (float16) and token ids of as many pairs as `--pair-seconds` allow; kept in
    `work/pairs-<rank>.pt`.
    """
    path: Path = args.work / f"pairs-{me.rank}.pt"
    if path.exists():
        return {key: value.to(me.device) for key, value in torch.load(path, weights_only=True).items()}
    flow, empty = make_flow(me, args)
    load_average(args.work / "flow.pt", flow).eval()
    sigmas = schedule(recipe.steps).to(me.device)
    pairs = {"noise": [], "x0": [], "ids": []}
    began = time.monotonic()
    with tqdm(disable=not me.leads, desc="pairs", mininterval=5.0) as bar, torch.no_grad():
        while not pairs["x0"] or time.monotonic() - began < args.pair_seconds:
            _, ids, _, which = draw_rows(table, recipe.batch, 0.03, empty)
            noise = torch.randn(recipe.batch, 16, 16, 16, device=me.device)
            guidance = torch.where(which < KNOWN, recipe.guidance_known, recipe.guidance_open)
            guidance = torch.where(which < 0, 1.0, guidance)
            bias = draw_bias(recipe.batch, ids.shape[1], me.device)
            with mixed_precision(me):
                text, nothing = flow.text(ids), flow.text(empty.expand_as(ids).contiguous())
                x0 = guided_euler(flow.transformer, noise, sigmas, text, nothing, guidance, bias)
            for key, value in zip(pairs, (noise.half(), x0.half(), ids.to(torch.int16)), strict=True):
                pairs[key].append(value)
            bar.update(recipe.batch)
    pairs = {key: torch.cat(values) for key, values in pairs.items()}
    write_whole(path, pairs)
    return pairs


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
    table = read_table(args.work, me.device)
    pairs = draw_pairs(me, args, recipe, table)
    flow, empty = make_flow(me, args)
    if not (args.work / "reflow.pt").exists():
        load_average(args.work / "flow.pt", flow)
    phase = Phase.start(me, args.work / "reflow.pt", flow, args.seconds, recipe.lr, is_matrix)
    sigma_recipe = FlowRecipe()
    half, few = recipe.batch // 2, int(recipe.batch * recipe.rolled)
    for fraction in phase.steps(args.stop_after):
        index = torch.randint(len(pairs["x0"]), (half,), device=me.device)
        real, real_ids, real_moved, which = draw_rows(table, recipe.batch - half, sigma_recipe.unprompted, empty)
        x0 = torch.cat([pairs["x0"][index].float(), real])
        noise = torch.cat([pairs["noise"][index].float(), torch.randn_like(real)])
        ids = torch.cat([pairs["ids"][index].long(), real_ids])
        moved = torch.cat([torch.zeros_like(index, dtype=torch.bool), real_moved])
        certain = torch.cat([torch.ones_like(index, dtype=torch.bool), (which >= 0) & (which < KNOWN) & ~real_moved])
        mix = torch.randperm(recipe.batch, device=me.device)
        x0, noise, ids, moved, certain = x0[mix], noise[mix], ids[mix], moved[mix], certain[mix]
        sigma = draw_sigma(sigma_recipe, moved)
        x = torch.lerp(x0, noise, sigma[:, None, None, None])
        weight = torch.ones_like(sigma)
        bias = draw_bias(recipe.batch, ids.shape[1], me.device)
        with mixed_precision(me):
            embeds, pooled = flow.text(ids)
            if few:
                own = sigma[:few].clamp(0.25, 0.9)
                rolled = roll(flow.transformer, noise[:few], own, embeds[:few], pooled[:few], bias[:few])
                use = certain[:few]  # one picture belongs to this noise and caption
                sigma[:few] = torch.where(use, own, sigma[:few])
                x[:few] = torch.where(use[:, None, None, None], rolled, x[:few])
                weight[:few] = torch.where(use, own.square(), 1.0)
            target = (x - x0) / sigma[:, None, None, None]
            losses = velocity_loss(flow.transformer, x, target, sigma, embeds, pooled, bias)
        (losses * weight).mean().backward()
        norm = phase.step_with(fraction)
        if phase.step % 100 == 99:
            phase.reading = {"loss": losses.mean(), "rolled": (losses * weight)[:few].mean(), "norm": norm}


if __name__ == "__main__":
    parser = options(__doc__, seconds=240)
    parser.add_argument("--pair-seconds", type=float, default=60, help="time to draw pairs, a worker")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="latents a worker and step")
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--guidance-known", type=float, default=Recipe.guidance_known)
    parser.add_argument("--guidance-open", type=float, default=Recipe.guidance_open)
    arguments = parser.parse_args()
    recipe = Recipe(
        batch=arguments.batch,
        lr=arguments.lr,
        guidance_known=arguments.guidance_known,
        guidance_open=arguments.guidance_open,
    )
    with worker() as me:
        train(me, arguments, recipe)
