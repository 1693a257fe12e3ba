"""The settings of a live performance. Holds nothing else, so that `streamflow.app.config` can read it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamflow._validation import Section


class LiveSettings(Section):
    """What is shown live, and where (`streamflow live`)."""

    source: str = Field(default="", description="camera:0, in.mp4, folder:pics, screen:1, ...; empty: draws from the prompt")
    sinks: tuple[str, ...] = Field(
        default=("window",), description="where to: window, virtualcam, mjpeg:8080, record:out.mp4, ..."
    )
    target_fps: float = Field(default=30.0, gt=0, lt=10_000, description="images a second, at even intervals")
    policy: Literal["newest", "every"] = Field(
        default="newest", description="draw the newest image of the source, or every one"
    )
    mode: Literal["auto", "fed", "free", "sequential"] = Field(
        default="auto", description="auto measures all and takes the lowest latency that holds the rate"
    )
    on_error: Literal["hold", "raise"] = Field(default="hold", description="keep the last good image and try again, or end")
    crossfade: float = Field(default=0.5, ge=0, description="seconds from one scene to the next")
    scenes: tuple[str, ...] = Field(
        default=(), description="files of settings, which follow one another by the key for the next"
    )
