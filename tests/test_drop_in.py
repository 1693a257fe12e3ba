"""StreamFlow in the place of StreamDiffusion: signatures, attributes, modules, and StreamDiffusion's own README."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import PROMPT
from readme_substitutions import SUBSTITUTIONS
from streamdiffusion import StreamDiffusion
from streamdiffusion.image_filter import SimilarImageFilter as OriginalFilter

from streamflow import StreamFlow, image_utils
from streamflow.image_filter import SimilarImageFilter

# -- signatures -----------------------------------------------------------------------------------------------------------


def public(cls: type) -> list[str]:
    return [name for name, f in vars(cls).items() if callable(f) and (not name.startswith("_") or name in _SPECIAL)]


_SPECIAL = ("__init__", "__call__")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def assert_accepts(ours, theirs) -> None:
    """Every parameter of theirs under its name and at its place, and none of ours that they do not give."""
    mine, original = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    kinds = {p.kind for p in mine.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return
    places = [p.name for p in original.values() if p.kind in POSITIONAL]
    assert [p.name for p in mine.values() if p.kind in POSITIONAL][: len(places)] == places
    for name, parameter in original.items():
        assert name in mine, f"{name} is missing"
        if parameter.default is not inspect.Parameter.empty:
            assert mine[name].default is not inspect.Parameter.empty, f"{name} has no default"
    for name, parameter in mine.items():
        optional = parameter.default is not inspect.Parameter.empty or parameter.kind not in POSITIONAL
        assert name in original or optional, f"{name} is required"


@pytest.mark.parametrize("name", public(StreamDiffusion))
def test_every_method_takes_what_streamdiffusions_takes(name):
    assert_accepts(getattr(StreamFlow, name), getattr(StreamDiffusion, name))


@pytest.mark.parametrize("name", public(OriginalFilter))
def test_the_filter_takes_what_streamdiffusions_takes(name):
    assert_accepts(getattr(SimilarImageFilter, name), getattr(OriginalFilter, name))


def test_every_image_helper_is_there(monkeypatch):
    if "torchvision" not in sys.modules:  # the original imports it; nothing used here needs it
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    original = importlib.import_module("streamdiffusion.image_utils")
    names = [name for name, f in vars(original).items() if inspect.isfunction(f)]
    assert {"postprocess_image", "pil2tensor", "process_image"} <= set(names)
    for name in names:
        assert_accepts(getattr(image_utils, name), getattr(original, name))


def test_the_class_is_a_streamdiffusion_and_modules_keep_their_paths(stream_of):
    assert issubclass(StreamFlow, StreamDiffusion) and isinstance(stream_of(), StreamDiffusion)
    for module, name in (("", "StreamFlow"), (".pipeline", "StreamFlow"), (".image_utils", "postprocess_image")):
        assert hasattr(importlib.import_module(f"streamflow{module}"), name)
    assert importlib.import_module("streamflow.image_filter").SimilarImageFilter is SimilarImageFilter
    assert inspect.signature(StreamFlow.prepare).parameters["num_inference_steps"].default == 50


# -- attributes -----------------------------------------------------------------------------------------------------------

ALWAYS = (
    "device dtype generator height width latent_height latent_width frame_bff_size denoising_steps_num cfg_type batch_size "
    "trt_unet_batch_size t_list do_add_noise use_denoising_batch similar_image_filter similar_filter prev_image_result pipe "
    "image_processor scheduler text_encoder unet vae inference_time_ema"
).split()
PREPARED = (
    "x_t_latent_buffer guidance_scale delta prompt_embeds timesteps sub_timesteps sub_timesteps_tensor init_noise "
    "stock_noise alpha_prod_t_sqrt beta_prod_t_sqrt"
).split()


def test_every_public_attribute_is_there(stream_of, pipes):
    bare = StreamFlow(pipes("sd3"), [0, 2])
    for name in ALWAYS:
        getattr(bare, name)
    prepared = stream_of("sd3", [0, 2])
    for name in ALWAYS + PREPARED:
        getattr(prepared, name)


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "sequential"])
@pytest.mark.parametrize("cfg_type", ["none", "full", "self", "initialize"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_shapes_of_the_attributes(stream_of, family, cfg_type, batch):
    S, F, size = 3, 2, 64
    stream = stream_of(family, [0, 1, 3], frame_buffer_size=F, cfg_type=cfg_type, use_denoising_batch=batch)
    latent = (16, 8, 8) if family == "sd3" else (16, 64)
    ones = (1,) * len(latent)
    rows = S * F if batch else F
    by_stage = S * F if batch else S
    assert (stream.batch_size, stream.denoising_steps_num, stream.frame_bff_size) == (rows, S, F)
    extra = {"none": 0, "full": rows, "self": 0, "initialize": F}[cfg_type]
    assert stream.trt_unet_batch_size == rows + extra
    assert (stream.height, stream.width, stream.latent_height, stream.latent_width) == (size, size, size // 8, size // 8)
    assert stream.t_list == [0, 1, 3]
    assert stream.timesteps.shape == (4,) and stream.timesteps.dtype == torch.float32
    assert [t.item() for t in stream.sub_timesteps] == stream.timesteps[[0, 1, 3]].tolist()
    assert stream.sub_timesteps_tensor.shape == (by_stage,)
    assert stream.alpha_prod_t_sqrt.shape == stream.beta_prod_t_sqrt.shape == (by_stage, *ones)
    assert stream.init_noise.shape == stream.stock_noise.shape == (rows, *latent)
    assert stream.prompt_embeds.shape[0] == rows + extra and stream.prompt_embeds.ndim == 3
    if batch:
        assert stream.x_t_latent_buffer.shape == ((S - 1) * F, *latent)
    assert stream.prev_image_result is None
    picture = stream.txt2img()
    assert torch.equal(picture, stream.prev_image_result) and picture.shape == (F, 3, size, size)
    assert stream.inference_time_ema > 0


def test_alpha_and_beta_are_the_flows_and_read_only(stream_of):
    stream = stream_of("sd3", [0, 1, 2, 3], frame_buffer_size=2)
    sigmas = stream.pipe.scheduler.__class__.from_config(stream.pipe.scheduler.config)
    sigmas.set_timesteps(4)
    expected = sigmas.sigmas[:4].repeat_interleave(2).reshape(-1, 1, 1, 1)
    assert torch.equal(stream.beta_prod_t_sqrt, expected)
    assert torch.equal(stream.alpha_prod_t_sqrt, 1 - expected)
    for name in ("alpha_prod_t_sqrt", "beta_prod_t_sqrt"):
        with pytest.raises(AttributeError):
            setattr(stream, name, expected)
    for name in ("c_skip", "c_out"):
        with pytest.raises(AttributeError, match=r"LCM.*x \+ \(sigma_next - sigma\) v"):
            getattr(stream, name)
    x0, noise = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    for index in range(4):
        alpha, beta = stream.alpha_prod_t_sqrt[2 * index], stream.beta_prod_t_sqrt[2 * index]
        torch.testing.assert_close(stream.add_noise(x0, noise, index), alpha * x0 + beta * noise)


def test_steps_by_themselves_are_the_streams_own(stream_of):
    """`unet_step` of all rows is what a tick does, `scheduler_step_batch` its last part."""
    stream = stream_of("sd3", [0, 1, 3])
    x = torch.cat([stream.frame_noise(k) for k in range(3)])
    after, v = stream.unet_step(x, stream.sub_timesteps_tensor)
    assert torch.equal(stream.scheduler_step_batch(v, x), after)
    for stage in range(3):
        row = slice(stage, stage + 1)
        one, v_one = stream.unet_step(x[row], stream.sub_timesteps_tensor[row], stage)
        torch.testing.assert_close(one, after[row])
        assert torch.equal(stream.scheduler_step_batch(v_one, x[row], stage), one)


def test_looking_at_a_stream_changes_no_image(stream_of):
    """Attributes read, and steps tried by themselves, between two ticks."""
    drawn = []
    for look in (False, True):
        generator = torch.Generator().manual_seed(1)
        stream = stream_of("sd3", [0, 2], cfg_type="initialize", prepare={"generator": generator, "guidance_scale": 3.0})
        pictures = [stream.txt2img()]
        if look:
            for name in ALWAYS + PREPARED:
                getattr(stream, name)
            stream.unet_step(torch.zeros(2, 16, 8, 8), stream.sub_timesteps_tensor)
        drawn.append(torch.cat(pictures + [stream.txt2img() for _ in range(3)]))
    same = [torch.equal(a, b) for a, b in zip(*drawn, strict=True)]
    assert same == [True] * 4


def test_guidance_scale_is_the_one_in_force(stream_of):
    assert stream_of("flux").guidance_scale == 3.5, "the pipeline's own default, embedded in the network"
    assert stream_of("sd3", cfg_type="full").guidance_scale == 7.0
    for cfg_type in ("self", "initialize"):
        assert stream_of("sd3", cfg_type=cfg_type, prepare={"delta": 0.5}).guidance_scale == 1.2
    assert stream_of("sd3", cfg_type="self", prepare={"guidance_scale": 2.0, "delta": 0.5}).guidance_scale == 2.0


def test_unet_and_vae_are_assigned_as_in_streamdiffusion(stream_of, pipes):
    from random_pipelines import random_pipeline, random_tiny_vae

    stream = stream_of("sd3")
    own, tiny, twin = stream.vae, random_tiny_vae(16), random_pipeline("sd3", seed=1).transformer
    latents = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        stream.vae = tiny
        z = latents / tiny.config.scaling_factor + (getattr(tiny.config, "shift_factor", None) or 0)
        assert torch.equal(stream.decode_image(latents), tiny.decode(z).sample.clamp(-1, 1))
    first = stream.txt2img()
    stream.unet = twin
    assert stream.unet is twin and stream.vae is tiny
    assert not torch.allclose(stream.txt2img(), first)
    assert pipes("sd3").vae is own and pipes("sd3").transformer is not twin


# -- the README -----------------------------------------------------------------------------------------------------------


def readme() -> str:
    return metadata.metadata("streamdiffusion").get_payload() or metadata.metadata("streamdiffusion")["Description"]


SNIPPETS = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)


def substituted(snippet: str) -> str:
    for _, pattern, replacement, _ in SUBSTITUTIONS:
        snippet = re.sub(pattern, lambda _, text=replacement: text, snippet, flags=re.MULTILINE)
    return snippet


def test_every_substitution_is_needed_and_says_why():
    left = list(SNIPPETS)
    for what, pattern, replacement, why in SUBSTITUTIONS:
        assert what and why
        changed = [re.sub(pattern, lambda _, text=replacement: text, s, flags=re.MULTILINE) for s in left]
        assert changed != left, f"{what}: {pattern} is nowhere in StreamDiffusion's README"
        left = changed


def test_no_snippet_of_the_readme_is_left_out_in_silence():
    assert len(SNIPPETS) == 6
    empty = [i for i, snippet in enumerate(SNIPPETS) if not substituted(snippet).strip()]
    assert empty == [2, 3], "xformers and TensorRT, both listed"


def drawn(stream, picture) -> list[np.ndarray]:
    """What a stream draws from text and, where it does not start from pure noise, from an image."""
    outputs = [stream.txt2img(), *((stream(picture),) if stream.beta_prod_t_sqrt[0] < 1 else ())]
    return [one for output in outputs for one in image_utils.postprocess_image(output, "np")]


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1], ids=["image to image", "text to image"])
def test_the_readmes_snippets_run(tmp_path, monkeypatch, picture, first):
    """The two whole programs; the fragments that follow them run in the first one's names."""
    monkeypatch.chdir(tmp_path)
    picture(1, (300, 200)).save("generated.png")
    names = {}
    for snippet in [SNIPPETS[first], *(SNIPPETS[2:] if first == 0 else ())]:
        exec(compile(substituted(snippet), "README", "exec"), names)
        stream = names["stream"]
        assert type(stream) is StreamFlow
        if os.path.exists("drawn.png"):
            images = [np.asarray(PIL.Image.open("drawn.png")) / 255]
            Path("drawn.png").unlink()
        else:
            if stream._denoiser.state is None:
                stream.prepare(names.get("prompt", PROMPT))
            images = drawn(stream, PIL.Image.open("generated.png"))
        for image in images:
            assert image.shape == (128, 128, 3) and np.isfinite(image).all() and image.std() > 0.01
