"""Images in and out. In: PIL, numpy and tensors become float32 `[n, 3, H, W]` in [-1, 1]; what range a float image is in is
stated by the caller and never guessed. Out: StreamDiffusion's helpers under their own names."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from streamflow.image_range import Check, Normalized, check_on_host, is_marked, mark

logger = logging.getLogger(__name__)


def normalize_image(
    image: Any,
    height: int,
    width: int,
    input_range: tuple[float, float] = (0, 1),
    resize: bool = True,
    check: Check = check_on_host,
) -> Normalized:
    """Make `[n, 3, height, width]` in [-1, 1] of an image or several.

    image: a PIL image (`as_rgb` says what becomes of other modes than RGB); an array `[H, W, 3]` or `[n, H, W, 3]`; a tensor
        `[3, H, W]` or `[n, 3, H, W]`; or a list of images. uint8 is 0..255, floats are in `input_range`. A `Normalized`
        tensor of this size comes back unchanged.
    resize: stretch other sizes (Lanczos for PIL, antialiased bilinear otherwise), or refuse them.
    check: `check(image, low, high)` looks at the values of float images; by default at those on the CPU.

    Raises:
        TypeError: not an image, or of a dtype that is none.
        ValueError: mode, channel count, number of dimensions, size, NaN or range; with what was found and the remedy.
    """
    marked = isinstance(image, Tensor) and is_marked(image)
    if marked and image.shape[-3:] == (3, height, width) and image.ndim in (3, 4):
        if image.device.type == "cpu":
            check(image, -1.0, 1.0)
        return image if image.ndim == 4 else image[None]
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("an empty list of images")
        parts = [normalize_image(one, height, width, input_range, resize, check) for one in image]
        return torch.cat(parts)
    if isinstance(image, PIL.Image.Image):
        return _from_pil(image, height, width, resize)
    if isinstance(image, np.ndarray):
        image = _channels_first(image)
    if not isinstance(image, Tensor):
        raise TypeError(f"an image is a PIL image, a numpy array or a tensor, not {type(image).__name__}")
    return _from_tensor(image, height, width, input_range, resize, check)


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image in mode RGB: what is transparent becomes white, grey stays grey, 16 bits a pixel become 8. Each kind of
    change is logged once. ValueError for a mode whose range PIL does not say (I, F)."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        raise ValueError(
            f"an image in mode {image.mode} does not say which values are black and white: pass an array, in 0..255 as "
            f"uint8 or in the stream's input_range"
        )
    if image.mode.startswith("I;16"):
        _say_once("an image of 16 bits a pixel is taken as 0 (black) to 65535 (white)")
        return PIL.Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        _say_once(f"an image in mode {image.mode} is put on white where it is transparent; image.convert('RGB') drops that")
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def as_rgb_where_pil(image: Any) -> Any:
    """A PIL image, or each of a list of them, by `as_rgb`; anything else as it is."""
    if isinstance(image, (list, tuple)):
        return type(image)(as_rgb_where_pil(one) for one in image)
    return as_rgb(image) if isinstance(image, PIL.Image.Image) else image


@cache
def _say_once(message: str) -> None:
    logger.info(message)


MAX_PIXELS = 2**26  # of an image file: 8192 x 8192


class ImageFileError(OSError, ValueError):
    """An image file that cannot be read, with its name and the reason."""


def open_image(
    source: str | Path | bytes, formats: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS, side: int | None = None
) -> PIL.Image.Image:
    """The image in a file, or in the bytes of one: upright as its EXIF data says, of an animation the first frame, with all
    pixels read, in whatever mode; `as_rgb` makes it RGB. This is the one reader of image files.

    formats: names of PIL's formats, None for all. side: both sides are at least this long where that is enough, so that a
        JPEG may be decoded smaller than it is.

    Raises:
        FileNotFoundError: there is no such file. ImageFileError: it is no image, truncated, or of more than `max_pixels`.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise ImageFileError(f"{name} has {image.width}x{image.height} pixels, and at most {max_pixels} are read")
            if side is not None:
                image.draft("RGB", (side, side))
            image.load()
            deep = image.mode == "I" and image.format == "PNG"  # how PIL reads 16 bits a pixel, or "I;16"
            upright = PIL.ImageOps.exif_transpose(image)
            return PIL.Image.fromarray(np.asarray(upright).astype(np.uint16)) if deep else upright
    except ImageFileError:
        raise
    except PIL.UnidentifiedImageError as error:
        kinds = "a known format" if formats is None else ", ".join(formats)
        raise ImageFileError(f"{name} is no image in {kinds}") from error
    except Exception as error:  # a decoder may fail in any way on the bytes of a broken file
        raise ImageFileError(f"{name} cannot be read as an image ({type(error).__name__}: {error})") from error


def _from_pil(image: PIL.Image.Image, height: int, width: int, resize: bool) -> Normalized:
    if 0 in image.size:
        raise ValueError(f"an image without pixels: {image.width}x{image.height}")
    image = as_rgb(image)
    _check_size(image.height, image.width, height, width, resize)
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255.0
    return mark((2.0 * pixels.permute(2, 0, 1)[None] - 1.0).contiguous())


def _channels_first(image: np.ndarray) -> Tensor:
    if image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"an array is [H, W, 3] or [n, H, W, 3], not {list(image.shape)}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"an array of pixels is uint8 (0..255) or floating, not {image.dtype}")
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).movedim(-1, -3)


def _from_tensor(
    image: Tensor, height: int, width: int, input_range: tuple[float, float], resize: bool, check: Check
) -> Normalized:
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"a tensor is [3, H, W] or [n, 3, H, W], not {list(image.shape)}")
    if not image.numel():
        raise ValueError(f"an image without pixels: {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a tensor of pixels is uint8 (0..255) or floating, not {image.dtype}")
    _check_size(*image.shape[-2:], height, width, resize)
    image = image if image.ndim == 4 else image[None]
    if is_marked(image):
        low, high = -1.0, 1.0
    else:
        low, high = (0.0, 255.0) if image.dtype == torch.uint8 else input_range
    if image.dtype != torch.uint8:
        check(image, low, high)
    image = image.as_subclass(Tensor).float()
    image = 2.0 * ((image - low) / (high - low)) - 1.0
    if image.shape[-2:] != (height, width):
        image = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return mark(image.contiguous())


def check_range(input_range: tuple[float, float]) -> None:
    """Raise ValueError unless this is (low, high) of two numbers, low below high."""
    numbers = isinstance(input_range, (tuple, list)) and all(isinstance(one, (int, float)) for one in input_range)
    if not numbers or len(input_range) != 2 or not input_range[0] < input_range[1]:
        raise ValueError(f"input_range must be (low, high) with low below high, such as (0, 1), not {input_range!r}")


def _check_size(h: int, w: int, height: int, width: int, resize: bool) -> None:
    if not resize and (h, w) != (height, width):
        raise ValueError(f"an image of {w}x{h} for a stream of {width}x{height}: resize it, or pass resize=True")


# -- StreamDiffusion's helpers -----------------------------------------------------------------------------------------


def denormalize(images: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """[-1, 1] to [0, 1], clamped."""
    return (images / 2 + 0.5).clip(0, 1)


def cropped(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest part in the middle of an array `[H, W, 3]` that has the proportions width : height; a view."""
    h, w = pixels.shape[:2]
    part_h, part_w = max(1, min(h, round(w * height / width))), max(1, min(w, round(h * width / height)))
    top, left = (h - part_h) // 2, (w - part_w) // 2
    return pixels[top : top + part_h, left : left + part_w]


def uint8_pixels(images: Tensor) -> np.ndarray:
    """`[n, 3, H, W]` in [-1, 1] as uint8 `[n, H, W, 3]` on the host."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def pt_to_numpy(images: Tensor) -> np.ndarray:
    """`[n, C, H, W]` to a float32 array `[n, H, W, C]`."""
    return images.detach().cpu().permute(0, 2, 3, 1).float().numpy()


def numpy_to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
    """An array `[n, H, W, C]` or `[H, W, C]` in [0, 1] to PIL images, mode RGB, or L for one channel."""
    images = images[None] if images.ndim == 3 else images
    pixels = (images * 255).round().astype("uint8")
    return [PIL.Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def postprocess_image(
    image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None
) -> Tensor | np.ndarray | list[PIL.Image.Image]:
    """Pictures `[n, C, H, W]` in [-1, 1] to what a caller wants.

    output_type: `"latent"` (as it is), `"pt"` and `"np"` (in [0, 1]) or `"pil"`. do_denormalize: one flag a picture;
    False for one that is in [0, 1] already.
    """
    if not isinstance(image, Tensor):
        raise ValueError(f"postprocess_image takes a tensor, not {type(image).__name__}")
    convert = {"pt": lambda x: x, "np": pt_to_numpy, "pil": lambda x: numpy_to_pil(pt_to_numpy(x))}
    if output_type == "latent":
        return image
    if output_type not in convert:
        raise ValueError(f"unknown output_type {output_type!r}: choose one of 'latent', {', '.join(map(repr, convert))}")
    flags = [True] * len(image) if do_denormalize is None else list(do_denormalize)
    if len(flags) != len(image):
        raise ValueError(f"do_denormalize has {len(flags)} entries for {len(image)} pictures")
    if all(flags):
        return convert[output_type](denormalize(image))
    shown = [denormalize(one) if flag else one for one, flag in zip(image, flags, strict=True)]
    return convert[output_type](torch.stack(shown))


def process_image(image_pil: PIL.Image.Image, range: tuple[float, float] = (-1, 1)) -> tuple[Tensor, PIL.Image.Image]:
    """A PIL image to (float32 `[1, C, H, W]` in `range`, the image). In [-1, 1] the tensor is marked as such."""
    pixels = np.array(image_pil, dtype=np.float32).reshape(image_pil.height, image_pil.width, -1) / 255.0
    low, high = range
    made = torch.from_numpy(pixels).permute(2, 0, 1)[None] * (high - low) + low
    return mark(made) if (low, high) == (-1, 1) else made, image_pil


def pil2tensor(image_pil: PIL.Image.Image, dtype: torch.dtype = torch.float32) -> Tensor:
    """A PIL image to `[1, C, H, W]` in [-1, 1], marked as such, so that a stream takes it as it is."""
    return process_image(image_pil)[0].to(dtype)


def image_grid(images: Sequence[PIL.Image.Image], columns: int = 4) -> PIL.Image.Image:
    """Pictures of one size side by side, row by row; what is left of the last row is white."""
    width, height = images[0].size
    sheet = PIL.Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet
