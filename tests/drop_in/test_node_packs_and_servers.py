"""Programs that make the calls of node packs' execute methods, of servers' draw functions, and of a processor that is
reset."""

from __future__ import annotations

import inspect
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from drop_in_helpers import FOX, ROCKET, SIZE, WRAPPERS, assert_another, assert_drawn, image_of, tensor_of, wrapped

from streamflow import StreamFlow, StreamFlowWrapper
from streamflow.image_utils import postprocess_image
from streamflow.pretrained import embedded

pytestmark = pytest.mark.slow


KINDS = pytest.mark.parametrize("kind", WRAPPERS)


class Node:
    """A node's execute method: it makes a wrapper, and prepares it anew when one of its inputs has changed."""

    def __init__(self, **options):
        self.wrapper, self.prepared = wrapped(StreamFlowWrapper, output_type="pt", **options), None

    def execute(self, images=None, **inputs):
        """BHWC images in [0, 1] in and out."""
        if inputs != self.prepared:
            self.wrapper.prepare(**inputs)
            self.prepared = inputs
        if self.wrapper.mode == "txt2img":
            return self.wrapper.txt2img().permute(1, 2, 0)[None]
        outputs = []
        for image in images.permute(0, 3, 1, 2):
            if not outputs:
                for _ in range(self.wrapper.batch_size - 1):
                    self.wrapper(image=image[None])
            outputs.append(self.wrapper(image=image[None]))
        return torch.stack(outputs).permute(0, 2, 3, 1)


INPUTS = {"negative_prompt": "", "num_inference_steps": 50, "guidance_scale": 1.2, "delta": 1.0}


@pytest.mark.parametrize("mode", ["img2img", "txt2img"])
def test_node_with_a_falling_list_of_steps_and_no_size(mode, caplog):
    node = Node(t_index_list=[39, 35, 30], mode=mode, cfg_type="none", width=None, height=None, device=None, seed=-1)
    assert "t_index_list [39, 35, 30] is taken in the order of the steps: [30, 35, 39]" in caplog.text
    assert "seed -1 stands for a random one" in caplog.text
    images = torch.stack([tensor_of(k).permute(1, 2, 0) for k in range(2)])
    drawn = node.execute(images, prompt=FOX, **INPUTS)
    assert drawn.shape == (2 if mode == "img2img" else 1, SIZE, SIZE, 3)
    if mode == "img2img":
        assert_another(drawn[-1].numpy(), node.execute(images, prompt=ROCKET, **INPUTS)[-1].numpy(), at_least=2e-3)


def test_every_default_of_the_wrapper_can_be_read():
    """Node packs show the defaults of StreamDiffusionWrapper's arguments as their widgets' values."""
    names = "warmup do_add_noise use_denoising_batch enable_similar_image_filter similar_image_filter_threshold device dtype"
    names += " similar_image_filter_max_skip_frame device_ids use_safety_checker mode width height frame_buffer_size seed"
    parameters = inspect.signature(StreamFlowWrapper).parameters
    assert all(parameters[name].default is not inspect.Parameter.empty for name in names.split())


def test_udp_server():
    """Requests are drawn in a worker's thread, by a wrapper that nobody prepares; a reply is a JPEG."""
    wrapper = wrapped(StreamFlowWrapper, [0, 25], mode="txt2img", output_type="pil", use_tiny_vae=True, cfg_type="none")

    def draw(prompt: str) -> bytes:
        buffer = io.BytesIO()
        wrapper(prompt=prompt).convert("RGB").save(buffer, "JPEG")
        return buffer.getvalue()

    with ThreadPoolExecutor(1) as pool:
        replies = [pool.submit(draw, prompt).result(timeout=60) for prompt in (FOX, ROCKET)]
    assert all(reply.startswith(b"\xff\xd8") for reply in replies)
    assert_drawn(wrapper(prompt=ROCKET))


def test_http_api():
    """The class without a wrapper, one step, its parameters changed between requests by assignment."""
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded())
    stream = StreamFlow(
        pipe,
        t_index_list=[11],
        torch_dtype=torch.float32,
        cfg_type="self",
        width=SIZE,
        height=SIZE,
        use_denoising_batch=True,
    )
    with pytest.raises(NotImplementedError, match="a rectified flow does that by itself"):
        stream.load_lcm_lora(pretrained_model_name_or_path_or_dict="latent-consistency/lcm-lora-sdv1-5")
    stream.prepare(prompt=FOX, negative_prompt="", num_inference_steps=20, guidance_scale=1.2, delta=1.0)
    for _ in range(3):
        stream(image_of(size=(SIZE, SIZE)))
    before = postprocess_image(stream(image_of()))[0]
    stream.update_prompt(ROCKET, "blurry")
    stream.guidance_scale = 1.5
    stream.delta = 0.5
    stream.t_index_list = [8]
    after = postprocess_image(stream(image_of()))[0]
    assert (stream.guidance_scale, stream.delta, stream.t_list, stream.t_index_list) == (1.5, 0.5, [8], [8])
    assert_another(before, after)


@KINDS
def test_frames_of_a_texture_share(kind):
    """RGBA images of a texture's memory; between two of them the prompt is encoded by the pipe and assigned."""
    wrapper = wrapped(kind, [22, 32, 45], mode="img2img", use_denoising_batch=True, cfg_type="self", seed=2)
    wrapper.prepare(prompt=FOX, negative_prompt="", num_inference_steps=50, guidance_scale=1.2, delta=0.5)
    black = wrapper.preprocess_image(image_of().point(lambda _: 0))
    for _ in range(wrapper.batch_size):
        wrapper(image=black)
    rgba = image_of(mode="RGB").convert("RGBA")
    rgba.putalpha(90)
    before = [wrapper(wrapper.preprocess_image(rgba)) for _ in range(3)][-1]
    stream = wrapper.stream
    with torch.no_grad():
        embeds = stream.pipe.encode_prompt(ROCKET, None, None, device=stream.device)[0]
    stream.prompt_embeds = embeds.repeat(stream.batch_size, 1, 1)
    stream.stock_noise *= 0.5
    after = [wrapper(wrapper.preprocess_image(rgba)) for _ in range(3)][-1]
    assert abs(assert_drawn(before) - assert_drawn(after)).mean() > 0.002
    assert torch.allclose(stream.prompt_embeds, embeds.repeat(stream.batch_size, 1, 1))


@KINDS
def test_a_processor_that_is_reset(kind):
    options = {"output_type": "pt", "mode": "img2img", "cfg_type": "self"}
    wrapper = wrapped(kind, [10, 16, 32, 45], **options)
    wrapper.prepare(prompt=FOX, negative_prompt="", guidance_scale=1.0)
    frame = tensor_of()[None].half()
    assert wrapper.stream.x_t_latent_buffer.shape[0] == 3
    first = wrapper.img2img(frame)
    wrapper.img2img(tensor_of(3)[None].half())
    wrapper.stream.x_t_latent_buffer = None
    assert torch.allclose(wrapper.img2img(frame), first, atol=1e-5), "as on an empty ring"
    assert_drawn(first)


def test_a_demo_that_asks_what_is_there():
    """It looks for attributes before it uses them, prepares with every change of the prompt, and draws PIL images."""
    wrapper = wrapped(StreamFlowWrapper, [35, 45], output_type="pil", mode="img2img", cfg_type="none", vae_id=None)
    assert "update_prompt" in dir(wrapper) and not hasattr(wrapper, "negative_prompt")
    wrapper.prepare(prompt=FOX, negative_prompt="", num_inference_steps=50, guidance_scale=1.2)
    first = wrapper.img2img(image=image_of(), prompt=FOX)
    wrapper.update_prompt(ROCKET)
    second = [wrapper.img2img(image=image_of(), prompt=ROCKET) for _ in range(2)][-1]
    assert_another(first, second, at_least=2e-3)
    assert_drawn(wrapper(image=tensor_of()[None]))
