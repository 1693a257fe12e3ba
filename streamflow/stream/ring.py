"""The frames in flight. `Ring` is the denoising batch: S stages of F frames, newest first; one `push` takes F new rows,
advances every row by one stage with one call of the network, and gives back the F rows that are done. `Loop` is the
same step in a loop, one group at a time: the sequential reference. They know rows, not prompts' texts, not pixels.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamflow.conditioning.inpaint import Known, Paste, Path
from streamflow.conditioning.prompt import Cond, CondBatch, Prompt, Velocity, stack
from streamflow.flow.convention import add_noise
from streamflow.flow.guidance import UNGUIDED, Anchors, Mode, Weight, combine
from streamflow.flow.schedule import Stages
from streamflow.flow.solvers import Rule


@dataclass(frozen=True, eq=False)
class Group:
    """F frames that travel together. `x` `[F, ...]` at the first stage's sigma; `noise` `[F, ...]`, the frames' own,
    where rows are re-noised; `anchor` float32 `[F, ...]`, clean latents, where known; `prompts`, one a frame;
    `ids`, one a frame; `copy` marks a group that only fills the ring and whose frames were or will be delivered; `known`:
    what of them is known and not drawn; `paste`: what is to be done to their pictures, carried along; `draws` float32
    `[S, F, ...]`, noise for every stage, where the rule needs it fresh."""

    x: Tensor
    prompts: tuple[Prompt, ...]
    ids: tuple[int, ...]
    noise: Tensor | None = None
    anchor: Tensor | None = None
    copy: bool = False
    known: Known | None = None
    paste: Paste | None = None
    draws: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Done:
    """A group that has left: clean latents `[F, ...]`, with the ids, the mark and the `paste` it came with."""

    x0: Tensor
    ids: tuple[int, ...]
    copy: bool
    paste: Paste | None = None


@dataclass(frozen=True)
class Settings:
    """All that shapes the frames in flight; a change of it needs a new ring."""

    stages: Stages
    frames: int
    mode: Mode
    rule: Rule
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    path: Path = add_noise


class Rows:
    """Rows side by side, and the noise levels that belong to them: stages `first` to `last`, F rows each, newest first."""

    def __init__(self, settings: Settings, first: int, last: int):
        frames = settings.frames
        self.settings, self.first, self.last = settings, first, last
        self.count = (last - first) * frames
        self.extra = settings.mode.extra_rows(self.count, frames if first == 0 else 0)
        self.conds = CondBatch()
        self.set_levels(settings.stages)

    def set_levels(self, stages: Stages) -> None:
        """Take these noise levels. `sigma`, `sigma_next` float32 and `dt`, in the rows' dtype, are `[rows, 1, ...]`."""
        s = self.settings

        def by_row(values: Tensor) -> Tensor:
            rows = values[self.first : self.last].to(s.device).repeat_interleave(s.frames, dim=0)
            return rows.reshape(-1, *([1] * len(s.shape)))

        self.sigma, self.sigma_next = by_row(stages.sigmas), by_row(stages.sigmas_next)
        self.dt = (self.sigma_next - self.sigma).to(s.dtype)
        self.at = {"sigma": self.sigma, "sigma_next": self.sigma_next, "dt": self.dt}
        self.at |= {name: by_row(values) for name, values in s.rule.levels(stages).items()}
        t = by_row(stages.timesteps).flatten()
        self.t = torch.cat((t[: self.extra], t))

    def example(self, prompt: Prompt) -> dict[str, Tensor]:
        """Arguments of the network as `advance` gives them: x and t, then the prompt's, all rows of x zero."""
        count, s = self.count + self.extra, self.settings
        x = torch.zeros((count, *s.shape), dtype=s.dtype, device=s.device)
        return {"x": x, "t": self.t, **stack((prompt.cond,) * count)}

    def advance(
        self,
        network: Velocity,
        x: Tensor,
        prompts: Sequence[Prompt],
        weight: Weight,
        anchors: Anchors | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x at each row's next sigma, guided velocity), both `[rows, ...]`. `t` `[rows]` replaces the stages' own."""
        extra = self.extra
        times = self.t if t is None else torch.cat((t[:extra], t))
        rows = torch.cat((x[:extra], x)) if extra else x
        v = self.conds.velocity(network, rows, times, _conds(prompts, extra))
        v = combine(v[extra:] if extra else v, v[:extra], x, self.sigma, weight, anchors, self)
        return self.step(x, v, noise), v

    def step(self, x: Tensor, v: Tensor, noise: Tensor | None = None) -> Tensor:
        """x at each row's next sigma, given v, by the stream's rule; `noise` `[rows, ...]` where it needs some."""
        return self.settings.rule.step(x, v, self.at, noise)

    def x0(self, x: Tensor, v: Tensor) -> Tensor:
        """The image that the first `len(x)` rows head for with v, float32 `[n, ...]`."""
        return self.settings.rule.x0(x, v, self._first(len(x)))

    def toward(self, x: Tensor, x0: Tensor) -> Tensor:
        """The v that leads the first `len(x)` rows to the images x0, float32 `[n, ...]`."""
        return self.settings.rule.toward(x, x0, self._first(len(x)))

    def _first(self, count: int) -> dict[str, Tensor]:
        return {name: values[:count] for name, values in self.at.items()}


Observer = Callable[[Rows, Sequence[Group | None], Tensor, Tensor, Tensor], Tensor]
"""(rows, their groups, x and v of this step, x at the next sigma) to x at the next sigma, all `[rows, ...]`."""


def _conds(prompts: Sequence[Prompt], extra: int) -> tuple[Cond, ...]:
    return (*(p.uncond for p in prompts[:extra]), *(p.cond for p in prompts))


class Ring:
    """S stages x F frames, advanced together. The verbs are push, flush and reset. `weight` is the guidance weight of all
    rows, those under way too. `observer` sees every step and answers with the latents to go on with."""

    observer: Observer | None = None

    def __init__(self, settings: Settings, weight: Weight = UNGUIDED):
        s = self.settings = settings
        self.weight = weight
        self.rows = Rows(s, 0, len(s.stages))
        self.reset()

    def reset(self) -> None:
        """Empty the ring; what was in flight is gone."""
        s = self.settings
        self._groups: deque[Group | None] = deque([None] * len(s.stages), len(s.stages))
        self._prompts: list[Prompt] = []
        empty = torch.zeros((self.rows.count, *s.shape), dtype=s.dtype, device=s.device)
        self.x = self._advanced = empty
        self.noise = empty if s.rule.noise == "own" else None
        self.anchors = Anchors(empty.float()) if s.mode.carries_anchor else None
        self._known: tuple[bool, ...] = ()
        self.known: Known | None = None

    @property
    def in_flight(self) -> int:
        """How many frames are under way, copies not counted."""
        return sum(len(g.ids) for g in self._waiting if g and not g.copy)

    @property
    def groups_in_flight(self) -> int:
        """How many groups are under way, copies too."""
        return sum(group is not None for group in self._waiting)

    @property
    def empty(self) -> bool:
        """Whether no frame is in flight."""
        return not any(self._waiting)

    def holds(self, group: Group) -> bool:
        """Whether this very group is under way."""
        return any(one is group for one in self._groups)

    @property
    def first_sigma(self) -> Tensor:
        """The noise level at which frames enter, `[1, 1, ...]`."""
        return self.rows.sigma[:1]

    @property
    def known_anchors(self) -> Anchors | None:
        """The rows' anchors; None where no row has one, or the mode carries none."""
        return self.anchors if self.settings.mode.measures_anchor or any(self._known) else None

    @property
    def waiting(self) -> Tensor | None:
        """The rows that the next push advances beside the new ones, `[(S - 1) F, ...]`; None with a single stage."""
        return self._advanced[: -self.settings.frames] if len(self.settings.stages) > 1 else None

    @property
    def next_x(self) -> Tensor:
        """The latents of all rows `[rows, ...]` as the next step sees them; of the rows that have left, their last
        step's."""
        return torch.cat((self._advanced[: -self.settings.frames], self.x[-self.settings.frames :]))

    @property
    def next_sigma(self) -> Tensor:
        """The noise levels of `next_x`, `[rows, 1, ...]`."""
        return torch.cat((self.rows.sigma_next[: -self.settings.frames], self.rows.sigma[-self.settings.frames :]))

    def set_waiting(self, x: Tensor) -> None:
        """Replace the latents of the rows under way, `[(S - 1) F, ...]`."""
        self._advanced = torch.cat((x, self._advanced[-self.settings.frames :]))

    def set_residual_noise(self, noise: Tensor) -> None:
        """Move the anchors of the rows under way so that each is taken for `(1 - sigma) anchor + sigma noise` at its next
        step; noise float32 `[rows, ...]`, of which the rows that have left take none."""
        going_on = self.rows.count - self.settings.frames
        x, sigma = self.next_x[:going_on].float(), self.next_sigma[:going_on]
        anchor = (x - sigma * noise[:going_on]) / (1.0 - sigma)
        self.anchors = Anchors(torch.cat((anchor, self.anchors.x0[going_on:])), self.anchors.known)

    @property
    def _waiting(self) -> list[Group | None]:
        """The groups under way between two pushes: all but the one that the last push let out."""
        return list(self._groups)[:-1]

    def set_levels(self, stages: Stages) -> None:
        """Change the noise levels, as many as before, of all rows, those under way too."""
        self.rows.set_levels(stages)

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        """Give all rows under way the tensors of these names from this prompt."""
        changed = {old: old.taking(prompt, names) for old in set(self._prompts)}
        self._prompts = [changed[old] for old in self._prompts]

    @torch.no_grad()
    def push(self, group: Group, network: Velocity) -> Done | None:
        """Take F new rows in, advance all rows one stage, and return the oldest group if it is done.

        None while the ring fills. Copies come back too, marked. If the network raises, the ring is as it was before.
        """
        before = {**vars(self), "_groups": self._groups.copy(), "anchors": copy.copy(self.anchors)}
        try:
            self._enter(group)
            noise = self._draws() if self.settings.rule.noise == "fresh" else self.noise
            x, v = self.rows.advance(network, self.x, self._prompts, self.weight, self.known_anchors, noise)
        except BaseException:
            vars(self).update(before)
            raise
        if self.known is not None:
            x = self.known.put(x, self.rows.sigma_next, self.settings.path)
        self._advanced = x
        if self.observer is not None:
            self._advanced = self.observer(self.rows, self._groups, self.x, v, x)
        return next(iter(self.leaving), None)

    @property
    def leaving(self) -> tuple[Done, ...]:
        """The group that the last push has let out, if it did."""
        oldest = self._groups[-1]
        if oldest is None:
            return ()
        return (Done(self._advanced[-self.settings.frames :], oldest.ids, oldest.copy, oldest.paste),)

    def flush(self, network: Velocity) -> list[Done]:
        """Run what is in flight to its end with the settings it has; oldest first, copies left out. Empties the ring."""
        return list(self.drain(network))

    def drain(self, network: Velocity) -> Iterator[Done]:
        """As `flush`, one group after another, each when it is done."""
        while not self.empty:
            newest = next(group for group in self._groups if group)
            padding = Group(torch.zeros_like(newest.x), newest.prompts, (), copy=True)
            failed = None
            try:
                left = self.push(padding, network)
            except BaseException as error:
                if self._groups[0] is not padding:
                    raise
                failed, left = error, next(iter(self.leaving), None)  # an observer's, which comes after the step
            self._groups[0] = None
            if left is not None and not left.copy:
                yield left
            if failed is not None:
                raise failed
        self.reset()

    def _draws(self) -> Tensor:
        """Each row's fresh noise for the step it is about to take; zeros where there is none."""
        nothing = torch.zeros_like(self.x[: self.settings.frames], dtype=torch.float32)
        groups = enumerate(self._groups)
        return torch.cat([nothing if g is None or g.draws is None else g.draws[stage] for stage, g in groups])

    def _enter(self, group: Group) -> None:
        """Shift all that rows carry by one stage, the new frames' first."""
        self._groups.appendleft(group)
        self._prompts = [*group.prompts, *self._prompts][: self.rows.count]
        self._prompts += [group.prompts[-1]] * (self.rows.count - len(self._prompts))
        self.x = self._shifted(group.x, self._advanced)
        if group.known is not None or self.known is not None:
            self._enter_known(group.known)
        if self.noise is not None:
            self.noise = self._shifted(torch.zeros_like(group.x) if group.noise is None else group.noise, self.noise)
        if self.anchors is not None:
            anchor = torch.zeros_like(group.x, dtype=torch.float32) if group.anchor is None else group.anchor
            self.anchors.x0 = self._shifted(anchor, self.anchors.x0)
            self._know(tuple(one is not None and one.anchor is not None for one in self._groups))

    def _enter_known(self, new: Known | None) -> None:
        """What is known moves on with its rows; once no row knows anything, nothing is carried."""
        rows = new.nothing(self.rows.count) if self.known is None else self.known
        some = any(one is not None and one.known is not None for one in self._groups)
        self.known = rows.shifted(new, self.settings.frames) if some else None

    def _shifted(self, new: Tensor, rows: Tensor) -> Tensor:
        return torch.cat((new, rows[: -len(new)]))  # always a copy: a measured anchor is written into it

    def _know(self, known: tuple[bool, ...]) -> None:
        """Say which rows' anchors are known, if that has changed."""
        if known == self._known:
            return
        self._known = known
        self.anchors.known = None
        if not all(known) and not self.settings.mode.measures_anchor:
            frames = self.settings.frames
            mask = torch.ones(self.rows.count, dtype=torch.bool, device=self.settings.device)
            for stage in (i for i, one in enumerate(known) if not one):
                mask[stage * frames : (stage + 1) * frames].fill_(False)
            self.anchors.known = mask


class Loop:
    """The same step in a loop: each push runs its group through all stages. Nothing stays in flight."""

    observer: Observer | None = None
    in_flight = groups_in_flight = 0
    empty = True
    waiting = None
    known_anchors = None

    def __init__(self, settings: Settings, weight: Weight = UNGUIDED):
        self.settings, self.weight = settings, weight
        self.stages = [Rows(settings, i, i + 1) for i in range(len(settings.stages))]

    @property
    def first_sigma(self) -> Tensor:
        """The noise level at which frames enter, `[1, 1, ...]`."""
        return self.stages[0].sigma[:1]

    def holds(self, group: Group) -> bool:
        """Whether this very group is under way: never."""
        return False

    def reset(self) -> None:
        """Nothing is in flight."""

    def set_levels(self, stages: Stages) -> None:
        """Change the noise levels."""
        for rows in self.stages:
            rows.set_levels(stages)

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        """No row is under way."""

    @torch.no_grad()
    def push(self, group: Group, network: Velocity) -> Done:
        """Run a group from the first stage to sigma 0."""
        x, s = group.x, self.settings
        anchors = None
        if s.mode.measures_anchor or (s.mode.carries_anchor and group.anchor is not None):
            anchors = Anchors(torch.zeros_like(x, dtype=torch.float32) if group.anchor is None else group.anchor.clone())
        for rows in self.stages:
            before = x
            x, v = rows.advance(network, x, group.prompts, self.weight, anchors, self._noise(group, rows.first))
            if group.known is not None:
                x = group.known.put(x, rows.sigma_next, s.path)
            if self.observer is not None:
                x = self.observer(rows, (group,), before, v, x)
        return Done(x, group.ids, group.copy, group.paste)

    def _noise(self, group: Group, stage: int) -> Tensor | None:
        of = {"none": None, "own": group.noise, "fresh": None if group.draws is None else group.draws[stage]}
        return of[self.settings.rule.noise]

    def flush(self, network: Velocity) -> list[Done]:
        """Nothing is in flight."""
        return []

    def drain(self, network: Velocity) -> Iterator[Done]:
        """Nothing is in flight."""
        return iter(())
