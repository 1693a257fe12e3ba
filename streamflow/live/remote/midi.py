"""Knobs by MIDI. Knows mido and its backend python-rtmidi; no knob, no field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class MidiInput:
    """Calls `receive("midi:cc:1:74", value)` in the driver's thread.

    Raises:
        ImportError: without mido or python-rtmidi. OSError: no such port, or this machine has no MIDI.
    """

    def __init__(self, name: str, receive: Callable[..., None]) -> None:
        for module in ("mido", "rtmidi"):
            need(module, '"streamflow-rf[control]"')
        import mido

        def take(message: mido.Message) -> None:
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
