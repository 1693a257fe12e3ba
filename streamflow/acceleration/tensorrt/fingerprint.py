"""What a module is, as a hash: all that could change an engine's bytes. The weights by their bytes, adapters (LoRA) being
among them; the rest by what Python holds: classes, settings, adapter strengths, sizes that a function closes over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from streamflow._version import __version__

DIGEST = 20  # bytes
THREADS = 4  # hashing lets go of the interpreter's lock
_VERSIONS = ("torch", "diffusers", "onnx", "onnxscript")
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.Size)
_OF_NN_MODULE = frozenset(vars(nn.Module())) - {"training"}


def digest(*pieces: bytes) -> str:
    """The hash of some bytes, in hex."""
    made = hashlib.blake2b(digest_size=DIGEST)
    for piece in pieces:
        made.update(piece)
    return made.hexdigest()


def weights(module: nn.Module) -> str:
    """The hash of names, dtypes, shapes and bytes of all that `state_dict` holds, and of buffers that it leaves out."""
    tensors = {**dict(module.named_buffers()), **module.state_dict()}
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(_tensor, tensors.items()))
    return digest("\n".join(sorted(parts)).encode())


def _tensor(item: tuple[str, Any]) -> str:
    name, value = item
    if not isinstance(value, Tensor):
        return f"{name} {value!r}"
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{name} {value.dtype} {list(value.shape)} {digest(memoryview(flat.numpy()))}"


def structure(module: nn.Module) -> str:
    """The hash of everything else: every submodule's class, its forward's code and its plain attributes."""
    lines = []
    for name, child in module.named_modules():
        held = {key: value for key, value in vars(child).items() if key not in _OF_NN_MODULE}
        lines.append(f"{name} {_class(child)} {_code(type(child).forward)} {plain(held)}")
    return digest("\n".join(lines).encode())


def versions() -> dict[str, str]:
    """Of what exports: this package and those under it."""
    found = {"streamflow": __version__}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def plain(value: Any, depth: int = 4) -> str:
    """A value without addresses, the same in every process: plain ones as they are, functions by code and closure, others
    by class."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return f"tensor {_tensor(('', value))}"
    if depth and isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {plain(item, depth - 1)}' for key, item in value.items()))}}}"
    if depth and isinstance(value, (list, tuple)):
        return f"[{', '.join(plain(item, depth - 1) for item in value)}]"
    if depth and isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(plain(item, depth - 1) for item in value))}}}"
    if hasattr(value, "func") and hasattr(value, "keywords") and depth:  # functools.partial
        return f"partial {plain([value.func, value.args, value.keywords], depth - 1)}"
    if hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        return f"{value.__qualname__} {_code(value)} {plain(cells, depth - 1) if depth else ''}"
    return _class(value)


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _code(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    constants = [constant for constant in code.co_consts if isinstance(constant, _PLAIN)]
    return digest(code.co_code, repr((constants, code.co_names)).encode())


def key(facts: Mapping[str, Any]) -> str:
    """The hash of facts, as JSON with sorted names."""
    return digest(json.dumps(facts, sort_keys=True).encode())
