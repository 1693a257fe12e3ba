"""Bad input: each kind has its own message, with what was found and the remedy, and a failed call changes nothing."""

from __future__ import annotations

import json
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import PROMPT, noises
from PIL import Image
from random_pipelines import random_pipeline, random_tiny_vae

from streamflow import StreamFlow
from streamflow.models import register
from streamflow.stream.image_checks import RangeChecks
from streamflow.stream.request import is_plain, same

NAN = float("nan")

# -- the constructor ------------------------------------------------------------------------------------------------------

CONSTRUCTOR = {
    "no step": ({"t_index_list": []}, ValueError, r"t_index_list is empty: name at least one step, such as \[0\]"),
    "repeated": ({"t_index_list": [0, 1, 1]}, ValueError, r"\[0, 1, 1\] must name each step once: \[0, 1\] would do"),
    "repeated and unsorted": ({"t_index_list": [2, 0, 2]}, ValueError, r"\[2, 0, 2\] must name each step once: \[0, 2\]"),
    "negative step": ({"t_index_list": [-1, 2]}, ValueError, "starts at -1: steps are counted from 0"),
    "half a step": ({"t_index_list": [0, 1.5]}, TypeError, "1.5, which is no integer"),
    "a truth value": ({"t_index_list": [False]}, TypeError, "False, which is no integer"),
    "a text of steps": ({"t_index_list": "0,1"}, TypeError, r"sequence of integers such as \[0, 16, 32, 45\], not '0,1'"),
    "one step": ({"t_index_list": 3}, TypeError, "sequence of integers .*, not 3"),
    "no frame buffer": ({"frame_buffer_size": 0}, ValueError, "frame_buffer_size must be an integer of 1 or more, not 0"),
    "negative frame buffer": ({"frame_buffer_size": -2}, ValueError, "1 or more, not -2"),
    "half a frame": ({"frame_buffer_size": 1.5}, ValueError, "1 or more, not 1.5"),
    "width": ({"width": 72}, ValueError, "width must be a positive multiple of 16 pixels, not 72: try 64"),
    "height": ({"height": 8}, ValueError, "height must be a positive multiple of 16 pixels, not 8: try 16"),
    "no width": ({"width": 0}, ValueError, "not 0: try 16"),
    "negative width": ({"width": -64}, ValueError, "not -64: try 16"),
    "too large": ({"width": 1024, "height": 64}, ValueError, "1024x64 is larger than .*: at most 256 a side"),
    "width in words": ({"width": "wide"}, TypeError, "width must be an integer number of pixels, not 'wide'"),
    "cfg_type": ({"cfg_type": "cfg"}, ValueError, "'cfg': choose one of 'none', 'full', 'self', 'initialize'"),
    "family": ({"family": "sd9"}, ValueError, r"'sd9': choose one of .*flux, .*instaflow, .*sd3.* or register\(\) yours"),
    "another family": ({"family": "instaflow"}, ValueError, "StableDiffusion3Pipeline has no unet, .*another family="),
    "dtype by name": ({"torch_dtype": "float16"}, TypeError, "torch.dtype such as torch.float32, not 'float16'"),
    "integer dtype": ({"torch_dtype": torch.int8}, TypeError, "torch.dtype such as torch.float32, not torch.int8"),
    "another dtype": ({"torch_dtype": torch.bfloat16}, ValueError, r"in torch.float32: .*pipe.to\(dtype=torch.bfloat16\)"),
    "noise": ({"noise": "blue"}, ValueError, "'blue': choose one of 'fixed', 'frame'"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_the_constructor_refuses(pipes, name):
    options, error, message = CONSTRUCTOR[name]
    with pytest.raises(error, match=message):
        StreamFlow(pipes("sd3"), **options)


def test_sizes_of_flux_are_multiples_of_two_latents(pipes):
    with pytest.raises(ValueError, match="width must be a positive multiple of 16 pixels, not 40: try 32"):
        StreamFlow(pipes("flux"), width=40)


def test_a_diffusion_pipeline_is_no_flow(pipes):
    with pytest.raises(ValueError, match="PNDMScheduler is a diffusion model, not a flow.*pass family='instaflow'"):
        StreamFlow(pipes("instaflow"))


def test_an_unknown_pipeline_lists_the_known(pipes):
    class SomePipeline:
        components = {}

    with pytest.raises(ValueError, match=r"SomePipeline. Known pipelines: .*StableDiffusion3Pipeline.*register\(\)"):
        StreamFlow(SomePipeline())


def test_a_registered_family_is_known(pipes, monkeypatch):
    from streamflow import models
    from streamflow.models.families.sd3 import StableDiffusion3

    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    monkeypatch.setattr(models, "PIPELINES", dict(models.PIPELINES))
    register("mine", StableDiffusion3, ("MyPipeline",))
    assert type(StreamFlow(pipes("sd3"), family="mine").adapter) is StableDiffusion3
    with pytest.raises(ValueError, match="mine"):
        StreamFlow(pipes("sd3"), family="yours")


def test_another_scheduler_is_refused_with_the_way_to_the_right_one(pipes):
    from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

    components = {**pipes("sd3").components, "scheduler": FlowMatchHeunDiscreteScheduler()}
    stream = StreamFlow(StableDiffusion3Pipeline(**components), cfg_type="none")
    with pytest.raises(ValueError, match=r"FlowMatchHeun.*FlowMatchEulerDiscreteScheduler.from_config"):
        stream.prepare(PROMPT, num_inference_steps=4)


@pytest.mark.parametrize("how", ["offload", "device_map"])
def test_offloaded_pipes_are_refused_with_the_remedy(how):
    pipe = random_pipeline("sd3")
    if how == "offload":
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(pipe.transformer, ModelHook())
        message = r"transformer of this pipe are offloaded.*remove_all_hooks\(\) and pipe.to\(device\)"
    else:
        pipe.hf_device_map = {"transformer": "cpu"}
        message = r"device_map: load it without one and move it, pipe.to\('cuda'\)"
    with pytest.raises(ValueError, match=message):
        StreamFlow(pipe)


def test_half_on_a_cpu_that_cannot_says_so(pipes, monkeypatch):
    half = pipes("sd3", torch.float16)

    def conv2d(*args, **kwargs):
        raise RuntimeError('"slow_conv2d_cpu" not implemented for "Half"')

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", conv2d)
        with pytest.raises(
            RuntimeError, match=r"cannot compute in float16: use pipe.to\(dtype=torch.float32\) or .*bfloat16"
        ):
            StreamFlow(half)
        StreamFlow(pipes("sd3"))
    try:
        torch.nn.functional.conv2d(*[torch.ones(1, 1, 1, 1, dtype=torch.float16)] * 2)
    except RuntimeError:
        return
    StreamFlow(half)


def test_another_familys_vae_is_refused_and_the_old_one_stays(stream_of, pipes):
    stream = stream_of("sd3")
    before = stream.txt2img()
    for vae in (pipes("instaflow").vae, random_tiny_vae(4)):
        with pytest.raises(ValueError, match="4 latent channels, the network draws 16: load the VAE that belongs"):
            stream.vae = vae
    stream.prepare(PROMPT, num_inference_steps=4)
    assert stream.vae is stream.pipe.vae and torch.equal(stream.txt2img(), before)


# -- before prepare, and after close ----------------------------------------------------------------------------------------

USES = {
    "call": lambda s: s(),
    "call with an image": lambda s: s(Image.new("RGB", (64, 64))),
    "txt2img": lambda s: s.txt2img(),
    "txt2img_sd_turbo": lambda s: s.txt2img_sd_turbo(),
    "frames": lambda s: list(s.frames([None])),
    "predict_x0_batch": lambda s: s.predict_x0_batch(torch.zeros(1, 16, 8, 8)),
    "flush": lambda s: s.flush(),
    "update": lambda s: s.update(seed=1),
    "update_prompt": lambda s: s.update_prompt("a"),
    "add_noise": lambda s: s.add_noise(torch.zeros(1), torch.zeros(1), 0),
    "encode_image": lambda s: s.encode_image(torch.zeros(1, 3, 64, 64)),
    "unet_step": lambda s: s.unet_step(torch.zeros(1, 16, 8, 8), torch.zeros(1)),
    "scheduler_step_batch": lambda s: s.scheduler_step_batch(torch.zeros(1), torch.zeros(1)),
    "guidance_scale": lambda s: s.guidance_scale,
    "timesteps": lambda s: s.timesteps,
}


def test_everything_needs_prepare_and_says_so(pipes):
    stream = StreamFlow(pipes("sd3"), [0], cfg_type="none")
    for name, use in USES.items():
        with pytest.raises(RuntimeError, match=r"call prepare\(prompt\) first"):
            pytest.fail(f"{name} returned {use(stream)!r}")


def test_everything_refuses_a_closed_stream(pipes, stream_of):
    with stream_of("sd3", [0]) as stream:
        stream.txt2img()
    for name, use in {**USES, "prepare": lambda s: s.prepare("a")}.items():
        with pytest.raises(RuntimeError, match="closed: make a new StreamFlow of the same pipe"):
            pytest.fail(f"{name} returned {use(stream)!r}")
    stream.close()
    stream_of("sd3", [0]).txt2img()


# -- prepare and update -----------------------------------------------------------------------------------------------------


def embeds(width=64, pooled=48, prompts=1, tokens=77 + 256):
    return {"prompt_embeds": torch.zeros(prompts, tokens, width), "pooled_prompt_embeds": torch.zeros(prompts, pooled)}


# (arguments, error, message), for prepare and for update alike; a prompt of None leaves it to the embeddings.
SETTINGS = {
    "prompt is a list": (
        {"prompt": ["a", "b"]},
        TypeError,
        r"it holds 2 texts: .*stream\.update_prompt\(text, scope='frame'\)",
    ),
    "prompt is a list of some": ({"prompt": ["a", ("b", 1)]}, TypeError, r"prompt as a list holds pairs .*, not 'a'"),
    "prompt is a number": ({"prompt": 3}, TypeError, "prompt must be a string or a list of .string, weight., not int 3"),
    "half a character": ({"prompt": [("a", 1), ("b\ud83d", 1)]}, ValueError, r"half of a surrogate pair, '\\ud83d' at 1"),
    "negative prompt": ({"negative_prompt": ["a", "b"]}, TypeError, "negative_prompt as a list .* holds 2 texts"),
    "cfg_type": ({"cfg_type": "cfg"}, ValueError, "unknown cfg_type 'cfg': choose one of 'none', 'full'"),
    "do_add_noise": ({"do_add_noise": 1}, TypeError, "do_add_noise must be True or False, not 1"),
    "wide embeddings": (
        {"prompt": None, **embeds(width=63)},
        ValueError,
        "63 wide, .*joint_attention_dim is 64: .*encoders",
    ),
    "wide pooled": (
        {"prompt": None, **embeds(pooled=47)},
        ValueError,
        "47 wide, this network's pooled_projection_dim is 48",
    ),
    "several prompts": ({"prompt": None, **embeds(prompts=2)}, ValueError, "holds 2 prompts: .* one prompt at a time"),
    "no pooled": ({"prompt": None, "prompt_embeds": torch.zeros(1, 333, 64)}, ValueError, "pooled_prompt_embeds"),
    "unknown argument": ({"promt_2": "a"}, TypeError, "takes no argument 'promt_2'; it takes .*prompt_2, .*sigmas"),
    "reserved": ({"latents": torch.zeros(1)}, TypeError, "latents cannot be passed on to StableDiffusion3Pipeline"),
    "reserved times": ({"timesteps": [1]}, TypeError, "timesteps cannot be passed on"),
    "skip layers": ({"skip_guidance_layers": [1]}, NotImplementedError, "skip_guidance_layers changes the .* own loop"),
    "skip scale": ({"skip_layer_guidance_scale": 2.8}, NotImplementedError, "skip_layer_guidance_scale"),
    "no steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be an integer of 1 or more, not 0"),
    "half steps": ({"num_inference_steps": 2.5}, ValueError, "1 or more, not 2.5"),
    "too few steps": ({"num_inference_steps": 3}, ValueError, "ends at 3, but the schedule has 3 steps, 0 to 2: raise num"),
    "guidance": ({"guidance_scale": "7"}, TypeError, "guidance_scale must be a number, not '7'"),
    "guidance NaN": ({"guidance_scale": NAN}, ValueError, "guidance_scale must be finite, not nan"),
    "delta": ({"delta": [1]}, TypeError, r"delta must be a number, not \[1\]"),
    "seed": ({"seed": 1.5}, TypeError, "seed must be an integer or a list of .integer, weight., not 1.5"),
    "strength": ({"strength": 1.5}, ValueError, "strength must be above 0 and at most 1, not 1.5"),
    "no strength": ({"strength": 0.0}, ValueError, "strength must be above 0"),
    "rising sigmas": ({"sigmas": [0.2, 0.4, 0.6, 0.8]}, ValueError, "sigmas must fall strictly"),
}
ONLY_PREPARE = {
    "seeds and a generator": (
        {"seed": [(1, 0.5), (2, 0.5)], "generator": torch.Generator()},
        ValueError,
        "a generator has one seed: pass seed as an integer",
    ),
    "generator": ({"generator": 5}, TypeError, "generator must be a torch.Generator, not int"),
    "nothing to draw": ({"prompt": None}, ValueError, "pass a prompt, or prompt_embeds made by .*encode_prompt"),
    "twice a prompt": (embeds(), ValueError, "a prompt or prompt_embeds, not both"),
}
ONLY_UPDATE = {
    "repeated": ({"t_index_list": [2, 1, 1]}, ValueError, r"\[2, 1, 1\] must name each step once"),
    **{name: SETTINGS.pop(name) for name in ("cfg_type", "do_add_noise")},
    "beyond": ({"t_index_list": [0, 4]}, ValueError, "ends at 4, but the schedule has 4 steps, 0 to 3"),
    "no step": ({"t_index_list": []}, ValueError, "t_index_list is empty"),
    "scope": ({"seed": 3, "scope": "later"}, ValueError, "scope 'later': choose 'now' or 'frame'"),
    "length now": (
        {"t_index_list": [0, 3], "scope": "now"},
        ValueError,
        "keeps the number of stages, 3, and 2 were given: leave scope out",
    ),
    "generator": ({"generator": torch.Generator()}, TypeError, "generator cannot be passed on"),
}


def to_prepare(stream, **options):
    stream.prepare(**{"prompt": PROMPT, "num_inference_steps": 4, **options})


def to_update(stream, **options):
    if options.get("prompt", "") is None:
        options.pop("prompt")
    stream.update(**options)


CALLS = [
    *((f"prepare: {name}", to_prepare, case) for name, case in {**SETTINGS, **ONLY_PREPARE}.items()),
    *((f"update: {name}", to_update, case) for name, case in {**SETTINGS, **ONLY_UPDATE}.items()),
]


@pytest.mark.parametrize("cfg_type", ["none", "full"])
@pytest.mark.parametrize(("name", "call", "case"), CALLS, ids=[name for name, _, _ in CALLS])
def test_prepare_and_update_refuse(stream_of, name, call, case, cfg_type):
    options, error, message = case
    with pytest.raises(error, match=message):
        call(stream_of("sd3", [0, 1, 3], cfg_type=cfg_type), **options)


@pytest.mark.parametrize("cfg_type", ["none", "full"])
def test_failed_prepares_and_updates_change_nothing(stream_of, cfg_type):
    """One stream suffers them all between its ticks, a pending update before them, and draws what its twin draws."""
    suffering, twin = (stream_of("sd3", [0, 1, 3], cfg_type=cfg_type, prepare={"guidance_scale": 3.0}) for _ in range(2))
    drawn = {suffering: [], twin: []}
    for tick, row in enumerate(noises(twin, 4).split(1)):
        for stream in (suffering, twin):
            if tick == 2:
                stream.update_prompt("another one", scope="frame")
        for name, call, (options, _, _) in CALLS if tick in (0, 2) else ():
            with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)):
                pytest.fail(f"{name} returned {call(suffering, **options)!r}")
        for stream in (suffering, twin):
            drawn[stream].append(stream.predict_x0_batch(row))
    for stream in (suffering, twin):
        drawn[stream] = torch.cat([out for out in drawn[stream] if out is not None] + stream.flush())
    assert torch.equal(drawn[suffering], drawn[twin])
    assert torch.equal(suffering.txt2img(), twin.txt2img()), "seeds and frame ids too"
    assert suffering.update(seed=1) == twin.update(seed=1) == 2, "a failed update has no number"


@pytest.mark.parametrize("call", [to_prepare, to_update])
def test_a_strength_that_leaves_no_step_says_which_would(stream_of, call):
    with pytest.raises(ValueError, match="strength 0.01 of 4 steps leaves no step to take: raise it to 0.25 or raise num"):
        call(stream_of("instaflow", [3]), strength=0.01)


@pytest.mark.parametrize("call", [to_prepare, to_update])
def test_a_delta_of_none_is_no_number(stream_of, call):
    with pytest.raises(TypeError, match="delta must be a number, not None"):
        call(stream_of("sd3", [3], cfg_type="self"), delta=None)


@pytest.mark.parametrize("value", ["abc", NAN])
@pytest.mark.parametrize("cfg_type", ["none", "full"])
def test_a_bad_weight_of_true_guidance_changes_nothing(stream_of, cfg_type, value):
    suffering, twin = (stream_of("flux", [0, 2], cfg_type=cfg_type) for _ in range(2))
    drawn = []
    for stream in (suffering, twin):
        first = stream.txt2img()
        if stream is suffering:
            for call in (to_update, to_prepare):
                with pytest.raises((TypeError, ValueError), match="true_cfg_scale must be "):
                    call(stream, true_cfg_scale=value)
        drawn.append(torch.cat([first, stream.txt2img()]))
    assert torch.equal(*drawn)


def test_a_bad_filter_changes_nothing(stream_of):
    stream = stream_of("sd3", [2])
    before = stream.similar_filter.threshold, stream.similar_filter.max_skip_frame
    for threshold, most in ((-1, 5), (0.5, -1)):
        with pytest.raises(ValueError, match="0 or more, not -1"):
            stream.enable_similar_image_filter(threshold, most)
    assert (stream.similar_filter.threshold, stream.similar_filter.max_skip_frame) == before
    assert stream.similar_image_filter is False


# -- images and latents ---------------------------------------------------------------------------------------------------

PICTURES = {
    "a path": ("a.png", TypeError, "not str"),
    "mode": (Image.new("F", (64, 64)), ValueError, "mode F does not say which values are black and white"),
    "channels": (np.zeros((64, 64, 4), np.uint8), ValueError, r"\[64, 64, 4\]"),
    "channels last": (torch.zeros(64, 64, 3), ValueError, r"\[64, 64, 3\]"),
    "NaN": (torch.full((3, 64, 64), NAN), ValueError, "NaN or infinite"),
    "out of range": (torch.full((3, 64, 64), 1.5), ValueError, r"1.5 to 1.5, outside of \[0, 1\]: .*input_range"),
    "negative": (np.full((64, 64, 3), -0.5, np.float32), ValueError, r"-0.5 to -0.5, outside of \[0, 1\]"),
    "integers": (torch.zeros(3, 64, 64, dtype=torch.int32), TypeError, "uint8 .* or floating, not torch.int32"),
    "two": ([Image.new("RGB", (64, 64))] * 2, ValueError, "2 images"),
}


def test_failed_images_change_nothing(stream_of, picture):
    suffering, twin = (stream_of("sd3", [2, 3]) for _ in range(2))
    for stream in (suffering, twin):
        stream.enable_similar_image_filter(0.9)
    for k in range(3):
        if k != 1:
            for image, error, message in PICTURES.values():
                with pytest.raises(error, match=message):
                    suffering(image)
        assert torch.equal(suffering(picture(k)), twin(picture(k)))
    assert all(torch.equal(a, b) for a, b in zip(suffering.flush(), twin.flush(), strict=True))


def test_a_bad_image_among_frames_loses_none_before_it(stream_of, picture):
    stream = stream_of("sd3", [2, 3])
    frames = stream.frames([picture(0), picture(1), "bad"])
    assert next(frames).id == 0
    with pytest.raises(TypeError, match="not str"):
        next(frames)
    assert len(stream.flush()) == 1
    with pytest.raises(ValueError, match="one image at a time, not 2"):
        list(stream.frames([torch.zeros(2, 3, 64, 64)]))


def test_sizes_are_refused_where_that_is_asked(pipes, picture):
    stream = StreamFlow(pipes("sd3"), [2, 3], cfg_type="none", resize=False)
    stream.prepare(PROMPT, num_inference_steps=4)
    with pytest.raises(ValueError, match="an image of 40x30 for a stream of 64x64: resize it, or pass resize=True"):
        stream(picture(0, (40, 30)))
    assert stream(picture(0)).shape == (1, 3, 64, 64)


def test_counts_of_frames_are_checked(stream_of, picture):
    suffering, twin = (stream_of("sd3", [2, 3], frame_buffer_size=2) for _ in range(2))
    one_row = torch.zeros(1, 16, 8, 8)
    bad = {
        lambda s: s.txt2img(3): "batch_size must be a positive multiple of frame_buffer_size 2, not 3",
        lambda s: s.txt2img(0): "not 0",
        lambda s: s.txt2img(-2): "not -2",
        lambda s: s.txt2img(2.0): "not 2.0",
        lambda s: s.txt2img(latents=one_row): "multiple of frame_buffer_size 2, not 1",
        lambda s: s.txt2img(2, latents=one_row): r"latents must be \[2, 16, 8, 8\], not \[1, 16, 8, 8\]",
        lambda s: s.txt2img(latents=torch.zeros(2, 16, 8, 9)): r"not \[2, 16, 8, 9\]",
        lambda s: s.predict_x0_batch(one_row): r"latents must be \[2, 16, 8, 8\], not \[1, 16, 8, 8\]",
        lambda s: s.unet_step(one_row, s.sub_timesteps_tensor): r"latents must be \[4, 16, 8, 8\], not \[1, 16, 8, 8\]",
        lambda s: s(picture(0)): "1 images for a frame buffer of 2",
        lambda s: s.txt2img_sd_turbo(2): r"this stream has 2 stages: make it with t_index_list=\[0\], or call txt2img",
    }
    for call, message in bad.items():
        with pytest.raises(ValueError, match=message):
            call(suffering)
    assert torch.equal(suffering.txt2img(4), twin.txt2img(4))


def test_the_one_step_form_needs_no_number_of_images(stream_of):
    assert stream_of("sd3", [0], frame_buffer_size=2).txt2img_sd_turbo().shape == (2, 3, 64, 64)


def test_frames_needs_an_empty_ring_and_says_how_many_are_in_it(stream_of, picture):
    stream = stream_of("sd3", [1, 2, 3])
    stream.predict_x0_batch(stream.frame_noise(0))
    with pytest.raises(RuntimeError, match=r"1 frames are in flight, copies not counted: flush\(\) or prepare\(\) first"):
        stream.frames([None])
    assert len(stream.flush()) == 1
    assert [frame.id for frame in stream.frames([None])] == [1]
    stream(picture(0))
    with pytest.raises(RuntimeError, match=r"needs an empty ring; .*flush\(\) or prepare\(\) first"):
        stream.frames([None])


class Deferred(RangeChecks):
    """Checks images on the CPU as those on a GPU: by a later call, once their extremes have been copied."""

    class Copied:
        def __init__(self, tensor):
            self.value = lambda: tensor

        def arrived(self):
            return True

    def add(self, what, image, low, high):
        extremes = torch.stack(image.as_subclass(torch.Tensor).aminmax()).float()
        self.pending.append((self.Copied(extremes), low, high, what))


@pytest.mark.parametrize("family", ["sd3", "flux2-klein"])  # whose image is a reference
def test_the_call_after_a_bad_image_on_a_device_raises_and_the_call_with_it_does_not(family):
    stream = StreamFlow(random_pipeline(family), [0, 1], width=64, height=64, cfg_type="none")
    stream.prepare("a", num_inference_steps=2)
    stream._inputs.reader.ranges = Deferred()
    good, bad = torch.rand(3, 64, 64), torch.full((3, 64, 64), 1.5)
    stream(good), stream(bad)
    with pytest.raises(ValueError, match="image of frame 1 run from 1.5 to 1.5"):
        stream(good)
    stream(good), stream(bad)
    with pytest.raises(ValueError, match="image of frame 3 run from 1.5 to 1.5"):
        stream.txt2img()


def test_integers_of_numpy_become_pythons():
    size = {"width": np.int64(64), "height": np.int32(64), "frame_buffer_size": np.int64(1)}
    stream = StreamFlow(random_pipeline("sd3"), [0, 1], cfg_type="none", **size)
    assert json.dumps([stream.width, stream.height, stream.frame_bff_size]) == "[64, 64, 1]"
    stream.prepare("a", num_inference_steps=2)
    stream.update(noise="interpolated", noise_period=np.int64(4))
    assert stream.txt2img().isfinite().all()


def test_arguments_that_are_the_same_object_are_not_compared(monkeypatch):
    monkeypatch.setattr(torch, "equal", None)
    tensor, array = torch.full((2,), NAN), np.full(2, NAN)
    assert same([tensor, {"a": array}], (tensor, {"a": array})) and not same(tensor, array)
    frozen = MappingProxyType({"a": tensor})
    assert same(frozen, {"a": tensor}) and not is_plain(frozen) and is_plain({"a": [1]})
