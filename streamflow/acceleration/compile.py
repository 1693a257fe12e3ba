"""torch.compile, with a CUDA graph on top where there is CUDA: the most that is to be had without TensorRT.

A network whose weights lie in a few long lists of like blocks (most transformers) is compiled block by block: one
compilation serves all of them, so it starts in a fraction of the time. Anything else is compiled whole. What inductor
generates is kept on disk by torch itself (`TORCHINDUCTOR_CACHE_DIR`), so a second start is quicker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from streamflow.acceleration import Accelerated, Part, Parts
from streamflow.acceleration.cuda_graph import Graphed, require_cuda

logger = logging.getLogger(__name__)
RECOMPILATIONS = 64  # shapes a stream may come to have; torch's own limit is 8
MOST = 0.8  # the share of a network's weights that its repeated blocks must hold to be compiled alone
REPEATS = 4  # how often a block must come to count as repeated


@dataclass(frozen=True)
class Options:
    """cuda_graph: replay what was compiled as a CUDA graph; None: where there is CUDA.
    regional: compile repeated blocks, not the whole; None: where they hold 80 % of the weights.
    fullgraph: an error instead of a graph break. channels_last: convolutions in that layout.
    fuse_qkv: attention projections as one matrix, where the network has that switch and no adapters (LoRA) are loaded.
    backend, mode: torch.compile's own. limit: how many shapes keep a CUDA graph."""

    cuda_graph: bool | None = None
    regional: bool | None = None
    fullgraph: bool = True
    channels_last: bool = True
    fuse_qkv: bool = False
    backend: str = "inductor"
    mode: str | None = None
    limit: int = 8

    def for_device(self, device: torch.device) -> Options:
        """These options with `cuda_graph` decided; RuntimeError where it was asked for and cannot be."""
        if self.cuda_graph:
            require_cuda(device)
        on_cuda = device.type == "cuda"
        return replace(self, cuda_graph=on_cuda if self.cuda_graph is None else self.cuda_graph)


def accelerate(parts: Parts, options: Options) -> Accelerated:
    """Each part compiled. Layout and fused projections are changed in place and undone by `undo`."""
    undo: list[Callable[[], None]] = []
    modules = {}
    try:
        for part in parts:
            if options.channels_last:
                undo.append(channels_last(part.module))
            if options.fuse_qkv and part.name == "velocity":
                undo.append(fuse_projections(part.module))
            compiled, undo_compile = compile_part(part, options)
            undo.append(undo_compile)
            modules[part.name] = Graphed(compiled, options.limit) if options.cuda_graph else compiled
    except BaseException:
        run_backwards(undo)
        raise
    return Accelerated(modules, lambda: run_backwards(undo))


def run_backwards(undo: list[Callable[[], None]]) -> None:
    """Undo the last first; each once."""
    while undo:
        undo.pop()()


class Compiled(nn.Module):
    """A module whose code is compiled at the first call of each shape, with room for more shapes than torch's default."""

    def __init__(self, module: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        import torch._dynamo as dynamo

        with dynamo.config.patch(recompile_limit=RECOMPILATIONS, accumulated_recompile_limit=8 * RECOMPILATIONS):
            try:
                return self._call(*args, **kwargs)
            except dynamo.exc.Unsupported as error:
                raise RuntimeError(
                    f"{type(self.module).__name__} does not compile as one graph: pass fullgraph=False to allow breaks"
                ) from error


def compile_part(part: Part, options: Options) -> tuple[Compiled, Callable[[], None]]:
    """The part's module compiled whole, or its repeated blocks alone; and how to undo the latter."""
    how = {"fullgraph": options.fullgraph, "backend": options.backend, "mode": options.mode, "dynamic": False}
    blocks = repeated_blocks(part.module) if options.regional is not False else []
    if options.regional and not blocks and part.name == "velocity":
        raise ValueError("regional=True, and this network has no blocks that repeat: leave it out to compile it whole")
    if not blocks:
        return Compiled(part.module, torch.compile(part.module, **how)), lambda: None
    for block in blocks:
        block.compile(**how)
    logger.info("%s: %d repeated blocks are compiled", part.name, len(blocks))
    return Compiled(part.module, part.module), lambda: uncompile(blocks)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of like kind, in lists, that hold most of a module's weights; none where they hold less."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) >= REPEATS]
    alike = [m for m in lists if len({type(block) for block in m}) == 1]
    blocks = [block for m in alike for block in m]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    outermost = [block for block in blocks if id(block) not in inner]
    held = sum(p.numel() for block in outermost for p in block.parameters())
    return outermost if held >= MOST * sum(p.numel() for p in module.parameters()) else []


def uncompile(blocks: list[nn.Module]) -> None:
    """Undo `nn.Module.compile`, which has no way back of its own."""
    for block in blocks:
        block._compiled_call_impl = None


def channels_last(module: nn.Module) -> Callable[[], None]:
    """Lay convolutions' weights out channels last, in place; returns how to lay them back. Values stay the same."""
    changed = [p for p in module.parameters() if p.dim() == 4 and p.is_contiguous()]
    for p in changed:
        p.data = p.data.contiguous(memory_format=torch.channels_last)

    def undo() -> None:
        for p in changed:
            p.data = p.data.contiguous(memory_format=torch.contiguous_format)

    return undo


def fuse_projections(module: nn.Module) -> Callable[[], None]:
    """Join the attention projections of the network inside, by diffusers' own switch; returns how to part them."""
    networks = [m for m in module.modules() if hasattr(m, "fuse_qkv_projections")]
    for network in networks:
        if getattr(network, "peft_config", None):
            raise ValueError(
                "fuse_qkv cannot join projections that carry adapters (LoRA): fuse_lora() first, or leave it out"
            )
        network.fuse_qkv_projections()

    def undo() -> None:
        for network in networks:
            network.unfuse_qkv_projections()
            for m in network.modules():
                for name in ("to_qkv", "to_kv", "to_added_qkv"):
                    if name in m._modules:
                        del m._modules[name]
                if getattr(m, "fused_projections", False):
                    m.fused_projections = False

    return undo
