"""Addresses of sources and sinks, such as camera:0 and record:out.mp4. Knows where each kind is, and imports it on use."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamflow.io.protocols import SUFFIXES, Sink, Source

Options = dict[str, object]  # arguments of a source or sink
# kind: (module, class, what turns the address's rest into arguments), or what creates one from the rest
Entry = tuple[str, str, Callable[[str], Options]] | Callable[..., object]


def _named(argument: str) -> Callable[[str], Options]:
    """The rest is that argument; where it is empty the class's own default holds."""
    return lambda rest: {argument: rest} if rest else {}


def _required(argument: str, example: str, **options: object) -> Callable[[str], Options]:
    """The rest is that argument, beside these options; it must not be empty."""

    def parse(rest: str) -> Options:
        if not rest:
            raise ValueError(f"something is missing after the colon: give {example}")
        return {argument: rest, **options}

    return parse


def _nothing(rest: str) -> Options:
    if rest:
        raise ValueError(f"nothing belongs after the colon, and there is {rest!r}")
    return {}


def _host_and_port(rest: str) -> Options:
    """HOST:PORT, PORT or nothing."""
    host, _, port = rest.removeprefix("http://").rstrip("/").rpartition(":")
    if port and not port.isdecimal():
        raise ValueError(f"{rest!r} is not HOST:PORT: give mjpeg:127.0.0.1:8080 or mjpeg:8080")
    return {**({"host": host.strip("[]")} if host else {}), **({"port": int(port)} if port else {})}


def _url(scheme: str) -> Callable[[str], Options]:
    """The rest is a URL without its scheme."""
    return lambda rest: {"url": f"{scheme}:{rest}"}


SOURCES: dict[str, Entry] = {
    "camera": ("camera", "CameraSource", _named("device")),
    "file": ("file", "FileSource", _required("path", "file:in.mp4")),
    "folder": ("folder", "FolderSource", _required("path", "folder:images")),
    "image": ("folder", "FolderSource", _required("path", "image:face.png", loop=True)),
    "screen": ("screen", "ScreenSource", _named("monitor")),
    "mjpeg": ("mjpeg", "MjpegSource", _required("url", "mjpeg:http://host:port/")),
    "http": ("mjpeg", "MjpegSource", _url("http")),
    "https": ("mjpeg", "MjpegSource", _url("https")),
    "ndi": ("ndi", "NdiSource", _named("name")),
    "spout": ("spout", "SpoutSource", _named("name")),
    "syphon": ("syphon", "SyphonSource", _named("name")),
}

SINKS: dict[str, Entry] = {
    "record": ("recorder", "Recorder", _required("path", "record:out.mp4")),
    "file": ("recorder", "Recorder", _required("path", "file:out.mp4", clock=False)),
    "folder": ("folder", "FolderSink", _required("path", "folder:images")),
    "window": ("window", "WindowSink", _named("title")),
    "virtualcam": ("virtual_camera", "VirtualCameraSink", _named("device")),
    "mjpeg": ("mjpeg_server", "MjpegSink", _host_and_port),
    "ndi": ("ndi", "NdiSink", _named("name")),
    "spout": ("spout", "SpoutSink", _named("name")),
    "syphon": ("syphon", "SyphonSink", _named("name")),
    "null": ("null", "NullSink", _nothing),
}


def register_source(kind: str, create: Callable[..., Source]) -> None:
    """Add a kind of source: `open_source("KIND:REST")` calls `create("REST")`, and `create()` where there is no rest.

    Raises:
        ValueError: a kind that is there already, or that is no name of two or more letters, digits, "-" and "_".
        TypeError: `create` cannot be called.
    """
    _register(SOURCES, kind, create)


def register_sink(kind: str, create: Callable[..., Sink]) -> None:
    """Add a kind of sink: `open_sink("KIND:REST")` calls `create("REST")`, and `create()` where there is no rest. Raises as
    `register_source` does."""
    _register(SINKS, kind, create)


def _register(table: dict[str, Entry], kind: str, create: Callable[..., object]) -> None:
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]+", kind):
        raise ValueError(f"a kind is a name of two or more letters, digits, '-' and '_', not {kind!r}")
    if kind in table:
        raise ValueError(f"{kind!r} is there already, one of {', '.join(table)}: choose another name")
    if not callable(create):
        raise TypeError(f"{kind!r} needs a class or a function that creates one, not {create!r}")
    table[kind] = create


def open_source(address: str, **options: object) -> Source:
    """The source at an address, made and not yet opened: `KIND:REST`, a path of a video, an image or a folder, or an
    http address of MJPEG. options: further arguments of its class.

    Raises ValueError for an unknown kind, which lists the known, or a rest that does not fit.
    """
    return _make(SOURCES, "source", _spelled_out(address, SOURCES), options)


def open_sink(address: str, **options: object) -> Sink:
    """The sink at an address, made and not yet opened: `KIND:REST`, or a path of an .mp4 or .mkv or of a folder.

    Raises ValueError as `open_source` does.
    """
    return _make(SINKS, "sink", _spelled_out(address, SINKS), options)


def _spelled_out(address: str, table: dict[str, Entry]) -> str:
    """The address with its kind before it, where it is a bare path."""
    kind, colon, _ = address.partition(":")
    drive = len(kind) == 1  # C:\\clips\\in.mp4
    if kind in table or (colon and not drive and "/" not in kind):
        return address
    path = Path(address)
    if path.is_dir() or address.endswith("/"):
        return f"folder:{address}"
    return f"{_kind_of(path, table)}:{address}" if path.suffix or path.exists() else address


def _kind_of(path: Path, table: dict[str, Entry]) -> str:
    return "image" if "image" in table and path.suffix.lower() in SUFFIXES else "file"


def _make(table: dict[str, Entry], what: str, address: str, options: Options) -> Any:
    kind, _, rest = address.partition(":")
    if kind not in table:
        raise ValueError(f"unknown {what} {address!r}: give a path, or KIND:... with one of {', '.join(table)}")
    entry = table[kind]
    if not isinstance(entry, tuple):
        return entry(*([rest] if rest else []), **options)
    module, name, parse = entry
    try:
        arguments = parse(rest)
    except ValueError as error:
        raise ValueError(f"{what} {address!r}: {error}") from error
    return getattr(importlib.import_module(f"streamflow.io.{module}"), name)(**{**arguments, **options})
