"""The frames in flight: the base class of engines, and two of them. `Ring` is the denoising batch: S stages of F frames,
newest first. One `push` takes F new rows, advances every row by one stage with one call of the network, and returns the F
rows that are done. `Loop` is the same step in a loop, one group at a time: the sequential reference. Both handle rows, not
prompt texts or pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from streamflow.conditioning.inpaint import MASK, Path, put_known
from streamflow.conditioning.prompt import CondBatch, Prompt, Velocity, stack
from streamflow.flow.convention import add_noise, per_row, velocity_from
from streamflow.flow.guidance import UNGUIDED, Anchors, Mode, Weight, combine
from streamflow.flow.schedule import Stages
from streamflow.flow.solvers import Rule
from streamflow.models.protocols import Function

ALWAYS = ("noise", "anchor")  # carried by every row where the rule, or the mode, needs it of any


@dataclass(frozen=True, eq=False)
class Carried:
    """A tensor that travels with the frames of a group from stage to stage. value: `[F, ...]`, one row a frame. fill: the
    value in the rows of frames that do not have it."""

    value: Tensor
    fill: float = 0.0


@dataclass(frozen=True, eq=False)
class Group:
    """F frames that travel together.

    x: `[F, ...]` at the first stage's sigma. prompts, ids: one a frame; a padded group has fewer ids than rows.
    carried: what travels with the rows, by name: "noise", the frames' own; "anchor", float32, their clean latents; the
        known part of inpainted frames (`conditioning.inpaint`).
    draws: float32 `[S, F, ...]`, noise for every stage, for rules that need it fresh.
    copy: the group only fills the ring with frames that were or will be delivered.
    finish: applied to the group's decoded images.
    """

    x: Tensor
    prompts: tuple[Prompt, ...]
    ids: tuple[int, ...]
    carried: Mapping[str, Carried] = field(default_factory=dict)
    draws: Tensor | None = None
    copy: bool = False
    finish: Callable[[Tensor], Tensor] | None = None


def group_on(device: torch.device, group: Group) -> Group:
    """A group with its tensors on a device, except those of its prompts."""
    draws = None if group.draws is None else group.draws.to(device)
    return replace(group, x=group.x.to(device), carried=_carried_on(device, group.carried), draws=draws)


def _carried_on(device: torch.device, carried: Mapping[str, Carried]) -> dict[str, Carried]:
    return {name: replace(one, value=one.value.to(device)) for name, one in carried.items()}


@dataclass(frozen=True, eq=False)
class Done:
    """A group that has left: clean latents `[F, ...]`, with the ids, the mark and the `finish` of its group."""

    x0: Tensor
    ids: tuple[int, ...]
    copy: bool
    finish: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Settings:
    """The settings of an engine. A change of them needs a new engine."""

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
        self._conds, self._prompts = CondBatch(), ()
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
        prompts: tuple[Prompt, ...],
        weight: Weight | tuple[Weight, ...],
        anchors: Anchors | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x at each row's next sigma, guided velocity), both `[rows, ...]`. weight: of all rows, or one for each stage. `t`
        `[rows]` replaces the stages' own."""
        extra = self.extra
        times = self.t if t is None else torch.cat((t[:extra], t))
        rows = torch.cat((x[:extra], x)) if extra else x
        if prompts != self._prompts:
            conds = (*(prompt.negative for prompt in prompts[:extra]), *(prompt.cond for prompt in prompts))
            self._prompts = ()
            self._conds.set(conds)
            self._prompts = prompts  # if that failed, the next call does it again
        arguments = self._conds.arguments
        v = network(rows, times, **arguments) if arguments is not None else self._conds.velocity(network, rows, times)
        if extra or anchors is not None:
            weights = (weight,) if isinstance(weight, Weight) else weight
            guided = [combine(v[extra:], v[:extra], x, self.sigma, one, anchors, self) for one in weights]
            size = self.count // len(weights)
            v = guided[0] if len(guided) == 1 else torch.cat([one.split(size)[i] for i, one in enumerate(guided)])
        return self.step(x, v, noise), v

    def step(self, x: Tensor, v: Tensor, noise: Tensor | None = None) -> Tensor:
        """x at each row's next sigma, given v, by the stream's rule; `noise` `[rows, ...]` where it needs some."""
        return self.settings.rule.step(x, v, self.at, noise)

    def x0(self, x: Tensor, v: Tensor) -> Tensor:
        """The estimate of the image of the first `len(x)` rows, given v, float32 `[n, ...]`."""
        return self.settings.rule.x0(x, v, self._first(len(x)))

    def toward(self, x: Tensor, x0: Tensor) -> Tensor:
        """The v that leads the first `len(x)` rows to the images x0, float32 `[n, ...]`."""
        return self.settings.rule.toward(x, x0, self._first(len(x)))

    def _first(self, count: int) -> dict[str, Tensor]:
        return {name: values[:count] for name, values in self.at.items()}


Observer = Callable[[Rows, Sequence[Group | None], Tensor, Tensor, Tensor], Tensor]
"""(rows, their groups, x and v of this step, x at the next sigma) to x at the next sigma, all `[rows, ...]`."""


class Engine:
    """Takes groups of F frames and returns them drawn, oldest first. The base class keeps nothing in flight.

    settings: what shapes the frames in flight. weight: the guidance weight of all rows, those in flight too. weights: of
    each stage, where they differ. depth: the number of pushes from a group's entering to its leaving. devices: those that
    draw groups in turn, or none. rows: all rows of a call, where that is one call. state: another object after every step.
    first_sigma: the noise level at which frames enter, `[1, 1, ...]`, set by the subclass. observer: sees every step, and
    returns the latents to go on with. groups: those in flight, newest first, None where there is none. leaving: the group
    that the last push returned, or none; read where an observer raised after the step. row_counts: (rows that a call of the
    network advances, rows of the negative prompt in that call).
    """

    observer: Observer | None = None
    depth: int = 1
    devices: tuple[torch.device, ...] = ()
    rows: Rows | None = None
    state: object = None
    anchors: Anchors | None = None
    waiting: Tensor | None = None
    residual_noise: Tensor | None = None
    first_sigma: Tensor
    groups: Sequence[Group | None] = ()
    leaving: tuple[Done, ...] = ()
    row_counts: tuple[int, int]
    weights: tuple[Weight, ...] = ()

    def __init__(self, settings: Settings, weight: Weight = UNGUIDED):
        self.settings, self.weight = settings, weight

    @property
    def in_flight(self) -> int:
        """The number of frames in flight, without copies."""
        return sum(len(group.ids) for group in self.groups if group and not group.copy)

    @property
    def groups_in_flight(self) -> int:
        """The number of groups in flight, with copies."""
        return sum(group is not None for group in self.groups)

    @property
    def empty(self) -> bool:
        """Whether no frame is in flight."""
        return not any(self.groups)

    def holds(self, group: Group) -> bool:
        """Whether this group is in flight."""
        return any(one is group for one in self.groups)

    def push(self, group: Group, network: Function) -> Done | None:
        """Take a group, advance all frames by one stage, and return the oldest group if it is done, copies too."""
        raise NotImplementedError

    def drain(self, network: Function) -> Iterator[Done]:
        """Run the frames in flight to their end, oldest first, copies left out. Empties the engine."""
        return iter(())

    def reset(self) -> None:
        """Drop the frames in flight."""

    def set_levels(self, stages: Stages) -> None:
        """Change the noise levels, as many as before, of all rows, those in flight too."""
        raise NotImplementedError

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        """Give all rows in flight the tensors of these names from this prompt."""


@dataclass(frozen=True, eq=False)
class Flight:
    """The frames in flight after a push. groups: newest first, None where there is none; the last one has left. prompts: of
    all rows. x: the rows `[rows, ...]` at the last step, and `advanced` after it. carried: by name, `[rows, ...]`."""

    groups: tuple[Group | None, ...]
    prompts: tuple[Prompt, ...]
    x: Tensor
    advanced: Tensor
    carried: Mapping[str, Carried]


class Ring(Engine):
    """S stages x F frames, advanced together."""

    rows: Rows

    def __init__(self, settings: Settings, weight: Weight = UNGUIDED):
        super().__init__(settings, weight)
        self.rows, self.depth = Rows(settings, 0, len(settings.stages)), len(settings.stages)
        self.row_counts = self.rows.count, self.rows.extra
        self.first_sigma = self.rows.sigma[:1]
        self._known_rows: tuple[tuple[bool, ...], Tensor | None] = ((), None)
        self.reset()

    def reset(self) -> None:
        s = self.settings
        empty = torch.zeros((self.rows.count, *s.shape), dtype=s.dtype, device=s.device)
        carried = {}
        if s.rule.noise == "own":
            carried["noise"] = Carried(empty)
        if s.mode.carries_anchor:
            carried["anchor"] = Carried(empty.float())
        self._flight = Flight((None,) * len(s.stages), (), empty, empty, carried)

    @property
    def groups(self) -> Sequence[Group | None]:
        """All but the group that the last push returned."""
        return self._flight.groups[:-1]

    @property
    def leaving(self) -> tuple[Done, ...]:
        """The group that the last push returned, or none."""
        oldest, frames = self._flight.groups[-1], self.settings.frames
        return () if oldest is None else (Done(self._flight.advanced[-frames:], oldest.ids, oldest.copy, oldest.finish),)

    def holds(self, group: Group) -> bool:
        return any(one is group for one in self._flight.groups)

    @property
    def state(self) -> object:
        """What is in flight, another object after every step."""
        return self._flight

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Those of the rows that the next push advances besides the new ones."""
        return self._flight.prompts[: -self.settings.frames]

    @prompts.setter
    def prompts(self, prompts: tuple[Prompt, ...]) -> None:
        self._flight = replace(self._flight, prompts=(*prompts, *self._flight.prompts[len(prompts) :]))

    def take(self, other: Ring) -> None:
        """Take the frames in flight of a ring on another device."""
        flight, device = other._flight, self.settings.device
        self._flight = Flight(
            tuple(group and group_on(device, group) for group in flight.groups),
            flight.prompts,
            flight.x.to(device),
            flight.advanced.to(device),
            _carried_on(device, flight.carried),
        )

    @property
    def anchors(self) -> Anchors | None:
        """The rows' anchors, and which rows have one; None where the mode carries none."""
        return self._anchors(self._flight.groups, self._flight.carried) if self.settings.mode.carries_anchor else None

    @property
    def waiting(self) -> Tensor | None:
        """The rows that the next push advances besides the new ones, `[(S - 1) F, ...]`; None with a single stage."""
        return self._flight.advanced[: -self.settings.frames] if len(self.settings.stages) > 1 else None

    @waiting.setter
    def waiting(self, x: Tensor) -> None:
        advanced = torch.cat((x, self._flight.advanced[-self.settings.frames :]))
        self._flight = replace(self._flight, advanced=advanced)

    @property
    def residual_noise(self) -> Tensor | None:
        """The noise that residual guidance takes each row for at its next step, float32 `[rows, ...]`."""
        if self.anchors is None:
            return None
        (x, sigma), anchor, known = self._next(), self.anchors.x0, self.anchors.known
        noise = anchor + velocity_from(x, anchor, sigma)
        return noise if known is None else noise * per_row(known, noise)

    @residual_noise.setter
    def residual_noise(self, noise: Tensor) -> None:
        """Move the anchors of rows in flight so that each is taken for `(1 - sigma) anchor + sigma noise`."""
        remaining, (x, sigma) = self.rows.count - self.settings.frames, self._next()
        anchor = (x.float() - sigma * noise)[:remaining] / (1.0 - sigma[:remaining])
        moved = Carried(torch.cat((anchor, self._flight.carried["anchor"].value[remaining:])))
        self._flight = replace(self._flight, carried={**self._flight.carried, "anchor": moved})

    def _next(self) -> tuple[Tensor, Tensor]:
        """(x, sigma) of all rows, `[rows, ...]`, as the next step sees them; of rows that have left, their last step's."""
        frames, flight, rows = self.settings.frames, self._flight, self.rows
        x = torch.cat((flight.advanced[:-frames], flight.x[-frames:]))
        return x, torch.cat((rows.sigma_next[:-frames], rows.sigma[-frames:]))

    def set_levels(self, stages: Stages) -> None:
        self.rows.set_levels(stages)
        self.first_sigma = self.rows.sigma[:1]

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        changed = {old: old.taking(prompt, names) for old in set(self._flight.prompts)}
        self._flight = replace(self._flight, prompts=tuple(changed[old] for old in self._flight.prompts))

    @torch.no_grad()
    def push(self, group: Group, network: Velocity) -> Done | None:
        """Take F new rows in, advance all rows one stage, and return the oldest group if it is done.

        None while the ring fills. Copies come back too, marked. If the network raises, the ring is as it was before.
        """
        s, frames, before = self.settings, self.settings.frames, self._flight
        groups = (group, *before.groups[:-1])
        prompts = (*group.prompts, *before.prompts)[: self.rows.count]
        prompts += (group.prompts[-1],) * (self.rows.count - len(prompts))
        x = torch.cat((group.x, before.advanced[:-frames]))
        carried = {} if not (group.carried or before.carried) else self._shifted(group, groups)
        anchors = self._anchors(groups, carried) if s.mode.carries_anchor else None
        noise = None if s.rule.noise == "none" else self._noise(groups, carried)
        advanced, v = self.rows.advance(network, x, prompts, self.weights or self.weight, anchors, noise)
        if MASK in carried:
            advanced = put_known(advanced, {name: one.value for name, one in carried.items()}, self.rows.sigma_next, s.path)
        self._flight = Flight(groups, prompts, x, advanced, carried)
        if self.observer is not None:
            changed = self.observer(self.rows, groups, x, v, advanced)  # which may replace what is in flight
            self._flight = replace(self._flight, advanced=changed)
        oldest = groups[-1]
        return oldest and Done(self._flight.advanced[-frames:], oldest.ids, oldest.copy, oldest.finish)

    def push_none(self, network: Velocity) -> Done | None:
        """As `push`, without a group that enters. The ring must not be empty."""
        before = self._flight
        newest = next(group for group in before.groups if group)
        try:
            return self.push(Group(torch.zeros_like(newest.x), newest.prompts, (), copy=True), network)
        finally:
            if self._flight is not before:
                self._flight = replace(self._flight, groups=(None, *self._flight.groups[1:]))

    def drain(self, network: Velocity) -> Iterator[Done]:
        while not self.empty:
            before, failed = self._flight, None
            try:
                left = self.push_none(network)
            except BaseException as error:
                if self._flight is before:
                    raise
                failed, left = error, next(iter(self.leaving), None)  # an observer's, which comes after the step
            if left is not None and not left.copy:
                yield left
            if failed is not None:
                raise failed
        self.reset()

    def _shifted(self, group: Group, groups: Sequence[Group | None]) -> dict[str, Carried]:
        """What the rows carry after this group has entered: the new frames' values first, without the oldest frames'. An
        entry that no group in flight has is dropped, except those that the rule or the mode needs of all rows."""
        frames, before, entering = self.settings.frames, self._flight.carried, group.carried
        carried = {}
        for name, like in {**before, **entering}.items():
            if name not in ALWAYS and not any(one is not None and name in one.carried for one in groups):
                continue
            shape, fill = like.value.shape[1:], like.fill
            first = like.value if name in entering else like.value.new_full((frames, *shape), fill)
            rest = before[name].value if name in before else like.value.new_full((self.rows.count, *shape), fill)
            carried[name] = Carried(torch.cat((first, rest[:-frames])), fill)  # a copy: measured anchors are written into it
        return carried

    def _noise(self, groups: Sequence[Group | None], carried: Mapping[str, Carried]) -> Tensor:
        """Each row's noise for the step that it is about to take; zeros where there is none."""
        if self.settings.rule.noise == "own":
            return carried["noise"].value
        s = self.settings
        nothing = torch.zeros((s.frames, *s.shape), dtype=torch.float32, device=s.device)
        by_stage = enumerate(groups)
        return torch.cat([nothing if g is None or g.draws is None else g.draws[stage] for stage, g in by_stage])

    def _anchors(self, groups: Sequence[Group | None], carried: Mapping[str, Carried]) -> Anchors | None:
        """The rows' anchors; None where no row has one."""
        if self.settings.mode.measures_anchor:
            return Anchors(carried["anchor"].value)
        known = tuple(one is not None and "anchor" in one.carried for one in groups)
        return Anchors(carried["anchor"].value, self._mask_of(known)) if any(known) else None

    def _mask_of(self, known: tuple[bool, ...]) -> Tensor | None:
        """Bool `[rows]`: the rows of these stages; None for all. Made again only when it changes."""
        if known != self._known_rows[0]:
            frames, mask = self.settings.frames, None
            if not all(known):
                mask = torch.ones(self.rows.count, dtype=torch.bool, device=self.settings.device)
                for stage in (i for i, one in enumerate(known) if not one):
                    mask[stage * frames : (stage + 1) * frames].fill_(False)
            self._known_rows = known, mask
        return self._known_rows[1]


class Loop(Engine):
    """The same step in a loop: each push runs its group through all stages. Nothing stays in flight."""

    def __init__(self, settings: Settings, weight: Weight = UNGUIDED):
        super().__init__(settings, weight)
        self.stages = [Rows(settings, i, i + 1) for i in range(len(settings.stages))]
        self.row_counts = self.stages[0].count, self.stages[0].extra
        self.first_sigma = self.stages[0].sigma[:1]

    def set_levels(self, stages: Stages) -> None:
        for rows in self.stages:
            rows.set_levels(stages)
        self.first_sigma = self.stages[0].sigma[:1]

    @torch.no_grad()
    def push(self, group: Group, network: Velocity) -> Done:
        x, s = group.x, self.settings
        carried = {name: one.value for name, one in group.carried.items()}
        anchors = None
        if s.mode.measures_anchor:
            anchors = Anchors(torch.zeros_like(x, dtype=torch.float32))
        elif s.mode.carries_anchor and "anchor" in carried:
            anchors = Anchors(carried["anchor"].clone())
        for rows in self.stages:
            before, noise = x, carried.get("noise")
            if s.rule.noise == "fresh":
                noise = None if group.draws is None else group.draws[rows.first]
            x, v = rows.advance(network, x, group.prompts, self.weight, anchors, noise)
            if MASK in carried:
                x = put_known(x, carried, rows.sigma_next, s.path)
            if self.observer is not None:
                x = self.observer(rows, (group,), before, v, x)
        return Done(x, group.ids, group.copy, group.finish)
