"""Which knob or key changes what: names, addresses and ranges. Knows no network, no device and no stream."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from streamflow._files import Json
from streamflow._validation import Section

Action = Literal["pause", "freeze", "blackout", "next", "panic"]
KEYS: dict[str, Action] = {"space": "pause", "f": "freeze", "b": "blackout", "n": "next", "p": "panic"}


class FieldRange(NamedTuple):
    """The values of a field of `StreamFlow.update`: a text, or numbers from low to high."""

    kind: Literal["number", "integer", "text"] = "number"
    low: float = -1e9
    high: float = 1e9


FIELDS = {
    "prompt": FieldRange("text"),
    "negative_prompt": FieldRange("text"),
    "seed": FieldRange("integer", 0, 2**53),
    "guidance_scale": FieldRange(),
    "delta": FieldRange(),
    "strength": FieldRange("number", 0.01, 1),  # the stream takes what is above 0
    "num_inference_steps": FieldRange("integer", 1, 1000),
    "feedback": FieldRange("number", 0, 0.999),
    "noise_period": FieldRange("integer", 1),
}
WEIGHT = re.compile(r"prompt_weights\.(0|[1-9]\d?)")  # by the number of the text
NUMBER = r"(0|[1-9]\d?|1[01]\d|12[0-7])"
ADDRESS = re.compile(
    rf"osc:/[!-~]{{0,254}}|midi:(cc|note):([1-9]|1[0-6]):{NUMBER}|audio:(level|low|mid|high|onset)|(audio|link|midi):(beat|tempo)"
)
TEMPI = ("audio:tempo", "link:tempo", "midi:tempo")
SOUND = re.compile(r"audio:.+|link:")
RESERVED = re.compile(r"[#*,?\[\]{}]")  # the pattern characters of OSC
SOCKET = re.compile(r"(?:(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:\[\]]*):)?(?P<port>\d{1,5})")


def is_address(address: str) -> bool:
    """Whether a mapping can name it."""
    return bool(ADDRESS.fullmatch(address)) and not RESERVED.search(address)


def weight_number(field: str) -> int | None:
    """1 of `prompt_weights.1`; None of another field."""
    found = WEIGHT.fullmatch(field)
    return int(found[1]) if found else None


def _default_range(data: Json) -> tuple[float, float]:
    """0 to 1, within what a field of numbers takes."""
    kind, low, high = FIELDS.get(data.get("field", ""), FieldRange())
    return (max(0.0, low), min(1.0, high)) if kind == "number" else (0.0, 1.0)


class Mapping(Section):
    """One knob: its values, from one end to the other, move a field from one end of `range` to the other."""

    address: str = Field(
        description="osc:/some/name; midi:cc:1:74 (channel 1, controller 74); midi:note:1:60 (velocity); audio: with level, "
        "low, mid, high or onset; audio:, link: and midi: (its clock) with beat or tempo"
    )
    field: str = Field(description="what it changes, such as guidance_scale, seed or prompt_weights.0")
    range: tuple[float, float] = Field(default_factory=_default_range, description="the field's values at the knob's ends")
    source: tuple[float, float] | None = Field(
        default=None,
        description="what the knob sends at its ends; empty: 0 to 1, of cc and note 0 to 127, of a tempo 60 to 180",
    )
    smoothing: float = Field(default=0.0, ge=0, description="seconds after which 63 % of a change is done; 0: at once")

    @field_validator("address")
    @classmethod
    def _known_address(cls, address: str) -> str:
        if not is_address(address):
            raise ValueError(
                f"{address!r} is no address: write osc:/some/name (without # * , ? [ ] {{ }}), midi:cc:1:74 or "
                f"midi:note:1:60 (channel 1 to 16, number 0 to 127), audio: with level, low, mid, high, onset, beat or "
                f"tempo, or beat or tempo of link: or midi:"
            )
        return address

    @field_validator("field")
    @classmethod
    def _known_field(cls, field: str) -> str:
        if field not in FIELDS and weight_number(field) is None:
            known = ", ".join((*FIELDS, "prompt_weights.0", "prompt_weights.1", "..."))
            raise ValueError(f"a knob cannot change {field!r}: choose one of {known}")
        return field

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.kind == "text":
            self._check_text()
            return self
        if self.ends[0] == self.ends[1]:
            raise ValueError(f"source holds the knob's two ends, and both are {self.ends[0]:g}")
        _, low, high = self.field_range
        if not low <= min(self.range) <= max(self.range) <= high:
            raise ValueError(f"{self.field} is from {low:.10g} to {high:.10g}, and range is {list(self.range)}")
        return self

    def _check_text(self) -> None:
        kind, _, _ = self.address.partition(":")
        if kind != "osc":
            sender = {"midi": "MIDI", "audio": "sound", "link": "Link"}[kind]
            raise ValueError(f"{self.field} is a text, which {sender} does not send: give it an osc: address")
        if (self.range, self.source, self.smoothing) != ((0.0, 1.0), None, 0.0):
            raise ValueError(f"{self.field} is a text: leave range, source and smoothing out")

    @property
    def field_range(self) -> FieldRange:
        """The values of the field."""
        return FIELDS.get(self.field, FieldRange("number", 0))

    @property
    def kind(self) -> Literal["number", "integer", "text"]:
        """The kind of the field's values."""
        return self.field_range.kind

    @property
    def ends(self) -> tuple[float, float]:
        """The knob's values at its ends."""
        if self.source is not None:
            return self.source
        if self.address.startswith(("midi:cc:", "midi:note:")):
            return 0.0, 127.0
        return (60.0, 180.0) if self.address in TEMPI else (0.0, 1.0)


class Control(Section):
    """Knobs over OSC and MIDI, sound and its beat, and keys in the window."""

    osc: str | None = Field(
        default=None,
        description="address to listen at, such as 127.0.0.1:9000; whoever reaches it changes the fields. Empty: no OSC",
    )
    page: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of a page of this machine (127.0.0.1) with every knob, its range and its value. Empty: no page",
    )
    midi: str | None = Field(
        default=None, min_length=1, description="a MIDI port's name, or a part only it has. Empty: no MIDI"
    )
    sound: tuple[str, ...] = Field(
        default=(),
        description="audio:default, audio:NAME of a device or audio:FILE.wav, and link: (Ableton Link), at most one of each",
    )
    mappings: tuple[Mapping, ...] = Field(
        default=(), description="knobs: [{address: osc:/weight, field: guidance_scale, range: [1, 8], smoothing: 0.2}, ...]"
    )
    keys: dict[str, Action] = Field(
        default=KEYS,
        description="of the window: what each does, one of pause, freeze, blackout, next (scene), panic (last image)",
    )

    @field_validator("osc")
    @classmethod
    def _can_be_bound(cls, osc: str | None) -> str | None:
        if osc is not None:
            socket_of(osc)
        return osc

    @field_validator("sound")
    @classmethod
    def _known_sound(cls, sound: tuple[str, ...]) -> tuple[str, ...]:
        for one in sound:
            if not SOUND.fullmatch(one):
                raise ValueError(f"{one!r} is no sound: write audio:default, audio:NAME, audio:FILE.wav or link:")
        kinds = [one.partition(":")[0] for one in sound]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"sound has at most one audio: and one link:, not {', '.join(sound)}")
        return sound

    def sound_of(self, kind: Literal["audio", "link"]) -> str | None:
        """What follows `audio:` or `link:` in `sound`; None where it is not named."""
        return next((one.removeprefix(f"{kind}:") for one in self.sound if one.startswith(f"{kind}:")), None)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        addresses = [one.address for one in self.mappings]
        if twice := sorted({one for one in addresses if addresses.count(one) > 1}):
            raise ValueError(f"a knob changes one field, and there is more than one mapping of {', '.join(twice)}")
        for kind, given, missing in (
            ("osc", self.osc, "osc is empty"),
            ("midi", self.midi, "midi is empty"),
            ("audio", self.sound_of("audio"), "sound has no audio:"),
            ("link", self.sound_of("link"), "sound has no link:"),
        ):
            if given is None and (unserved := [one for one in addresses if one.startswith(f"{kind}:")]):
                raise ValueError(f"{missing}, and mappings need it: {', '.join(unserved)}")
        return self


def socket_of(address: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:9000`; without a host, this machine alone. ValueError."""
    found = SOCKET.fullmatch(address)
    if not found or int(found["port"]) > 65535:
        raise ValueError(f"osc is an address such as 127.0.0.1:9000, its port up to 65535, not {address!r}")
    return (found["host"] or "").strip("[]") or "127.0.0.1", int(found["port"])
