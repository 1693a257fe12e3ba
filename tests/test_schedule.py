"""Schedules are read off the pipeline's own scheduler, picked from, and never change it."""

import copy

import pytest
import torch
from conftest import PROMPT

from streamflow import StreamFlow
from streamflow.flow.schedule import Schedule

VARIANTS = {
    "static": {"shift": 3.0},
    "dynamic": {"shift": 3.0, "use_dynamic_shifting": True},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
}


def pipelines_own(pipe, steps, **kwargs):
    """The schedule that the pipeline's scheduler holds after a real call."""
    pipe = copy.copy(pipe)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe(PROMPT, num_inference_steps=steps, height=64, width=64, output_type="latent", **kwargs)
    return pipe.scheduler.timesteps, pipe.scheduler.sigmas


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_schedule_is_the_pipelines(pipes, family, variant):
    pipe = pipes(family, scheduler=VARIANTS[variant])
    timesteps, sigmas = pipelines_own(pipe, 5)
    before = copy.deepcopy(vars(pipe.scheduler))
    stream = StreamFlow(pipe, [0, 2, 4], cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=5)
    assert torch.equal(stream.timesteps, timesteps)
    assert torch.equal(stream.sub_timesteps_tensor, timesteps[[0, 2, 4]])
    assert torch.equal(stream.beta_prod_t_sqrt.flatten(), sigmas[[0, 2, 4]])
    after = vars(pipe.scheduler)
    assert repr(after) == repr(before)


def test_custom_sigmas_go_through_the_pipeline(pipes):
    pipe = pipes("sd3")
    own = [1.0, 0.7, 0.2]
    timesteps, sigmas = pipelines_own(pipe, 3, sigmas=own)
    stream = StreamFlow(pipe, cfg_type="none")
    stream.prepare(PROMPT, num_inference_steps=3, sigmas=own)
    assert torch.equal(stream.timesteps, timesteps)
    assert torch.equal(stream.beta_prod_t_sqrt.flatten(), sigmas[:-1])
    assert stream.t_list == [0, 1, 2]


def test_instaflow_falls_evenly(pipes):
    stream = StreamFlow(pipes("instaflow"), cfg_type="none", family="instaflow")
    stream.prepare(PROMPT, num_inference_steps=4)
    assert stream.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    assert stream.beta_prod_t_sqrt.flatten().tolist() == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("steps,strength", [(4, 0.75), (10, 0.35), (28, 0.6), (7, 1.0)])
@pytest.mark.parametrize("family", ["sd3", "flux", "instaflow"])
def test_strength_starts_where_the_image_pipeline_starts(pipes, family, steps, strength):
    import diffusers

    name = {
        "sd3": "StableDiffusion3Img2ImgPipeline",
        "flux": "FluxImg2ImgPipeline",
        "instaflow": "StableDiffusionImg2ImgPipeline",
    }
    stream = StreamFlow(pipes(family), cfg_type="none", family=family)
    stream.prepare(PROMPT, num_inference_steps=steps, strength=strength)
    image_pipe = getattr(diffusers, name[family])(**stream.pipe.components)
    image_pipe.scheduler = copy.deepcopy(image_pipe.scheduler)
    image_pipe.scheduler.timesteps = stream.timesteps
    kept, _ = image_pipe.get_timesteps(steps, strength, "cpu")
    assert stream.t_list == list(range(steps - len(kept), steps))


def test_strength_outside_its_range_or_without_a_step_is_refused(pipes):
    stream = StreamFlow(pipes("instaflow"), cfg_type="none", family="instaflow")
    for strength, words in ((0.0, "above 0"), (1.5, "at most 1"), (0.01, "no step")):
        with pytest.raises(ValueError, match=words):
            stream.prepare(PROMPT, num_inference_steps=4, strength=strength)


def test_a_subset_ends_at_sigma_zero():
    schedule = Schedule(torch.arange(5.0, 0, -1), torch.linspace(1, 0, 6))
    stages = schedule.pick([0, 3])
    torch.testing.assert_close(stages.sigmas, torch.tensor([1.0, 0.4]))
    torch.testing.assert_close(stages.sigmas_next, torch.tensor([0.4, 0.0]))
    assert stages.timesteps.tolist() == [5.0, 2.0]


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.7, 1.0], [1.0, 0.5, 0.25, 0.1], [2.0, 1.0, 0.5, 0.0]])
def test_a_schedule_that_does_not_fall_to_zero_is_refused(sigmas):
    with pytest.raises(ValueError, match="fall strictly"):
        Schedule(torch.zeros(3), torch.tensor(sigmas))


def test_other_schedulers_are_refused_with_the_remedy(pipes):
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = copy.copy(pipes("sd3"))
    vars(pipe)["scheduler"] = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchHeun.*FlowMatchEulerDiscreteScheduler.from_config"):
        StreamFlow(pipe, [0], cfg_type="none").prepare(PROMPT, num_inference_steps=4)


def test_a_scheduler_that_enlarges_its_latents_is_refused(pipes):
    from diffusers import FlowMatchLCMScheduler

    pipe = copy.copy(pipes("sd3"))
    vars(pipe)["scheduler"] = FlowMatchLCMScheduler(scale_factors=[0.5, 1.0])
    with pytest.raises(ValueError, match="scale_factors.*one size"):
        StreamFlow(pipe, [0], cfg_type="none")
