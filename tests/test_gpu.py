"""The same promises on a GPU: the pipeline's bits, no waiting in the hot path, no memory that grows."""

import pytest
import torch
from conftest import PROMPT, cuda_memory, never_waiting, noises, relative_error, streamed
from random_pipelines import random_pipeline

from streamflow import StreamFlow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "family,cfg_type,call",
    [
        ("sd3", "none", {"guidance_scale": 1.0}),
        ("sd3", "full", {"guidance_scale": 4.0, "negative_prompt": "blurry"}),
        ("flux", "none", {"guidance_scale": 2.5}),
        ("schnell", "none", {}),
        ("flux", "full", {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}),
    ],
)
def test_row_by_row_is_the_pipeline_to_the_bit(cuda_stream, family, cfg_type, call, dtype):
    stream = cuda_stream(family, dtype=dtype, cfg_type=cfg_type, frame_buffer_size=2, prepare=call)
    stream.velocity = stream.adapter.row_by_row(cfg_type == "full")
    latents = noises(stream, 4)
    fixed = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "latent", **call}
    expected = torch.cat([stream.pipe(PROMPT, latents=x, **fixed).images for x in latents.split(1)])
    assert torch.equal(streamed(stream, latents), expected)


@pytest.mark.parametrize("cfg_type", ["none", "full", "self", "initialize"])
def test_streamed_equals_sequential(cuda_stream, cfg_type, picture):
    prepare = {"guidance_scale": 2.0, "num_inference_steps": 5}
    batch, loop = (cuda_stream(cfg_type=cfg_type, use_denoising_batch=batched, prepare=prepare) for batched in (True, False))
    pictures = [picture(k) for k in range(5)]
    a, b = (torch.stack([f.wait().image for f in s.frames(pictures)]) for s in (batch, loop))
    assert a.device.type == "cuda"
    assert relative_error(a, b) <= 1e-3


def test_seeds_draw_the_same_noise_as_on_a_cpu(cuda_stream):
    stream = cuda_stream()
    cpu = StreamFlow(random_pipeline("sd3"), range(4), cfg_type="none")
    cpu.prepare(PROMPT, num_inference_steps=4)
    assert torch.equal(stream.frame_noise(3).cpu(), cpu.frame_noise(3))


@pytest.mark.parametrize("cfg_type", ["none", "full", "self", "initialize"])
def test_the_hot_path_never_waits(cuda_stream, cfg_type, picture):
    stream = cuda_stream(cfg_type=cfg_type, prepare={"guidance_scale": 2.0})
    pictures = stream.preprocess([picture(k) for k in range(6)]).pin_memory()
    for one in pictures.split(1):
        stream(one)
    stream.txt2img()
    with never_waiting():
        for one in pictures.split(1):
            stream(one)
            stream.txt2img()
        stream.update(guidance_scale=3.0)
        stream(pictures[:1])


def test_images_that_are_not_finite_are_counted_without_a_wait(cuda_stream):
    stream = cuda_stream(cfg_type="none")
    with torch.no_grad():
        stream.pipe.transformer.proj_out.bias.fill_(float("nan"))
    stream.txt2img()
    with never_waiting():
        for _ in range(4):
            stream.txt2img()
    torch.cuda.synchronize()
    assert stream.not_finite >= 1
    stream.txt2img()
    torch.cuda.synchronize()
    assert stream.not_finite >= 5, "the number that arrives later holds all that came before"


def test_two_thousand_ticks_leave_memory_where_it_was_after_twenty(cuda_stream):
    stream = cuda_stream("instaflow", cfg_type="self")
    for _ in range(20):
        stream.txt2img()
    before = cuda_memory()
    for _ in range(1980):
        stream.txt2img()
    assert cuda_memory() == before


def test_inference_time_is_read_without_waiting(cuda_stream):
    stream = cuda_stream()
    for _ in range(30):
        stream.txt2img()
    torch.cuda.synchronize()
    stream.txt2img()
    assert 0 < stream.inference_time_ema < 10
