"""Stopping a stream and going on elsewhere: `state_dict` holds all that the next call depends on beside the pipeline itself,
and `load_state_dict` puts it into another stream of the same pipeline, which then draws the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamflow.changes import Change, Prepared, Request
from streamflow.conditioning import Cond, Prompt
from streamflow.grad_mode import computing
from streamflow.guidance import Anchors
from streamflow.image_filter import SimilarImageFilter
from streamflow.inpaint import Known, Paste, Region
from streamflow.models.control import ControlledPrompt
from streamflow.noise import NoiseSource
from streamflow.ring import Done, Group
from streamflow.schedule import Schedule, Stages
from streamflow.snapshot import Packer, Unpacker, attributes

FORMAT = 2
HELD = {"format", "made_by", "stream", "engine", "objects"}
UNDER_WAY = (Anchors, Cond, ControlledPrompt, Done, Group, Known, Paste, Prompt, Region)
SETTINGS = (Change, NoiseSource, Prepared, Request, Schedule, SimilarImageFilter, Stages)
CLASSES = {cls.__name__: cls for cls in (*UNDER_WAY, *SETTINGS)}

# The stream's own attributes that a call depends on and changes, or that are set by a method.
OF_STREAM = (
    *("_state", "_change", "_updates", "_next_id", "_finished", "prev_image_result"),
    *("similar_filter", "similar_image_filter", "_regions", "_paste", "_scales", "_levels"),
    "_last_x0",
)
# The ring's attributes that are made anew from the state.
DERIVED = ("settings", "rows", "stages", "weight", "observer")


class Resuming:
    """Mixed into `StreamFlow`."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next call depends on: the frames under way and those that wait to be handed out, prompts, schedule,
        noise and generators, frame ids, a pending update, what is known of frames, the similarity filter. Not the pipeline,
        not what accelerates it, no function of `on_step` and no trace; and not what a `frames()` that is under way holds.

        Plain values and tensors (copies, on their devices), for `torch.save` and `torch.load(..., weights_only=True)`. Call
        it between two calls, in the thread that draws. RuntimeError before prepare.
        """
        self._prepared()
        self.adapter.check_offers("state_dict")
        packer = Packer(CLASSES, self.device)
        with self._ticks:
            engine = {name: value for name, value in vars(self._engine).items() if name not in DERIVED}
            stream = {name: packer.pack(getattr(self, name)) for name in OF_STREAM}
            held = {"stream": stream, "engine": {name: packer.pack(value) for name, value in engine.items()}}
        return {"format": FORMAT, "made_by": self._made_by(), **held, "objects": packer.objects}

    @computing
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream of this state stood. What this one has in flight is dropped; it need not be prepared.

        Raises:
            TypeError: not a state. ValueError: made by a stream of another family, shape or options, with what differs. Then
            nothing has changed.
        """
        self._check_open()
        self.adapter.check_offers("state_dict")
        _check(state, self._made_by())
        # Weights know functions of their adapter, and so they are planned anew.
        finish = {Prepared: lambda prepared: self._planner.change(prepared, prepared.request, None)}
        unpacker = Unpacker(state["objects"], CLASSES, self.device, finish)
        stream = {name: unpacker.unpack(state["stream"][name]) for name in OF_STREAM}
        engine = {name: unpacker.unpack(value) for name, value in state["engine"].items()}
        similar_filter = attributes(stream.pop("similar_filter"))
        with self._ticks, self._callers:
            self._empty("load_state_dict()")
            with self._slot:
                vars(self).update(stream)
            vars(self.similar_filter).update(similar_filter)
            self._install(self._state.stages)
            vars(self._engine).update(engine)
        if self._accelerated is None:
            self._build()

    def _made_by(self) -> dict[str, Any]:
        """What must be equal for a state to fit, in plain values."""
        names = "width height frame_buffer_size cfg_type use_denoising_batch do_add_noise".split()
        return {
            "family": type(self.adapter).__name__,
            "network": type(self.adapter.net).__name__,
            "latents": list(self._shape),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "noise": self._noise_policy,
            "controls": list(self._scales),
            "scheduler": f"{type(self.scheduler).__name__} {_settings(self.scheduler)}",
            **{name: getattr(self, "frame_bff_size" if name == "frame_buffer_size" else name) for name in names},
        }


def _settings(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in sorted(scheduler.config.items()) if not name.startswith("_")}


def _check(state: Any, expected: Mapping[str, Any]) -> None:
    """TypeError or ValueError unless this is a state that a stream like the expected one made."""
    if not isinstance(state, Mapping) or not state.keys() >= HELD:
        raise TypeError("load_state_dict takes what state_dict() returned")
    if state["format"] != FORMAT:
        raise ValueError(f"this state is of format {state['format']}, and this version reads {FORMAT}: save it anew")
    made = state["made_by"]
    differing = [name for name in {**expected, **made} if made.get(name) != expected.get(name)]
    if differing:
        told = "; ".join(f"{name} {made.get(name)!r}, here {expected.get(name)!r}" for name in differing)
        raise ValueError(f"this state was made by another stream: {told}. Make this StreamFlow as that one was made")
