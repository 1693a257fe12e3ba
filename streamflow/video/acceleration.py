"""The network and the decoder of a video stream, accelerated as those of images (`streamflow.acceleration`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamflow.acceleration.accelerator import Accelerator
from streamflow.models.pipe_parts import base_network
from streamflow.models.video import VideoAdapter, VideoPlan
from streamflow.models.whole_decoder import WholeDecoder
from streamflow.parallel.accelerated import accelerate
from streamflow.parallel.replicas import replicate
from streamflow.parallel.rows import InputCache, ShardedVelocity

if TYPE_CHECKING:
    from streamflow.acceleration import Accelerated, Part, Parts
    from streamflow.models.protocols import Arguments
    from streamflow.models.video import Drawn

EXPORTED = ("tensorrt", "onnxruntime", "openvino")
COMPILED_ON = ("cuda",)  # types of devices on which the VAE's decoder is compiled: on a CPU that takes minutes
TRIALS = 3  # chunks that `accelerate("max")` draws: the median leaves out the one that compiles


class TensorNetwork(nn.Module):
    """A network as a function of tensors. constants: its other arguments. Returns its first output."""

    def __init__(self, network: nn.Module, constants: Arguments) -> None:
        super().__init__()
        self.network, self.constants = network, dict(constants)

    def forward(self, hidden_states: Tensor, timestep: Tensor, **tensors: Tensor) -> Tensor:
        return self.network(hidden_states=hidden_states, timestep=timestep, **tensors, **self.constants)[0]


class CopiedNetwork(ShardedVelocity):
    """A network with a copy on a second device."""

    made_by = "prepare()"


@dataclass(frozen=True, eq=False)
class Prepared:
    """What was prepared last. decoding: the adapter that decodes."""

    adapter: VideoAdapter
    decoding: VideoAdapter
    plan: VideoPlan
    decodes: bool


class VideoModules:
    """Calls the network and the decoder of the adapters that are connected, plain or accelerated. It is what
    `Accelerator` takes for a model. other: a second device, with a copy of the network, that computes half of its rows."""

    def __init__(self, device: torch.device, other: torch.device | None = None) -> None:
        self.device = device
        self.acceleration: tuple[str, object] = ("none", None)
        self.accelerated: Accelerated | None = None
        self.accelerator = Accelerator(self, self._parts, accelerate, self._check, self._ticks)
        self._prepared: Prepared | None = None
        self._made_of: tuple[object, ...] = ()
        self._constants: Arguments = {}
        self._example: tuple[tuple[Arguments, Drawn], object, VideoPlan] | None = None
        self._moved = InputCache(device)
        self._other = other
        self._sharded: ShardedVelocity | None = None
        self._copied_of: tuple[object, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether a second device computes half of the rows."""
        return self._sharded is not None

    @property
    def _in_blocks(self) -> bool:
        """Whether only the blocks of the network are compiled, in place."""
        return self._prepared is not None and self._prepared.adapter.in_blocks is not None

    def use(self, accelerated: Accelerated | None) -> None:
        """Call these modules, or the plain ones."""
        self.accelerated = accelerated

    def connect(self, prepared: Prepared, anew: bool = True) -> None:
        """Have these adapters call the modules in force. anew: accelerate again where they are other modules, or get inputs
        of other shapes, and not only where nothing is accelerated yet."""
        prepared.adapter.network.call = partial(self.call_network, prepared.adapter.network.plain)
        prepared.decoding.decoder.call = partial(self.call_decoder, prepared.decoding.decoder.plain)
        prepared.decoding.call_decoder = self.call_latent_decoder
        kind = self.acceleration[0]
        self.device, self._prepared = prepared.adapter.device, prepared
        try:
            self._check(kind)
        except BaseException:
            self.accelerator.put_back()
            self.acceleration = "none", None
            raise
        self._copy_network(prepared)
        if kind != "none" and (self.accelerated is None or (anew and self._identity() != self._made_of)):
            self.accelerator.put_back()
            self.accelerator.rebuild()
        if kind == "none" and self._other is None:
            self._forget()

    def close(self) -> None:
        """Undo the acceleration, and let go of the modules."""
        self.accelerator.put_back()
        self.acceleration, self._prepared, self._sharded = ("none", None), None, None
        self._forget()

    def _forget(self) -> None:
        """Let go of the modules and arguments that are compared with the next ones."""
        self._made_of, self._example = (), None

    def call_network(self, plain: nn.Module, **given: Any) -> Any:
        """The outputs of the network. ValueError for an argument that is no tensor and has changed since the network was
        accelerated."""
        module = self._sharded if self.accelerated is None else self.accelerated.modules["velocity"]
        if module is None:
            return plain(**given)
        if self._in_blocks:
            return module(**given)
        tensors, constants = _split(given)
        if changed := [name for name, value in constants.items() if self._constants.get(name) != value]:
            name = changed[0]
            raise ValueError(
                f"the network was accelerated or copied with {name}={self._constants.get(name)!r}, and this chunk has "
                f"{name}={constants[name]!r}: pass it to prepare()"
            )
        own = self._on_device(tensors)
        return (module(own.pop("hidden_states"), own.pop("timestep"), **own),)

    def call_decoder(self, plain: nn.Module, latents: Tensor) -> Tensor:
        """The images of latents."""
        modules = {} if self.accelerated is None else self.accelerated.modules
        return modules.get("decoder", plain)(latents)

    def call_latent_decoder(self, plain: nn.Module, latent: Tensor, **kept: Any) -> Tensor:
        """The images of one latent frame. kept: what the layers of the decoder have kept."""
        decoder = None if self.accelerated is None else self.accelerated.modules.get("decoder")
        if decoder is not None:  # a WholeDecoder, or a CUDA graph of one
            whole = next(one for one in decoder.modules() if isinstance(one, WholeDecoder))
            plain = whole.vae.get_submodule("decoder")
        return plain(latent, **kept)

    def _copy_network(self, prepared: Prepared) -> None:
        """Copy the network to the second device, unless it was copied with the same device, dtype and adapters."""
        from streamflow.acceleration.watch import Watch

        if self._other is None:
            return
        tensors, constants = _split(self._drawn_example()[0])
        network = prepared.adapter.network.plain
        made_of = network, self.device, network.dtype, Watch(network).adapters(), constants
        if self._sharded is not None and self._copied_of == made_of:
            return
        self.accelerator.put_back()
        self._sharded, own = None, TensorNetwork(network, constants)
        copied = replicate(own, (self._other,))[0]
        self._sharded = CopiedNetwork(own, [own, copied], (self.device, self._other))
        self._constants, self._copied_of = constants, made_of

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Positions come from the CPU, and a CUDA graph could not copy them. They are copied once a chunk."""
        return {n: one if one.device == self.device else self._moved.get(one, None) for n, one in tensors.items()}

    def _check(self, kind: str, options: object = None) -> None:
        if kind == "none":
            return
        if self._prepared is not None:
            adapter = self._prepared.adapter
            if adapter.in_blocks and kind not in ("compile", "max"):
                raise NotImplementedError(
                    f"{type(adapter.pipe).__name__} is accelerated by 'compile' and not by {kind!r}: {adapter.in_blocks}"
                )
        if kind in EXPORTED:
            from streamflow.acceleration.errors import NotExportable

            problem = "the networks of video pipelines are not exported"
            raise NotExportable(
                "velocity", "before export", problem, "use accelerate('cuda-graph') or accelerate('compile')"
            )

    def _parts(self) -> Parts | None:
        from streamflow.acceleration import Part

        if self._prepared is None:
            return None
        adapter, plan = self._prepared.adapter, self._prepared.plan
        if self._in_blocks:
            self._made_of = self._identity()
            network = adapter.network.plain
            plain: Any = base_network(network)
            velocity = Part(
                "velocity",
                network,
                {"embeds": plan.call["prompt_embeds"]},
                exportable=False,
                capturable=False,
                blocks=list(plain.blocks),
                breaks=adapter.breaks,
                warm_up=partial(adapter.warm_up, plan),
            )
            return _parts_of(velocity, self._decoder_part())
        given, drawn = self._drawn_example()
        tensors, self._constants = _split(given)
        self._made_of = self._identity()
        network = self._sharded or TensorNetwork(adapter.network.plain, self._constants)
        velocity = Part("velocity", network, self._on_device(tensors), positional=2, exportable=False)
        return _parts_of(velocity, self._decoder_part(drawn.scaled))

    def _decoder_part(self, chunk: Tensor | None = None) -> Part | None:
        """The VAE's decoder, if it is accelerated. chunk: the latents of a chunk that is decoded by itself. None: the VAE
        keeps a memory of the chunks before, which is complete after the three latent frames that it decodes here."""
        from streamflow.acceleration import Part

        assert self._prepared is not None, "connect was called"
        adapter, decoding = self._prepared.adapter, self._prepared.decoding
        vae, whole, alone = decoding.vae, decoding.decoder.plain, chunk is not None
        quick = vae.device.type in COMPILED_ON and not _tiled(decoding)  # tiles at the borders have other sizes
        if not self._prepared.decodes or decoding.tiny is not None or vae.device.type != self.device.type:
            return None
        if not alone and not quick:
            return None
        if chunk is None:
            call = adapter.defaults() | dict(self._prepared.plan.call)
            size = (call[name] // adapter.pipe.vae_scale_factor_spatial for name in ("height", "width"))
            chunk = torch.zeros(1, vae.config.z_dim, 3, *size, dtype=vae.dtype)
        latents, compiled = {"latents": chunk.to(vae.device)}, WholeDecoder.compiled
        return Part("decoder", whole, latents, exportable=False, capturable=alone, compilable=quick, compiled=compiled)

    def _drawn_example(self) -> tuple[Arguments, Drawn]:
        """The `example` of the adapter, kept for the next request unless the pipe's modules or the arguments differ."""
        assert self._prepared is not None, "connect was called"
        adapter, plan = self._prepared.adapter, self._prepared.plan
        adapter.check_placed()
        made_of = adapter.placed, adapter.pipe.scheduler
        if self._example is not None:
            example, before, drawn_for = self._example
            if made_of == before and (plan is drawn_for or _settings(plan) == _settings(drawn_for)):
                return example
        self._example = adapter.example(plan), made_of, plan
        return self._example[0]

    def _identity(self) -> tuple[object, ...]:
        """What the parts are made of: the modules, and the network's arguments, tensors by their shape and dtype."""
        assert self._prepared is not None, "connect was called"
        adapter, decoding = self._prepared.adapter, self._prepared.decoding
        vae = *decoding.vae.modules(), _tiled(decoding)  # what is compiled follows no change of these
        if self._in_blocks:
            plan = self._prepared.plan
            shapes = {name: _shape_of(value) for name, value in plan.call.items()}
            return adapter.network.plain, adapter.network.plain.dtype, vae, decoding.tiny, shapes
        tensors, constants = _split(self._drawn_example()[0])
        shapes = tuple((name, one.shape, one.dtype) for name, one in tensors.items())
        return adapter.network.plain, self._sharded, vae, decoding.tiny, constants, shapes

    def _ticks(self, groups: int) -> Iterator[Tensor]:
        """A first chunk, drawn several times with the modules in force, whatever `groups` is: `[n, 3, H, W]` in [-1, 1]."""
        assert self._prepared is not None, "max is measured once shapes are known"
        adapter, decoding = self._prepared.adapter, self._prepared.decoding
        network = partial(self.call_network, adapter.network.plain)
        for _ in range(TRIALS):
            yield decoding.decode(adapter.draw_first(self._prepared.plan, network, 1))[0][0].transpose(0, 1)


def _split(given: Arguments) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments that are tensors, and the others."""
    tensors = {name: one for name, one in given.items() if isinstance(one, Tensor)}
    return tensors, {name: one for name, one in given.items() if name not in tensors}


def _settings(plan: VideoPlan) -> dict[str, object]:
    """The arguments of a plan for comparison: a tensor by its shape and dtype. What has no simple value equals nothing."""

    def setting(value: Any) -> object:
        if isinstance(value, Tensor):
            return value.shape, value.dtype
        each = value if isinstance(value, (list, tuple)) else (value,)
        return value if all(one is None or isinstance(one, (int, float, str)) for one in each) else object()

    return {name: setting(value) for name, value in plan.call.items()}


def _shape_of(value: Any) -> object:
    """What an argument of a pipeline's call says of shapes: that of a tensor, and integers. None: nothing."""
    if isinstance(value, Tensor):
        return value.shape
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(numbers) if all(isinstance(one, int) for one in numbers) else None


def _tiled(adapter: VideoAdapter) -> bool:
    return bool(getattr(adapter.vae, "use_tiling", False))


def _parts_of(velocity: Part, decoder: Part | None) -> Parts:
    from streamflow.acceleration import Parts

    return Parts(velocity, decoder or velocity, velocity, names=("velocity", "decoder") if decoder else ("velocity",))
