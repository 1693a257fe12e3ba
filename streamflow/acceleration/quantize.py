"""Quantises matrices to eight bits, by torchao: weights once, activations in every call. For networks whose time goes into
matrix products (large transformers). The images change, see `streamflow.acceleration.compile`.

Quantised are the Linear layers of the network's repeated blocks with `FEATURES` or more inputs and outputs and `ROWS` or
more rows in a call. A layer with fewer rows, as in modulation with one row per image, gains nothing and loses precision.
The rows are counted in one call. Embeddings and the output layer are not quantised.

The quantised weight replaces the parameter. `quantize` keeps the parameter for `undo`, which needs half as much memory in
addition, or drops it. `quantize_on` moves a network to a device and quantises it there layer by layer, so that the plain
network is never on that device.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from streamflow.acceleration import Part

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

logger = logging.getLogger(__name__)
FEATURES = 512  # the least inputs and outputs of a layer: quantising costs relatively more in small layers
ROWS = 64  # the least rows of a layer's input in a call
MULTIPLE = 16  # of the features: a requirement of the GPU's eight-bit matrix products
FEW_ROWS = re.compile(r"norm|mod")  # in the names of layers with one row per image, which are modulation
REMEDY = 'pip install "streamflow-rf[quantize]"'


@dataclass(frozen=True)
class Kind:
    """A kind of quantisation.

    config: creates torchao's configuration. capability: the least compute capability of a GPU. dtypes: of the weights that
    it supports. cpu: whether it works on a CPU.
    """

    config: Callable[[], AOBaseConfig]
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    cpu: bool = False


def _float8(granularity: str) -> AOBaseConfig:
    from torchao import quantization

    scaled = getattr(quantization, granularity)()
    return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=scaled, set_inductor_config=False)


def _int8() -> AOBaseConfig:
    from torchao import quantization

    return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


HALVES = (torch.bfloat16, torch.float16)
KINDS = {
    "fp8": Kind(lambda: _float8("PerRow"), (8, 9), (torch.bfloat16,)),
    "fp8-tensor": Kind(lambda: _float8("PerTensor"), (8, 9), HALVES),
    "int8": Kind(_int8, (8, 0), (*HALVES, torch.float32), cpu=True),
}


def require(name: str, device: torch.device) -> None:
    """Check that this kind works on this device.

    Raises:
        ValueError: an unknown kind; the message has all. RuntimeError: the device does not support it. ImportError: torchao
        is missing.
    """
    if name not in KINDS:
        raise ValueError(f"unknown quantize {name!r}: choose one of {', '.join(KINDS)}")
    kind, least = KINDS[name], "{}.{}".format(*KINDS[name].capability)
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < kind.capability:
            able = [other for other, kind in KINDS.items() if kind.capability <= found]
            raise RuntimeError(
                f"quantize={name!r} needs a GPU of compute capability {least} or more, and "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: "
                + (f"it can do {', '.join(able)}" if able else "leave it out")
            )
    elif device.type != "cpu" or not kind.cpu:
        raise RuntimeError(f"quantize={name!r} needs a CUDA device of capability {least} or more, not {device}")
    try:
        kind.config()
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(f"quantize={name!r} needs torchao 0.18 on torch 2.11 or newer: {REMEDY} ({error})") from error


def quantize(part: Part, blocks: Sequence[nn.Module], name: str, keep_plain: bool = True) -> Callable[[], None]:
    """Quantise the matrices of a part's repeated blocks. Returns a function that restores the same parameters.

    keep_plain: keep the plain parameters for that function. Without them it does nothing, and a network that was quantised
        to this kind before, without its plain parameters, is left as it is.

    Raises:
        ValueError: the network has adapters (LoRA), no repeated blocks, no layer that is large enough, or weights that are
            quantised already or of a dtype that the kind does not support.
    """
    from streamflow.models.pipe_parts import quantized_kinds

    if not keep_plain and quantized_kinds(part.module) == {name}:
        return lambda: None
    check_no_adapters(part.module, name)
    layers = matrices(part, blocks, name)
    check_weights(layers, name)
    config, held = KINDS[name].config(), sum(layer.weight.nbytes for layer in layers) / 2**20
    with ExitStack() as undo:
        for layer in layers:
            if keep_plain:
                undo.callback(setattr, layer, "weight", layer.weight)
                layer.weight = quantised(layer.weight, config)
            else:
                drop_plain(layer, layer.weight.device, name, config)
        logger.info("%s: %d matrices, %.0f MiB, are quantised to %s", part.name, len(layers), held, name)
        return undo.pop_all().close


def quantize_on(device: torch.device, network: nn.Module, blocks: Sequence[nn.Module], name: str) -> None:
    """Move a network to a device, its blocks' matrices quantised one by one and without their plain parameters. The device
    holds at most one plain matrix at a time. The rows of layers are not counted: modulation is known by its name.

    Raises:
        ValueError, RuntimeError, ImportError: as `require` and `quantize`.
    """
    require(name, device)
    check_no_adapters(network, name)
    layers = [m for key, m in _large(blocks) if not FEW_ROWS.search(key)]
    if not layers:
        raise ValueError(
            f"quantize={name!r} finds no repeated blocks with Linear layers of {FEATURES} or more features in "
            f"{type(network).__name__}: leave it out"
        )
    check_weights(layers, name)
    config, held = KINDS[name].config(), sum(layer.weight.nbytes for layer in layers) / 2**20
    for layer in layers:
        drop_plain(layer, device, name, config)
    nn.Module.to(network, device)
    logger.info("%d matrices, %.0f MiB, are quantised to %s on %s", len(layers), held, name, device)


def drop_plain(layer: nn.Linear, device: torch.device, name: str, config: AOBaseConfig) -> None:
    """Replace the weight of a layer by its quantised form on a device."""
    from streamflow.models.pipe_parts import QUANTIZED

    layer.weight = quantised(nn.Parameter(layer.weight.to(device), requires_grad=False), config)
    vars(layer)[QUANTIZED] = name


def check_no_adapters(network: nn.Module, name: str) -> None:
    """ValueError for a network with adapters (LoRA)."""
    if any(getattr(m, "peft_config", None) for m in network.modules()):
        raise ValueError(
            f"quantize={name!r} does not support a network with adapters (LoRA): fuse_lora() and unload_lora_weights() "
            f"first, or leave it out"
        )


def check_weights(layers: Sequence[nn.Linear], name: str) -> None:
    """ValueError for weights that are quantised already or of a dtype that the kind does not support."""
    if any(is_traceable_wrapper_subclass(layer.weight) for layer in layers):
        raise ValueError(f"quantize={name!r} finds weights that are quantised already: leave it out, or undo that first")
    dtypes = KINDS[name].dtypes
    if wrong := {layer.weight.dtype for layer in layers} - set(dtypes):
        takes = " or ".join(map(str, dtypes))
        raise ValueError(f"quantize={name!r} takes weights in {takes}, and there are some in {wrong.pop()}: cast the pipe")


def quantised(weight: Tensor, config: AOBaseConfig) -> Tensor:
    """The weight quantised by torchao's configuration. The given one is not changed."""
    from torchao.quantization import quantize_

    shell = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    shell.weight = weight
    quantize_(shell, config)
    if shell.weight is weight:
        raise RuntimeError(f"torchao did not quantise a weight of shape {tuple(weight.shape)} with {config}")
    return shell.weight


def matrices(part: Part, blocks: Sequence[nn.Module], name: str) -> list[nn.Linear]:
    """The layers to quantise (see the head of this file). ValueError, with what was found, if there are none."""
    if not blocks:
        raise ValueError(
            f"quantize={name!r} is for transformers, whose weights lie in repeated blocks: {type(part.module).__name__} has "
            f"{_share(part.module):.0%} of its weights in Linear layers and no such blocks; leave it out"
        )
    linears = [m for block in blocks for m in block.modules() if type(m) is nn.Linear]
    large = [m for _, m in _large(blocks)]
    rows = count_rows(part, large)
    chosen = [layer for layer in large if rows.get(layer, 0) >= ROWS]
    if not chosen:
        raise ValueError(
            f"quantize={name!r} finds no Linear layer of {FEATURES} or more features with {ROWS} or more rows: the "
            f"largest of {len(linears)} has {max(map(_least, linears), default=0)}, and {len(large)} are large enough; "
            f"leave it out"
        )
    return chosen


class _Counted(Exception):
    """Ends a call once every layer has had enough rows."""


def count_rows(part: Part, layers: Sequence[nn.Linear]) -> dict[nn.Module, int]:
    """The largest number of rows of each layer's output in one call of the part, without layers that are not called. The
    call, which may draw a video, ends as soon as no layer has fewer than `ROWS`."""
    rows: dict[nn.Module, int] = {}
    few = set(layers)

    def count(layer: nn.Linear, inputs: object, output: Tensor) -> None:
        rows[layer] = max(rows.get(layer, 0), output.numel() // layer.out_features)
        if rows[layer] >= ROWS:
            few.discard(layer)
            if not few:
                raise _Counted

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(count))
        hooks.enter_context(suppress(_Counted))
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # a block that is compiled already calls no hooks
        part.call()
    return rows


def _large(blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers in blocks that have enough features, with their names in their block."""
    for block in blocks:
        for name, m in block.named_modules():
            if type(m) is nn.Linear and _least(m) >= FEATURES and m.in_features % MULTIPLE == m.out_features % MULTIPLE == 0:
                yield name, m


def _least(layer: nn.Linear) -> int:
    return min(layer.in_features, layer.out_features)


def _share(module: nn.Module) -> float:
    """The share of Linear layers in a module's weights."""
    linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    return linear / max(1, sum(p.numel() for p in module.parameters()))
