"""Where a pipe's parts lie, and in what form: what is moved about is refused with the remedy, what is quantised streams."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPT, noises, streamed
from diffusers import StableDiffusion3Pipeline
from random_pipelines import random_pipeline

from streamflow import StreamFlow
from streamflow.acceleration import quantize
from streamflow.pretrained import embedded

CPU = torch.device("cpu")
GROUPS = {"onload_device": CPU, "offload_device": CPU}
MOVED = {
    "model offload": (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), "transformer.*remove_all_hooks"),
    "sequential offload": (lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "transformer.*remove_all_hooks"),
    "group offload": (
        lambda pipe: pipe.enable_group_offload(offload_type="leaf_level", **GROUPS),
        "vae.*transformer of this pipe are offloaded.*without enable_group_offload",
    ),
    "group offload of one part": (
        lambda pipe: pipe.vae.enable_group_offload(offload_type="leaf_level", **GROUPS),
        "^vae of this pipe are offloaded.*without enable_group_offload",
    ),
    "device map of one part": (
        lambda pipe: setattr(pipe.transformer, "hf_device_map", {"pos_embed": 0, "transformer_blocks": "cpu"}),
        "^transformer of this pipe are offloaded.*without a device_map",
    ),
}


@pytest.mark.parametrize("how", MOVED)
def test_a_pipe_that_is_moved_about_is_refused_with_the_remedy(how):
    pipe = random_pipeline("sd3")
    move, message = MOVED[how]
    move(pipe)
    with pytest.raises(ValueError, match=message):
        StreamFlow(pipe)
    if "remove_all_hooks" in message:
        pipe.remove_all_hooks()
        StreamFlow(pipe.to("cpu"))


def test_a_device_map_is_refused_and_the_remedy_works():
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded(), device_map="cpu", text_encoder_3=None, tokenizer_3=None)
    with pytest.raises(ValueError, match=r"device_map: load it without one.*pipe.reset_device_map\(\)"):
        StreamFlow(pipe)
    pipe.reset_device_map()
    StreamFlow(pipe.to("cpu"))


def test_a_network_with_quantised_weights_streams_as_its_pipeline_draws(pipes, monkeypatch):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, pip install 'streamflow-rf[quantize]'")
    deep = {"num_layers": 4}
    pipe = random_pipeline("sd3", **deep)
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    stream = StreamFlow(pipe, range(2), cfg_type="none", frame_buffer_size=2)
    stream.velocity = stream.adapter.row_by_row(False)
    plain = StreamFlow(pipes("sd3", **deep), range(2), cfg_type="none", frame_buffer_size=2)
    for one in (stream, plain):
        one.prepare(PROMPT, num_inference_steps=2)
    x = noises(stream, 4)
    drawn = streamed(stream, x)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "latent"}
    assert torch.equal(drawn, torch.cat([pipe(PROMPT, latents=one, **call).images for one in x.split(1)]))
    assert not torch.equal(drawn, streamed(plain, x))

    monkeypatch.setattr(quantize, "FEATURES", 32)  # down to the size of this network
    monkeypatch.setattr(quantize, "ROWS", 16)
    with pytest.raises(ValueError, match="quantize='int8' finds weights that are quantised already"):
        stream.accelerate("compile", backend="eager", quantize="int8")
    assert torch.equal(streamed(stream, x), drawn)
