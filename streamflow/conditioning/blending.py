"""Several prompts as one, at run time: weighted lists, linear and spherical blends of encoded prompts, and a bounded cache.
It handles conds and numbers, not text encoders or families."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamflow.conditioning.prompt import Cond

Weighted = tuple[tuple[Any, float], ...]
Result = TypeVar("Result")
ROUNDS = 8  # of the spherical mean: rounding is reached in fewer for directions within a right angle
TINY = 1e-12


def as_weighted(name: str, value: object, kind: type, what: str) -> Any:
    """`value` itself, or a list of (thing, weight) pairs as a checked tuple.

    Raises:
        TypeError: an entry that is no pair, a thing of another kind, a weight that is no number. ValueError: an empty list,
            a weight that is negative or not finite, weights that are all zero.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if not value:
        raise ValueError(f"{name} is an empty list: give at least one ({what}, weight)")
    for one in value:
        if not isinstance(one, (list, tuple)) or len(one) != 2 or not isinstance(one[0], kind) or isinstance(one[0], bool):
            raise TypeError(f"{name} as a list holds pairs such as ({what}, 0.5), not {one!r}")
    pairs = tuple((thing, weight) for thing, weight in value)
    check_weights(name, [weight for _, weight in pairs])
    return pairs


def check_weights(name: str, weights: Sequence[Any]) -> None:
    """TypeError or ValueError unless these are numbers of 0 or more, not all 0."""
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"a weight of {name} must be a number, not {weight!r}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"a weight of {name} must be finite and not negative, not {weight}")
    if sum(weights) == 0:
        raise ValueError(f"the weights of {name} sum to 0: nothing would be left")


def check_sum(name: str, weighted: object) -> None:
    """ValueError where there are weights that do not sum to 1, within a thousandth."""
    total = sum(weight for _, weight in weighted) if isinstance(weighted, tuple) else 1.0
    if not math.isclose(total, 1.0, rel_tol=0.0, abs_tol=1e-3):
        raise ValueError(
            f"the weights of {name} sum to {total:.6g}, not to 1: with normalize=True they are divided by their sum"
        )


def with_weights(name: str, weighted: object, weights: Sequence[float]) -> Weighted:
    """The same things under other weights. ValueError where their numbers differ, or there is no list."""
    if not isinstance(weighted, tuple):
        raise ValueError(f"{name} is one text, so there are no weights to change: pass {name}=[(text, weight), ...]")
    if not isinstance(weights, Sequence) or len(weights) != len(weighted):
        raise ValueError(f"{name} has {len(weighted)} texts, and the weights are {weights!r}: give one for each")
    check_weights(name, weights)
    return tuple((text, weight) for (text, _), weight in zip(weighted, weights, strict=True))


def parts(value: object) -> Weighted:
    """A weighted list, or one thing at weight 1."""
    return value if isinstance(value, tuple) else ((value, 1.0),)


def shares(weighted: Weighted, normalize: bool) -> list[float]:
    """The weights, which sum to 1 where they are normalised."""
    weights = [float(weight) for _, weight in weighted]
    total = sum(weights) if normalize else 1.0
    return [weight / total for weight in weights]


# -- blends ---------------------------------------------------------------------------------------------------------------


def blend(conds: Sequence[Cond], weights: Sequence[float], method: str, names: Collection[str]) -> Cond:
    """One cond of several: the tensors of these names blended by `METHODS[method]`, the others the first one's.

    Texts of other lengths are blended token by token. A token that only some texts have is blended among these, with weights
    scaled to the sum of all weights. A mask is the union of all masks. Position ids are the longest text's. Texts of weight
    0 are left out.
    """
    conds, weights = zip(*((cond, w) for cond, w in zip(conds, weights, strict=True) if w), strict=True)
    if len(conds) == 1 and weights[0] == 1.0:
        return conds[0]
    rows = {}
    for name, first in conds[0].rows.items():
        values = [cond.rows[name] for cond in conds]
        if "mask" in name and first.ndim > 1:
            rows[name] = _union(values)
        elif name in names:
            rows[name] = _blended(
                values, [_mask(cond, value) for cond, value in zip(conds, values, strict=True)], weights, method
            )
        else:
            rows[name] = first
    longest = max(conds, key=lambda cond: sum(t.numel() for t in cond.shared.values()))
    return Cond(rows, longest.shared)


def _mask(cond: Cond, value: Tensor) -> Tensor | None:
    """The mask of a text's tokens, `[1, tokens]`, or None. A mask may be longer, where it covers image tokens too."""
    if value.ndim < 3:
        return None
    tokens = value.shape[1]
    masks = [one for name, one in cond.rows.items() if "mask" in name and one.ndim == 2 and one.shape[1] >= tokens]
    return masks[0][:, :tokens] if masks else None


def _union(masks: Sequence[Tensor]) -> Tensor:
    length = max(mask.shape[-1] for mask in masks)
    return torch.stack([pad(mask, (0, length - mask.shape[-1])) for mask in masks]).amax(0)


def _blended(values: Sequence[Tensor], masks: Sequence[Tensor | None], weights: Sequence[float], method: str) -> Tensor:
    """Floating tensors `[1, ...]` or `[1, tokens, width]`, computed in float32."""
    like = values[0]
    w = torch.tensor(weights, dtype=torch.float32, device="cpu").to(like.device, non_blocking=True)
    if all(value.shape == like.shape for value in values) and all(mask is None for mask in masks):
        share = w.reshape(-1, *([1] * like.ndim)).expand(-1, *like.shape[:-1], 1)
        return METHODS[method](torch.stack([value.float() for value in values]), share).to(like.dtype)
    length = max(value.shape[1] for value in values)
    tokens = torch.stack([pad(value.float(), (0, 0, 0, length - value.shape[1])) for value in values])
    present = torch.stack([_present(value, mask, length) for value, mask in zip(values, masks, strict=True)])
    share = w.reshape(-1, 1, 1) * present
    share = share * (w.sum() / share.sum(0).clamp(min=TINY))
    return METHODS[method](tokens, share.unsqueeze(-1)).to(like.dtype)


def _present(value: Tensor, mask: Tensor | None, length: int) -> Tensor:
    own = torch.ones(value.shape[:2], device=value.device) if mask is None else mask.float()
    return pad(own, (0, length - own.shape[1]))


def linear(values: Tensor, share: Tensor) -> Tensor:
    """`sum_i w_i v_i` of values `[n, ..., width]`, share `[n, ..., 1]`."""
    return (share * values).sum(0)


def spherical(values: Tensor, share: Tensor) -> Tensor:
    """The weighted mean of directions on the sphere, at the weighted mean of lengths; of two it is their slerp. It does not
    depend on the order: q is moved by `exp_q(sum_i w_i log_q(u_i))` until it rests (Buss and Fillmore, Spherical Averages
    and Applications to Spherical Splines and Interpolation, 2001, algorithm A1), with weights that sum to 1."""
    total = share.sum(0)
    share = share / total.clamp(min=TINY)
    lengths = values.norm(dim=-1, keepdim=True)
    u = values / lengths.clamp(min=TINY)
    q = _unit((share * u).sum(0))
    for _ in range(ROUNDS):
        cosine = (u * q).sum(-1, keepdim=True).clamp(-1, 1)
        tangent = u - cosine * q
        angle = torch.atan2(tangent.norm(dim=-1, keepdim=True), cosine)
        step = (share * angle * _unit(tangent)).sum(0)
        far = step.norm(dim=-1, keepdim=True)
        q = _unit(torch.cos(far) * q + torch.sin(far) * _unit(step))
    return total * (share * lengths).sum(0) * q


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp(min=TINY)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear": linear, "slerp": spherical}


# -- the cache ------------------------------------------------------------------------------------------------------------


class Cache:
    """The last `size` results by key. A result for a key without a hash is not kept."""

    def __init__(self, size: int = 64):
        self.size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: object, make: Callable[[], Result]) -> Result:
        """The result that is kept under the key, or a new one by `make`, which is then kept."""
        try:
            hash(key)
        except TypeError:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Drop all results."""
        self._kept.clear()
