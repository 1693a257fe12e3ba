"""What every training script shares: workers, a clock that ends a phase, the optimizer, averages, checkpoints."""

import argparse
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

HERE = Path(__file__).parent


def options(description: str, seconds: float = 0.0) -> argparse.ArgumentParser:
    """The options that the scripts share; with `seconds`, those of a training phase too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(".cache/emoji/pack128.tar"), help="the pack that data.py writes"
    )
    parser.add_argument("--holdout", type=Path, default=HERE / "holdout.json", help="what training must not see")
    parser.add_argument("--work", type=Path, default=Path(".cache/emoji/work"), help="checkpoints, latents, pairs")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the scripts on a CPU")
    parser.add_argument("--limit", type=int, default=0, help="use only so many pictures (0: all)")
    if seconds:
        parser.add_argument("--seconds", type=float, default=seconds, help="length of the phase; the rate ends at 0")
        parser.add_argument(
            "--stop-after", type=float, default=float("inf"), help="stop this run early, to resume later"
        )
        parser.add_argument("--no-compile", action="store_true", help="do not torch.compile the training step")
    return parser


@dataclass(frozen=True)
class Worker:
    """One process of the run: its rank, how many there are, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()


@contextmanager
def worker():
    """This process's part in `torchrun`, or the whole run when started plainly."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    torch._dynamo.config.recompile_limit = 64  # one compiled block serves all layers, in a few shapes
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if count > 1:
        dist.init_process_group("nccl", device_id=device) if device.type == "cuda" else dist.init_process_group("gloo")
    torch.manual_seed(rank + 1)
    yield Worker(rank, count, device)
    if count > 1:
        dist.destroy_process_group()


class Clock:
    """Counts a phase's seconds, those of earlier runs included, alike in every worker."""

    def __init__(self, me: Worker, seconds: float, spent: float = 0.0, every: int = 20):
        self.me, self.seconds, self.every = me, seconds, every
        self.began, self.calls, self.value = time.monotonic() - spent, 0, spent / seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def fraction(self) -> float:
        """How much of the phase is over, 0 to 1; the leader's reading, taken every few calls."""
        if self.calls % self.every == 0:
            reading = torch.tensor([self.spent / self.seconds], device=self.me.device)
            if self.me.count > 1:
                dist.broadcast(reading, 0)
            self.value = min(1.0, reading.item())
        self.calls += 1
        return self.value


def mixed_precision(me: Worker):
    """bfloat16 where the device is quick at it."""
    return torch.autocast(me.device.type, torch.bfloat16, enabled=me.device.type == "cuda")


def in_half(me: Worker, module: nn.Module, *inputs):
    """`module(*inputs)` with its parameters cast to bfloat16 on a GPU; gradients reach the float32 ones."""
    if me.device.type != "cuda":
        return module(*inputs)
    return functional_call(module, {name: p.bfloat16() for name, p in module.named_parameters()}, inputs)


def warm_then_decay(fraction: float, warm: float = 0.02) -> float:
    """The learning rate's factor: up over the first `warm` of the phase, then straight down to 0 at its end."""
    return min(1.0, (fraction + 1e-3) / warm) * (1 - fraction)


@torch.no_grad()
def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[K, m, n] -> nearest semi-orthogonal matrices, by Newton-Schulz iterations (on a GPU in bfloat16)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for the weight matrices of a transformer; equal shapes are handled as one batch.

    Scaled to half the root mean square of an AdamW step, so that one learning rate serves both.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, members in shapes.items():
                self._step(group, shape, members)

    def _step(self, group: dict, shape: torch.Size, members: list[torch.Tensor]) -> None:
        for member in members:
            if "momentum" not in self.state[member]:
                self.state[member]["momentum"] = torch.zeros_like(member)
        momenta = [self.state[member]["momentum"] for member in members]
        grads = [member.grad for member in members]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
        update = orthogonalise(torch.stack(ahead)) * (0.5 * max(shape) ** 0.5)
        torch._foreach_add_(members, list(update.unbind()), alpha=-group["lr"])


class Optimizers:
    """Muon for the matrices that `is_matrix(name)` names, AdamW for everything else, under one learning rate."""

    def __init__(self, module: nn.Module, lr: float, is_matrix=lambda name: False):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and is_matrix(name)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        fused = all(p.is_cuda and p.is_contiguous() for p in rest)
        self.parameters = [p for _, p in named]
        self.lr = lr
        self.members = [torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)]
        if matrices:
            self.members.append(Muon(matrices, lr))

    def step(self, me: Worker, factor: float, largest_norm: float = 1.0) -> torch.Tensor:
        """Averages the gradients over the workers, clips them, steps, clears them. Returns their norm before the
        clip.
        """
        held = [p for p in self.parameters if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in held])
        if me.count > 1:
            dist.all_reduce(flat)
            flat /= me.count
        norm = flat.norm()
        flat = torch.where(norm.isfinite(), flat * (largest_norm / (norm + 1e-6)).clamp(max=1.0), 0.0)
        for p, piece in zip(held, flat.split([p.numel() for p in held]), strict=True):
            p.grad = piece.view_as(p)
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = self.lr * factor
            member.step()
            member.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


class Average:
    """An exponential moving average of a module's parameters, quick at first and then of the last ~1/(1 - decay)
    steps.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.parameters = dict(module.named_parameters())
        self.values = {name: p.detach().clone().float() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        weight = max(1 - self.decay, 1 / (self.steps + 1))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], weight)


def share_start(me: Worker, module: nn.Module) -> None:
    """Gives every worker the leader's parameters."""
    if me.count > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def write_whole(path: Path, value) -> None:
    """`torch.save`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


@dataclass
class Phase:
    """A training loop's state, that it can be stopped and taken up again: `work/<name>.pt` is its checkpoint.

    `finished` weights, those that later phases read, are the averaged ones.
    """

    me: Worker
    path: Path
    module: nn.Module
    optimizers: Optimizers
    average: Average
    clock: Clock
    step: int = 0
    reading: dict = field(default_factory=dict)  # what the progress bar shows

    @classmethod
    def start(
        cls,
        me: Worker,
        path: Path,
        module: nn.Module,
        seconds: float,
        lr: float,
        is_matrix=lambda name: False,
        decay: float = 0.999,
    ) -> "Phase":
        module.to(me.device)
        share_start(me, module)
        phase = cls(me, path, module, Optimizers(module, lr, is_matrix), Average(module, decay), Clock(me, seconds))
        if path.exists():
            phase._resume(torch.load(path, map_location=me.device, weights_only=True), seconds)
        return phase

    def _resume(self, state: dict, seconds: float) -> None:
        self.average.values = {name: value.float() for name, value in state["average"].items()}
        self.average.steps, self.step = state["step"], state["step"]
        self.module.load_state_dict(state["weights"] if "weights" in state else self.average.values, strict=False)
        if "optimizers" in state:
            self.optimizers.load_state_dict(state["optimizers"])
        self.clock = Clock(self.me, seconds, state["spent"])

    def steps(self, stop_after: float = float("inf")):
        """Yields the fraction of the phase that is over until its seconds are up, or `stop_after` seconds of this
        run.
        """
        began = time.monotonic()
        with tqdm(
            total=100,
            disable=not self.me.leads,
            desc=self.path.stem,
            mininterval=5.0,
            bar_format="{desc} {percentage:3.0f}% [{elapsed}<{remaining}] {postfix}",
        ) as bar:
            while (fraction := self.clock.fraction()) < 1.0:
                yield fraction
                self.average.update()
                self.step += 1
                if self.step % 100 == 0:
                    bar.set_postfix_str(f"step {self.step} {self.note()}", refresh=False)
                    bar.update(100 * fraction - bar.n)
                if self.step % self.clock.every == 0 and self._agreed(time.monotonic() - began > stop_after):
                    break
        self.save()

    def step_with(self, fraction: float) -> torch.Tensor:
        """One step of the optimizers at this point of the phase; returns the gradient's norm."""
        return self.optimizers.step(self.me, warm_then_decay(fraction))

    def note(self) -> str:
        return " ".join(f"{name} {float(value):.4f}" for name, value in self.reading.items())

    def _agreed(self, stop: bool) -> bool:
        flag = torch.tensor([float(stop)], device=self.me.device)
        if self.me.count > 1:
            dist.broadcast(flag, 0)
        return flag.item() > 0

    def save(self) -> None:
        if self.me.leads:
            write_whole(
                self.path,
                {
                    "average": self.average.values,
                    "weights": dict(self.module.state_dict()),
                    "optimizers": self.optimizers.state_dict(),
                    "spent": self.clock.spent,
                    "step": self.step,
                },
            )
        self.me.barrier()


def load_average(path: Path, module: nn.Module) -> nn.Module:
    """Fills `module` with a phase's averaged weights."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {path.stem}.py first")
    state = torch.load(path, map_location="cpu", weights_only=True)["average"]
    missing = set(dict(module.named_parameters())) - set(state)
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)[:3]} and {max(0, len(missing) - 3)} more: another shape?")
    module.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    return module
