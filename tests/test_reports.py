"""What people report of libraries like this one, each by its kind: state that an update leaves behind, memory shared with
the caller, image files, arguments that hold arrays, inference mode, rounding, threads, and pipelines without text
encoders."""

from __future__ import annotations

import sys
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import PROMPT, relative_error, slow
from diffusers import FlowMatchEulerDiscreteScheduler
from random_pipelines import random_pipeline, random_tiny_vae

from streamflow import StreamFlow
from streamflow.app.server.images import decode
from streamflow.app.server.messages import BadMessage
from streamflow.image_utils import ImageFileError, as_rgb, open_image
from streamflow.io.folder import read_image
from streamflow.stream.request import is_plain, owned, same

OTHER = "a boat at night"


# -- the similarity filter -----------------------------------------------------------------------------------------

CHANGES = {
    "prompt": lambda s: s.update_prompt(OTHER),
    "prompt of new frames": lambda s: s.update_prompt(OTHER, scope="frame"),
    "guidance": lambda s: s.update(guidance_scale=9.0),
    "seed": lambda s: s.update(seed=11),
    "levels": lambda s: s.update(t_index_list=[1, 3]),
    "cfg_type": lambda s: setattr(s, "cfg_type", "none"),
    "prompt_embeds": lambda s: setattr(s, "prompt_embeds", -s.prompt_embeds),
    "init_noise": lambda s: setattr(s, "init_noise", -s.init_noise),
    "VAE": lambda s: setattr(s, "vae", random_tiny_vae(16)),
    "network": lambda s: setattr(s, "unet", random_pipeline("sd3", 3).transformer),
    "inpainting": lambda s: s.inpaint(mask=torch.eye(64).repeat_interleave(2, 0)[:64]),
    "feedback": lambda s: s.update(feedback=0.4),
}


@pytest.mark.parametrize(("name", "most"), [(name, 10) for name in CHANGES] + [slow(name, float("inf")) for name in CHANGES])
def test_whatever_changes_what_is_drawn_shows_in_as_many_calls_as_there_are_stages(stream_of, picture, name, most):
    options = {"cfg_type": "self", "prepare": {"guidance_scale": 3.0}}
    plain, filtered = (stream_of("sd3", [2, 3], **options) for _ in range(2))
    filtered.enable_similar_image_filter(0.9, most)
    for stream in (plain, filtered):
        for _ in range(6):
            before = stream(picture(1))
        CHANGES[name](stream)
        after = [stream(picture(1)) for _ in range(4)]
        if stream is plain:
            expected, old = after[1], before
    assert not torch.allclose(expected, old, atol=1e-3)
    near = 0.1 if name == "feedback" else 1e-4  # which goes on moving with every frame that is drawn
    assert torch.allclose(after[1], expected, atol=near) and torch.allclose(after[3], after[1], atol=near)


# -- state that is left behind, or spoilt --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt_2"])
def test_a_new_text_drops_what_belonged_to_the_old_one(stream_of, family, name):
    full = name.startswith("negative")
    if full and family == "flux":
        pytest.skip("flux takes a second negative prompt with true guidance only")
    scale = {"guidance_scale": 3.0} if full else {}
    options = {"cfg_type": "full" if full else "none", "prepare": {**scale, name: "something else"}}
    stream, fresh = stream_of(family, **options), stream_of(family, **{**options, "prepare": scale})
    texts = (PROMPT, OTHER) if full else (OTHER, None)
    for one in (stream, fresh):
        one.update_prompt(*texts)
    assert torch.equal(stream.txt2img(), fresh.txt2img())


def test_a_second_prompt_that_is_given_with_the_new_one_holds(stream_of):
    stream, fresh = stream_of("sd3"), stream_of("sd3")
    stream.update_prompt(OTHER, prompt_2="b")
    fresh.prepare(OTHER, prompt_2="b", num_inference_steps=4)
    assert torch.equal(stream.txt2img(), fresh.txt2img())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "sequential"])
def test_one_frame_that_is_not_finite_spoils_no_later_one(pipes, picture, bad, batch):
    pipe = random_pipeline("sd3")
    stream = StreamFlow(pipe, [2, 3], cfg_type="self", feedback=0.3, use_denoising_batch=batch)
    stream.prepare(PROMPT, num_inference_steps=4)
    stream.enable_similar_image_filter(0.0, float("inf"))
    good = stream(picture(0))
    bias = pipe.transformer.proj_out.bias
    kept = bias.detach().clone()
    stream.enable_similar_image_filter(1.0)  # images are kept for calls that skip, and none does
    with torch.no_grad():
        bias.fill_(bad)
        assert not torch.isfinite([stream(picture(k)) for k in range(2)][-1]).all()
        bias.copy_(kept)
    assert torch.isfinite(stream.prev_image_result).all() and good.shape == stream.prev_image_result.shape
    later = [stream(picture(k)) for k in range(6)]
    assert all(torch.isfinite(one).all() for one in later[2:])

    # -- memory shared with the caller --------------------------------------------------------------------------------------


def test_embeddings_are_copied_and_new_values_in_the_same_buffer_act(stream_of):
    pipe = random_pipeline("sd3")
    made = [pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False) for text in (PROMPT, OTHER)]
    stream = stream_of("sd3", [0, 2])
    buffer, pooled = made[0][0].clone(), made[0][2].clone()
    given = {"prompt_embeds": buffer, "pooled_prompt_embeds": pooled}
    stream.prepare(num_inference_steps=4, **given)
    buffer.copy_(made[1][0]), pooled.copy_(made[1][2])
    assert torch.equal(stream.txt2img(), stream_of("sd3", [0, 2]).txt2img())
    stream.update(**given)
    fresh = stream_of("sd3", [0, 2])
    fresh.txt2img(), fresh.update_prompt(OTHER)
    assert torch.equal(stream.txt2img(3), fresh.txt2img(3))
    state = stream._denoiser.state
    stream.update(**given)
    stream.txt2img()
    assert stream._denoiser.state.prompt is state.prompt, "the same values are no change"


def test_embeddings_are_forgotten_once_they_are_not_in_force(stream_of):
    stream = stream_of("sd3", [0, 2])
    embeds = stream.pipe.encode_prompt(OTHER, None, None, do_classifier_free_guidance=False)
    stream.prepare(num_inference_steps=4, prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[2])
    assert len(stream._updates.planner.cache) == 0
    stream.update_prompt(PROMPT)
    stream.txt2img()
    assert is_plain(stream.request.arguments)


def test_a_returned_image_is_the_callers_to_change(stream_of, picture):
    stream, twin = (stream_of("sd3", [2, 3]) for _ in range(2))
    for one in (stream, twin):
        one.enable_similar_image_filter(0.5, 100)
    for _ in range(4):
        out, expected = stream(picture(0)), twin(picture(0)).clone()
        assert torch.equal(out, expected)
        out.mul_(0.5).add_(0.5)
    stream.prepare(PROMPT, num_inference_steps=4)
    twin.prepare(PROMPT, num_inference_steps=4)
    for frame, own in zip(stream.frames([picture(0)] * 4), twin.frames([picture(0)] * 4), strict=True):
        assert torch.equal(frame.image, own.image)
        frame.image.zero_()
    shown = stream.txt2img()
    kept = shown.clone()
    shown.zero_()
    assert torch.equal(stream.prev_image_result, kept)


def test_the_filter_turned_on_again_shows_no_image_of_a_frame_it_has_not_seen(stream_of, picture):
    stream, twin = (stream_of("sd3", [2], cfg_type="none") for _ in range(2))
    for enabled, k in ((True, 0), (False, 1), (True, 0)):
        stream.similar_image_filter = enabled
        stream.similar_filter.set_threshold(0.5)
        assert torch.equal(stream(picture(k)), twin(picture(k)))


def test_a_buffer_that_the_next_image_is_written_into_may_wait_for_its_group(stream_of, picture):
    streams = [stream_of("sd3", [2, 3], frame_buffer_size=2) for _ in range(2)]
    buffer = streams[0].preprocess(picture(0)).clone()

    def reused():
        for k in range(4):
            buffer.copy_(streams[0].preprocess(picture(k)))
            yield buffer

    drawn = [frame.image for frame in streams[0].frames(reused())]
    expected = [frame.image for frame in streams[1].frames(picture(k) for k in range(4))]
    assert all(map(torch.equal, drawn, expected))


def test_a_known_image_may_be_written_into_once_it_is_given(stream_of, picture):
    drawn = []
    for written in (False, True):
        stream = stream_of("sd3", [0, 3])
        known, mask = stream.preprocess(picture(3)).clone(), torch.zeros(64, 64)
        mask[:, :32] = 1
        stream.inpaint(known, mask)
        if written:
            known.zero_(), mask.fill_(1)
        drawn.append(stream.txt2img())
    assert torch.equal(*drawn)


# -- image files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Image files by what is special about them, each a ramp from black at its left to white at its right."""
    ramp = np.linspace(0, 1, 64, dtype=np.float64)[None].repeat(48, 0)
    grey8 = (255 * ramp).round().astype(np.uint8)
    upright = PIL.Image.fromarray(grey8).convert("RGB")
    made = {}

    def save(name, image, **options):
        made[name] = tmp_path / name
        image.save(made[name], **options)

    turned = upright.transpose(PIL.Image.Transpose.ROTATE_90)  # a camera that was held on its side, and says so
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    save("rotated.jpg", turned, exif=exif, quality=95)
    save("rotated.png", turned, exif=exif)
    save("sixteen.png", PIL.Image.fromarray((65535 * ramp).round().astype(np.uint16)))
    save("sixteen.tiff", PIL.Image.fromarray((65535 * ramp).round().astype(np.uint16)))
    save("palette.png", upright.quantize(256))
    save("cmyk.jpg", upright.convert("CMYK"), quality=95)
    save("grey.png", PIL.Image.fromarray(grey8))
    alpha = upright.convert("RGBA")
    alpha.putalpha(PIL.Image.fromarray(255 - grey8))
    black = PIL.Image.new("RGB", upright.size)
    black.putalpha(PIL.Image.fromarray(255 - grey8))  # on white this is the ramp
    save("alpha.png", black)
    save("animated.gif", upright, save_all=True, append_images=[PIL.Image.new("RGB", upright.size, "red")])
    save("animated.webp", upright, save_all=True, append_images=[PIL.Image.new("RGB", upright.size, "red")], lossless=True)
    return made


NAMES = "rotated.jpg rotated.png sixteen.png sixteen.tiff palette.png cmyk.jpg grey.png alpha.png animated.gif".split()
NAMES.append("animated.webp")


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_reads_an_image_file_as_people_see_it(files, name):
    expected = np.linspace(0, 255, 64)[None, :, None].repeat(48, 0).repeat(3, 2)
    near = 12 if name.endswith(".jpg") or name == "animated.gif" else 2
    data = files[name].read_bytes()
    read = {"io": read_image(files[name]), "bytes": np.asarray(as_rgb(open_image(data)))}
    if name.split(".")[1] in ("jpg", "png", "webp"):
        read["server"] = np.asarray(decode(data, 2**20, 64, 48))
    for reader, pixels in read.items():
        assert pixels.shape == (48, 64, 3), reader
        assert np.abs(pixels.astype(float) - expected).max() <= near, reader


@pytest.mark.parametrize("name", ["rotated.jpg", "sixteen.png"])
def test_the_wrapper_reads_them_by_their_path(files, name):
    from streamflow import StreamFlowWrapper

    wrapper = StreamFlowWrapper("embedded", None, device="cpu", warmup=0, acceleration="none", width=64, height=48)
    pixels = (wrapper.preprocess_image(str(files[name])).as_subclass(torch.Tensor)[0, 0] + 1) * 127.5
    assert (pixels.mean(0) - torch.linspace(0, 255, 64)).abs().max() < 12


def test_a_file_that_is_no_image_says_what_is_wrong(files, tmp_path):
    whole = files["grey.png"].read_bytes()
    bad = {"cut.png": whole[: len(whole) // 2], "text.png": b"hello", "empty.png": b""}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        for read in (lambda p: open_image(p), lambda p: read_image(p)):
            with pytest.raises(ImageFileError, match=rf"{name} (is no image in a known format|cannot be read as an image)"):
                read(tmp_path / name)
        with pytest.raises(BadMessage, match="send a whole JPEG, PNG or WebP"):
            decode(data, 2**20, 64, 48)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageFileError, match="grey.png has 64x48 pixels, and at most 1000 are read"):
        open_image(files["grey.png"], max_pixels=1000)
    PIL.Image.new("1", (13500, 13500)).save(tmp_path / "bomb.png")  # Pillow refuses 179 million pixels
    with pytest.raises(ImageFileError, match="bomb"):
        open_image(tmp_path / "bomb.png")


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_arguments_that_hold_arrays_are_compared(stream_of, kind):
    stream = stream_of("sd3", None or range(4), prepare={"sigmas": kind([1.0, 0.7, 0.4, 0.1])})
    stream._updates.defaults["t_index_list"] = None
    stream.prepare(PROMPT, num_inference_steps=4, sigmas=kind([1.0, 0.7, 0.4, 0.1]))
    stream.update(sigmas=kind([1.0, 0.5]))
    stream.txt2img()
    assert stream.denoising_steps_num == 2
    state = stream._denoiser.state
    stream.update(sigmas=kind([1.0, 0.5]))
    stream.txt2img()
    assert stream._denoiser.state.stages is state.stages, "equal values are no change"


def test_equal_is_by_value_and_owned_is_a_copy():
    t, a = torch.arange(3.0), np.arange(3.0)
    assert same({"a": [t, (a, 1)]}, {"a": [t.clone(), (a.copy(), 1)]})
    for one, other in (
        (t, a),
        (t, t.double()),
        (a, a[:2]),
        ([t], [t, t]),
        ({"a": 1}, {"b": 1}),
        (1, True),
        ("1", 1),
        (t, 0),
    ):
        assert not same(one, other) and not same(other, one)
    value = {"a": [t, (a, "x")], "b": 3}
    copied = owned(value)
    t.zero_(), a.fill(0)
    assert copied["a"][0].tolist() == [0, 1, 2] and copied["a"][1][0].tolist() == [0, 1, 2] and copied["b"] == 3


def test_arguments_that_ask_for_what_happens_anyway_are_taken(stream_of):
    expected = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 3.0}).txt2img()
    asked = {"num_images_per_prompt": 1, "negative_prompt": None, "latents": None, "height": 64, "width": 64}
    asked |= {"seed": np.int64(2), "callback_on_step_end": None, "skip_guidance_layers": None, "timesteps": None}
    stream = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 3.0, **asked})
    assert torch.equal(stream.txt2img(), expected)
    stream_of("sana", prepare={"use_resolution_binning": False})
    for arguments, says in (
        ({"num_images_per_prompt": 2}, "num_images_per_prompt cannot be passed on"),
        ({"height": 128}, "height cannot be passed on"),
        ({"callback_on_step_end": print}, r"callback_on_step_end is not passed on .*: on_step\(fn\) calls a function"),
    ):
        with pytest.raises(TypeError, match=says):
            stream_of("sd3", prepare=arguments)


@pytest.mark.parametrize("seed", [-2, 2**64, 2**70])
def test_a_seed_that_no_generator_takes_is_refused(stream_of, seed):
    generator = torch.Generator().manual_seed(3)
    for given in ({"seed": seed}, {"seed": seed, "generator": generator}, {"seed": [(seed, 1.0)]}):
        with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\^64 - 1, or -1 for a random one, not"):
            stream_of("sd3", prepare=given)
    assert generator.initial_seed() == 3
    largest = stream_of("sd3", [2], prepare={"seed": 2**64 - 1, "generator": generator})
    assert torch.isfinite(largest.txt2img()).all()


def test_a_failed_call_uses_up_no_number(stream_of, picture):
    stream, twin = (stream_of("sd3", [1, 2, 3], noise="frame") for _ in range(2))
    velocity, zeros = stream.velocity, torch.zeros(1, 16, 8, 8)

    class Failing(torch.nn.Module):
        def forward(self, *args, **kwargs):
            raise RuntimeError("for a moment")

    drawn = []
    for k in range(4):
        if k == 2:
            stream.velocity = Failing()
            for call in (lambda: stream(picture(9)), lambda: stream.txt2img(), lambda: stream.predict_x0_batch(zeros)):
                with pytest.raises(RuntimeError, match="for a moment"):
                    call()
            stream.velocity = velocity
        drawn.append((stream(picture(k)), twin(picture(k))))
    assert all(torch.equal(*pair) for pair in drawn)


# -- inference mode, rounding, autocast ----------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_type", [slow("none"), slow("full"), "self", slow("initialize")])
def test_inference_mode_inside_outside_and_mixed(pipes, picture, cfg_type):
    def calls(stream, k):
        stream.update(guidance_scale=2.0 + k)
        return [stream(picture(k)), stream.txt2img(), *[frame.image for frame in frames(stream)]]

    def frames(stream):
        stream.flush()
        return list(stream.frames([picture(5), None]))

    drawn = []
    for pattern in ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (1, 0, 1, 0, 1), (0, 1, 0, 1, 0)):
        with torch.inference_mode(bool(pattern[0])):
            stream = StreamFlow(pipes("sd3"), [1, 3], cfg_type=cfg_type, feedback=0.2)
            stream.prepare(PROMPT, num_inference_steps=4)
        outs = []
        for k, inside in enumerate(pattern):
            with torch.inference_mode(bool(inside)):
                outs += calls(stream, k)
        drawn.append(torch.stack([one.clone().reshape(3, 64, 64) for one in outs]))
    assert all(torch.equal(one, drawn[0]) for one in drawn)


def test_a_first_sigma_that_rounding_leaves_above_one_is_one(stream_of):
    refused, above = [], 0
    for shift in np.arange(1.0, 7.0, 0.02):
        for steps in (1, 4, 28):
            scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
            scheduler.set_timesteps(steps)
            above += bool(scheduler.sigmas[0] > 1)
            stream_scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
            try:
                recorded(stream_scheduler, steps)
            except ValueError as error:
                refused.append((shift, steps, str(error)))
    assert above > 3 and not refused
    with pytest.raises(ValueError, match="sigmas must fall strictly from at most 1"):
        stream_of("sd3", prepare={"sigmas": [1.01, 0.7, 0.4, 0.1]})


def recorded(scheduler, steps):
    from streamflow.models.probe import Recording

    scheduler.set_timesteps(steps)
    return Recording((), scheduler).schedule


@pytest.mark.parametrize("shift", [1.32, 1.57, 1.82])
def test_such_a_stream_draws_what_the_pipeline_draws(shift):
    pipe = random_pipeline("sd3", scheduler={"shift": shift})
    stream = StreamFlow(pipe, range(4), cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=4)
    stream.velocity = stream.adapter.row_by_row(False)
    noise = stream.frame_noise(0)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "latent"}
    expected = pipe(PROMPT, latents=noise.clone(), **options).images
    stream.predict_x0_batch(noise)
    assert torch.equal(stream.flush()[0], expected)


@pytest.mark.parametrize("cfg_type", ["none", "full"])
def test_row_by_row_works_under_autocast(stream_of, cfg_type):
    stream = stream_of("sd3", [0, 2], cfg_type=cfg_type, prepare={"guidance_scale": 3.0})
    plain = stream.txt2img()
    stream.reset()
    stream.velocity = stream.adapter.row_by_row(cfg_type == "full")
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(stream.txt2img().float(), plain) < 0.1


# -- several streams of one pipe -----------------------------------------------------------------------------------


def test_streams_of_one_pipe_are_updated_from_several_threads():
    pipe = random_pipeline("sd3")
    other = type(pipe)(**pipe.components)  # which shares the tokenizers
    texts = [f"a {'very ' * k}red fox" for k in range(5)]

    def embeds(stream, text):
        stream._updates.planner.forget_prompts()
        stream.update_prompt(text, max_sequence_length=8 + len(text) % 3)
        return stream._updates.requested().prompt.cond.rows["encoder_hidden_states"]

    def stream(of):
        made = StreamFlow(of, [2, 3], cfg_type="none")
        made.prepare(PROMPT, num_inference_steps=4)
        return made

    expected = {text: embeds(stream(pipe), text) for text in texts}
    streams = [stream(pipe), stream(pipe), stream(other)]
    wrong: list[str] = []

    def go(one):
        for k in range(40):
            text = texts[k % len(texts)]
            try:
                if not torch.equal(embeds(one, text), expected[text]):
                    wrong.append(text)
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=go, args=(one,)) for one in streams]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_weight_alone_runs_no_text_encoder(stream_of, family, monkeypatch):
    stream = stream_of(family)
    stream.txt2img()
    ran = []
    hook = stream.pipe.text_encoder.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        stream.update(guidance_scale=7.0)
        stream.update(num_inference_steps=5)
        stream.txt2img()
        assert not ran
        stream.update_prompt(OTHER)
        assert ran
    finally:
        hook.remove()
    fresh = stream_of(family, prepare={"guidance_scale": 7.0, "num_inference_steps": 5})
    fresh.update_prompt(OTHER)
    stream.reset(), fresh.reset()
    assert torch.equal(stream.txt2img(), fresh.txt2img())


# -- pipelines without text encoders -------------------------------------------------------------------------------


def embeddings(family, pipe) -> dict:
    if family == "auraflow":
        names = "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask"
        made = pipe.encode_prompt("a cat", negative_prompt="a dog")
    elif family == "cogview4":
        names, made = "prompt_embeds negative_prompt_embeds", pipe.encode_prompt("a cat", negative_prompt="a dog")
    elif family == "kandinsky5":
        names = "prompt_embeds_qwen prompt_embeds_clip prompt_cu_seqlens negative_prompt_embeds_qwen"
        names += " negative_prompt_embeds_clip negative_prompt_cu_seqlens"
        made = (*pipe.encode_prompt("a cat"), *pipe.encode_prompt("a dog"))
    elif family == "hunyuan-image":
        names = "prompt_embeds prompt_embeds_mask prompt_embeds_2 prompt_embeds_mask_2"
        names = f"{names} {' '.join(f'negative_{name}' for name in names.split())}"
        made = (*pipe.encode_prompt("a cat"), *pipe.encode_prompt("a dog"))
    else:
        names = "prompt_embeds_t5 negative_prompt_embeds_t5 prompt_embeds_llama3 negative_prompt_embeds_llama3"
        names += " pooled_prompt_embeds negative_pooled_prompt_embeds"
        made = pipe.encode_prompt("a cat", None, None, None, negative_prompt="a dog")
    return dict(zip(names.split(), made, strict=True))


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in ("cogview4", "kandinsky5", "hunyuan-image", "hidream")]


@pytest.mark.parametrize("family", ["auraflow", *SLOW])
def test_a_pipeline_without_text_encoders_draws_from_embeddings(family):
    pipe = random_pipeline(family)
    whole = StreamFlow(pipe, width=64, height=64, cfg_type="full")
    whole.prepare("a cat", "a dog", num_inference_steps=2)
    expected = whole.txt2img()
    given = embeddings(family, pipe)
    for name in list(pipe.components):
        if name.startswith(("text_encoder", "tokenizer")):
            setattr(pipe, name, None)
    stream = StreamFlow(pipe, width=64, height=64, cfg_type="full")
    with pytest.raises(
        ValueError, match=f"{type(pipe).__name__} cannot encode a prompt without .*text_encoder.*: put that back"
    ):
        stream.prepare("a cat", num_inference_steps=2)
    stream.prepare(num_inference_steps=2, **given)
    assert torch.equal(stream.txt2img(), expected)
    with pytest.raises(ValueError, match="cannot encode a prompt without"):
        stream.update_prompt("a dog", scope="frame")
    assert torch.isfinite(stream.txt2img()).all()


def test_an_adapters_pipeline_without_text_encoders_says_so():
    pipe = random_pipeline("sd3")
    stream = StreamFlow(pipe, range(2), cfg_type="none")
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.raises(ValueError, match="cannot encode a prompt without text_encoder and .*tokenizer.*prompt_embeds"):
        stream.prepare(PROMPT, num_inference_steps=2)
