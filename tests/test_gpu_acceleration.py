"""Acceleration where it counts: CUDA graphs and compiled code draw what the plain network draws, whatever changes."""

import gc
from functools import partial

import pytest
import torch
from conftest import FAMILIES, cuda_memory, never_waiting, noises, streamed
from random_pipelines import random_tiny_vae

from streamflow.acceleration.cuda_graph import Graphed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
BOUNDS = {"cuda-graph": 0, "compile": 4 / 255}


@pytest.fixture
def stream_on_gpu(cuda_stream):
    return partial(cuda_stream, dtype=torch.float16)


def drawn(stream, n=6):
    latents = streamed(stream, noises(stream, n))
    return (torch.cat([stream.decode_image(x) for x in latents.split(stream.frame_bff_size)]).float() + 1) / 2


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_are_the_same(stream_on_gpu, family, kind):
    stream = stream_on_gpu(family)
    before = drawn(stream)
    stream.accelerate(kind)
    assert (drawn(stream) - before).abs().max() <= BOUNDS[kind]
    stream.accelerate("none")
    assert torch.equal(drawn(stream), before)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_compiled_bfloat16_is_no_farther_from_float32_than_eager(stream_on_gpu, family):
    exact = drawn(stream_on_gpu(family, dtype=torch.float32))
    stream = stream_on_gpu(family, dtype=torch.bfloat16)
    eager = (drawn(stream) - exact).square().mean()
    stream.accelerate("compile")
    assert (drawn(stream) - exact).square().mean() <= 1.5 * eager


@pytest.mark.parametrize("cfg_type", ["none", "full", "self", "initialize"])
def test_changes_under_way_act_without_another_capture(stream_on_gpu, cfg_type, picture):
    fast, plain = (stream_on_gpu(cfg_type=cfg_type, prepare={"guidance_scale": 2.0}) for _ in range(2))
    fast.accelerate("cuda-graph")
    captured = fast.velocity.captured
    for stream in (fast, plain):
        stream(picture(0))
        stream.update(prompt="a boat", guidance_scale=3.0, seed=9)
    for k in range(1, 6):
        assert torch.equal(fast(picture(k)), plain(picture(k))), k
    assert fast.velocity.captured == captured


def test_other_shapes_capture_anew_and_the_oldest_leaves():
    graphed = Graphed(torch.nn.Linear(8, 8).cuda().requires_grad_(False), limit=2)
    for rows in (1, 2, 3, 2, 1):
        x = torch.randn(rows, 8, device="cuda")
        assert torch.equal(graphed(x), graphed.module(x))
        assert graphed.captured <= 2


def test_graphs_that_are_gone_leave_nothing_behind():
    """cuBLAS keeps a workspace for every stream, so a stream for every graph would cost 32 MiB each."""
    linear, held = torch.nn.Linear(64, 64).cuda().half().requires_grad_(False), []
    x = torch.randn(64, 64, device="cuda", dtype=torch.float16)
    for _ in range(6):
        graphed = Graphed(linear)
        graphed(x)
        del graphed
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held == held[:1] * 6


def test_more_stages_and_another_size_of_buffer(stream_on_gpu):
    fast, plain = stream_on_gpu(), stream_on_gpu()
    fast.accelerate("cuda-graph")
    for stream in (fast, plain):
        stream.update(num_inference_steps=8, t_index_list=range(8))
    assert torch.equal(drawn(fast), drawn(plain))


def test_what_a_caller_holds_is_not_overwritten(stream_on_gpu):
    stream = stream_on_gpu()
    stream.accelerate("cuda-graph")
    held = stream.txt2img()
    copy = held.clone()
    for _ in range(6):
        stream.txt2img()
    assert torch.equal(held, copy)


def test_weights_changed_in_place_and_a_vae_swapped(stream_on_gpu):
    stream = stream_on_gpu()
    stream.accelerate("cuda-graph")
    before = drawn(stream)
    with torch.no_grad():
        stream.unet.proj_out.weight.mul_(0.5)
    changed = drawn(stream)
    assert (changed - before).abs().max() > 0.01
    stream.vae = random_tiny_vae(16).to("cuda", torch.float16)
    swapped = drawn(stream)
    stream.accelerate("none")
    assert torch.equal(drawn(stream), swapped)


def test_a_lora_that_comes_goes_and_changes_strength(stream_on_gpu):
    peft = pytest.importorskip("peft", reason="needs peft, which LoRAs in diffusers need")
    stream, plain = stream_on_gpu(), stream_on_gpu()
    stream.accelerate("cuda-graph")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    state = None
    for act in (
        lambda net: net.add_adapter(config, "style"),
        lambda net: net.set_adapters("style", 0.3),
        lambda net: net.disable_adapters(),
        lambda net: net.enable_adapters(),
        lambda net: net.delete_adapters("style"),
    ):
        for one in (stream, plain):
            act(one.unet)
        lora = {name: value for name, value in stream.unet.state_dict().items() if "lora_" in name}
        plain.unet.load_state_dict(lora, strict=False)
        a, b = drawn(stream), drawn(plain)
        assert torch.equal(a, b)
        assert state is None or not torch.equal(a, state)
        state = a


def test_the_hot_path_never_waits(stream_on_gpu, picture):
    stream = stream_on_gpu(cfg_type="self", prepare={"guidance_scale": 2.0})
    stream.accelerate("cuda-graph")
    pictures = stream.preprocess([picture(k) for k in range(6)]).pin_memory()
    stream(pictures[:1])
    stream.txt2img()
    with never_waiting():
        for one in pictures.split(1):
            stream(one)
            stream.txt2img()


def test_memory_stays_where_it_was(stream_on_gpu):
    stream = stream_on_gpu("instaflow")
    stream.accelerate("cuda-graph")
    for _ in range(20):
        stream.txt2img()
    before = cuda_memory()
    for _ in range(500):
        stream.txt2img()
    assert cuda_memory() == before


def test_fused_projections_draw_the_same(stream_on_gpu):
    stream = stream_on_gpu("instaflow")
    before = drawn(stream)
    stream.accelerate("compile", fuse_qkv=True)
    assert (drawn(stream) - before).abs().max() <= BOUNDS["compile"]
    stream.accelerate("none")
    assert torch.equal(drawn(stream), before)


SLEEP = 1_000_000_000  # cycles of a GPU, about half a second


def test_images_of_the_host_are_encoded_beside_the_tick(cuda_stream, picture):
    stream = cuda_stream()
    images = stream.preprocess([picture(k) for k in range(5)]).cpu().pin_memory().split(1)
    expected = [stream(one).clone() for one in images]
    stream.accelerate("cuda-graph")
    for given in (images, [one.cuda() for one in images]):
        stream.reset()
        assert all(torch.equal(stream(one), wanted) for one, wanted in zip(given, expected, strict=True))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    tick = torch.cuda.current_stream().record_event()
    stream.codec.encode(images[0])
    stream.codec.encoder._side.synchronize()
    assert not tick.query()


def test_an_encoder_waits_for_weights_that_were_written(cuda_stream, picture):
    stream = cuda_stream()
    image = stream.preprocess([picture(0)]).cpu().pin_memory()
    stream.accelerate("cuda-graph")
    stream.codec.encode(image)
    torch.cuda._sleep(SLEEP)
    for weight in stream.pipe.vae.encoder.parameters():
        weight.requires_grad_(False).mul_(0.5)
    halved = stream.codec.encode(image)
    stream.accelerate("none")
    assert torch.equal(halved, stream.codec.encode(image.cuda()))
