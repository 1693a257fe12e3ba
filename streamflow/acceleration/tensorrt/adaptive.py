"""A part that runs on an engine if one accepts its inputs, else as the plain module. Other shapes and changed weights start
the build of another engine, which is compared over eight calls and then used."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from streamflow.acceleration import Part, bind_arguments
from streamflow.acceleration.tensorrt.build import Build
from streamflow.acceleration.tensorrt.engine import Trial
from streamflow.acceleration.tensorrt.errors import EngineMismatch
from streamflow.acceleration.tensorrt.options import Profile
from streamflow.acceleration.watch import WeightWatch

logger = logging.getLogger(__name__)

KEPT = 4  # engines of one part, each for another profile
PATIENCE = 2  # calls with the same shapes, outside all profiles, that start a build


class Adaptive(nn.Module):
    """`part.module`, run on engines that fit. `forward` takes the part's inputs by position or name.

    profile_of: gives the profile to build for a part with these inputs.
    start: starts the build of an engine. None: never build another one.
    verify, tolerance_db: compare a new engine over eight calls before it is used.
    """

    def __init__(
        self,
        part: Part,
        profile_of: Callable[[Part], Profile],
        start: Callable[[Part, Profile], Build] | None,
        tolerance_db: float,
        verify: bool = True,
    ):
        super().__init__()
        self.part, self.plain = part, part.module
        self._profile_of, self._start, self._tolerance, self._verify = profile_of, start, tolerance_db, verify
        self._watch = WeightWatch(part.module)
        self._last: tuple[int, tuple] = (0, ())  # how often the last shapes outside all profiles came in a row
        self._engines: list[tuple[Profile, nn.Module]] = []
        self._refused: list[Profile] = []
        self._build: Build | None = None
        self._trial: tuple[Profile, nn.Module, Trial] | None = None

    @property
    def on_engine(self) -> bool:
        """Whether an engine is in use."""
        return bool(self._engines)

    @property
    def building(self) -> bool:
        """Whether another engine is being built or compared."""
        return self._build is not None or self._trial is not None

    def add(self, profile: Profile, engine: nn.Module) -> None:
        """Use this engine. The oldest one is dropped if there are more than `KEPT`."""
        self._engines = [(profile, engine), *self._engines][:KEPT]

    def drop(self) -> None:
        """Drop all engines and cancel the build."""
        if self._build is not None:
            self._build.cancel()
        self._engines, self._refused, self._build, self._trial = [], [], None, None

    def close(self) -> None:
        """Drop all engines and build no more: later calls run the plain module."""
        self.drop()
        self._start = None

    @torch.no_grad()
    def forward(self, *positional: Tensor, **keyword: Tensor | None) -> Tensor:
        if self._watch.changed():
            self._watch.renew()
            logger.info("%s: weights or adapters changed, running the plain module until an engine is built", self.part.name)
            self.drop()
        inputs = bind_arguments(self.part.inputs, positional, keyword)
        if self._build is not None and self._build.ready:
            self._collect()
        for profile, engine in self._engines:
            if profile.fits(inputs):
                return engine(**inputs)
        output = self.plain(**inputs)
        self._compare(inputs, output)
        self._consider(inputs)
        return output

    def _consider(self, inputs: Mapping[str, Tensor]) -> None:
        """Start a build for these inputs if no engine accepts them and they have come `PATIENCE` times."""
        known = [*self._refused, *(profile for profile, _ in self._engines)]
        if self._start is None or self.building or any(profile.fits(inputs) for profile in known):
            return
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        count, last = self._last
        self._last = (count + 1 if shapes == last else 1, shapes)
        if self._last[0] < PATIENCE:
            return
        part = dataclasses.replace(self.part, inputs={name: value.detach().clone() for name, value in inputs.items()})
        profile = self._profile_of(part)
        logger.info("%s: no engine for %s, building one in a child process", part.name, dict(shapes))
        try:
            self._build = self._start(part, profile)
        except RuntimeError as error:
            self._refuse(profile, error)

    def _collect(self) -> None:
        """Take the engine of a finished build, or log why there is none."""
        build, self._build = self._build, None
        try:
            engine = build.result()
        except (RuntimeError, ImportError, OSError) as error:
            self._refuse(build.profile, error)
            return
        logger.info("%s: engine ready after %.1f s", self.part.name, build.seconds)
        if self._verify:
            self._trial = (build.profile, engine, Trial(self.part.name, self._tolerance))
        else:
            self.add(build.profile, engine)

    def _compare(self, inputs: Mapping[str, Tensor], output: Tensor) -> None:
        """Compare a new engine in this call. After the last comparison it is used or refused."""
        if self._trial is None or not self._trial[0].fits(inputs):
            return
        profile, engine, trial = self._trial
        trial.add(engine(**inputs), output)
        if not trial.done:
            return
        self._trial = None
        try:
            worst = trial.verdict()
        except EngineMismatch as error:
            self._refuse(profile, error)
            return
        logger.info("%s: swapped in, PSNR %.1f dB or more in %d calls", self.part.name, worst, trial.calls)
        self.add(profile, engine)

    def _refuse(self, profile: Profile, error: Exception) -> None:
        logger.warning("%s: no new engine, running the plain module: %s", self.part.name, error)
        self._refused.append(profile)
