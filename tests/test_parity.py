"""A stream draws what the pipeline's own `__call__` draws, from the same noise and prompt.

With the network called frame by frame, in the pipeline's own shapes, the results are the same bits in every dtype. With
one call for the whole batch they differ by what a batch does to rounding, which is measured on the pipeline itself.
"""

import pytest
import torch
from conftest import PROMPT, noises, relative_error, slow, streamed

HALF_PLAIN = ("sd3-guided", "flux-dev")  # bfloat16 in the plain suite; the others have it in the slow one
LONG = ("sd3-default-guidance", "flux-true-cfg-default")  # all of it in the slow suite
FRAMES = 6
SHORT = {"max_sequence_length": 48}  # by default 256 or 512 tokens, nearly all padding, beside the 16 of a small image

# name: family, cfg_type, prepare's and the pipeline's arguments, changes of the random pipeline. Texts are short but in the
# two "-default" cases, which have the pipeline's own length.
CASES = {
    "sd3": ("sd3", "none", {}, {"guidance_scale": 1.0}, {}),
    "sd3-guided": ("sd3", "full", {"guidance_scale": 4.0, "negative_prompt": "blurry"}, None, {}),
    "sd3-default-guidance": ("sd3", "full", {}, {}, {}),
    "sd3-guidance-off": ("sd3", "full", {"guidance_scale": 0.5}, None, {}),
    "sd3-dynamic": ("sd3", "none", {}, {"guidance_scale": 1.0}, {"scheduler": {"use_dynamic_shifting": True}}),
    "flux-dev": ("flux", "none", {"guidance_scale": 2.5}, None, {}),
    "flux-schnell": ("schnell", "none", {}, None, {}),
    "flux-true-cfg": ("flux", "full", {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}, None, {}),
    "flux-true-cfg-default": ("flux", "full", {"negative_prompt": ""}, None, {}),
}


def _length(case):
    return {} if "-default" in case else SHORT


def prepared(case, stream_of, steps, dtype=torch.float32, **options):
    family, cfg_type, prepare, _, changes = CASES[case]
    arguments = {"num_inference_steps": steps, **_length(case), **prepare}
    return stream_of(family, range(steps), dtype=dtype, cfg_type=cfg_type, prepare=arguments, changes=changes, **options)


def pipelines_own(case, pipe, latents, steps, batch=1):
    _, _, prepare, call, _ = CASES[case]
    arguments = {"num_inference_steps": steps, **_length(case), **(prepare if call is None else call)}
    return torch.cat(
        [
            pipe(
                [PROMPT] * len(x), **_batched(arguments, len(x)), height=64, width=64, latents=x, output_type="latent"
            ).images
            for x in latents.split(batch)
        ]
    )


def _batched(arguments, n):
    if "negative_prompt" in arguments:
        return {**arguments, "negative_prompt": [arguments["negative_prompt"]] * n}
    return arguments


def _in_dtypes():
    """Every case in every dtype: float32 but for `LONG`, and `HALF_PLAIN`, in the plain suite, the rest in the slow one."""
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            plain = case not in LONG if dtype == torch.float32 else dtype == torch.bfloat16 and case in HALF_PLAIN
            yield (case, dtype) if plain else slow(case, dtype)


@pytest.mark.parametrize("case,dtype", list(_in_dtypes()), ids=str)
def test_row_by_row_is_the_pipeline_to_the_bit(case, dtype, stream_of, found):
    stream = prepared(case, stream_of, 4, dtype, frame_buffer_size=3)
    stream.velocity = stream.adapter.row_by_row(stream.cfg_type == "full" and case != "sd3-guidance-off")
    latents = noises(stream, 3)
    assert torch.equal(streamed(stream, latents), pipelines_own(case, stream.pipe, latents, 4))
    found.equal(CASES[case][0], stream.cfg_type, dtype)


@pytest.mark.parametrize("steps", [1, 2, slow(8)])
@pytest.mark.parametrize("case", ["sd3-guided", "flux-dev"])
def test_any_number_of_stages_to_the_bit(case, steps, stream_of):
    stream = prepared(case, stream_of, steps)
    stream.velocity = stream.adapter.row_by_row(stream.cfg_type == "full")
    latents = noises(stream, 3)
    assert torch.equal(streamed(stream, latents), pipelines_own(case, stream.pipe, latents, steps))


@pytest.mark.parametrize(
    "case,steps",
    [slow(case, 4) if case in LONG else (case, 4) for case in CASES]
    + [("sd3", 1), slow("sd3", 2), slow("sd3", 8), slow("flux-dev", 8)],
)
def test_the_batch_stays_within_the_pipelines_own_batching_noise(case, steps, stream_of, found):
    """With one frame a tick and with three."""
    streams = [prepared(case, stream_of, steps, frame_buffer_size=frames) for frames in (1, 3)]
    latents = noises(streams[0], FRAMES)
    alone = pipelines_own(case, streams[0].pipe, latents, steps)
    apart = relative_error(alone[:1], alone[1:2])
    assert apart > 0.05, "frames that are alike would prove nothing"
    noise = {}
    for stream in streams:
        batch = min(FRAMES, stream.batch_size)
        if batch not in noise:
            noise[batch] = relative_error(pipelines_own(case, stream.pipe, latents, steps, batch), alone)
        error = relative_error(streamed(stream, latents), alone)
        found.error(CASES[case][0], error, noise[batch])
        assert error <= min(max(4 * noise[batch], 4e-7), 1e-4), (error, noise)


@pytest.mark.parametrize("guidance_scale", [None, 1.5])
@pytest.mark.parametrize("steps", [1, slow(2), 4, slow(8)])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16), slow(torch.float16)], ids=str)
def test_instaflow_equals_its_own_loop_to_the_bit(dtype, steps, guidance_scale, stream_of, found):
    """v = data - noise, t = 1000 (1 - i / N), x + v / N (gnobitab/InstaFlow code/pipeline_rf.py)."""
    guided = guidance_scale is not None
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    cfg_type = "full" if guided else "none"
    stream = stream_of("instaflow", range(steps), dtype=dtype, cfg_type=cfg_type, prepare=arguments)
    pos, neg = stream.pipe.encode_prompt(PROMPT, "cpu", 1, True, "")
    latents = noises(stream, 3)
    at_once = streamed(stream, latents)
    stream.velocity = stream.adapter.row_by_row(guided)

    def one(x):
        for i in range(steps):
            t = torch.tensor((1.0 - i / steps) * 1000.0)
            with torch.no_grad():
                if guided:
                    u = stream.pipe.unet(torch.cat((x, x)), t, torch.cat((neg, pos))).sample
                    u = u[:1] + guidance_scale * (u[1:] - u[:1])
                else:
                    u = stream.pipe.unet(x, t, pos).sample
            x = x + (1.0 / steps) * u
        return x

    own = torch.cat([one(x[None]) for x in latents])
    assert torch.equal(streamed(stream, latents), own)
    found.equal("instaflow", cfg_type, dtype)
    if dtype == torch.float32:
        found.error("instaflow", relative_error(at_once, own))
        assert relative_error(at_once, own) <= 1e-5


@pytest.mark.parametrize("family,name", [("sd3", "StableDiffusion3Img2ImgPipeline"), ("flux", "FluxImg2ImgPipeline")])
@pytest.mark.parametrize("frames", [1, 3])
def test_image_to_image_equals_the_image_pipeline(family, name, frames, stream_of, picture, found):
    import diffusers

    guidance = {"sd3": 1.0, "flux": 2.5}[family]
    stream = stream_of(family, [1, 2, 3], frame_buffer_size=frames, prepare={"guidance_scale": guidance, **SHORT})
    pictures = [picture(k) for k in range(3)]
    image_pipe = getattr(diffusers, name)(**stream.pipe.components)
    image_pipe.set_progress_bar_config(disable=True)
    expected = []
    for one in pictures:
        latents = stream.encode_image(stream.preprocess(one))
        call = {"image": one, "latents": latents, "strength": 0.75, "num_inference_steps": 4, "height": 64, "width": 64}
        call |= SHORT
        expected.append(image_pipe(PROMPT, **call, guidance_scale=guidance, output_type="pt").images)
    drawn = torch.stack([frame.image for frame in stream.frames(pictures)])
    found.image(family, relative_error(drawn / 2 + 0.5, torch.cat(expected)))
    assert relative_error(drawn / 2 + 0.5, torch.cat(expected)) <= 1e-5


def test_decoding_and_encoding_are_the_pipelines(stream_of, picture):
    for family in ("sd3", "flux", "instaflow"):
        stream = stream_of(family)
        latents = noises(stream, 2)
        drawn = stream.decode_image(latents) / 2 + 0.5
        pipe = stream.pipe
        if family == "flux":
            latents = pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor)
        shift = pipe.vae.config.shift_factor or 0
        with torch.no_grad():
            pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + shift).sample
        assert torch.equal(drawn, pipe.image_processor.postprocess(pixels, output_type="pt"))


def test_the_pipeline_stays_as_it_was(stream_of):
    stream = stream_of("sd3", cfg_type="full")
    pipe = stream.pipe
    latents = noises(stream, 1)
    attributes, config = set(vars(pipe)), repr(pipe.config)
    before = pipe(PROMPT, num_inference_steps=4, latents=latents, height=64, width=64, output_type="latent").images
    scheduler = repr(vars(pipe.scheduler))
    stream.prepare(PROMPT, num_inference_steps=7)
    stream.txt2img()
    stream.update_prompt("a turtle")
    stream()
    assert repr(vars(pipe.scheduler)) == scheduler
    assert set(vars(pipe)) - attributes <= {"_guidance_scale"} | set(vars(pipe)) & {a for a in vars(pipe) if a[0] == "_"}
    assert repr(pipe.config) == config
    after = pipe(PROMPT, num_inference_steps=4, latents=latents, height=64, width=64, output_type="latent").images
    assert torch.equal(before, after)


def test_an_image_pipeline_can_be_wrapped_too(pipes, stream_of):
    from diffusers import StableDiffusion3Img2ImgPipeline

    from streamflow import StreamFlow

    plain = stream_of("sd3")
    wrapped = StreamFlow(StableDiffusion3Img2ImgPipeline(**pipes("sd3").components), range(4), cfg_type="none")
    wrapped.prepare(PROMPT, num_inference_steps=4)
    assert torch.equal(wrapped.txt2img(), plain.txt2img())


def test_precomputed_embeddings_and_the_pipelines_own_arguments(stream_of):
    stream = stream_of("sd3", cfg_type="full", prepare={"guidance_scale": 3.0, "max_sequence_length": 7})
    expected = stream.txt2img()
    embeds = stream.pipe.encode_prompt(PROMPT, None, None, negative_prompt="", max_sequence_length=7)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    stream.prepare(num_inference_steps=4, guidance_scale=3.0, **dict(zip(names, embeds, strict=True)))
    assert torch.equal(stream.txt2img(), expected)
    assert stream.prompt_embeds.shape == (8, 77 + 7, 64)
