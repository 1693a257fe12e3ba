"""What a stream's calls give, told by a list of frame ids: which frame leaves at each call, how many are in flight, and what
each entered with. No tensor and no network; the rules are those that the docstrings of `StreamFlow` and `Ring` state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any


class Refused(Exception):
    """The call is refused with an error of this kind; what it did until then stands."""

    def __init__(self, kind: type[Exception]) -> None:
        super().__init__(kind.__name__)
        self.kind = kind


@dataclass(frozen=True)
class Look:
    """What a request asks for. `levels` is a new object whenever the noise levels are others."""

    prompt: Any = "a red apple, 3d render"
    negative_prompt: str = ""
    guidance_scale: float = 2.0
    delta: float = 1.0
    num_inference_steps: int = 4
    t_index_list: tuple[int, ...] = (1, 3)
    strength: float | None = None
    seed: int = 2
    noise: str = "fixed"
    feedback: float = 0.0
    levels: object = field(default_factory=object, compare=False)


NOW = {"prompt", "negative_prompt"}  # rows in flight take them too


@dataclass(eq=False)
class Frame:
    """`origin`: ("text",), ("latents", key) or ("picture", key). `sure`: nothing has changed since it entered."""

    id: int
    origin: tuple
    look: Look
    region: tuple | None = None
    sure: bool = True


@dataclass(eq=False)
class Group:
    """Frames that travel together, fewer than F where the rest is padding; `copy`: they only fill the ring."""

    frames: tuple[Frame, ...]
    copy: bool = False


@dataclass(frozen=True)
class Pending:
    """An update that no call has taken yet."""

    look: Look
    rows: bool = False
    levels_now: bool = False


@dataclass(eq=False)
class Filter:
    """Similarity, of images that are either the same or unlike each other."""

    on: bool = False
    most: int = 10
    skips: int = 0
    last: Any = None
    to_draw: int = 1

    def skip(self, seen: Any) -> bool:
        """Whether a frame is skipped that looks like this."""
        if not self.to_draw and seen == self.last and self.skips < self.most:
            self.skips += 1
            return True
        self.skips, self.last, self.to_draw = 0, seen, max(0, self.to_draw - 1)
        return False

    def forget(self, frames: int = 1) -> None:
        """At least so many are drawn next."""
        self.skips, self.last, self.to_draw = 0, None, max(self.to_draw, frames)


class Model:
    """A stream of F frames a group.

    sigmas(look): the noise levels of its stages, ValueError where there are none; looks of equal ones need no new ring.
    embedded: the guidance scale is one of the prompt's tensors.
    """

    def __init__(
        self, frames: int, batched: bool, look: Look, sigmas: Callable[[Look], Any], embedded: bool = False
    ) -> None:
        self.F, self.batched, self._sigmas, self._embedded = frames, batched, sigmas, embedded
        self.filter, self.region = Filter(), None
        self.buffer: list[Frame] = []  # frames that wait for their group to be full
        self.steps: list[tuple[tuple, tuple]] = []  # (ids, copies) by row, of every step
        self.raise_in = 0  # steps until a look at one raises; 0: none does
        self.broken = False  # the network raises
        self.prepare(look)

    # -- settings ---------------------------------------------------------------------------------------------------------

    def prepare(self, look: Look) -> None:
        """Anew, with an empty ring."""
        self._levels(look)
        self.look = replace(look, levels=object())
        self.reset()
        self.pending: Pending | None = None
        self._install()

    def reset(self) -> None:
        """Nothing in flight."""
        self.next_id, self.queue, self.shown = 0, deque(), None
        self.filter.forget()
        self._install()

    def _install(self) -> None:
        count = len(self._levels(self.look)) if self.batched else 1
        self.ring: deque[Group | None] = deque([None] * count, count)

    def _levels(self, look: Look) -> tuple[float, ...]:
        try:
            return self._sigmas(look)
        except ValueError:
            raise Refused(ValueError) from None

    def update(self, scope: str | None = None, **changes: Any) -> None:
        """As `StreamFlow.update`."""
        asked = self.pending.look if self.pending else self.look
        if changes.get("t_index_list"):
            changes = {"strength": None, **changes}
        target = replace(asked, **changes)
        if self._levels(target) != self._levels(asked):
            target = replace(target, levels=object())
        new = target.levels is not asked.levels
        if new and scope == "now" and len(self._levels(target)) != len(self._levels(asked)):
            raise Refused(ValueError)
        says = NOW & set(changes)
        scaled = self._embedded and target.guidance_scale != asked.guidance_scale
        rows = bool(says or scaled) and scope != "frame"
        now = scope == "now" if new or not self.pending else self.pending.levels_now
        if self.pending:
            now = now and not (self.pending.look.levels is not self.look.levels and not self.pending.levels_now)
            rows = rows if says else rows or self.pending.rows
        self.pending = Pending(target, rows, now)

    def take(self) -> None:
        """A pending update acts."""
        change, before = self.pending, self.look
        if change is None:
            return
        drains = change.look.levels is not before.levels and not change.levels_now
        if drains:
            self.queue.extend(self.drain())
        self.look, self.pending = change.look, None
        weight = [(one.guidance_scale, one.delta) for one in (before, change.look)]
        if drains:
            self._install()
        elif change.rows or change.look.levels is not before.levels or weight[0] != weight[1]:
            self._unsure(frame for group in self.ring if group for frame in group.frames)
        if weight[0] != weight[1]:
            self._unsure(self.buffer)
        self.redraw()

    def redraw(self) -> None:
        """What is drawn has changed: frames are drawn until those that enter from now on have left."""
        self.filter.forget(self.F * (len(self._levels(self.look)) if self.batched else 1))

    def _unsure(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            frame.sure = False

    # -- the ring ---------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Group]:
        """Groups in flight."""
        return [group for group in list(self.ring)[:-1] if group]

    @property
    def in_flight(self) -> int:
        """Frames in flight or waiting to be handed out, copies not counted."""
        return sum(len(group.frames) for group in (*self.waiting, *self.queue) if not group.copy)

    def push(self, group: Group) -> None:
        """One tick; without the batch, all of the group's steps."""
        if self.broken:
            raise Refused(RuntimeError)
        if not self.batched:
            for _ in self._levels(self.look):
                self.ring.appendleft(group)
                self._seen()
        self._number(group)
        try:
            if self.batched:
                self.ring.appendleft(group)
                self._seen()
        finally:  # the step was taken, whatever a look at it raises
            if self.ring[-1] is not None:
                self.queue.append(self.ring[-1])

    def _number(self, group: Group) -> None:
        """The frames of this group are in flight, so that later ones have later numbers."""
        self.next_id = max([self.next_id, *(frame.id + 1 for frame in group.frames)])

    def _seen(self) -> None:
        ids: list[int | None] = []
        for group in self.ring:
            own = [frame.id for frame in group.frames] if group else []
            ids += [*own, *[None] * (self.F - len(own))]
        copies = tuple(bool(group and group.copy) for group in self.ring for _ in range(self.F))
        self.steps.append((tuple(ids), copies))
        self.raise_in -= 1
        if self.raise_in == 0:
            raise Refused(RuntimeError)

    def drain(self) -> Iterator[Group]:
        """Run what is in flight to its end."""
        while self.batched and self.waiting:
            before, padding, failed = len(self.queue), Group((), copy=True), None
            try:
                self.push(padding)
            except Refused as refused:
                if self.ring[0] is not padding:
                    raise
                failed = refused
            self.ring[0] = None
            left = self.queue.pop() if len(self.queue) > before else None
            if left is not None and not left.copy:
                yield left
            if failed is not None:
                raise failed
        if self.batched:
            self._install()

    def enter(self, origins: Iterable[tuple], region: tuple | None) -> Group:
        """A group of new frames, which have their numbers once they are in flight."""
        return Group(tuple(Frame(self.next_id + k, origin, self.look, region) for k, origin in enumerate(origins)))

    # -- calls ------------------------------------------------------------------------------------------------------------

    def pictures(self, keys: tuple, mask: Any = None) -> Group | None:
        """`stream(pictures, mask)`: the group whose images come back; None where the last ones do again."""
        region = self.region if mask is None else (None, mask)
        self.take()
        if self.filter.on and self.filter.skip((keys, mask)) and self.shown is not None:
            return None
        group = self.enter([("picture", key) for key in keys], region)
        self.push(group)
        while not self.queue:
            self.push(Group(group.frames, copy=True))
        self.shown = self.queue.popleft()
        return self.shown

    def text(self, groups: int, latents: tuple | None = None) -> list[Group]:
        """`txt2img`: the groups that come back, one after another."""
        self._text_region()
        self.filter.forget()
        self.take()
        pushed = 0
        while pushed < groups or len(self.queue) < groups:
            mine = latents is not None and pushed < groups
            keys = latents[pushed * self.F : (pushed + 1) * self.F] if mine else ()
            origins = [("latents", key) for key in keys] or [("text",)] * self.F
            self.push(self.enter(origins, self.region))
            pushed += 1
        self.shown = done = [self.queue.popleft() for _ in range(groups)]
        return done

    def tick(self, keys: tuple) -> Group | None:
        """`predict_x0_batch`."""
        self._text_region()
        self.take()
        self.push(self.enter([("latents", key) for key in keys], self.region))
        return self.queue.popleft() if self.queue else None

    def flush(self) -> list[Group]:
        """`flush`."""
        self.queue.extend(self.drain())
        left = [group for group in self.queue if not group.copy]
        self.queue.clear()
        return left

    def set_batch(self, batched: bool) -> None:
        """`set_denoising_batch`."""
        if self.in_flight:
            raise Refused(RuntimeError)
        self.batched = batched
        self.queue.clear()
        self._install()

    def _text_region(self) -> None:
        if self.region is not None and self.region[0] is None:
            raise Refused(ValueError)

    def frames(self, inputs: Iterable[tuple]) -> Iterator[tuple[int, Frame]]:
        """`frames` of inputs (update or None, origin, mask): (id, the frame whose image it gets), in order."""
        if self.queue or self.waiting:
            raise Refused(RuntimeError)
        return self._all_frames(inputs)

    def _all_frames(self, inputs: Iterable[tuple]) -> Iterator[tuple[int, Frame]]:
        self.arrived: deque[Group] = deque()  # none of their frames is given
        try:
            yield from self._frames(inputs)
        finally:
            self.queue.extendleft(reversed(self.arrived))

    def _frames(self, inputs: Iterable[tuple]) -> Iterator[tuple[int, Frame]]:
        order: deque[tuple[int, int]] = deque()
        there: dict[int, Frame] = {}
        self.buffer = buffer = []
        self.filter.forget()
        self.shown = None
        drawn = self.next_id
        for change, origin, mask in inputs:
            if change:
                self.update(**change)
                if buffer and not self._spares():
                    self._push_buffer(buffer)
            self.take()
            region, text = (self.region if mask is None else (None, mask)), origin[0] == "text"
            if text:
                self._text_region()
                self.filter.forget()
            frame = Frame(self.next_id, origin, self.look, region)
            self.next_id += 1
            skip = not text and self.filter.on and self.filter.skip(((origin[1],), mask))
            drawn = drawn if skip else frame.id
            order.append((frame.id, drawn))
            if not skip:
                if buffer and (buffer[0].origin[0] == "text") != text:
                    self._push_buffer(buffer)
                buffer.append(frame)
                if len(buffer) == self.F:
                    self._push_buffer(buffer)
            yield from self._deliver(order, there)
        if buffer:
            self._push_buffer(buffer)
        yield from self._deliver(order, there)
        for group in self.drain():
            self.queue.append(group)
            yield from self._deliver(order, there)

    def _spares(self) -> bool:
        now, then = self.pending.look, self.look
        same = all(getattr(now, name) == getattr(then, name) for name in ("noise", "feedback"))
        return same and not self.pending.rows and now.seed == then.seed and now.levels is then.levels

    def _push_buffer(self, buffer: list[Frame]) -> None:
        self.push(Group(tuple(buffer)))
        buffer.clear()

    def _deliver(self, order: deque, there: dict[int, Frame]) -> Iterator[tuple[int, Frame]]:
        while self.queue:
            self.arrived.append(self.queue.popleft())
            there.update({frame.id: frame for frame in self.arrived[-1].frames})
        while order and order[0][1] in there:
            number, source = order.popleft()
            while self.arrived and self.arrived[0].frames[0].id <= number:
                self.arrived.popleft()
            yield number, there[source]
