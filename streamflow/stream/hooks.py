"""Observing a stream while it draws: a function called after every step (`on_step`), and whole trajectories (`trace`).

It handles rows, steps and frame ids. Without an observer, a tick costs one comparison with None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from streamflow._validation import whole_number
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.model import Model
from streamflow.stream.ring import Group, Observer, Rows


@dataclass(frozen=True, eq=False)
class Step:
    """What one step did to the rows of the batch, newest first: S F of them, or F with `use_denoising_batch=False`.

    ids: the frame in each row; None where there is none, while the ring fills or runs out and in a group's padding.
    copies: true where the row only fills the ring with a frame that has been or will be delivered.
    stages: each row's stage, from 0, the noisiest, to `last`.
    sigma, sigma_next: float32 `[rows]`, the levels that each row went from and to.
    x: `[rows, ...]`, at sigma, what the network was shown. v: the guided velocity. x_next: the latents at sigma_next.

    The tensors are the stream's own: do not write into them, and clone those that you keep.
    """

    ids: tuple[int | None, ...]
    copies: tuple[bool, ...]
    stages: tuple[int, ...]
    last: int
    sigma: Tensor
    sigma_next: Tensor
    x: Tensor
    v: Tensor
    x_next: Tensor
    _predict: Callable[[Tensor, Tensor], Tensor] = field(repr=False)

    @cached_property
    def x0(self) -> Tensor:
        """The image that x heads for with v, `x - sigma v` where the path is straight, float32 `[rows, ...]`."""
        return self._predict(self.x, self.v)


def step_of(rows: Rows, groups: Sequence[Group | None], x: Tensor, v: Tensor, x_next: Tensor) -> Step:
    """The step that these rows, in these groups, took."""
    frames = rows.settings.frames
    ids: list[int | None] = []
    for group in groups:
        own = group.ids if group else ()
        ids += [*own, *[None] * (frames - len(own))]
    copies = tuple(bool(group and group.copy) for group in groups for _ in range(frames))
    stages = tuple(stage for stage in range(rows.first, rows.last) for _ in range(frames))
    last, rule, at = len(rows.settings.stages) - 1, rows.settings.rule, rows.at
    levels = rows.sigma.flatten(), rows.sigma_next.flatten()
    return Step(tuple(ids), copies, stages, last, *levels, x, v, x_next, lambda x, v: rule.x0(x, v, at))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One frame from noise to image. `sigma` float32 `[S + 1]`, falling to 0; `x` `[S + 1, ...]`, the latents at these
    levels; `v` and `x0` `[S, ...]`: in every stage the guided velocity, and the estimate of the image, in float32."""

    id: int
    sigma: Tensor
    x: Tensor
    v: Tensor
    x0: Tensor


@dataclass(eq=False)
class Trace:
    """The trajectories of `count` frames, by frame id; each is there once its frame has left. `done`: all are."""

    count: int
    frames: dict[int, Trajectory] = field(default_factory=dict)
    _under_way: dict[int, list[tuple[Tensor, ...]]] = field(default_factory=dict, repr=False)

    @property
    def done(self) -> bool:
        """Whether all frames are recorded."""
        return len(self.frames) == self.count

    def add(self, step: Step) -> None:
        """Record a step: clones of the rows of frames that are followed."""
        rows = zip(step.ids, step.copies, step.stages, strict=True)
        for row, (frame, copy, stage) in enumerate(rows):
            if frame is None or copy:
                continue
            if stage == 0 and len(self.frames) + len(self._under_way) < self.count:
                self._under_way[frame] = []
            if frame in self._under_way:
                here = (step.sigma, step.x, step.v, step.x0)
                self._under_way[frame].append(tuple(one[row].clone() for one in here))
                if stage == step.last:
                    self._complete(frame, step.sigma_next[row].clone(), step.x_next[row].clone())

    def _complete(self, frame: int, sigma: Tensor, x: Tensor) -> None:
        sigmas, xs, vs, x0s = zip(*self._under_way.pop(frame), strict=True)
        self.frames[frame] = Trajectory(
            frame, torch.stack((*sigmas, sigma)), torch.stack((*xs, x)), torch.stack(vs), torch.stack(x0s)
        )


class Hooks:
    """The observers of a stream: the function of `on_step`, and the traces that are being recorded."""

    def __init__(self, model: Model, denoiser: Denoiser) -> None:
        self._model, self._denoiser = model, denoiser
        self._on_step: Callable[[Step], Tensor | None] | None = None
        self._traces: tuple[Trace, ...] = ()
        self.graph_safe = True  # no function waits for the device
        denoiser.on_empty.add(self._end_traces)
        denoiser.on_close.add(self._close)

    def on_step(self, fn: Callable[[Step], Tensor | None] | None, *, graph_safe: bool = False) -> None:
        """Call `fn(step)` after every step, in the thread that draws; None ends it. `step` is a `Step`; where fn returns
        latents `[rows, ...]` these take the place of `step.x_next`. A replaced last stage is what is decoded.

        graph_safe: fn only launches work and never waits for the device, as `.item()`, `.cpu()` and printing a tensor do.
            A CUDA graph holds the network alone, and fn runs after it, on tensors that no replay writes: whatever it does
            is right. But the host runs far ahead of a graph, which is what graphs are for, and an fn that waits ends that;
            so where graphs are in force, or are requested later, fn is refused unless this is said of it.

        An error in fn ends the call in which it came. That step has been taken, and the frame that left in it waits for the
        next call; without a batch the frame in flight is dropped. Inside fn, `update` and `decode_image` may be called;
        calls that advance or empty the ring are refused.

        Raises:
            TypeError: fn is no function. RuntimeError: graphs are in force. From the call that draws, TypeError or
            ValueError: fn returned something else than None or latents.
        """
        self._model.check_open()
        self._model.adapter.check_offers("on_step")
        if fn is not None and not callable(fn):
            raise TypeError(f"on_step takes a function of one Step, or None to end it, not {fn!r}")
        if fn is not None and not graph_safe:
            check_graphs(*self._model.acceleration)
        self._on_step, self.graph_safe = fn, graph_safe or fn is None
        self._denoiser.watch(self.observer)

    def trace(self, count: int) -> Trace:
        """Record the next `count` frames to enter, from noise to image. The `Trace` fills while the stream is called;
        `prepare` and `reset` end it. Costs four clones of a latent a frame and stage; safe with graphs.

        Raises:
            TypeError, ValueError: count is no integer of 1 or more.
        """
        self._model.check_open()
        self._model.adapter.check_offers("on_step")
        trace = Trace(whole_number("the count of trace", count, 1, "a number of frames", TypeError))
        self._traces += (trace,)
        self._denoiser.watch(self.observer)
        return trace

    def check_acceleration(self, kind: str, options: object) -> None:
        """Raise where this stream cannot be accelerated in this way: RuntimeError after `close`, and where it would replay
        CUDA graphs and the function of `on_step` may wait; NotImplementedError where the family is not accelerated;
        ValueError for an option that image prompts exclude."""
        self._model.check_open()
        adapter = self._model.adapter
        if kind != "none":
            adapter.check_offers("accelerate")
        if adapter.image_prompts is not None and getattr(options, "fuse_qkv", False):
            raise ValueError(
                "fuse_qkv puts attention processors of its own in the place of those of image prompts: leave it out, or "
                "image_prompts.unload() first"
            )
        if not self.graph_safe:
            check_graphs(kind, options)

    def _end_traces(self) -> None:
        """Stop recording; traces that are not done stay as they are."""
        self._traces = ()
        self._denoiser.watch(self.observer)

    def _close(self) -> None:
        """Drop the function and the traces."""
        self._on_step, self._traces = None, ()

    @property
    def observer(self) -> Observer | None:
        """The function that the engine calls after every step; None without a function and traces."""
        return self._observe if self._on_step is not None or self._traces else None

    def _observe(self, rows: Rows, groups: Sequence[Group | None], x: Tensor, v: Tensor, x_next: Tensor) -> Tensor:
        """The engine's observer: pass the step to the function and the traces, and return the latents of the next step."""
        step = step_of(rows, groups, x, v, x_next)
        try:
            changed = None if self._on_step is None else self._on_step(step)
            if changed is not None:
                check_latents(changed, x_next)
                step = replace(step, x_next=changed)
        finally:  # the rows have taken the step, whatever fn makes of it
            self._record(step)
        return step.x_next

    def _record(self, step: Step) -> None:
        for trace in self._traces:
            trace.add(step)
        self._traces = tuple(trace for trace in self._traces if not trace.done)
        self._denoiser.watch(self.observer)


def check_graphs(kind: str, options: object) -> None:
    """RuntimeError where a stream accelerated in this way replays CUDA graphs."""
    graphs = kind == "cuda-graph" or any(getattr(options, name, False) for name in ("cuda_graph", "use_cuda_graph"))
    if graphs:
        raise RuntimeError(
            f"accelerate({kind!r}) replays CUDA graphs, which gains nothing when on_step's function waits for the device: "
            f"pass graph_safe=True if yours never does (no .item(), .cpu() or print of a tensor), or accelerate('none')"
        )


def check_latents(given: object, like: Tensor) -> None:
    """TypeError or ValueError unless these can take the place of the latents `like`."""
    if not isinstance(given, Tensor):
        raise TypeError(f"on_step's function returns None or the latents to go on with, not {type(given).__name__}")
    if (given.shape, given.dtype, given.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"on_step's function returned {given.dtype} {list(given.shape)} on {given.device}; the latents are "
            f"{like.dtype} {list(like.shape)} on {like.device}"
        )
