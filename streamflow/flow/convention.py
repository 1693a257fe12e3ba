"""The one convention of this library, as pure maths on tensors. It has no models, schedules or devices.

sigma is in [0, 1]: 1 is noise, 0 is the image. The path and its velocity are

    x_sigma = (1 - sigma) x0 + sigma noise            v = dx / dsigma = noise - x0

(Liu et al., Flow Straight and Fast, arXiv 2209.03003, with time run backwards; Esser et al., arXiv 2403.03206, section 2).
Everywhere x, v, noise and x0 are `[rows, ...]` and a sigma is a float32 tensor `[rows]` or `[rows, 1, ...]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """Reshape `value` `[rows]` to `[rows, 1, ..., 1]`, so that it multiplies each row of `like`."""
    return value.reshape(-1, *([1] * (like.ndim - 1)))


def times(value: Tensor, scale: Tensor) -> Tensor:
    """`value` `[rows, ...]` times float32 `scale` `[rows]`, in value's dtype: the same bits as with a number."""
    return (value * per_row(scale, value)).to(value.dtype)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x0 at noise level sigma: `(1 - sigma) x0 + sigma noise`, in x0's dtype.

    sigma is rounded to that dtype first, as FlowMatchEulerDiscreteScheduler.scale_noise does.
    """
    s = per_row(sigma, x0).to(x0.dtype)
    return s * noise + (1.0 - s) * x0


def euler(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    """One Euler step of the flow, `x + dt v` with `dt = sigma_next - sigma`, in v's dtype.

    The sum is taken in float32 and dt is rounded to v's dtype before the product. Both are what
    FlowMatchEulerDiscreteScheduler.step does by type promotion, and so the result is the same to the bit.
    """
    return (x.float() + per_row(dt, v).to(v.dtype) * v).to(v.dtype)


def predict_x0(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The image on the straight line through x with velocity v: `x - sigma v`, in float32."""
    return x.float() - per_row(sigma, v).to(v.dtype) * v


def renoise(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """The stochastic step: predict x0, then put `noise` back to the level sigma_next, in v's dtype.

    It is FlowMatchEulerDiscreteScheduler's `stochastic_sampling` rule with the caller's own noise.
    """
    s = per_row(sigma_next, v)
    return ((1.0 - s) * predict_x0(x, v, sigma) + s * noise.float()).to(v.dtype)


def velocity_from(x: Tensor, anchor: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of the straight line that leads from x to `anchor` (an x0): `(x - anchor) / sigma`, in float32."""
    return (x.float() - anchor) / per_row(sigma, x)


def guide(v_cond: Tensor, v_uncond: Tensor, w: float, rows: Tensor | None = None) -> Tensor:
    """Classifier-free guidance `v_uncond + w (v_cond - v_uncond)` if w > 1, else v_cond.

    It is the pipelines' own expression, so a half-precision result equals theirs to the bit. `rows`, bool `[rows]`, says
    which rows are guided; None: all of them.
    """
    if w <= 1.0:
        return v_cond
    guided = v_uncond + w * (v_cond - v_uncond)
    return guided if rows is None else torch.where(per_row(rows, v_cond), guided, v_cond)
