"""Images in and out. In: PIL, numpy and tensors become float32 `[n, 3, H, W]` in [-1, 1]; what range a float image is in is
stated by the caller and never guessed. Out: StreamDiffusion's helpers under their own names."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
Images = PIL.Image.Image | np.ndarray | Tensor | Sequence[Any]  # one image or several, as `image_tensor` takes them
Maker = Callable[[PIL.Image.Image], Any]  # makes a control image of an image
ControlArgument = (
    Mapping[str, Images | Maker | str | None] | Maker | str
)  # by the names of the control nets, or of the only one
ReferenceArgument = Images | Sequence[Images]  # one reference image or several, each of one frame or of all frames of a call
Size = tuple[int, int]  # (width, height) in pixels
Sizes = Callable[
    [Size], tuple[Size, Size]
]  # from an image's size to (the size it is resized to, the size cropped from that)
Check = Callable[[Tensor, float, float], None]
"""`check(image, low, high)`: raise ValueError, now or later, unless the values of `image` are in [low, high]."""


# -- tensors that are known to be in [-1, 1] -------------------------------------------------------------------------------

# Functions and methods that move or select values and compute none, by name.
_KEEPING = frozenset(
    "to cpu cuda type type_as float half bfloat16 double data pin_memory clone detach contiguous __getitem__ unsqueeze "
    "squeeze unbind split tensor_split split_with_sizes chunk hsplit vsplit dsplit view view_as reshape reshape_as flatten "
    "ravel unflatten narrow select index_select take gather masked_select expand expand_as broadcast_to permute transpose "
    "swapaxes swapdims movedim moveaxis T mT adjoint t repeat tile repeat_interleave roll flip fliplr flipud rot90 "
    "diagonal unfold as_strided alias "
    "requires_grad_ share_memory_ detach_ squeeze_ unsqueeze_ transpose_ swapaxes_ swapdims_ t_".split()
)
_JOINING = frozenset("cat concat concatenate stack hstack vstack dstack column_stack row_stack".split())
_SEVERAL = frozenset("atleast_1d atleast_2d atleast_3d".split())  # of one tensor or several, each by itself
_COPYING = {"copy_": 1, "__setitem__": 2}  # which argument holds the values that go into the first one
# Functions that write into their first argument, as functions with names that end in one underscore do.
_WRITING = frozenset("__setitem__ __iadd__ __isub__ __imul__ __itruediv__ data= real=".split())


class Normalized(Tensor):
    """A tensor that is known to hold images in [-1, 1]. Whatever moves, selects or joins its values keeps the mark; whatever
    computes a new value drops it, from the tensor itself where that, or a view of it, is written into. Joining it with an
    unmarked tensor raises ValueError. Ask `is_marked`, since a write through a view leaves the class as it is. What is
    written through `.numpy()` or `.data` is not seen."""

    _stamp: int  # torch's count of writes into this memory when the mark was set

    @classmethod
    def __torch_function__(cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        sources = _sources(name, args, kwargs)
        keeps = bool(sources) and is_marked(sources) and not _reinterprets(name, args, kwargs)
        if name in _JOINING and not keeps:
            raise ValueError(
                f"{name} of tensors that are marked as images in [-1, 1] with others of unknown range: pass these "
                f"through stream.preprocess first, or drop the mark, image.as_subclass(torch.Tensor)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if keeps and name in _COPYING:
                sources[0]._stamp = _writes(sources[0])
                return result
            if keeps:
                return _mark(result)
            _unmark(kwargs.get("out"))
            if name in _WRITING or (name[-1:] == "_" and name[-2:] != "__"):
                _unmark(args[0])
            return result.as_subclass(Tensor) if type(result) is cls else result

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: object) -> object:
        plain = self.as_subclass(Tensor)
        return (mark, (plain,)) if is_marked(self) else plain.__reduce_ex__(protocol)


def mark(image: Tensor) -> Normalized:
    """The same tensor, marked as holding images in [-1, 1]."""
    marked = image.as_subclass(Normalized)
    marked._stamp = _writes(marked)
    return marked


torch.serialization.add_safe_globals([mark])  # `torch.load` makes marked tensors by it


def _writes(image: Tensor) -> int:
    """How often torch has written into this memory; of inference tensors it keeps no count."""
    with torch._C.DisableTorchFunctionSubclass():
        return 0 if image.is_inference() else image._version


def _name(func: Any) -> str:
    """The name of a function, or of the attribute that it reads; `attribute=` where it assigns that."""
    name = getattr(func, "__name__", "")
    if name not in ("__get__", "__set__"):
        return name
    return getattr(func.__self__, "__name__", "") + ("=" if name == "__set__" else "")


def _sources(name: str, args: tuple, kwargs: dict) -> Sequence[Any]:
    """Where the values of the result come from; nothing where it has computed them."""
    first = args[0] if args else kwargs.get("tensors", kwargs.get("input"))
    if name in _JOINING:
        return first if isinstance(first, (list, tuple)) else (first,)
    if name in _COPYING:
        return first, args[_COPYING[name]] if len(args) > _COPYING[name] else kwargs.get("src")
    if name in _SEVERAL:
        return first if isinstance(first, (list, tuple)) else args
    return (first,) if name in _KEEPING else ()


def _reinterprets(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether this reads the bits of values as another type."""
    return name == "view" and any(isinstance(one, torch.dtype) for one in (*args, *kwargs.values()))


def _mark(result: object) -> Any:
    if isinstance(result, (list, tuple)):
        return type(result)(_mark(part) for part in result)
    if not isinstance(result, Tensor) or type(result) is Normalized:
        return result
    return mark(result) if result.is_floating_point() else result


def _unmark(value: object) -> None:
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if type(one) is Normalized:
            object.__setattr__(one, "__class__", Tensor)


def is_marked(image: object) -> bool:
    """Whether this is a marked tensor, or a list of nothing else."""
    parts = image if isinstance(image, (list, tuple)) and image else (image,)
    return all(type(one) is Normalized and one._stamp == _writes(one) for one in parts)


def marking(processor: Any, convert: Callable[[object], Any]) -> Any:
    """A copy of a diffusers image processor. Its `preprocess` marks its results, and returns a marked tensor unchanged.
    `convert` is what happens to any other image first."""

    def preprocess(image: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(image, (list, tuple)) and any(map(is_marked, image)) and not is_marked(image):
            return torch.cat([preprocess(one, *args, **kwargs) for one in image])
        if not is_marked(image):
            made = processor.preprocess(convert(image), *args, **kwargs)
            if not processor.config.do_normalize:
                return made
            if made.device.type == "cpu":
                check_extremes(_extremes(made), -1.0, 1.0, "what the image processor made of this image", _GIVE_IT)
            return mark(made)
        parts = [one if one.ndim == 4 else one[None] for one in (image if isinstance(image, (list, tuple)) else [image])]
        image = torch.cat(parts)
        made = processor.preprocess((image / 2 + 0.5).clamp(0, 1), *args, **kwargs)
        return image if made.shape == image.shape else mark(made)

    twin = copy.copy(processor)
    vars(twin)["preprocess"] = preprocess
    return twin


# -- checks of values -----------------------------------------------------------------------------------------------------


def check_values(image: Tensor, low: float, high: float) -> None:
    """ValueError unless all values are finite and in [low, high]. On a GPU the host waits for the answer."""
    check_extremes(_extremes(image), low, high, "the image")


def check_on_host(image: Tensor, low: float, high: float) -> None:
    """`check_values` of a tensor on the CPU; one that is elsewhere is not looked at."""
    if image.device.type == "cpu":
        check_values(image, low, high)


_GIVE_IT = "an image processor takes floats in [0, 1]: divide first, or call stream.preprocess(image)"
_STATE_IT = (
    "state what yours are in with StreamFlow(..., input_range=(low, high)); a tensor in [-1, 1] that stream.preprocess, "
    "stream.image_processor.preprocess or streamflow.image_utils.pil2tensor made is taken as it is, until something "
    "computes with it"
)


def _extremes(image: Tensor) -> list[float]:
    return torch.stack(image.as_subclass(Tensor).aminmax()).tolist()


def check_extremes(extremes: Sequence[float], low: float, high: float, what: str, remedy: str = _STATE_IT) -> None:
    """ValueError unless the least and the greatest value are finite and in [low, high], to a thousandth of that range."""
    least, most = extremes
    slack = 1e-3 * (high - low)
    if low - slack <= least and most <= high + slack:
        return
    if not all(torch.isfinite(torch.tensor(extremes))):
        raise ValueError(f"{what} holds NaN or infinite values")
    found = f"run from {least:.4g} to {most:.4g}, outside of [{low:g}, {high:g}]"
    raise ValueError(f"the values of {what} {found}: {remedy}")


# -- images in -------------------------------------------------------------------------------------------------------------


def normalize_image(
    image: Images,
    height: int,
    width: int,
    input_range: tuple[float, float] = (0, 1),
    resize: bool = True,
    check: Check = check_on_host,
) -> Normalized:
    """As `image_tensor`, marked as being in [-1, 1]. A marked tensor of this size comes back unchanged."""
    made = image_tensor(image, height, width, input_range, resize, check)
    if not isinstance(image, Normalized) or not is_marked(image) or image.shape[-3:] != made.shape[-3:]:
        return mark(made)
    return image if image.ndim == 4 else mark(image[None])


def image_tensor(
    image: Images,
    height: int,
    width: int,
    input_range: tuple[float, float] = (0, 1),
    resize: bool = True,
    check: Check = check_on_host,
) -> Tensor:
    """Make `[n, 3, height, width]` in [-1, 1] of an image or several.

    image: a PIL image (`as_rgb` says what becomes of other modes than RGB); an array `[H, W, 3]` or `[n, H, W, 3]`; a tensor
        `[3, H, W]` or `[n, 3, H, W]`; or a list of images. uint8 is 0..255, floats are in `input_range`, and a `Normalized`
        tensor is in [-1, 1].
    resize: stretch other sizes (Lanczos for PIL, antialiased bilinear otherwise), or refuse them.
    check: `check(image, low, high)` looks at the values of float images; by default at those on the CPU.

    Raises:
        TypeError: not an image, or of a dtype that is none.
        ValueError: mode, channel count, number of dimensions, size, NaN or range; with what was found and the remedy.
    """
    if isinstance(image, PIL.Image.Image):
        return _from_pil(image, height, width, resize)
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("an empty list of images")
        return torch.cat([image_tensor(one, height, width, input_range, resize, check) for one in image])
    image = _as_tensor(image)
    if is_marked(image) and image.shape[-3:] == (3, height, width) and image.ndim in (3, 4):
        if image.device.type == "cpu":
            check(image, -1.0, 1.0)
        return (image if image.ndim == 4 else image[None]).as_subclass(Tensor)
    return _from_tensor(image, height, width, input_range, resize, check)


def images_of_own_size(
    image: Images,
    sizes: Sizes | None = None,
    input_range: tuple[float, float] = (0, 1),
    check: Check = check_on_host,
) -> list[Tensor]:
    """One image or several as `[1, 3, h, w]` in [-1, 1] each, in memory of their own, not marked.

    sizes: from an image's (width, height) to the size to which it is resized, as `image_tensor` does but with Lanczos for
    uint8 on the CPU too, and the size that is cropped from the middle of that. None: images stay as they are.

    Raises as `image_tensor`, and what `sizes` raises.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("an empty list of images")
        return [made for one in image for made in images_of_own_size(one, sizes, input_range, check)]
    if not isinstance(image, PIL.Image.Image):
        pixels = _as_tensor(image)
        image = pixels if is_marked(pixels) else pixels.as_subclass(Tensor)
        if image.ndim in (3, 4) and image.shape[-3] == 3 and image.dtype == torch.uint8 and image.device.type == "cpu":
            rows = image.movedim(-3, -1).numpy()
            image = [PIL.Image.fromarray(np.ascontiguousarray(one)) for one in (rows if rows.ndim == 4 else rows[None])]
            return [made for one in image for made in images_of_own_size(one, sizes, input_range, check)]
    own = image_size(image)
    (width, height), (crop_width, crop_height) = (own, own) if sizes is None else sizes(own)
    made = image_tensor(image, height, width, input_range, True, check)
    if isinstance(image, Tensor) and made.data_ptr() == image.data_ptr():
        made = made.clone()
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    cropped = made[..., top : top + crop_height, left : left + crop_width]
    return list(cropped.as_subclass(Tensor).contiguous().split(1))


def image_size(image: PIL.Image.Image | np.ndarray | Tensor) -> Size:
    """Width and height of an image, or of the images in an array or a tensor. ValueError for one without them."""
    if isinstance(image, PIL.Image.Image):
        return image.size
    shape = _as_tensor(image).shape
    if len(shape) not in (3, 4):
        raise ValueError(f"a tensor is [3, H, W] or [n, 3, H, W], not {list(shape)}")
    return shape[-1], shape[-2]


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image in mode RGB: what is transparent becomes white, grey stays grey, 16 bits a pixel become 8. Each kind of
    change is logged once. ValueError for a mode without a defined range (I, F)."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        raise ValueError(
            f"an image in mode {image.mode} does not say which values are black and white: pass an array, in 0..255 as "
            f"uint8 or in the stream's input_range"
        )
    if image.mode.startswith("I;16"):
        _log_once("an image of 16 bits a pixel is taken as 0 (black) to 65535 (white)")
        return PIL.Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        _log_once(f"an image in mode {image.mode} is put on white where it is transparent; image.convert('RGB') drops that")
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def as_rgb_where_pil(image: object) -> Any:
    """A PIL image, or each of a list of them, by `as_rgb`; anything else as it is."""
    if isinstance(image, (list, tuple)):
        return type(image)(as_rgb_where_pil(one) for one in image)
    return as_rgb(image) if isinstance(image, PIL.Image.Image) else image


@cache
def _log_once(message: str) -> None:
    logger.info(message)


MAX_PIXELS = 2**26  # of an image file: 8192 x 8192


class ImageFileError(OSError, ValueError):
    """An image file that cannot be read, with its name and the reason."""


def open_image(
    source: str | Path | bytes,
    formats: list[str] | tuple[str, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
    side: int | None = None,
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


def _from_pil(image: PIL.Image.Image, height: int, width: int, resize: bool) -> Tensor:
    if 0 in image.size:
        raise ValueError(f"an image without pixels: {image.width}x{image.height}")
    image = as_rgb(image)
    _check_size(image.height, image.width, height, width, resize)
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255.0
    return (2.0 * pixels.permute(2, 0, 1)[None] - 1.0).contiguous()


def _as_tensor(image: object) -> Tensor:
    if isinstance(image, np.ndarray):
        return _channels_first(image)
    if not isinstance(image, Tensor):
        raise TypeError(f"an image is a PIL image, a numpy array or a tensor, not {type(image).__name__}")
    return image


def _channels_first(image: np.ndarray) -> Tensor:
    if image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(f"an array is [H, W, 3] or [n, H, W, 3], not {list(image.shape)}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"an array of pixels is uint8 (0..255) or floating, not {image.dtype}")
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).movedim(-1, -3)


def _from_tensor(
    image: Tensor, height: int, width: int, input_range: tuple[float, float], resize: bool, check: Check
) -> Tensor:
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"a tensor is [3, H, W] or [n, 3, H, W], not {list(image.shape)}")
    if not image.numel():
        raise ValueError(f"an image without pixels: {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"a tensor of pixels is uint8 (0..255) or floating, not {image.dtype}")
    h, w = image.shape[-2:]
    _check_size(h, w, height, width, resize)
    image = image if image.ndim == 4 else image[None]
    if is_marked(image):
        low, high = -1.0, 1.0
    else:
        low, high = (0.0, 255.0) if image.dtype == torch.uint8 else input_range
    if image.dtype != torch.uint8:
        check(image, low, high)
    image = image.as_subclass(Tensor).float()
    image = 2.0 * ((image - low) / (high - low)) - 1.0
    if (h, w) != (height, width):
        image = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image.contiguous()


def check_range(input_range: tuple[float, float]) -> None:
    """Raise ValueError unless this is (low, high) of two numbers, low below high."""
    numbers = isinstance(input_range, (tuple, list)) and all(isinstance(one, (int, float)) for one in input_range)
    if not numbers or len(input_range) != 2 or not input_range[0] < input_range[1]:
        raise ValueError(f"input_range must be (low, high) with low below high, such as (0, 1), not {input_range!r}")


def _check_size(h: int, w: int, height: int, width: int, resize: bool) -> None:
    if not resize and (h, w) != (height, width):
        raise ValueError(f"an image of {w}x{h} for a stream of {width}x{height}: resize it, or pass resize=True")


# -- StreamDiffusion's helpers -----------------------------------------------------------------------------------------


Values = TypeVar("Values", Tensor, np.ndarray)


def denormalize(images: Values) -> Values:
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


@overload
def postprocess_image(
    image: Tensor, output_type: Literal["pil"] = "pil", do_denormalize: Sequence[bool] | None = None
) -> list[PIL.Image.Image]: ...


@overload
def postprocess_image(
    image: Tensor, output_type: str, do_denormalize: Sequence[bool] | None = None
) -> Tensor | np.ndarray | list[PIL.Image.Image]: ...


def postprocess_image(
    image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None
) -> Tensor | np.ndarray | list[PIL.Image.Image]:
    """Images `[n, C, H, W]` in [-1, 1] to what a caller wants.

    output_type: `"latent"` (as it is), `"pt"` and `"np"` (in [0, 1]) or `"pil"`. do_denormalize: one flag for each image;
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
        raise ValueError(f"do_denormalize has {len(flags)} entries for {len(image)} images")
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


def image_grid(images: Sequence[PIL.Image.Image], columns: int = 4, labels: Sequence[str] | None = None) -> PIL.Image.Image:
    """Images of one size side by side, row by row; what is left of the last row is white. labels: a line of text below each
    image. ValueError: not as many labels as images."""
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: give one for each")
    (width, height), line = images[0].size, 0 if labels is None else 20
    sheet = PIL.Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + line)), "white")
    for k, image in enumerate(images):
        left, top = k % columns * width, k // columns * (height + line)
        sheet.paste(image, (left, top))
        if labels is not None:
            from PIL import ImageDraw, ImageFont

            font = ImageFont.load_default(size=12)
            ImageDraw.Draw(sheet).text((left + width // 2, top + height + line // 2), labels[k], "black", font, anchor="mm")
    return sheet
