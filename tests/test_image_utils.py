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
    denormalize,
    normalize_image,
    numpy_to_pil,
    pil2tensor,
    postprocess_image,
    process_image,
    pt_to_numpy,
)

SIZE = 16


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 `[16, 16, 3]` with all levels from 0 to 255 in it."""
    return np.random.default_rng(0).permutation(np.arange(SIZE * SIZE * 3) % 256).astype(np.uint8).reshape(SIZE, SIZE, 3)


def forms(pixels: np.ndarray) -> dict:
    """The same picture in every form that `input_range=(0, 1)` takes."""
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


def test_every_form_of_a_picture_is_the_same_picture(pixels, recwarn):
    expected = 2 * torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255 - 1
    for name, image in forms(pixels).items():
        made = normalize_image(image, SIZE, SIZE)
        assert isinstance(made, Normalized) and made.dtype == torch.float32, name
        torch.testing.assert_close(made.double().as_subclass(torch.Tensor), expected, rtol=0, atol=2e-7, msg=name)
        back = postprocess_image(made)
        assert np.array_equal(np.asarray(back[0]), pixels), name
    assert not recwarn.list


def test_round_trip_of_pictures_in_minus_one_to_one(pixels):
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
}

DROPPING = {
    "multiply": lambda x: x * 0.5,
    "reversed": lambda x: 1 - x,
    "negate": lambda x: -x,
    "clamp": lambda x: x.clamp(0, 1),
    "mean": lambda x: x.mean(),
    "to integers": lambda x: x.to(torch.uint8),
    "cat with an unmarked one": lambda x: torch.cat([x, torch.rand(1, 3, SIZE, SIZE)]),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "denormalize": denormalize,
    "in place": lambda x: x.clone().mul_(2),
    "written into": lambda x: _write(x.clone()),
    "augmented": lambda x: _augment(x.clone()),
}


def _write(x):
    x[0] = 7.0
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


def test_a_part_of_a_picture_is_no_picture(marked):
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
    with pytest.raises(ValueError, match="a picture of 16x16 for a stream of 24x8: resize it, or pass resize=True"):
        normalize_image(image, 8, 24, resize=False)


BAD = {
    "no picture": ("a.png", TypeError, "PIL image, a numpy array or a tensor, not str"),
    "grey": (PIL.Image.new("L", (SIZE, SIZE)), ValueError, r"mode L: pass image.convert\('RGB'\)"),
    "transparent": (PIL.Image.new("RGBA", (SIZE, SIZE)), ValueError, "mode RGBA"),
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
def test_bad_pictures_are_refused(name):
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
    with pytest.raises(ValueError, match="1 entries for 2 pictures"):
        postprocess_image(x, do_denormalize=[True])


def test_process_image_gives_the_range_asked_for(pixels):
    image = PIL.Image.fromarray(pixels)
    for low, high in ((-1, 1), (0, 1), (-2, 3)):
        x, same = process_image(image, (low, high))
        assert same is image and x.shape == (1, 3, SIZE, SIZE) and x.dtype == torch.float32
        assert x.min().item() == pytest.approx(low) and x.max().item() == pytest.approx(high)
    assert process_image(image.convert("L"))[0].shape == (1, 1, SIZE, SIZE)
    assert pil2tensor(image).dtype == torch.float32 and pil2tensor(image, torch.bfloat16).dtype == torch.bfloat16
