"""Images from anywhere and to anywhere: `open_source("camera:0")`, `open_sink("record:out.mp4")`.

A source opens, reads and closes; a sink opens, writes and closes; Reading and Writing run them in threads of their own.
One file a kind; what a kind needs is imported when it is opened. Knows no stream and no tensors.
"""

from streamflow.io.addresses import SINKS, SOURCES, open_sink, open_source, register_sink, register_source
from streamflow.io.protocols import InvalidSource, Sink, SinkLost, Source, SourceLost, TimedImage
from streamflow.io.threads import Reading, Writing

__all__ = [
    "SINKS",
    "SOURCES",
    "InvalidSource",
    "Reading",
    "Sink",
    "SinkLost",
    "Source",
    "SourceLost",
    "TimedImage",
    "Writing",
    "open_sink",
    "open_source",
    "register_sink",
    "register_source",
]
