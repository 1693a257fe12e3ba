"""A schedule of noise levels, and the stages that a stream picks from it. Nothing here derives a schedule:
it is read off a pipeline's own scheduler (`streamflow.models.probe`) or given by a family's adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamflow._validation import is_whole_number

logger = logging.getLogger(__name__)
ROUNDING = 1e-5  # by how much a scheduler's float32 arithmetic may leave the first sigma above 1


def check_indices(t_index_list: Sequence[int], steps: int | None = None) -> tuple[int, ...]:
    """Return `t_index_list` as an increasing tuple, or raise with the numbers: integers, at least one, each once, not
    negative and, where `steps` is known, below it. A list in another order is sorted, which is logged: a frame goes from the
    noisiest step to the last.

    Raises:
        TypeError: an entry is no integer, or the whole is no sequence.
        ValueError: empty, repeated or out of range.
    """
    if isinstance(t_index_list, str) or not isinstance(t_index_list, Sequence):
        raise TypeError(f"t_index_list must be a sequence of integers such as [0, 16, 32, 45], not {t_index_list!r}")
    wrong = [t for t in t_index_list if not is_whole_number(t)]
    if wrong:
        raise TypeError(f"t_index_list holds {wrong[0]!r}, which is no integer: it indexes the schedule's steps")
    indices = tuple(int(t) for t in t_index_list)
    if not indices:
        raise ValueError("t_index_list is empty: name at least one step, such as [0]")
    if len(set(indices)) < len(indices):
        raise ValueError(f"t_index_list {list(indices)} must name each step once: {sorted(set(indices))} would do")
    if list(indices) != sorted(indices):
        logger.info("t_index_list %s is taken in the order of the steps: %s", list(indices), sorted(indices))
        indices = tuple(sorted(indices))
    if indices[0] < 0:
        raise ValueError(f"t_index_list starts at {indices[0]}: steps are counted from 0, the noisiest")
    if steps is not None and indices[-1] >= steps:
        raise ValueError(
            f"t_index_list ends at {indices[-1]}, but the schedule has {steps} steps, 0 to {steps - 1}: "
            f"raise num_inference_steps or lower the index"
        )
    return indices


@dataclass(frozen=True)
class Stages:
    """The noise levels a stream stops at. `indices` are steps of the schedule they came from; `timesteps`, `sigmas`
    and `sigmas_next` are float32 `[S]`, and a row at stage i goes from sigmas[i] to sigmas_next[i]; the last to 0.
    `coefficients`: what the step's rule needs besides, `[S]` by name."""

    indices: tuple[int, ...]
    timesteps: Tensor
    sigmas: Tensor
    sigmas_next: Tensor
    coefficients: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def same_levels(self, other: Stages) -> bool:
        """Whether both have the same noise levels and the same times of the network."""
        mine, others = ((s.sigmas, s.timesteps, *s.coefficients.values()) for s in (self, other))
        return self.coefficients.keys() == other.coefficients.keys() and all(map(torch.equal, mine, others))


@dataclass(frozen=True)
class Schedule:
    """`timesteps` `[N]`, what the pipeline hands its network; `sigmas` `[N + 1]`, strictly falling from at most 1, to within
    rounding, to 0. Both float32 on the CPU. They are two lists since in some families the one is not 1000 times the other.

    coefficients: what the family's rule (`solvers`) needs of every step, `[N]` by name. windows: the steps at which
    a new piece of a piecewise straight flow starts, which no `t_index_list` may leave out."""

    timesteps: Tensor
    sigmas: Tensor
    coefficients: Mapping[str, Tensor] = field(default_factory=dict)
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sigmas.ndim != 1 or self.timesteps.shape != (len(self.sigmas) - 1,):
            raise ValueError(
                f"a schedule of {len(self.timesteps)} timesteps needs one sigma more, not {tuple(self.sigmas.shape)}"
            )
        falls = bool((self.sigmas.diff() < 0).all())
        starts = self.sigmas[0] <= 1 + ROUNDING
        if not (torch.isfinite(self.sigmas).all() and falls and self.sigmas[-1] == 0 and starts):
            raise ValueError(
                f"sigmas must fall strictly from at most 1 (noise) to 0 (image), not {self.sigmas.tolist()}: "
                f"pass other `sigmas`, or a scheduler with such a schedule"
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    def pick(self, t_index_list: Sequence[int]) -> Stages:
        """The stages at these steps: Euler on the sub-grid, the last stage going to sigma 0.

        Raises:
            ValueError: a step that is none, or a window's start left out, with its number.
        """
        indices = list(check_indices(t_index_list, len(self)))
        self._check_windows(indices)
        sigmas = self.sigmas[indices]
        sigmas_next = torch.cat((sigmas[1:], self.sigmas[-1:]))
        coefficients = {name: values[indices] for name, values in self.coefficients.items()}
        return Stages(tuple(indices), self.timesteps[indices], sigmas, sigmas_next, coefficients)

    def _check_windows(self, indices: list[int]) -> None:
        left_out = [start for start in self.windows if start > indices[0] and start not in indices]
        if left_out:
            raise ValueError(
                f"t_index_list {indices} leaves out {left_out}, where a window of this flow starts: it is straight only "
                f"inside a window, so keep them, {sorted({*indices, *left_out})}"
            )
