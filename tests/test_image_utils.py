"""Pictures in and out: ranges are stated, never guessed; nothing is normalised twice; helpers are StreamDiffusion's."""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from streamflow.image_utils import (
    Normalized,
    as_rgb,
    as_rgb_where_pil,
    check_values,
    denormalize,
    marking,
    normalize_image,
    numpy_to_pil,
    pil2tensor,
    postprocess_image,
    process_image,
    pt_to_numpy,
)
from streamflow.stream.image_checks import RangeChecks

SIZE = 16


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 `[16, 16, 3]` with all levels from 0 to 255 in it."""
    return np.random.default_rng(0).permutation(np.arange(SIZE * SIZE * 3) % 256).astype(np.uint8).reshape(SIZE, SIZE, 3)


def forms(pixels: np.ndarray) -> dict:
    """The same image in every form that `input_range=(0, 1)` takes."""
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    return {
        "PIL": PIL.Image.fromarray(pixels),
        "uint8 array": pixels,
        "float32 array": pixels.astype(np.float32) / 255,
        "float64 array": pixels / 255.0,
        "batch of arrays": pixels[None],
        "uint8 tensor": chw,
        "float tensor": chw.float() / 255,
        "batch of tensors": chw[None],
        "read-only array": np.broadcast_to(pixels, pixels.shape),
        "backward array": pixels[::-1].copy()[::-1],
        "list": [PIL.Image.fromarray(pixels)],
    }


def test_every_form_of_an_image_is_the_same_image(pixels, recwarn):
    expected = 2 * torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255 - 1
    for name, image in forms(pixels).items():
        made = normalize_image(image, SIZE, SIZE)
        assert isinstance(made, Normalized) and made.dtype == torch.float32, name
        torch.testing.assert_close(made.double().as_subclass(torch.Tensor), expected, rtol=0, atol=2e-7, msg=name)
        back = postprocess_image(made)
        assert np.array_equal(np.asarray(back[0]), pixels), name
    assert not recwarn.list


def test_round_trip_of_images_in_minus_one_to_one(pixels):
    x = 2 * torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 - 1
    assert torch.allclose(normalize_image(x, SIZE, SIZE, input_range=(-1, 1)), x, atol=1e-6)
    assert np.array_equal(np.asarray(postprocess_image(x)[0]), pixels)
    assert torch.equal(pil2tensor(postprocess_image(x)[0]), x)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.75, 1.0])
def test_nothing_is_normalised_twice_and_no_range_is_guessed(value):
    constant = torch.full((3, SIZE, SIZE), value)
    once = normalize_image(constant, SIZE, SIZE)
    assert torch.equal(once, torch.full((1, 3, SIZE, SIZE), 2 * value - 1))
    again = normalize_image(once, SIZE, SIZE)
    assert again is once
    resized = normalize_image(once, 8, 24)
    assert resized.shape == (1, 3, 8, 24) and torch.allclose(resized.as_subclass(torch.Tensor), once.mean(), atol=1e-6)


KEEPING = {
    "index": lambda x: x[0],
    "slice": lambda x: x[:1],
    "to": lambda x: x.to(torch.float16),
    "half": lambda x: x.half(),
    "clone": lambda x: x.clone(),
    "deepcopy": copy.deepcopy,
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x[0], x[1]]),
    "iterate": lambda x: list(x)[1],
    "split": lambda x: x.split(1)[1],
    "cpu": lambda x: x.cpu(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "view": lambda x: x.view(-1, 3, SIZE * SIZE),
    "reshape": lambda x: x.reshape(6, SIZE, SIZE),
    "flatten": lambda x: x.flatten(1),
    "narrow": lambda x: x.narrow(0, 0, 1),
    "select": lambda x: x.select(0, 1),
    "index_select": lambda x: x.index_select(0, torch.tensor([1])),
    "masked": lambda x: x[torch.tensor([True, False])],
    "expand": lambda x: x[:1].expand(4, -1, -1, -1),
    "expand_as": lambda x: x[:1].expand_as(torch.empty(4, 3, SIZE, SIZE)),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.mT,
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "flip": lambda x: x.flip(-1),
    "torch.flip": lambda x: torch.flip(x, (-1,)),
    "roll": lambda x: x.roll(1, 0),
    "squeeze": lambda x: x[:1].squeeze(0),
    "torch.unsqueeze": lambda x: torch.unsqueeze(x[0], 0),
    "unbind": lambda x: x.unbind()[0],
    "chunk": lambda x: x.chunk(2)[1],
    "data": lambda x: x.data,
    "type": lambda x: x.type(torch.float64),
    "concat": lambda x: torch.concat([x]),
    "concatenate": lambda x: torch.concatenate((x, x), dim=0),
    "cat by keyword": lambda x: torch.cat(tensors=[x, x], dim=0),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x]),
    "requires_grad_": lambda x: x.clone().requires_grad_(True),
    "requires_grad": lambda x: _set(x.clone(), "requires_grad", True),
    "share_memory_": lambda x: x.clone().share_memory_(),
    "unsqueeze_": lambda x: x.clone().unsqueeze_(0),
    "filled with another one": lambda x: x.clone().copy_(x.flip(0)),
    "a row written from another one": lambda x: _write(x.clone(), x[1]),
}

DROPPING = {
    "multiply": lambda x: x * 0.5,
    "reversed": lambda x: 1 - x,
    "negate": lambda x: -x,
    "clamp": lambda x: x.clamp(0, 1),
    "mean": lambda x: x.mean(),
    "to integers": lambda x: x.to(torch.uint8),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "denormalize": denormalize,
    "in place": lambda x: x.clone().mul_(2),
    "written into": lambda x: _write(x.clone(), 7.0),
    "a row written from elsewhere": lambda x: _write(x.clone(), torch.full((3, SIZE, SIZE), 7.0)),
    "filled from elsewhere": lambda x: x.clone().copy_(torch.rand_like(x.as_subclass(torch.Tensor)), non_blocking=True),
    "new data": lambda x: _set(x.clone(), "data", torch.full((2, 3, SIZE, SIZE), 7.0)),
    "a result written into it": lambda x: _out(x.clone()),
    "other bits": lambda x: x.view(torch.int32),
    "the same bits as half": lambda x: x.view(torch.float16),
    "interpolated": lambda x: torch.nn.functional.interpolate(x, (8, 8)),
    "padded": lambda x: torch.nn.functional.pad(x, (1, 1), value=3.0),
    "like it": lambda x: torch.zeros_like(x),
    "a copy of it in another tensor": lambda x: torch.empty(2, 3, SIZE, SIZE).copy_(x),
    "augmented": lambda x: _augment(x.clone()),
}


def _write(x, value):
    x[0] = value
    return x


def _set(x, name, value):
    setattr(x, name, value)
    return x


def _out(x):
    torch.mul(torch.ones(2, 3, SIZE, SIZE), 7.0, out=x)
    return x


def _augment(x):
    y = x
    y *= 3
    return x


@pytest.fixture
def marked() -> Normalized:
    return normalize_image(torch.rand(2, 3, SIZE, SIZE), SIZE, SIZE)


@pytest.mark.parametrize("name", KEEPING)
def test_the_mark_is_kept_by_what_keeps_values(marked, name):
    assert type(KEEPING[name](marked)) is Normalized
    assert type(marked) is Normalized


@pytest.mark.parametrize("name", DROPPING)
def test_the_mark_is_dropped_by_arithmetic(marked, name):
    assert type(DROPPING[name](marked)) is torch.Tensor
    assert type(marked) is Normalized


JOINING = {
    "cat": lambda x, y: torch.cat([x, y]),
    "concat": lambda x, y: torch.concat((y, x)),
    "stack": lambda x, y: torch.stack([x, y]),
    "vstack": lambda x, y: torch.vstack([y, x]),
}


@pytest.mark.parametrize("name", JOINING)
def test_marked_and_unmarked_images_are_not_joined(marked, name):
    with pytest.raises(ValueError, match=r"marked as images in \[-1, 1\] with others of unknown range.*stream.preprocess"):
        JOINING[name](marked, torch.rand(2, 3, SIZE, SIZE))


MODES = {
    "L": (PIL.Image.new("L", (SIZE, SIZE), 51), (51, 51, 51)),
    "1": (PIL.Image.new("1", (SIZE, SIZE), 1), (255, 255, 255)),
    "P": (PIL.Image.new("RGB", (SIZE, SIZE), (10, 200, 30)).quantize(4), (10, 200, 30)),
    "CMYK": (PIL.Image.new("CMYK", (SIZE, SIZE), (0, 0, 0, 0)), (255, 255, 255)),
    "opaque RGBA": (PIL.Image.new("RGBA", (SIZE, SIZE), (9, 8, 7, 255)), (9, 8, 7)),
    "transparent RGBA": (PIL.Image.new("RGBA", (SIZE, SIZE), (9, 8, 7, 0)), (255, 255, 255)),
    "half RGBA": (PIL.Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 51)), (204, 204, 204)),
    "LA": (PIL.Image.new("LA", (SIZE, SIZE), (0, 0)), (255, 255, 255)),
    "I;16": (PIL.Image.fromarray(np.full((SIZE, SIZE), 51 * 257, np.uint16)), (51, 51, 51)),
}


@pytest.mark.parametrize("name", MODES)
def test_images_of_other_modes_become_rgb(name):
    image, colour = MODES[name]
    expected = torch.tensor(colour).reshape(1, 3, 1, 1) / 127.5 - 1
    processor = marking(VaeImageProcessor(vae_scale_factor=4), as_rgb_where_pil)
    for made in (normalize_image(image, SIZE, SIZE), processor.preprocess(image), processor.preprocess([image])):
        assert type(made) is Normalized
        torch.testing.assert_close(made.as_subclass(torch.Tensor), expected.expand(1, 3, SIZE, SIZE), atol=1e-6, rtol=0)
    assert as_rgb(image).mode == "RGB"


def test_what_an_image_processor_made_is_marked_and_not_normalised_again(pixels):
    plain = VaeImageProcessor(vae_scale_factor=4)
    processor = marking(plain, as_rgb_where_pil)
    bright = PIL.Image.fromarray(pixels // 2 + 128)
    made = processor.preprocess(bright, SIZE, SIZE)
    assert type(made) is Normalized and torch.equal(made.as_subclass(torch.Tensor), plain.preprocess(bright, SIZE, SIZE))
    assert processor.preprocess(made) is not None and torch.equal(processor.preprocess(made), made)
    assert torch.equal(processor.preprocess(made[0]), made) and torch.equal(processor.preprocess([made, made])[1:], made)
    smaller = processor.preprocess(made, 8, 8)
    assert type(smaller) is Normalized and smaller.min() > -0.01 and smaller.shape == (1, 3, 8, 8)
    assert type(plain.preprocess(bright)) is torch.Tensor, "the pipe's own processor is as it was"
    with pytest.raises(ValueError, match="what the image processor made of this image run from 509 to 509.*: divide first"):
        processor.preprocess(torch.full((1, 3, SIZE, SIZE), 255.0))
    unnormalised = marking(VaeImageProcessor(vae_scale_factor=4, do_normalize=False), as_rgb_where_pil)
    assert type(unnormalised.preprocess(bright)) is torch.Tensor


def test_pil2tensor_is_taken_as_it_is_and_other_ranges_are_not_marked(pixels):
    image = PIL.Image.fromarray(pixels // 2 + 128)
    expected = normalize_image(image, SIZE, SIZE)
    for tensor in (pil2tensor(image), torch.cat([pil2tensor(image)]).to("cpu"), process_image(image)[0]):
        assert torch.allclose(normalize_image(tensor, SIZE, SIZE), expected, atol=1e-6)
    assert type(process_image(image, (0, 1))[0]) is torch.Tensor


def test_checks_are_made_at_once_on_the_host_and_later_on_a_device():
    checks = RangeChecks()
    checks.add("the image of frame 3", torch.zeros(1, 3, 4, 4), 0.0, 1.0)
    checks.raise_failed()
    with pytest.raises(ValueError, match=r"values of the image of frame 3 run from 2 to 2, outside of \[0, 1\]"):
        checks.add("the image of frame 3", torch.full((1, 3, 4, 4), 2.0), 0.0, 1.0)
    with pytest.raises(ValueError, match="frame 4 holds NaN or infinite values"):
        checks.add("the image of frame 4", torch.full((1, 3, 4, 4), float("nan")), 0.0, 1.0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_values(torch.ones(2, dtype=dtype), 0.0, 1.0)
        with pytest.raises(ValueError, match="run from -1 to -1"):
            check_values(-torch.ones(2, dtype=dtype), 0.0, 1.0)


def test_a_part_of_an_image_is_no_image(marked):
    with pytest.raises(ValueError, match=r"\[3, H, W\] or \[n, 3, H, W\], not \[16, 16\]"):
        normalize_image(marked[0, 0], SIZE, SIZE)
    with pytest.raises(ValueError, match=r"not \[2, 1, 16, 16\]"):
        normalize_image(marked[:, :1], SIZE, SIZE)


@pytest.mark.parametrize("size", [(SIZE, SIZE), (12, 40)], ids=["same size", "resized"])
def test_equal_to_the_image_processor_of_diffusers(pixels, size):
    processor = VaeImageProcessor(vae_scale_factor=4)
    image = PIL.Image.fromarray(pixels)
    assert torch.equal(normalize_image(image, *size), processor.preprocess(image, *size))
    if size == (SIZE, SIZE):
        array = pixels.astype(np.float32) / 255
        assert torch.equal(normalize_image(array, *size), processor.preprocess(array, *size))
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        assert torch.equal(normalize_image(tensor, *size), processor.preprocess(tensor, *size))


@pytest.mark.parametrize("form", ["PIL", "uint8 array", "float tensor"])
def test_other_sizes_are_resized_or_refused(pixels, form):
    image = forms(pixels)[form]
    made = normalize_image(image, 8, 24)
    assert made.shape == (1, 3, 8, 24) and made.abs().max() <= 1.0
    with pytest.raises(ValueError, match="an image of 16x16 for a stream of 24x8: resize it, or pass resize=True"):
        normalize_image(image, 8, 24, resize=False)


BAD = {
    "no picture": ("a.png", TypeError, "PIL image, a numpy array or a tensor, not str"),
    "32 bits": (PIL.Image.new("I", (SIZE, SIZE)), ValueError, "mode I does not say which values are black and white"),
    "four channels": (np.zeros((SIZE, SIZE, 4), np.uint8), ValueError, r"\[H, W, 3\].*not \[16, 16, 4\]"),
    "channels last": (torch.zeros(SIZE, SIZE, 3), ValueError, r"\[3, H, W\].*not \[16, 16, 3\]"),
    "flat": (torch.zeros(SIZE, SIZE), ValueError, r"not \[16, 16\]"),
    "integers": (torch.zeros(3, SIZE, SIZE, dtype=torch.int64), TypeError, "uint8 .* or floating, not torch.int64"),
    "booleans": (np.zeros((SIZE, SIZE, 3), bool), TypeError, "uint8 .* or floating, not bool"),
    "NaN": (torch.full((3, SIZE, SIZE), float("nan")), ValueError, "NaN or infinite"),
    "infinite": (torch.full((3, SIZE, SIZE), float("inf")), ValueError, "NaN or infinite"),
    "0..255 as floats": (torch.full((3, SIZE, SIZE), 255.0), ValueError, r"255 to 255, outside of \[0, 1\]: .*input_range"),
    "negative": (torch.full((3, SIZE, SIZE), -1.0), ValueError, r"-1 to -1, outside of \[0, 1\]"),
    "nothing": ([], ValueError, "empty list"),
    "one bad of two": ([np.zeros((SIZE, SIZE, 3)), 3], TypeError, "not int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused(name):
    image, error, message = BAD[name]
    with pytest.raises(error, match=message):
        normalize_image(image, SIZE, SIZE)


@pytest.fixture
def original(monkeypatch):
    """StreamDiffusion's own image_utils; it imports torchvision, which nothing used here needs."""
    if "torchvision" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    return importlib.import_module("streamdiffusion.image_utils")


@pytest.mark.parametrize("flags", [None, [True, False]], ids=["all", "one of two"])
@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
def test_postprocess_image_is_streamdiffusions(original, output_type, flags):
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * (1 if flags else 3) - (
        0 if flags else 1.5
    )
    ours, theirs = postprocess_image(x, output_type, flags), original.postprocess_image(x, output_type, flags)
    assert type(ours) is type(theirs) and len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    for name, convert in (("pt_to_numpy", pt_to_numpy), ("denormalize", denormalize)):
        assert np.array_equal(convert(x), getattr(original, name)(x))
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    for one, other in zip(numpy_to_pil(grey), original.numpy_to_pil(grey), strict=True):
        assert one.mode == other.mode == "L" and one.tobytes() == other.tobytes()


def test_postprocess_image_refuses_with_the_remedy():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="'jpeg': choose one of 'latent', 'pt', 'np', 'pil'"):
        postprocess_image(x, "jpeg")
    with pytest.raises(ValueError, match="takes a tensor, not ndarray"):
        postprocess_image(x.numpy())
    with pytest.raises(ValueError, match="1 entries for 2 images"):
        postprocess_image(x, do_denormalize=[True])


def test_process_image_gives_the_range_asked_for(pixels):
    image = PIL.Image.fromarray(pixels)
    for low, high in ((-1, 1), (0, 1), (-2, 3)):
        x, same = process_image(image, (low, high))
        assert same is image and x.shape == (1, 3, SIZE, SIZE) and x.dtype == torch.float32
        assert x.min().item() == pytest.approx(low) and x.max().item() == pytest.approx(high)
    assert process_image(image.convert("L"))[0].shape == (1, 1, SIZE, SIZE)
    assert pil2tensor(image).dtype == torch.float32 and pil2tensor(image, torch.bfloat16).dtype == torch.bfloat16
