"""A part that runs on engines while they fit and plainly while they do not. Where shapes leave every engine's profile, or
weights or adapters change, another engine is built beside the stream, compared during eight ticks and then swapped in.
Knows modules and profiles; what an engine is, and how it is made, is handed in."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from streamflow.acceleration import Part
from streamflow.acceleration.tensorrt.background import Build
from streamflow.acceleration.tensorrt.check import Trial
from streamflow.acceleration.tensorrt.engine import named
from streamflow.acceleration.tensorrt.errors import EngineMismatch
from streamflow.acceleration.tensorrt.profile import Profile
from streamflow.acceleration.watch import Baked

logger = logging.getLogger(__name__)

KEPT = 4  # engines of one part, for as many profiles
PATIENCE = 2  # calls outside of all profiles before a build: one odd call is not worth one

Start = Callable[[Part, Profile], Build]


class Adaptive(nn.Module):
    """`part.module`, run on engines where they fit. `forward` takes the part's inputs by position or name.

    profile_of: the profile to build for a part with these inputs.
    start: begins a build of an engine; None: never build another one.
    verify, tolerance_db: compare a new engine during eight ticks before it is used.
    """

    def __init__(
        self,
        part: Part,
        profile_of: Callable[[Part], Profile],
        start: Start | None,
        tolerance_db: float,
        verify: bool = True,
    ):
        super().__init__()
        self.plain = part.module
        self.part = part
        self._profile_of, self._start, self._tolerance, self._verify = profile_of, start, tolerance_db, verify
        self._watch = Baked(part.module)
        self._engines: list[tuple[Profile, nn.Module]] = []
        self._build: Build | None = None
        self._trial: tuple[Profile, nn.Module, Trial] | None = None
        self._refused: list[Profile] = []
        self._outside: tuple[int, tuple] = (0, ())

    @property
    def on_engine(self) -> bool:
        """Whether there is an engine in use."""
        return bool(self._engines)

    @property
    def building(self) -> bool:
        """Whether another engine is on its way, in a child process or in comparison."""
        return self._build is not None or self._trial is not None

    def add(self, profile: Profile, engine: nn.Module) -> None:
        """Use this engine, in place of the oldest where there are too many."""
        self._engines = [(profile, engine), *self._engines][:KEPT]

    def close(self) -> None:
        """Drop all engines and stop what is being built; calls run plainly from then on, and start nothing."""
        self._forget()
        self._start = None

    @torch.no_grad()
    def forward(self, *positional: Tensor, **given: Tensor | None) -> Tensor:
        if self._watch.changed():
            self._watch.renew()
            logger.info("%s: weights or adapters changed, running plainly until a new engine is there", self.part.name)
            self._forget()
        inputs = named(self.part.inputs, positional, given)
        if self._build is not None and self._build.ready:
            self._take()
        for profile, engine in self._engines:
            if profile.fits(inputs):
                return engine(**inputs)
        out = self.plain(**inputs)
        self._compare(inputs, out)
        self._consider(inputs)
        return out

    def _forget(self) -> None:
        if self._build is not None:
            self._build.cancel()
        self._engines, self._refused, self._build, self._trial = [], [], None, None

    def _consider(self, inputs: Mapping[str, Tensor]) -> None:
        """Start a build for inputs that no engine takes, once they have come often enough."""
        known = [*self._refused, *(profile for profile, _ in self._engines)]
        if self._start is None or self.building or any(profile.fits(inputs) for profile in known):
            return
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        count, last = self._outside
        self._outside = (count + 1 if shapes == last else 1, shapes)
        if self._outside[0] < PATIENCE:
            return
        held = {name: value.detach().clone() for name, value in inputs.items()}
        part = dataclasses.replace(self.part, inputs=held)
        profile = self._profile_of(part)
        told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes)
        logger.info("%s: no engine for %s, building one in a child process", self.part.name, told)
        try:
            self._build = self._start(part, profile)
        except RuntimeError as error:
            self._refuse(profile, error)

    def _take(self) -> None:
        """A build is over: put what it made to the test, or say why there is nothing."""
        build, self._build = self._build, None
        try:
            engine = build.result()
        except Exception as error:  # whatever stopped it is told, and the stream goes on
            self._refuse(build.profile, error)
            return
        logger.info("%s: engine ready after %.1f s", self.part.name, build.seconds)
        if self._verify:
            self._trial = (build.profile, engine, Trial(self.part.name, self._tolerance))
        else:
            self.add(build.profile, engine)

    def _compare(self, inputs: Mapping[str, Tensor], out: Tensor) -> None:
        """One tick of the test of a new engine; after the last one it is swapped in, or refused."""
        if self._trial is None or not self._trial[0].fits(inputs):
            return
        profile, engine, trial = self._trial
        trial.add(engine(**inputs), out)
        if not trial.done:
            return
        self._trial = None
        try:
            worst = trial.verdict()
        except EngineMismatch as error:
            self._refuse(profile, error)
            return
        logger.info("%s: swapped in, PSNR %.1f dB or more in %d ticks", self.part.name, worst, trial.calls)
        self.add(profile, engine)

    def _refuse(self, profile: Profile, error: Exception) -> None:
        logger.warning("%s: no new engine, running plainly: %s", self.part.name, error)
        self._refused.append(profile)
