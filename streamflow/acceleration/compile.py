"""torch.compile, with a CUDA graph on top on CUDA.

A network with most of its weights in repeated blocks (most transformers) is compiled block by block: all blocks share one
compilation, so it starts in a fraction of the time. Other modules are compiled whole. Torch keeps inductor's output on disk
(`TORCHINDUCTOR_CACHE_DIR`), so a second start is faster.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from streamflow.acceleration import Accelerated, Part, Parts
from streamflow.acceleration.attention import choose_attention
from streamflow.acceleration.cuda_graph import Graphed, require_cuda
from streamflow.acceleration.quantize import KINDS, quantize, require

if TYPE_CHECKING:
    from streamflow.models.protocols import Arguments, Network

logger = logging.getLogger(__name__)
RECOMPILATIONS = 256  # the limit of shapes per class of module in a process; torch's default is 8
BLOCK_SHARE = 0.8  # the least share of a network's weights in repeated blocks for regional compilation
REPEATS = 4  # the least length of a list of repeated blocks
FUSED_HALF, FUSED = 0.05, 1e-4  # the largest relative difference of fused projections, in half precision and in others


@dataclass(frozen=True)
class Options:
    """The options of `accelerate("compile", ...)`.

    cuda_graph: replay the compiled code as a CUDA graph. None: on CUDA. A network that synchronises with its device in every
        call (Lumina2, Chroma) runs without one, which is logged.
    regional: compile repeated blocks only. None: if lists of them hold 80 % of the weights. True: also in a network without
        such lists (a UNet), where each module is compiled whose class occurs four times or more; the rest runs eagerly.
    fullgraph: raise an error instead of a graph break. The blocks of SkyReels may break (`use_kv_cache` does).
    channels_last: convolutions in that memory format.
    fuse_qkv: attention projections as one matrix, for networks that support it and have no adapters (LoRA).
    quantize: "fp8", "fp8-tensor" or "int8": matrices of a transformer in eight bits (`quantize.KINDS`). The images differ by
        more than the bound of this kind.
    keep_plain: keep the plain weights of quantised matrices for `accelerate("none")`. False frees their memory, which
        cannot be undone.
    attention: a backend of diffusers (`attention.choose_attention`).
    backend, mode, options: those of torch.compile, which takes either a mode or options.
    limit: the number of shapes that keep a CUDA graph.
    """

    cuda_graph: bool | None = None
    regional: bool | None = None
    fullgraph: bool = True
    channels_last: bool = True
    fuse_qkv: bool = False
    quantize: str | None = None
    keep_plain: bool = True
    attention: str | None = None
    backend: str = "inductor"
    mode: str | None = None
    options: Arguments | None = None
    limit: int = 8

    def __post_init__(self) -> None:
        if self.mode is not None and self.options is not None:
            raise ValueError(f"torch.compile takes a mode or options, and got mode={self.mode!r} and {dict(self.options)}")
        if not self.keep_plain and self.quantize is None:
            raise ValueError(f"keep_plain=False is for quantised weights: pass quantize=, one of {', '.join(KINDS)}")
        if not self.keep_plain and self.fuse_qkv:
            raise ValueError(
                "fuse_qkv=True keeps the plain weights of projections, and keep_plain=False drops them: choose one"
            )

    def for_device(self, device: torch.device) -> Options:
        """These options with `cuda_graph` True or False. RuntimeError: the device does not support an option."""
        if self.cuda_graph:
            require_cuda(device)
        if self.quantize is not None:
            require(self.quantize, device)
        on_cuda = device.type == "cuda"
        return replace(self, cuda_graph=on_cuda if self.cuda_graph is None else self.cuda_graph)


def accelerate(parts: Parts, options: Options) -> Accelerated:
    """Each part compiled. `undo` reverts the changes in place (memory format, projections, attention, weights)."""
    modules: dict[str, nn.Module] = {}
    with ExitStack() as undo:
        for part in parts:
            if options.channels_last and part.compilable:
                undo.callback(channels_last(part.module))
            if part.name == "velocity":
                modify_network(part, options, undo)
            compiled = part.module
            if part.compilable:
                compiled, undo_compile = compile_part(part, options)
                undo.callback(undo_compile)
            modules[part.name] = Graphed(compiled, options.limit) if options.cuda_graph and part.capturable else compiled
            if options.cuda_graph and not part.capturable:
                logger.info("%s: compiled without a CUDA graph, which cannot capture it", part.name)
        return Accelerated(modules, undo.pop_all().close)


def modify_network(part: Part, options: Options, undo: ExitStack) -> None:
    """Change the network by the options for it, in this order. `undo` gets a function for each change."""
    if options.fuse_qkv:
        undo.callback(fuse_projections(part))
    if options.attention is not None:
        undo.callback(choose_attention(part.module, options.attention))
    if options.quantize is not None:
        blocks = list(part.blocks) or repeated_blocks(part.module)
        undo.callback(quantize(part, blocks, options.quantize, options.keep_plain))


class Compiled(nn.Module):
    """A module that is compiled in the first call with each shape, for up to `RECOMPILATIONS` shapes of its class."""

    def __init__(self, module: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.module = module
        self._call = partial(_call_compiled, module, call)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class CompiledCall:
    """The compiled code of a block, which is called in its place by whoever calls the network. `block.compile` does the
    same with torch's own limit of shapes. before: what was called in its place until then. ended: it was undone."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]):
        self.block, self.before, self.ended = block, block._compiled_call_impl, False
        self._call = partial(_call_compiled, block, call)
        block._compiled_call_impl = cast("Any", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def _call_compiled(module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call the compiled code of a module."""
    import torch._dynamo as dynamo
    from torch._dynamo.exc import TorchDynamoException, Unsupported

    with dynamo.config.patch(recompile_limit=RECOMPILATIONS, accumulated_recompile_limit=8 * RECOMPILATIONS):
        try:
            return call(*args, **kwargs)
        except TorchDynamoException as error:
            module._call_impl(*args, **kwargs)  # raises the module's own error, if it is one, as it is
            if not isinstance(error, Unsupported):
                raise
            name = type(module).__name__
            raise RuntimeError(f"{name} does not compile as one graph: pass fullgraph=False to allow breaks") from error


def compile_part(part: Part, options: Options) -> tuple[nn.Module, Callable[[], None]]:
    """The part's module, compiled in its own way, whole or by its repeated blocks, and a function that undoes the last."""
    own = {"backend": options.backend, "mode": options.mode, "options": options.options and dict(options.options)}
    how = {"fullgraph": options.fullgraph and not part.breaks, "dynamic": False, **own}
    if part.compiled is not None:
        return part.compiled(part.module, lambda module: Compiled(module, torch.compile(module, **how))), lambda: None
    if part.blocks:
        if options.regional is False:
            raise ValueError("regional=False, and only the blocks of this network can be compiled: leave it out")
        how["dynamic"] = None  # torch compiles for one shape, and then for all where another one comes
    blocks = list(part.blocks) or (repeated_blocks(part.module) if options.regional is not False else [])
    if options.regional and not blocks and part.name == "velocity":
        blocks = repeated_classes(part.module)
        if not blocks:
            raise ValueError("regional=True, and this network has no repeated blocks: leave it out to compile it whole")
    if not blocks:
        return Compiled(part.module, torch.compile(part.module, **how)), lambda: None
    calls = [CompiledCall(block, torch.compile(block._call_impl, **how)) for block in blocks]
    logger.info("%s: %d repeated blocks are compiled", part.name, len(blocks))
    return Compiled(part.module, part.module), partial(uncompile, calls)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks in lists of one class that hold `BLOCK_SHARE` of a module's weights or more, else an empty list."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) >= REPEATS]
    alike = [m for m in lists if len({type(block) for block in m}) == 1]
    return _holding_most([block for m in alike for block in m], module)


def repeated_classes(module: nn.Module) -> list[nn.Module]:
    """The outermost modules with children whose class occurs `REPEATS` times or more, if they hold `BLOCK_SHARE` of the
    module's weights, else an empty list. Of a UNet: its residual blocks and its transformers."""
    composed = [m for m in module.modules() if any(m.children()) and not isinstance(m, (nn.ModuleList, nn.Sequential))]
    count = Counter(type(m) for m in composed)
    return _holding_most([m for m in composed if count[type(m)] >= REPEATS], module)


def _holding_most(blocks: Sequence[nn.Module], module: nn.Module) -> list[nn.Module]:
    """The outermost of these blocks, if they hold `BLOCK_SHARE` of a module's weights, else an empty list."""
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    outermost = [block for block in blocks if id(block) not in inner]
    held = sum(p.numel() for block in outermost for p in block.parameters())
    return outermost if held >= BLOCK_SHARE * sum(p.numel() for p in module.parameters()) else []


def uncompile(calls: Sequence[CompiledCall]) -> None:
    """Let these blocks be called as before. What was compiled since then, of another stream of the network, stays."""
    for call in calls:
        call.ended = True
        now: Any = call.block._compiled_call_impl
        while isinstance(now, CompiledCall) and now.ended:
            now = now.before
        call.block._compiled_call_impl = now


def channels_last(module: nn.Module) -> Callable[[], None]:
    """Put the weights of convolutions into channels-last format, in place. Returns a function that restores the format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    changed = [p for p in module.parameters() if p.dim() in formats and p.is_contiguous()]

    def convert(contiguous: bool) -> None:
        for p in changed:
            form = torch.contiguous_format if contiguous else formats[p.dim()]
            p.data = p.data.contiguous(memory_format=form)

    convert(contiguous=False)
    return partial(convert, contiguous=True)


def fuse_projections(part: Part) -> Callable[[], None]:
    """Fuse the attention projections of the network, by diffusers' own method. Returns a function that undoes it.

    ValueError: the network has adapters, or computes something else with fused projections, which two calls find out.
    Diffusers' fused attention of Stable Diffusion 3 omits the norms of queries and keys that SD 3.5 has."""
    networks = [cast("Network", m) for m in part.module.modules() if hasattr(m, "fuse_qkv_projections")]
    if any(getattr(network, "peft_config", None) for network in networks):
        raise ValueError("fuse_qkv cannot fuse projections with adapters (LoRA): fuse_lora() first, or leave it out")
    before = part.call()
    with ExitStack() as undo:
        undo.callback(unfuse, networks)
        for network in networks:
            network.fuse_qkv_projections()
        off = ((part.call().float() - before.float()).norm() / before.float().norm()).item()
        if not off <= (FUSED_HALF if before.dtype.itemsize == 2 else FUSED):
            raise ValueError(
                f"fuse_qkv changes what this network computes: diffusers' fused attention makes a difference of {off:.2g} "
                f"of the output's norm; leave it out"
            )
        return undo.pop_all().close


def unfuse(networks: Sequence[Network]) -> None:
    """Undo fused projections, and remove what diffusers leaves behind."""
    for network in networks:
        network.unfuse_qkv_projections()
        for m in network.modules():
            for name in ("to_qkv", "to_kv", "to_added_qkv"):
                if name in m._modules:
                    del m._modules[name]
            if getattr(m, "fused_projections", False):
                m.__dict__["fused_projections"] = False
