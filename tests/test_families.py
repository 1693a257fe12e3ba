"""Every family with an adapter draws what its pipeline draws: to the bit with the network called in the pipeline's own
shapes, and within the pipeline's own batching noise in one call. The rest of the matrix, dtypes, sizes and step counts, is
slow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from conftest import PROMPT, edit_prompt, noises, relative_error, streamed
from torch import Tensor

from streamflow import StreamFlow, models

FRAMES = 6
ELSEWHERE = {"fallback", "perflow", "perflow-sdxl", "sana-sprint"}  # tests/test_fallback.py, tests/test_rules.py
FAMILIES = [family for family in models.FAMILIES if family not in ELSEWHERE]


def _as_is(latents: Tensor, stream: Any) -> Tensor:
    return latents


def _tokens(latents: Tensor, stream: Any) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def _for_klein(latents: Tensor, stream: Any) -> Tensor:
    return stream.codec.decoder.unpack(latents)


@dataclass(frozen=True)
class Case:
    """One way to draw. prepare: the stream's arguments; call: the pipeline's, where they are others; fixed: of both, and
    only_call of the pipeline; latents: from the stream's latents to the form of the pipeline's `output_type="latent"`."""

    family: str
    cfg_type: str = "none"
    prepare: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] | None = None
    only_call: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    least_steps: int = 1
    latents: Callable[[Tensor, Any], Tensor] = _as_is

    def stream(self, pipes, steps=2, size=(64, 64), dtype=torch.float32, frames=3):
        """A prepared stream of this case."""
        sizes = {"height": size[0], "width": size[1], "frame_buffer_size": frames}
        pipe = pipes(self.family, dtype, **self.changes)
        stream = StreamFlow(pipe, range(steps), cfg_type=self.cfg_type, family=self.family, **sizes)
        stream.prepare(PROMPT, **{**self.fixed, "num_inference_steps": steps, **self.prepare})
        return stream

    def draw(self, stream, latents, steps=2, batch=1):
        """What the pipeline itself draws from these latents, `batch` at a time."""
        call = {**self.fixed, "num_inference_steps": steps, **(self.prepare if self.call is None else self.call)}
        size = {"height": stream.height, "width": stream.width, **self.only_call}
        drawn = []
        for x in latents.split(batch):
            texts = {name: [text] * len(x) for name, text in call.items() if name == "negative_prompt"}
            arguments = {**call, **texts, **size, "prompt": [PROMPT] * len(x)}
            drawn.append(stream.pipe(**arguments, latents=x, output_type="latent").images)
        return torch.cat(drawn)


SHORT = {"max_sequence_length": 40}
SAME_LENGTH = "a blurry photo, noise!"  # as many tokens as PROMPT
assert len(SAME_LENGTH) == len(PROMPT)

BINLESS = {**SHORT, "complex_human_instruction": None}
EXACT = {"use_resolution_binning": False}

PLAIN = {
    "sdxl": Case("sdxl", call={"guidance_scale": 1.0}),
    "sdxl-guided": Case("sdxl", "full", {"guidance_scale": 3.0, "negative_prompt": "blurry"}),
    "chroma": Case("chroma", call={"guidance_scale": 1.0}, fixed=SHORT),
    "chroma-guided": Case("chroma", "full", {"guidance_scale": 3.0, "negative_prompt": "blurry"}, fixed=SHORT),
    "lumina2": Case("lumina2", call={"guidance_scale": 1.0}),
    "lumina2-guided": Case(
        "lumina2", "full", {"guidance_scale": 3.0, "negative_prompt": "blurry", "cfg_trunc_ratio": 0.7}, fixed=SHORT
    ),
    "qwen": Case("qwenimage", least_steps=2),
    "qwen-guided": Case("qwenimage", "full", {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}, least_steps=2),
    "flux2": Case("flux2", "none", {"guidance_scale": 2.5}, fixed=SHORT, latents=_tokens),
    "klein": Case("flux2-klein", call={"guidance_scale": 1.0}, fixed=SHORT, latents=_for_klein),
    "klein-guided": Case("flux2-klein", "full", {"guidance_scale": 3.0}, fixed=SHORT, latents=_for_klein),
    "sana": Case("sana", call={"guidance_scale": 1.0}, fixed=BINLESS, only_call=EXACT),
    "sana-guided": Case(
        "sana", "full", {"guidance_scale": 3.0, "negative_prompt": "blurry"}, fixed=BINLESS, only_call=EXACT
    ),
    "zimage": Case("zimage", call={"guidance_scale": 0.0}, fixed=SHORT),
    "zimage-guided": Case(
        "zimage", "full", {"guidance_scale": 3.0, "negative_prompt": SAME_LENGTH, "cfg_normalization": 0.8}, fixed=SHORT
    ),
    "fibo": Case("bria-fibo", call={"guidance_scale": 1.0}),
    "fibo-guided": Case("bria-fibo", "full", {"guidance_scale": 3.0, "negative_prompt": "blurry"}),
}
SLOW = {
    "sdxl-default": Case("sdxl", "full", {"negative_prompt": "", "target_size": (32, 64)}),
    "chroma-default": Case("chroma", "full", {"negative_prompt": ""}),
    "chroma-karras": Case("chroma", call={"guidance_scale": 1.0}, changes={"scheduler": {"use_karras_sigmas": True}}),
    "chroma-exponential": Case(
        "chroma", call={"guidance_scale": 1.0}, changes={"scheduler": {"use_exponential_sigmas": True}}
    ),
    "lumina2-default": Case("lumina2", "full", {"negative_prompt": ""}),
    "lumina2-plain-guidance": Case("lumina2", "full", {"cfg_normalization": False, "negative_prompt": "blurry"}),
    "lumina2-never-guided": Case("lumina2", "full", {"cfg_trunc_ratio": 0.0, "negative_prompt": "blurry"}),
    "lumina2-system-prompt": Case("lumina2", fixed={"system_prompt": "Draw."}, call={"guidance_scale": 1.0}),
    "qwen-default": Case("qwenimage", "full", {"negative_prompt": ""}),
    "qwen-guidance-off": Case("qwenimage", "full", {"true_cfg_scale": 0.5, "negative_prompt": "blurry"}),
    "qwen-static-shift": Case("qwenimage", changes={"scheduler": {"use_dynamic_shifting": False, "shift": 2.0}}),
    "flux2-static-shift": Case("flux2", changes={"scheduler": {"use_dynamic_shifting": False}}, latents=_tokens),
    "klein-distilled": Case("flux2-klein", fixed=SHORT, latents=_for_klein, changes={"is_distilled": True}),
    "klein-default": Case("flux2-klein", "full", latents=_for_klein),
    "sana-default": Case("sana", "full", fixed=BINLESS, only_call=EXACT),
    "sana-learned-sigma": Case(
        "sana", call={"guidance_scale": 1.0}, fixed=BINLESS, only_call=EXACT, changes={"out_channels": 16}
    ),
    "zimage-default": Case("zimage", "full", {"negative_prompt": SAME_LENGTH}),
    "zimage-truncated": Case(
        *("zimage", "full"),
        {"guidance_scale": 0.7, "negative_prompt": SAME_LENGTH, "cfg_truncation": 0.5, "cfg_normalization": True},
    ),
    "zimage-guidance-off": Case("zimage", "full", {"guidance_scale": 0.0}),
    "zimage-dynamic": Case("zimage", call={"guidance_scale": 0.0}, changes={"scheduler": {"use_dynamic_shifting": True}}),
    "fibo-default": Case("bria-fibo", "full"),
    "fibo-nothing-padded": Case("bria-fibo", "full", {"negative_prompt": SAME_LENGTH}),
    "fibo-guidance-off": Case("bria-fibo", "full", {"guidance_scale": 0.5, "negative_prompt": SAME_LENGTH}),
    "fibo-more-blocks-than-layers": Case("bria-fibo", call={"guidance_scale": 1.0}, changes={"num_single_layers": 4}),
}


def check(case: Case, pipes, found=None, **settings) -> None:
    """Row by row to the bit, and in one call within 4 x the pipeline's own batching noise, never above 1e-4."""
    steps = settings.get("steps", 2)
    stream = case.stream(pipes, **settings)
    latents = noises(stream, FRAMES)
    own = case.draw(stream, latents, steps)
    at_once = case.latents(streamed(stream, latents), stream)
    if stream.pipe.dtype == torch.float32:
        noise, error = relative_error(case.draw(stream, latents, steps, FRAMES), own), relative_error(at_once, own)
        if found is not None:
            found.error(case.family, error, noise)
        assert error <= min(max(4 * noise, 1e-6), 1e-4), noise
    stream.velocity = stream.adapter.row_by_row(case.cfg_type == "full" and stream._denoiser.state.weight > 1.0)
    assert torch.equal(case.latents(streamed(stream, latents), stream), own)
    if found is not None:
        found.equal(case.family, case.cfg_type, stream.pipe.dtype)
    assert relative_error(own[:1], own[1:2]) > 0.05, "frames that are alike would prove nothing"


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_a_stream_draws_what_the_pipeline_draws(case, pipes, found):
    check(case, pipes, found)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_other_arguments_too(case, pipes, found):
    check(case, pipes, found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", (PLAIN | SLOW).values(), ids=PLAIN | SLOW)
def test_in_every_half_dtype(case, dtype, pipes, found):
    check(case, pipes, found, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("steps,frames,size", [(1, 2, (64, 128)), (2, 6, (128, 64)), (8, 1, (128, 128))])
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_of_every_size_with_any_number_of_steps(case, steps, frames, size, pipes, found):
    check(case, pipes, found, steps=max(steps, case.least_steps), size=size, frames=frames)


IMAGES = {
    "chroma": ("ChromaImg2ImgPipeline", {"guidance_scale": 1.0}),
    "chroma-guided": ("ChromaImg2ImgPipeline", {"guidance_scale": 3.0, "negative_prompt": "blurry"}),
    "qwen": ("QwenImageImg2ImgPipeline", {"true_cfg_scale": 1.0}),
    "qwen-guided": ("QwenImageImg2ImgPipeline", {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}),
    "zimage": ("ZImageImg2ImgPipeline", {"guidance_scale": 0.0}),
    "zimage-guided": ("ZImageImg2ImgPipeline", {"guidance_scale": 3.0, "negative_prompt": SAME_LENGTH}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_to_image_equals_the_image_pipeline(name, pipes, picture, found):
    case, (cls, call) = PLAIN[name], IMAGES[name]
    call = {**call, **case.fixed}
    stream = case.stream(pipes, frames=2)
    stream.prepare(PROMPT, num_inference_steps=4, strength=0.75, **call)
    image_pipe = getattr(diffusers, cls)(**stream.pipe.components)
    image_pipe.set_progress_bar_config(disable=True)
    pictures = [picture(k) for k in range(2)]
    size = {"height": 64, "width": 64, "num_inference_steps": 4, "strength": 0.75, "output_type": "pt"}
    expected = []
    for one in pictures:
        latents = stream.encode_image(stream.preprocess(one))
        expected.append(image_pipe(prompt=PROMPT, image=one, latents=latents, **size, **call).images)
    drawn = torch.stack([frame.image for frame in stream.frames(pictures)])
    found.image(case.family, relative_error(drawn / 2 + 0.5, torch.cat(expected)))
    assert relative_error(drawn / 2 + 0.5, torch.cat(expected)) <= 1e-5


def _sana(pipe, latents, stream):
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample


def _kl(pipe, latents, stream):
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)).sample


def _chroma(pipe, latents, stream):
    return _kl(pipe, pipe._unpack_latents(latents, stream.height, stream.width, pipe.vae_scale_factor), stream)


def _klein(pipe, latents, stream):
    mean, var = (getattr(pipe.vae.bn, f"running_{name}").view(1, -1, 1, 1) for name in ("mean", "var"))
    return pipe.vae.decode(pipe._unpatchify_latents(latents * (var + pipe.vae.config.batch_norm_eps).sqrt() + mean)).sample


def _qwen(pipe, latents, stream):
    latents = pipe._unpack_latents(latents, stream.height, stream.width, pipe.vae_scale_factor)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return pipe.vae.decode(latents * std + mean).sample[:, :, 0]


def _fibo(pipe, latents, stream):
    latents = pipe._unpack_latents_no_patch(latents, stream.height, stream.width, pipe.vae_scale_factor)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return pipe.vae.decode(latents.unsqueeze(2) * std + mean).sample[:, :, 0]


DECODES = {"sana": _sana, "zimage": _kl, "lumina2": _kl, "sdxl": _kl, "chroma": _chroma, "klein": _klein}
DECODES |= {"qwen": _qwen, "fibo": _fibo}


@pytest.mark.parametrize("name", DECODES)
@torch.no_grad()
def test_decoding_is_the_pipelines_and_encoding_its_inverse(name, pipes, picture):
    """An image that is wider than high, so that no two dimensions can be taken for each other."""
    stream = PLAIN[name].stream(pipes, size=(64, 96))
    latents = noises(stream, 2)
    expected = DECODES[name](stream.pipe, latents, stream).clamp(-1, 1)
    assert relative_error(stream.decode_image(latents), expected) < 1e-5
    codec = stream.codec
    x0 = codec.encode(stream.preprocess(picture(1, (96, 64))))
    assert x0.shape == latents[:1].shape
    scale, z = codec.encoder.scaling, codec.encoder.vae.encode(stream.preprocess(picture(1, (96, 64))))
    z = z.latent if hasattr(z, "latent") else z.latent_dist.mode()
    back = x0 if codec.decoder.unpack is None else codec.decoder.unpack(x0)
    back = back / scale + codec.decoder.shift
    assert torch.allclose(back, z.reshape(back.shape), atol=1e-4)


def test_what_has_no_negative_prompt_is_refused_where_guidance_needs_one(pipes):
    for cfg_type in ("full", "initialize"):
        with pytest.raises(ValueError, match="Flux2Pipeline has no classifier-free guidance.*'none'"):
            StreamFlow(pipes("flux2"), [0], cfg_type=cfg_type)
        with pytest.raises(ValueError, match="distilled.*'none'"):
            StreamFlow(pipes("flux2-klein", is_distilled=True), [0], cfg_type=cfg_type)
    klein = StreamFlow(pipes("flux2-klein"), [0], cfg_type="full")
    with pytest.raises(ValueError, match="takes no negative_prompt text.*negative_prompt_embeds"):
        klein.prepare(PROMPT, "blurry")
    qwen = StreamFlow(pipes("qwenimage"), [0], cfg_type="full")
    qwen.prepare(PROMPT, None)
    empty = StreamFlow(pipes("qwenimage"), [0], cfg_type="full")
    empty.prepare(PROMPT, "")
    assert torch.equal(qwen.txt2img(), empty.txt2img())


def test_sanas_own_solver_is_refused_with_what_to_use(pipes):
    pipe = copy.copy(pipes("sana"))
    euler = pipe.scheduler
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    stream = StreamFlow(pipe, [0], cfg_type="none")
    with pytest.raises(ValueError, match="DPMSolver.* does not step by Euler.*, shift=pipe.scheduler.config.flow_shift"):
        stream.prepare(PROMPT)
    config = pipe.scheduler.config
    made = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, shift=config.flow_shift)
    for scheduler in (made, euler):
        scheduler.set_timesteps(4)
    assert torch.equal(made.sigmas, euler.sigmas)


def test_embeddings_of_several_prompts_or_another_width_are_refused(pipes):
    stream = StreamFlow(pipes("zimage"), [0], cfg_type="none", width=64, height=64)
    with pytest.raises(ValueError, match="prompts"):
        stream.prepare(prompt_embeds=[torch.zeros(5, 16)] * 2)
    with pytest.raises(ValueError, match="15 wide.*16"):
        stream.prepare(prompt_embeds=[torch.zeros(5, 15)])
    embeds, _ = stream.pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    stream.prepare(prompt_embeds=embeds, num_inference_steps=1)
    given = stream.txt2img()
    stream.prepare(PROMPT, num_inference_steps=1)
    assert torch.equal(stream.txt2img(), given)


@pytest.mark.parametrize("family", ["zimage", "qwenimage", "lumina2", "bria-fibo"])
def test_prompts_of_other_lengths_share_a_stream(family, pipes):
    """Each frame under its own prompt: what a stream of that prompt alone draws, whatever else is in flight."""
    texts = ("a cat", "a much longer prompt, of a dog in the rain", "a cat")
    stream = StreamFlow(pipes(family), [0, 1], cfg_type="none", width=64, height=64)
    stream.prepare(texts[0], num_inference_steps=2)
    drawn = []
    for k, text in enumerate(texts):
        stream.update_prompt(text, scope="frame")
        drawn.append(stream.predict_x0_batch(noises(stream, 3)[k : k + 1]))
    drawn = torch.cat([x for x in drawn if x is not None] + stream.flush())
    for k, text in enumerate(texts):
        stream.prepare(text, num_inference_steps=2)
        assert relative_error(drawn[k : k + 1], streamed(stream, noises(stream, 3)[k : k + 1])) < 1e-5


def test_a_blend_is_masked_where_one_of_its_texts_is(pipes):
    """FIBO masks tokens only where a text was padded."""
    stream = StreamFlow(pipes("bria-fibo"), [0, 1], cfg_type="full", width=64, height=64)
    longer = f"{PROMPT}, on a table"
    drawn = []
    for prompt in (longer, [(PROMPT, 1e-9), (longer, 1.0)], [(longer, 1.0), (PROMPT, 1e-9)]):
        stream.prepare(prompt, SAME_LENGTH, num_inference_steps=2, guidance_scale=3.0)
        drawn.append(streamed(stream, noises(stream, 1)))
    assert relative_error(drawn[1], drawn[0]) < 1e-5 and relative_error(drawn[2], drawn[0]) < 1e-5


@pytest.mark.parametrize("cfg_type", ["self", "initialize"])
def test_a_familys_rule_holds_for_residual_guidance_too(cfg_type, pipes, picture):
    """Normalised velocities keep the length of the prompt's own, and streaming equals the loop."""
    pictures = [picture(k) for k in range(3)]
    drawn = []
    for batched in (True, False):
        stream = StreamFlow(pipes("qwenimage"), [1, 2], cfg_type=cfg_type, use_denoising_batch=batched)
        stream.prepare(PROMPT, num_inference_steps=3, true_cfg_scale=4.0)
        drawn.append(torch.stack([frame.image for frame in stream.frames(pictures)]))
    assert relative_error(*drawn) < 1e-4
    weight = stream._denoiser.state.weight
    v, negative = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    assert torch.allclose(weight.guided(v, negative, torch.ones(2)).norm(dim=-1), v.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.soak if name == "qwenimage-edit" else pytest.mark.slow) for name in FAMILIES],
)
def test_residual_guidance_streams_as_the_loop(family, pipes, picture, found):
    pipe = pipes(family)
    for cfg_type in ("self", "initialize"):
        drawn = []
        for batched in (True, False):
            options = {"cfg_type": cfg_type, "use_denoising_batch": batched, "width": 64, "height": 64}
            try:
                stream = StreamFlow(pipe, [1, 2], family=family, **options)
            except ValueError as error:
                assert "no classifier-free guidance" in str(error)
                break
            prompt = edit_prompt(PROMPT) if family == "bria-fibo-edit" else PROMPT
            stream.prepare(prompt, num_inference_steps=3, **({} if family in ("instaflow", "sdxl") else SHORT))
            drawn.append(torch.stack([frame.image for frame in stream.frames(picture(k) for k in range(3))]))
        else:
            assert relative_error(*drawn) < 1e-4
            found.guided(family, cfg_type)


def test_guidance_stops_where_the_pipeline_stops(pipes):
    """At a share of Lumina2's steps, and at a time of Z-Image's, counted on the whole schedule."""
    lumina = StreamFlow(pipes("lumina2"), [0, 3], cfg_type="full")
    lumina.prepare(PROMPT, num_inference_steps=4, cfg_trunc_ratio=0.5)
    sigmas = lumina._denoiser.state.schedule.sigmas[:4]
    v, negative = torch.ones(4, 1, 2, 2), torch.zeros(4, 1, 2, 2) + torch.rand(2, 2)
    rows = zip(lumina._denoiser.state.weight.guided(v, negative, sigmas), v, strict=True)
    guided = [not torch.equal(a, b) for a, b in rows]
    assert guided == [True, True, False, False]
    zimage = StreamFlow(pipes("zimage"), [0, 3], cfg_type="full", width=64, height=64)
    for truncation, last in ((1.0, 4), (0.3, 3), (-1.0, 0), (None, 4)):
        zimage.prepare(PROMPT, num_inference_steps=4, cfg_truncation=truncation)
        t = (1000 - zimage._denoiser.state.schedule.timesteps) / 1000
        assert truncation is None or int((t <= truncation).sum()) == last
        weight, sigmas = zimage._denoiser.state.weight, zimage._denoiser.state.schedule.sigmas[:4]
        guided = [not torch.equal(a, b) for a, b in zip(weight.guided(v, negative, sigmas), v, strict=True)]
        assert sum(guided) == last and guided == sorted(guided, reverse=True)
    assert weight == 6.0  # 1 + guidance_scale
