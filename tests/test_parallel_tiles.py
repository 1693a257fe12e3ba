"""Tiles of an image on several devices: the whole decode, exactly where the decoder is local, nearly where it is not."""

import pytest
import torch
from PIL import Image, ImageDraw
from random_pipelines import random_tiny_vae

from streamflow.image_utils import normalize_image
from streamflow.parallel import decode, decode_tiled, shard_vae
from streamflow.parallel.tiles import bytes_per_latent, psnr, reach_of
from streamflow.pretrained import embedded

TWO = ["cpu"] * 2


@pytest.fixture(scope="module")
def tiny():
    return random_tiny_vae(4, blocks=3).requires_grad_(False)


@pytest.fixture(scope="module")
def kl():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(embedded(), subfolder="vae").requires_grad_(False)


def latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "shape,tile", [((1, 4, 40, 24), 12), ((2, 4, 23, 31), 10), ((1, 4, 40, 24), "auto"), ((1, 4, 5, 5), 1)]
)
def test_tiles_of_a_local_decoder_are_the_whole_decode(tiny, shape, tile):
    z = latents(*shape)
    whole = tiny.decode(z).sample
    tiled = decode(tiny, z, ["cpu"] * 3, tile=tile)
    assert tiled.shape == whole.shape
    assert torch.allclose(tiled, whole, atol=1e-6, rtol=0)


def test_the_halo_is_as_far_as_a_change_is_seen_and_hardly_more(tiny):
    reach = reach_of(tiny, latents(1, 4, 1, 1))
    assert reach.local and reach.factor == 4
    z = latents(1, 4, 41, 41)
    changed = z.clone()
    changed[..., 20, 20] += 3
    seen = (tiny.decode(z).sample != tiny.decode(changed).sample).any(dim=1)[0].any(dim=1).nonzero().flatten() // 4
    assert 20 - seen.min() <= reach.halo <= 20 - seen.min() + 2
    assert seen.max() - 20 <= reach.halo <= seen.max() - 20 + 2


def test_too_small_a_halo_shows(tiny):
    z = latents(1, 4, 40, 24)
    with shard_vae(tiny, TWO) as sharded:
        assert not torch.allclose(decode_tiled(sharded, z, 12, halo=0), tiny.decode(z).sample, atol=1e-3)


def test_a_kl_decoder_is_not_local_and_blends_near_the_whole(kl):
    image = Image.new("RGB", (192, 192), (40, 90, 200))
    ImageDraw.Draw(image).ellipse((20, 20, 180, 200), fill=(230, 200, 30))
    z = kl.encode(normalize_image(image, 192, 192, (0, 1), True, False)).latent_dist.mode()
    whole = kl.decode(z).sample
    assert not reach_of(kl, z[..., :1, :1]).local
    with shard_vae(kl, TWO) as sharded:
        blended, cut = (decode_tiled(sharded, z, 8, halo=halo) for halo in (4, 0))
    assert blended.shape == whole.shape and blended.dtype == whole.dtype
    assert psnr(blended, whole) >= PSNR
    assert psnr(blended, whole) > psnr(cut, whole)


PSNR = 40.0  # dB; measured 44.9, and 31.1 without a halo


def test_what_acts_globally_outside_of_modules_is_seen(tiny):
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny

        def decode(self, z, return_dict=True):
            out = self.inner.decode(z, return_dict=False)[0]
            return (out - out.mean(dim=(-1, -2), keepdim=True),)

    assert not reach_of(Centred(), latents(1, 4, 1, 1)).local


def test_memory_a_latent_is_that_of_the_largest_step(tiny):
    assert bytes_per_latent(tiny, latents(1, 4, 1, 1)) >= 4 * 4 * 8 * 4  # 16 pixels of 8 channels in float32


@pytest.mark.parametrize("tile", [0, -3, True, 2.5, "large"])
def test_a_tile_that_cannot_be(tiny, tile):
    with pytest.raises(ValueError, match="tile must be 'auto' or a side of 1 latent or more"):
        decode(tiny, latents(1, 4, 8, 8), TWO, tile=tile)
    with pytest.raises(ValueError, match="no latents"):
        decode(tiny, latents(0, 4, 8, 8), TWO, tile=4)
