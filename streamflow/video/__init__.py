"""Videos without end, chunk after chunk. It knows a video pipeline by its adapter (`streamflow.models.video`) only."""

from streamflow.video.chunks import Chunk, VideoFrame
from streamflow.video.stream import VideoStream
from streamflow.video.viewers import VideoViewers

__all__ = ["Chunk", "VideoFrame", "VideoStream", "VideoViewers"]
