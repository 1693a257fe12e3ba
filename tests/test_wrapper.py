"""StreamFlowWrapper: StreamDiffusionWrapper's arguments, each of which acts or is refused."""

import inspect

import numpy as np
import pytest
import torch
from conftest import PROMPT
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from random_pipelines import random_pipeline, random_tiny_vae
from random_pipelines.image_prompts import save_adapter, with_encoder
from transformers import CLIPConfig, CLIPImageProcessor

from streamflow import create_wrapper_from_config
from streamflow.app import config
from streamflow.models.safety_checker import load as load_checker
from streamflow.parallel.rows import ShardedVelocity
from streamflow.parallel.vae import ShardedVAE
from streamflow.wrapper import StreamFlowWrapper

STREAMDIFFUSIONS = (
    "model_id_or_path t_index_list lora_dict mode output_type lcm_lora_id vae_id device dtype frame_buffer_size width "
    "height warmup acceleration do_add_noise device_ids use_lcm_lora use_tiny_vae enable_similar_image_filter "
    "similar_image_filter_threshold similar_image_filter_max_skip_frame use_denoising_batch cfg_type seed "
    "use_safety_checker engine_dir"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Stable Diffusion 3 in diffusers' format."""
    where = tmp_path_factory.mktemp("sd3")
    random_pipeline("sd3").save_pretrained(where)
    return str(where)


@pytest.fixture
def made(folder):
    """`made(t_index_list, ...)`: a wrapper of it on the CPU, without warm-up."""

    def make(t_index_list=(0, 1), **arguments):
        defaults = {"device": "cpu", "warmup": 0, "mode": "txt2img", "cfg_type": "none", "use_tiny_vae": False}
        arguments = {**defaults, **({"use_tiny_vae": True} if "vae_id" in arguments else {}), **arguments}
        return StreamFlowWrapper(folder, t_index_list, **arguments)

    return make


def test_the_arguments_are_streamdiffusionwrappers_in_its_order():
    parameters = inspect.signature(StreamFlowWrapper.__init__).parameters
    assert [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD][1:] == STREAMDIFFUSIONS


def test_it_draws_what_its_stream_draws_in_every_output_type(made):
    drawn = {}
    for kind in ("pil", "np", "pt", "latent"):
        wrapper = made(output_type=kind)
        wrapper.prepare(PROMPT, num_inference_steps=2)
        drawn[kind] = wrapper(prompt="a boat")
    assert isinstance(drawn["pil"], Image.Image) and drawn["pil"].size == (64, 64)
    assert drawn["np"].shape == (64, 64, 3) and drawn["pt"].shape == drawn["latent"].shape == (3, 64, 64)
    assert torch.allclose(drawn["pt"], (drawn["latent"] / 2 + 0.5).clamp(0, 1))
    assert np.abs(drawn["np"] - np.asarray(drawn["pil"]) / 255).max() <= 0.5 / 255 + 1e-6
    stream = wrapper.stream
    stream.prepare(PROMPT, num_inference_steps=2)
    stream.update_prompt("a boat")
    assert torch.equal(stream.txt2img()[0], drawn["latent"])


def test_several_frames_at_once_are_a_list(made, picture):
    wrapper = made(frame_buffer_size=2, mode="img2img", t_index_list=[1])
    wrapper.prepare(PROMPT, num_inference_steps=2)
    assert [one.size for one in wrapper([picture(0), picture(1)])] == [(64, 64)] * 2


def test_images_come_as_files_arrays_or_ready_tensors(made, picture, tmp_path):
    picture(3).save(tmp_path / "in.png")
    wrapper = made(mode="img2img", t_index_list=[1], output_type="latent")
    wrapper.prepare(PROMPT, num_inference_steps=2)
    ready = wrapper.preprocess_image(str(tmp_path / "in.png"))
    assert ready.shape == (1, 3, 64, 64) and ready.min() < -0.5
    drawn = [wrapper(one) for one in (tmp_path / "in.png", picture(3), np.asarray(picture(3)), ready)]
    assert all(torch.equal(one, drawn[0]) for one in drawn)


def test_fault_11_the_seed_stays_in_every_prepare(made):
    noises = []
    for seed in (2, 7, 7):
        wrapper = made(seed=seed)
        wrapper.prepare(PROMPT, num_inference_steps=2)
        noises.append(wrapper.stream.frame_noise(0))
    wrapper.prepare("again", num_inference_steps=2)
    assert torch.equal(wrapper.stream.frame_noise(0), noises[1])
    assert torch.equal(noises[1], noises[2]) and not torch.equal(noises[0], noises[1])
    wrapper.update(seed=9)
    wrapper.prepare("again", num_inference_steps=2)
    assert wrapper.stream._denoiser.state.noise.seed == 9


def checker(tmp_path, threshold: float):
    """A real safety checker and feature extractor with random weights, saved and loaded; it objects where a likeness,
    between -1 and 1, is above the threshold."""
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**side, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    made = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=side, projection_dim=8))
    for weights, value in ((made.concept_embeds_weights, threshold), (made.special_care_embeds_weights, 2.0)):
        weights.data.fill_(value)
    made.concept_embeds.data[1:] = 1.0
    made.save_pretrained(tmp_path / "checker")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path / "features")
    loaded = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "checker").eval()
    return loaded, CLIPImageProcessor.from_pretrained(tmp_path / "features")


@pytest.mark.parametrize("kind", ["pil", "latent"])
def test_fault_11_the_safety_checker_sees_every_image(made, tmp_path, kind):
    options = {"frame_buffer_size": 2, "output_type": kind, "t_index_list": [0, 1]}
    plain = made(**options)()
    for threshold, unsafe in ((2.0, False), (-2.0, True)):
        wrapper = made(use_safety_checker=True, safety_checker=checker(tmp_path, threshold), **options)
        for image, own in zip(wrapper(), plain, strict=True):
            image, own = (torch.from_numpy(np.asarray(one).copy()).float() for one in (image, own))
            black = torch.full_like(own, 0.0 if kind == "pil" else -1.0)
            assert torch.equal(image, black if unsafe else own)
    wrapper.nsfw_fallback_img = Image.new("RGB", (8, 8), "white")
    assert all(np.asarray(one).min() == (255 if kind == "pil" else 1) for one in wrapper())
    wrapper.use_safety_checker = False
    assert wrapper.use_safety_checker is False and all(np.asarray(one).std() > 0 for one in wrapper())
    wrapper.use_safety_checker = True
    assert all(np.asarray(one).std() == 0 for one in wrapper())


def test_a_checker_that_cannot_be_loaded_says_how_to_pass_one(made, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"CompVis/stable-diffusion-safety-checker .*: pass both, safety_checker=\(StableDiffusionSafety"
    ):
        made(use_safety_checker=True)


def test_the_pipes_own_checker_is_used_where_it_has_one(tmp_path):
    pipe = random_pipeline("instaflow")
    pipe.safety_checker, pipe.feature_extractor = checker(tmp_path, -2.0)
    assert load_checker(pipe) == (pipe.safety_checker, pipe.feature_extractor)


def test_warming_up_draws_once_and_leaves_no_trace(made, picture):
    wrapper, plain = made(warmup=2, mode="img2img"), made(mode="img2img")
    for one in (wrapper, plain):
        one.prepare(PROMPT, num_inference_steps=2)
    assert wrapper.warmup == 0 and wrapper.stream._denoiser.in_flight() == 0
    assert wrapper(picture(1)) == plain(picture(1))


def test_loras_vae_filter_devices_and_stream_options_reach_the_stream(made, tmp_path, monkeypatch):
    random_tiny_vae(16).save_pretrained(tmp_path / "tiny")
    twin = made()
    twin.stream.pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(twin.stream.pipe.transformer)
    type(twin.stream.pipe).save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    wrapper = made(
        lora_dict={str(tmp_path / "lora"): 0.5},
        vae_id=str(tmp_path / "tiny"),
        device_ids=["cpu", "cpu"],
        enable_similar_image_filter=True,
        similar_image_filter_threshold=0.7,
        similar_image_filter_max_skip_frame=3,
        do_add_noise=True,
        stream_options={"noise": "frame"},
    )
    stream = wrapper.stream
    assert len(stream.loras) == 1 and {"AutoencoderTiny"} == {type(one).__name__ for one in stream.vae.replicas}
    assert isinstance(stream.vae, ShardedVAE) and isinstance(stream.adapter.velocity, ShardedVelocity)
    assert stream.similar_image_filter and (stream.similar_filter.threshold, stream.similar_filter.max_skip_frame) == (
        0.7,
        3,
    )
    assert stream.do_add_noise and stream._updates.defaults["noise"] == "frame"
    wrapper.prepare(PROMPT, num_inference_steps=2)
    assert wrapper().size == (64, 64)


def test_devices_share_rows_or_draw_frames_in_turn(made):
    images = []
    for options in ({}, {"device_ids": ["cpu", "cpu"], "split": "frames"}):
        wrapper = made(**options)
        wrapper.prepare(PROMPT, num_inference_steps=2)
        images.append(wrapper())
        assert len(wrapper.stream.adapter.velocity.interleaved if options else ()) == len(options)
    assert images[0] == images[1]
    with pytest.raises(ValueError, match="unknown split 'columns': choose 'rows', 'frames' or 'auto'"):
        made(split="columns")


@pytest.mark.parametrize(
    "arguments,error,says",
    [
        ({"mode": "vid2vid"}, ValueError, "unknown mode 'vid2vid': choose one of img2img, txt2img"),
        ({"output_type": "jpg"}, ValueError, "unknown output_type"),
        ({"use_lcm_lora": True}, NotImplementedError, "draws in few steps by itself"),
        ({"use_ipadapter": True}, ValueError, "use_ipadapter=True needs ipadapter_config="),
        ({"ipadapter_config": {"scale": 1.0}}, ValueError, "has no ipadapter_model_path"),
        ({"ipadapter_config": {"model": "a"}}, ValueError, "has no key model; it has ipadapter_model_path"),
        ({"ipadapter_config": {"type": "faceid"}}, NotImplementedError, "is_faceid: FaceID needs a face detector"),
        ({"ipadapter_config": {"weight_type": "style"}}, NotImplementedError, "one scale for all blocks"),
        ({"use_cached_attn": True}, NotImplementedError, "cached attention over earlier frames .V2V. is not offered"),
        ({"controlnet_config": [{"model_id": "x/y"}]}, NotImplementedError, "wrapper.stream.add_control"),
        ({"colour": "red"}, TypeError, "StreamFlowWrapper takes no argument 'colour'"),
        ({"t_index_list": [99]}, ValueError, "ends at 99, but .* 50 steps.*prepare=.'prompt'"),
        ({"acceleration": "sfast"}, ValueError, "choose 'auto'"),
        ({"acceleration": "fast"}, ValueError, "unknown acceleration"),
        ({"warmup": -1}, ValueError, "warmup must be"),
        ({"dtype": "float16"}, TypeError, "dtype must be a torch.dtype.*'float16'"),
    ],
)
def test_what_cannot_be_is_refused(made, arguments, error, says):
    with pytest.raises(error, match=says):
        made(**arguments)


def test_image_prompts_by_livepeers_names(folder, made, picture, tmp_path):
    pipe = with_encoder(random_pipeline("sd3"))
    save_adapter(pipe, tmp_path / "style.safetensors")
    pipe.image_encoder.save_pretrained(tmp_path / "encoder")
    picture(1).save(tmp_path / "style.png")
    entry = {
        "ipadapter_model_path": str(tmp_path / "style.safetensors"),
        "image_encoder_path": str(tmp_path / "encoder"),
        "style_image": str(tmp_path / "style.png"),
        "scale": 0.6,
        "type": "regular",
    }
    plain, unused = made(output_type="pt"), made(output_type="pt", use_ipadapter=False, ipadapter_config=entry)
    wrapper = made(output_type="pt", use_ipadapter=True, ipadapter_config=entry)
    first = wrapper()
    assert (wrapper.use_ipadapter, unused.use_ipadapter) == (True, False)
    assert torch.equal(plain(), unused()) and not torch.allclose(plain(), first, atol=1e-3)
    assert wrapper.get_stream_state()["ipadapter_config"] == {"scale": 0.6, "enabled": True, "has_style_image": True}
    own = wrapper.stream
    own.reset()
    expected = own.txt2img(2, image_prompt=picture(2))
    own.reset()
    wrapper.update_style_image(picture(2))
    assert torch.allclose(own.txt2img(2), expected, atol=1e-5)
    wrapper.update_stream_params(ipadapter_config={"scale": 0.1, "style_image": str(tmp_path / "style.png")})
    assert own.image_prompts.adapters == {"adapter_0": 0.1} and own.image_prompts.fixed == ("adapter_0",)
    with pytest.raises(NotImplementedError, match="one scale for all blocks"):
        wrapper.update_stream_params(ipadapter_config={"weight_type": "style"})
    with pytest.raises(AttributeError, match="make a new StreamFlowWrapper with use_ipadapter"):
        wrapper.use_ipadapter = False
    keys = {"model_id": folder, "t_index_list": [0, 1], "ipadapters": [entry], "device": "cpu", "cfg_type": "none"}
    again = create_wrapper_from_config(keys, acceleration="none", use_tiny_vae=False, mode="txt2img", output_type="pt")
    assert torch.equal(again(), first)
    with pytest.raises(RuntimeError, match="there is no adapter for image prompts"):
        plain.update_style_image(picture(1))


def test_calling_in_the_other_mode_says_so(made, picture):
    for mode, image in (("txt2img", picture()), ("img2img", None)):
        wrapper = made(mode=mode)
        wrapper.prepare(PROMPT, num_inference_steps=2)
        with pytest.raises(ValueError, match=f"mode is '{mode}'"):
            wrapper(image)


def test_settings_make_the_same_wrapper(folder, made):
    settings = config.Settings(
        model=folder,
        device="cpu",
        num_inference_steps=2,
        warmup=1,
        prompt="a boat",
        cfg_type="full",
        guidance_scale=3,
        seed=5,
    )
    plain = made(t_index_list=None, cfg_type="full", seed=5)
    plain.prepare("a boat", num_inference_steps=2, guidance_scale=3)
    with StreamFlowWrapper.from_settings(settings) as wrapper:
        assert wrapper() == plain()
