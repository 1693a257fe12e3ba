"""The model of a stream: the pipe's network and VAE as a velocity and a codec, for one image size. It follows the pipe when
parts of the pipe are replaced. It has no frames."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from streamflow._validation import whole_number
from streamflow.models import reference_rule
from streamflow.models.adapter import FlowAdapter
from streamflow.models.codec import Codec
from streamflow.models.pipe_parts import PipeParts, check_dtype, check_network
from streamflow.models.protocols import VAE, Network, Pipeline
from streamflow.stream.callbacks import Callbacks

if TYPE_CHECKING:
    from streamflow.acceleration import Accelerated


IMAGE_AS = ("start", "reference")


class Model:
    """The model of one stream.

    adapter: of the pipe's family. height, width: of images, in pixels; by default the pipeline's own. frames: F, the frame
    buffer size. image_is_reference: the image of a call is its first reference, not what the frame starts from. shape: of a
    frame's latents. codec: the codec in use; `plain_codec`: the codec without acceleration.
    acceleration: the kind that is requested, and its options. accelerated: the modules in force. before_change,
    after_change: called before and after a part is replaced. closed: set by `close`.
    """

    def __init__(
        self,
        pipe: Pipeline,
        adapter: FlowAdapter,
        height: int | None,
        width: int | None,
        frames: int,
        dtype: torch.dtype | None,
        image_as: str | None = None,
    ) -> None:
        image_as = image_as or ("start" if adapter.reference is None else "reference")
        if image_as not in IMAGE_AS:
            raise ValueError(f"unknown image_as {image_as!r}: choose one of {', '.join(map(repr, IMAGE_AS))}")
        self.image_is_reference = image_as == "reference"
        if self.image_is_reference:
            reference_rule(adapter)  # raises where there is none
        self._seen = PipeParts.of(pipe, adapter.network)
        self.pipe, self.adapter, self.frames = pipe, adapter, frames
        self.height = adapter.default_size if height is None else height
        self.width = adapter.default_size if width is None else width
        adapter.check_size(self.height, self.width)
        self.height, self.width = int(self.height), int(self.width)  # numpy's integers are no JSON
        self.frames = whole_number("frame_buffer_size", frames, 1)
        self.device, dtype = torch.device(pipe.device), check_dtype(dtype, adapter.net, pipe.device)
        self.shape = adapter.latent_shape(self.height, self.width)
        self.dtype = adapter.latent_dtype or dtype
        self._vae = pipe.vae
        self.codec = self.plain_codec = self.codec_of(pipe.vae)
        self.acceleration: tuple[str, object] = ("none", None)
        self.accelerated: Accelerated | None = None
        self.before_change, self.after_change = Callbacks(), Callbacks()
        self.closed = False

    def check_open(self) -> None:
        """RuntimeError after `close`."""
        if self.closed:
            raise RuntimeError("this stream was closed: make a new StreamFlow of the same pipe")

    # -- parts ----------------------------------------------------------------------------------------------------------

    @property
    def velocity(self) -> nn.Module:
        """The network in our convention, `forward(x, t, **cond) -> v`, accelerated or not. Assigning another module, such
        as `adapter.row_by_row(...)`, accelerates that one in its place."""
        return self.adapter.velocity if self.accelerated is None else self.accelerated.modules["velocity"]

    @velocity.setter
    def velocity(self, module: nn.Module) -> None:
        self.before_change()
        self.adapter.velocity = module
        self.after_change()

    @property
    def interleaved(self) -> tuple[torch.device, ...]:
        """The devices of the network's copies that draw frames in turn (`streamflow.parallel.interleave`), or none."""
        return getattr(self.adapter.velocity, "interleaved", ())

    @property
    def unet(self) -> Network:
        """The network, UNet or transformer. Assigning another one rebuilds the velocity; the pipe keeps its own."""
        return self.adapter.net

    @unet.setter
    def unet(self, network: Network) -> None:
        if network is None:
            raise ValueError("unet is the network of the stream, and None cannot draw: assign a network of the same family")
        check_network(network)
        self.adapter.check_network(network)
        self.before_change()
        self.adapter.rebuild(network)
        self.after_change()

    @property
    def vae(self) -> VAE:
        """The VAE. Assigning another one, such as a tiny twin, rebuilds the codec; ValueError for other latents."""
        return self._vae

    @vae.setter
    def vae(self, vae: VAE) -> None:
        codec = self.codec_of(vae)
        self.before_change()
        self.codec = self.plain_codec = codec
        self._vae = vae
        self.after_change()

    def codec_of(self, vae: VAE | None) -> Codec:
        """The codec of a VAE, on every device of one that has several (`streamflow.parallel.shard_vae`). TypeError or
        ValueError for what cannot be this stream's VAE."""
        if vae is None:
            raise ValueError(
                "a stream encodes and decodes by a VAE, and None is none: assign the pipe's own, or use_tiny_vae()"
            )
        if not hasattr(vae, "config"):
            raise TypeError(f"a VAE of diffusers is needed, not {vae!r}")

        def make(one: VAE) -> Codec:
            return self.adapter.codec(one, self.height, self.width)

        of_several = getattr(vae, "codec_of", None)
        return make(vae) if of_several is None else of_several(make)

    def use_tiny_vae(self, path: str | None = None) -> None:
        """Decode and encode by a small VAE of the same latents, much faster and a little coarser. The pipe keeps its own;
        `stream.vae = stream.pipe.vae` goes back to it.

        path: a folder or a hub id. None: the folder `vae_tiny` beside the pipe's own VAE, as the embedded model has one,
            else the one that is published for the family, downloaded once.

        Raises:
            ValueError: no small VAE is known for this family, with what to pass; latents of another kind, with the numbers.
            OSError: the folder does not exist, or the hub cannot be reached. The stream stays unchanged.
        """
        from streamflow.models import load_tiny_vae
        from streamflow.models.tiny_vae import check_scale, find

        self.check_open()
        vae = cast(VAE, load_tiny_vae(path or find(self.pipe, self.adapter.tiny_vae), self.device, self.unet.dtype))
        self.adapter.check_vae(vae)
        check_scale(vae, self.adapter.factor)
        self.vae = vae

    def use(self, accelerated: Accelerated | None) -> None:
        """Draw with these modules, or with the plain ones."""
        self.accelerated, self.codec = accelerated, self.plain_codec
        if accelerated is not None:
            self.codec = Codec.of(accelerated.modules["decoder"], accelerated.modules["encoder"])

    # -- the pipe -------------------------------------------------------------------------------------------------------

    def settle_shape(self) -> None:
        """Set the latents' shape where it was unknown before the arguments of `prepare`."""
        if not self.shape:
            self.shape = self.adapter.latent_shape(self.height, self.width)

    @contextmanager
    def following_pipe(self) -> Iterator[None]:
        """A context in which a stream is planned with the pipe's present parts. On exit the model draws with these parts.
        An error leaves the model unchanged.

        Raises:
            ValueError: a part of the pipe was replaced or moved in a way that this model cannot follow, with the remedy.
        """
        seen, now, adapter = self._seen, PipeParts.of(self.pipe, self.adapter.network), self.adapter
        now.check_same_place(seen, [item.net for item in adapter.controls.items] if adapter.controls else [])
        new_network = now.network is not seen.network
        codec = None if now.vae is seen.vae or (now.vae is None and self._vae is not seen.vae) else self.codec_of(now.vae)
        before = adapter.net, adapter.scheduler
        try:
            adapter.check_network(now.network)
            if new_network:
                adapter.net = now.network
                shape = list(adapter.latent_shape(self.height, self.width))
                if shape != list(self.shape):
                    raise ValueError(
                        f"pipe.{adapter.network} was replaced by a network with latents {shape}, and this stream's are "
                        f"{list(self.shape)}: make a new StreamFlow of the pipe"
                    )
            if now.scheduler != seen.scheduler:
                adapter.scheduler = copy.deepcopy(self.pipe.scheduler)
            adapter.follow_pipe()
            yield
        except BaseException:
            adapter.net, adapter.scheduler = before
            raise
        if new_network or codec is not None:
            self.before_change()  # `prepare` accelerates anew
        if new_network:
            adapter.rebuild(now.network)
        if codec is not None and now.vae is not None:
            self._vae, self.codec, self.plain_codec = now.vae, codec, codec
        self._seen = now

    # -- tensors ----------------------------------------------------------------------------------------------------------

    def upload(self, images: Tensor) -> Tensor:
        """Images on the model's device, copied without waiting."""
        return images.as_subclass(Tensor).to(self.device, non_blocking=True)

    def encode(self, images: Tensor, codec: Codec | None = None) -> Tensor:
        """Images `[n, 3, H, W]` in [-1, 1] to clean latents `[n, ...]` in the stream's dtype. codec: by default `codec`."""
        codec = codec or self.codec
        if not codec.uploads:
            images = self.upload(images)
        return codec.encode(images).to(self.dtype)

    def to_device(self, noise: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Noise that was drawn on the CPU, on the model's device, copied without waiting."""
        if self.device.type == "cuda" and noise.device.type == "cpu":
            noise = noise.pin_memory()
        return noise.to(self.device, non_blocking=True).to(dtype or self.dtype)

    def check_rows(self, x: Tensor, rows: int) -> None:
        """ValueError unless x is latents of this many rows."""
        if tuple(x.shape) != (rows, *self.shape):
            raise ValueError(f"latents must be {[rows, *self.shape]}, not {list(x.shape)}")
