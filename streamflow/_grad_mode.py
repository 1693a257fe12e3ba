"""How a stream computes: without gradients, and on ordinary tensors also where its caller is in `torch.inference_mode`,
since an inference tensor that is kept could not be written into by a later call outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)


def computing(function: F) -> F:
    """The function or generator without gradients and outside of inference mode."""
    return torch.inference_mode(False)(torch.no_grad()(function))
