"""Decoding and encoding of viewers' images. Input is untrusted: its size is checked before it is decoded, only three formats
are accepted, and only the first frame is read."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageOps

from streamflow.app.server.messages import BadMessage
from streamflow.image_utils import Images, Size, as_rgb, open_image

FORMATS = ("JPEG", "PNG", "WEBP")
SAMPLE = 16  # pixels a side, of each image, from which a GIF's colours are chosen
STAMP = struct.Struct(">d")  # the viewer's clock in milliseconds, before every image

CheckSize = Callable[[Size], object]
"""`check((width, height))` raises ValueError for a size that a model refuses."""


@dataclass(frozen=True, eq=False)
class Style:
    """A style image of one viewer, in the size of the model. It equals itself only."""

    image: Images


def decode(data: bytes, max_pixels: int, width: int, height: int, check: CheckSize | None = None) -> PIL.Image.Image:
    """A JPEG, PNG or WebP as RGB, cut to the middle and scaled to `width` x `height`. check: of the size before that.
    BadMessage: invalid or too large."""
    try:
        image = open_image(bytes(data), FORMATS, max_pixels, max(width, height))
        fitted = fit(as_rgb(image), width, height)
    except ValueError as error:
        raise BadMessage(f"{error}: send a whole JPEG, PNG or WebP of at most {max_pixels} pixels") from None
    if check is not None:
        try:
            check(image.size)
        except ValueError as error:
            raise BadMessage(str(error)) from None
    return fitted


def fit(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """An image cut to the middle and scaled to `width` x `height`."""
    return PIL.ImageOps.fit(image, (width, height))


def split(message: bytes) -> tuple[float, bytes]:
    """(the viewer's clock in ms, the image's bytes) of a binary message. BadMessage."""
    if len(message) <= STAMP.size:
        raise BadMessage(f"an image's message has {len(message)} bytes, and its first {STAMP.size} are a clock")
    (stamp,) = STAMP.unpack_from(message)
    if not np.isfinite(stamp):
        raise BadMessage("an image's clock is not finite")
    return stamp, message[STAMP.size :]


def jpeg(pixels: np.ndarray) -> bytes:
    """uint8 `[H, W, 3]` as a JPEG."""
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def gif(jpegs: Sequence[bytes], milliseconds: int) -> bytes:
    """JPEGs of one size as an endless GIF, each shown this long, in 256 colours that all share.

    Pillow's `quantize` holds the GIL, and so the event loop, for as long as it takes: 360 ms of CPU time for an image of
    512x512 by its median cut, 7 ms with the colours given. The median cut sees `SAMPLE` x `SAMPLE` pixels of each image.
    """
    frames = [PIL.Image.open(io.BytesIO(one)).convert("RGB") for one in jpegs]
    sample = PIL.Image.new("RGB", (SAMPLE * len(frames), SAMPLE))
    for k, frame in enumerate(frames):
        sample.paste(frame.resize((SAMPLE, SAMPLE)), (k * SAMPLE, 0))
    colours = sample.quantize(256)
    first, *others = (frame.quantize(palette=colours) for frame in frames)
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return out.getvalue()
