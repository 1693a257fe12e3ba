"""`prepare`, and updates from any thread. The drawing thread takes an update at the start of its next call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamflow._grad_mode import computing
from streamflow._threads import aside
from streamflow.conditioning.reference import FixedReferences
from streamflow.flow.schedule import check_indices
from streamflow.models.adapter import ASKS_FOR_NOTHING, RESERVED
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.model import Model
from streamflow.stream.outputs import Outputs
from streamflow.stream.planner import DEFAULT_SEED, Planner
from streamflow.stream.request import SCOPES, Change, Prepared, Request, Seeds, Texts, check_feedback, owned

if TYPE_CHECKING:
    from streamflow.models.protocols import Call


class Updates:
    """Plans what is drawn, and keeps the one change that is pending.

    pending: the change that the next call takes. count: the number of updates so far. defaults: the fields of a request that
    `prepare` takes from the stream's constructor: t_index_list, cfg_type, do_add_noise, noise, noise_period, feedback, and
    the references that are set. readers: functions that read an argument of `prepare` and `update`, by its name.
    callers: the lock of the thread that plans. slot: the lock of `pending` and of the denoiser's `state`. Locks are taken in
    this order: the denoiser's `ticks`, `callers`, `slot`.
    """

    def __init__(self, model: Model, planner: Planner, denoiser: Denoiser, outputs: Outputs, **defaults: Any) -> None:
        check_feedback(defaults["feedback"])
        self._model, self.planner, self._denoiser, self._outputs = model, planner, denoiser, outputs
        self.defaults = {**defaults, "references": FixedReferences(), "reference_reuse": None}
        self.readers: dict[str, Callable[[Any], Any]] = {}
        self.callers, self.slot = threading.Lock(), threading.Lock()
        self.pending: Change | None = None
        self.count = 0
        denoiser.on_close.add(self._close)

    # -- prepare --------------------------------------------------------------------------------------------------------

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
            strength: image-to-image: start where the pipeline's own `get_timesteps` starts, in place of `t_index_list`.
            blend: "linear" or "slerp", along the sphere (`streamflow.conditioning.blending.METHODS`).
            normalize: make the weights sum to 1; False takes only weights that do, within a thousandth.
            pipeline_arguments: more arguments of the pipeline's `__call__`: `sigmas`, `max_sequence_length`, ...; and
                `references`, those of all frames: images by name, one or several, by default those of `set_reference`; and
                `reference_reuse`, for families that keep references' keys and values: a token of which no pixel in [-1, 1]
                has changed by more keeps those that it had.

        Raises:
            TypeError, ValueError: for what the stream or the pipeline cannot take; then nothing has changed. Whatever
                acceleration raises; then the stream is prepared, without acceleration.
        """
        model, denoiser, planner = self._model, self._denoiser, self.planner
        model.check_open()
        denoiser.check_step("prepare()")
        own = {**self.defaults, **self._read(pipeline_arguments)}
        arguments = self._without_defaults(pipeline_arguments)
        model.adapter.check_arguments(arguments)
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            delta=delta,
            strength=strength,
            arguments=owned(arguments),
            blend=blend,
            normalize=normalize,
            **own,
        )
        seed = planner.seed(seed)
        model.adapter.settle(request.arguments, request.prompt)
        model.settle_shape()
        with denoiser.ticks, self.callers:
            try:
                with model.following_pipe():
                    state = planner.plan(request, generator, seed)
            except BaseException:
                planner.forget_prompts()  # they may have been encoded by parts that the stream does not use
                raise
            if generator is not None and isinstance(seed, int):
                generator.manual_seed(seed)
            seed = state.noise.seed
            self._outputs.similar_filter.seed = seed if isinstance(seed, int) else DEFAULT_SEED
            denoiser.empty("prepare()")
            with self.slot:
                denoiser.state, self.pending = state, None
            denoiser.begin(state)
        if model.accelerated is None:
            model.after_change()

    def _read(self, arguments: Call) -> Call:
        """Take the arguments that have a reader out of these, and return what was read."""
        return {name: reader(arguments.pop(name)) for name, reader in self.readers.items() if name in arguments}

    def _without_defaults(self, arguments: Call) -> Call:
        """The pipeline's arguments, without those that have their default value here."""
        defaults = {**ASKS_FOR_NOTHING, "height": self._model.height, "width": self._model.width}
        refused = {*RESERVED, *self._model.adapter.refused}
        left_out = {name for name, value in arguments.items() if value is None and name in refused}
        left_out |= {name for name, value in arguments.items() if name in defaults and value == defaults[name]}
        return {name: value for name, value in arguments.items() if name not in left_out}

    # -- update ---------------------------------------------------------------------------------------------------------

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
        """Change what is drawn, from any thread; the drawing thread takes it at the start of its next call.

        Args:
            scope: "now" for rows in flight too, "frame" for frames that enter from then on. None: now, but for noise
                levels. New noise levels under "frame" or None let what is in flight run to its end with the old ones
                first, and calls deliver that before anything newer, so that they stay so many frames behind until `flush`
                or `reset`; "now" needs as many stages as before. The guidance
                weight and delta act on all rows at the next call, whatever the scope.
            seed: of the frames that enter from then on.
            changes: prompt, prompt_weights (of the texts in force, none of which is encoded again), negative_prompt, blend,
                normalize, guidance_scale, delta, num_inference_steps, t_index_list, strength, noise, noise_period, feedback
                (of frames that enter from then on), cfg_type, do_add_noise (frames in flight finish first), references (as
                `prepare` takes them; of frames that enter from then on), and the pipeline's own arguments by name.

        Returns the update's number, counted from 1. Updates not yet taken merge, the later winning field by field. While
        one is encoded, others wait; of those that set the same fields, only the last is encoded, and its number returned.
        While another thread draws, a pause of 19 times its own length follows each, a second at most.

        Raises:
            RuntimeError: before prepare. TypeError, ValueError: as `prepare`; then nothing has changed.
        """
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: choose 'now' or 'frame'")
        adapter = self._model.adapter
        if scope != "frame":
            adapter.check_offers("update now")
        own = {name: changes.pop(name) for name in _UPDATABLE & set(changes)}
        own |= self._read(changes)
        if scope == "now" and "references" in own:
            raise ValueError(
                "a frame keeps its references to its end, so that scope='now' cannot change them: leave scope out, or pass "
                "'frame'"
            )
        arguments = self._without_defaults(changes)
        adapter.check_arguments(arguments)
        if own.get("t_index_list") is not None:
            own["t_index_list"] = check_indices(own["t_index_list"])
            own.setdefault("strength", None)
        return self._queue(scope, seed, own, arguments)

    @computing
    def assign_embeds(self, cond: Tensor | None, uncond: Tensor | None) -> None:
        """Let embeddings take the place of what the prompt and the negative prompt were encoded to, of all rows. None: those
        that were assigned before stay."""
        self._model.adapter.check_offers("update now")
        before = self.requested().request.assigned_embeds
        embeds = tuple(old if new is None else new for old, new in zip(before, (cond, uncond), strict=True))
        self._queue("now", None, {"assigned_embeds": embeds}, {})

    def _queue(self, scope: str | None, seed: Seeds | None, own: Call, arguments: Call) -> int:
        """Plan these changes, own fields of a request and arguments of the pipeline, when it is their turn."""
        queue = self._denoiser.queue
        names = {*own, *arguments} | (set() if seed is None else {"seed"})
        parts = {part for name in names for part in _PARTS.get(name, ("texts", "levels"))}
        change = partial(self._change_to, scope, seed, own, arguments)
        if self._model.device.type == "cpu" and queue.drawing_elsewhere:
            change = partial(aside, change)
        return queue.apply(names, scope, change, parts)

    @computing
    def _change_to(self, scope: str | None, seed: Seeds | None, own: Call, arguments: Call) -> int:
        """Plan these changes, and make them the pending change. Returns the update's number."""
        with self.callers:
            with self.slot:
                pending, state = self.pending, self._denoiser.prepared()
            target = pending.target if pending else state
            request = target.request.changed(own, owned(arguments))
            self._model.adapter.settle(request.arguments, request.prompt)
            changed = self.planner.change(target, request, seed)
            held = pending.entries if pending else frozenset()
            entries = self._entries(target, changed, {*own, *arguments}, scope, held)
            new_levels = changed.stages is not target.stages
            if new_levels and scope == "now" and len(changed.stages) != len(target.stages):
                raise ValueError(
                    f"scope='now' keeps the number of stages, {len(target.stages)}, and {len(changed.stages)} were given: "
                    f"leave scope out, and frames in flight finish first"
                )
            levels_now = scope == "now" if new_levels or not pending else pending.levels_now
            if pending:
                drains = pending.target.stages is not state.stages and not pending.levels_now
                levels_now = levels_now and not drains
            with self.slot:
                self.pending = Change(changed, entries, levels_now)
            self.count += 1
            return self.count

    def _entries(
        self, before: Prepared, after: Prepared, names: set[str], scope: str | None, held: frozenset[str]
    ) -> frozenset[str]:
        """The names of the prompt's tensors that rows in flight take; `held`: those of the update that is pending."""
        if names - (_OWN - _TEXTS) - {self._model.adapter.guidance_argument}:  # these belong to the prompt
            return frozenset() if scope == "frame" else frozenset(after.prompt.cond.rows)
        if scope == "frame" or after.prompt is before.prompt:
            return held
        return held | before.prompt.differing(after.prompt)

    def amend(self, change: Callable[[Prepared], Prepared]) -> None:
        """Let the next call take `change(current)` of what is requested now, for frames that enter from then on."""
        with self.callers:
            with self.slot:
                pending, state = self.pending, self._denoiser.prepared()
            before = pending.target if pending else state
            target = change(before)
            same_levels = target.stages is before.stages
            made = (
                replace(pending, target=target, levels_now=pending.levels_now and same_levels) if pending else Change(target)
            )
            with self.slot:
                self.pending = made

    def current(self, name: str) -> Any:
        """A field of what the next call draws; before `prepare`, its default."""
        return self.defaults[name] if self._denoiser.state is None else getattr(self.requested().request, name)

    def keep(self, **change: Any) -> None:
        """Update a field, and let later calls of `prepare` keep it: `t_index_list`, `cfg_type`, `do_add_noise` or
        `references`."""
        self._model.check_open()
        checked = {**self.defaults, **change}
        self.planner.check(checked["cfg_type"], checked["do_add_noise"])
        if self._denoiser.state is not None:
            self.update(**change)
        self.defaults.update(change)  # another thread may have kept another field meanwhile

    def forget_prompts(self) -> None:
        """Forget the prompts that are kept encoded. Those in force stay."""
        self.planner.forget_prompts()

    @property
    def cached_prompts(self) -> int:
        """How many prompts are kept encoded."""
        return len(self.planner.cache)

    def requested(self) -> Prepared:
        """What the next call draws, with the pending update."""
        state = self._denoiser.prepared()
        with self.slot:
            return self.pending.target if self.pending else state

    def _close(self) -> None:
        """Drop the pending update."""
        self.pending = None

    # -- in the drawing thread --------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Take the pending update, if there is one. Only the drawing thread calls this, at the start of a call."""
        while not self.take_one(self.pending):
            pass

    def take_one(self, change: Change | None) -> bool:
        """Take this pending update. Returns False where another one has been merged with it since."""
        if change is None:
            return True
        denoiser, before = self._denoiser, self._denoiser.prepared()
        new_engine = denoiser.needs_engine(change)
        if new_engine:
            denoiser.run_out()  # where that fails, the update waits for the next call
        with self.slot:
            if self.pending is not change:
                return False
            self.pending, denoiser.state = None, change.target
        denoiser.take(change, before, new_engine)
        self._outputs.redraw()
        return True


_TEXTS = {"prompt", "negative_prompt", "prompt_weights", "blend", "normalize"}
_VIDEO = {"noise", "noise_period", "feedback"}
_SAMPLING = {"guidance_scale", "delta", "num_inference_steps", "t_index_list", "strength", "cfg_type", "do_add_noise"}
_UPDATABLE = _TEXTS | _VIDEO | _SAMPLING
_OWN = _UPDATABLE | {"references", "reference_reuse"}
# Which fields an update is read together with; the pipeline's own arguments with all.
_PARTS = {
    **{
        name: (name,)
        for name in (*_VIDEO, "seed", "guidance_scale", "delta", "cfg_type", "do_add_noise", "references", "reference_reuse")
    },
    **dict.fromkeys((*_TEXTS, "assigned_embeds"), ("texts",)),
    **dict.fromkeys(("num_inference_steps", "t_index_list", "strength"), ("levels",)),
}
