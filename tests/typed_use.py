"""Every public call once, as a person with a type checker writes it. Never run: pyright reads it (test_typing.py)."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from streamflow import StreamFlow, StreamFlowWrapper, models
from streamflow.app import config
from streamflow.app.config import Settings
from streamflow.app.scenes import open_scene
from streamflow.conditioning.image_prompt import ImageEmbeds
from streamflow.image_filter import SimilarImageFilter
from streamflow.image_utils import Normalized, postprocess_image
from streamflow.io import Reading, Sink, Source, TimedImage, Writing, open_sink, open_source
from streamflow.live.remote import open_control
from streamflow.live.show import Live, Statistics
from streamflow.models.adapter import FlowAdapter
from streamflow.models.codec import Codec
from streamflow.models.protocols import VAE, Network, Pipeline, Scheduler
from streamflow.parallel import ShardedVAE, decode, shard_denoiser, shard_vae
from streamflow.stream.frames import Frame, Input
from streamflow.stream.hooks import Trace
from streamflow.stream.request import Request


def streaming(picture: Image.Image, mask: Image.Image) -> None:
    pipe = models.load("embedded", device="cpu", dtype=torch.float32)
    with StreamFlow(pipe, [0, 1], cfg_type="self", frame_buffer_size=1) as stream:
        stream.prepare("a fox", "blur", num_inference_steps=4, guidance_scale=2.0, seed=3)
        assert_type(stream(picture), Tensor)
        assert_type(stream.txt2img(), Tensor)
        assert_type(stream.update_prompt([("a cat", 0.6), ("a dog", 0.4)], scope="frame"), int)
        assert_type(stream.update(seed=7, t_index_list=[0, 2]), int)
        for frame in stream.frames([picture, None, Input(picture, mask=mask)]):
            assert_type(frame, Frame)
            assert_type(frame.id, int)
            postprocess_image(frame.wait().image[None], "pil")
        assert_type(stream.flush(), list[Tensor])
        stream.inpaint(picture, mask)
        stream.enable_similar_image_filter(0.98, 10)
        stream.accelerate("compile")
        stream.load_lora(Path("a.safetensors"), "style")
        stream.set_adapters({"style": 0.7})
        stream.vae = shard_vae(stream.vae, devices=["cpu", "cpu"])
        shard_denoiser(stream, devices="all")
        stream.reset()


def methods_and_attributes_of_the_parts(stream: StreamFlow, image: Tensor, net: nn.Module) -> None:
    assert_type(stream.prepare("a fox"), None)
    assert_type(stream.update_prompt("a cat"), int)
    assert_type(stream.update(delta=0.5), int)
    assert_type(stream.encode_image(image), Tensor)
    assert_type(stream.decode_image(image), Tensor)
    assert_type(stream.add_noise(image, image, 0), Tensor)
    assert_type(stream.preprocess(image), Normalized)
    assert_type(stream.frame_noise(3), Tensor)
    assert_type(stream.predict_x0_batch(image), Tensor | None)
    assert_type(stream.scheduler_step_batch(image, image), Tensor)
    assert_type(stream.unet_step(image, stream.sub_timesteps_tensor, idx=0), tuple[Tensor, Tensor])
    assert_type(stream.trace(2), Trace)
    assert_type(stream.on_step(lambda step: step.x_next, graph_safe=True), None)
    assert_type(stream.load_lora("a.safetensors"), str)
    assert_type(stream.fuse_lora(lora_scale=0.5), None)
    assert_type(stream.add_control("edges", net, scale=0.7), None)
    assert_type(stream.controls, dict[str, float])
    assert_type(stream.image_prompts.load({}, "style", weight_name="a.safetensors"), tuple[str, ...])
    assert_type(stream.image_prompts.set([(image, 0.3), (image, 0.7)]), None)
    assert_type(stream.image_prompts.encode(image), ImageEmbeds)
    assert_type(stream.image_prompts.adapters, dict[str, float])
    assert_type(stream(image, image_prompt={"style": ImageEmbeds(image)}), Tensor)
    assert_type(stream.loras, tuple[str, ...])
    assert_type(stream.acceleration, str)
    assert_type(stream.guidance_scale, float)
    assert_type(stream.delta, float)
    assert_type(stream.cfg_type, str)
    assert_type(stream.t_list, list[int])
    assert_type(stream.timesteps, Tensor)
    assert_type(stream.sub_timesteps, list[Tensor])
    assert_type(stream.calls_behind, int)
    assert_type(stream.not_finite, int)
    assert_type(stream.prepared, bool)
    assert_type(stream.request, Request)
    assert_type(stream.input_range, tuple[float, float])
    assert_type(stream.x_t_latent_buffer, Tensor | None)
    assert_type(stream.prev_image_result, Tensor | None)
    assert_type(stream.generator, torch.Generator | None)
    assert_type(stream.similar_filter, SimilarImageFilter)
    assert_type(stream.adapter, FlowAdapter)
    assert_type(stream.pipe, Pipeline)
    assert_type(stream.scheduler, Scheduler)
    assert_type(stream.vae, VAE)
    assert_type(stream.unet, Network)
    assert_type(stream.velocity, nn.Module)
    assert_type(stream.codec, Codec)
    stream.guidance_scale = 2.0
    stream.t_list = [0, 2]


def wrapping(image: Image.Image) -> None:
    with StreamFlowWrapper("embedded", [0, 1], mode="img2img", output_type="pil", warmup=0) as wrapper:
        wrapper.prepare("a fox", num_inference_steps=4)
        wrapper(image)
        assert_type(wrapper.update(prompt="a cat"), int)
        assert_type(wrapper.stream, StreamFlow)


def live(settings: Settings, source: Source, sink: Sink) -> Statistics:
    with open_scene(settings) as wrapper, open_control(settings.control, wrapper.stream.update) as controls:
        with wrapper.stream.live(source, [sink, "null"], target_fps=24, controls=controls) as show:
            assert_type(show, Live)
            return show.wait(1.0)


def pictures() -> None:
    with Reading(open_source("camera:0")) as reading, Writing(open_sink("record:out.mp4")) as writing:
        picture = reading.read()
        if picture is not None:
            writing.write(TimedImage(np.ascontiguousarray(picture.pixels[::-1]), picture.time))


def settings_of(path: Path) -> Settings:
    settings = config.load(path)
    config.save(settings, path)
    return config.parse({"prompt": "a fox", "live": {"target_fps": 24}})


def decoding(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    assert_type(shard_vae(vae, "all"), ShardedVAE)
    return decode(vae, latents, ["cpu"], tile="auto")
