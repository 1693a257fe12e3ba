"""What the programs of this folder share: the embedded model by its folder, images, a check that something was drawn, and
the two ways in which a StreamDiffusion program gets at a stream."""

from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline

from streamflow import StreamFlow, StreamFlowWrapper
from streamflow.image_utils import postprocess_image
from streamflow.pretrained import embedded, embedded_tiny_vae

SIZE = 128
FOX = "a fox, 3d render"
ROCKET = "a rocket, 3d render, on a sky blue background"
# What a program written for Stable Diffusion on a GPU is given instead: a flow, on a CPU.
HERE = {"device": "cpu", "dtype": torch.float32, "width": SIZE, "height": SIZE}


def image_of(k: int = 0, size: tuple[int, int] = (SIZE, SIZE), mode: str = "RGB") -> PIL.Image.Image:
    """A still image, another one for every k."""
    image = PIL.Image.new(mode, size, "skyblue")
    where = (size[0] // 8 + 8 * k, size[1] // 6, size[0] * 5 // 8 + 8 * k, size[1] * 5 // 6)
    PIL.ImageDraw.Draw(image).ellipse(where, fill="orange")
    return image


def tensor_of(k: int = 0) -> torch.Tensor:
    """The same as a float tensor `[3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.array(image_of(k), np.float32)).permute(2, 0, 1) / 255


def pixels(image) -> np.ndarray:
    """A PIL image, an array `[H, W, 3]` or a tensor `[3, H, W]`, the last two in [0, 1], as an array in [0, 1]."""
    if isinstance(image, PIL.Image.Image):
        return np.asarray(image.convert("RGB"), np.float32) / 255
    if isinstance(image, torch.Tensor):
        return image.float().permute(1, 2, 0).cpu().numpy()
    return np.asarray(image, np.float32)


def assert_drawn(image, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """Of this size, finite, with something on it, and no noise: neighbouring pixels are alike."""
    drawn = pixels(image)
    assert drawn.shape == (size[1], size[0], 3)
    assert np.isfinite(drawn).all() and drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.std() > 0.03, "nothing is on it"
    grey = drawn.mean(-1)
    likeness = np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1]
    assert likeness > 0.8, f"neighbouring pixels are as unlike as noise: {likeness:.2f}"
    return drawn


def assert_another(a, b, at_least: float = 0.02) -> None:
    """Two drawn images show different things, or the same thing not quite alike."""
    assert (difference := np.abs(assert_drawn(a) - assert_drawn(b)).mean()) > at_least, difference


class OwnWrapper:
    """What programs carry with them: a wrapper of their own around the class, which makes the calls that StreamDiffusion's
    wrapper makes, in their order."""

    def __init__(
        self,
        model_id_or_path,
        t_index_list,
        mode="img2img",
        output_type="pil",
        device="cuda",
        dtype=torch.float16,
        frame_buffer_size=1,
        width=512,
        height=512,
        warmup=10,
        acceleration="tensorrt",
        do_add_noise=True,
        use_lcm_lora=True,
        use_tiny_vae=True,
        enable_similar_image_filter=False,
        similar_image_filter_threshold=0.98,
        similar_image_filter_max_skip_frame=10,
        use_denoising_batch=True,
        cfg_type="self",
        seed=2,
    ):
        self.device, self.dtype, self.width, self.height = device, dtype, width, height
        self.mode, self.output_type, self.frame_buffer_size = mode, output_type, frame_buffer_size
        self.batch_size = len(t_index_list) * frame_buffer_size if use_denoising_batch else frame_buffer_size
        pipe = StableDiffusion3Pipeline.from_pretrained(model_id_or_path).to(device=device, dtype=dtype)
        self.stream = StreamFlow(
            pipe=pipe,
            t_index_list=t_index_list,
            torch_dtype=dtype,
            width=width,
            height=height,
            do_add_noise=do_add_noise,
            frame_buffer_size=frame_buffer_size,
            use_denoising_batch=use_denoising_batch,
            cfg_type=cfg_type,
        )
        if use_tiny_vae:
            tiny = AutoencoderTiny.from_pretrained(embedded_tiny_vae())
            self.stream.vae = tiny.to(device=pipe.device, dtype=pipe.dtype)
        guided = self.stream.cfg_type in ("full", "self", "initialize")
        self.stream.prepare(
            "",
            "",
            num_inference_steps=50,
            guidance_scale=1.1 if guided else 1.0,
            generator=torch.manual_seed(seed),
            seed=seed,
        )
        if enable_similar_image_filter:
            self.stream.enable_similar_image_filter(similar_image_filter_threshold, similar_image_filter_max_skip_frame)

    def prepare(self, prompt, negative_prompt="", num_inference_steps=50, guidance_scale=1.2, delta=1.0):
        self.stream.prepare(
            prompt, negative_prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, delta=delta
        )

    def __call__(self, image=None, prompt=None):
        return self.img2img(image, prompt) if self.mode == "img2img" else self.txt2img(prompt)

    def txt2img(self, prompt=None):
        if prompt is not None:
            self.stream.update_prompt(prompt)
        return self.postprocess_image(self.stream.txt2img(self.frame_buffer_size), self.output_type)

    def img2img(self, image, prompt=None):
        if prompt is not None:
            self.stream.update_prompt(prompt)
        if isinstance(image, (str, PIL.Image.Image)):
            image = self.preprocess_image(image)
        return self.postprocess_image(self.stream(image), self.output_type)

    def preprocess_image(self, image):
        if isinstance(image, str):
            image = PIL.Image.open(image)
        image = image.convert("RGB").resize((self.width, self.height))
        made = self.stream.image_processor.preprocess(image, self.height, self.width)
        return made.to(device=self.device, dtype=self.dtype)

    def postprocess_image(self, image_tensor, output_type="pil"):
        images = postprocess_image(image_tensor.cpu(), output_type=output_type)
        return images if self.frame_buffer_size > 1 else images[0]


WRAPPERS = [
    pytest.param(OwnWrapper, id="their own wrapper", marks=pytest.mark.slow),
    pytest.param(StreamFlowWrapper, id="StreamFlowWrapper"),
]


def wrapped(kind: type, t_index_list: list[int], **options):
    """A wrapper of the embedded model, by its folder."""
    options = {**HERE, "warmup": 1, "acceleration": "none", "use_lcm_lora": False, **options}
    return kind(model_id_or_path=embedded(), t_index_list=t_index_list, **options)
