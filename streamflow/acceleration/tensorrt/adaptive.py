"""A part that runs on an engine if one accepts its inputs, else as the plain module. Other shapes and changed weights start
the build of another engine, which is compared over eight calls and then used."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from streamflow.acceleration import Part, bind_arguments
from streamflow.acceleration.tensorrt.build import Build
from streamflow.acceleration.tensorrt.engine import Trial
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
        self._last: tuple[int, dict] = (0, {})  # how often the last shapes outside all profiles came in a row
        self._engines: list[tuple[Profile, nn.Module]] = []
        self._refused: list[Profile] = []
        self._build: Build | None = None  # until its engine is in use or refused
        self._trial: tuple[nn.Module, Trial] | None = None

    @property
    def on_engine(self) -> bool:
        """Whether an engine is in use."""
        return bool(self._engines)

    @property
    def building(self) -> bool:
        """Whether another engine is being built or compared."""
        return self._build is not None

    def add(self, profile: Profile, engine: nn.Module) -> None:
        """Use this engine. The oldest one is dropped if there are more than `KEPT`."""
        self._engines = [(profile, engine), *self._engines][:KEPT]
        self._build = self._trial = None

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
        for profile, engine in self._engines:
            if profile.fits(inputs):
                return engine(**inputs)
        output = self.plain(**inputs)
        try:
            if self._build is None:
                self._consider(inputs)
            else:
                self._advance(self._build, inputs, output)
        except (RuntimeError, ImportError, OSError) as error:  # the stream goes on, whatever stops an engine
            logger.warning("%s: no new engine, running the plain module: %s", self.part.name, error)
            if self._build is not None:
                self._refused.append(self._build.profile)
            self._build = self._trial = None
        return output

    def _consider(self, inputs: Mapping[str, Tensor]) -> None:
        """Start a build if these inputs have come `PATIENCE` times and no engine for them has been refused."""
        if self._start is None or any(profile.fits(inputs) for profile in self._refused):
            return
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        count, last = self._last
        self._last = (count + 1 if shapes == last else 1, shapes)
        if self._last[0] < PATIENCE:
            return
        part = dataclasses.replace(self.part, inputs={name: value.detach().clone() for name, value in inputs.items()})
        logger.info("%s: no engine for %s, building one in a child process", part.name, shapes)
        self._build = self._start(part, self._profile_of(part))

    def _advance(self, build: Build, inputs: Mapping[str, Tensor], output: Tensor) -> None:
        """Collect a finished build, or compare its engine in this call. Raises what stops the new engine."""
        if self._trial is None and build.done():
            engine = build.result()
            logger.info("%s: engine ready after %.1f s", self.part.name, time.perf_counter() - build.began)
            if not self._verify:
                self.add(build.profile, engine)
                return
            self._trial = engine, Trial(self.part.name, self._tolerance)
        if self._trial is not None and build.profile.fits(inputs):
            engine, trial = self._trial
            trial.add(engine(**inputs), output)
            if trial.done:
                worst = trial.verdict()
                logger.info("%s: swapped in, PSNR %.1f dB or more in %d calls", self.part.name, worst, trial.calls)
                self.add(build.profile, engine)
