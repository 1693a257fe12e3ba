"""The scaling benchmark's settings, its clock, and its results, which are on disk as soon as they are there."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import scaling_model
import torch
from torch import Tensor

from streamflow import StreamFlow
from streamflow.benchmark.measure import FAILURES, cause
from streamflow.benchmark.report import ratio, rounded, write_json
from streamflow.benchmark.settings import Settings
from streamflow.benchmark.subject import Subject, load
from streamflow.benchmark.timing import Spread, wait

logger = logging.getLogger(__name__)
CANNOT = (*FAILURES, MemoryError)  # the last: a device has no room for a copy
Figures = dict[str, Any]
OVER = "the time of this run was over"
LONG = 1.0  # seconds of warming up after which a call is warm


@dataclass(frozen=True)
class Setup:
    """devices: the first is home. networks: those whose rows are spread; decoding: whose VAEs and UNet the other parts take.
    kind, rows_kind: the acceleration of the decoding parts and of the denoising rows. size, tile_size: pixels a side; tile:
    latents a side. latents: how many are decoded by row, `piece` of them at once. rounds: how often each time is taken.
    only: the numbers of devices that are measured besides one; empty: 2, 4, 8, ..."""

    devices: tuple[torch.device, ...]
    networks: tuple[str, ...]
    decoding: str
    kind: str
    rows_kind: str
    size: int = 512
    latents: int = 64
    tile_size: int = 4096
    tile: int = 128
    stages: tuple[int, ...] = (4, 8)
    rounds: int = 10
    warm_up: int = 3
    round_seconds: float = 0.25
    only: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if missing := set(self.only) - set(self.powers):
            raise ValueError(f"{sorted(missing)} are not among {self.powers}, the numbers of devices that can be measured")

    @property
    def home(self) -> torch.device:
        return self.devices[0]

    @property
    def cuda(self) -> bool:
        return self.home.type == "cuda"

    @property
    def powers(self) -> tuple[int, ...]:
        """1, 2, 4, 8, ... as far as there are devices."""
        return tuple(2**i for i in range(len(self.devices).bit_length()) if 2**i <= len(self.devices))

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of devices that are measured, one first."""
        return tuple(k for k in self.powers if not self.only or k in (1, *self.only))

    @property
    def piece(self) -> int:
        """Rows decoded at once: the same for every number of devices, so that all decode the same sub-batches."""
        return max(1, min(8, self.latents // self.powers[-1]))


class Run:
    """One run: its results by part, series and number of GPUs. `row` measures one, `timed` is the clock, `subject` a model.

    path: where the JSON is written after every row. seconds: after which no row is begun any more."""

    def __init__(self, setup: Setup, about: Figures, path: Path | None, seconds: float):
        self.setup, self.path = setup, path
        self.found: Figures = {**about, "elapsed_s": {}, "parts": {}}
        self._began, self._seconds = time.perf_counter(), seconds
        self._subject: Subject | None = None

    @property
    def left(self) -> float:
        """Seconds until no row is begun."""
        return self._seconds - (time.perf_counter() - self._began)

    # -- results --------------------------------------------------------------------------------------------------------

    def row(self, part: str, series: str, key: int | str, call: Callable[[], Figures]) -> Figures:
        """What the call measures, or why it could not; written at once. `times`: the time on one GPU over this one."""
        began = time.perf_counter()
        figures = self.attempted(call) if self.left > 0 else {"skipped": OVER}
        rows = self.found["parts"].setdefault(part, {}).setdefault(series, {})
        if "ms" in figures and "ms" in rows.get("1", {}):
            figures["times"] = ratio(rows["1"]["ms"], figures["ms"])
        rows[str(key)] = {**figures, "took_s": time.perf_counter() - began}
        logger.info("%s, %s, %s: %s", part, series, key, _short(figures))
        self.write()
        return rows[str(key)]

    def attempted(self, call: Callable[[], Figures]) -> Figures:
        """The call's figures, or {"failed": why}; GPU memory that it no longer holds is given back."""
        try:
            return call()
        except CANNOT as error:
            logger.exception("failed")
            return {"failed": cause(error)}
        finally:
            self.clean()

    def part(self, name: str, measure: Callable[[Run], None]) -> None:
        """One part, with its seconds. Where it raises outside of a row the cause is its result."""
        began = time.perf_counter()
        failed = self.attempted(lambda: measure(self) or {}) if self.left > 0 else {"skipped": OVER}
        if failed:
            self.found["parts"].setdefault(name, {})["part"] = {"costs": failed}
        self.found["elapsed_s"][name] = time.perf_counter() - began
        logger.info("%s: %.1f s, %.0f s are left", name, self.found["elapsed_s"][name], self.left)
        self.write()

    def write(self) -> None:
        """All that there is, and the scaling model of it; the file is never half written."""
        self.found["scaling_model"] = scaling_model.compare(self.found["parts"])
        write_json(self.found, self.path)

    # -- the clock ------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until every device has done all it was given."""
        for device in set(self.setup.devices):
            wait(device)

    def timed(self, call: Callable[[], object], most: int = 50) -> dict[str, float]:
        """Milliseconds a call: median, least and most of the rounds, every device waited for before and after each."""
        began = time.perf_counter()
        for _ in range(self.setup.warm_up):
            if self._round(call, 1) and time.perf_counter() - began > LONG:
                break
        count = min(most, max(1, int(self.setup.round_seconds / max(self._round(call, 1), 1e-9))))
        return vars(Spread.of([1e3 * self._round(call, count) for _ in range(self.setup.rounds)]))

    def _round(self, call: Callable[[], object], count: int) -> float:
        self.wait()
        began = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return (time.perf_counter() - began) / count

    def host(self, call: Callable[[], object], burst: int = 8) -> dict[str, float]:
        """Milliseconds until a call returns, the devices not waited for; a burst at a time, too short to fill a queue."""
        for _ in range(self.setup.warm_up):
            call()
        values = []
        for _ in range(2 * self.setup.rounds):
            self.wait()
            began = time.perf_counter()
            for _ in range(burst):
                call()
            values.append(1e3 * (time.perf_counter() - began) / burst)
        self.wait()
        return vars(Spread.of(values))

    # -- models ---------------------------------------------------------------------------------------------------------

    def subject(self, model: str, **settings: Any) -> Subject:
        """A model under these settings of the benchmark; of two models the first is let go before the second is loaded."""
        s = self.setup
        base = Settings(model, model != "embedded", width=s.size, height=s.size, device=str(s.home))
        if self._subject is None or self._subject.settings.model != model:
            self._subject = None
            self.clean()
            self._subject = load(base)
            logger.info("%s loaded in %.1f s", model, self._subject.seconds)
        return self._subject.under(replace(base, **settings))

    def accelerate(self, stream: StreamFlow, kind: str) -> None:
        """This kind, where it is not in force already."""
        if stream.acceleration != kind:
            stream.accelerate(kind)

    def clean(self) -> None:
        """Give back GPU memory that nothing holds, on every device."""
        gc.collect()
        for device in set(self.setup.devices):
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()


def likeness(drawn: Tensor, reference: Tensor | None, name: str = "") -> Figures:
    """How far results are from the reference: whether equal to the bit, and `||a - b|| / ||b||` of the worst row. Nothing
    where there is no reference. ArithmeticError where the results are not finite."""
    if not drawn.isfinite().all():
        raise FloatingPointError("the results are not finite")
    if reference is None:
        return {}
    a, b = drawn.float().flatten(1), reference.to(drawn.device).float().flatten(1)
    errors = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return {f"equal{name}": torch.equal(drawn, reference.to(drawn.device)), f"relative_error{name}": errors.max().item()}


def _short(figures: Figures) -> str:
    if why := figures.get("failed") or figures.get("skipped"):
        return why
    if "ms" not in figures:
        return json.dumps(rounded(figures))
    times = f", {figures['times']['median']:.2f}x" if "times" in figures else ""
    equal = {True: ", equal", False: ", not equal"}.get(figures.get("equal"), "")
    return f"{figures['ms']['median']:.3f} ms{times}{equal}"
