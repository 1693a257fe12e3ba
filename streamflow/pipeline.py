"""StreamFlow: StreamDiffusion's class for rectified flows. It wires the parts together and holds no maths of its own.

prompt -> cond; picture -> latent -> noised latent -> ring (guidance, velocity, Euler) -> latent -> picture
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from streamdiffusion import StreamDiffusion
from torch import Tensor

from streamflow._threads import aside
from streamflow.acceleration.accelerator import Accelerating
from streamflow.flow import guidance
from streamflow.flow.guidance import Anchors
from streamflow.flow.noise import check_policy
from streamflow.flow.schedule import Stages, check_indices
from streamflow.image_filter import SimilarImageFilter
from streamflow.image_range import FiniteCheck, Normalized, RangeChecks, check_values, marking
from streamflow.image_utils import as_rgb_where_pil, check_range, normalize_image
from streamflow.models import adapter_for
from streamflow.models.adapter import ASKS_FOR_NOTHING, RESERVED
from streamflow.models.pipe_parts import PipeParts, base_view, check_dtype
from streamflow.stream.attributes import StreamDiffusionAttributes
from streamflow.stream.controlnets import Controlling
from streamflow.stream.engine import make_engine
from streamflow.stream.frame_loop import Pass, Streaming
from streamflow.stream.frames import CallTimer
from streamflow.stream.grad_mode import computing
from streamflow.stream.hooks import Observing
from streamflow.stream.inpainting import Inpainting
from streamflow.stream.inputs import Entering
from streamflow.stream.loras import Adapting
from streamflow.stream.planner import DEFAULT_SEED, Planner
from streamflow.stream.request import SCOPES, Change, NotPreparedError, Prepared, Request, check_feedback, owned
from streamflow.stream.ring import Done, Group, Loop, Ring, Settings
from streamflow.stream.updates import Updates

if TYPE_CHECKING:
    from streamflow.acceleration import Accelerated, Parts
    from streamflow.io import Sink, Source
    from streamflow.live.show import Live

logger = logging.getLogger(__name__)
Texts = str | Sequence[tuple[str, float]]
Seeds = int | Sequence[tuple[int, float]]


class StreamFlow(
    Accelerating,
    Adapting,
    Controlling,
    Entering,
    Inpainting,
    Observing,
    Streaming,
    StreamDiffusionAttributes,
    StreamDiffusion,
):
    """Streams a loaded diffusers pipeline of a rectified-flow model. The pipeline stays usable and unchanged. One thread
    draws; `update` may be called from any, and `prepare`, `reset`, `flush` and `close` wait for the tick under way.

    Args:
        pipe: a diffusers pipeline of a known family (`streamflow.models.PIPELINES`), on its device, in its dtype.
        t_index_list: the steps, of the schedule of `num_inference_steps`, at which a frame stops; each once, 0 the noisiest.
            `range(N)` of N is the pipeline's own schedule, `range(k, N)` image-to-image at strength (N - k) / N, a subset is
            Euler on the sub-grid. None: all steps.
        torch_dtype: the network's dtype, which is the default; another one is an error, since the pipe is not changed.
        width, height: pixels; by default the pipeline's own.
        do_add_noise: False is Euler. True predicts x0 at every stage and re-noises it with the frame's own noise.
        use_denoising_batch: False runs every frame to its end by itself: the sequential reference.
        frame_buffer_size: F, how many frames enter and leave together.
        cfg_type: "none", "full" (the pipeline's own guidance), "self" or "initialize" (see `streamflow.flow.guidance`).
        family: overrides the family found by the pipeline's class.
        input_range: what float pictures are in, (0, 1) or (-1, 1). PIL and uint8 are 0..255.
        noise: of frames: "fixed", one noise for all image frames of a stream; "frame", a fresh one for each; "interpolated",
            for image and text frames, noise that moves to another every `noise_period` frames, always of variance one.
            Text frames have fresh noise under the first two.
        noise_period: frames from one noise to the next, where it is interpolated.
        feedback: how much of the last finished picture goes into the next image frame's start, against flicker:
            `(1 - feedback) x0 + feedback x0_last`, x0_last being the frame that has left last: S frames before this one in a
            ring of S stages, the one before it without a batch. 0 to below 1. `reset` and `prepare` forget x0_last.
            `update` changes these three; `prepare` goes back to them.
        resize: stretch pictures of other sizes, or refuse them.
        check_inputs: also look for NaN in pictures on a GPU, which makes the host wait for it.

    Raises:
        TypeError, ValueError: for every argument that cannot be, with what it was and the remedy.
    """

    def __init__(
        self,
        pipe: Any,
        t_index_list: Sequence[int] | None = None,
        torch_dtype: torch.dtype | None = None,
        width: int | None = None,
        height: int | None = None,
        do_add_noise: bool = False,
        use_denoising_batch: bool = True,
        frame_buffer_size: int = 1,
        cfg_type: str = "self",
        *,
        family: str | None = None,
        input_range: tuple[float, float] = (0, 1),
        noise: str = "fixed",
        noise_period: int = 30,
        feedback: float = 0.0,
        resize: bool = True,
        check_inputs: bool = False,
    ) -> None:
        self.adapter = adapter = adapter_for(pipe, family)
        self._seen = PipeParts.of(pipe, adapter.network)
        height = adapter.default_size if height is None else height
        width = adapter.default_size if width is None else width
        adapter.check_size(height, width)
        if t_index_list is not None:
            t_index_list = check_indices(t_index_list)
        if isinstance(frame_buffer_size, bool) or not isinstance(frame_buffer_size, int) or frame_buffer_size < 1:
            raise ValueError(f"frame_buffer_size must be an integer of 1 or more, not {frame_buffer_size!r}")
        check_policy(noise, noise_period)
        check_feedback(feedback)
        check_range(input_range)
        dtype = check_dtype(torch_dtype, adapter.net, pipe.device)
        self._shape = adapter.latent_shape(height, width)
        self._planner = Planner(adapter, self._shape, height, width, noise_period)
        self._planner.check(cfg_type, do_add_noise)
        self._timer = CallTimer(pipe.device)
        self._indices, self._cfg_type, self._do_add_noise = t_index_list, cfg_type, do_add_noise
        self._batched = use_denoising_batch
        self._state: Prepared | None = None
        self._engine: Ring | Loop | None = None
        super().__init__(  # what it assigns and we derive is dropped (`__setattr__`)
            base_view(pipe, adapter.net, adapter.factor),
            list(t_index_list or [0]),
            adapter.latent_dtype or dtype,
            width,
            height,
            do_add_noise,
            use_denoising_batch,
            frame_buffer_size,
            cfg_type,
        )
        self.pipe = pipe
        self._vae = pipe.vae
        self.codec = self._plain_codec = self._codec_of(pipe.vae)
        self.image_processor = marking(pipe.image_processor, as_rgb_where_pil)
        self.similar_filter = SimilarImageFilter()
        self._input_range, self._noise_policy, self._resize, self._check = input_range, noise, resize, check_inputs
        self._ranges, self._finite = RangeChecks(), FiniteCheck()
        self._ticks, self._callers, self._slot = threading.RLock(), threading.Lock(), threading.Lock()  # taken in this order
        self._change: Change | None = None
        self._updates, self._asked_for = 0, Updates()
        self._finished: deque[Done] = deque()
        self._next_id = 0
        self._said: set[str] = set()
        self._held_noise: tuple[Any, Tensor | None] = (None, None)
        self._feedback, self._last_x0 = feedback, None
        self._constructed = True
        self._wrap_controls(pipe)

    # -- prepare and change -------------------------------------------------------------------------------------------

    @computing
    def prepare(
        self,
        prompt: Texts | None = None,
        negative_prompt: Texts | None = "",
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        delta: float = 1.0,
        generator: torch.Generator | None = None,
        seed: Seeds | None = None,
        *,
        strength: float | None = None,
        blend: str = "linear",
        normalize: bool = True,
        **pipeline_arguments: Any,
    ) -> None:
        """Set what is drawn, and empty the ring (how many frames that dropped is logged). Frame ids start anew.

        Args:
            prompt, negative_prompt: texts; or `prompt_embeds` and its kin, under the pipeline's own names; or lists of texts
                with weights, `[("a cat", 0.6), ("a dog", 0.4)]`, which are blended.
            num_inference_steps: the length of the schedule that `t_index_list` indexes.
            guidance_scale: the pipeline's. None: the pipeline's own default under `full` and where it is embedded in the
                network (Flux), 1.2 under `self` and `initialize`. Flux's weight of true guidance is `true_cfg_scale`.
            delta: under `self` and `initialize` the weight in force is `1 + (guidance_scale - 1) delta`.
            generator: draws all noise; used as it is, or seeded with `seed` first where both are given, as in
                StreamDiffusion.
            seed: noise is a function of the seed and the frame's number. Default 2; -1 stands for a random one,
                which is logged. Or seeds with weights.
            blend: "linear" or "slerp", along the sphere (`streamflow.conditioning.blending.METHODS`).
            normalize: make the weights sum to 1; False takes only weights that do, within a thousandth.
            strength: image-to-image: start where the pipeline's own `get_timesteps` starts, in place of `t_index_list`.
            pipeline_arguments: more arguments of the pipeline's `__call__`: `sigmas`, `max_sequence_length`, ...

        Raises:
            TypeError, ValueError: for what the stream or the pipeline cannot take; then nothing has changed. Whatever
                acceleration raises; then the stream is prepared, without acceleration.
        """
        self._check_open()
        self._check_step("prepare()")
        pipeline_arguments = self._asking(pipeline_arguments)
        self.adapter.check_arguments(pipeline_arguments)
        request = Request(
            prompt,
            negative_prompt,
            num_inference_steps,
            guidance_scale,
            delta,
            t_index_list=self._indices,
            strength=strength,
            arguments=owned(pipeline_arguments),
            blend=blend,
            normalize=normalize,
            noise=self._noise_policy,
            noise_period=self._planner.noise_period,
            feedback=self._feedback,
            cfg_type=self._cfg_type,
            do_add_noise=self._do_add_noise,
        )
        seed = self._planner.seed(seed)
        self.adapter.settle(request.arguments, request.prompt)
        if not self._shape:  # of a pipeline without text encoders, whose own call tells it
            self._shape = self.adapter.latent_shape(self.height, self.width)
            self._planner = replace(self._planner, shape=self._shape)
        with self._ticks, self._callers:
            with self._following_pipe():
                state = self._planner.plan(request, generator, seed)
            if generator is not None and seed is not None:
                generator.manual_seed(seed)
            seed = state.noise.seed
            self.similar_filter.seed = seed if isinstance(seed, int) else DEFAULT_SEED
            self._empty("prepare()")
            with self._slot:
                self._state, self._change = state, None
            self._install(state.stages)
        if self._accelerated is None:
            self._build()

    @contextmanager
    def _following_pipe(self) -> Iterator[None]:
        """Inside, the pipe's parts as they are now are what is planned with; afterwards they are what is drawn with. An
        error leaves the stream as it was.

        Raises:
            ValueError: what has become of the pipe cannot be taken over, with the remedy.
        """
        seen, now, adapter = self._seen, PipeParts.of(self.pipe, self.adapter.network), self.adapter
        now.check_same_place(seen, [item.net for item in adapter.controls.items] if adapter.controls else [])
        new_network = now.network is not seen.network
        codec = None if now.vae is seen.vae or (now.vae is None and self._vae is not seen.vae) else self._codec_of(now.vae)
        before = adapter.net, adapter.scheduler
        try:
            if new_network:
                adapter.net = now.network
                self._check_same_latents()
            if now.scheduler != seen.scheduler:
                adapter.scheduler = copy.deepcopy(self.pipe.scheduler)
            adapter.follow_pipe()
            yield
        except BaseException:
            adapter.net, adapter.scheduler = before
            self._planner.forget_prompts()  # they may be of the parts that are not taken over
            raise
        if new_network or codec is not None:
            self._put_back()  # `prepare` accelerates anew
        if new_network:
            adapter.rebuild(now.network)
        if codec is not None:
            self._vae, self.codec, self._plain_codec = now.vae, codec, codec
        self._seen = now

    def _check_same_latents(self) -> None:
        shape = list(self.adapter.latent_shape(self.height, self.width))
        if shape != list(self._shape):
            raise ValueError(
                f"pipe.{self.adapter.network} was replaced by one whose latents are {shape}, and this stream's are "
                f"{list(self._shape)}: make a new StreamFlow of the pipe"
            )

    @computing
    def reset(self) -> None:
        """Empty the ring and start frame ids anew, with what `prepare` and later updates set. How many frames in flight
        that dropped is logged; a pending update is kept. A loop over `frames` that is under way ends with a RuntimeError."""
        self._empty("reset()")

    def _empty(self, call: str) -> None:
        """As `reset`, for this call."""
        self._check_open()
        self._check_step(call)
        with self._ticks:
            self._end_pass(call)
            if self._engine is not None:
                if lost := self._in_flight():
                    logger.info("%d frames in flight were dropped; flush() before keeps them", lost)
                self._engine.reset()
            self._finished.clear()
            self._ranges.clear()
            self._next_id = 0
            self._traces = ()
            self.similar_filter.reset()
            self.prev_image_result = self._last_x0 = None

    def update_prompt(
        self, prompt: Texts, negative_prompt: Texts | None = None, *, scope: str = "now", **pipeline_arguments: Any
    ) -> int:
        """Change the prompt: of all rows at the next call (`scope="now"`), or of frames that enter from then on
        (`scope="frame"`), each of which then equals a sequential run of its own prompt. The negative prompt stays
        unless a new one is given. Returns the update's number."""
        changes = {"prompt": prompt} if negative_prompt is None else {"prompt": prompt, "negative_prompt": negative_prompt}
        return self.update(scope=scope, **changes, **pipeline_arguments)

    @computing
    def update(self, *, scope: str | None = None, seed: Seeds | None = None, **changes: Any) -> int:
        """Change what is drawn, from any thread; the ticking thread takes it at the start of its next call.

        Args:
            scope: "now" for rows under way too, "frame" for frames that enter from then on. None: now, but for noise
                levels. New noise levels under "frame" or None let what is in flight run to its end with the old ones
                first, and calls deliver that before anything newer, so that they stay so many frames behind until `flush`
                or `reset`; "now" needs as many stages as before. The guidance
                weight and delta act on all rows at the next call, whatever the scope.
            seed: of the frames that enter from then on.
            changes: prompt, prompt_weights (of the texts in force, none of which is encoded again), negative_prompt, blend,
                normalize, guidance_scale, delta, num_inference_steps, t_index_list, strength, noise, noise_period, feedback
                (of frames that enter from then on), cfg_type, do_add_noise (frames under way finish first), and the
                pipeline's own arguments by name.

        Returns the update's number, counted from 1. Updates not yet taken merge, the later winning field by field. While
        one is encoded, others wait; of those that set the same fields, only the last is encoded, and its number returned.
        While another thread draws, a pause of 19 times its own length follows each, a second at most.

        Raises:
            RuntimeError: before prepare. TypeError, ValueError: as `prepare`; then nothing has changed.
        """
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: choose 'now' or 'frame'")
        if scope != "frame":
            self.adapter.check_offers("update now")
        own = {name: changes.pop(name) for name in _UPDATABLE & set(changes)}
        changes = self._asking(changes)
        self.adapter.check_arguments(changes)
        if own.get("t_index_list") is not None:
            own["t_index_list"] = check_indices(own["t_index_list"])
            own.setdefault("strength", None)
        names = {*own, *changes} | (set() if seed is None else {"seed"})
        parts = {part for name in names for part in _PARTS.get(name, ("texts", "levels"))}
        change = partial(self._change_to, scope, seed, own, changes)
        if self.device.type == "cpu" and self._asked_for.drawing_elsewhere:
            change = partial(aside, change)
        return self._asked_for.apply(names, scope, change, parts)

    @computing
    def _change_to(self, scope: str | None, seed: Seeds | None, own: dict[str, Any], changes: dict[str, Any]) -> int:
        """Make the pending change of these fields; the update's number."""
        with self._callers:
            with self._slot:
                pending, state = self._change, self._prepared()
            asked = pending.target if pending else state
            request = asked.request.changed(own, owned(changes))
            self.adapter.settle(request.arguments, request.prompt)
            target = self._planner.change(asked, request, seed)
            held = pending.entries if pending else frozenset()
            entries = self._entries(asked, target, {*own, *changes}, scope, held)
            new_levels = target.stages is not asked.stages
            if new_levels and scope == "now" and len(target.stages) != len(asked.stages):
                raise ValueError(
                    f"scope='now' keeps the number of stages, {len(asked.stages)}, and {len(target.stages)} were given: "
                    f"leave scope out, and frames under way finish first"
                )
            levels_now = scope == "now" if new_levels or not pending else pending.levels_now
            if pending:
                drains = pending.target.stages is not state.stages and not pending.levels_now
                levels_now = levels_now and not drains
            with self._slot:
                self._change = Change(target, entries, levels_now)
            self._updates += 1
            return self._updates

    def _asking(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments, less those that ask for what happens anyway."""
        anyway = {**ASKS_FOR_NOTHING, "height": self.height, "width": self.width}
        nothing = {*RESERVED, *self.adapter.refused} & {name for name, value in arguments.items() if value is None}
        nothing |= {name for name, value in arguments.items() if name in anyway and value == anyway[name]}
        return {name: value for name, value in arguments.items() if name not in nothing}

    def _entries(
        self, asked: Prepared, target: Prepared, names: set[str], scope: str | None, held: frozenset[str]
    ) -> frozenset[str]:
        """Which of the prompt's tensors rows under way are to take; `held`: those of the update that still waits."""
        if names - (_UPDATABLE - _TEXTS) - {self.adapter.guidance_argument}:  # it says something of the prompt
            return frozenset() if scope == "frame" else frozenset(target.prompt.cond.rows)
        if scope == "frame" or target.prompt is asked.prompt:
            return held
        return held | asked.prompt.differing(target.prompt)

    def _take_change(self) -> None:
        """Let a pending update act. Only the ticking thread comes here, at the start of a call."""
        while not self._take(self._change):
            pass

    def _take(self, change: Change | None) -> bool:
        """Let this pending update act; False where another has been merged with it meanwhile."""
        before = self._state
        if change is None:
            return True
        new_levels = change.target.stages is not before.stages
        installs = not self._fits(change.target.request) or (new_levels and not change.levels_now)
        if installs:
            self._run_out()  # where that fails, the update waits for the next call
        with self._slot:
            if self._change is not change:
                return False
            self._change, self._state = None, change.target
        if installs:
            self._install(change.target.stages)
        elif new_levels:
            self._engine.set_levels(change.target.stages)
        self._redraw()
        if change.entries:
            self._engine.set_prompt(change.target.prompt, change.entries)
        self._engine.weight = change.target.weight
        return True

    def _fits(self, request: Request) -> bool:
        """Whether the engine guides and steps as this asks for."""
        settings = self._engine.settings
        return settings.mode is request.mode and settings.rule == self.adapter.rule(request.do_add_noise)

    def _run_out(self) -> None:
        """Let what is in flight run to its end, and queue it."""
        with self._step():
            for done in self._running().drain(self.velocity):
                self._left(done)

    # -- draw ---------------------------------------------------------------------------------------------------------

    @computing
    def __call__(self, x: Any = None, mask: Any = None, control: Any = None) -> Tensor:
        """One call of the stream: F pictures in, F finished pictures out, `[F, 3, height, width]` in [-1, 1].

        Without an image it is `txt2img()`. On an empty ring an image is followed by S - 1 copies of itself, so calls 1 to
        S return the first picture and call k > S that of call k - S + 1; `frames` and `flush` tell copies apart.
        `mask`: draw the picture where it is white and keep it elsewhere, in this call only (`inpaint` says what masks are).
        `control`: for each control net its picture, or F of them (`add_control`).
        Where the decoder raises, the finished frames stay, and the next call begins with decoding them.
        Raises:
            RuntimeError: before `prepare`, after `close`, or while a loop over `frames` is under way. TypeError, ValueError:
                for a bad picture, or not F of them.
        """
        if x is None:
            self._text_regions(mask)
            return self.txt2img(control=control)
        self._running()
        self._check_no_pass("stream(image)")
        self._ranges.raise_failed()
        with self._timer, self._seen_only_if_drawn():
            pictures = self._read_images(x)
            if len(pictures) != self.frame_bff_size:
                raise ValueError(f"{len(pictures)} pictures for a frame buffer of {self.frame_bff_size}")
            regions, seen = self._masked(pictures, mask)
            shown = self._shown(control, len(pictures))
            seen = self._seen_with(seen, shown)
            self._take_change()
            if self.similar_image_filter and self.similar_filter(seen) is None and self.prev_image_result is not None:
                return self.prev_image_result.clone()
            group = self._steered(self._image_group(pictures, self._next_ids(len(pictures)), regions), shown)
            return self._shown_now(self._entered(group))

    def _entered(self, group: Group) -> Tensor:
        """The images of the oldest group once this one has entered, copies of which fill an empty ring. A group that is
        finished already is decoded first: where that fails, nothing enters."""
        done = self._oldest()
        images = None if done is None else self._decode(done)
        self._push(group)
        while done is None:
            if (done := self._oldest()) is None:
                self._push(replace(group, copy=True))
            else:
                images = self._decode(done)
        self._hand_out([done])
        return images

    def _oldest(self) -> Done | None:
        with self._ticks:
            return self._finished[0] if self._finished else None

    def _hand_out(self, given: Sequence[Done]) -> None:
        """These finished groups, the oldest, are the caller's now, and leave the queue."""
        with self._ticks:
            while self._finished and any(one is self._finished[0] for one in given):
                self._finished.popleft()

    @contextmanager
    def _seen_only_if_drawn(self) -> Iterator[None]:
        """After an error the similarity filter skips no frame for looking like one that was not drawn."""
        try:
            yield
        except BaseException:
            self.similar_filter.forget()
            raise

    @computing
    def txt2img(self, batch_size: int | None = None, latents: Tensor | None = None, control: Any = None) -> Tensor:
        """Draw from noise: exactly `batch_size` pictures (None: F), a multiple of F, `[batch_size, 3, height, width]`.

        On an empty ring S - 1 more groups of fresh frames follow the first; they leave at later calls or at `flush`.
        latents: `[batch_size, ...]`, the noise to start from, as the pipeline takes it.
        control: for each control net a picture, or one for each of `batch_size`; further frames have the last one's.
        """
        self._running()
        self._check_no_pass("txt2img()")
        self._ranges.raise_failed()
        groups, regions = self._group_count(batch_size, latents), self._text_regions()
        shown = self._shown(control, groups * self.frame_bff_size)
        self.similar_filter.forget()
        with self._timer:
            self._take_change()
            done = list(self._finished)[:groups]
            pictures = [self._decode(one) for one in done]  # where that fails, nothing enters
            pushed = 0
            while pushed < groups or len(self._finished) < groups:
                mine = latents is not None and pushed < groups
                given = latents.split(self.frame_bff_size)[pushed] if mine else None
                group = self._text_group(self._next_ids(self.frame_bff_size), given, regions)
                self._push(self._steered(group, shown, pushed * self.frame_bff_size))
                pushed += 1
            done += list(self._finished)[len(done) : groups]
            pictures += [self._decode(one) for one in done[len(pictures) :]]
            self._hand_out(done)
            return self._shown_now(torch.cat(pictures) if len(pictures) > 1 else pictures[0])

    def txt2img_sd_turbo(self, batch_size: int | None = None) -> Tensor:
        """The one-step form: `txt2img` of a stream with a single stage. ValueError with more."""
        if len(self._prepared().stages) != 1:
            raise ValueError(
                f"txt2img_sd_turbo draws in one step and this stream has {len(self._prepared().stages)} stages: "
                f"make it with t_index_list=[0], or call txt2img"
            )
        return self.txt2img(batch_size)

    @computing
    def predict_x0_batch(self, x_t_latent: Tensor, anchor: Tensor | None = None) -> Tensor | None:
        """One tick: F rows in at the first stage's sigma, `[F, ...]`; None until the ring is full, then the oldest F
        clean latents. `anchor` `[F, ...]`: the rows' clean latents, for `cfg_type="self"`; without it they are not guided.

        Raises:
            ValueError: another number of rows or another shape.
        """
        self._running()
        self._check_no_pass("predict_x0_batch()")
        self._check_rows(x_t_latent, self.frame_bff_size)
        regions = self._text_regions()
        self._shown(None, len(x_t_latent))
        self._take_change()
        group = self._text_group(self._next_ids(len(x_t_latent)), x_t_latent, regions)
        self._push(group if anchor is None else replace(group, anchor=anchor.float()))
        return self._finished.popleft().x0 if self._finished else None

    @computing
    def flush(self) -> list[Tensor]:
        """The latents still in flight, groups `[F, ...]`, oldest first; empties the ring. Copies are left out. A loop over
        `frames` that is under way ends with a RuntimeError."""
        self._running()
        self._check_step("flush()")
        self._ranges.raise_failed()
        with self._ticks:
            of_loop = self._end_pass("flush()")
            if of_loop is not None:
                self._finished.extendleft(reversed(of_loop.order.undecoded))
            self._run_out()
            left = [done.x0[: len(done.ids)] for done in self._finished if not done.copy]
            self._finished.clear()
            if of_loop is not None:
                of_loop.returned = sum(map(len, left))
        return left

    # -- the steps by themselves ----------------------------------------------------------------------------------------

    @computing
    def preprocess(self, image: Any) -> Normalized:
        """An image or several to `[n, 3, height, width]` in [-1, 1], marked, so that no later call converts it again."""
        return self._normalize(image, "an image given to preprocess")

    def _read_images(self, image: Any) -> Normalized:
        """As `preprocess`, of images of the frames that come next."""
        return self._normalize(image, f"the image of frame {self._next_id}")

    def _normalize(self, image: Any, what: str) -> Normalized:
        check = check_values if self._check else partial(self._ranges.add, what)
        return normalize_image(image, self.height, self.width, self._input_range, self._resize, check)

    def add_noise(self, original_samples: Tensor, noise: Tensor, t_index: int) -> Tensor:
        """x0 on its path to the noise (`(1 - sigma) x0 + sigma noise` where that is straight) at stage `t_index`."""
        sigma = self._prepared().stages.sigmas[t_index].to(original_samples.device)
        return self.adapter.path(original_samples, noise, sigma.reshape(1))

    @computing
    def encode_image(self, image_tensors: Tensor) -> Tensor:
        """Pictures `[n, 3, H, W]` in [-1, 1] to latents noised to the first stage with the stream's fixed noise."""
        x0 = self._clean_latents(image_tensors)
        return self.adapter.path(x0, self._fixed_noise(), self._running().first_sigma)

    @computing
    def decode_image(self, x_0_pred_out: Tensor) -> Tensor:
        """Clean latents, as the pipeline's `output_type="latent"`, to pictures `[n, 3, H, W]` in [-1, 1]."""
        return self.codec.decode(x_0_pred_out)

    def frame_noise(self, frame_id: int) -> Tensor:
        """The noise from which text frame `frame_id` is drawn, `[1, ...]`; the pipeline takes it as `latents=`."""
        return self._to_device(self._prepared().noise.draw(frame_id))

    def scheduler_step_batch(self, model_pred_batch: Tensor, x_t_latent_batch: Tensor, idx: int | None = None) -> Tensor:
        """x at the next sigma, given velocities; all rows of the batch, or those of stage idx."""
        return self._rows(idx).step(x_t_latent_batch, model_pred_batch)

    @computing
    def unet_step(self, x_t_latent: Tensor, t_list: Tensor, idx: int | None = None) -> tuple[Tensor, Tensor]:
        """(x at the next sigma, guided velocity) of all rows of the batch, or of stage idx, at times `t_list`."""
        rows = self._rows(idx)
        self._check_rows(x_t_latent, rows.count)
        anchors = self._engine.known_anchors if idx is None else None
        if anchors is not None:
            anchors = Anchors(anchors.x0.clone(), anchors.known)
        prompts = [self._state.prompt] * rows.count
        times = torch.as_tensor(t_list, dtype=torch.float32, device=self.device)
        with self._ticks:
            return rows.advance(self.velocity, x_t_latent, prompts, self._state.weight, anchors, None, times)

    # -- the rest of StreamDiffusion's interface --------------------------------------------------------------------------

    def enable_similar_image_filter(self, threshold: float = 0.98, max_skip_frame: float = 10) -> None:
        """Skip image frames that look like the last drawn one; at most `max_skip_frame` in a row."""
        SimilarImageFilter(threshold, max_skip_frame)  # both are checked before either is set
        self.similar_filter.set_threshold(threshold)
        self.similar_filter.set_max_skip_frame(max_skip_frame)
        self.similar_filter.forget()
        self.similar_image_filter = True

    def close(self) -> None:
        """Drop what is in flight and all buffers. The pipe stays as it is; the stream cannot be used again."""
        self._check_step("close()")
        with self._ticks:
            if not self._closed:
                self._empty("close()")
                self._put_back()
            self._engine = self._state = self._change = self._regions = self._on_step = None
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def live(
        self,
        source: str | Source | None,
        sinks: str | Sink | Sequence[str | Sink],
        *,
        target_fps: float = 30.0,
        policy: str = "newest",
        mode: str = "auto",
        on_error: str = "hold",
        controls: Any = None,
    ) -> Live:
        """Restyle a source live; draw from noise without one. Begins at once, in threads of its own, and returns.

            with stream.live("camera:0", ["window", "record:out.mp4"], target_fps=30) as show:
                stream.update_prompt("a fox, 3d render")
                print(show.wait())  # its Statistics, when the window was closed

        On a CPU it draws faster where the stream was prepared in a thread that has ended (`streamflow.app.scenes.aside`).

        source: an address (`streamflow.io`), an object with `open`, `read` and `close`, or None. Its pictures are cropped to
            the stream's proportions.
        sinks: one or several addresses or objects with `open`, `write` and `close`.
        target_fps: pictures a second that are shown, at even intervals: where nothing new is there, the last one again.
        policy: "newest" draws the newest picture of the source and shows the newest that is drawn; "every" leaves none out,
            and the source waits.
        mode: "fed" (the ring, one tick an input), "free" (the ring, always ticking on the newest input), "sequential" (one
            input to its end); "auto" measures all three on the first picture, for 2 s, and takes the one of the lowest
            latency among those that hold the rate. Measured again when size or number of stages change.
        on_error: "hold" keeps the last good picture when the source, a sink or the stream raises, says so once, and goes on
            after pauses of 0.25 s that double up to 5 s, in which source or sink are opened again; a recording goes on in a
            new file. What that cannot mend ends it: a missing file or package, no sink left that works. "raise" ends at any
            error. `wait()` and `stop()` raise what ended it, and what raised while it was closed.
        controls: what `streamflow.live.remote.open_control` gives: OSC, MIDI, keys.

        Raises:
            RuntimeError: before `prepare` or after `close`. ValueError: an unknown address, policy, mode or on_error, a rate
                that is none, more than one frame a group.
        """
        from streamflow.live.show import Live

        self._running()
        self._check_no_pass("live()")
        return Live(
            *(self, source, sinks),
            target_fps=target_fps,
            policy=policy,
            mode=mode,
            on_error=on_error,
            controls=controls,
        )

    def set_denoising_batch(self, batched: bool) -> None:
        """Draw by the ring (True), or every frame to its end by itself (False), as `use_denoising_batch` of the class.

        Raises:
            TypeError: no bool. RuntimeError: before `prepare`, or frames are in flight.
        """
        if not isinstance(batched, bool):
            raise TypeError(f"batched must be True or False, not {batched!r}")
        self._check_step("set_denoising_batch()")
        with self._ticks, self._callers:
            self._running()
            if self._in_flight():
                raise RuntimeError(f"{self._in_flight()} frames are in flight: flush() or reset() first")
            self._batched = batched
            self._install(self._state.stages)

    @staticmethod
    def _accelerate_parts(kind: str, parts: Parts, options: Any) -> Accelerated:
        """Accelerate parts that may be on several devices."""
        from streamflow.parallel.accelerated import accelerate

        return accelerate(kind, parts, options)

    # -- inside ---------------------------------------------------------------------------------------------------------

    _closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this stream was closed: make a new StreamFlow of the same pipe")

    def _prepared(self) -> Prepared:
        self._check_open()
        if self._state is None:
            raise NotPreparedError("call prepare(prompt) first")
        return self._state

    @property
    def _mode(self) -> guidance.Mode:
        """How rows are guided."""
        return guidance.mode(self._cfg_type) if self._state is None else self._state.request.mode

    def _running(self) -> Ring | Loop:
        self._prepared()
        return self._engine

    @property
    def calls_behind(self) -> int:
        """How many calls of the stream return earlier frames before the one whose input was given last returns: S - 1 in a
        ring of S stages that is full, more after new noise levels or an error of the decoder, 0 without a batch."""
        return self._running().groups_in_flight + len(self._finished)

    def _in_flight(self) -> int:
        """How many frames are under way or wait to be handed out, copies not counted."""
        return self._engine.in_flight + sum(len(done.ids) for done in self._finished if not done.copy)

    def _install(self, stages: Stages) -> None:
        """Make the ring (or the loop) for these stages."""
        settings = Settings(
            stages,
            self.frame_bff_size,
            self._mode,
            self.adapter.rule(self._state.request.do_add_noise),
            self._shape,
            self.dtype,
            self.device,
            self.adapter.path,
        )
        self._engine = make_engine(self.adapter, settings, self._state.weight, self._batched)
        self._engine.observer = self._observer

    def _number(self, group: Group) -> None:
        """These frames are under way, so later ones have later numbers."""
        self._next_id = max(self._next_id, 1 + max(group.ids, default=-1))

    def _redraw(self) -> None:
        """What is drawn has changed: no frame is skipped until those that enter from now on have left."""
        stages = self.denoising_steps_num if self._batched else 1
        self.similar_filter.forget(stages * self.frame_bff_size)

    def _shown_now(self, images: Tensor) -> Tensor:
        """Return these images; where the filter is on, keep a copy for calls that skip, or the last one where these are not
        finite."""
        finite = self._count_finite(images)
        if not self.similar_image_filter:
            self.prev_image_result = images
            self.similar_filter.forget()  # that image is not the one that it has seen last
            return images
        last = self.prev_image_result
        if last is None or last.shape != images.shape:
            last = torch.zeros_like(images)
        self.prev_image_result = torch.where(finite, images, last.to(images))
        return images

    def _push(self, group: Group, now: Pass | None = None) -> None:
        """One tick, in which this group enters; `now`: the pass of `frames` that it belongs to."""
        with self._step():
            if now is not None:
                now.check()
            engine = self._running()
            try:
                done = engine.push(group, self.velocity)
            except BaseException:
                if engine.holds(group):  # the step was taken, and what on_step's function raised came after it
                    self._number(group)
                    self._left(*engine.leaving)
                raise
            self._number(group)
            if done is not None:
                self._left(done)

    def _left(self, *done: Done) -> None:
        """Queue groups that have left the ring."""
        self._finished.extend(done)
        if done:
            self._last_x0 = done[-1].x0[-1:].clone()

    def _group_count(self, batch_size: int | None, latents: Tensor | None) -> int:
        """How many groups a call of txt2img is to return."""
        frames = self.frame_bff_size
        n = batch_size if batch_size is not None else frames if latents is None else len(latents)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1 or n % frames:
            raise ValueError(f"batch_size must be a positive multiple of frame_buffer_size {frames}, not {n!r}")
        if latents is not None:
            self._check_rows(latents, n)
        return n // frames

    def _check_rows(self, x: Tensor, rows: int) -> None:
        if tuple(x.shape) != (rows, *self._shape):
            raise ValueError(f"latents must be {[rows, *self._shape]}, not {list(x.shape)}")


_TEXTS = {"prompt", "negative_prompt", "prompt_weights", "blend", "normalize", "assigned_embeds"}
_VIDEO = {"noise", "noise_period", "feedback"}
_SAMPLING = {"guidance_scale", "delta", "num_inference_steps", "t_index_list", "strength", "cfg_type", "do_add_noise"}
_UPDATABLE = _TEXTS | _VIDEO | _SAMPLING
# Which fields an update is read together with; the pipeline's own arguments with all.
_PARTS = {
    **{name: (name,) for name in (*_VIDEO, "seed", "guidance_scale", "delta", "cfg_type", "do_add_noise")},
    **dict.fromkeys(_TEXTS, ("texts",)),
    **dict.fromkeys(("num_inference_steps", "t_index_list", "strength"), ("levels",)),
}
