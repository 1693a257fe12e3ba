"""The range of an image's values: a mark on tensors that are in [-1, 1], and checks that values are in their range, at once
on the host and later on a GPU. Knows tensors; no image formats, no stream."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Check = Callable[[Tensor, float, float], None]
"""`check(image, low, high)`: raise ValueError, now or later, unless the values of `image` are in [low, high]."""

# Functions and methods that move or select values and compute none, by name.
_KEEPING = frozenset(
    "to cpu cuda type type_as float half bfloat16 double data pin_memory clone detach contiguous __getitem__ unsqueeze "
    "squeeze unbind split tensor_split split_with_sizes chunk hsplit vsplit dsplit view view_as reshape reshape_as flatten "
    "ravel unflatten narrow select index_select take gather masked_select expand expand_as broadcast_to permute transpose "
    "swapaxes swapdims movedim moveaxis T mT adjoint t repeat tile repeat_interleave roll flip fliplr flipud rot90 "
    "diagonal unfold as_strided alias "
    "requires_grad_ share_memory_ detach_ squeeze_ unsqueeze_ transpose_ swapaxes_ swapdims_ t_".split()
)
_JOINING = frozenset("cat concat concatenate stack hstack vstack dstack column_stack row_stack".split())
_SEVERAL = frozenset("atleast_1d atleast_2d atleast_3d".split())  # of one tensor or several, each by itself
_COPYING = {"copy_": 1, "__setitem__": 2}  # which argument holds the values that go into the first one
# Functions that write into their first argument; those whose names end in one underscore do so, too.
_WRITING = frozenset("__setitem__ __iadd__ __isub__ __imul__ __itruediv__ data= real=".split())


class Normalized(Tensor):
    """A tensor that is known to hold images in [-1, 1]. Whatever moves, selects or joins its values keeps the mark; whatever
    computes a new value drops it, from the tensor itself where that, or a view of it, is written into. Joining it with an
    unmarked tensor raises ValueError. Ask `is_marked`, since a write through a view leaves the class as it is. What is
    written through `.numpy()` or `.data` is not seen."""

    _stamp: int  # torch's count of writes into this memory when the mark was set

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        sources = _sources(name, args, kwargs)
        keeps = bool(sources) and is_marked(sources) and not _reinterprets(name, args, kwargs)
        if name in _JOINING and not keeps:
            raise ValueError(
                f"{name} of tensors that are marked as images in [-1, 1] with others, whose range is unknown: pass these "
                f"through stream.preprocess first, or drop the mark, image.as_subclass(torch.Tensor)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if keeps and name in _COPYING:
                sources[0]._stamp = _writes(sources[0])
                return result
            if keeps:
                return _mark(result)
            _unmark(kwargs.get("out"))
            if name in _WRITING or (name[-1:] == "_" and name[-2:] != "__"):
                _unmark(args[0])
            return result.as_subclass(Tensor) if type(result) is cls else result

    def __deepcopy__(self, memo: dict) -> Normalized:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.as_subclass(Tensor)
        return (mark, (plain,)) if is_marked(self) else plain.__reduce_ex__(protocol)


def mark(image: Tensor) -> Normalized:
    """The same tensor, marked as holding images in [-1, 1]."""
    marked = image.as_subclass(Normalized)
    marked._stamp = _writes(marked)
    return marked


torch.serialization.add_safe_globals([mark])  # `torch.load` makes marked tensors by it


def _writes(image: Tensor) -> int:
    """How often torch has written into this memory; of inference tensors it keeps no count."""
    with torch._C.DisableTorchFunctionSubclass():
        return 0 if image.is_inference() else image._version


def _name(func: Any) -> str:
    """The name of a function, or of the attribute that it reads; `attribute=` where it assigns that."""
    name = getattr(func, "__name__", "")
    if name not in ("__get__", "__set__"):
        return name
    return getattr(func.__self__, "__name__", "") + ("=" if name == "__set__" else "")


def _sources(name: str, args: tuple, kwargs: dict) -> Sequence[Any]:
    """Where the values of the result come from; nothing where it has computed them."""
    first = args[0] if args else kwargs.get("tensors", kwargs.get("input"))
    if name in _JOINING:
        return first if isinstance(first, (list, tuple)) else (first,)
    if name in _COPYING:
        return first, args[_COPYING[name]] if len(args) > _COPYING[name] else kwargs.get("src")
    if name in _SEVERAL:
        return first if isinstance(first, (list, tuple)) else args
    return (first,) if name in _KEEPING else ()


def _reinterprets(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether this reads the bits of values as another type."""
    return name == "view" and any(isinstance(one, torch.dtype) for one in (*args, *kwargs.values()))


def _mark(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return type(result)(_mark(part) for part in result)
    if not isinstance(result, Tensor) or type(result) is Normalized:
        return result
    return mark(result) if result.is_floating_point() else result


def _unmark(value: Any) -> None:
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if type(one) is Normalized:
            one.__class__ = Tensor


def is_marked(image: Any) -> bool:
    """Whether this is a marked tensor, or a list of nothing else."""
    parts = image if isinstance(image, (list, tuple)) and image else (image,)
    return all(type(one) is Normalized and one._stamp == _writes(one) for one in parts)


def marking(processor: Any, convert: Callable[[Any], Any]) -> Any:
    """A copy of a diffusers image processor whose `preprocess` marks what it makes and takes a marked tensor as it is.
    `convert` is what happens to any other image first."""

    def preprocess(image: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(image, (list, tuple)) and any(map(is_marked, image)) and not is_marked(image):
            return torch.cat([preprocess(one, *args, **kwargs) for one in image])
        if not is_marked(image):
            made = processor.preprocess(convert(image), *args, **kwargs)
            if not processor.config.do_normalize:
                return made
            if made.device.type == "cpu":
                _check_extremes(_extremes(made), -1.0, 1.0, "what the image processor made of this image", _GIVE_IT)
            return mark(made)
        parts = [one if one.ndim == 4 else one[None] for one in (image if isinstance(image, (list, tuple)) else [image])]
        image = torch.cat(parts)
        made = processor.preprocess((image / 2 + 0.5).clamp(0, 1), *args, **kwargs)
        return image if made.shape == image.shape else mark(made)

    twin = copy.copy(processor)
    vars(twin)["preprocess"] = preprocess
    return twin


# -- checks ---------------------------------------------------------------------------------------------------------------


def check_values(image: Tensor, low: float, high: float) -> None:
    """ValueError unless all values are finite and in [low, high]. On a GPU the host waits for the answer."""
    _check_extremes(_extremes(image), low, high, "the image")


def check_on_host(image: Tensor, low: float, high: float) -> None:
    """`check_values` of a tensor on the CPU; one that is elsewhere is not looked at."""
    if image.device.type == "cpu":
        check_values(image, low, high)


_GIVE_IT = "an image processor takes floats in [0, 1]: divide first, or call stream.preprocess(image)"
_STATE_IT = (
    "state what yours are in with StreamFlow(..., input_range=(low, high)); a tensor in [-1, 1] that stream.preprocess, "
    "stream.image_processor.preprocess or streamflow.image_utils.pil2tensor made is taken as it is, until something "
    "computes with it"
)


def _extremes(image: Tensor) -> list[float]:
    return torch.stack(image.as_subclass(Tensor).aminmax()).tolist()


def _check_extremes(extremes: Sequence[float], low: float, high: float, what: str, remedy: str = _STATE_IT) -> None:
    least, most = extremes
    slack = 1e-3 * (high - low)
    if low - slack <= least and most <= high + slack:
        return
    if not all(torch.isfinite(torch.tensor(extremes))):
        raise ValueError(f"{what} holds NaN or infinite values")
    found = f"run from {least:.4g} to {most:.4g}, outside of [{low:g}, {high:g}]"
    raise ValueError(f"the values of {what} {found}: {remedy}")


@dataclass(frozen=True)
class _Pending:
    """A check under way: the least and the greatest value, on the host once `event` has passed."""

    what: str
    low: float
    high: float
    extremes: Tensor
    event: torch.cuda.Event


class RangeChecks:
    """Checks of images that are on a GPU, without a wait: least and greatest value are computed on the device and copied
    beside the frame, and `raise_failed` looks at those that have arrived. Images on the CPU are checked at once."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def add(self, what: str, image: Tensor, low: float, high: float) -> None:
        """Check an image, `what` in the error's words. ValueError at once if it is on the CPU."""
        extremes = torch.stack(image.as_subclass(Tensor).aminmax()).float()
        if image.device.type != "cuda":
            return _check_extremes(extremes.tolist(), low, high, what)
        host = torch.empty(2, pin_memory=True).copy_(extremes, non_blocking=True)
        event = torch.cuda.current_stream(image.device).record_event()
        self._pending.append(_Pending(what, low, high, host, event))

    def raise_failed(self, wait: bool = False) -> None:
        """ValueError for the oldest image whose values have arrived and are out of range, once for each; `wait` for all."""
        while self._pending and (wait or self._pending[0].event.query()):
            one = self._pending.popleft()
            one.event.synchronize()
            _check_extremes(one.extremes.tolist(), one.low, one.high, one.what)

    def clear(self) -> None:
        """Forget all checks under way."""
        self._pending.clear()


class FiniteCheck:
    """Counts images that hold NaN or infinite values, without a wait: on a GPU they are counted on the device, and the
    number is read when it has arrived."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, images: Tensor) -> Tensor:
        """Count those of `images` `[n, ...]` that are not finite. Whether all are, a scalar on their device."""
        bad = (~torch.isfinite(images.as_subclass(Tensor))).flatten(1).any(1).sum()
        self._total = bad if self._total is None else self._total.to(bad.device) + bad
        self._count = self.count
        if self._arriving is None:
            self._send()
        return bad == 0

    def _send(self) -> None:
        if self._total.device.type != "cuda":
            self._count = int(self._total)
            return
        host = torch.empty((), dtype=self._total.dtype, pin_memory=True).copy_(self._total, non_blocking=True)
        self._arriving = host, torch.cuda.current_stream(self._total.device).record_event()

    @property
    def count(self) -> int:
        """How many there were, up to the images whose number has arrived."""
        if self._arriving is not None and self._arriving[1].query():
            self._count, self._arriving = int(self._arriving[0]), None
        return self._count
