"""Complete rings on several devices: frame i goes to ring i mod N, and images leave in order.

Each ring has the rows and the shapes of the one ring of a stream, so every frame is computed as there. A group leaves N S
pushes after it has entered, S stages times N rings: while a step is launched on one device, the last steps of the others
are still running.

On a GPU each ring has a CUDA stream of its own (`Replicas.lane`). Otherwise one ring's step would wait for another's: the
inputs of a frame are made on the stream's device, and a copy between GPUs makes the current streams of both wait for each
other.

What is set between two pushes acts as in one ring. There, the row of group f at stage s advances at push f + s. So here a
row takes what was set before push k if f + s >= k, although it advances at push f + s N.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import is_not
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from streamflow.conditioning.prompt import Prompt
from streamflow.flow.guidance import Weight
from streamflow.flow.schedule import Stages
from streamflow.models.protocols import Function
from streamflow.stream.ring import Done, Engine, Group, Loop, Ring, Rows, Settings, group_on

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_COPIES = 16  # prompts whose copies on the devices are kept although no frame in flight has them


class Replicas(Protocol):
    """The network on several devices, which may occur several times."""

    devices: tuple[torch.device, ...]

    def on(self, index: int) -> Function:
        """The network of one of the devices, for inputs that are there."""
        ...

    def lane(self, index: int, home: torch.device, joined: bool) -> AbstractContextManager[None]:
        """A context in which work for one of the devices is queued beside the others', after what is queued now. joined:
        what is queued after the context waits for it."""
        ...


class History(Generic[T]):
    """A value that changes between pushes."""

    def __init__(self, value: T) -> None:
        self._values = [(0, value)]

    def set(self, push: int, value: T) -> None:
        """The value from this push on."""
        self._values.append((push, value))

    def at(self, push: int) -> T:
        """The value at this push; the oldest that is known before it was set."""
        return next((value for since, value in reversed(self._values) if since <= push), self._values[0][1])

    def forget(self, push: int) -> None:
        """Forget values that only pushes before this one need."""
        while len(self._values) > 1 and self._values[1][0] <= push:
            del self._values[0]


@dataclass(frozen=True, eq=False)
class _Plan:
    """One step of a ring. prompts: of each group after it, newest first, on the stream's device. levels, weights: the noise
    levels and guidance weights of each stage. group: the one that enters, None where none does."""

    group: Group | None
    prompts: tuple[tuple[Prompt, ...], ...]
    levels: tuple[Stages, ...]
    weights: tuple[Weight, ...]


@dataclass(eq=False)
class _Lane:
    """One ring. index: of its device. prompts: of its groups, newest first, on the stream's device. levels: as they were set
    last, one for each stage. taken: whether the last step was taken, although an error followed. interrupted: whether the
    observer raised in it, which is no failure of the device. fresh: it has not taken a step yet."""

    engine: Ring | Loop
    index: int
    prompts: tuple[tuple[Prompt, ...], ...] = ()
    levels: tuple[Stages, ...] = ()
    taken: bool = False
    interrupted: bool = False
    fresh: bool = True


@dataclass(frozen=True)
class _Left:
    """A group that has left its ring, with x0 on the stream's device, complete after the event."""

    done: Done
    event: torch.Event | None


class Interleaved(Engine):
    """N rings, or N loops, on these devices. Group i enters ring i mod N. `push` takes `Replicas`."""

    rows: Rows

    def __init__(self, settings: Settings, weight: Weight, batched: bool, devices: Sequence[torch.device]):
        self._make = Ring if batched else Loop
        self._last = len(settings.stages) - 1 if batched else 0  # the stage at which a group leaves its ring
        self.devices, self.depth = tuple(devices), (self._last + 1) * len(devices)
        self._failed: set[int] = set()  # devices that are tried last
        super().__init__(settings, weight)
        self.rows = Rows(settings, 0, self._last + 1)  # on the stream's device, as those of each ring
        self.row_counts, self.first_sigma = (self.rows.count, self.rows.extra), self.rows.sigma[:1]
        self.reset()

    def reset(self) -> None:
        working = [i for i in self._numbers if i not in self._failed] or list(self._numbers)
        self._lanes = [_Lane(self._engine_on(working[i % len(working)]), working[i % len(working)]) for i in self._numbers]
        self._pushes = 0
        self._late: deque[_Left | None] = deque()  # what the last N - 1 pushes made leave
        self._weights, self._levels = History(self.weight), History(self.settings.stages)
        self._changes: list[tuple[int, Prompt, frozenset[str]]] = []
        self._copies: WeakKeyDictionary[Prompt, dict[int, _Copy]] = WeakKeyDictionary()
        self._entered: Group | None = None
        self.leaving = ()

    @property
    def _numbers(self) -> range:
        return range(len(self.devices))

    def _engine_on(self, index: int) -> Ring | Loop:
        return self._make(replace(self.settings, device=self.devices[index]), self.weight)

    # -- what is in flight ----------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        late = sum(len(left.done.ids) for left in self._late if left and not left.done.copy)
        return late + sum(lane.engine.in_flight for lane in self._lanes)

    @property
    def groups_in_flight(self) -> int:
        return sum(left is not None for left in self._late) + sum(lane.engine.groups_in_flight for lane in self._lanes)

    @property
    def empty(self) -> bool:
        return not any(self._late) and all(lane.engine.empty for lane in self._lanes)

    def holds(self, group: Group) -> bool:
        return self._entered is group

    # -- what is set between pushes -------------------------------------------------------------------------------------

    def set_levels(self, stages: Stages) -> None:
        self.settings = replace(self.settings, stages=stages)
        self.rows.set_levels(stages)
        self.first_sigma = self.rows.sigma[:1]
        self._levels.set(self._pushes, stages)

    def set_prompt(self, prompt: Prompt, names: frozenset[str]) -> None:
        self._changes.append((self._pushes, prompt, names))

    def _plan(self, lane: _Lane, group: Group | None) -> _Plan:
        """The next step of a ring: what each of its rows takes, which one ring would advance at push f + s."""
        self._weights.set(self._pushes, self.weight)
        seen = [self._pushes - stage * (len(self._lanes) - 1) for stage in range(self._last + 1)]
        prompts = [lane.prompts[0] if group is None else group.prompts]
        for push, waiting in zip(seen[1:], lane.prompts, strict=False):
            for since, prompt, names in self._changes:
                if since == push:
                    changed = {old: old.taking(prompt, names) for old in set(waiting)}
                    waiting = tuple(changed[old] for old in waiting)
            prompts.append(waiting)
        levels = [self._levels.at(push) for push in seen]
        if self._make is Loop:
            levels *= len(self.settings.stages)
        return _Plan(group, tuple(prompts), tuple(levels), tuple(self._weights.at(push) for push in seen))

    # -- pushes ---------------------------------------------------------------------------------------------------------

    def push(self, group: Group, network: Replicas) -> Done | None:
        """As the ring's. Where a device fails, its frames go on on another one, with a warning.

        Raises what the network raises where every device fails. All is then as it was before.
        """
        return self._advance(group, network)

    def drain(self, network: Replicas) -> Iterator[Done]:
        while not self.empty:
            before, failed = self._pushes, None
            try:
                left = self._advance(None, network)
            except BaseException as error:
                if self._pushes == before:
                    raise
                failed, left = error, next(iter(self.leaving), None)
            if left is not None and not left.copy:
                yield left
            if failed is not None:
                raise failed
        self.reset()

    def _advance(self, group: Group | None, network: Replicas) -> Done | None:
        """One push, with a group or without one."""
        lane = self._lanes[self._pushes % len(self._lanes)]
        if group is None and lane.engine.empty:
            return self._count(None, None)
        plan = self._plan(lane, group)
        try:
            done = self._step(lane, plan, network)
        except BaseException:
            if lane.taken:  # an observer's error, which comes after the step
                lane.prompts = plan.prompts
                done = next(iter(lane.engine.leaving), None)
                with network.lane(lane.index, self.settings.device, True):
                    left = self._home(done)
                self._count(group, left)
            raise
        lane.prompts = plan.prompts
        return self._count(group, done)

    def _home(self, done: Done | None) -> _Left | None:
        """A group that has left its ring; called in that ring's lane."""
        if done is None:
            return None
        home = self.settings.device
        x0 = done.x0.to(home)
        event = torch.cuda.current_stream(home).record_event() if home.type == "cuda" else None
        return _Left(replace(done, x0=x0), event)

    def _count(self, group: Group | None, leaving: _Left | None) -> Done | None:
        """Count a push with this group, at which a ring let another one leave. Returns the group that leaves all rings."""
        self._entered, self._pushes = group, self._pushes + 1
        self._late.append(leaving)
        if len(self._copies) > MOST_COPIES:
            held = {prompt for lane in self._lanes for prompts in lane.prompts for prompt in prompts}
            self._copies = WeakKeyDictionary({prompt: own for prompt, own in self._copies.items() if prompt in held})
        oldest = self._pushes - self._last * (len(self._lanes) - 1)  # the push whose changes the oldest rows take next
        self._changes = [one for one in self._changes if one[0] >= oldest]
        self._weights.forget(oldest)
        self._levels.forget(oldest)
        left = self._late.popleft() if len(self._late) == len(self._lanes) else None
        done = left and left.done
        if left is not None and left.event is not None:
            stream = torch.cuda.current_stream(self.settings.device)
            stream.wait_event(left.event)
            left.done.x0.record_stream(stream)
        self.leaving = () if done is None else (done,)
        return done

    def _step(self, lane: _Lane, plan: _Plan, network: Replicas) -> _Left | None:
        """A step of a ring on its device, or on the first of the others where it succeeds."""
        failed: dict[int, Exception] = {}
        first = lane.index
        for index in sorted(self._numbers, key=lambda i: (i != first, i in self._failed)):
            try:
                if index != lane.index:
                    self._move(lane, index, network)
                with network.lane(index, self.settings.device, lane.fresh or self.observer is not None):
                    done = self._home(self._step_on(lane, plan, network))
                lane.fresh = False
            except Exception as error:
                if lane.taken or lane.interrupted:
                    raise
                failed[index] = error
                continue
            self._failed = (self._failed | failed.keys()) - {index}
            for i, error in failed.items():
                logger.warning("%s failed, and %s goes on with its frames: %s", self.devices[i], self.devices[index], error)
            return done
        if lane.index != first:
            self._move(lane, first, network)
        raise failed[first]

    def _step_on(self, lane: _Lane, plan: _Plan, network: Replicas) -> Done | None:
        engine, device = lane.engine, self.devices[lane.index]
        lane.taken = lane.interrupted = False
        if self.settings.device.type == "cuda":
            for tensor in _tensors_of(plan, engine.groups):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.device(device.index if device.type == "cuda" else -1):  # -1: no change
            if len(lane.levels) != len(plan.levels) or any(map(is_not, plan.levels, lane.levels)):
                engine.set_levels(_of_stages(plan.levels))
                lane.levels = plan.levels
            same = all(one is plan.weights[0] for one in plan.weights)
            engine.weight, engine.weights = plan.weights[0], () if same else plan.weights
            engine.observer = self.observer and partial(self._observe, lane)
            prompts = [tuple(self._prompt_on(lane.index, prompt) for prompt in group) for group in plan.prompts]
            if isinstance(engine, Ring):
                engine.prompts = tuple(prompt for group in prompts[1:] for prompt in group)
            before = engine.state
            try:
                if plan.group is None and isinstance(engine, Ring):
                    return engine.push_none(network.on(lane.index))
                assert plan.group is not None, "only a ring has frames in flight, which go on without a new one"
                return engine.push(replace(group_on(device, plan.group), prompts=prompts[0]), network.on(lane.index))
            finally:
                lane.taken = engine.state is not before

    def _observe(self, lane: _Lane, *step: Any) -> Tensor:
        assert self.observer is not None, "called where there is one"
        lane.interrupted = True
        x = self.observer(*step)
        lane.interrupted = False
        return x

    def _move(self, lane: _Lane, index: int, network: Replicas) -> None:
        """Give a ring, with its frames in flight, to another device."""
        for device in (self.devices[lane.index], self.devices[index]):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        other = self._engine_on(index)
        with network.lane(index, self.settings.device, True):
            if isinstance(lane.engine, Ring) and isinstance(other, Ring):
                other.take(lane.engine)
        lane.engine, lane.index, lane.levels, lane.fresh = other, index, (), True

    def _prompt_on(self, index: int, prompt: Prompt) -> Prompt:
        """A prompt's copy for one of the devices. Its shared tensors, which may be written in place, are followed."""
        copies = self._copies.setdefault(prompt, {})
        if index not in copies:
            copies[index] = _Copy.of(prompt, self.devices[index])
        return copies[index].renewed(prompt)


@dataclass(eq=False)
class _Copy:
    """A prompt whose shared tensors are its own. versions: of the originals."""

    prompt: Prompt
    versions: list[int | None]

    @classmethod
    def of(cls, prompt: Prompt, device: torch.device) -> _Copy:
        conds = [
            None if cond is None else replace(one := cond.to(device), shared={k: v.clone() for k, v in one.shared.items()})
            for cond in (prompt.cond, prompt.uncond)
        ]
        assert conds[0] is not None, "a prompt has a cond"
        return cls(Prompt(conds[0], conds[1]), _versions(prompt))

    def renewed(self, original: Prompt) -> Prompt:
        """The copy, as the original is now."""
        versions = _versions(original)
        if versions != self.versions:
            for mine, theirs in zip(_shared(self.prompt), _shared(original), strict=True):
                mine.copy_(theirs)
            self.versions = versions
        return self.prompt


def _shared(prompt: Prompt) -> list[Tensor]:
    return [tensor for cond in (prompt.cond, prompt.uncond) if cond is not None for tensor in cond.shared.values()]


def _versions(prompt: Prompt) -> list[int | None]:
    return [None if tensor.is_inference() else tensor._version for tensor in _shared(prompt)]


def _tensors_of(plan: _Plan, groups: Sequence[Group | None]) -> Iterator[Tensor]:
    """The tensors on GPUs that a step reads and that may have been made outside of its lane. groups: those in flight."""
    group = plan.group
    given = [] if group is None else [group.x, *(one.value for one in group.carried.values())]
    given += [one.draws for one in (group, *groups) if one is not None and one.draws is not None]
    conds = [cond for prompts in plan.prompts for prompt in prompts for cond in (prompt.cond, prompt.uncond) if cond]
    tensors = chain(given, *((*cond.rows.values(), *cond.shared.values()) for cond in conds))
    return (tensor for tensor in tensors if tensor.is_cuda)


def _of_stages(levels: Sequence[Stages]) -> Stages:
    """The noise levels of which stage i is that of levels[i]."""
    if all(one is levels[0] for one in levels):
        return levels[0]

    def pick(values: Callable[[Stages], Tensor]) -> Tensor:
        return torch.stack([values(one)[i] for i, one in enumerate(levels)])

    return Stages(
        indices=tuple(one.indices[i] for i, one in enumerate(levels)),
        timesteps=pick(lambda one: one.timesteps),
        sigmas=pick(lambda one: one.sigmas),
        sigmas_next=pick(lambda one: one.sigmas_next),
        coefficients={name: pick(lambda one, name=name: one.coefficients[name]) for name in levels[0].coefficients},
    )
