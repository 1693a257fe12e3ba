"""What every training script shares: workers, a clock that ends a phase, CUDA graphs, the optimizer, averages,
checkpoints.
"""

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
    parser.add_argument("--data", type=Path, default=Path(".cache/emoji/pack128.tar"), help="the pack that data.py writes")
    parser.add_argument("--holdout", type=Path, default=HERE / "holdout.json", help="what training must not see")
    parser.add_argument("--work", type=Path, default=Path(".cache/emoji/work"), help="checkpoints, latents, pairs")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the scripts on a CPU")
    parser.add_argument("--limit", type=int, default=0, help="use only so many images (0: all)")
    if seconds:
        parser.add_argument("--seconds", type=float, default=seconds, help="length of the phase; the rate ends at 0")
        parser.add_argument("--stop-after", type=float, default=float("inf"), help="stop this run early, to resume later")
        add_step_options(parser)
    return parser


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """How a training step runs, and from what it begins."""
    parser.add_argument("--no-compile", action="store_true", help="do not torch.compile the transformer's blocks")
    parser.add_argument("--no-graph", action="store_true", help="do not record the training step as a CUDA graph")
    parser.add_argument("--begin", type=Path, help="folder of an earlier run's checkpoints, whose weights to go on from")


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

    def agreed(self, value: bool) -> bool:
        """The leader's value, in every worker."""
        flag = torch.tensor([float(value)], device=self.device)
        if self.count > 1:
            dist.broadcast(flag, 0)
        return flag.item() > 0


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


def half_type(me: Worker) -> torch.dtype:
    """The type that `in_half` computes in."""
    return torch.bfloat16 if me.device.type == "cuda" else torch.float32


def in_half(me: Worker, module: nn.Module, *inputs):
    """`module(*inputs)` with its parameters cast to bfloat16 on a GPU; gradients reach the float32 ones."""
    if me.device.type != "cuda":
        return module(*inputs)
    return functional_call(module, {name: p.bfloat16() for name, p in module.named_parameters()}, inputs)


def warm_then_decay(fraction: float, warm: float = 0.02) -> float:
    """The learning rate's factor: up over the first `warm` of the phase, then straight down to 0 at its end."""
    return min(1.0, (fraction + 1e-3) / warm) * (1 - fraction)


class Captured:
    """A function of no arguments, called plainly a few times, then recorded as a CUDA graph and replayed.

    A replay is one launch, so the host no longer sets the pace of small kernels. The function must not read from the
    device, nor copy to it; what it returns is the same tensors each time, filled anew. Not `enabled`: just the function.
    """

    def __init__(self, function, enabled: bool, warm: int = 4):
        self.function, self.enabled, self.warm = function, enabled, warm
        self.graph = self.result = None
        self.stream = torch.cuda.Stream() if enabled else None

    def __call__(self):
        if not self.enabled:
            return self.function()
        if self.warm > 0:
            self.warm -= 1
            return self._aside()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.function()
        self.graph.replay()
        return self.result

    def _aside(self):
        """A plain call on the stream of the recording, where libraries choose their kernels and get their memory."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result


def cumulated(weights: torch.Tensor) -> torch.Tensor:
    """Float64 [N], rising to 1: what `pick` draws from."""
    total = weights.double().cumsum(0)
    return total / total[-1]


def pick(shares: torch.Tensor, count: int) -> torch.Tensor:
    """`count` indices, drawn by the weights behind `shares`; unlike torch.multinomial, a CUDA graph can hold it."""
    return torch.searchsorted(shares, torch.rand(count, dtype=torch.float64, device=shares.device), right=True)


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
    """Momentum made orthogonal, for weight matrices; equal shapes are handled as one batch. The weight of a convolution is
    a matrix with a row for each output channel.

    Scaled to half the root mean square of an AdamW step, so that one learning rate, a tensor, serves both.
    """

    def __init__(self, parameters, lr: torch.Tensor, momentum: float = 0.95):
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
        matrices = torch.stack(ahead).flatten(2)
        update = orthogonalise(matrices) * (0.5 * max(matrices.shape[1:]) ** 0.5 * group["lr"])
        torch._foreach_sub_(members, list(update.view(-1, *shape).unbind()))


def joined(tensors) -> torch.Tensor:
    """All elements of some tensors in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Optimizers:
    """Muon for the matrices that `is_matrix(name)` names, AdamW for everything else, under one learning rate.

    The rate is a tensor on the device and the gradients lie in one row there, each parameter's `grad` a view of it,
    so that the step can be recorded.
    """

    def __init__(self, module: nn.Module, is_matrix=lambda name: False):
        named = dict(module.named_parameters())
        self.parameters = list(named.values())
        self.gradient = torch.zeros_like(joined(self.parameters))
        self.rate = torch.zeros((), device=self.gradient.device)
        for p, piece in zip(self.parameters, self.gradient.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.view_as(p)
        matrices = {name for name, p in named.items() if p.ndim >= 2 and is_matrix(name)}
        rest = [p for name, p in named.items() if name not in matrices]
        on_gpu = self.gradient.is_cuda
        self.members = [
            torch.optim.AdamW(rest, self.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu, capturable=on_gpu)
        ]
        if matrices:
            self.members.append(Muon([p for name, p in named.items() if name in matrices], self.rate))

    def differentiate(self, loss: torch.Tensor) -> None:
        """Fills the row of gradients; 0 where `loss` does not depend on a parameter."""
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        torch.cat([piece.flatten() for piece in pieces], out=self.gradient)

    def share(self, me: Worker) -> None:
        """Averages the gradients over the workers."""
        if me.count > 1:
            dist.all_reduce(self.gradient)
            self.gradient /= me.count

    def step(self, largest_norm: float = 1.0) -> torch.Tensor:
        """Clips the gradients and steps; a gradient that is not finite counts as 0. Returns the norm before the clip."""
        norm = self.gradient.norm()
        clipped = self.gradient * (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        self.gradient.copy_(torch.where(norm.isfinite(), clipped, 0.0))
        for member in self.members:
            member.step()
        return norm

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)
            for group in member.param_groups:
                group["lr"] = self.rate


class Average:
    """An exponential moving average of a module's parameters, quick at first and then of the last ~1/(1 - decay)
    steps.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.parameters = dict(module.named_parameters())
        self.row = joined(self.parameters.values()).float()
        self.weight = torch.zeros_like(self.row[0])

    @property
    def values(self) -> dict[str, torch.Tensor]:
        pieces = self.row.split([p.numel() for p in self.parameters.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def load(self, values: dict[str, torch.Tensor], steps: int) -> None:
        self.row.copy_(joined(values[name] for name in self.parameters))
        self.steps = steps

    def count(self) -> None:
        """One step more: sets the weight of the next `update`."""
        self.steps += 1
        self.weight.fill_(max(1 - self.decay, 1 / (self.steps + 1)))

    def update(self) -> None:
        self.row.lerp_(joined(self.parameters.values()), self.weight)


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


def earlier(args, *names: str) -> Path | None:
    """The first of these phases' checkpoints that the folder `--begin` holds."""
    if args.begin is None:
        return None
    return next((path for path in (args.begin / f"{name}.pt" for name in names) if path.exists()), None)


@dataclass
class Phase:
    """A training loop's state, that it can be stopped and taken up again: `work/<name>.pt` is its checkpoint.

    Later phases read its averaged weights.
    """

    me: Worker
    path: Path
    module: nn.Module
    optimizers: Optimizers
    average: Average
    clock: Clock
    lr: float
    graphs: bool
    over: torch.Tensor  # the fraction of the phase that is over, for losses that change with it
    step: int = 0
    reading: dict = field(default_factory=dict)  # what the progress bar shows

    @classmethod
    def start(
        cls,
        me: Worker,
        path: Path,
        module: nn.Module,
        args,
        lr: float,
        is_matrix=lambda name: False,
        decay: float = 0.999,
        begin: Path | None = None,
    ) -> "Phase":
        """A phase of `args.seconds`: resumed from `path`, else begun from the averaged weights in `begin`, if given."""
        if begin is not None and not path.exists():
            load_average(begin, module)
        module.to(me.device)
        share_start(me, module)
        phase = cls(
            me, path, module, Optimizers(module, is_matrix), Average(module, decay), Clock(me, args.seconds), lr,
            graphs=me.device.type == "cuda" and not args.no_graph, over=torch.zeros((), device=me.device),
        )  # fmt: skip
        if path.exists():
            phase._resume(torch.load(path, map_location=me.device, weights_only=True), args.seconds)
        return phase

    def _resume(self, state: dict, seconds: float) -> None:
        self.step = state["step"]
        self.average.load(state["average"], self.step)
        self.module.load_state_dict(state["weights"] if "weights" in state else self.average.values, strict=False)
        if "optimizers" in state:
            self.optimizers.load_state_dict(state["optimizers"])
        self.clock = Clock(self.me, seconds, state["spent"])

    def run(self, loss_of, stop_after: float = float("inf")) -> None:
        """Trains until the phase's seconds are up, or `stop_after` seconds of this run; then saves.

        `loss_of()` draws a batch and returns its loss, a tensor, and a dict of what to show. It and the update are two
        CUDA graphs, with the exchange between workers in the middle.
        """
        forward = Captured(lambda: self._differentiate(loss_of), self.graphs)
        update = Captured(self._update, self.graphs)
        for fraction in self._fractions(stop_after):
            self.over.fill_(fraction)
            self.optimizers.rate.fill_(self.lr * warm_then_decay(fraction))
            self.average.count()
            shown = forward()
            self.optimizers.share(self.me)
            self.reading = shown | {"norm": update()}
        self.save()

    def _differentiate(self, loss_of) -> dict:
        loss, shown = loss_of()
        self.optimizers.differentiate(loss)
        return {name: value.detach() for name, value in {"loss": loss, **shown}.items()}

    def _update(self) -> torch.Tensor:
        norm = self.optimizers.step()
        self.average.update()
        return norm

    def _fractions(self, stop_after: float):
        """Yields the fraction of the phase that is over, and shows it."""
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
                self.step += 1
                if self.step % 100 == 0:
                    bar.set_postfix_str(f"step {self.step} {self.note()}", refresh=False)
                    bar.update(100 * fraction - bar.n)
                if self.step % self.clock.every == 0 and self.me.agreed(time.monotonic() - began > stop_after):
                    break

    def note(self) -> str:
        return " ".join(f"{name} {float(value):.4f}" for name, value in self.reading.items())

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
