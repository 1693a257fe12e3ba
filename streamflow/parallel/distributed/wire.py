"""Messages between two ranks: a header of fixed size that says what comes, then tensors as bytes. Knows point-to-point
operations of torch.distributed; knows no module and no picture.

Headers always go over gloo, so a peer that is gone is an error of the next message at the latest: at once where its process
ended, within the group's timeout where its machine is silent. Tensors go over gloo too, or over NCCL between two GPUs. An
NCCL operation cannot be given up once it waits on the GPU, so both sides first agree over gloo that the other one is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
TENSORS, DIMENSIONS, NAME = 16, 8, 48  # the most tensors a message, dimensions a tensor, bytes a name
RECORD = 3 + DIMENSIONS + NAME // 8
HEADER = 3 + TENSORS * RECORD
LARGEST = 2**32  # bytes of all tensors of a message
SPAN = 2**48  # product of a tensor's sizes, each 0 counted as 1: strides of an empty tensor stay far from overflow


class Op(IntEnum):
    """What a message asks or answers."""

    CALL = 1
    PING = 2
    STOP = 3
    DONE = 4
    FAILED = 5


class Unsendable(ValueError):
    """A message that a header cannot say; nothing of it was sent."""


class RankLost(RuntimeError):
    """Another rank is gone, or did not answer in time."""


@dataclass(frozen=True, eq=False)
class Argument:
    """One tensor. `name`: "" where it is passed by position. `kept`: it does not travel, since the receiver still has what
    came last under this name; its shape and dtype are not told then, and the receiver finds `tensor` None."""

    tensor: Tensor | None
    name: str = ""
    kept: bool = False


@dataclass(frozen=True, eq=False)
class Message:
    """`part`: the number of the module that is meant."""

    op: Op
    part: int = 0
    arguments: tuple[Argument, ...] = ()

    @classmethod
    def failed(cls, text: str) -> Message:
        """The answer to a call that raised. What UTF-8 cannot say, a lone surrogate, is sent as `\\udc80`."""
        data = text.encode(errors="backslashreplace")
        return cls(Op.FAILED, arguments=(Argument(torch.tensor(list(data), dtype=torch.uint8)),))

    @property
    def text(self) -> str:
        """What `failed` was told."""
        return bytes(self.arguments[0].tensor.tolist()).decode()


def header(message: Message) -> Tensor:
    """The message but for its tensors' values, int64 `[HEADER]`.

    Raises:
        Unsendable: more or larger than a header can say, or more than `LARGEST` bytes of tensors.
    """
    if len(message.arguments) > TENSORS:
        raise Unsendable(f"a message carries {TENSORS} tensors at most, not {len(message.arguments)}")
    if (size := sum(a.tensor.nbytes for a in message.arguments if not a.kept)) > LARGEST:
        raise Unsendable(f"a message carries {LARGEST:,} bytes of tensors at most, not {size:,}")
    records = [number for argument in message.arguments for number in _record(argument)]
    numbers = [message.op, message.part, len(message.arguments), *records]
    return torch.tensor(numbers + [0] * (HEADER - len(numbers)), dtype=torch.int64)


def _span(shape: Sequence[int]) -> int:
    return math.prod(max(size, 1) for size in shape)


def _record(argument: Argument) -> list[int]:
    name = argument.name.encode()
    if len(name) > NAME:
        raise Unsendable(f"a name has {NAME} bytes at most: {argument.name!r}")
    name = name.ljust(NAME, b"\0")
    words = [int.from_bytes(name[i : i + 8], "little", signed=True) for i in range(0, NAME, 8)]
    if argument.kept:
        return [1, 0, 0, *[0] * DIMENSIONS, *words]
    tensor = argument.tensor
    if tensor.dtype not in DTYPES or tensor.dim() > DIMENSIONS:
        raise Unsendable(f"a {tensor.dtype} tensor of shape {list(tensor.shape)} does not travel between ranks")
    if _span(tensor.shape) > SPAN:
        raise Unsendable(f"an empty tensor of shape {list(tensor.shape)} is too large to travel between ranks")
    shape = [*tensor.shape, *[0] * (DIMENSIONS - tensor.dim())]
    return [0, DTYPES.index(tensor.dtype), tensor.dim(), *shape, *words]


def read_header(numbers: Tensor, device: torch.device) -> Message:
    """The message of a header, its tensors allocated on the device and not filled yet.

    ValueError: a number that `header` does not write; nothing has been allocated then.
    """
    if numbers.shape != (HEADER,) or numbers.dtype != torch.int64:
        raise ValueError(f"a header is int64 [{HEADER}], not {numbers.dtype} {list(numbers.shape)}")
    op, part, count, *rest = numbers.tolist()
    _check("the number of tensors", count, TENSORS)
    _check("the number of a module", part, 2**31)
    plans = [_Plan.read(rest[i * RECORD : (i + 1) * RECORD]) for i in range(count)]
    if (size := sum(plan.bytes for plan in plans)) > LARGEST:
        raise ValueError(f"a header announces {size:,} bytes of tensors, and {LARGEST:,} are the most")
    return Message(Op(op), part, tuple(plan.argument(device) for plan in plans))


def _check(what: str, number: int, most: int) -> None:
    if not 0 <= number <= most:
        raise ValueError(f"a header says that {what} is {number}: it is from 0 to {most}")


@dataclass(frozen=True)
class _Plan:
    """An argument as its record describes it, checked, before its tensor is allocated."""

    name: str
    kept: bool
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def read(cls, record: Sequence[int]) -> _Plan:
        kept, dtype, dimensions, *rest = record
        _check("a mark of a kept tensor", kept, 1)
        _check("a dtype", dtype, len(DTYPES) - 1)
        _check("the number of dimensions", dimensions, DIMENSIONS)
        for size in rest[:dimensions]:
            _check("a size", size, SPAN)
        _check("the product of a tensor's sizes", _span(rest[:dimensions]), SPAN)
        name = b"".join(word.to_bytes(8, "little", signed=True) for word in rest[DIMENSIONS:]).rstrip(b"\0").decode()
        return cls(name, bool(kept), DTYPES[dtype], tuple(rest[:dimensions]))

    @property
    def bytes(self) -> int:
        return 0 if self.kept else math.prod(self.shape) * self.dtype.itemsize

    def argument(self, device: torch.device) -> Argument:
        tensor = None if self.kept else torch.empty(self.shape, dtype=self.dtype, device=device)
        return Argument(tensor, self.name, self.kept)


class Link:
    """This rank's end of the way to one other rank. `group` holds the two of them and nobody else, so that a failure of one
    pair leaves the others alone. `wire`: the device from which tensors travel, the CPU, or a GPU by NCCL. `device`: where
    tensors come from and where they are put.

    One message at a time: a thread owns a link. Every method raises `RankLost` where the other rank is gone or silent.
    """

    def __init__(self, group: dist.ProcessGroup, other: int, wire: torch.device, device: torch.device):
        self.group, self.other, self.wire, self.device = group, other, wire, device

    def send(self, message: Message) -> None:
        """Send all of a message; returns when the tensors may be changed again."""
        self._send(header(message))
        travelling = [a.tensor.to(self.wire).contiguous() for a in message.arguments if not a.kept]
        if self._agrees(travelling):
            self._receive(torch.empty(1, dtype=torch.int64))
        for tensor in travelling:
            self._send(tensor)
        self._finish()

    def receive(self) -> Message:
        """Wait for the next message."""
        numbers = torch.empty(HEADER, dtype=torch.int64)
        self._receive(numbers)
        message = read_header(numbers, self.wire)
        travelling = [a.tensor for a in message.arguments if not a.kept]
        if self._agrees(travelling):
            self._send(torch.zeros(1, dtype=torch.int64))
        for tensor in travelling:
            self._receive(tensor)
        arguments = tuple(a if a.kept else Argument(a.tensor.to(self.device), a.name) for a in message.arguments)
        self._finish()
        return Message(message.op, message.part, arguments)

    def ask(self, message: Message) -> Message:
        """Send a message and wait for its answer."""
        self.send(message)
        return self.receive()

    def abandon(self) -> None:
        """Give up what waits in this link's NCCL communicator, if it has one; the link cannot be used again."""
        if self.wire.type == "cuda":
            self.group.abort()

    def _agrees(self, tensors: Sequence[Tensor]) -> bool:
        return self.wire.type == "cuda" and any(tensor.numel() for tensor in tensors)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _send(self, tensor: Tensor) -> None:
        self._transfer(dist.send, tensor)

    def _receive(self, tensor: Tensor) -> None:
        self._transfer(dist.recv, tensor)

    def _transfer(self, transfer: object, tensor: Tensor) -> None:
        """As bytes, so that every dtype travels by every backend."""
        if not tensor.numel():
            return
        try:
            transfer(tensor.reshape(-1).view(torch.uint8), self.other, group=self.group)
        except RuntimeError as error:  # what gloo and NCCL raise, and the parent of torch's own
            raise RankLost(str(error).strip().splitlines()[0]) from error
