"""Of a video network that takes more than tensors, the blocks alone are compiled: its chunks stay as they are."""

from __future__ import annotations

import pytest
import torch
from conftest import recording_backend, relative_error
from random_pipelines import random_pipeline
from test_gpu_quantize import require_kernel
from test_video import GUIDED, SEED, embeds, equal, latents, random

from streamflow import VideoStream
from streamflow.models import video_adapter_for
from streamflow.video import acceleration

EAGER = {"backend": "eager"}  # torch.compile without inductor: it traces and guards, and compiles in no time
IN_BLOCKS = {
    "anyflow-far": {"prompt_embeds": embeds(), "height": 32, "width": 32, "num_inference_steps": 1},
    "skyreels": {
        "prompt_embeds": embeds(),
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "ar_step": 1,
        "causal_block_size": 2,
        "base_num_frames": 13,
        "overlap_history": 5,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", IN_BLOCKS)
def test_blocks_alone_are_compiled_of_a_network_that_takes_more_than_tensors(family, pipes):
    """In all shapes that chunks have, when the acceleration starts. The pipeline's own call goes on in any shape."""
    pipe, graphs, call = pipes(family), [], IN_BLOCKS[family]
    backend = recording_backend(graphs)
    plain, stream = (VideoStream(pipe, output_type="latent") for _ in range(2))
    plain.prepare(seed=SEED, **call)
    expected = latents(plain, 8)
    plain.update(prompt_embeds=embeds(4))
    expected += latents(plain, 2)
    stream.accelerate("compile", backend=backend)
    assert not graphs, "before shapes are known"
    stream.prepare(seed=SEED, **call)
    compiled = len(graphs)
    drawn = latents(stream, 8)
    stream.update(prompt_embeds=embeds(4))
    drawn += latents(stream, 2)
    assert 0 < compiled == len(graphs) and stream.acceleration == "compile"
    assert max(relative_error(one, own) for one, own in zip(drawn, expected, strict=True)) < 1e-5
    stream.prepare(seed=SEED, **call)
    assert len(graphs) == compiled and equal(latents(stream, 1), drawn[:1]), "nothing is compiled anew"
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    stream.close()
    assert all(block._compiled_call_impl is None for block in pipe.transformer.blocks)
    plain.prepare(seed=SEED, **call)
    assert equal(latents(plain, 2), expected[:2])


WIDE = {"height": 160, "width": 256}  # AnyFlow's past is a whole multiple of 128 tokens only in a late chunk
NETWORKS = [("anyflow-far", {}), ("skyreels", {}), ("skyreels", {"use_kv_cache": True})]
AFTER_THE_START = {
    "a past that is not padded": ("anyflow-far", {"full_chunk_limit": 2}, WIDE),
    "guidance": ("anyflow-far", {"rope_max_seq_len": 2}, {}),
    "an image": ("skyreels-image", {}, {"image": random(1, 3, 32, 32), "causal_block_size": 1}),
    "a video": ("skyreels-video", {}, {"video": random(1, 13, 3, 32, 32)}),
    "kept keys": ("skyreels", {}, {"use_kv_cache": True}),
    "kept keys of more blocks": (
        "skyreels",
        {},
        {"use_kv_cache": True, "num_inference_steps": 4, "base_num_frames": 29, "overlap_history": 13},
    ),
    "kept keys of the whole window": ("skyreels", {}, {"use_kv_cache": True, "ar_step": 0}),
    "kept keys and a video": (
        "skyreels-video",
        {},
        {"use_kv_cache": True, "video": random(1, 5, 3, 32, 32), "base_num_frames": 29},
    ),
    "kept keys of one size until an update": (
        "skyreels-video",
        {},
        {"use_kv_cache": True, "video": random(1, 5, 3, 32, 32), "base_num_frames": 21, "num_inference_steps": 5},
    ),
    "a negative prompt of another length": ("skyreels", {}, {**GUIDED, "negative_prompt_embeds": embeds(1)[:, :9]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", AFTER_THE_START)
def test_nothing_is_compiled_after_the_start(case, pipes):
    """Nor after another prompt, or another `prepare`, with guidance, except for the long video, where that takes long."""
    torch._dynamo.reset()  # torch counts what it has compiled of all networks of a class
    family, network, call = AFTER_THE_START[case]
    pipe, graphs = pipes(family, **network), []
    call = {**next(own for name, own in IN_BLOCKS.items() if family.startswith(name)), **call}
    requests = [(call, 14)] if "full_chunk_limit" in network else [(call, 14), ({**call, **GUIDED}, 4)]
    backend = recording_backend(graphs)
    stream, plain, expected = VideoStream(pipe, output_type="latent"), VideoStream(pipe, output_type="latent"), []
    for request, _ in requests:
        plain.prepare(seed=SEED, **request)
        expected.append(latents(plain, 2))
    stream.accelerate("compile", backend=backend)
    for (request, chunks), own in zip(requests, expected, strict=True):
        stream.prepare(seed=SEED, **request)
        compiled = len(graphs)
        assert max(map(relative_error, latents(stream, 2), own)) < 1e-5
        latents(stream, 1)
        stream.update(prompt_embeds=embeds(4))
        latents(stream, chunks - 3)
        assert 0 < compiled == len(graphs)
    stream.close()


@pytest.mark.slow
def test_compiled_blocks_take_another_size(pipes):
    call = IN_BLOCKS["skyreels"]
    other = {**call, "height": 48, "num_inference_steps": 3}
    plain, stream = (VideoStream(pipes("skyreels"), output_type="latent") for _ in range(2))
    plain.prepare(seed=SEED, **other)
    expected = latents(plain, 2)
    stream.prepare(seed=SEED, **call)
    stream.accelerate("compile", **EAGER)
    stream.prepare(seed=SEED, **other)
    assert all(relative_error(one, own) < 1e-5 for one, own in zip(latents(stream, 2), expected, strict=True))
    stream.close()


def test_what_cannot_be_compiled_in_blocks_is_refused(pipes, monkeypatch):
    def broken(x):
        raise ValueError("a network that fails")

    anyflow = VideoStream(pipes("anyflow-far"), output_type="latent")
    for kind in ("tensorrt", "onnxruntime"):
        anyflow.prepare(**IN_BLOCKS["anyflow-far"])
        with pytest.raises((NotImplementedError, ImportError, RuntimeError), match="dictionaries|CUDA|onnxruntime|TensorRT"):
            anyflow.accelerate(kind)
    with pytest.raises(ValueError, match="regional=False, and only the blocks of this network"):
        anyflow.accelerate("compile", regional=False, **EAGER)
    with pytest.raises(ValueError, match="AnyFlowCausalAttnProcessor.* works with attention='flex' or .*, not 'native'"):
        anyflow.accelerate("compile", attention="native", **EAGER)
    anyflow.accelerate("none")
    early = VideoStream(pipes("anyflow-far"), output_type="latent")
    early.accelerate("compile", regional=False, **EAGER)
    with pytest.raises(ValueError, match="regional=False, and only the blocks of this network"):
        early.prepare(seed=SEED, **IN_BLOCKS["anyflow-far"])
    assert early.seed == SEED and torch.isfinite(early().latents).all()
    torch._dynamo.reset()  # what other tests have compiled of the class would not be traced, and not fail
    skyreels = VideoStream(pipes("skyreels"), output_type="latent")
    skyreels.prepare(seed=SEED, **IN_BLOCKS["skyreels"])
    skyreels.accelerate("compile", **EAGER)
    monkeypatch.setattr(type(skyreels.pipe.transformer.blocks[0].ffn), "forward", lambda self, x: broken(x))
    with pytest.raises(ValueError, match="a network that fails"):
        skyreels.prepare(seed=5, **{**IN_BLOCKS["skyreels"], "height": 48})
    monkeypatch.undo()
    assert skyreels.seed == 5 and torch.isfinite(skyreels().latents).all()
    for one in (anyflow, early, skyreels):
        assert one.acceleration == "none" and all(b._compiled_call_impl is None for b in one.pipe.transformer.blocks)


@pytest.mark.slow
def test_kept_keys_are_compiled_in_another_way(pipes):
    """A stream goes from one to the other and back, beside one that is not accelerated and calls the same blocks."""
    torch._dynamo.reset()  # torch counts what it has compiled of all networks of a class
    pipe, graphs, call = pipes("skyreels"), [], IN_BLOCKS["skyreels"]
    plain, stream = (VideoStream(pipe, output_type="latent") for _ in range(2))
    expected = {}
    for kept in (True, False):
        plain.prepare(seed=SEED, **call, use_kv_cache=kept)
        expected[kept] = latents(plain, 5)
    stream.accelerate("compile", backend=recording_backend(graphs))
    for kept in (True, False, True):
        stream.prepare(seed=SEED, **call, use_kv_cache=kept)
        compiled = len(graphs)
        assert max(map(relative_error, latents(stream, 5), expected[kept])) < 1e-5
        assert 0 < compiled == len(graphs)
        plain.prepare(seed=SEED, **call, use_kv_cache=not kept)
        assert max(map(relative_error, latents(plain, 5), expected[not kept])) < 1e-5
    stream.close()


@pytest.mark.slow
def test_the_vae_is_compiled_too(pipes, monkeypatch):
    """It decodes one latent frame at a time, from the memory of those before, also where frames are asked for."""
    torch._dynamo.reset()  # torch counts what it has compiled of all networks of a class
    monkeypatch.setattr(acceleration, "COMPILED_ON", ("cpu",))
    pipe, call, graphs = pipes("skyreels"), IN_BLOCKS["skyreels"], []
    plain, stream = (VideoStream(pipe, output_type="pt") for _ in range(2))
    plain.prepare(seed=SEED, **call)
    expected = [chunk.images for chunk in plain.chunks(4)]
    backend = recording_backend(graphs)
    stream.prepare(seed=SEED, **call)
    drawn = [stream().images]
    stream.accelerate("compile", backend=backend)
    compiled = len(graphs)
    drawn += [chunk.images for chunk in stream.chunks(3)]
    assert compiled == len(graphs) == 4, "the block, and the decoder of a first, a second and a later latent frame"
    assert all(relative_error(one, own) < 1e-5 for one, own in zip(drawn, expected, strict=True))
    stream.prepare(seed=SEED, **call)
    frames = [frame.image for frame in stream.frames(len(torch.cat(expected)), decode="frame")]
    assert len(graphs) == compiled and relative_error(torch.stack(frames), torch.cat(expected)) < 1e-5
    stream.close()


@pytest.mark.slow
def test_blocks_are_quantised_too(pipes):
    pytest.importorskip("torchao")
    pipe = pipes("anyflow-far", num_attention_heads=4, attention_head_dim=128, ffn_dim=1024)
    call = {**IN_BLOCKS["anyflow-far"], "height": 128, "width": 128}
    plain, stream = (VideoStream(pipe, output_type="latent") for _ in range(2))
    for one in (plain, stream):
        one.prepare(seed=SEED, **call)
    own = latents(plain, 2)
    stream.accelerate("compile", quantize="int8", **EAGER)
    assert all(1e-5 < relative_error(a, b) < 0.1 for a, b in zip(latents(stream, 2), own, strict=True))
    stream.close()
    plain.prepare(seed=SEED, **call)
    assert equal(latents(plain, 2), own)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize(
    "family, more, options",
    [
        *((*one, options) for one in NETWORKS for options in ({}, {"quantize": "fp8"})),
        (*NETWORKS[-1], {"attention": "fa3"}),  # SkyReels without kept keys needs a mask here, and AnyFlow takes flex alone
    ],
    ids=str,
)
def test_blocks_are_compiled_on_a_gpu(family, more, options, full_float32):
    """Chunks stay near the plain ones, and the pipe is afterwards as it was. The images are those of the plain VAE."""
    quantize = "quantize" in options
    if quantize:
        pytest.importorskip("torchao")
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("fp8 needs compute capability 8.9")
    if "attention" in options:
        require_kernel(options["attention"])
    wide = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 1024}
    pipe = random_pipeline(family, **wide).to("cuda", torch.bfloat16)
    pipe.vae.float()
    call = {**IN_BLOCKS[family], "height": 128, "width": 128, **more}
    plain, stream = (VideoStream(pipe, output_type=kind) for kind in ("latent", "pt"))
    plain.prepare(seed=SEED, **call)
    own = latents(plain, 4)
    stream.prepare(seed=SEED, **call)
    stream.accelerate("compile", **options)
    chunks = list(stream.chunks(4))
    drawn = [chunk.latents for chunk in chunks]
    assert all(0 < relative_error(*both) < (0.1 if quantize else 0.03) for both in zip(drawn, own, strict=True))
    with torch.no_grad():
        video = pipe.vae.decode(video_adapter_for(pipe).in_scale_of_vae(torch.cat(drawn, dim=2))).sample
    images = pipe.video_processor.postprocess_video(video, "pt")[0]
    assert relative_error(torch.cat([chunk.images for chunk in chunks]), images) < 1e-4
    stream.close()
    plain.prepare(seed=SEED, **call)
    assert equal(latents(plain, 4), own)
