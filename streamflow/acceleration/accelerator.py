"""How a stream is accelerated: which modules it hands to `streamflow.acceleration`, and where it puts what comes back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamflow.models.codec import Codec
from streamflow.models.pipe_parts import check_network
from streamflow.stream.grad_mode import computing
from streamflow.stream.hooks import check_graphs

if TYPE_CHECKING:
    from streamflow.acceleration import Accelerated, Parts

logger = logging.getLogger(__name__)


class Accelerating:
    """Mixed into `StreamFlow`: `accelerate`, and the two things it replaces, `velocity` and `codec`."""

    _plain_codec: Codec
    _accelerated: Accelerated | None = None
    _acceleration: tuple[str, Any] = ("none", None)

    @property
    def acceleration(self) -> str:
        """The kind in force: "none", "cuda-graph", "compile", "tensorrt" or "onnxruntime"."""
        return self._acceleration[0]

    @property
    def velocity(self) -> nn.Module:
        """The network in our convention, `forward(x, t, **cond) -> v`, accelerated or not. Assigning another module, such
        as `adapter.row_by_row(...)`, accelerates that one in its place."""
        return self.adapter.velocity if self._accelerated is None else self._accelerated.modules["velocity"]

    @velocity.setter
    def velocity(self, module: nn.Module) -> None:
        self._put_back()
        self._redraw()
        self.adapter.velocity = module
        self._build()

    @property
    def unet(self) -> nn.Module:
        """The network, UNet or transformer. Assigning another one rebuilds the velocity; the pipe keeps its own."""
        return self.adapter.net

    @unet.setter
    def unet(self, network: nn.Module) -> None:
        if network is None:
            raise ValueError("unet is the network of the stream, and None cannot draw: assign a network of the same family")
        check_network(network)
        self._put_back()
        self._redraw()
        self.adapter.rebuild(network)
        self._build()

    @property
    def vae(self) -> nn.Module:
        """The VAE. Assigning another one, such as a tiny twin, rebuilds the codec; ValueError for other latents."""
        return self._vae

    @vae.setter
    def vae(self, vae: nn.Module) -> None:
        codec = self._codec_of(vae)
        self._put_back()
        self._redraw()
        self.codec = self._plain_codec = codec
        self._vae = vae
        self._build()

    def use_tiny_vae(self, path: str | None = None) -> None:
        """Decode and encode by a small VAE of the same latents, much faster and a little coarser. The pipe keeps its own;
        `stream.vae = stream.pipe.vae` goes back to it.

        path: a folder or a hub id. None: the folder `vae_tiny` beside the pipe's own VAE, as the embedded model has one,
            else the one that is published for the family, downloaded once.

        Raises:
            ValueError: none is known for this family, with what to pass; latents of another kind, with the numbers. OSError:
            there is none, or the hub cannot be reached. The stream is as it was.
        """
        from streamflow.models import load_tiny_vae
        from streamflow.models.tiny_vae import check_scale, find

        self._check_open()
        vae = load_tiny_vae(path or find(self.pipe, self.adapter.tiny_vae), self.device, self.unet.dtype)
        self.adapter.check_vae(vae)
        check_scale(vae, self.adapter.factor)
        self.vae = vae

    def _codec_of(self, vae: nn.Module) -> Codec:
        """The codec of a VAE, on every device of one that has several (`streamflow.parallel.shard_vae`)."""

        if vae is None:
            raise ValueError(
                "a stream encodes and decodes by a VAE, and None is none: assign the pipe's own, or use_tiny_vae()"
            )
        if not hasattr(vae, "config"):
            raise TypeError(f"a VAE of diffusers is needed, not {vae!r}")

        def make(one: nn.Module) -> Codec:
            return self.adapter.codec(one, self.height, self.width)

        return vae.codec_of(make) if hasattr(vae, "codec_of") else make(vae)

    @computing
    def accelerate(self, kind: str = "auto", **options: Any) -> None:
        """Make the network and the VAE faster; the pictures stay the same within the kind's bound.

        kind: "none" undoes all; "cuda-graph" replays recorded launches; "compile" is torch.compile, with a CUDA graph on
            top on CUDA; "tensorrt" builds engines; "onnxruntime" is for a CPU; "auto" is "compile" on CUDA, else "none".
        options: those of the kind, the fields of `streamflow.acceleration.<kind>.Options`.

        Called before `prepare`, it takes effect there, since shapes are known only then. How long each part took to start
        is logged.

        Raises:
            ValueError, TypeError: an unknown kind or option. RuntimeError: this device cannot do it. Whatever compilation
            raises; then the stream is as it was without acceleration.
        """
        from streamflow import acceleration

        self._check_open()
        kind = acceleration.resolve(kind, self.device)
        checked = acceleration.check_options(kind, self.device, options)
        if kind != "none":
            self.adapter.check_offers("accelerate")
        if self._on_step is not None and not self._graph_safe:
            check_graphs(kind, checked)
        self._put_back()
        self._acceleration = kind, checked
        self._build()

    @computing
    def _build(self) -> None:
        """Accelerate what is there now, as asked, once shapes are known."""
        kind, options = self._acceleration
        if kind == "none" or self._state is None:
            return
        try:
            self._accelerated = self._accelerate_parts(kind, self.parts(), options)
        except BaseException:
            self._acceleration = "none", None
            raise
        self.codec = Codec.of(self._accelerated.modules["decoder"], self._accelerated.modules["encoder"])
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._accelerated.seconds.items())
        logger.info("accelerated by %s: %s", kind, times)

    def _put_back(self) -> None:
        """Undo what acceleration changed; what was asked for stays asked for."""
        if self._accelerated is not None:
            self._accelerated.undo()
            self._accelerated = None
            self.codec = self._plain_codec

    def parts(self) -> Parts:
        """The plain modules, each with arguments as a tick gives them."""
        from streamflow.acceleration import Parts

        pictures = torch.zeros(self.frame_bff_size, 3, self.height, self.width, device=self.device)
        latents = torch.zeros(self.frame_bff_size, *self._shape, device=self.device, dtype=self.dtype)
        inputs = self._rows(None).example(self._with_control(self._state.prompt, self._blank))
        return Parts.of(self.adapter, self._plain_codec, inputs, latents, pictures)
