"""What shapes an engine takes: for every input a smallest, a best and a largest one. Plain geometry; knows no TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt.errors import OutsideProfile
from streamflow.acceleration.tensorrt.options import Options

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """One input's shapes."""

    smallest: Shape
    best: Shape
    largest: Shape

    @property
    def free(self) -> tuple[int, ...]:
        """The dimensions that vary."""
        return tuple(i for i, (a, b) in enumerate(zip(self.smallest, self.largest, strict=True)) if a != b)

    def holds(self, shape: Shape) -> bool:
        """Whether every side of a shape is within."""
        return len(shape) == len(self.best) and all(
            a <= n <= b for a, n, b in zip(self.smallest, shape, self.largest, strict=True)
        )


@dataclass(frozen=True)
class Profile:
    """The ranges of a part's inputs, in their order."""

    part: str
    ranges: Mapping[str, Range]

    def fits(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether an engine of this profile takes these inputs."""
        return inputs.keys() == self.ranges.keys() and all(
            self.ranges[name].holds(tuple(value.shape)) for name, value in inputs.items()
        )

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """OutsideProfile for the first input that does not fit, with the numbers."""
        if inputs.keys() != self.ranges.keys():
            raise self._outside(f"inputs {', '.join(inputs)} given, {', '.join(self.ranges)} built for")
        for name, value in inputs.items():
            r = self.ranges[name]
            if not r.holds(tuple(value.shape)):
                raise self._outside(f"{name} is {list(value.shape)}, built for {list(r.smallest)} to {list(r.largest)}")

    def _outside(self, what: str) -> OutsideProfile:
        remedy = "give min_batch, max_batch, min_height, ... to accelerate('tensorrt') that hold these shapes"
        return OutsideProfile(self.part, "running", what, remedy)

    def as_json(self) -> dict[str, list[list[int]]]:
        """For the cache's readable record: name to [smallest, best, largest]."""
        return {name: [list(r.smallest), list(r.best), list(r.largest)] for name, r in self.ranges.items()}


def profile_of(part: Part, options: Options, units: tuple[int, int] = (1, 1)) -> Profile:
    """The profile that a part and options ask for. What the part's own inputs are is always within.

    units: how many pixels high and wide one step of the part's first input is (a latent: 8); the options count in pixels.
        ValueError where a size is no multiple of it.
    """
    ranges = {}
    for i, (name, value) in enumerate(part.inputs.items()):
        best = tuple(value.shape)
        smallest, largest = list(best), list(best)
        if name not in part.shared:
            smallest[0], largest[0] = _span(best[0], options.min_batch, options.max_batch)
        if i == 0 and part.free_size:
            best = _sizes(part, options, units, best, smallest, largest)
        ranges[name] = Range(tuple(smallest), best, tuple(largest))
    return Profile(part.name, ranges)


def _span(n: int, low: int | None, high: int | None) -> tuple[int, int]:
    return min(n, low or n), max(n, high or n)


def _sizes(
    part: Part, options: Options, units: tuple[int, int], best: Shape, smallest: list[int], largest: list[int]
) -> Shape:
    """Write the smallest and largest height and width, and return the best shape."""
    tuned = list(best)
    for axis, side, unit in ((-2, "height", units[0]), (-1, "width", units[1])):
        given = {kind: _in_units(part, getattr(options, f"{kind}_{side}"), unit) for kind in ("min", "opt", "max")}
        smallest[axis], largest[axis] = _span(best[axis], given["min"] or given["opt"], given["max"] or given["opt"])
        tuned[axis] = given["opt"] or best[axis]
    return tuple(tuned)


def _in_units(part: Part, pixels: int | None, unit: int) -> int | None:
    if pixels is not None and pixels % unit:
        raise ValueError(f"sizes of the {part.name} must be multiples of {unit} pixels, not {pixels}")
    return pixels and pixels // unit
