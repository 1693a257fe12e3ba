"""Steps other than Euler's: a stream draws what the pipeline draws with a stochastic scheduler, on TrigFlow's arc and over
PeRFlow's windows, whatever the number of steps, from the same draws."""

import copy
from functools import partial

import diffusers
import pytest
import torch
from conftest import PROMPT, noises, relative_error, slow, streamed
from diffusers.configuration_utils import ConfigMixin, register_to_config

from streamflow import StreamFlow
from streamflow.conditioning.inpaint import MASK, NOISE, X0, put_known

FRAMES = 5
SHORT = {"max_sequence_length": 24}
SPRINT = {"complex_human_instruction": None, "max_sequence_length": 24}


def with_scheduler(pipe, scheduler):
    pipe = copy.copy(pipe)
    vars(pipe)["scheduler"] = scheduler
    return pipe


# -- stochastic schedulers of straight flows ---------------------------------------------------------------------------

SCHEDULERS = {
    "euler-stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
}


def drawn_alone(pipe, steps, generator, count, **call):
    """`count` images' latents, one after another, with the latents and every step's noise from this generator, which
    pipelines of straight flows do not hand on to their schedulers."""
    if isinstance(pipe.scheduler, (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchLCMScheduler)):
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.step = partial(scheduler.step, generator=generator)
        pipe = with_scheduler(pipe, scheduler)
    call = {"num_inference_steps": steps, "height": 64, "width": 64, "output_type": "latent", **call}
    return torch.cat([pipe(PROMPT, generator=generator, **call).images for _ in range(count)])


def from_generator(stream, count):
    """The same of a stream that was prepared with a generator; each group is of one frame."""
    groups = [stream._denoiser.tick(stream._inputs.group(stream._denoiser.next_ids(1))) for _ in range(count)]
    assert groups == [None] * count
    done = [one.x0 for one in stream._denoiser.finished]
    stream._denoiser.finished.clear()
    return torch.cat(done + stream.flush())


@pytest.mark.parametrize("batched", [True, False], ids=["ring", "loop"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_stochastic_scheduler_draws_the_pipelines_own_noise(name, batched, pipes):
    pipe = with_scheduler(pipes("sd3"), SCHEDULERS[name]())
    stream = StreamFlow(pipe, range(3), cfg_type="none", use_denoising_batch=batched)
    stream.prepare(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(3), **SHORT)
    stream.velocity = stream.adapter.row_by_row(False)
    own = drawn_alone(pipe, 3, torch.Generator().manual_seed(3), FRAMES, guidance_scale=1.0, **SHORT)
    assert torch.equal(from_generator(stream, FRAMES), own)
    assert relative_error(own[:1], own[1:2]) > 0.05, "frames that are alike would prove nothing"


def test_fresh_noise_is_a_frames_own_whatever_is_in_flight(pipes):
    """By (seed, frame, step): the ring, the loop and a frame buffer draw the same, and do_add_noise another image."""
    pipe = with_scheduler(pipes("sd3"), SCHEDULERS["lcm"]())
    drawn = []
    for options in ({}, {"use_denoising_batch": False}, {"frame_buffer_size": 2}, {"do_add_noise": True}):
        stream = StreamFlow(pipe, range(3), cfg_type="none", **options)
        stream.prepare(PROMPT, num_inference_steps=3, seed=5, **SHORT)
        drawn.append(streamed(stream, noises(stream, 4)))
    assert relative_error(drawn[1], drawn[0]) < 1e-5
    assert relative_error(drawn[2], drawn[0]) < 1e-5
    assert relative_error(drawn[3], drawn[0]) > 0.01
    source = stream._denoiser.state.noise
    draws = torch.cat([source.draw(1), source.draw_steps(1, 2), source.draw_steps(2, 2), source.fixed_steps(2)])
    assert len({float(one.sum()) for one in draws}) == len(draws)
    assert torch.equal(source.fixed_steps(2), source.fixed_steps(2))


@pytest.mark.parametrize(
    "changes",
    [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"shift_terminal": 0.1}],
    ids=str,
)
def test_sigmas_of_every_kind_are_the_pipelines(changes, pipes):
    if "use_beta_sigmas" in changes:
        pytest.importorskip("scipy")
    pipe = with_scheduler(pipes("sd3"), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, **changes))
    stream = StreamFlow(pipe, range(3), cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(3), **SHORT)
    stream.velocity = stream.adapter.row_by_row(False)
    own = drawn_alone(pipe, 3, torch.Generator().manual_seed(3), 2, guidance_scale=1.0, **SHORT)
    assert torch.equal(from_generator(stream, 2), own)


# -- Sana-Sprint ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,steps", [(torch.float32, 1), (torch.float32, 2), (torch.float32, 4), (torch.bfloat16, 2)])
def test_sana_sprint_is_the_pipeline_to_the_bit(dtype, steps, pipes, found):
    pipe = pipes("sana-sprint", dtype)
    call = {**SPRINT, "guidance_scale": 3.0, "intermediate_timesteps": 1.3 if steps == 2 else None}
    stream = StreamFlow(pipe, range(steps), cfg_type="none", width=64, height=64)
    drawn = []
    for row_by_row in (True, False):
        stream.prepare(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(3), **call)
        if row_by_row:
            stream.velocity = stream.adapter.row_by_row(False)
        drawn.append(from_generator(stream, FRAMES))
        stream.unet = pipe.transformer
    own = drawn_alone(pipe, steps, torch.Generator().manual_seed(3), FRAMES, use_resolution_binning=False, **call)
    assert torch.equal(drawn[0], own)
    found.equal("sana-sprint", "none", dtype)
    if dtype == torch.float32:
        found.error("sana-sprint", relative_error(drawn[1], own))
        assert relative_error(drawn[1], own) < 1e-5
    assert relative_error(own[:1], own[1:2]) > 0.05


def test_sana_sprint_starts_from_an_image_as_its_image_pipeline(pipes, picture, found):
    pipe = pipes("sana-sprint")
    image_pipe = diffusers.SanaSprintImg2ImgPipeline(**pipe.components)
    image_pipe.set_progress_bar_config(disable=True)
    stream = StreamFlow(image_pipe, cfg_type="none", width=64, height=64, noise="frame")
    call = {**SPRINT, "num_inference_steps": 4, "strength": 0.5, "intermediate_timesteps": None}
    stream.prepare(PROMPT, generator=torch.Generator().manual_seed(3), **call)
    drawn = torch.stack([frame.image for frame in stream.frames([picture(1)])])
    size = {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "pt"}
    own = image_pipe(prompt=PROMPT, image=picture(1), generator=torch.Generator().manual_seed(3), **size, **call).images
    found.image("sana-sprint", relative_error(drawn / 2 + 0.5, own))
    assert relative_error(drawn / 2 + 0.5, own) < 1e-5


# -- PeRFlow -------------------------------------------------------------------------------------------------------------


class PeRFlowScheduler(diffusers.SchedulerMixin, ConfigMixin):
    """The published rule, written out step by step from its formulas: the oracle, in float64."""

    order, init_noise_sigma = 1, 1.0

    @register_to_config
    def __init__(self, prediction_type="ddim_eps", num_time_windows=4, num_train_timesteps=1000):
        self.alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    def scale_model_input(self, x, t):
        return x

    def set_timesteps(self, steps, device=None):
        k = self.config.num_time_windows
        times = []
        for i in range(k):
            n = steps // k + (1 if i < steps % k else 0)
            start, end = 1 - i / k, 1 - (i + 1) / k
            times += [int((start + (end - start) * j / n) * 1000) for j in range(n)]
        self.timesteps = torch.tensor(times)

    def step(self, u, t, x, return_dict=False, **_):
        k, kind = self.config.num_time_windows, self.config.prediction_type
        i = self.timesteps.tolist().index(int(t))
        later = int(self.timesteps[i + 1]) if i + 1 < len(self.timesteps) else 0
        now = int(t) / 1000
        ends = [j / k for j in range(k)]
        end = max(e for e in ends if e < now - 1e-4)
        start = end + 1 / k
        a_s, a_e = (self.alphas_cumprod[max(round(b * 1000) - 1, 0)].double() for b in (start, end))
        if kind == "ddim_eps":
            scale = (a_e / a_s) ** 0.5
            eta = (1 - a_e) ** 0.5 - (a_e / a_s * (1 - a_s)) ** 0.5
        else:
            g = (a_s / a_e) ** 0.5
            scale, eta = 1 / g, -((1 - g**2) ** 0.5) / g
        below = scale * (now - start) + (end - now)
        x_end = scale * (end - start) / below * x.double() + eta * (end - now) / below * u.double()
        v = u.double() if kind == "velocity" else (x_end - x.double()) / (end - now)
        return ((x.double() + (later - int(t)) / 1000 * v).to(x.dtype),)


def perflow(pipes, family, kind, **options):
    pipe = with_scheduler(pipes(family), PeRFlowScheduler(kind))
    return pipe, StreamFlow(pipe, **{"cfg_type": "none", **options})


@pytest.mark.parametrize("steps", [4, 7, *map(slow, (5, 6, 8, 9, 10, 11, 12))])
@pytest.mark.parametrize("family,kind", [("perflow", "diff_eps"), ("perflow-sdxl", "ddim_eps"), ("perflow", "velocity")])
def test_perflow_equals_its_own_loop_for_any_number_of_steps(family, kind, steps, pipes, found):
    guided = steps % 2 == 0
    pipe, stream = perflow(pipes, family, kind, cfg_type="full" if guided else "none")
    stream.prepare(PROMPT, num_inference_steps=steps, guidance_scale=2.0 if guided else 1.0)
    latents = noises(stream, 3)
    call = {"num_inference_steps": steps, "guidance_scale": 2.0 if guided else 1.0, "negative_prompt": ""}
    own = torch.cat([pipe(PROMPT, latents=x, output_type="latent", **call).images for x in latents.split(1)])
    error = relative_error(streamed(stream, latents), own)
    found.guided(family, stream.cfg_type)
    found.error(family, error)
    assert error < 2e-5
    assert relative_error(own[:1], own[1:2]) > 0.05


def test_perflow_keeps_its_windows(pipes):
    """Detected by its scheduler; too few steps, a window's start left out and re-noising are refused; an unknown scheduler
    stands for the published settings."""
    pipe, stream = perflow(pipes, "perflow", "diff_eps")
    with pytest.raises(ValueError, match="num_inference_steps 3 .* 4 windows"):
        stream.prepare(PROMPT, num_inference_steps=3)
    stream = StreamFlow(pipe, [1, 4, 5], cfg_type="none")
    with pytest.raises(ValueError, match=r"leaves out \[2\], .*keep them, \[1, 2, 4, 5\]"):
        stream.prepare(PROMPT, num_inference_steps=6)
    with pytest.raises(ValueError, match="do_add_noise"):
        StreamFlow(pipe, cfg_type="none", do_add_noise=True)
    with pytest.raises(ValueError, match="perflow-sdxl"):
        StreamFlow(pipes("perflow-sdxl"), family="perflow")
    drawn = []
    for one in (pipe, pipes("perflow")):
        stream = StreamFlow(one, family="perflow", cfg_type="none")
        stream.prepare(PROMPT, num_inference_steps=5)
        drawn.append(streamed(stream, noises(stream, 2)))
    assert relative_error(*drawn) < 1e-5


def test_perflow_starts_from_an_image_on_stable_diffusions_path(pipes, picture):
    """From an image as `add_noise` of its scheduler does, alpha at t - 1; a known part ends as it is."""
    pipe, stream = perflow(pipes, "perflow", "ddim_eps", t_index_list=[2, 3])
    stream.prepare(PROMPT, num_inference_steps=4)
    x0, noise = torch.randn(2, 1, 4, 8, 8)
    alpha = pipe.scheduler.alphas_cumprod[499]
    assert relative_error(stream.add_noise(x0, noise, 0), alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise) < 1e-6
    known = {X0: x0, NOISE: noise, MASK: torch.zeros(1, 1, 8, 8)}
    assert torch.equal(put_known(noise, known, torch.zeros(1), stream.adapter.path), x0)


@pytest.mark.parametrize("family", ["perflow", "sana-sprint"])
def test_a_rules_lines_lead_where_they_say(family, pipes):
    """`toward` undoes `x0`, and a step to sigma 0 arrives there; the ring equals the loop under residual guidance."""
    options = {"width": 64, "height": 64, "cfg_type": "self", "family": family}
    call = SPRINT | {"intermediate_timesteps": None} if family == "sana-sprint" else {"guidance_scale": 2.0}
    drawn = []
    for batched in (True, False):
        stream = StreamFlow(pipes(family), use_denoising_batch=batched, **options)
        stream.prepare(PROMPT, num_inference_steps=4, **call)
        latents = noises(stream, 3)
        drawn.append(streamed(stream, latents, anchor=torch.ones_like(latents[:1])))
    assert relative_error(*drawn) < 1e-5
    rows = stream._steps.rows(3)
    x, x0 = noises(stream, 1), torch.ones_like(latents[:1])
    v = rows.toward(x, x0)
    assert relative_error(rows.x0(x, v), x0) < 1e-4
    assert relative_error(rows.step(x, v), x0) < 1e-4
