"""Control of a live stream from outside: OSC, MIDI, sound, keys, a page. (For ControlNet, see `streamflow.stream`.)

Knows `update` as a callable; no stream, no window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from streamflow._files import Json
from streamflow.live.remote.keys import Keys
from streamflow.live.remote.knobs import Knobs
from streamflow.live.remote.learn import Learner
from streamflow.live.remote.link import LinkInput
from streamflow.live.remote.midi import MidiInput
from streamflow.live.remote.osc import OscInput
from streamflow.live.remote.page import ControlPage
from streamflow.live.remote.settings import Control, Mapping, socket_of

if TYPE_CHECKING:
    from streamflow.live.remote.audio import AudioInput
    from streamflow.models.protocols import Function

__all__ = ["Control", "Controls", "Keys", "Mapping", "open_control"]
logger = logging.getLogger(__name__)


class Controls:
    """The inputs that the settings name, open from here on, their knobs, and `keys`. Call `tick` once a frame, from the
    thread that draws.

    stream_update: `StreamFlow.update` of the stream that draws. weights: of the prompt's texts at the start. present: the
        values of the stream's fields, for the page; empty while there is no stream.
    osc_bound: host and port of OSC. page: that of the settings, None where they have none.

    Raises:
        ImportError: a package is missing, with the command that brings it. OSError: an address, port, device or file is not
            available. ValueError: a file is no sound.
    """

    def __init__(
        self,
        settings: Control,
        stream_update: Function,
        weights: Sequence[float] = (),
        present: Callable[[], Json] = dict,
    ) -> None:
        self.keys = Keys(settings.keys)
        self._settings, self._update = settings, stream_update
        self._knobs = Knobs(settings.mappings, weights)
        self._learner: Learner | None = None
        self._refused: dict[str, str] = {}  # fields, and why
        self._senses: list[Callable[[float], dict[str, float]]] = []  # values by address, that are read once a frame
        self.osc_bound: tuple[str, int] | None = None
        self.page: ControlPage | None = None
        with ExitStack() as opened:
            if settings.osc is not None:
                osc = OscInput(*socket_of(settings.osc), self.receive)
                opened.callback(osc.close)
                self.osc_bound = osc.bound
            if settings.midi is not None:
                self._keep(opened, MidiInput(settings.midi, self.receive))
            if (name := settings.sound_of("audio")) is not None:
                from streamflow.live.remote.audio import AudioInput

                self._keep(opened, AudioInput(name))
            if settings.sound_of("link") is not None:
                self._keep(opened, LinkInput())
            if settings.page is not None:
                self.page = ControlPage(settings, self.osc_bound, self._knobs, present, self._refused)
                opened.callback(self.page.close)
                logger.info("the page of controls is at http://127.0.0.1:%d/", self.page.port)
            self._opened = opened.pop_all()

    def _keep(self, opened: ExitStack, source: MidiInput | AudioInput | LinkInput) -> None:
        opened.callback(source.close)
        self._senses.append(source.values)

    @property
    def settings(self) -> Control:
        """The settings, with the mappings that were learned."""
        return self._settings.model_copy(update={"mappings": self._knobs.mappings})

    def tick(self, now: float) -> None:
        """Read sound and beat, and send what is due, in one update. One that is refused is sent field by field, so that one
        bad value does not hold up the others; a field that is refused is dropped and logged, once until it is taken again.
        now: seconds of `time.monotonic()`."""
        for values in self._senses:
            for address, value in values(now).items():
                self._knobs.put(address, value)
        fields = self._knobs.due(now)
        error = self._refusal(fields) if fields else None
        if error is None:
            return
        for field, value in fields.items():
            if len(fields) > 1:
                error = self._refusal({field: value})
            if error is not None and field not in self._refused:
                self._refused[field] = str(error)
                logger.warning("%s = %.200r is refused and dropped: %s", field, value, error)

    def _refusal(self, fields: Json) -> Exception | None:
        """Send an update. Return the error where it is refused, else None."""
        try:
            self._update(**fields)
        except (TypeError, ValueError, RuntimeError) as error:
            return error
        for field in fields:
            self._refused.pop(field, None)
        return None

    def learn(self, field: str, range: tuple[float, float] | None = None, smoothing: float = 0.0) -> Learner:
        """Map the next knob that moves to this field. `wait` of the result returns the mapping. Another call replaces this
        one. ValidationError: as `Mapping`."""
        self._learner = Learner(field, range, smoothing)
        return self._learner

    def receive(self, address: str, *values: object) -> None:
        """Take what an input sent, from any thread. The inputs call it, and so may an input of your own."""
        learner = self._learner
        if learner is not None and (mapping := learner.receive(address, *values)) is not None:
            self._knobs.add(mapping)
            logger.info("%s changes %s from now on", mapping.address, mapping.field)
        self._knobs.put(address, *values)

    def close(self) -> None:
        """Close the inputs; their threads have ended when this returns. May be called twice."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


open_control = Controls
