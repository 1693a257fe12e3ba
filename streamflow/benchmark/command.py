"""The command: load the model once, measure what the settings name, write the table, the plot and the JSON."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from streamflow._command_line import Parser, say_download
from streamflow._files import Json
from streamflow.benchmark import plot, report
from streamflow.benchmark.latency import measure_latency
from streamflow.benchmark.machine import clocks, compile_cache, machine
from streamflow.benchmark.measure import measure_all
from streamflow.benchmark.settings import Settings
from streamflow.benchmark.subject import Subject, load
from streamflow.benchmark.sweep import measure_sweeps, points

SETTINGS = ("model", "random_weights", "width", "height", "steps", "cfg_type", "frame_buffer_size", "rounds", "warmup")


def main(argv: Sequence[str], parser: Parser, settings: Settings) -> int:
    """Measure what this command line names. Returns the exit code: 0, 1 where a variant failed, 2 for a wrong argument."""
    imported = time.process_time()
    if settings.plot and (missing := plot.missing()):
        print(f"no plots: {missing}", file=sys.stderr)
        settings = replace(settings, plot=False)
    cache = compile_cache() if settings.compiles else None
    with log_to_stderr(), torch.cuda.device(settings.torch_device) if settings.cuda else nullcontext():
        try:
            if not settings.random_weights:
                say_download(settings.model)
            subject = sized(load(settings))
            check(subject)
        except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
            parser.error(str(error))
        command = " ".join(["python -m streamflow.benchmark", shlex.join(argv)]).strip()
        result = run(subject, {"command": command, "import_cpu_s": imported, "compile_cache_before": cache})
    paths = report.write(result, settings.output, subject.settings.name)
    if settings.plot:
        paths += plot.draw(result, settings.output, subject.settings.name)
    if not settings.json:
        print(report.table(result), "", *(f"saved {path}" for path in paths), sep="\n")
    print(json.dumps(result, allow_nan=False))
    return 1 if report.failures(result) else 0


def sized(subject: Subject) -> Subject:
    """The subject with the image size in its settings, the model's own where none was given."""
    with subject.stream(tiny=False) as stream:
        return subject.under(replace(subject.settings, width=stream.width, height=stream.height))


def check(subject: Subject) -> None:
    """Raise ValueError for settings that the model does not support, before anything is measured."""
    s = subject.settings
    if s.sweep and s.sweep_vae == "tiny" and subject.tiny is None:
        raise ValueError("--sweep-vae tiny: no tiny VAE was given: --tiny-vae")
    for name, value, settings in points(s):
        try:
            subject.under(settings).stream(tiny=False).close()
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"--sweep {name}={value}: {error}") from error


def run(subject: Subject, known: Json) -> Json:
    """Measure what the settings name. Returns the result as JSON, with the entries of `known` first."""
    s = subject.settings
    before = clocks(subject.device)
    found = measure_all(subject)
    result = {
        **known,
        **{name: getattr(s, name) for name in SETTINGS},
        "dtype": str(subject.pipe.dtype).removeprefix("torch."),
        "load_s": subject.seconds,
        "machine": machine(subject.device),
        "clocks_before": before,
        "variants": found,
        "factors": report.factors(found),
        "ratios": report.ratios(found),
    }
    if s.sweep:
        result["sweeps"] = measure_sweeps(subject)
    if s.latency:
        result["latency"] = measure_latency(subject)
    return report.rounded(result)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Shows the log messages of this package on stderr; stdout is for the results."""
    logger, handler = logging.getLogger("streamflow"), logging.StreamHandler()
    before = logger.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
