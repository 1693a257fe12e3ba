"""Tiny video decoders: published files are read, a video in parts is the whole video, and streams decode with them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import slow
from safetensors.torch import save_file
from torch.nn import functional

from streamflow import VideoStream
from streamflow.models.tiny_video import TinyVideoDecoder

CALLS = {
    "helios": {"height": 16, "width": 16, "num_inference_steps": 1, "num_latent_frames_per_chunk": 3, "guidance_scale": 1.0},
    "anyflow-far": {"height": 32, "width": 32, "num_inference_steps": 1, "chunk_partition": [1, 2]},
    "skyreels": {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "base_num_frames": 9}
    | {"overlap_history": 5},
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(seed: int = 0, **sizes) -> TinyVideoDecoder:
    """A random decoder of few channels, whose images are neither black nor white."""
    torch.manual_seed(seed)
    decoder = TinyVideoDecoder(**{"widths": (12, 8, 6, 4), **sizes}).eval().requires_grad_(False)
    decoder.decoder[-1].bias.fill_(0.5)
    decoder.decoder[-1].weight.mul_(30)
    return decoder


def prepare(stream: VideoStream, family: str) -> None:
    stream.prepare(prompt_embeds=random(1, 16, 32), seed=3, **CALLS[family])


# -- the files -------------------------------------------------------------------------------------------------------------

# (latent channels, patch size, frames of each stage) by upstream's own listing of its files and layers, `taehv.py`.
PUBLISHED = {
    "taew2_1": (16, 1, (1, 2, 2)),
    "taew2_2": (48, 2, (1, 2, 2)),
    "taehv1_5": (32, 2, (1, 2, 2)),
    "taeltx_2": (128, 4, (2, 2, 2)),
}


def published(channels: int, patch: int, growth: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published file."""

    def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for index, channels_in in ((0, 2 * width), (2, width), (4, width)):
            shapes |= {f"{name}.conv.{index}.weight": (width, channels_in, 3, 3), f"{name}.conv.{index}.bias": (width,)}
        return shapes

    pixels = 3 * patch**2
    shapes = {"encoder.0.weight": (64, pixels, 3, 3), "encoder.0.bias": (64,)}
    for start, frames in zip((2, 7, 12), reversed(growth), strict=True):
        shapes |= {f"encoder.{start}.conv.weight": (64, 64 * frames, 1, 1), f"encoder.{start + 1}.weight": (64, 64, 3, 3)}
        for index in (2, 3, 4):
            shapes |= block(f"encoder.{start + index}", 64)
    shapes |= {"encoder.17.weight": (channels, 64, 3, 3), "encoder.17.bias": (channels,)}
    shapes |= {"decoder.1.weight": (256, channels, 3, 3), "decoder.1.bias": (256,)}
    for start, (width, after), frames in zip((3, 9, 15), ((256, 128), (128, 64), (64, 64)), growth, strict=True):
        for index in range(3):
            shapes |= block(f"decoder.{start + index}", width)
        shapes[f"decoder.{start + 4}.conv.weight"] = (width * frames, width, 1, 1)
        shapes[f"decoder.{start + 5}.weight"] = (after, width, 3, 3)
    return shapes | {"decoder.22.weight": (pixels, 64, 3, 3), "decoder.22.bias": (pixels,)}


@pytest.mark.parametrize("name", ["taew2_1", *(slow(name) for name in list(PUBLISHED)[1:])])
@pytest.mark.parametrize("ending", [".pth", slow(".safetensors")])
def test_a_published_file_is_read_as_it_is(name, ending, tmp_path):
    channels, patch, growth = PUBLISHED[name]
    state = {key: random(*shape).half() for key, shape in published(channels, patch, growth).items()}
    (torch.save if ending == ".pth" else save_file)(state, tmp_path / f"any{ending}")
    before = torch.get_rng_state()
    decoder = TinyVideoDecoder.from_file(tmp_path / f"any{ending}")
    assert torch.equal(torch.get_rng_state(), before)
    loaded = decoder.state_dict()
    assert loaded.keys() == {key for key in state if key.startswith("decoder.")}
    assert all(torch.equal(value, state[key].float()) for key, value in loaded.items())
    assert not decoder.training and not any(one.requires_grad for one in decoder.parameters())
    frames = growth[0] * growth[1] * growth[2]
    assert (decoder.latent_channels, decoder.pixels, decoder.frames) == (channels, 8 * patch, frames)
    assert decoder.decode(random(1, channels, 2, 1, 1))[0].shape == (1, 3, 1 + frames, 8 * patch, 8 * patch)


def _without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


WRONG = {
    "text": (b"hello world", "no file of weights"),
    "empty": (b"", "no file of weights: EOFError"),
    "cut": (b"PK\x03\x04abc", "no file of weights: PytorchStreamReader failed"),
    "objects": ({"decoder": random}, "no file of weights: Weights only load failed"),
    "nested": ({"state_dict": {}}, "holds other things than tensors by name"),
    "list": ([random(1)], "holds other things than tensors by name"),
    "other": (
        {"encoder.1.weight": random(1)},
        r"decoder.1.weight is missing in the file and \[256, 16, 3, 3\] in",
    ),
    "super": ({"decoder.0.weight": random(8, 16, 1, 1)}, "'super' and 'wide' files have other layers"),
    "missing": (_without(small().state_dict(), "decoder.4.conv.2.bias"), r"4.conv.2.bias is missing in the file and \[12\]"),
    "more": (small().state_dict() | {"decoder.23.weight": random(1)}, r"decoder.23.weight is \[1\] in the file and missing"),
    "shape": (
        small().state_dict() | {"decoder.8.weight": random(8, 13, 3, 3)},
        r"decoder.8.weight is \[8, 13, 3, 3\] in the file and \[8, 12, 3, 3\] in the decoder, and 0 other",
    ),
    "flat": (small().state_dict() | {"decoder.1.weight": random(3)}, r"decoder.1.weight is \[3\] in the file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_what_was_expected(name, tmp_path):
    content, message = WRONG[name]
    path = tmp_path / "some.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        TinyVideoDecoder.from_file(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    path.rename(tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match="no file of weights"):
        TinyVideoDecoder.from_file(tmp_path / "some.safetensors")
    with pytest.raises(FileNotFoundError):
        TinyVideoDecoder.from_file(path)


# -- what is decoded -------------------------------------------------------------------------------------------------------


def all_frames_at_once(decoder: TinyVideoDecoder, z: torch.Tensor) -> torch.Tensor:
    """The images in [0, 1] of one video by upstream's rule, layer after layer over all frames: a block's frame before the
    first is zero, and the first latent gives one image."""
    state = decoder.state_dict()

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = state[f"decoder.{name}.weight"]
        return functional.conv2d(x, weight, state.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = conv(3 * torch.tanh(z[0].transpose(0, 1) / 3), "1").relu()
    for start in (3, 9, 15):
        for index in range(start, start + 3):
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)
            x = (conv(conv(conv(y, f"{index}.conv.0").relu(), f"{index}.conv.2").relu(), f"{index}.conv.4") + x).relu()
        x = functional.interpolate(x, scale_factor=2)
        more = conv(x, f"{start + 4}.conv")
        x = conv(torch.stack(more.chunk(more.shape[1] // x.shape[1], dim=1), dim=1).flatten(0, 1), f"{start + 5}")
    x = functional.pixel_shuffle(conv(x.relu(), "22"), decoder.patch_size)
    return x[decoder.frames - 1 :].clamp(0, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("sizes", [{}, {"latent_channels": 6, "patch_size": 2}, {"growth": (2, 2, 2)}], ids=str)
def test_images_are_those_of_upstreams_rule(sizes):
    decoder, z = small(**sizes), random(1, sizes.get("latent_channels", 16), 4, 2, 3)
    images = decoder.decode(z)[0] / 2 + 0.5
    expected = all_frames_at_once(decoder, z)
    assert images.shape == expected.shape and (images - expected).abs().max() < 1e-6
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.5 and expected.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16)], ids=str)
def test_a_video_in_parts_is_the_whole_video(dtype):
    """To the bit. The memory belongs to the caller: two videos in turn are each what they are alone, each can be continued
    twice, and what is kept has a constant size."""
    decoder, videos = small().to(dtype), [random(2, 16, 6, 2, 3, seed=k) for k in range(2)]
    whole = [decoder.decode(z)[0] for z in videos]
    assert whole[0].dtype == dtype and whole[0].shape == (2, 3, 21, 16, 24) and not torch.equal(*whole)
    sizes = []
    memories, parts = [None, None], [[], []]
    for split in zip(*(z.split([1, 3, 2], dim=2) for z in videos), strict=True):
        for k, part in enumerate(split):
            again, _ = decoder.decode(part, memories[k])
            images, memories[k] = decoder.decode(part, memories[k])
            assert torch.equal(again, images)
            parts[k].append(images)
            sizes.append([one.untyped_storage().nbytes() for one in memories[k].kept])
    assert all(torch.equal(torch.cat(part, dim=2), own) for part, own in zip(parts, whole, strict=True))
    assert len(sizes[0]) == 9 and all(one == sizes[0] for one in sizes)
    assert all(kept.numel() * kept.element_size() == size for kept, size in zip(memories[0].kept, sizes[0], strict=True))


def test_bad_parts_and_memories_are_refused():
    decoder = small()
    _, memory = decoder.decode(random(1, 16, 1, 2, 2))
    for part, given, error, message in (
        (
            random(1, 8, 1, 2, 2),
            None,
            ValueError,
            r"takes \[n, 16, T, height, width\], not \[1, 8, 1, 2, 2\]",
        ),
        (random(1, 16, 0, 2, 2), None, ValueError, r"not \[1, 16, 0, 2, 2\]"),
        (random(1, 16, 1, 2, 2), (), TypeError, "memory is the Memory of the part before"),
        (random(1, 16, 1, 2, 3), memory, ValueError, r"= \[1, 2, 2\] .* and this part is \[1, 2, 3\]"),
        (random(1, 16, 1, 2, 2), small().decode(random(1, 16, 1, 2, 2))[1], ValueError, "of another network"),
    ):
        with pytest.raises(error, match=message):
            decoder.decode(part, given)
    assert decoder.decode(random(1, 16, 1, 2, 2) * torch.nan)[0].isnan().all()


# -- in a stream -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CALLS)
def test_a_stream_decodes_with_it_as_with_the_pipes_own(family, pipes, tmp_path):
    """The same latents and number of images. Helios' chunks are each decoded afresh, and the others' after those before."""
    pipe, decoder = pipes(family), small()
    torch.save(decoder.state_dict(), tmp_path / "tiny.pth")
    own, tiny = VideoStream(pipe, output_type="pt"), VideoStream(pipe, output_type="pt")
    tiny.use_tiny_vae(tmp_path / "tiny.pth")
    for stream in (own, tiny):
        prepare(stream, family)
    plain, chunks = list(own.chunks(2)), list(tiny.chunks(2))
    latents = [chunk.latents for chunk in chunks]
    assert all(torch.equal(z, chunk.latents) for z, chunk in zip(latents, plain, strict=True))
    assert [chunk.images.shape for chunk in chunks] == [chunk.images.shape for chunk in plain]
    videos = [decoder.decode(z)[0] for z in (latents if family == "helios" else [torch.cat(latents, dim=2)])]
    expected = torch.cat([pipe.video_processor.postprocess_video(video, "pt")[0] for video in videos])
    assert torch.equal(torch.cat([chunk.images for chunk in chunks]), expected) and expected.std() > 0.01


def test_it_acts_from_prepare_to_prepare(pipes, tmp_path):
    pipe = pipes("helios")
    torch.save(small().state_dict(), tmp_path / "tiny.pth")
    stream, images = VideoStream(pipe, output_type="pt"), []
    assert stream.vae is pipe.vae
    prepare(stream, "helios")
    images.append(stream().images)
    stream.use_tiny_vae(tmp_path / "tiny.pth")
    assert isinstance(stream.vae, TinyVideoDecoder)
    stream.reset()
    images.append(stream().images)
    prepare(stream, "helios")
    images.append(stream().images)
    stream.vae = pipe.vae
    prepare(stream, "helios")
    images.append(stream().images)
    assert [torch.equal(images[0], one) for one in images] == [True, True, False, True]


def test_half_precision_is_the_networks(pipes, tmp_path):
    pipe = pipes("helios", torch.bfloat16)
    torch.save(small().state_dict(), tmp_path / "tiny.pth")
    stream = VideoStream(pipe, output_type="np")
    stream.use_tiny_vae(tmp_path / "tiny.pth")
    assert {one.dtype for one in stream.vae.parameters()} == {torch.bfloat16}
    prepare(stream, "helios")
    assert stream().images.shape == (9, 16, 16, 3)


def test_what_does_not_fit_a_stream_is_refused_and_changes_nothing(pipes, tmp_path):
    pipe = pipes("helios")
    stream = VideoStream(pipe, output_type="pt")
    stream.vae = tiny = small()
    for sizes, message in (
        (
            {"latent_channels": 48, "patch_size": 2},
            "Pipeline has 16 channels, 8 pixels and 4 frames, .* VAE 48 channels, 16",
        ),
        ({"growth": (2, 2, 2)}, "one of the tiny VAE 16 channels, 8 pixels and 8 frames: load the file"),
    ):
        torch.save(small(**sizes).state_dict(), tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            stream.use_tiny_vae(tmp_path / "other.pth")
    with pytest.raises(TypeError, match="the VAE is the pipe's own or a TinyVideoDecoder, not AutoencoderKLWan"):
        stream.vae = copy.deepcopy(pipe.vae)
    with pytest.raises(FileNotFoundError):
        stream.use_tiny_vae(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="the tiny VAE is on meta and the pipe on cpu"):
        stream.vae = small().to("meta")
    assert stream.vae is tiny
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.vae = tiny
