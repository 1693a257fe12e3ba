"""FlashAttention 3 and 4 for networks whose attention processors call torch's `scaled_dot_product_attention` or diffusers'
dispatcher: `attention="fa3"`, `"fa3-fp8"` or `"fa4"`. Attention without a mask only.

The kernels are called by one torch operator with a fake implementation, so they work under torch.compile and in CUDA
graphs. A processor gets a subclass with the same code, in whose globals the two functions are replaced by `attend`. Only the
network that is accelerated changes, not torch or diffusers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
NAMES = {"dispatch_attention_fn", "scaled_dot_product_attention"}  # one of these is called by a processor's `__call__`
Attention = Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A library of attention.

    load: imports the library and returns its attention: (q, k, v, scale, causal) to the output, all `[batch, tokens, heads,
    features]`. package: the name to import. extra: of StreamFlow, with the library. majors: of the compute capabilities of
    GPUs that it supports. dtypes: of its inputs. fp8: q, k and v are rounded to eight bits, without scales: larger values
    are clamped to 448. Their range is small, since queries and keys are normalized in most transformers.
    """

    load: Callable[[], Attention]
    package: str
    extra: str
    majors: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    fp8: bool = False


@cache
def _fa3() -> Attention:
    import_module("fa3_fwd._C")
    kernel = torch.ops.fa3_fwd.fwd.default
    return lambda q, k, v, scale, causal: kernel(q, k, v, softmax_scale=scale, is_causal=causal, num_splits=1)[0]


@cache
def _fa4() -> Attention:
    kernel = import_module("flash_attn.cute").flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out = kernel(q, k, v, softmax_scale=scale, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return attention


HALVES = (torch.bfloat16, torch.float16)
KERNELS = {
    "fa3": Kernel(_fa3, "fa3_fwd", "fa3", (9,), (torch.bfloat16,)),
    "fa3-fp8": Kernel(_fa3, "fa3_fwd", "fa3", (9,), (torch.bfloat16,), fp8=True),
    "fa4": Kernel(_fa4, "flash_attn.cute", "fa4", (9, 10, 11), HALVES),
}


@torch.library.custom_op("streamflow::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, name: str) -> Tensor:
    """Attention by the kernel of this name: `[batch, tokens, heads, features]`, in bfloat16 for inputs of eight bits."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return KERNELS[name].load()(q, k, v, scale, causal)


@flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, name: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.bfloat16 if q.dtype == FP8 else q.dtype)


def require(name: str, device: torch.device) -> None:
    """RuntimeError: this GPU does not support the kernel. ImportError: its library is missing."""
    kernel = KERNELS[name]
    if device.type != "cuda" or (torch.cuda.get_device_capability(device)[0] not in kernel.majors):
        found = device
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            found = f"{torch.cuda.get_device_name(device)}, which has {major}.{minor}"
        needed = " or ".join(f"{major}.x" for major in kernel.majors)
        raise RuntimeError(
            f"attention={name!r} needs a GPU of compute capability {needed}, not {found}: choose another, or leave it out"
        )
    remedy = f'attention={name!r} needs {kernel.package}: pip install "streamflow-rf[{kernel.extra}]"'
    if find_spec(kernel.package.partition(".")[0]) is None:
        raise ImportError(remedy)
    try:
        kernel.load()
    except (ImportError, OSError, AttributeError) as error:
        raise ImportError(f"{remedy} ({error})") from error


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: object = None,
    parallel_config: object = None,
) -> Tensor:
    """Attention by a kernel, with the arguments and the layout of diffusers' `dispatch_attention_fn`.

    ValueError: a mask, dropout or a distributed network. TypeError: a dtype that the kernel does not support."""
    kernel = KERNELS[name]
    if attn_mask is not None or dropout_p or parallel_config is not None:
        raise ValueError(f"attention={name!r} takes no mask, no dropout and no parallel_config: leave it out")
    if query.dtype not in kernel.dtypes:
        needed = " or ".join(map(str, kernel.dtypes))
        raise TypeError(f"attention={name!r} takes {needed}, not {query.dtype}: leave it out")
    rows = query, key, value
    if kernel.fp8:
        rows = tuple(x.clamp(-FP8_MAX, FP8_MAX).to(FP8) for x in rows)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return flash_attention(*rows, scale, is_causal, name).to(query.dtype)


def attend_by_heads(name: str, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`attend` with the layout of torch's `scaled_dot_product_attention`, `[batch, heads, tokens, features]`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(name, q, k, v, *args, **kwargs).transpose(1, 2)


def use_kernel(processors: Sequence[Any], name: str) -> Callable[[], None]:
    """Let these attention processors call a kernel. Returns a function that restores their classes.

    ValueError: a processor calls neither of the two functions itself."""
    classes = {id(processor): type(processor) for processor in processors}
    for kind in set(classes.values()):
        if not NAMES & set(getattr(kind.__call__, "__code__", _NO_CODE).co_names):
            raise ValueError(
                f"attention={name!r} does not know the attention of {kind.__name__}, which calls neither "
                f"{' nor '.join(sorted(NAMES))}: leave it out"
            )
    with ExitStack() as undo:
        for processor in processors:
            undo.callback(setattr, processor, "__class__", classes[id(processor)])
            processor.__class__ = _with_kernel(classes[id(processor)], name)
        return undo.pop_all().close


_NO_CODE = compile("", "", "exec")


@cache
def _with_kernel(kind: type, name: str) -> type:
    """The subclass of a processor's class that calls the kernel."""
    plain: Any = kind.__call__
    names = _globals_with_kernel(plain.__module__, name)
    call = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    call.__kwdefaults__ = plain.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@cache
def _globals_with_kernel(module: str, name: str) -> dict[str, Any]:
    """The globals of a module of attention processors in which the kernel takes the place of both functions. They belong to
    a module of their own in `sys.modules`, since torch.compile finds globals by the name of their module."""
    twin = _twin(sys.modules[module], f"{module}.streamflow_{name.replace('-', '_')}")
    functional = _twin(torch.nn.functional, f"{twin.__name__}.functional")
    vars(functional)["scaled_dot_product_attention"] = partial(attend_by_heads, name)
    vars(twin).update(F=functional, dispatch_attention_fn=partial(attend, name))
    return vars(twin)


def _twin(module: ModuleType, name: str) -> ModuleType:
    """A copy of a module's globals as another module."""
    sys.modules[name] = twin = ModuleType(name)
    vars(twin).update({key: value for key, value in vars(module).items() if key != "__name__"})
    return twin
