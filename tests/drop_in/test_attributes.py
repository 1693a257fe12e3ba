"""The attribute table: every public attribute of StreamDiffusion and of StreamDiffusionWrapper can be read, and assigning it
acts at the next call or raises AttributeError with the call that does it."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap

import diffusers
import pytest
import torch
from conftest import PROMPT, edit_prompt, slow
from diffusers import FlowMatchEulerDiscreteScheduler
from drop_in_helpers import FOX, OwnWrapper, image_of, wrapped
from random_pipelines import MAKERS, random_pipeline, random_tiny_vae
from streamdiffusion import StreamDiffusion

from streamflow import StreamFlow, StreamFlowWrapper, models, wrapper
from streamflow.image_filter import SimilarImageFilter
from streamflow.stream import attributes

OTHER = "a boat at night"


def assigned_in(cls: type) -> set[str]:
    """The public attributes that a class assigns on itself, read off its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    names = {node.attr for node in assigned if isinstance(node.value, ast.Name) and node.value.id == "self"}
    return {name for name in names if not name.startswith("_")}


STREAM = assigned_in(StreamDiffusion)
# What StreamDiffusionWrapper, which no package ships, assigns on itself.
WRAPPER = (
    "sd_turbo device dtype width height mode output_type frame_buffer_size batch_size use_denoising_batch "
    "use_safety_checker stream safety_checker feature_extractor nsfw_fallback_img"
).split()


def another_network(stream) -> torch.nn.Module:
    return random_pipeline("sd3", seed=1).transformer


# Assigned on a stream of image frames under `cfg_type="self"`, these change what is drawn.
ACTING = {
    "cfg_type": lambda s: "none",
    "delta": lambda s: 0.2,
    "denoising_steps_num": None,
    "do_add_noise": lambda s: True,
    "generator": lambda s: torch.Generator().manual_seed(9),
    "guidance_scale": lambda s: 6.0,
    "init_noise": lambda s: -s.init_noise,
    "prompt_embeds": lambda s: -s.prompt_embeds,
    "scheduler": lambda s: FlowMatchEulerDiscreteScheduler(shift=9.0),
    "seed": lambda s: 11,
    "stock_noise": lambda s: -3.0 * s.stock_noise,
    "t_index_list": lambda s: [1, 3],
    "t_list": lambda s: [1, 3],
    "unet": another_network,
    "vae": lambda s: random_tiny_vae(16),
    "x_t_latent_buffer": lambda s: -s.x_t_latent_buffer,
}
# These act on something else than the pixels; each has a test below.
ELSEWHERE = {"use_denoising_batch", "similar_image_filter", "similar_filter", "prev_image_result", "inference_time_ema"}
REFUSED = {name for name in STREAM if name in attributes.READ_ONLY}


def image_stream(stream_of, **options):
    options = {"cfg_type": "self", "prepare": {"guidance_scale": 4.0}, **options}
    return stream_of("sd3", [1, 2, 3], **options)


@pytest.fixture(scope="module")
def unchanged(pipes):
    """A stream that its tests do not change."""
    stream = StreamFlow(pipes("sd3"), [1, 2, 3], cfg_type="self")
    stream.prepare(PROMPT, num_inference_steps=4, guidance_scale=4.0)
    return stream


def test_no_attribute_is_left_out():
    assert set(wrapper.READ_ONLY).isdisjoint({"mode", "output_type", "stream"})
    assert {*ACTING, *ELSEWHERE, *REFUSED} >= STREAM
    assert ELSEWHERE.isdisjoint(attributes.READ_ONLY)


@pytest.mark.parametrize("name", sorted(STREAM))
def test_every_attribute_of_the_class_can_be_read(unchanged, name):
    if name in ("c_skip", "c_out"):
        with pytest.raises(AttributeError, match="LCM's boundary condition"):
            getattr(unchanged, name)
    else:
        getattr(unchanged, name)


@pytest.mark.parametrize("name", sorted(STREAM))
def test_before_prepare_an_attribute_is_there_or_it_is_not(pipes, name):
    """`hasattr` and `getattr` with a default do not fail on what only `prepare` makes."""
    stream = StreamFlow(pipes("sd3"), [0, 2])
    there = hasattr(stream, name)
    assert there == (name in vars(StreamDiffusion(attribute_view(stream), [0, 2])))


def attribute_view(stream):
    """What StreamDiffusion's constructor looks at."""
    from streamflow.models.pipe_parts import base_view

    return base_view(stream.pipe, stream.unet, 8)


def nine_images(stream, assign=lambda stream: None):
    """What nine images become, of which the last five come in after `assign`: these five."""
    for k in range(4):
        stream(image_of(k, (64, 64)))
    assign(stream)
    return [stream(image_of(k, (64, 64))) for k in range(4, 9)]


@pytest.fixture(scope="module")
def without_assigning(unchanged):
    drawn = nine_images(unchanged)
    unchanged.prepare(PROMPT, num_inference_steps=4, guidance_scale=4.0)
    return drawn


@pytest.mark.parametrize("name", sorted(name for name, change in ACTING.items() if change))
def test_assigning_acts_at_the_next_call(stream_of, without_assigning, name):
    after = nine_images(image_stream(stream_of), lambda stream: setattr(stream, name, ACTING[name](stream)))
    before = without_assigning
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(one).all() for one in after)


@pytest.mark.parametrize("name", sorted(attributes.READ_ONLY))
def test_assigning_what_cannot_act_says_what_can(unchanged, name):
    with pytest.raises(AttributeError, match=f"{name} of a StreamFlow cannot be assigned: .*(call|make|assign|pipe.to)"):
        setattr(unchanged, name, 3)


REMEDIES = ("num_inference_steps", "strength", "negative_prompt", "noise", "feedback", "prompt")


@pytest.mark.parametrize("name", REMEDIES)
def test_the_remedy_is_a_call_that_there_is(stream_of, name):
    value = {"num_inference_steps": 5, "strength": 0.5, "noise": "frame", "feedback": 0.1}.get(name, OTHER)
    stream = stream_of("sd3", [1, 2, 3], cfg_type="full")
    with pytest.raises(AttributeError, match=rf"call update\({name}=...\)"):
        setattr(stream, name, value)
    stream.update(**{name: value})
    stream.txt2img()
    assert getattr(stream.request, name) == value


# -- what each assignment comes to ------------------------------------------------------------------------------------------


def row_by_row(stream, count: int, between) -> torch.Tensor:
    """Clean latents of `count` rows of the stream's noise, `between(k)` called before row k enters."""
    done = []
    for k in range(count):
        between(k)
        done.append(stream.predict_x0_batch(stream.frame_noise(k)))
    return torch.cat([one for one in done if one is not None] + stream.flush())


@pytest.mark.parametrize("batch", [True, slow(False)], ids=["batch", "sequential"])
@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("cfg_type", "full", {"cfg_type": "full"}),
        ("do_add_noise", True, {"do_add_noise": True}),
        ("t_list", [0, 3], {"t_index_list": [0, 3]}),
        ("t_index_list", [2, 0], {"t_index_list": [0, 2]}),
    ],
)
def test_frames_under_way_finish_first(stream_of, name, value, option, batch):
    """Frames 0 to 2 are drawn as before, later ones as by a stream that was made so."""
    prepare = {"guidance_scale": 4.0, "negative_prompt": "blurry"}
    options = {"t_index_list": [0, 1, 2], "cfg_type": "none", "use_denoising_batch": batch, "prepare": prepare}
    stream, plain = (stream_of("sd3", **options) for _ in range(2))
    other = stream_of("sd3", **{**options, **option})
    drawn = row_by_row(stream, 6, lambda k: k == 3 and setattr(stream, name, value))
    before, after = (row_by_row(one, 6, lambda k: None) for one in (plain, other))
    assert torch.allclose(drawn[:3], before[:3], atol=1e-5) and torch.allclose(drawn[3:], after[3:], atol=1e-5)
    assert not torch.allclose(drawn[3:], before[3:], atol=1e-3)
    stream.prepare(PROMPT, num_inference_steps=4, **prepare)
    assert torch.allclose(row_by_row(stream, 4, lambda k: None), after[:4], atol=1e-5), "prepare keeps it"
    assert (stream.batch_size, stream.trt_unet_batch_size) == (other.batch_size, other.trt_unet_batch_size)


def test_what_is_assigned_before_prepare_counts(pipes, stream_of):
    stream = StreamFlow(pipes("sd3"), [0, 1, 2], cfg_type="none")
    stream.cfg_type, stream.do_add_noise, stream.t_list, stream.use_denoising_batch = "full", True, [1, 3], False
    assert (stream.cfg_type, stream.do_add_noise, stream.t_list) == ("full", True, [1, 3])
    assert (stream.denoising_steps_num, stream.batch_size, stream.trt_unet_batch_size) == (2, 1, 2)
    stream.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    stream.prepare(PROMPT, num_inference_steps=4, guidance_scale=3.0)
    options = {"cfg_type": "full", "do_add_noise": True, "use_denoising_batch": False}
    changes = {"scheduler": {"shift": 5.0}}
    other = stream_of("sd3", [1, 3], changes=changes, prepare={"guidance_scale": 3.0}, **options)
    assert torch.equal(stream.txt2img(2), other.txt2img(2))
    with pytest.raises(AttributeError, match=r"generator is set by prepare\(prompt, generator=...\)"):
        StreamFlow(pipes("sd3"), [0]).generator = torch.Generator()


def test_a_bad_value_changes_nothing(stream_of):
    suffering, twin = (stream_of("sd3", [0, 1, 3], cfg_type="self") for _ in range(2))
    bad = {
        "cfg_type": "cfg",
        "do_add_noise": 1,
        "t_list": [0, 0],
        "t_index_list": [9],
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0).config,
        "generator": 3,
        "prompt_embeds": torch.zeros(1, 3),
        "init_noise": torch.zeros(1, 2),
        "stock_noise": torch.zeros(1),
        "x_t_latent_buffer": torch.zeros(1),
        "seed": "a",
        "unet": None,
        "vae": None,
        "use_denoising_batch": 1,
    }
    for stream in (suffering, twin):
        stream.predict_x0_batch(stream.frame_noise(0))
    for name, value in bad.items():
        with pytest.raises((ValueError, TypeError, AttributeError)) as raised:
            setattr(suffering, name, value)
        assert len(str(raised.value)) > 20, name
    assert torch.equal(suffering.txt2img(), twin.txt2img())
    for name in bad:
        if name not in ("x_t_latent_buffer", "stock_noise", "unet", "vae", "scheduler"):
            assert repr(getattr(suffering, name)) == repr(getattr(twin, name)), name


def test_an_assigned_scheduler_is_followed_and_the_pipes_left(stream_of, pipes):
    stream, other = stream_of("sd3"), stream_of("sd3", changes={"scheduler": {"shift": 8.0}})
    own = stream.pipe.scheduler
    stream.scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    assert torch.equal(stream.txt2img(), other.txt2img()) and torch.equal(stream.timesteps, other.timesteps)
    stream.prepare(PROMPT, num_inference_steps=4)
    other.prepare(PROMPT, num_inference_steps=4)
    assert torch.equal(stream.txt2img(), other.txt2img()), "prepare keeps it"
    assert stream.pipe.scheduler is own
    stream.scheduler.set_shift(2.0)
    stream.prepare(PROMPT, num_inference_steps=4)
    assert not torch.equal(stream.timesteps, other.timesteps), "what is set on it acts at the next prepare"


@pytest.mark.parametrize("cfg_type", ["none", "full", "self", "initialize"])
def test_prompt_embeds_has_the_negative_half_first(stream_of, cfg_type):
    S, F = 3, 2
    prepare = {"negative_prompt": "blurry", "guidance_scale": 3.0}
    stream = stream_of("sd3", [0, 1, 3], frame_buffer_size=F, cfg_type=cfg_type, prepare=prepare)
    positive, negative = (
        stream.pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False)[0] for text in (PROMPT, "blurry")
    )
    negatives = {"none": 0, "full": S * F, "self": 0, "initialize": F}[cfg_type]
    expected = torch.cat((negative.expand(negatives, -1, -1), positive.expand(S * F, -1, -1)))
    assert torch.equal(stream.prompt_embeds, expected)


@pytest.mark.parametrize("cfg_type", ["none", "full", "initialize"])
def test_assigned_prompt_embeds_are_those_of_all_rows(stream_of, cfg_type):
    options = {"t_index_list": [0, 1, 3], "cfg_type": cfg_type, "prepare": {"guidance_scale": 3.0}}
    stream, reference = (stream_of("sd3", **options) for _ in range(2))
    for one in (stream, reference):
        one.predict_x0_batch(one.frame_noise(0))
    wanted = -0.5 * stream.prompt_embeds
    stream.prompt_embeds *= -0.5
    assert torch.equal(stream.prompt_embeds, wanted)
    prompt = reference._denoiser.state.prompt
    pairs = (("", prompt.cond), ("negative_", prompt.uncond))
    embeds = {f"{sign}prompt_embeds": -0.5 * one.rows["encoder_hidden_states"] for sign, one in pairs if one}
    pooled = {f"{sign}pooled_prompt_embeds": one.rows["pooled_projections"] for sign, one in pairs if one}
    reference.update(**embeds, **pooled)
    assert torch.equal(stream.txt2img(3), reference.txt2img(3))
    stream.update(guidance_scale=2.0, num_inference_steps=5)
    assert torch.equal(stream.prompt_embeds, wanted), "it stays"
    stream.update_prompt(OTHER, "dark")
    reference.update_prompt(OTHER, "dark")
    reference.update(guidance_scale=2.0, num_inference_steps=5)
    assert torch.equal(stream.txt2img(4)[3:], reference.txt2img(4)[3:]), "until there is another prompt"


def test_prompt_embeds_take_one_prompt_of_any_length(stream_of):
    stream = stream_of("sd3", [0, 2])
    stream.prompt_embeds = stream.prompt_embeds[:1, :50]
    stream.txt2img()
    assert stream.prompt_embeds.shape == (2, 50, 64)
    with pytest.raises(ValueError, match="the rows of prompt_embeds differ"):
        stream.prompt_embeds = torch.arange(2.0).reshape(2, 1, 1).expand(2, 50, 64)
    with pytest.raises(ValueError, match=r"prompt_embeds is a tensor \[2, tokens, width\] or \[1, tokens, width\]"):
        stream.prompt_embeds = torch.zeros(3, 50, 64)
    given = torch.zeros(1, 50, 64)
    stream.prompt_embeds = given
    given += 1
    assert not stream.prompt_embeds.any(), "the caller's tensor stays the caller's"


QUICK = ("sd3", "flux", "instaflow", "fallback")
NEEDS_AN_IMAGE = {"qwenimage-edit", "qwenimage-edit-plus"}  # and its embeddings are of that image
STREAMED = sorted((set(models.FAMILIES) & set(MAKERS)) - NEEDS_AN_IMAGE)


@pytest.mark.parametrize("family", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in STREAMED])
def test_the_embeddings_of_every_family_can_be_read_and_assigned(pipes, family):
    options = {"family": family} if family != "schnell" else {}
    stream = StreamFlow(pipes(family), None, cfg_type="none", **options)
    prompt = edit_prompt(PROMPT) if family == "bria-fibo-edit" else PROMPT
    stream.prepare(prompt, num_inference_steps=2 if family == "sana-sprint" else 4)
    if not stream.adapter.embeds:
        with pytest.raises(AttributeError, match="keeps its embeddings to itself"):
            stream.prompt_embeds  # noqa: B018
        return
    before = stream.txt2img()
    stream.reset()
    stream.prompt_embeds = stream.prompt_embeds
    assert torch.equal(stream.txt2img(), before)
    stream.reset()
    stream.prompt_embeds = -stream.prompt_embeds
    assert not torch.equal(stream.txt2img(), before)


def test_image_frames_share_the_noise_that_is_assigned(stream_of, picture):
    stream, other = image_stream(stream_of), image_stream(stream_of, prepare={"guidance_scale": 4.0, "seed": 5})
    stream.init_noise = other.init_noise
    assert torch.equal(stream.init_noise, other.init_noise)
    assert torch.equal(stream(picture(0)), other(picture(0)))
    stream.init_noise *= 0.5
    assert torch.equal(stream.init_noise, other.init_noise * 0.5)
    moving = image_stream(stream_of, noise="frame")
    with pytest.raises(AttributeError, match=r"share no noise under noise='frame': update\(noise='fixed'\)"):
        moving.init_noise = moving.init_noise


def test_residual_noise_that_is_assigned_is_what_the_next_step_takes(stream_of, picture):
    stream = image_stream(stream_of)
    for k in range(3):
        stream(picture(k))
    stream.stock_noise *= 0.5
    halved = stream.stock_noise
    going_on = stream.batch_size - stream.frame_bff_size
    step = stream._denoiser.engine
    anchor, sigma = step.anchors.x0[:going_on], step.rows.sigma_next[:going_on]
    rebuilt = (1 - sigma) * anchor + sigma * halved[:going_on]
    assert torch.allclose(rebuilt, stream.x_t_latent_buffer.float(), atol=1e-5)
    with pytest.raises(AttributeError, match="no frame in flight has a residual noise .*delta="):
        other = stream_of("sd3")
        other.stock_noise = other.stock_noise + 1
    other.stock_noise *= 0.5  # of zeros, as after every prepare


def test_latents_under_way_are_replaced_or_dropped(stream_of, picture):
    stream, other = (image_stream(stream_of, cfg_type="none") for _ in range(2))
    for one, first in ((stream, 0), (other, 5)):
        for k in range(3):
            one(picture(first + k))
    stream.x_t_latent_buffer = other.x_t_latent_buffer
    for k in range(2):
        assert torch.equal(stream(picture(8 + k)), other(picture(8 + k)))
    stream.x_t_latent_buffer = None
    fresh = image_stream(stream_of, cfg_type="none")
    assert torch.equal(stream(picture(1)), fresh(picture(1)))
    empty = image_stream(stream_of)
    with pytest.raises(AttributeError, match="no frame is in flight, so there are no latents to replace"):
        empty.x_t_latent_buffer = torch.zeros_like(empty.x_t_latent_buffer)
    single = stream_of("sd3", [2])
    assert single.x_t_latent_buffer is None
    with pytest.raises(ValueError, match="None, there are no rows in flight"):
        single.x_t_latent_buffer = torch.zeros(1, 16, 8, 8)


def test_what_is_read_is_the_callers_to_change(stream_of, picture):
    stream, twin = (image_stream(stream_of) for _ in range(2))
    for one in (stream, twin):
        one(picture(0))
    for name in ("prompt_embeds", "init_noise", "stock_noise", "x_t_latent_buffer", "timesteps", "sub_timesteps_tensor"):
        getattr(stream, name).zero_()
    assert torch.equal(stream(picture(1)), twin(picture(1)))


def test_a_generator_that_is_assigned_draws_from_then_on(stream_of):
    stream = stream_of("sd3", [2])
    stream.generator = torch.Generator().manual_seed(4)
    drawn = stream.txt2img()
    other = stream_of("sd3", [2], prepare={"generator": torch.Generator().manual_seed(4)})
    assert torch.equal(drawn, other.txt2img()) and stream.generator is not None
    stream.generator = None
    assert torch.equal(stream.txt2img(), (same := stream_of("sd3", [2])).txt2img(2)[1:]) and same.generator is None


def test_a_generator_and_a_seed_are_taken_together(stream_of):
    generator = torch.Generator().manual_seed(1)
    stream = stream_of("sd3", [2], prepare={"generator": generator, "seed": 7})
    first = stream.txt2img()
    stream.prepare(PROMPT, num_inference_steps=4, generator=generator, seed=7)
    assert torch.equal(stream.txt2img(), first)
    other = stream_of("sd3", [2], prepare={"generator": torch.Generator().manual_seed(7)})
    assert torch.equal(other.txt2img(), first)
    state = generator.get_state()
    with pytest.raises(ValueError, match="num_inference_steps"):
        stream.prepare(PROMPT, num_inference_steps=0, generator=generator, seed=7)
    assert torch.equal(generator.get_state(), state), "a failed prepare seeds nothing"


def test_a_negative_seed_is_a_random_one(stream_of, caplog):
    stream = stream_of("sd3", [2], prepare={"seed": -1})
    seed = stream.seed
    assert 0 <= seed < 1_000_000 and f"seed -1 stands for a random one: seed={seed} draws the same images" in caplog.text
    assert torch.equal(stream.txt2img(), stream_of("sd3", [2], prepare={"seed": seed}).txt2img())
    seeds = set()
    for _ in range(8):
        stream.update(seed=-1)
        stream.txt2img()
        seeds.add(stream.seed)
    assert len(seeds) > 4
    generator = torch.Generator()
    stream.prepare(PROMPT, num_inference_steps=4, generator=generator, seed=-1)
    assert 0 <= generator.initial_seed() < 1_000_000


def test_the_rest_acts(stream_of, picture):
    stream = image_stream(stream_of)
    assert stream.use_denoising_batch is True
    stream.use_denoising_batch = False
    assert stream.batch_size == 1 and stream(picture(0)).shape == (1, 3, 64, 64)
    stream.use_denoising_batch = True
    first = [stream(picture(k)) for k in range(2)][0]
    with pytest.raises(RuntimeError, match="frames are in flight: flush"):
        stream.use_denoising_batch = False
    stream.similar_filter = SimilarImageFilter(0.0, 5)
    stream.similar_image_filter = True
    stream(picture(0))
    stream.prev_image_result = shown = torch.zeros_like(first)
    assert torch.equal(stream(picture(0)), shown), "what a skipped call shows"
    stream.inference_time_ema = 3.0
    assert stream.inference_time_ema == 3.0


# -- parts of the pipe ------------------------------------------------------------------------------------------------------


def sd3(seed: int = 0, kind: str = "StableDiffusion3Pipeline", **changes):
    return getattr(diffusers, kind)(**random_pipeline("sd3", seed, **changes).components)


KINDS = pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"])


def prepared(pipe, **options):
    stream = StreamFlow(pipe, [0, 2], width=64, height=64, **{"cfg_type": "none", **options})
    stream.prepare(PROMPT, num_inference_steps=4)
    return stream


@KINDS
@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "text_encoder"])
def test_a_part_of_the_pipe_that_is_replaced_is_taken_over(kind, part):
    pipe, other = sd3(kind=kind), sd3(1, kind=kind)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    stream = prepared(pipe)
    before = stream.txt2img()
    setattr(pipe, part, getattr(other, part))
    stream.prepare(PROMPT, num_inference_steps=4)
    after = stream.txt2img()
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, prepared(pipe).txt2img())


@KINDS
def test_a_subclass_encodes_its_own_prompts(kind):
    class Louder(getattr(diffusers, kind)):
        def encode_prompt(self, prompt, *args, **kwargs):
            return super().encode_prompt(f"{prompt}!!!", *args, **kwargs)

    mine = prepared(Louder(**random_pipeline("sd3").components))
    other = prepared(sd3())
    other.prepare(f"{PROMPT}!!!", num_inference_steps=4)
    assert torch.equal(mine.txt2img(), other.txt2img())


def test_the_scheduler_of_the_pipe_may_be_set_in_place():
    pipe = sd3()
    stream = prepared(pipe)
    pipe.scheduler.set_shift(6.0)
    stream.prepare(PROMPT, num_inference_steps=4)
    expected = copy.deepcopy(pipe.scheduler)
    expected.set_timesteps(4)
    assert torch.equal(stream.timesteps, expected.timesteps)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda pipe: pipe.to(torch.bfloat16), "moved, pipe.to.*, from torch.float32 on cpu to torch.bfloat16 on cpu"),
        (lambda pipe: setattr(pipe, "vae", None), "None is none: assign the pipe's own, or use_tiny_vae"),
        (lambda pipe: setattr(pipe, "transformer", None), "has no transformer: assign pipe.transformer first"),
        (lambda pipe: setattr(pipe, "transformer", small()), r"with latents \[8, 8, 8\], and this stream's are \[16"),
        (lambda pipe: setattr(pipe, "vae", random_tiny_vae(4)), "has 4 latent channels, the network draws 16"),
        (lambda pipe: offloaded(pipe), "are offloaded, so a stream would move them at every frame"),
    ],
    ids=["moved", "no VAE", "no network", "other latents", "other VAE", "offload"],
)
def test_what_cannot_be_taken_over_is_refused_and_nothing_changes(change, says):
    pipe = sd3()
    stream, twin = prepared(pipe), prepared(pipe)
    parts = dict(pipe.components)
    change(pipe)
    with pytest.raises(ValueError, match=says):
        stream.prepare(OTHER, num_inference_steps=3)
    undo(pipe, parts)
    assert torch.equal(stream.txt2img(), twin.txt2img())
    stream.prepare(PROMPT, num_inference_steps=4)


def small():
    return random_pipeline("sd3", in_channels=8).transformer


def offloaded(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, torch.device("cpu"))


def undo(pipe, parts):
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(parts["transformer"], recurse=True)
    for name, part in parts.items():
        setattr(pipe, name, part)
    pipe.to(torch.float32)


CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "mag": lambda: diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4),
    "taylor": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, max_order=1, disable_cache_before_step=1),
    "faster": lambda: diffusers.FasterCacheConfig(),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_of_the_step_before_is_refused_wherever_it_comes_in(cache):
    pipe = random_pipeline("schnell")
    stream, twin = prepared(pipe), prepared(pipe)
    pipe.transformer.enable_cache(CACHES[cache]())
    calls = (
        lambda: stream.prepare(PROMPT, num_inference_steps=4),
        lambda: setattr(stream, "unet", pipe.transformer),
        lambda: prepared(pipe),
        lambda: prepared(pipe, family="fallback", cfg_type="full"),
    )
    for call in calls:
        with pytest.raises(ValueError, match="FluxTransformer2DModel has a cache .enable_cache. .*call its disable_cache"):
            call()
    pipe.transformer.disable_cache()
    stream.prepare(PROMPT, num_inference_steps=4)
    assert torch.equal(stream.txt2img(), twin.txt2img())


def test_a_vae_of_the_streams_own_outlives_the_pipes(tmp_path):
    pipe = sd3()
    stream = prepared(pipe)
    stream.vae = tiny = random_tiny_vae(16)
    pipe.vae = None
    stream.prepare(PROMPT, num_inference_steps=4)
    assert stream.vae is tiny and stream.txt2img().shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="None is none"):
        prepared(pipe)


def compiled(network):
    return torch.compile(network, backend="eager")


def with_peft(network):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(network, LoraConfig(target_modules=["to_q"], init_lora_weights=False))


SLOW = pytest.mark.slow
WRAPPED = [
    pytest.param("sd3", compiled, id="sd3 compiled", marks=SLOW),
    pytest.param("sd3", with_peft, id="sd3 peft"),
    pytest.param("sd3", lambda network: compiled(with_peft(network)), id="sd3 both", marks=SLOW),
    *(pytest.param(family, compiled, id=f"{family} compiled", marks=SLOW) for family in ("flux", "sana", "qwenimage")),
    *(pytest.param(family, with_peft, id=f"{family} peft", marks=SLOW) for family in ("flux", "sana", "zimage")),
]


@pytest.mark.parametrize(("family", "change"), WRAPPED)
def test_a_wrapped_network_draws_what_the_pipeline_draws(family, change):
    pipe = random_pipeline(family)
    pipe.transformer = change(pipe.transformer)
    stream = StreamFlow(pipe, range(3), width=64, height=64, cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=3)
    noise = stream.frame_noise(0)
    own = {"sana": {"use_resolution_binning": False}, "zimage": {"guidance_scale": 0.0}, "flux": {"guidance_scale": 3.5}}
    own |= {"qwenimage": {"true_cfg_scale": 1.0}}
    sizes = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}
    expected = pipe(PROMPT, latents=noise.clone(), **{"guidance_scale": 1.0, **sizes, **own.get(family, {})}).images
    if family == "zimage":
        expected = expected.reshape(noise.shape)
    assert torch.allclose(stream.txt2img(), stream.decode_image(expected), atol=1e-4)


def test_a_network_that_hides_its_arguments_is_refused_by_name():
    class Hiding(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.inner, self.config, self.dtype, self.device = network, network.config, network.dtype, network.device

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    pipe = sd3()
    pipe.transformer = Hiding(pipe.transformer)
    with pytest.raises(TypeError, match="Hiding hides the arguments of its network, of which 'hidden_states' is one"):
        prepared(pipe)


# -- the wrapper ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    return wrapped(StreamFlowWrapper, [32, 45], warmup=0)


def test_the_list_is_what_a_wrapper_of_that_kind_assigns():
    assert assigned_in(OwnWrapper) <= set(WRAPPER)


def test_every_attribute_of_the_wrapper_can_be_read(made):
    values = {name: getattr(made, name, "absent") for name in WRAPPER}
    sizes = {"width": 128, "height": 128, "frame_buffer_size": 1, "batch_size": 2}
    kinds = {"device": "cpu", "dtype": torch.float32, "mode": "img2img", "output_type": "pil", "sd_turbo": False}
    flags = {"use_denoising_batch": True, "use_safety_checker": False}
    only_with_a_checker = dict.fromkeys(("safety_checker", "feature_extractor", "nsfw_fallback_img"), "absent")
    assert values == {**sizes, **kinds, **flags, **only_with_a_checker, "stream": made.stream}


@pytest.mark.parametrize("name", sorted(wrapper.READ_ONLY))
def test_assigning_what_cannot_act_on_the_wrapper_says_what_can(made, name):
    with pytest.raises(AttributeError, match=f"{name} of a StreamFlowWrapper cannot be assigned: "):
        setattr(made, name, 3)


def test_assigning_to_the_wrapper_acts():
    one = wrapped(StreamFlowWrapper, [32, 45], warmup=0)
    assert one(image_of()).size == (128, 128)
    one.output_type = "np"
    assert one(image_of()).shape == (128, 128, 3)
    one.stream.reset()
    one.mode, one.use_denoising_batch, one.seed = "txt2img", False, 7
    assert one().shape == (128, 128, 3) and one.batch_size == 1 and one.stream.seed == 7
    one.prepare(FOX)
    assert one.stream.seed == 7
    other = wrapped(StreamFlowWrapper, [32, 45], warmup=0)
    one.stream = other.stream
    assert one.batch_size == 2
    for name, value, says in (("mode", "video", "unknown mode"), ("output_type", "jpg", "unknown output_type")):
        with pytest.raises(ValueError, match=says):
            setattr(one, name, value)
    assert (one.mode, one.output_type) == ("txt2img", "np")


def test_the_name_says_whether_it_is_a_turbo_model(made, tmp_path):
    from streamflow.pretrained import embedded

    (tmp_path / "a-turbo-model").symlink_to(embedded())
    there = {"device": "cpu", "warmup": 0, "acceleration": "none"}
    turbo = StreamFlowWrapper(str(tmp_path / "a-turbo-model"), [0], mode="txt2img", cfg_type="none", **there)
    assert turbo.sd_turbo and not made.sd_turbo
    assert turbo().size == (128, 128)
