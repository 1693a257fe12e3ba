"""Trains the edit model and writes it as a Flux2Klein folder of diffusers.

    python examples/train_edit/train.py --data .cache/edit/data --output .cache/edit/model --minutes 20

With `torchrun --nproc-per-node 4` in the place of `python` each GPU has a worker with a batch of its own.

Two phases. `flow` learns the rectified flow of the pairs: x = (1 - sigma) x0 + sigma noise, v = noise - x0, with the
tokens of the reference in the sequence. `reflow` straightens it for four steps: the flow draws an image from each of many
noises, and the student learns the straight lines from these noises to these images.

A run that is stopped, by --stop-after or otherwise, goes on from --work when it is started again; it writes the folder from
what it has.
"""

import argparse
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import emoji_modules
import torch
from edit_model import (
    CHANNELS,
    GRID,
    SHIPPED,
    TINY,
    TOKENS,
    EditFlow,
    Encoder,
    build_vae,
    measure,
    pipeline,
    token_ids,
    train_tokenizer,
    write,
)
from pack import read_pack
from pack_data import NAME
from pairs import FORMS, Pairs, captions_of, split
from training import Captured, Phase, Worker, add_step_options, earlier, load_average, mixed_precision, worker, write_whole
from transformers import PreTrainedTokenizerFast

WRITING = 25  # seconds of a run that are kept for its last checkpoint and the folder
PHASES = {"flow": 0.68, "pairs": 0.05, "reflow": 0.27}  # shares of the training


@dataclass(frozen=True)
class Recipe:
    batch: int = 512
    fresh: int = 32  # pairs that a step encodes anew
    stored: int = 32768  # encoded pairs
    flow_lr: float = 1.5e-3
    reflow_lr: float = 5e-4
    at_one: float = 0.2  # share of sigma = 1, where most is decided
    on_grid: float = 0.25  # share of the other sigmas of four steps
    drawn: int = 120_000  # images that the flow draws, at most
    teacher_steps: int = 20
    guidance: float = 1.5  # of the flow, against the empty prompt
    real: float = 0.25  # share of reflow's rows that are real images, at low sigma
    real_below: float = 0.5
    rolled: float = 0.3  # share of its rows that start from where the student itself gets to


STEPS = 4  # of the pipeline, from sigma 1 to 0


class Store:
    """Encoded pairs on the device. Every step draws from it and replaces a few, so no pair lasts."""

    def __init__(self, pairs: Pairs, encode: Encoder, size: int, empty: torch.Tensor):
        self.pairs, self.encode, self.empty = pairs, encode, empty
        device = empty.device
        self.target = torch.zeros(size, CHANNELS, GRID, GRID, dtype=torch.float16, device=device)
        self.reference = torch.zeros_like(self.target)
        self.ids = torch.zeros(size, TOKENS, dtype=torch.int16, device=device)
        self.place = torch.zeros((), dtype=torch.long, device=device)

    @torch.no_grad()
    def refresh(self, count: int) -> None:
        """Replaces the `count` oldest pairs."""
        batch = self.pairs.draw(count)
        latents = self.encode(torch.cat([batch.target, batch.reference])).to(self.target.dtype)
        index = (self.place + torch.arange(count, device=self.place.device)) % len(self.ids)
        self.target.index_copy_(0, index, latents[:count])
        self.reference.index_copy_(0, index, latents[count:])
        self.ids.index_copy_(0, index, batch.ids)
        self.place += count

    def fill(self, at_once: int) -> None:
        for _ in range(0, len(self.ids), at_once):
            self.refresh(at_once)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x0 and references [B, 64, 8, 8], token ids [B, TOKENS]."""
        index = torch.randint(len(self.ids), (count,), device=self.place.device)
        return self.target[index].float(), self.reference[index].float(), self.ids[index].long()


def column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def some_sigma(count: int, recipe: Recipe, device) -> torch.Tensor:
    """Sigma [B]: 1, or of the steps that are used, or anything in between, mostly in the middle."""
    sigma = torch.sigmoid(torch.randn(count, device=device) + 0.3)
    on_grid = torch.randint(1, STEPS, (count,), device=device) / STEPS
    choice = torch.rand(count, device=device)
    sigma = torch.where(choice < recipe.at_one + recipe.on_grid, on_grid, sigma)
    return torch.where(choice < recipe.at_one, 1.0, sigma).clamp(min=1e-3)


def is_matrix(name: str) -> bool:
    """Matrices that Muon trains: those of the blocks."""
    return "transformer_blocks" in name and name.endswith("weight")


class Run:
    """One run of the script: its data, its network and its clock."""

    def __init__(self, args, me: Worker):
        self.args, self.me, self.began, device = args, me, time.monotonic(), me.device
        torch.manual_seed(args.seed * me.count + me.rank)
        sizes = {
            name: getattr(args, name) for name in ("batch", "fresh", "stored", "drawn", "guidance") if getattr(args, name)
        }
        self.recipe, self.shape = Recipe(**sizes), TINY if args.tiny else SHIPPED
        self.seconds = args.minutes * 60
        self.begin = earlier(args, "reflow", "flow")
        if args.begin and self.begin is None:
            raise FileNotFoundError(
                f"--begin: {args.begin} holds neither reflow.pt nor flow.pt; give the --work of an earlier run"
            )
        self.running = torch.zeros((), device=device)  # the loss, averaged over about 50 steps

        pack, _ = split(read_pack(args.data / NAME), emoji_modules.HOLDOUT, args.limit)
        rng = random.Random(args.seed)
        texts = [text for row in pack.rows for text in captions_of(row, rng)]
        self.tokenizer = self._tokenizer(texts + [word for row in pack.rows for word in row["keywords"]])
        ids = token_ids(self.tokenizer, texts).view(len(pack.rows), len(FORMS), TOKENS).to(torch.int16)
        pairs = Pairs(pack, ids, device)
        self.vae = build_vae().to(device)
        self._statistics(pairs)
        encode = Encoder.of(self.vae, torch.bfloat16 if device.type == "cuda" else torch.float32)
        empty = token_ids(self.tokenizer, [""]).to(device)
        self.store = Store(pairs, encode, self.recipe.stored, empty)
        self.store.fill(min(self.recipe.stored, 512 if device.type == "cuda" else 16))
        self.say(f"{len(pack.rows)} images, {len(self.tokenizer)} words, {self.recipe.stored} pairs encoded")

    def say(self, text: str) -> None:
        if self.me.leads:
            print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    @property
    def left(self) -> float:
        """Seconds that this run may still train."""
        return self.args.stop_after * 60 - WRITING - (time.monotonic() - self.began)

    def _tokenizer(self, texts: list[str]) -> PreTrainedTokenizerFast:
        folder, begin = self.args.work / "tokenizer", self.args.begin
        if self.me.leads and not folder.exists():
            known = begin and PreTrainedTokenizerFast.from_pretrained(begin / "tokenizer")
            (known or train_tokenizer(texts, self.shape.words)).save_pretrained(folder)
        self.me.barrier()
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _statistics(self, pairs: Pairs) -> None:
        path = self.args.work / "statistics.pt"
        if self.me.leads and not path.exists() and self.args.begin:
            shutil.copy(self.args.begin / path.name, path)
        elif self.me.leads and not path.exists():
            count, at_once = (4096, 64) if self.me.device.type == "cuda" else (64, 16)
            draws = (pairs.draw(at_once) for _ in range(count // at_once))
            measure(self.vae, (images for one in draws for images in (one.target, one.reference)))
            write_whole(path, dict(self.vae.bn.state_dict()))
        self.me.barrier()
        self.vae.bn.load_state_dict(torch.load(path, map_location=self.me.device, weights_only=True))

    # -- training ----------------------------------------------------------------------------------------------------------

    def flow_network(self, compiled: bool = True) -> EditFlow:
        flow = EditFlow(self.shape, len(self.tokenizer)).to(self.me.device)
        if compiled and not self.args.no_compile:
            for block in (*flow.transformer.transformer_blocks, *flow.transformer.single_transformer_blocks):
                block.compile(dynamic=False)
        return flow

    def path(self, name: str) -> Path:
        return self.args.work / f"{name}.pt"

    def train(self, name: str, flow: EditFlow, lr: float, loss_of, begin: Path | None = None) -> bool:
        """A phase, or what is left of it, in pieces that each end with a checkpoint. False: the time of this run is up."""
        options = argparse.Namespace(seconds=PHASES[name] * self.seconds, no_graph=self.args.no_graph)
        phase = Phase.start(self.me, self.path(name), flow, options, lr, is_matrix, begin=begin)
        phase.clock.every = 20 if self.me.device.type == "cuda" else 1

        def averaged():
            loss, shown = loss_of()
            self.running.copy_(torch.where(self.running == 0, loss, torch.lerp(self.running, loss, 0.02)).detach())
            return loss, {"averaged": self.running, **shown}

        self.running.zero_()
        while self.me.agreed(phase.clock.spent < phase.clock.seconds and self.left > 0):
            phase.run(averaged, min(self.args.checkpoint, self.left))
            self.say(f"{name}: step {phase.step}, {phase.clock.spent:.0f} of {phase.clock.seconds:.0f} s, {phase.note()}")
        return self.me.agreed(phase.clock.spent >= phase.clock.seconds)

    def flow(self) -> bool:
        flow, recipe, device = self.flow_network(), self.recipe, self.me.device

        def loss_of():
            self.store.refresh(recipe.fresh)
            x0, reference, ids = self.store.draw(recipe.batch)
            noise, sigma = torch.randn_like(x0), some_sigma(recipe.batch, recipe, device)
            x = torch.lerp(x0, noise, column(sigma))
            with mixed_precision(self.me):
                v = flow(x, sigma, reference, ids)
            losses = (v.float() - (noise - x0)).square().mean((1, 2, 3))
            first = sigma == 1
            return losses.mean(), {"at one": (losses * first).sum() / first.sum().clamp(min=1)}

        return self.train("flow", flow, recipe.flow_lr, loss_of, begin=self.begin)

    def drawn_pairs(self) -> dict[str, torch.Tensor] | None:
        """noise, x0, reference (float16) and ids of images that the flow draws, others in every worker; None: the time of
        this run is up."""
        path = self.path(f"pairs-{self.me.rank}-of-{self.me.count}")
        if self.me.agreed(path.exists()):
            return torch.load(path, map_location=self.me.device, weights_only=True)
        flow, recipe = load_average(self.path("flow"), self.flow_network(compiled=False)).eval(), self.recipe
        sigmas = torch.linspace(1, 0, recipe.teacher_steps + 1).tolist()

        @torch.no_grad()
        def some() -> tuple[torch.Tensor, ...]:
            self.store.refresh(recipe.fresh)
            x0, reference, ids = self.store.draw(recipe.batch)
            noise = x = torch.randn_like(x0)
            empty = self.store.empty.expand_as(ids).contiguous()
            with mixed_precision(self.me):
                for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                    at = torch.full((recipe.batch,), sigma, device=x.device)
                    v, unguided = flow(x, at, reference, ids).float(), flow(x, at, reference, empty).float()
                    x = x + (following - sigma) * torch.lerp(unguided, v, recipe.guidance)
            return noise.half(), x.half(), reference.half(), ids.to(torch.int16)

        draw = Captured(some, self.me.device.type == "cuda" and not self.args.no_graph, warm=1)
        seconds, began = PHASES["pairs"] * self.seconds, time.monotonic()
        pieces: list[tuple[torch.Tensor, ...]] = []
        while len(pieces) * recipe.batch < recipe.drawn and (not pieces or time.monotonic() - began < seconds):
            if self.left <= 0:
                break
            pieces.append(tuple(one.cpu() for one in draw()))
        if self.me.agreed(self.left <= 0):
            return None
        names = ("noise", "x0", "reference", "ids")
        pairs = {name: torch.cat(values) for name, values in zip(names, zip(*pieces, strict=True), strict=True)}
        write_whole(path, pairs)
        self.me.barrier()
        self.say(f"pairs: {len(pairs['ids'])} drawn in {recipe.teacher_steps} steps at guidance {recipe.guidance}")
        return {name: value.to(self.me.device) for name, value in pairs.items()}

    def reflow(self) -> bool:
        drawn = self.drawn_pairs()
        if drawn is None:
            return False
        flow, recipe, device = self.flow_network(), self.recipe, self.me.device
        few, real = int(recipe.batch * recipe.rolled), int(recipe.batch * recipe.real)

        def velocity(x, sigma, reference, ids):
            with mixed_precision(self.me):
                return flow(x, sigma, reference, ids).float()

        @torch.no_grad()
        def rolled(noise, reference, ids):
            """Where the student gets to from its noise in one to three of the four steps, and sigma there."""
            stop = torch.randint(1, STEPS, (few,), device=device)
            x, reached = noise, noise
            for step in range(STEPS - 1):
                sigma = torch.full((few,), 1 - step / STEPS, device=device)
                x = x - velocity(x, sigma, reference, ids) / STEPS
                reached = torch.where(column(stop == step + 1), x, reached)
            return reached, 1 - stop / STEPS

        def loss_of():
            """The first `few` rows are rolled, the last `real` are real images; all others are on the straight lines."""
            self.store.refresh(recipe.fresh)
            index = torch.randint(len(drawn["ids"]), (recipe.batch - real,), device=device)
            noise, x0, reference = (drawn[name][index].float() for name in ("noise", "x0", "reference"))
            ids = drawn["ids"][index].long()
            own, own_sigma = rolled(noise[:few], reference[:few], ids[:few])
            real_x0, real_reference, real_ids = self.store.draw(real)
            x0, reference, ids = torch.cat([x0, real_x0]), torch.cat([reference, real_reference]), torch.cat([ids, real_ids])
            sigma = some_sigma(recipe.batch, recipe, device)
            low = recipe.real_below * torch.rand(real, device=device).clamp(min=1e-2)
            sigma = torch.cat([own_sigma, sigma[few : recipe.batch - real], low])
            x = torch.lerp(x0, torch.cat([noise, torch.randn_like(real_x0)]), column(sigma))
            x = torch.cat([own, x[few:]])
            weight = torch.ones_like(sigma)
            weight[:few] = own_sigma.square()
            losses = (velocity(x, sigma, reference, ids) - (x - x0) / column(sigma)).square().mean((1, 2, 3)) * weight
            return losses.mean(), {"rolled": losses[:few].mean(), "real": losses[recipe.batch - real :].mean()}

        return self.train("reflow", flow, recipe.reflow_lr, loss_of, begin=self.path("flow"))

    def write(self) -> None:
        """The folder, from the averaged weights of the last phase that ran."""
        name = next((name for name in ("reflow", "flow") if self.path(name).exists()), None)
        if name is None:
            raise RuntimeError(
                f"nothing was trained: reading the data took {time.monotonic() - self.began:.0f} s, writing is given "
                f"{WRITING} s, and --stop-after is {self.args.stop_after * 60:.0f} s: raise it"
            )
        flow = load_average(self.path(name), EditFlow(self.shape, len(self.tokenizer)))
        vae = build_vae()
        vae.bn.load_state_dict(torch.load(self.path("statistics"), map_location="cpu", weights_only=True))
        size = write(pipeline(flow, self.tokenizer, vae), self.args.output)
        self.say(f"{self.args.output}: weights of {name}, {size:.2f} MiB")


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"the folder with {NAME} (see pack_data.py)")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the pipeline")
    parser.add_argument("--work", type=Path, default=Path(".cache/edit/work"), help="checkpoints and drawn pairs")
    parser.add_argument("--minutes", type=float, default=20, help="length of the training, over all runs")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), help="minutes of this run, reading and writing too"
    )
    parser.add_argument("--checkpoint", type=float, default=120, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0, help=f"pairs of a worker a step (0: {Recipe.batch})")
    parser.add_argument(
        "--fresh", type=int, default=0, help=f"pairs of a worker encoded anew in each step (0: {Recipe.fresh})"
    )
    parser.add_argument("--stored", type=int, default=0, help=f"encoded pairs (0: {Recipe.stored})")
    parser.add_argument(
        "--drawn", type=int, default=0, help=f"images that the flow draws in a worker, at most (0: {Recipe.drawn})"
    )
    parser.add_argument(
        "--guidance", type=float, default=0, help=f"of the images that the flow draws (0: {Recipe.guidance})"
    )
    parser.add_argument("--limit", type=int, default=0, help="use only so many concepts (0: all)")
    parser.add_argument("--tiny", action="store_true", help="a tiny transformer, to try the scripts")
    add_step_options(parser)
    return parser.parse_args(given)


if __name__ == "__main__":
    with worker() as me:
        run = Run(parsed(), me)
        if run.flow():
            run.reflow()
        if me.leads:
            run.write()
