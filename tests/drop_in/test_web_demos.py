"""Programs that make the calls of web demos' request handlers: StreamDiffusion's three, and livepeer's."""

from __future__ import annotations

import io

import pytest
import torch
from drop_in_helpers import FOX, HERE, ROCKET, SIZE, WRAPPERS, assert_another, assert_drawn, image_of, tensor_of, wrapped

from streamflow import StreamFlowWrapper, create_wrapper_from_config, load_config
from streamflow.pretrained import embedded, embedded_tiny_vae

pytestmark = pytest.mark.slow


KINDS = pytest.mark.parametrize("kind", WRAPPERS)
LISTS = [(FOX, 0.7), (ROCKET, 0.3)]


def test_text_page():
    """/api/predict: a wrapper that nobody prepares, an LCM-LoRA that is named and not used, a device object."""
    options = {**HERE, "device": torch.device("cpu"), "acceleration": "xformers", "warmup": 1, "use_safety_checker": False}
    wrapper = StreamFlowWrapper(
        mode="txt2img",
        model_id_or_path=embedded(),
        lora_dict=None,
        lcm_lora_id="latent-consistency/lcm-lora-sdv1-5",
        vae_id=embedded_tiny_vae(),
        t_index_list=[0, 16, 32, 45],
        cfg_type="none",
        **options,
    )

    def predict(prompt: str) -> bytes:
        buffer = io.BytesIO()
        wrapper(prompt=prompt).save(buffer, format="JPEG")
        return buffer.getvalue()

    assert all(predict(prompt).startswith(b"\xff\xd8") for prompt in (FOX, ROCKET))
    images = [wrapper(prompt=prompt) for prompt in [FOX] * 4 + [ROCKET] * 4]
    assert_another(images[3], images[7])


@KINDS
def test_image_page(kind):
    wrapper = wrapped(kind, [35, 45], output_type="pil", mode="img2img", use_denoising_batch=True, cfg_type="none")
    wrapper.prepare(prompt=FOX, negative_prompt="low quality", num_inference_steps=50, guidance_scale=1.2)
    shown = []
    for k, prompt in enumerate([FOX, FOX, ROCKET, ROCKET]):
        tensor = wrapper.preprocess_image(image_of(k, (320, 240)))
        shown.append(wrapper(image=tensor, prompt=prompt))
    assert_another(shown[1], shown[3])


@KINDS
def test_video_page(kind):
    frames = [tensor_of(k) for k in range(3)]
    wrapper = wrapped(kind, [35, 45], do_add_noise=False, output_type="pt", mode="img2img")
    wrapper.prepare(prompt=FOX, num_inference_steps=50)
    first = wrapper(frames[0])
    assert tuple(first.shape[1:]) == (SIZE, SIZE)
    for _ in range(wrapper.batch_size):
        wrapper(image=frames[0])
    outputs = [wrapper(image=frame) for frame in frames]
    assert_drawn(outputs[-1])


# -- livepeer's demo --------------------------------------------------------------------------------------------------------


@pytest.fixture
def live():
    wrapper = wrapped(StreamFlowWrapper, [35, 45], output_type="pt", mode="img2img", vae_id=None, cfg_type="self")
    wrapper.prepare(prompt=FOX, negative_prompt="", num_inference_steps=50, guidance_scale=1.2)
    return wrapper


def frames(wrapper, count: int = 2):
    return [wrapper(image=tensor_of()) for _ in range(count)][-1]


def test_controls_of_the_page(live):
    live.update_prompt([(FOX, 1.0)], prompt_interpolation_method="slerp")
    first = assert_drawn(frames(live))
    live.update_stream_params(guidance_scale=1.5, delta=0.7, num_inference_steps=40, t_index_list=[20, 30], seed=7)
    assert (abs(assert_drawn(frames(live, 3)) - first)).mean() > 0.005
    state = live.get_stream_state(include_caches=False)
    assert state["prompt_list"] == [(FOX, 1.0)] and state["seed_list"] == [(7, 1.0)] and state["current_seed"] == 7
    assert (state["guidance_scale"], state["delta"], state["num_inference_steps"]) == (1.5, 0.7, 40)
    assert (state["t_index_list"], state["batch_size"], state["cfg_type"]) == ([20, 30], 2, "self")
    assert (state["width"], state["latent_height"], state["device"], state["dtype"]) == (SIZE, 16, "cpu", "torch.float32")
    assert (state["is_turbo"], state["is_sdxl"], state["ipadapter_config"]) == (False, False, None)
    live.update_stream_params(
        prompt_list=LISTS,
        prompt_interpolation_method="linear",
        normalize_prompt_weights=True,
        seed_list=[(1, 0.5), (2, 0.5)],
        seed_interpolation_method="slerp",
        controlnet_config=[],
        ipadapter_config=None,
    )
    assert_drawn(frames(live))
    state = live.get_stream_state(include_caches=True)
    assert state["prompt_list"] == LISTS and state["seed_list"] == [(1, 0.5), (2, 0.5)] and state["caches"]
    live.update_prompt(ROCKET)
    frames(live)
    assert live.get_stream_state()["prompt_list"] == [(ROCKET, 1.0)]


def test_several_prompts_and_seeds_are_prepared(live):
    live.prepare(LISTS, prompt_interpolation_method="slerp", seed_list=[(3, 1.0)], seed_interpolation_method="linear")
    assert live.stream.request.blend == "slerp" and live.stream.request.prompt == tuple(LISTS)
    assert_drawn(frames(live))


def test_another_number_of_steps_keeps_their_places(live):
    for steps, expected in ((9, [6, 7]), (50, [37, 43]), (2, [1])):
        live.update_stream_params(num_inference_steps=steps)
        assert live.get_stream_state()["t_index_list"] == expected
        assert_drawn(frames(live, 3))
    with pytest.raises(ValueError, match="num_inference_steps must be an integer of 1 or more, not 0"):
        live.update_stream_params(num_inference_steps=0)


def test_memory_is_given_back(live):
    live.clear_caches()
    assert live.get_stream_state(include_caches=True)["caches"] == {"cached_prompts": 0}
    assert_drawn(frames(live))
    live.cleanup_gpu_memory()
    with pytest.raises(RuntimeError, match="this stream was closed"):
        frames(live)


def test_drawing_is_skipped(live):
    live.skip_diffusion = True
    image = live(image=tensor_of(2), prompt="unused")
    assert torch.allclose(image, tensor_of(2), atol=1e-6)
    assert live(image_of(2, (64, 64))).shape == (3, SIZE, SIZE)
    live.skip_diffusion = False
    assert not torch.allclose(live(image=tensor_of(2)), image, atol=1e-2)
    text = wrapped(StreamFlowWrapper, [0], mode="txt2img", cfg_type="none", skip_diffusion=True)
    with pytest.raises(ValueError, match="skip_diffusion returns the image of a call, and txt2img has none"):
        text()


def test_what_is_not_there_says_so(live):
    for name in ("update_control_image", "get_last_processed_image"):
        assert not hasattr(live, name)
    with pytest.raises(AttributeError, match="no update_control_image: control nets are diffusers models here"):
        live.update_control_image(0, image_of())
    with pytest.raises(RuntimeError, match="there is no adapter for image prompts: make the wrapper with ipadapter_config"):
        live.update_style_image(image_of())
    for arguments, says in (
        ({"controlnet_config": [{"model_id": "x/y"}]}, "stream.add_control"),
        ({"cache_maxframes": 2}, "cached attention"),
        ({"image_preprocessing_config": [{"type": "blur"}]}, "by the caller"),
    ):
        with pytest.raises(NotImplementedError, match=says):
            live.update_stream_params(**arguments)
    with pytest.raises(TypeError, match="takes no argument 'colour'"):
        live.update_stream_params(colour="red")
    with pytest.raises(ValueError, match="seed or seed_list, not both"):
        live.update_stream_params(seed=1, seed_list=[(1, 1.0)])
    with pytest.raises(ValueError, match="normalize_seed_weights=False changes the noise's variance"):
        live.update_stream_params(normalize_seed_weights=False)
    with pytest.raises(ValueError, match="unknown seed_interpolation_method 'cubic'"):
        live.update_stream_params(seed_list=[(1, 1.0)], seed_interpolation_method="cubic")


CONFIG = f"""
model_id: {embedded()}
t_index_list: [35, 45]
width: {SIZE}
height: {SIZE}
device: cuda
dtype: float16
frame_buffer_size: 1
use_lcm_lora: false
use_tiny_vae: true
acceleration: tensorrt
cfg_type: self
safety_checker: false
negative_prompt: blurry
guidance_scale: 1.1
num_inference_steps: 50
delta: 0.7
output_type: pt
prompt_blending:
  prompt_list: [["{FOX}", 0.6], ["{ROCKET}", 0.4]]
  interpolation_method: slerp
seed_blending:
  seed_list: [[42, 1.0], [789, 0.4]]
"""


def test_a_file_makes_a_wrapper(tmp_path):
    (tmp_path / "stream.yaml").write_text(CONFIG, encoding="utf-8")
    config = load_config(tmp_path / "stream.yaml")
    assert config["t_index_list"] == [35, 45]
    wrapper = create_wrapper_from_config(
        config, device=torch.device("cpu"), dtype=torch.float32, acceleration="none", warmup=1, use_safety_checker=False
    )
    assert wrapper.stream.request.delta == 0.7 and wrapper.stream.request.prompt == ((FOX, 0.6), (ROCKET, 0.4))
    assert wrapper.get_stream_state()["seed_list"] == [(42, 1.0), (789, 0.4)]
    assert_drawn(frames(wrapper))


@pytest.mark.parametrize(
    ("name", "text", "error", "says"),
    [
        ("a.toml", "", ValueError, "a.toml is of no kind that is read: choose one of .yaml, .yml, .json"),
        ("a.yaml", "[1, 2]", ValueError, "a configuration is keys and values, not list"),
        ("a.yaml", "{a: b", ValueError, "a.yaml cannot be read"),
        ("a.json", '{"prompts": 1, "dtype": "int8"}', ValueError, "model_id is missing; 'prompts' is no key; dtype 'int8'"),
        ("a.json", '{"model_id": "x", "prompt_blending": {}}', ValueError, "prompt_blending needs a prompt_list"),
    ],
)
def test_a_file_that_cannot_be_says_why(tmp_path, name, text, error, says):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(error, match=says):
        load_config(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_config(tmp_path / "none.yaml")


def test_a_file_that_asks_for_what_is_not_there_says_so(tmp_path):
    config = {"model_id": embedded(), "controlnets": [{"model_id": "x"}]}
    with pytest.raises(NotImplementedError, match="control nets"):
        create_wrapper_from_config(config)
    with pytest.raises(NotImplementedError, match="normalize_seed_weights"):
        create_wrapper_from_config({"model_id": embedded(), "normalize_seed_weights": False})
