"""Several calls of one network as one call. Nothing is known of the network: which of its arguments have a batch dimension
is read off their shapes, and whether that reading was right is tried out, once for every form of call, on the network."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

logger = logging.getLogger(__name__)

# Where shapes mislead. Arguments that calls share though a dimension may be as long as the batch, and the batch dimension
# of those that have another than the first.
SHARED = frozenset({"visual_rope_pos", "text_rope_pos"})
BATCH_DIMENSION = {"encoder_hidden_states_llama3": 1}
# The largest relative error at which one call is taken for several; an argument joined wrongly makes it 0.1 and more.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_TOLERANCE = 5e-2
REMEMBERED = 64  # forms of call
Arguments = Mapping[str, Any]


class _Apart(Exception):
    """These calls cannot be one."""


class OneByOne(nn.Module):
    """The reference: every call by itself, as it came."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self._signature = inspect.signature(network.forward)

    def bind(self, *args: Any, **kwargs: Any) -> Arguments:
        """The arguments of a call of the network, by name."""
        return self._signature.bind(*args, **kwargs).arguments

    def forward(self, calls: Sequence[Arguments]) -> list[Any]:
        return [self.call(arguments) for arguments in calls]

    def call(self, arguments: Arguments) -> Any:
        """One call of the network a row."""
        bound = inspect.BoundArguments(self._signature, OrderedDict(arguments))
        return self.network(*bound.args, **bound.kwargs)


class Together(OneByOne):
    """Calls of one form, which is names, shapes, dtypes and plain values, go as one; those of other forms as another one.

    The first time that several calls of a form come, the network is called for each and then for all: where the answers
    differ by more than rounding, or the network refuses, calls of that form always go one by one, and a warning says so.
    """

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self._tried: OrderedDict[Any, bool] = OrderedDict()
        self._same = _Same()

    def forward(self, calls: Sequence[Arguments]) -> list[Any]:
        answers: list[Any] = [None] * len(calls)
        for numbers in _by_form(calls):
            for number, answer in zip(numbers, self._answers([calls[i] for i in numbers]), strict=True):
                answers[number] = answer
        return answers

    def _answers(self, calls: list[Arguments]) -> list[Any]:
        if len(calls) == 1:
            return super().forward(calls)
        form = repr(_form(calls[0]))
        if form not in self._tried:
            return self._try(form, calls)
        return self._at_once(calls) if self._tried[form] else super().forward(calls)

    def _at_once(self, calls: list[Arguments]) -> list[Any]:
        rows = _rows(calls[0])
        joined = {name: self._same.join(name, [call[name] for call in calls], rows) for name in calls[0]}
        return _split(self.call(joined), len(calls), rows)

    def _try(self, form: str, calls: list[Arguments]) -> list[Any]:
        """The calls one by one; what comes of them at once is compared, and remembered."""
        alone = super().forward(calls)
        try:
            reason = _difference(self._at_once(calls), alone)
        except torch.OutOfMemoryError:
            raise
        except (_Apart, RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            logger.warning("calls of %s go one by one, since one call for all of them fails: %s", self._name, reason)
        self._tried[form] = not reason
        if len(self._tried) > REMEMBERED:
            self._tried.popitem(last=False)
        return alone

    @property
    def _name(self) -> str:
        return type(self.network).__name__


class _Same:
    """Joins one argument of several calls. A tensor that calls share is compared once, not at every step."""

    def __init__(self) -> None:
        self._bytes = WeakTensorKeyDictionary()

    def join(self, name: str, values: list[Any], rows: int) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return self._tensors(name, values, rows)
        if isinstance(first, list) and len(first) == rows and name not in SHARED:
            return [one for value in values for one in value]
        if isinstance(first, (list, tuple)):
            return type(first)(self.join(name, list(ones), rows) for ones in zip(*values, strict=True))
        if isinstance(first, Mapping):
            return {key: self.join(key, [value[key] for value in values], rows) for key in first}
        return first  # plain values: equal, since they are part of the form

    def _tensors(self, name: str, values: list[Tensor], rows: int) -> Tensor:
        dimension = BATCH_DIMENSION.get(name, 0)
        shape = values[0].shape
        if shape == () or (shape == (1,) and rows > 1):  # one time for all rows of a call
            return torch.cat([value.expand(rows) for value in values])
        if name not in SHARED and len(shape) > dimension and shape[dimension] == rows:
            return torch.cat(values, dimension)
        if any(self._of(value) != self._of(values[0]) for value in values[1:]):
            raise _Apart(f"{name} {list(shape)} has no batch dimension of {rows} and differs from call to call")
        return values[0]

    def _of(self, tensor: Tensor) -> bytes:
        version = None if tensor.is_inference() else tensor._version
        known = self._bytes.get(tensor)
        if known is None or version is None or known[0] != version:
            known = version, tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            self._bytes[tensor] = known
        return known[1]


def _by_form(calls: Sequence[Arguments]) -> list[list[int]]:
    groups: list[tuple[Any, list[int]]] = []
    for number, call in enumerate(calls):
        form = _form(call)
        same = next((numbers for other, numbers in groups if (other == form) is True), None)
        if same is None:
            groups.append((form, [number]))
        else:
            same.append(number)
    return [numbers for _, numbers in groups]


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        return {key: _form(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_form(one) for one in value]
    return value


def _rows(arguments: Arguments) -> int:
    """How many rows a call has: the length of the first argument that is a tensor or a list of them."""
    first = next((v for v in arguments.values() if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim)), None)
    if first is None:
        raise _Apart("no argument has rows")
    return len(first)


def _split(answer: Any, calls: int, rows: int) -> list[Any]:
    """What all calls got, a share each."""
    if isinstance(answer, Tensor) or (isinstance(answer, list) and len(answer) == calls * rows):
        if len(answer) != calls * rows:
            raise _Apart(f"the answer to {calls * rows} rows has {len(answer)}")
        return [answer[i * rows : (i + 1) * rows] for i in range(calls)]
    if isinstance(answer, (list, tuple)) and answer:
        return [type(answer)(parts) for parts in zip(*(_split(one, calls, rows) for one in answer), strict=True)]
    if isinstance(answer, Mapping):  # diffusers' outputs are both
        parts = {key: _split(one, calls, rows) for key, one in answer.items()}
        return [type(answer)(**{key: part[i] for key, part in parts.items()}) for i in range(calls)]
    return [answer] * calls


def _leaves(answer: Any) -> Iterator[Tensor]:
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, Mapping):
        yield from _leaves(list(answer.values()))
    elif isinstance(answer, (list, tuple)):
        for one in answer:
            yield from _leaves(one)


def _difference(answers: list[Any], alone: list[Any]) -> str:
    """In words, how far these answers are from those; empty where that is rounding."""
    pairs = list(zip(_leaves(answers), _leaves(alone), strict=True))
    for one, other in pairs:
        error = ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)).item()
        if not error <= TOLERANCE.get(other.dtype, HALF_TOLERANCE):
            return f"the answer to {len(alone)} calls at once is off by {error:.2g}"
    return ""
