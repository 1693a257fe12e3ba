"""Plain values for what a stream holds: dicts, lists, tuples, numbers, texts and tensors, which `torch.save` writes and
`torch.load(..., weights_only=True)` reads. What is one object comes back as one object.

It knows a table of classes and their fields; no stream.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, str, torch.dtype)
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}


class Packer:
    """Turns values into plain ones. `objects`: everything with an identity, each once; elsewhere it is `("object", index)`.

    classes: whose instances can be packed, by name: dataclasses by their fields, others by their attributes. device: of the
    tensors that are to come back on the stream's own device.
    """

    def __init__(self, classes: Mapping[str, type], device: torch.device):
        self.objects: list[Any] = []
        self._classes, self._device = classes, device
        self._index: dict[int, int] = {}
        self._alive: list[Any] = []

    def pack(self, value: Any) -> Any:
        """The plain form of a value. TypeError for one that has none."""
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, float):
            return float(value)
        if isinstance(value, deque):
            return "deque", [self.pack(one) for one in value], value.maxlen
        if type(value).__name__ in SEQUENCES:
            return type(value).__name__, [self.pack(one) for one in value]
        if isinstance(value, Mapping):
            return "dict", [(key, self.pack(one)) for key, one in value.items()]
        if id(value) not in self._index:
            self._index[id(value)] = index = len(self.objects)
            self._alive.append(value)
            self.objects.append(None)
            self.objects[index] = self._pack_object(value)
        return "object", self._index[id(value)]

    def _pack_object(self, value: Any) -> tuple:
        if isinstance(value, Tensor):
            return "tensor", value.as_subclass(Tensor).detach().clone(), value.device.type == self._device.type
        if isinstance(value, torch.Generator):
            return "generator", value.device.type, value.get_state()
        if isinstance(value, random.Random):
            return "random", value.getstate()
        name = type(value).__name__
        if self._classes.get(name) is not type(value):
            raise TypeError(f"a state cannot hold a {name}: pass numbers, texts, lists or tensors to the stream instead")
        return name, {key: self.pack(one) for key, one in attributes(value).items()}


class Unpacker:
    """The way back. `finish`: for some classes, what is to be done to an instance that has just been made."""

    def __init__(
        self,
        objects: Sequence[Any],
        classes: Mapping[str, type],
        device: torch.device,
        finish: Mapping[type, Callable[[Any], Any]],
    ):
        self._objects, self._classes, self._device, self._finish = objects, classes, device, finish
        self._made: dict[int, Any] = {}

    def unpack(self, value: Any) -> Any:
        """The value of which this is the plain form."""
        if not isinstance(value, tuple):
            return value
        kind, content, *more = value
        if kind == "object":
            if content not in self._made:
                self._made[content] = self._unpack_object(*self._objects[content])
            return self._made[content]
        if kind == "dict":
            return {key: self.unpack(one) for key, one in content}
        values = [self.unpack(one) for one in content]
        return deque(values, *more) if kind == "deque" else SEQUENCES[kind](values)

    def _unpack_object(self, kind: str, content: Any, *more: Any) -> Any:
        if kind == "tensor":
            return content.to(self._device) if more[0] else content.cpu()
        if kind == "generator":
            device = self._device if content == self._device.type else content
            return torch.Generator(device).set_state(more[0].cpu())
        if kind == "random":
            generator = random.Random()
            generator.setstate(content)
            return generator
        cls = self._classes[kind]
        made = _make(cls, {key: self.unpack(one) for key, one in content.items()})
        return self._finish[cls](made) if cls in self._finish else made


def attributes(value: Any) -> dict[str, Any]:
    """What an object is made of: a dataclass's fields, or all attributes."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(vars(value))


def _make(cls: type, values: Mapping[str, Any]) -> Any:
    if is_dataclass(cls):
        return cls(**values)
    made = cls.__new__(cls)
    vars(made).update(values)
    return made
