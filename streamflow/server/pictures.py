"""Pictures off the network and onto it. What comes in is hostile until it is decoded: its size is looked at before its
pixels, only three formats are tried, and only the first frame is read."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps

from streamflow.server.wishes import BadMessage

FORMATS = ("JPEG", "PNG", "WEBP")
STAMP = struct.Struct(">d")  # the viewer's clock in milliseconds, before every picture


def decode(data: bytes, max_pixels: int, width: int, height: int) -> PIL.Image.Image:
    """A JPEG, PNG or WebP as RGB, cut to the middle and scaled to `width` x `height`. BadMessage says what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about sizes: ours are checked here
            image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise BadMessage(f"a picture of {image.width}x{image.height} is above {max_pixels} pixels")
            image.draft("RGB", (width, height))  # a JPEG is decoded no larger than needed
            image.load()
            return PIL.ImageOps.fit(image.convert("RGB"), (width, height))
    except BadMessage:
        raise
    except Exception as error:  # a decoder may fail in any way on hostile bytes
        raise BadMessage(f"the picture cannot be read ({type(error).__name__}): send a whole JPEG, PNG or WebP") from None


def split(message: bytes) -> tuple[float, bytes]:
    """(the viewer's clock in ms, the picture's bytes) of a binary message. BadMessage."""
    if len(message) <= STAMP.size:
        raise BadMessage(f"a picture's message has {len(message)} bytes, and its first {STAMP.size} are a clock")
    (stamp,) = STAMP.unpack_from(message)
    if not np.isfinite(stamp):
        raise BadMessage("a picture's clock is not finite")
    return stamp, message[STAMP.size :]


def jpeg(pixels: np.ndarray) -> bytes:
    """uint8 `[H, W, 3]` as a JPEG."""
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def gif(jpegs: Sequence[bytes], milliseconds: int) -> bytes:
    """JPEGs of one size as an endless GIF, each shown this long."""
    frames = [PIL.Image.open(io.BytesIO(one)).convert("P", palette=PIL.Image.Palette.ADAPTIVE) for one in jpegs]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return out.getvalue()
