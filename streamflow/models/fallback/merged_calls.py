"""Merges several calls of one network into one. It works for any network: the arguments with a batch dimension are found by
their shapes, and the first merged call of every form is compared with the separate ones."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from streamflow.models.protocols import Arguments, Network

logger = logging.getLogger(__name__)
Outputs = list[Any]  # the network's output for each call, or an argument of each

# Exceptions from the shapes: arguments that calls share although a dimension may be as long as the batch, and arguments
# whose batch dimension is not the first.
SHARED = frozenset({"visual_rope_pos", "text_rope_pos"})
BATCH_DIMENSION = {"encoder_hidden_states_llama3": 1}
# The largest relative error of a merged call; a wrongly joined argument makes it 0.1 and more.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_TOLERANCE = 5e-2
REMEMBERED = 64  # forms of calls whose comparison is kept


class _CannotMerge(Exception):
    """These calls cannot be merged."""


class SeparateCalls(nn.Module):
    """The reference: every call by itself, with its own arguments."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network
        self._signature = inspect.signature(network.forward)

    def forward(self, calls: Sequence[Arguments]) -> Outputs:
        return [self.call(arguments) for arguments in calls]

    def call(self, arguments: Arguments) -> Any:
        """One call of the network."""
        bound = inspect.BoundArguments(self._signature, OrderedDict(arguments))
        return self.network(*bound.args, **bound.kwargs)


class MergedCalls(SeparateCalls):
    """Merges the calls of one form, that is with the same names, shapes, dtypes and plain values.

    The first time, calls of a form are made separately and merged. Where the outputs differ by more than rounding, or the
    merged call raises, a warning is logged and calls of that form stay separate.
    """

    def __init__(self, network: Network):
        super().__init__(network)
        self._mergeable: OrderedDict[str, bool] = OrderedDict()
        self._joiner = _Joiner()

    def forward(self, calls: Sequence[Arguments]) -> Outputs:
        outputs: Outputs = [None] * len(calls)
        for indices in _by_form(calls):
            for index, output in zip(indices, self._outputs([calls[i] for i in indices]), strict=True):
                outputs[index] = output
        return outputs

    def _outputs(self, calls: list[Arguments]) -> Outputs:
        if len(calls) == 1:
            return super().forward(calls)
        form = repr(_form(calls[0]))
        if form not in self._mergeable:
            return self._compare(form, calls)
        return self._merge(calls) if self._mergeable[form] else super().forward(calls)

    def _merge(self, calls: list[Arguments]) -> Outputs:
        rows = _rows(calls[0])
        joined = {name: self._joiner.join(name, [call[name] for call in calls], rows) for name in calls[0]}
        return _split(self.call(joined), len(calls), rows)

    def _compare(self, form: str, calls: list[Arguments]) -> Outputs:
        """The outputs of separate calls, after recording whether a merged call gives the same."""
        separate = super().forward(calls)
        try:
            reason = _difference(self._merge(calls), separate)
        except torch.OutOfMemoryError:
            raise
        except (_CannotMerge, RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            logger.warning("calls of %s stay separate, since a merged call fails: %s", type(self.network).__name__, reason)
        self._mergeable[form] = not reason
        if len(self._mergeable) > REMEMBERED:
            self._mergeable.popitem(last=False)
        return separate


class _Joiner:
    """Joins one argument of several calls. The bytes of shared tensors are read once, not at every step."""

    def __init__(self) -> None:
        self._bytes = WeakTensorKeyDictionary()

    def join(self, name: str, values: Outputs, rows: int) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return self._tensors(name, values, rows)
        if isinstance(first, list) and len(first) == rows and name not in SHARED:
            return [row for value in values for row in value]
        if isinstance(first, (list, tuple)):
            return type(first)(self.join(name, list(entries), rows) for entries in zip(*values, strict=True))
        if isinstance(first, Mapping):
            return {key: self.join(key, [value[key] for value in values], rows) for key in first}
        return first  # a plain value, which is part of the form and so equal

    def _tensors(self, name: str, values: list[Tensor], rows: int) -> Tensor:
        dimension = BATCH_DIMENSION.get(name, 0)
        shape = values[0].shape
        if shape == () or (shape == (1,) and rows > 1):  # one time for all rows of a call
            return torch.cat([value.expand(rows) for value in values])
        if name not in SHARED and len(shape) > dimension and shape[dimension] == rows:
            return torch.cat(values, dimension)
        if any(self._read(value) != self._read(values[0]) for value in values[1:]):
            raise _CannotMerge(f"{name} {list(shape)} has no batch dimension of {rows} and differs from call to call")
        return values[0]

    def _read(self, tensor: Tensor) -> bytes:
        version = None if tensor.is_inference() else tensor._version
        known = self._bytes.get(tensor)
        if known is None or version is None or known[0] != version:
            known = version, tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            self._bytes[tensor] = known
        return known[1]


def _by_form(calls: Sequence[Arguments]) -> list[list[int]]:
    """The indices of the calls, grouped by form."""
    groups: list[tuple[object, list[int]]] = []
    for index, call in enumerate(calls):
        form = _form(call)
        indices = next((indices for other, indices in groups if (other == form) is True), None)
        if indices is None:
            groups.append((form, indices := []))
        indices.append(index)
    return [indices for _, indices in groups]


def _form(value: object) -> object:
    return tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype, tensor.device), value)


def _rows(arguments: Arguments) -> int:
    """The number of rows of a call: the length of the first argument that is a tensor or a list."""
    first = next((v for v in arguments.values() if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim)), None)
    if first is None:
        raise _CannotMerge("no argument has rows")
    return len(first)


def _split(output: object, calls: int, rows: int) -> Outputs:
    """The output of a merged call, as one output for each call."""
    if isinstance(output, Tensor) or (isinstance(output, list) and len(output) == calls * rows):
        if len(output) != calls * rows:
            raise _CannotMerge(f"the output for {calls * rows} rows has {len(output)}")
        return [output[i * rows : (i + 1) * rows] for i in range(calls)]
    if isinstance(output, (list, tuple)) and output:
        return [type(output)(parts) for parts in zip(*(_split(entry, calls, rows) for entry in output), strict=True)]
    if isinstance(output, Mapping):  # an output object of diffusers
        parts = {key: _split(entry, calls, rows) for key, entry in output.items()}
        return [type(output)(**{key: part[i] for key, part in parts.items()}) for i in range(calls)]
    return [output] * calls


def _difference(merged: Outputs, separate: Outputs) -> str:
    """A description of the difference between these outputs, or "" where it is rounding."""
    pairs = zip(_tensors(merged), _tensors(separate), strict=True)
    for ours, reference in pairs:
        error = ((ours.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)).item()
        if not error <= TOLERANCE.get(reference.dtype, HALF_TOLERANCE):
            return f"the output of {len(separate)} merged calls is off by {error:.2g}"
    return ""


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
