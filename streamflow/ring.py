"""The frames in flight. `Ring` is the denoising batch: S stages of F frames, newest first; one `push` takes F new rows,
advances every row by one stage with one call of the network, and gives back the F rows that are done. `Loop` is the
same step in a loop, one group at a time: the sequential reference. They know rows, not prompts' texts, not pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamflow.conditioning import Cond, CondBatch, Prompt, Velocity
from streamflow.flow import euler, renoise
from streamflow.guidance import Anchors, Mode, combine
from streamflow.schedule import Stages


@dataclass(frozen=True, eq=False)
class Group:
    """F frames that travel together. `x` `[F, ...]` at the first stage's sigma; `noise` `[F, ...]`, the frames' own,
    where rows are re-noised; `anchor` float32 `[F, ...]`, clean latents, where known; `prompts`, one a frame;
    `ids`, one a frame; `copy` marks a group that only fills the ring and whose frames were or will be delivered."""

    x: Tensor
    prompts: tuple[Prompt, ...]
    ids: tuple[int, ...]
    noise: Tensor | None = None
    anchor: Tensor | None = None
    copy: bool = False


@dataclass(frozen=True, eq=False)
class Done:
    """A group that has left: clean latents `[F, ...]`, with the ids and the mark it came with."""

    x0: Tensor
    ids: tuple[int, ...]
    copy: bool


@dataclass(frozen=True)
class Settings:
    """All that shapes the frames in flight; a change of it needs a new ring."""

    stages: Stages
    frames: int
    mode: Mode
    renoise: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Rows:
    """Rows side by side, with the buffers that belong to them: x, noise levels, weights and, where the settings ask
    for them, anchors and noise. Stage `i` for `first <= i < last`, F rows each, newest first."""

    def __init__(self, settings: Settings, first: int, last: int):
        s = settings
        stages, frames = s.stages, s.frames
        self.settings = s
        self.count = (last - first) * frames
        self.extra = s.mode.extra_rows(self.count, frames if first == 0 else 0)
        device = {"device": s.device}
        per_frame = {"repeats": frames, "dim": 0}
        self.sigma = stages.sigmas[first:last].to(**device).repeat_interleave(**per_frame)
        self.sigma_next = stages.sigmas_next[first:last].to(**device).repeat_interleave(**per_frame)
        t = stages.timesteps[first:last].to(**device).repeat_interleave(**per_frame)
        self.t = torch.cat((t[: self.extra], t))
        self.w = torch.ones(self.count, **device)
        self.conds = CondBatch()

    def set_levels(self, stages: Stages) -> None:
        """Copy other noise levels, as many as before, into the buffers: rows under way change theirs too."""
        other = Rows(replace(self.settings, stages=stages), 0, len(stages))
        for name in ("sigma", "sigma_next", "t"):
            getattr(self, name).copy_(getattr(other, name))

    def advance(
        self,
        network: Velocity,
        x: Tensor,
        prompts: Sequence[Prompt],
        anchors: Anchors | None,
        noise: Tensor | None,
        t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x at each row's next sigma, guided velocity), both `[rows, ...]`. `t` `[rows]` replaces the stages' own."""
        extra = self.extra
        times = self.t if t is None else torch.cat((t[:extra], t))
        conds = _conds(prompts, extra)
        v = self.conds.velocity(network, torch.cat((x[:extra], x)) if extra else x, times, conds)
        v = combine(self.settings.mode, v[extra:], v[:extra], x, self.sigma, self.w, anchors)
        return self.step(x, v, noise), v

    def step(self, x: Tensor, v: Tensor, noise: Tensor | None) -> Tensor:
        """x at each row's next sigma, given the velocity: Euler, or re-noised where the rows carry noise."""
        if noise is None:
            return euler(x, v, self.sigma, self.sigma_next)
        return renoise(x, v, self.sigma, self.sigma_next, noise)


def _conds(prompts: Sequence[Prompt], extra: int) -> tuple[Cond, ...]:
    return (*(p.uncond for p in prompts[:extra]), *(p.cond for p in prompts))


class Ring:
    """S stages x F frames, advanced together. The verbs are push, flush and reset."""

    def __init__(self, settings: Settings):
        s = self.settings = settings
        self.rows = Rows(s, 0, len(s.stages))
        full = (self.rows.count, *s.shape)
        self.x = torch.zeros(full, dtype=s.dtype, device=s.device)
        self.anchors = _new_anchors(s, full) if s.mode.carries_anchor else None
        self.noise = torch.zeros(full, dtype=s.dtype, device=s.device) if s.renoise else None
        self.reset()

    def reset(self) -> None:
        """Empty the ring; what was in flight is gone."""
        self._groups: deque[Group | None] = deque([None] * len(self.settings.stages), len(self.settings.stages))
        self._prompts: list[Prompt] = []
        self._advanced = torch.zeros_like(self.x)

    @property
    def in_flight(self) -> int:
        """How many frames are under way, copies not counted."""
        return sum(len(g.ids) for g in self._waiting if g and not g.copy)

    @property
    def empty(self) -> bool:
        return not any(self._waiting)

    @property
    def waiting(self) -> Tensor | None:
        """The rows that the next push advances beside the new ones, `[(S - 1) F, ...]`; None with a single stage."""
        return self._advanced[: -self.settings.frames] if len(self.settings.stages) > 1 else None

    @property
    def _waiting(self) -> list[Group | None]:
        """The groups under way between two pushes: all but the one that the last push let out."""
        return list(self._groups)[:-1]

    def set_weight(self, w: float) -> None:
        """Change the guidance weight of all rows, those under way too."""
        self.rows.w.fill_(w)

    def set_levels(self, stages: Stages) -> None:
        """Change the noise levels, as many as before, of all rows, those under way too."""
        self.rows.set_levels(stages)

    def set_prompt(self, prompt: Prompt) -> None:
        """Change the prompt of all rows under way."""
        self._prompts = [prompt] * len(self._prompts)

    @torch.no_grad()
    def push(self, group: Group, network: Velocity) -> Done | None:
        """Take F new rows in, advance all rows one stage, and return the oldest group if it is done.

        None while the ring fills. Copies come back too, marked.
        """
        self._enter(group)
        self._advanced, _ = self.rows.advance(network, self.x, self._prompts, self.anchors, self.noise)
        oldest = self._groups[-1]
        if oldest is None:
            return None
        return Done(self._advanced[-self.settings.frames :], oldest.ids, oldest.copy)

    def flush(self, network: Velocity) -> list[Done]:
        """Run what is in flight to its end with the settings it has; oldest first, copies left out. Empties the ring."""
        done = []
        while not self.empty:
            newest = next(group for group in self._groups if group)
            padding = Group(torch.zeros_like(newest.x), newest.prompts, (), copy=True)
            left = self.push(padding, network)
            if left is not None and not left.copy:
                done.append(left)
            self._groups[0] = None
        self.reset()
        return done

    def _enter(self, group: Group) -> None:
        """Shift all that rows carry by one stage, and write the new frames' into the first."""
        kept = -self.settings.frames or None
        self._groups.appendleft(group)
        self._prompts = [*group.prompts, *self._prompts][: self.rows.count]
        self._prompts += [group.prompts[-1]] * (self.rows.count - len(self._prompts))
        torch.cat((group.x, self._advanced[:kept]), out=self.x)
        if self.noise is not None:
            _shift_in(self.noise, torch.zeros_like(group.x) if group.noise is None else group.noise)
        if self.anchors is not None:
            _shift_in(self.anchors.x0, torch.zeros_like(group.x) if group.anchor is None else group.anchor)
            _shift_in(self.anchors.known, self.anchors.known.new_full((len(group.x),), group.anchor is not None))


class Loop:
    """The same step in a loop: each push runs its group through all stages. Nothing stays in flight."""

    in_flight = 0
    empty = True
    waiting = None

    def __init__(self, settings: Settings):
        self.settings = settings
        self.stages = [Rows(settings, i, i + 1) for i in range(len(settings.stages))]

    def reset(self) -> None:
        """Nothing is in flight."""

    def set_weight(self, w: float) -> None:
        """Change the guidance weight."""
        for rows in self.stages:
            rows.w.fill_(w)

    def set_levels(self, stages: Stages) -> None:
        """Change the noise levels."""
        self.settings = replace(self.settings, stages=stages)
        self.stages = [Rows(self.settings, i, i + 1) for i in range(len(stages))]

    def set_prompt(self, prompt: Prompt) -> None:
        """No row is under way."""

    @torch.no_grad()
    def push(self, group: Group, network: Velocity) -> Done:
        """Run a group from the first stage to sigma 0."""
        x, s = group.x, self.settings
        anchors = _new_anchors(s, group.x.shape) if s.mode.carries_anchor else None
        if anchors is not None and group.anchor is not None:
            anchors.x0.copy_(group.anchor)
            anchors.known.fill_(True)
        for rows in self.stages:
            x, _ = rows.advance(network, x, group.prompts, anchors, group.noise if s.renoise else None)
        return Done(x, group.ids, group.copy)

    def flush(self, network: Velocity) -> list[Done]:
        """Nothing is in flight."""
        return []


def _new_anchors(s: Settings, shape: Sequence[int]) -> Anchors:
    known = torch.zeros(shape[0], dtype=torch.bool, device=s.device)
    return Anchors(torch.zeros(tuple(shape), dtype=torch.float32, device=s.device), known)


def _shift_in(buffer: Tensor, new: Tensor) -> None:
    """Move a buffer's rows back by len(new) and write `new` before them, in place."""
    n = len(new)
    if len(buffer) > n:
        buffer[n:] = buffer[:-n].clone()
    buffer[:n] = new
