"""Tiny VAEs: each family gets its own, from the hub, a folder or from beside the model; others are refused by number."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPT, noises, streamed
from diffusers import StableDiffusion3Pipeline
from random_pipelines import random_pipeline, random_tiny_vae

from streamflow import StreamFlow
from streamflow.models import adapter_class, tiny_vae
from streamflow.models.tiny_vae import PUBLISHED, UPSTREAM, TinyFlux2, TinySana
from streamflow.pretrained import embedded, embedded_tiny_vae


def test_the_embedded_model_finds_its_twin_offline(picture):
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), text_encoder_3=None, tokenizer_3=None)
    stream = StreamFlow(pipe, range(2), cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=2, max_sequence_length=0)
    latents = streamed(stream, noises(stream, 1))
    whole = stream.decode_image(latents)
    stream.use_tiny_vae()
    small = stream.decode_image(latents)
    assert stream.vae.config._name_or_path == embedded_tiny_vae() and stream.vae is not pipe.vae
    assert 0 < (whole - small).abs().mean() < 0.15
    encoded = stream.codec.encode(whole)
    assert (encoded - latents).norm() / latents.norm() < 0.6
    stream.vae = stream.pipe.vae
    assert torch.equal(stream.decode_image(latents), whole)


@pytest.mark.parametrize(
    ("family", "where"),
    {
        "sd3": "madebyollin/taesd3",
        "flux": "madebyollin/taef1",
        "flux2": "madebyollin/taef2",
        "flux2-klein": "madebyollin/taef2",
        "instaflow": "madebyollin/taesd",
        "sdxl": "madebyollin/taesdxl",
        "chroma": "madebyollin/taef1",
        "zimage": "madebyollin/taef1",
        "lumina2": "madebyollin/taef1",
    }.items(),
)
def test_each_family_is_given_its_own(family, where):
    assert tiny_vae.find(None, adapter_class(family).tiny_vae) == where


def test_where_none_is_published_the_error_says_what_to_pass():
    pipe = random_pipeline("sana")
    with pytest.raises(ValueError, match=f"taesana_encoder.pth and taesana_decoder.pth of {UPSTREAM} into a folder"):
        tiny_vae.find(pipe, adapter_class("sana").tiny_vae)
    with pytest.raises(ValueError, match=r"no tiny VAE is known for SanaPipeline: pass use_tiny_vae\(path\)"):
        tiny_vae.find(pipe, adapter_class("qwenimage").tiny_vae)


def test_a_folder_of_diffusers_is_taken_and_others_are_refused_by_number(stream_of, tmp_path):
    stream = stream_of("sd3", [0, 1], frame_buffer_size=2)
    latents = streamed(stream, noises(stream, 2))
    before, vae = stream.decode_image(latents), stream.vae
    for channels, blocks in ((16, 4), (4, 4), (16, 3)):
        random_tiny_vae(channels, blocks).save_pretrained(tmp_path / f"{channels}-{blocks}")
    with pytest.raises(ValueError, match="has 4 latent channels, the network draws 16"):
        stream.use_tiny_vae(str(tmp_path / "4-4"))
    with pytest.raises(ValueError, match="a latent of this AutoencoderTiny is 4 pixels wide, one of this pipeline 8"):
        stream.use_tiny_vae(str(tmp_path / "16-3"))
    with pytest.raises(OSError):
        stream.use_tiny_vae(str(tmp_path / "nothing"))
    assert stream.vae is vae and torch.equal(stream.decode_image(latents), before)
    stream.use_tiny_vae(str(tmp_path / "16-4"))
    expected = random_tiny_vae(16).decode(latents).sample.clamp(-1, 1)
    assert torch.equal(stream.decode_image(latents), expected)


def upstream_weights(vae, folder):
    """What upstream would publish of this model, in files of the same names."""
    name = next(name for name, one in PUBLISHED.items() if one.make is type(vae))
    state = {key: value for key, value in vae.state_dict().items() if not key.startswith("bn.")}
    folder.mkdir()
    if name == "taef2":
        from safetensors.torch import save_file

        save_file(state, folder / "taef2.safetensors")
        return
    for file, (part, shift) in zip(PUBLISHED[name].files, (("encoder.layers.", 0), ("decoder.layers.", 1)), strict=True):
        keys = [key for key in state if key.startswith(part)]
        parts = [key.removeprefix(part).split(".", 1) for key in keys]
        torch.save(
            {f"{int(i) + shift}.{rest}": state[key] for key, (i, rest) in zip(keys, parts, strict=True)}, folder / file
        )


@pytest.mark.parametrize(("family", "kind"), [("flux2", TinyFlux2), ("sana", TinySana)])
def test_upstreams_own_weights_are_read(family, kind, tmp_path, picture):
    torch.manual_seed(0)
    vae = kind().eval()
    upstream_weights(vae, tmp_path / "upstream")
    channels, pixels = {"flux2": (128, 8), "sana": (32, 32)}[family]
    pipe = random_pipeline(family, in_channels=channels, out_channels=channels)
    pipe.vae, pipe.vae_scale_factor = kind(8), pixels
    layout = pipe._patchify_latents if family == "flux2" else torch.clone
    stream = StreamFlow(pipe, range(1), cfg_type="none", width=64, height=64)
    stream.use_tiny_vae(str(tmp_path / "upstream"))
    z, image = torch.randn(1, 32, 64 // pixels, 64 // pixels), stream.preprocess(picture())
    with torch.no_grad():
        assert torch.equal(stream.decode_image(layout(z)), vae.decode(z).sample.clamp(-1, 1))
        assert torch.equal(stream.codec.encode(image), layout(vae.encode(image.as_subclass(torch.Tensor)).latents))


def test_the_layers_are_those_that_upstream_publishes():
    """Names and shapes by upstream's own listing of its layers, `taesd.py`."""
    flux2, sana = (kind().state_dict() for kind in (TinyFlux2, TinySana))
    pooled = {key.rsplit(".pool", 1)[0] for key in flux2 if ".pool." in key}
    assert pooled == {f"encoder.layers.{i}" for i in (11, 12, 13)} | {f"decoder.layers.{i}" for i in (2, 3, 4)}
    assert flux2["encoder.layers.11.pool.0.weight"].shape == (256, 64, 1, 1)
    assert flux2["encoder.layers.14.weight"].shape == (32, 64, 3, 3)
    assert [tuple(sana[f"decoder.layers.{i}.weight"].shape[:2]) for i in (0, 6, 11, 16, 21, 26, 28)] == [
        *((256, 32), (128, 256), (64, 128), (64, 64), (64, 64), (64, 64)),
        (3, 64),
    ]
    assert [tuple(sana[f"encoder.layers.{i}.weight"].shape[:2]) for i in (0, 2, 5, 9, 13, 17)] == [
        *((32, 3), (64, 32), (64, 64), (64, 64), (64, 64)),
        (32, 64),
    ]
