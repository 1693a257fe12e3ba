"""Decodes the chunks of a video: at once, or on another device while the next chunk is drawn."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from streamflow.models import video_adapter_for
from streamflow.models.tiny_video import TinyVideoDecoder
from streamflow.models.video import Drawn, VideoAdapter
from streamflow.parallel.pool import DecodeError, Pool
from streamflow.parallel.replicas import Devices, replicate, resolve_devices
from streamflow.video.state import Begun, Decoded

if TYPE_CHECKING:
    from streamflow.acceleration.watch import WeightWatch


@dataclass(frozen=True, eq=False)
class Output:
    """What a chunk becomes. output_type: that of the stream. postprocess: takes the images that are decoded at once and
    returns those that are given. rescaled: whether it may return another number of them."""

    output_type: str
    postprocess: Callable[[Any], Any] | None = None
    rescaled: bool = False

    def decode(self, adapter: VideoAdapter, drawn: Drawn, memory: Any, frame: int | None) -> Decoded:
        """The images of a chunk, or of one of its latent frames. memory: what the chunk or the frame before has left.

        Raises:
            FloatingPointError: they hold NaN or infinite values. TypeError, ValueError: for what `postprocess` returns.
        """
        began = time.perf_counter()
        if self.output_type == "latent":
            return Decoded(None, drawn.history.memory, 0.0)
        images, left = adapter.decode(replace(drawn, history=replace(drawn.history, memory=memory)), frame)
        check_finite("images", images, drawn.history.chunks - 1)
        images = adapter.convert(images, self.output_type)
        if self.postprocess is not None:
            images = self._checked(self.postprocess(images), len(images))
        return Decoded(images, left.memory, time.perf_counter() - began)

    def _checked(self, images: Any, before: int) -> Any:
        if not hasattr(images, "__len__") or not hasattr(images, "__iter__"):
            raise TypeError(f"postprocess returns images, a list, an array or a tensor of them, not {images!r}")
        if len(images) == 0:
            raise ValueError(f"postprocess has returned no image for the {before} that it was given")
        if len(images) != before and not self.rescaled:
            raise ValueError(
                f"postprocess makes {len(images)} images of {before}: pass VideoStream(fps=...), the frames a second of "
                f"what it returns, from which frames have their times"
            )
        return images


def check_finite(kind: str, tensor: Tensor, chunk: int) -> None:
    """Raise FloatingPointError where a chunk holds values that are not finite."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(
            f"the {kind} of chunk {chunk} hold NaN or infinite values. The chunk was dropped, and the next call draws it "
            f"again: change the prompt, the guidance scale or the seed with update(), or the dtype of the pipe"
        )


def one_device(name: str, given: Devices) -> torch.device:
    """The device of a setting. TypeError, ValueError: it is no device, is missing, or is more than one."""
    found = resolve_devices(given, torch.device("cpu"))
    if len(found) != 1:
        raise ValueError(f"{name} is one device, not {given!r}")
    return found[0]


class Decoding(Protocol):
    """Where chunks are decoded. ahead: whether the next chunk is drawn meanwhile."""

    ahead: bool

    def prepare(self, adapter: VideoAdapter) -> VideoAdapter:
        """Get ready to decode what this adapter draws. Returns the adapter that decodes."""
        ...

    def begin(self, begun: Begun, memory: Any) -> Begun:
        """Begin to decode a chunk, or its next latent frame. memory: what the VAE has kept of what is before it."""
        ...

    def wait(self) -> None:
        """Return once nothing is being decoded."""
        ...

    def in_own_thread(self) -> bool:
        """Whether the caller is a thread of its own, which decodes."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


class DecodeInPlace:
    """By the pipeline's own VAE, once the images are asked for."""

    ahead = False

    def __init__(self, output: Output) -> None:
        self._output = output
        self._adapter: VideoAdapter | None = None

    def prepare(self, adapter: VideoAdapter) -> VideoAdapter:
        """The adapter itself decodes."""
        self._adapter = adapter
        return adapter

    def begin(self, begun: Begun, memory: Any) -> Begun:
        """Begins nothing: `fetch` decodes."""
        assert self._adapter is not None, "prepare was called"
        fetch = partial(self._output.decode, self._adapter, begun.drawn, memory, begun.frame)
        return replace(begun, fetch=fetch)

    def wait(self) -> None:
        """Nothing is decoded in another thread."""

    def in_own_thread(self) -> bool:
        """It has no thread."""
        return False

    def close(self) -> None:
        """Let go of the adapter."""
        self._adapter = None


class DecodeElsewhere:
    """By a copy of the VAE on a device, in a thread of its own. The copy is as the VAE was at the last `prepare`."""

    ahead = True

    def __init__(self, output: Output, device: Devices) -> None:
        self._output = output
        self.devices = (one_device("decode_on", device),)
        self._pool = Pool(self.devices, depth=2)
        self._adapter: VideoAdapter | None = None
        self._copied: tuple[WeightWatch, nn.Module] | None = None
        self._thread: int | None = None

    def prepare(self, adapter: VideoAdapter) -> VideoAdapter:
        """Copy what decodes, unless it is what was copied last. Raises as `streamflow.parallel.replicas.replicate`."""
        from streamflow.acceleration.watch import WeightWatch

        source = adapter.vae if adapter.tiny is None else adapter.tiny
        if self._copied is None or self._copied[0].module is not source or self._copied[0].changed():
            self._copied = WeightWatch(source), replicate(source, self.devices)[0]
        copied, other = self._copied[1], copy.copy(adapter.pipe)
        if adapter.tiny is None:
            vars(other)["vae"] = copied
        decoding = video_adapter_for(other)
        if isinstance(copied, TinyVideoDecoder):
            decoding.tiny = copied
        self._adapter = decoding
        return decoding

    def begin(self, begun: Begun, memory: Any) -> Begun:
        """Have the thread decode. `fetch` raises what the decode has raised."""
        adapter = self._adapter
        assert adapter is not None, "prepare was called"

        def decode(latents: Tensor, scaled: Tensor) -> Decoded:
            self._thread = threading.get_ident()
            return self._output.decode(adapter, replace(begun.drawn, latents=latents, scaled=scaled), memory, begun.frame)

        pending = self._pool.submit([decode], (begun.drawn.latents, begun.drawn.scaled))

        def fetch() -> Decoded:
            try:
                return pending.result()
            except DecodeError as error:
                if isinstance(error.__cause__, Exception):
                    raise error.__cause__ from None  # there is one device, so its error is the reason
                raise  # sys.exit() of a postprocess ends the chunk, and not this thread

        return replace(begun, fetch=fetch)

    def wait(self) -> None:
        """Wait for the decode that runs."""
        self._pool.submit([lambda: None], ()).result()

    def in_own_thread(self) -> bool:
        """Whether the caller is the thread that decodes."""
        return self._thread == threading.get_ident()

    def close(self) -> None:
        """Wait for the decode that runs, and end the thread."""
        self._pool.close()
        self._adapter = self._copied = self._thread = None  # a new thread may get the same identifier
