"""A VAE on any number of devices, in one process: one copy and one thread each.

    stream.vae = shard_vae(stream.vae, devices="all")

By row, `decode` and `encode` give each device a contiguous share of the batch and put the results together in order: the
same bits as one device that works through the same sub-batches. By frame, `submit` returns at once and frames go round the
devices. Knows what a VAE's interface is; no family, no stream. Copies do not record gradients and see no autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.models.codec import Codec
from streamflow.parallel.plan import chunks, shares, shares_by
from streamflow.parallel.pool import Pending, Pool
from streamflow.parallel.replicas import Devices, replicate, resolve_device, resolve_devices
from streamflow.parallel.trees import joined, rows_of

BALANCES = ("equal", "measured")
STAY = "decoder"


@dataclass(frozen=True)
class Settings:
    """output_device: where frames go; "decoder": they stay on the device that decoded them. Batches are put together there,
        or by default on the input's device.
    balance: "equal" shares, so that the same input gives the same bits; "measured": shares by each device's measured speed,
        for unequal devices. That gives up bit equality, since libraries choose other kernels for other batch sizes.
    batch: the most rows that a device takes at once; None: its whole share.
    depth: how many jobs may wait for a device, and how many may be unfinished on a GPU."""

    output_device: str | int | torch.device = STAY
    balance: str = "equal"
    batch: int | None = None
    depth: int = 2

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise ValueError(f"unknown balance {self.balance!r}: choose one of {', '.join(map(repr, BALANCES))}")
        for name, value in (("batch", 1 if self.batch is None else self.batch), ("depth", self.depth)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of 1 or more, not {value!r}")
        if self.output_device != STAY:
            object.__setattr__(self, "output_device", resolve_device(self.output_device))

    @property
    def target(self) -> torch.device | None:
        """The device asked for; None: none was."""
        return None if self.output_device == STAY else self.output_device


def by_row(pool: Pool, settings: Settings, calls: Sequence[Callable], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """`call(*args, **kwargs)` with the batch of the first argument, a tensor, spread over the workers; results in order.
    Tensors with as many rows are spread with it, all else goes to every device.

    Raises:
        TypeError, ValueError: the first argument is no tensor, or has no rows. DecodeError: all devices failed.
    """
    if not args or not isinstance(args[0], Tensor) or not args[0].dim():
        raise TypeError("the first argument must be a tensor whose first dimension is the batch")
    if not (n := len(args[0])):
        raise ValueError(f"the batch is empty, {list(args[0].shape)}: there is nothing to do")
    target = settings.target or args[0].device
    workers = pool.alive
    pieces = [list(chunks(share, settings.batch)) for share in _shares(pool, settings, workers, n)]
    pending: list[tuple[int, Pending]] = []
    for turn in zip_longest(*pieces):  # the devices' first pieces, then their second ones, so that none waits for another
        for worker, rows in zip(workers, turn, strict=True):
            if rows is not None:
                given = rows_of((args, dict(kwargs)), rows, n)
                pending.append((rows.start, pool.submit(calls, *given, len(rows), target, worker)))
    return joined([result.result() for _, result in sorted(pending, key=lambda one: one[0])])


def _shares(pool: Pool, settings: Settings, workers: Sequence[int], n: int) -> tuple[range, ...]:
    seconds = [pool.seconds_per_row[i] for i in workers]
    if settings.balance == "equal" or not all(seconds):
        return shares(n, len(workers))
    return shares_by(n, [1 / s for s in seconds])


class Sharded(nn.Module):
    """One module a worker of a pool, tensors in, tensors out, such as a codec's decoder on every device. Called, it spreads
    the batch; `submit` gives one whole call to one of them."""

    def __init__(self, pool: Pool, settings: Settings, modules: Sequence[nn.Module]):
        super().__init__()
        self.pool, self.settings, self.replicas = pool, settings, tuple(modules)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Each module's device."""
        return self.pool.devices

    @property
    def lanes(self) -> int:
        """How many calls can be under way at once, one a device that works."""
        return len(self.pool.alive)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return by_row(self.pool, self.settings, self.replicas, args, kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Pending:
        """Give this call to the next device in turn, and return at once unless every queue is full."""
        rows = len(args[0])
        if not rows:
            raise ValueError(f"the batch is empty, {list(args[0].shape)}: there is nothing to do")
        return self.pool.submit(self.replicas, args, kwargs, rows, self.settings.target)

    def over(self, modules: Sequence[nn.Module]) -> Sharded:
        """These modules on the same workers, such as accelerated ones."""
        return Sharded(self.pool, self.settings, modules)

    def inputs_of(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What one device is given when the whole is called with these: its rows, there; with fewer rows than devices the
        first device's, so that every copy can be started."""
        n = len(next(iter(inputs.values())))
        cut = shares(n, len(self.replicas))
        rows = next(chunks(cut[index] or cut[0], self.settings.batch))
        return {name: value.to(self.devices[index]) for name, value in rows_of(dict(inputs), rows, n).items()}

    def start(self, index: int, args: Sequence[Any]) -> None:
        """Call one of the modules in its own thread and wait until it has run, as what compiles or captures needs."""
        self.pool.submit(self.replicas, tuple(args), None, len(args[0]), torch.device("cpu"), index).result()


class ShardedVAE(nn.Module):
    """In the place of a VAE: its config, dtype, outputs and switches, on several devices. Made by `shard_vae`.

    Attributes that it does not have are the first copy's; setting one of those, and calling an `enable_`, `disable_`,
    `set_`, `fuse_` or `unfuse_` method, acts on every copy. The VAE that it was made of is not touched, nor used again.
    """

    def __init__(self, vae: nn.Module, devices: Devices = "all", settings: Settings | None = None):
        super().__init__()
        if isinstance(vae, ShardedVAE):
            raise TypeError(f"this VAE is sharded already, over {', '.join(map(str, vae.devices))}: pass the plain one")
        home = _device_of(vae)
        chosen = resolve_devices(devices, home)
        self._own(device=home, settings=settings or Settings(), replicas=replicate(vae, chosen))
        self._own(pool=Pool(chosen, self.settings.depth))
        pictures = [partial(_sample, one) for one in self.replicas]
        self._own(_pictures=Sharded(self.pool, self.settings, pictures))

    def _own(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    # -- work ---------------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the VAE's own `decode` gives for latents `[N, ...]`, any N of 1 or more, its rows decoded side by side."""
        return by_row(self.pool, self.settings, [one.decode for one in self.replicas], (z, *args), kwargs)

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the VAE's own `encode` gives for pictures `[N, ...]`."""
        return by_row(self.pool, self.settings, [one.encode for one in self.replicas], (x, *args), kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's own `forward`, by row."""
        return by_row(self.pool, self.settings, self.replicas, args, kwargs)

    def submit(self, latents: Tensor) -> Pending:
        """Decode these latents `[n, ...]` on the next device in turn; the result is the pictures' tensor."""
        return self._pictures.submit(latents)

    @property
    def lanes(self) -> int:
        """How many decodes can be under way at once."""
        return len(self.pool.alive)

    def codec_of(self, make: Callable[[nn.Module], Codec]) -> Codec:
        """A codec whose decoder and encoder are on every device, each made by `make` of that device's VAE."""
        codecs = [make(one) for one in self.replicas]
        modules = ([codec.decoder for codec in codecs], [codec.encoder for codec in codecs])
        return Codec.of(*(Sharded(self.pool, self.settings, one) for one in modules))

    # -- devices ------------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that work, repeated ones repeated."""
        return tuple(self.pool.devices[i] for i in self.pool.alive)

    @property
    def dropped(self) -> dict[str, str]:
        """The devices that failed, and why."""
        return self.pool.dropped

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.replicas[0].dtype

    def close(self) -> None:
        """Finish what is queued and end the threads; also at the end of `with shard_vae(...)`, or when it is let go."""
        self.pool.close()

    def __enter__(self) -> ShardedVAE:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- as one module ------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        copies = self.__dict__.get("replicas")
        if copies is None or name.startswith("__"):
            raise AttributeError(name)
        value = getattr(copies[0], name)
        return partial(_on_all, copies, name) if callable(value) and name.startswith(_SWITCHES) else value

    def __setattr__(self, name: str, value: Any) -> None:
        copies = self.__dict__.get("replicas", ())
        if name in self.__dict__ or not copies or not hasattr(copies[0], name):
            super().__setattr__(name, value)
            return
        for one in copies:
            setattr(one, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedVAE:
        """Behind `to`, `half`, `cuda` and their kin: a dtype goes to every copy; a device is refused."""
        probe = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        if probe.device != self.device:
            raise ValueError(f"a sharded VAE stays on {', '.join(map(str, self.devices))}: shard_vae(vae, devices) again")
        for one in self.replicas:
            one.to(dtype=probe.dtype)
        return self

    def train(self, mode: bool = True) -> ShardedVAE:
        """Every copy's mode."""
        super().train(mode)
        _on_all(self.replicas, "train", mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ShardedVAE:
        """Every copy's weights."""
        _on_all(self.replicas, "requires_grad_", requires_grad)
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The first copy's."""
        return self.replicas[0].named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """The first copy's."""
        return self.replicas[0].named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The first copy's."""
        return self.replicas[0].state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into every copy."""
        return _on_all(self.replicas, "load_state_dict", *args, **kwargs)


_SWITCHES = ("enable_", "disable_", "set_", "fuse_", "unfuse_")


def _on_all(modules: Sequence[nn.Module], name: str, *args: Any, **kwargs: Any) -> Any:
    return [getattr(one, name)(*args, **kwargs) for one in modules][0]


def _sample(vae: nn.Module, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def _device_of(vae: nn.Module) -> torch.device:
    tensor = next(chain(vae.parameters(), vae.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def shard_vae(vae: nn.Module, devices: Devices = "all", **settings: Any) -> ShardedVAE:
    """The VAE on these devices, to be used in its place.

    devices: "all" (every GPU, or the VAE's own device where there is none), or a list such as `["cuda:0", "cuda:1", "cpu"]`,
        in which a device may come several times. Each gets a copy of its own.
    settings: `output_device`, `balance`, `batch`, `depth` (see `Settings`).

    Raises:
        TypeError, ValueError: a device or a setting that cannot be. MemoryError: a device has no room, with the numbers.
    """
    return ShardedVAE(vae, devices, Settings(**settings))
