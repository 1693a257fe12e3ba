"""Causal video VAEs: a video that is encoded or decoded in parts is what the VAE gives for the whole video."""

from __future__ import annotations

import diffusers
import pytest
import torch
from conftest import slow
from random_pipelines.video import wan_vae

from streamflow.models.causal_codec import CausalCodec

SMALL = dict(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
VAES = {
    "wan": wan_vae,
    "wan-2.2": lambda: diffusers.AutoencoderKLWan(
        **SMALL, patch_size=2, in_channels=12, out_channels=12, is_residual=True, scale_factor_spatial=16
    ),
    "qwen": lambda: diffusers.AutoencoderKLQwenImage(**SMALL),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae_of(name: str, exact: bool = False, dtype: torch.dtype = torch.float32):
    """A small random VAE. exact: its convolutions of 1 x 1 x 1 at the latents copy, so that nothing is rounded there."""
    torch.manual_seed(0)
    vae = VAES[name]().eval().requires_grad_(False)
    for conv in (vae.quant_conv, vae.post_quant_conv) if exact else ():
        conv.weight.copy_(torch.eye(len(conv.weight)).reshape(conv.weight.shape))
        conv.bias.zero_()
    return vae.to(dtype)


def in_parts(method, x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """What an `encode` or `decode` returns for the parts of a video."""
    memory, parts = None, []
    for part in x.split(sizes, dim=2):
        y, memory = method(part, memory)
        parts.append(y)
    return parts


HALF = [slow(name, dtype) for name in VAES for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in VAES), ("wan", torch.bfloat16), *HALF[1:]])
def test_a_video_in_parts_is_the_whole_video(name, dtype):
    """To the bit in the networks, in every dtype and for parts of any size, of several videos too."""
    vae = vae_of(name, exact=True, dtype=dtype)
    codec, z, x = CausalCodec(vae), random(2, 16, 4, 1, 2), random(1, 3, 9, 16, 32).clamp(-1, 1)
    with torch.no_grad():
        images, latents = vae.decode(z.to(dtype)).sample, vae.encode(x.to(dtype)).latent_dist.mode()
    assert images.std() > 0.01 and latents.std() > 0.01, "values that are alike would prove nothing"
    for sizes, lengths in (([1, 2, 1], [1, 8, 4]), ([3, 1], [9, 4])):
        parts = in_parts(codec.decode, z, sizes)
        assert [part.shape[2] for part in parts] == lengths
        assert torch.equal(torch.cat(parts, dim=2), images)
    for sizes, lengths in (([1, 8], [1, 2]), ([5, 4], [2, 1])):
        parts = in_parts(codec.encode, x, sizes)
        assert [part.shape[2] for part in parts] == lengths
        assert torch.equal(torch.cat(parts, dim=2), latents)


@pytest.mark.parametrize("name", ["wan", slow("wan-2.2"), slow("qwen")])
def test_only_the_convolution_at_the_latents_rounds_differently(name):
    vae = vae_of(name)
    codec, z, x = CausalCodec(vae), random(1, 16, 4, 2, 2), random(1, 3, 9, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        images, latents = vae.decode(z).sample, vae.encode(x).latent_dist.mode()
        one_by_one = torch.cat([vae.post_quant_conv(one) for one in z.split(1, dim=2)], dim=2)
        assert (one_by_one - vae.post_quant_conv(z)).abs().max() < 3e-7
    assert (torch.cat(in_parts(codec.decode, z, [1, 2, 1]), dim=2) - images).abs().max() < 3e-6  # a decoder may amplify it
    assert (torch.cat(in_parts(codec.encode, x, [1, 4, 4]), dim=2) - latents).abs().max() < 3e-7


@pytest.mark.parametrize(("name", "dtype"), [("wan", torch.float32), *(slow(name, torch.bfloat16) for name in VAES)])
def test_a_part_is_decoded_frame_by_frame_to_the_bit(name, dtype):
    """Whatever its convolution at the latents rounds, which is applied to the whole part."""
    vae = vae_of(name, dtype=dtype)
    codec, memory, frames = CausalCodec(vae), None, []
    for part in random(1, 16, 5, 2, 2).split([3, 2], dim=2):
        whole, after = codec.decode(part, memory)
        for frame in range(part.shape[2]):
            images, memory = codec.decode(part, memory, frame)
            frames.append(images)
        assert torch.equal(torch.cat(frames, dim=2), whole) and whole.std() > 0.01
        assert all(torch.equal(one, own) for one, own in zip(memory.kept, after.kept, strict=True) if torch.is_tensor(own))
        frames.clear()
    for frame, error in ((-1, ValueError), (2, ValueError), (True, TypeError), (1.0, TypeError), ("0", TypeError)):
        with pytest.raises(error, match=f"frame must be the index of a latent frame from 0 to 1, not {frame!r}"):
            codec.decode(part, memory, frame)


def test_the_memory_belongs_to_the_caller():
    """Two videos on one VAE in turn are each what they are alone, beside whole calls of the VAE, and each can be continued
    twice from the same memory. What is kept has a constant size."""
    vae = vae_of("wan")
    codec = CausalCodec(vae)
    for method, videos in (
        (codec.decode, [random(1, 16, 3, 2, 2, seed=k) for k in range(2)]),
        (codec.encode, [random(1, 3, 9, 16, 16, seed=k) for k in range(2)]),
    ):
        sizes = [1, 2] if method == codec.decode else [1, 8]
        alone = [torch.cat(in_parts(method, video, sizes), dim=2) for video in videos]
        heads, tails = zip(*(video.split(sizes, dim=2) for video in videos), strict=True)
        begun = [method(head) for head in heads]
        with torch.no_grad():
            vae.decode(random(1, 16, 2, 2, 2))
        for _ in range(2):
            for (head, memory), tail, whole in zip(begun, tails, alone, strict=True):
                assert torch.equal(torch.cat([head, method(tail, memory)[0]], dim=2), whole)
        kept, memory = [], None
        for part in (*videos[0].split(sizes, dim=2), videos[1][:, :, 1:], videos[1][:, :, 1:]):
            memory = method(part, memory)[1]
            kept.append([one.untyped_storage().nbytes() for one in memory.kept if isinstance(one, torch.Tensor)])
        assert kept[-1] == kept[-2] and sum(kept[-1]) > 0
        assert not any(one.requires_grad for one in memory.kept if isinstance(one, torch.Tensor))
    assert not torch.equal(alone[0], alone[1])


BAD = [
    ("decode", random(1, 8, 2, 2, 2), ValueError, r"WanDecoder3d takes \[n, 16, T, height, width\], not \[1, 8, 2, 2, 2\]"),
    ("decode", random(16, 2, 2, 2), ValueError, r"not \[16, 2, 2, 2\]"),
    ("decode", random(1, 16, 0, 2, 2), ValueError, r"not \[1, 16, 0, 2, 2\]"),
    ("decode", [1], TypeError, "takes a floating-point tensor, not list"),
    ("decode", random(1, 16, 2, 2, 2).byte(), TypeError, "takes a floating-point tensor, not torch.uint8"),
    ("encode", random(1, 16, 1, 16, 16), ValueError, r"WanEncoder3d takes \[n, 3, T, height, width\], not \[1, 16, 1"),
    ("encode", random(1, 3, 4, 16, 16), ValueError, "1, 5, 9, ... in the first part of a video, not 4"),
]


@pytest.mark.parametrize(("method", "part", "error", "message"), BAD, ids=[str(k) for k in range(len(BAD))])
def test_bad_parts_are_refused_with_the_numbers(method, part, error, message):
    with pytest.raises(error, match=message):
        getattr(CausalCodec(vae_of("wan")), method)(part)


def test_a_memory_is_for_the_next_part_of_the_same_video():
    vae = vae_of("wan")
    codec, z, x = CausalCodec(vae), random(1, 16, 1, 2, 2), random(1, 3, 1, 16, 16)
    _, memory = codec.decode(z)
    _, other = CausalCodec(vae_of("wan")).decode(z)
    for wrong, part, error, message in (
        ((), z, TypeError, "memory is the Memory of the part before, or None for a first part, not tuple"),
        (codec.encode(x)[1], z, ValueError, r"this memory is of another network \(WanEncoder3d\)"),
        (other, z, ValueError, r"this memory is of another network \(WanDecoder3d\)"),
        (memory, random(1, 16, 1, 2, 4), ValueError, r"= \[1, 2, 2\] in torch.float32 on cpu, and this part is \[1, 2, 4\]"),
        (memory, random(2, 16, 1, 2, 2), ValueError, r"this part is \[2, 2, 2\]"),
    ):
        with pytest.raises(error, match=message):
            codec.decode(part, wrong)
    with pytest.raises(ValueError, match="a multiple of 4 after the first part of a video, not 5"):
        codec.encode(random(1, 3, 5, 16, 16), codec.encode(x)[1])
    vae.bfloat16()
    with pytest.raises(ValueError, match="in torch.float32 on cpu, and this part is .* in torch.bfloat16"):
        codec.decode(z, memory)


def test_other_vaes_and_tiles_are_refused():
    with pytest.raises(TypeError, match="of an AutoencoderKLWan or an AutoencoderKLQwenImage, not of AutoencoderTiny"):
        CausalCodec(diffusers.AutoencoderTiny())
    vae = vae_of("qwen")
    codec = CausalCodec(vae)
    vae.enable_tiling()
    for call in (lambda: CausalCodec(vae), lambda: codec.decode(random(1, 16, 1, 2, 2))):
        with pytest.raises(ValueError, match="disable_tiling"):
            call()


def test_values_are_the_callers():
    """NaN comes out as NaN, and in no other video of the same call."""
    codec, z = CausalCodec(vae_of("wan")), random(2, 16, 2, 2, 2)
    z[1] *= torch.nan
    images, memory = codec.decode(z)
    assert images[0].isfinite().all() and images[1].isnan().all()
    assert codec.decode(z, memory)[0][1].isnan().all()
