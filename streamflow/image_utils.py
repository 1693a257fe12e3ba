"""Pictures in and out. In: PIL, numpy and tensors become float32 `[n, 3, H, W]` in [-1, 1]; what range a float picture is
in is stated by the caller and never guessed. Out: StreamDiffusion's helpers under their own names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

# Operations that keep a tensor's values, and so its mark.
_VALUE_KEEPING = frozenset(
    getattr(Tensor, name)
    for name in (
        "to cpu cuda pin_memory float half bfloat16 double clone detach contiguous "
        "__getitem__ unsqueeze squeeze unbind split chunk"
    ).split()
) | {torch.cat, torch.stack, torch.clone}

# Writes into their first argument that have no trailing underscore by which to know them.
_WRITING = frozenset((Tensor.__setitem__, Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__, Tensor.__itruediv__))


class Normalized(Tensor):
    """A tensor that is known to hold pictures in [-1, 1]. Moving, indexing and stacking keep the mark; whatever computes
    a new value drops it, from the tensor itself where that is written into."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            parts = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
            if func in _VALUE_KEEPING and parts and all(type(part) is cls for part in parts):
                return _mark(result)
            if _writes(func):
                _unmark(parts)
            return result.as_subclass(Tensor) if type(result) is cls else result

    def __deepcopy__(self, memo: dict) -> Normalized:
        return self.clone()


def _mark(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return type(result)(_mark(part) for part in result)
    return result.as_subclass(Normalized) if result.is_floating_point() else result.as_subclass(Tensor)


def _unmark(parts: Sequence[Any]) -> None:
    for part in parts:
        if type(part) is Normalized:
            part.__class__ = Tensor


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return func in _WRITING or (name.endswith("_") and not name.endswith("__"))


def normalize_image(
    image: Any, height: int, width: int, input_range: tuple[float, float] = (0, 1), resize: bool = True, check: bool = False
) -> Normalized:
    """Make `[n, 3, height, width]` in [-1, 1] of a picture or several.

    image: a PIL image in mode RGB; an array `[H, W, 3]` or `[n, H, W, 3]`; a tensor `[3, H, W]` or `[n, 3, H, W]`; or a
        list of pictures. uint8 is 0..255, floats are in `input_range`. A `Normalized` tensor comes back unchanged.
    resize: stretch other sizes (Lanczos for PIL, antialiased bilinear otherwise), or refuse them.
    check: also look into tensors that are not on the CPU for NaN and for values out of range, which makes the host wait.

    Raises:
        TypeError: not a picture, or of a dtype that is none.
        ValueError: mode, channel count, number of dimensions, size, NaN or range; with what was found and the remedy.
    """
    if isinstance(image, Normalized) and image.shape[-3:] == (3, height, width) and image.ndim in (3, 4):
        return image if image.ndim == 4 else image[None]
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("an empty list of pictures")
        parts = [normalize_image(one, height, width, input_range, resize, check) for one in image]
        return torch.cat(parts)
    if isinstance(image, PIL.Image.Image):
        return _from_pil(image, height, width, resize)
    if isinstance(image, np.ndarray):
        image = _channels_first(image)
    if not isinstance(image, Tensor):
        raise TypeError(f"a picture is a PIL image, a numpy array or a tensor, not {type(image).__name__}")
    return _from_tensor(image, height, width, input_range, resize, check)


def _from_pil(image: PIL.Image.Image, height: int, width: int, resize: bool) -> Normalized:
    if image.mode != "RGB":
        raise ValueError(f"a picture in mode {image.mode}: pass image.convert('RGB')")
    if 0 in image.size:
        raise ValueError(f"a picture without pixels: {image.width}x{image.height}")
    _check_size(image.height, image.width, height, width, resize)
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255.0
    return (2.0 * pixels.permute(2, 0, 1)[None] - 1.0).contiguous().as_subclass(Normalized)


def _channels_first(image: np.ndarray) -> Tensor:
    if image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"an array is [H, W, 3] or [n, H, W, 3], not {list(image.shape)}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"an array of pixels is uint8 (0..255) or floating, not {image.dtype}")
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).movedim(-1, -3)


def _from_tensor(
    image: Tensor, height: int, width: int, input_range: tuple[float, float], resize: bool, check: bool
) -> Normalized:
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"a tensor is [3, H, W] or [n, 3, H, W], not {list(image.shape)}")
    if not image.numel():
        raise ValueError(f"a picture without pixels: {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a tensor of pixels is uint8 (0..255) or floating, not {image.dtype}")
    _check_size(*image.shape[-2:], height, width, resize)
    image = image if image.ndim == 4 else image[None]
    if type(image) is Normalized:
        low, high = -1.0, 1.0
    else:
        low, high = (0.0, 255.0) if image.dtype == torch.uint8 else input_range
    image = image.as_subclass(Tensor).float()
    if check or image.device.type == "cpu":
        _check_values(image, low, high)
    image = 2.0 * ((image - low) / (high - low)) - 1.0
    if image.shape[-2:] != (height, width):
        image = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image.contiguous().as_subclass(Normalized)


def check_range(input_range: tuple[float, float]) -> None:
    """Raise ValueError unless this is (low, high) of two numbers, low below high."""
    numbers = isinstance(input_range, (tuple, list)) and all(isinstance(one, (int, float)) for one in input_range)
    if not numbers or len(input_range) != 2 or not input_range[0] < input_range[1]:
        raise ValueError(f"input_range must be (low, high) with low below high, such as (0, 1), not {input_range!r}")


def _check_size(h: int, w: int, height: int, width: int, resize: bool) -> None:
    if not resize and (h, w) != (height, width):
        raise ValueError(f"a picture of {w}x{h} for a stream of {width}x{height}: resize it, or pass resize=True")


def _check_values(image: Tensor, low: float, high: float) -> None:
    least, most = image.aminmax()
    if not (torch.isfinite(least) and torch.isfinite(most)):
        raise ValueError("the picture holds NaN or infinite values")
    slack = 1e-3 * (high - low)
    if least < low - slack or most > high + slack:
        raise ValueError(
            f"the picture's values run from {least:.4g} to {most:.4g}, outside of [{low:g}, {high:g}]: "
            f"state what yours are in with StreamFlow(..., input_range=(low, high))"
        )


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
    """A PIL image to (float32 `[1, C, H, W]` in `range`, the image)."""
    pixels = np.array(image_pil, dtype=np.float32).reshape(image_pil.height, image_pil.width, -1) / 255.0
    low, high = range
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] * (high - low) + low, image_pil


def pil2tensor(image_pil: PIL.Image.Image, dtype: torch.dtype = torch.float32) -> Tensor:
    """A PIL image to `[1, C, H, W]` in [-1, 1]."""
    return process_image(image_pil)[0].to(dtype)


def image_grid(images: Sequence[PIL.Image.Image], columns: int = 4) -> PIL.Image.Image:
    """Pictures of one size side by side, row by row; what is left of the last row is white."""
    width, height = images[0].size
    sheet = PIL.Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet
