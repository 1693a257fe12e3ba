"""Programs that make the calls of StreamDiffusion's thirteen examples and demos' loops, each with a wrapper of its own
around `StreamFlow` and with `StreamFlowWrapper`."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest
import torch
from conftest import slow
from drop_in_helpers import FOX, ROCKET, SIZE, WRAPPERS, assert_another, assert_drawn, image_of, tensor_of, wrapped

from streamflow import StreamFlowWrapper
from streamflow.image_utils import pil2tensor, postprocess_image


@pytest.fixture(params=WRAPPERS)
def kind(request):
    return request.param


@pytest.mark.parametrize("batch", [False, slow(True)])
def test_text_loop(kind, batch, tmp_path):
    wrapper = wrapped(kind, [0, 16, 32, 45], mode="txt2img", cfg_type="none", use_denoising_batch=batch, seed=2)
    wrapper.prepare(prompt=FOX, num_inference_steps=50)
    for _ in range(wrapper.batch_size - 1):
        wrapper()
    wrapper().save(tmp_path / "output.png")
    assert_drawn(image := wrapper())
    assert image.mode == "RGB"


@pytest.mark.slow
def test_text_several_frames_at_once(kind):
    options = {"mode": "txt2img", "cfg_type": "none", "frame_buffer_size": 3, "use_denoising_batch": False}
    wrapper = wrapped(kind, [0, 16, 32, 45], **options)
    wrapper.prepare(prompt=FOX, num_inference_steps=50)
    images = wrapper()
    assert len(images) == 3
    assert_another(images[0], images[1], at_least=1e-3)


@pytest.mark.parametrize("guidance_scale", [slow(1.0), 1.2])
def test_image_loop(kind, guidance_scale, tmp_path):
    image_of(size=(200, 160)).save(tmp_path / "input.png")
    cfg_type = "self" if guidance_scale > 1 else "none"
    wrapper = wrapped(kind, [22, 32, 45], mode="img2img", use_denoising_batch=True, cfg_type=cfg_type, seed=2)
    wrapper.prepare(
        prompt=FOX, negative_prompt="low quality", num_inference_steps=50, guidance_scale=guidance_scale, delta=0.5
    )
    tensor = wrapper.preprocess_image(str(tmp_path / "input.png"))
    assert tensor.shape == (1, 3, SIZE, SIZE) and tensor.dtype == wrapper.dtype and tensor.min() < -0.5
    for _ in range(wrapper.batch_size - 1):
        wrapper(image=tensor)
    assert_drawn(wrapper(image=tensor))


@pytest.mark.slow
def test_image_folder(kind, tmp_path):
    paths = [str(tmp_path / f"{k}.png") for k in range(4)]
    for k, path in enumerate(paths):
        image_of(k).save(path)
    wrapper = wrapped(kind, [32, 40, 45], mode="img2img", cfg_type="self")
    wrapper.prepare(prompt=FOX, negative_prompt="", num_inference_steps=50, guidance_scale=1.2, delta=0.5)
    for _ in range(wrapper.batch_size - 1):
        wrapper(image=paths[0])
    outputs = [wrapper(image=path) for path in paths + [paths[-1]] * (wrapper.batch_size - 1)]
    # S - 1 frames of the first image, then each in its turn
    outputs = outputs[wrapper.batch_size - 1 :]
    assert len(outputs) == 4
    assert_another(outputs[0], outputs[3])


def test_video(kind):
    frames = [tensor_of(k) for k in (0, 0, 1, 2, 3)]
    similar = {"enable_similar_image_filter": True, "similar_image_filter_threshold": 0.98}
    wrapper = wrapped(kind, [35, 45], do_add_noise=False, mode="img2img", output_type="pt", **similar)
    wrapper.prepare(prompt=FOX, num_inference_steps=50)
    video = torch.zeros(len(frames), SIZE, SIZE, 3)
    for _ in range(wrapper.batch_size):
        wrapper(image=frames[0])
    for k, frame in enumerate(frames):
        output = wrapper(frame)
        video[k] = output.permute(1, 2, 0)
    for frame in video:
        assert_drawn(frame.numpy())
    assert_another(video[1].numpy(), video[4].numpy())


@pytest.mark.parametrize("batch_size", [slow(1), 3])
def test_turbo(kind, batch_size):
    wrapper = wrapped(kind, [0], mode="txt2img", cfg_type="none", frame_buffer_size=batch_size, use_denoising_batch=True)
    wrapper.prepare(prompt=FOX, num_inference_steps=50)
    images: queue.Queue = queue.Queue()

    def draw() -> None:
        for _ in range(3):
            images.put(wrapper.stream.txt2img_sd_turbo(batch_size).cpu())

    thread = threading.Thread(target=draw)
    thread.start()
    shown = [postprocess_image(images.get(timeout=60), output_type="pil") for _ in range(3)]
    thread.join()
    assert [len(one) for one in shown] == [batch_size] * 3
    assert_another(shown[0][0], shown[2][0], at_least=1e-3)


@pytest.mark.parametrize(("cfg_type", "guidance_scale"), [("self", 1.2), ("initialize", 1.4)])
@pytest.mark.slow
def test_benchmark(kind, cfg_type, guidance_scale):
    wrapper = wrapped(kind, [32, 45], mode="img2img", use_tiny_vae=True, cfg_type=cfg_type, seed=2)
    prompts = {"prompt": FOX, "negative_prompt": "low quality"}
    wrapper.prepare(**prompts, num_inference_steps=50, guidance_scale=guidance_scale, delta=0.5)
    tensor = wrapper.preprocess_image(image_of())
    for _ in range(2):
        wrapper.stream(tensor)
    for _ in range(2):
        assert_drawn(postprocess_image(wrapper.stream(tensor).cpu(), output_type="pil")[0])
    assert_drawn(wrapper(image=tensor))


@pytest.mark.parametrize("frame_buffer_size", [1, 2])
@pytest.mark.slow
def test_screen(kind, frame_buffer_size):
    """A stand-in takes the place of the screen; its images come as in StreamDiffusion's example, in half precision."""
    similar = {"enable_similar_image_filter": True, "similar_image_filter_threshold": 0.99}
    options = {"do_add_noise": False, "mode": "img2img", "cfg_type": "self", "similar_image_filter_max_skip_frame": 10}
    wrapper = wrapped(kind, [32, 45], frame_buffer_size=frame_buffer_size, **options, **similar)
    wrapper.prepare(prompt=FOX, negative_prompt="", num_inference_steps=50, guidance_scale=1.4, delta=0.5)
    inputs = [pil2tensor(image_of(k, (300, 200)).resize((SIZE, SIZE))).to(torch.float16) for k in range(6)]
    shown = []
    while len(inputs) >= frame_buffer_size:
        sampled = [inputs.pop(0) for _ in range(frame_buffer_size)]
        batch = torch.cat(sampled).to(device=wrapper.device, dtype=wrapper.dtype)
        output = wrapper.stream(batch).cpu()
        shown.append(postprocess_image(output, output_type="pil")[0])
    assert_another(shown[0], shown[-1])


@pytest.mark.slow
def test_a_bright_image_is_as_bright_however_it_comes():
    """Tensors in [-1, 1] without a value below 0, of which diffusers' processor guesses that they are in [0, 1]."""
    bright = image_of().point(lambda level: 128 + level // 2)
    outputs = []
    for read in (lambda w: bright, lambda w: w.preprocess_image(bright), lambda w: pil2tensor(bright)):
        wrapper = wrapped(StreamFlowWrapper, [32, 45], output_type="np", cfg_type="none")
        wrapper.prepare(FOX)
        image = read(wrapper)
        outputs.append(wrapper(image if image is bright else image.view(1, 3, SIZE, SIZE)))
    assert all(np.abs(one - outputs[0]).max() < 1e-5 for one in outputs)


@pytest.mark.slow
def test_a_prompt_that_changes_with_every_call(kind):
    wrapper = wrapped(kind, [0, 16, 32, 45], mode="txt2img", cfg_type="none")
    images = [wrapper(prompt=prompt) for prompt in (FOX, FOX, FOX, FOX, ROCKET, ROCKET, ROCKET, ROCKET)]
    assert_another(images[3], images[7])
