"""Does an engine draw what the plain module draws? Eight calls are compared before it is used, by PSNR. Knows two modules
that should be equal, and how to vary a part's inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from streamflow._decibels import decibels
from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt.errors import EngineMismatch
from streamflow.acceleration.tensorrt.profile import Profile

CALLS = 8


def noise_power(got: Tensor, want: Tensor) -> Tensor:
    """The mean square error over the square of `want`'s range (its largest minus its smallest), a scalar on its device:
    PSNR is -10 log10 of it. Infinite where `got` is of another shape or not finite."""
    if got.shape != want.shape:
        return torch.full((), math.inf, device=want.device)
    got, want = got.float(), want.float()
    peak = (want.max() - want.min()).clamp(min=torch.finfo(torch.float32).tiny)
    return ((got - want) / peak).square().mean().nan_to_num(math.inf, math.inf)


class Trial:
    """Comparisons, until there are enough. The device is not waited for before `verdict`."""

    def __init__(self, part: str, tolerance_db: float, calls: int = CALLS):
        self.part, self.tolerance_db, self.calls = part, tolerance_db, calls
        self._powers: list[Tensor] = []

    def add(self, got: Tensor, want: Tensor) -> None:
        """Compare one call."""
        self._powers.append(noise_power(got, want))

    @property
    def done(self) -> bool:
        """Whether enough ticks were compared."""
        return len(self._powers) >= self.calls

    def verdict(self) -> float:
        """The least PSNR of the calls. EngineMismatch, with all of them, where it is below the tolerance."""
        found = [decibels(power.item()) for power in self._powers]
        if (worst := min(found)) < self.tolerance_db:
            told = ", ".join(f"{db:.1f}" for db in found)
            raise EngineMismatch(
                *(self.part, "comparing", f"PSNR {worst:.1f} dB of {len(found)} calls ({told}), {self.tolerance_db} wanted"),
                "use accelerate('compile'); if the difference does not matter to you, give a lower tolerance_db",
            )
        return worst


def varied(part: Part, profile: Profile, k: int) -> dict[str, Tensor]:
    """The part's inputs, another set for every k, 0 being its own: other batches within the profile, other rows, noise."""
    inputs = {}
    for i, (name, value) in enumerate(part.inputs.items()):
        if name in part.shared or k == 0:
            inputs[name] = value
            continue
        r = profile.ranges[name]
        batch = (len(value), r.smallest[0], r.largest[0])[k % 3]
        rows = value[(torch.arange(batch, device=value.device) + k) % len(value)]
        inputs[name] = _shaken(rows, 1000 * i + k)
    return inputs


def _shaken(value: Tensor, seed: int) -> Tensor:
    """Numbers a row keep their meaning (times, weights) and are made smaller; others get noise."""
    if not value.is_floating_point():
        return value
    if value.dim() == 1:
        return value * (1 - seed % 8 / 16)
    scale = value.float().std().nan_to_num(0.0)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.device)
    return (value.float() + noise * torch.where(scale > 0, scale / 4, 1.0)).to(value.dtype)


@torch.no_grad()
def compare(part: Part, profile: Profile, engine: nn.Module, tolerance_db: float) -> float:
    """The least PSNR of `CALLS` varied calls. EngineMismatch below the tolerance."""
    trial = Trial(part.name, tolerance_db)
    for k in range(CALLS):
        inputs = varied(part, profile, k)
        trial.add(engine(**inputs), part.module(**inputs))
    return trial.verdict()
