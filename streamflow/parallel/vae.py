"""A VAE on any number of devices, in one process: one copy and one thread each.

    stream.vae = shard_vae(stream.vae, devices="all")

By row, `decode` and `encode` give each device a contiguous share of the batch and join the results in order, with the bits
of one device that computes the same shares. By frame, `submit` returns at once, and frames go to the devices in turn. The
copies record no gradients and use no autocast. Knows the interface of a VAE; no family, no stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamflow._validation import whole_number
from streamflow.models.codec import Codec
from streamflow.models.protocols import VAE, Function
from streamflow.parallel.plan import chunks, shares, shares_by
from streamflow.parallel.pool import Pending, Pool
from streamflow.parallel.replicas import Devices, replicate, resolve_device, resolve_devices
from streamflow.parallel.trees import batch_size, join_rows, take_rows

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments

KEEP = "decoder"  # of `Settings.output_device`


@dataclass(frozen=True)
class Settings:
    """How a `ShardedVAE` works.

    Args:
        output_device: where results are put. "decoder": frames stay on the device that decoded them, and batches are joined
            on the input's device.
        balance: "equal": equal shares, so that the same input gives the same bits. "measured": shares by the measured speed
            of each device, for unequal devices; results then differ by rounding.
        batch: the most rows that a device computes at once; None: its whole share.
        depth: how many jobs may wait for a device, and how many may be unfinished on a GPU.

    Raises:
        ValueError: one of them is out of its range.
    """

    output_device: str | int | torch.device = KEEP
    balance: str = "equal"
    batch: int | None = None
    depth: int = 2

    def __post_init__(self) -> None:
        if self.balance not in ("equal", "measured"):
            raise ValueError(f"unknown balance {self.balance!r}: choose one of 'equal', 'measured'")
        for name, value in (("batch", 1 if self.batch is None else self.batch), ("depth", self.depth)):
            whole_number(name, value, 1)
        if self.output_device != KEEP:
            object.__setattr__(self, "output_device", resolve_device(self.output_device))

    @property
    def target(self) -> torch.device | None:
        """The device of `output_device`; None for "decoder"."""
        return self.output_device if isinstance(self.output_device, torch.device) else None


def by_row(pool: Pool, settings: Settings, calls: Sequence[Callable], args: tuple, kwargs: Arguments) -> Any:
    """The result of a call whose first argument is a batch, with the rows shared by the workers. Tensors with as many rows
    are shared with it; all else goes to every worker. calls: one for each worker.

    Raises:
        TypeError, ValueError: the first argument is no tensor, or has no rows. DecodeError: all devices failed.
    """
    n, workers = batch_size(args), pool.alive
    target = settings.target or args[0].device
    seconds = [one for i in workers if (one := pool.seconds_per_row[i])]
    measured = settings.balance == "measured" and len(seconds) == len(workers)
    cut = shares_by(n, [1 / s for s in seconds]) if measured else shares(n, len(workers))
    pending: dict[int, Pending] = {}
    # The first piece of every device, then the second ones, so that no device waits.
    for turn in zip_longest(*(chunks(share, settings.batch) for share in cut)):
        for worker, rows in zip(workers, turn, strict=True):
            if rows is not None:
                own_args, own_kwargs = take_rows((args, dict(kwargs)), rows, n)
                pending[rows.start] = pool.submit(calls, own_args, own_kwargs, len(rows), target, worker)
    return join_rows([pending[start].result() for start in sorted(pending)])


class Sharded(nn.Module):
    """One module for each worker of a pool, such as a codec's decoder on every device. A call shares its rows; `submit`
    gives a whole call to one worker."""

    def __init__(self, pool: Pool, settings: Settings, modules: Sequence[Function]):
        super().__init__()
        self.pool, self.settings, self.replicas = pool, settings, tuple(modules)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The device of each module."""
        return self.pool.devices

    @property
    def lanes(self) -> int:
        """How many calls are computed at once: one for each device that works."""
        return len(self.pool.alive)

    def forward(self, *args: object, **kwargs: object) -> Any:
        return by_row(self.pool, self.settings, self.replicas, args, kwargs)

    def submit(self, *args: object, **kwargs: object) -> Pending:
        """Give this call to the next device in turn. Returns at once, unless every queue is full."""
        return self.pool.submit(self.replicas, args, kwargs, batch_size(args), self.settings.target)

    def with_replicas(self, modules: Sequence[nn.Module]) -> Sharded:
        """These modules on the same workers, such as accelerated copies."""
        return Sharded(self.pool, self.settings, modules)

    def inputs_of(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of one device, on it, for a call with these inputs. A device without rows gets those of the first one,
        so that every copy can be compiled."""
        n = len(next(iter(inputs.values())))
        cut = shares(n, len(self.replicas))
        rows = next(chunks(cut[index] or cut[0], self.settings.batch))
        return {name: value.to(self.devices[index]) for name, value in take_rows(dict(inputs), rows, n).items()}

    def start(self, inputs: Mapping[str, Tensor]) -> None:
        """Call every module once in the thread of its device, for modules that compile or capture."""
        for index in range(len(self.replicas)):
            args = tuple(self.inputs_of(index, inputs).values())
            self.pool.submit(self.replicas, args, None, len(args[0]), torch.device("cpu"), index).result()


class ShardedVAE(nn.Module):
    """Used in the place of a VAE, with its config, dtype and outputs, on several devices. Made by `shard_vae`.

    Other attributes, the parameters, buffers and state are those of the first copy. Setting an attribute, loading a state,
    and calling a method whose name starts with `enable_`, `disable_`, `set_`, `fuse_` or `unfuse_`, acts on every copy. The
    VAE that was passed is copied and stays as it is.
    """

    def __init__(self, vae: VAE, devices: Devices = "all", settings: Settings | None = None):
        super().__init__()
        if isinstance(vae, ShardedVAE):
            raise TypeError(f"this VAE is sharded already, over {', '.join(map(str, vae.devices))}: pass the plain VAE")
        home = next((t.device for t in chain(vae.parameters(), vae.buffers())), torch.device("cpu"))
        chosen = resolve_devices(devices, home)
        self._own(device=home, settings=settings or Settings(), replicas=replicate(vae, chosen))
        self._own(pool=Pool(chosen, self.settings.depth))
        self._own(_images=Sharded(self.pool, self.settings, [partial(decode_images, one) for one in self.replicas]))

    def _own(self, **attributes: object) -> None:
        self.__dict__.update(attributes)

    def decode(self, z: Tensor, *args: object, **kwargs: object) -> Any:
        """As the VAE's own `decode`, for latents `[N, ...]`, N >= 1, whose rows the devices share."""
        return by_row(self.pool, self.settings, [one.decode for one in self.replicas], (z, *args), kwargs)

    def encode(self, x: Tensor, *args: object, **kwargs: object) -> Any:
        """As the VAE's own `encode`, for images `[N, ...]`, N >= 1, whose rows the devices share."""
        return by_row(self.pool, self.settings, [one.encode for one in self.replicas], (x, *args), kwargs)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """As the VAE's own `forward`, by row."""
        return by_row(self.pool, self.settings, self.replicas, args, kwargs)

    def submit(self, latents: Tensor) -> Pending:
        """Decode these latents `[n, ...]` on the next device in turn. The result is the tensor of images."""
        return self._images.submit(latents)

    @property
    def lanes(self) -> int:
        """How many decodes are computed at once: one for each device that works."""
        return self._images.lanes

    def codec_of(self, make: Callable[[nn.Module], Codec]) -> Codec:
        """A codec whose decoder and encoder are on every device. make: gives a device's codec for its copy of the VAE."""
        codecs = [make(one) for one in self.replicas]
        modules = ([codec.decoder for codec in codecs], [codec.encoder for codec in codecs])
        return Codec.of(*(Sharded(self.pool, self.settings, one) for one in modules))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that work, each as often as it has copies."""
        return tuple(self.pool.devices[i] for i in self.pool.alive)

    @property
    def dropped(self) -> dict[str, str]:
        """The devices that failed, with the error of each."""
        return self.pool.dropped

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.replicas[0].dtype

    def close(self) -> None:
        """Finish the queued jobs and end the threads, as at the end of `with shard_vae(...)`, or when this is deleted."""
        self.pool.close()

    def __enter__(self) -> ShardedVAE:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call_all(self, name: str, *args: object, **kwargs: object) -> Any:
        return [getattr(one, name)(*args, **kwargs) for one in self.replicas][0]

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        return self.replicas[0].named_parameters(*args, **kwargs)

    def named_buffers(self, *args: object, **kwargs: object) -> Iterator[tuple[str, Tensor]]:
        return self.replicas[0].named_buffers(*args, **kwargs)

    def state_dict(self, *args: object, **kwargs: object) -> Any:
        return self.replicas[0].state_dict(*args, **kwargs)

    def load_state_dict(self, *args: object, **kwargs: object) -> Any:
        return self._call_all("load_state_dict", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        copies = self.__dict__.get("replicas")
        if copies is None or name.startswith("__"):
            raise AttributeError(name)
        value = getattr(copies[0], name)
        return partial(self._call_all, name) if callable(value) and name.startswith(_SETTERS) else value

    def __setattr__(self, name: str, value: Any) -> None:
        copies = self.__dict__.get("replicas", ())
        if name in self.__dict__ or not copies or not hasattr(copies[0], name):
            super().__setattr__(name, value)
            return
        for one in copies:
            setattr(one, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedVAE:
        """Called by `to`, `half`, `cuda`: converts every copy to a dtype, and refuses another device."""
        probe = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        if probe.device != self.device:
            raise ValueError(f"a sharded VAE stays on {', '.join(map(str, self.devices))}: use shard_vae(vae, devices)")
        self._call_all("to", dtype=probe.dtype)
        return self

    def train(self, mode: bool = True) -> ShardedVAE:
        """Set the mode of every copy."""
        super().train(mode)
        self._call_all("train", mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ShardedVAE:
        """Set it for the weights of every copy."""
        self._call_all("requires_grad_", requires_grad)
        return self


_SETTERS = ("enable_", "disable_", "set_", "fuse_", "unfuse_")


def decode_images(vae: VAE | ShardedVAE, latents: Tensor) -> Tensor:
    """The tensor of images that `vae.decode` gives for these latents."""
    return vae.decode(latents, return_dict=False)[0]


def shard_vae(vae: VAE, devices: Devices = "all", **settings: Any) -> ShardedVAE:
    """Copy a VAE to these devices. Use the result in its place.

    Args:
        vae: a diffusers VAE.
        devices: "all" (every GPU, or the VAE's own device where there is none), or a list such as `["cuda:0", "cuda:1",
            "cpu"]`. A device may occur several times, and gets a copy each time.
        settings: `output_device`, `balance`, `batch`, `depth` (see `Settings`).

    Raises:
        TypeError, ValueError: a device is unknown or missing, a setting is out of range, or the VAE is sharded or offloaded.
        MemoryError: a device has too little free memory for the weights, with the numbers.
    """
    return ShardedVAE(vae, devices, Settings(**settings))
