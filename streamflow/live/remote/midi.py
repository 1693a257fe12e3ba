"""Knobs and clock by MIDI. Knows mido and its backend python-rtmidi; no knob, no field."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import linear_regression
from typing import TYPE_CHECKING

from streamflow.io.protocols import need

if TYPE_CHECKING:
    import mido

# By a message's type: the kind in the address, and where its number and its value are.
MESSAGE_KINDS = {
    "control_change": ("cc", "control", "value"),
    "note_on": ("note", "note", "velocity"),
    "note_off": ("note", "note", None),
}
PULSES = 24  # of the clock in a beat
PAUSE = 0.25  # seconds without a pulse, after which the clock has stopped


def parse_message(message: mido.Message) -> tuple[str, int] | None:
    """Address and value (0 to 127) of a mido message; None for kinds that no knob sends. Channels count from 1."""
    fields = message.dict()
    if fields["type"] not in MESSAGE_KINDS:
        return None
    kind, number, value = MESSAGE_KINDS[fields["type"]]
    return f"midi:{kind}:{fields['channel'] + 1}:{fields[number]}", 0 if value is None else fields[value]


def find_port(name: str, ports: Sequence[str]) -> str:
    """The port of this name, or the one whose name has it as a part. OSError names the ports there are."""
    found = [port for port in ports if port == name] or [port for port in ports if name.lower() in port.lower()]
    if len(set(found)) != 1:
        many = f"{len(found)} MIDI ports have {name!r} in their names" if found else f"there is no MIDI port {name!r}"
        raise OSError(f"{many}; ports: {', '.join(map(repr, ports)) or 'none'}")
    return found[0]


class MidiClock:
    """Tempo and beat of a MIDI clock, by a line through the times of the last 48 pulses, which evens out their jitter."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=2 * PULSES)
        self._number = -1  # of the last pulse; 0, 24, ... are on a beat
        self._playing = True  # pulses between `stop` and `continue` or `start` do not count
        self._lock = threading.Lock()

    def take(self, message: mido.Message, now: float) -> None:
        """Take a message that arrived now, in seconds; those that do not belong to the clock are ignored. The pulse after
        `start` is on a beat, `songpos` counts sixteenths, and `continue` goes on where `stop` was. Without any of them, the
        first pulse is on a beat."""
        kind = message.dict()["type"]
        with self._lock:
            if kind in ("start", "continue", "stop"):
                self._playing = kind != "stop"
            if kind == "start":
                self._number = -1
            elif kind == "songpos":
                self._number = message.dict()["pos"] * (PULSES // 4) - 1
            elif kind == "clock":
                if self._times and now - self._times[-1] > PAUSE:
                    self._times.clear()
                self._times.append(now)
                self._number += self._playing

    def values(self, now: float) -> dict[str, float]:
        """Phase in [0, 1) within the beat, and tempo in BPM, by address; nothing before a beat has passed, and while the
        clock or the song has stopped."""
        with self._lock:
            times, number, playing = list(self._times), self._number, self._playing
        if not playing or len(times) < PULSES or now - times[-1] > PAUSE:
            return {}
        interval, last = linear_regression(range(1 - len(times), 1), [one - now for one in times])
        if interval <= 0:
            return {}
        beat = (number - last / interval) / PULSES
        return {"midi:beat": float(beat % 1.0 % 1.0), "midi:tempo": float(60 / (PULSES * interval))}


class MidiInput:
    """Calls `receive("midi:cc:1:74", value)` in the driver's thread. `values`: of the clock, where the port sends one.

    Raises:
        ImportError: without mido or python-rtmidi. OSError: no such port, or this machine has no MIDI.
    """

    def __init__(self, name: str, receive: Callable[..., None]) -> None:
        for module in ("mido", "rtmidi"):
            need(module, '"streamflow-rf[control]"')
        import mido

        clock = MidiClock()
        self.values = clock.values

        def take(message: mido.Message) -> None:
            clock.take(message, time.monotonic())
            if (read := parse_message(message)) is not None:
                receive(*read)

        backend = mido.Backend("mido.backends.rtmidi")
        try:
            ports = backend.get_input_names()
        except OSError as error:
            raise OSError(f"this machine has no MIDI: {error}") from error
        self._port = backend.open_input(find_port(name, ports), callback=take)

    def close(self) -> None:
        """Close the port."""
        self._port.close()
