"""The convention as theorems: what is true of every path, velocity and step."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from streamflow.flow.convention import add_noise, euler, guide, predict_x0, renoise, velocity_from

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(seed: int, dtype: torch.dtype = torch.float32, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def sigma():
    return torch.tensor([1.0, 0.75, 0.5, 0.1])


def test_an_exact_velocity_leads_to_the_image_in_one_step(sigma):
    x0, noise = draw(0), draw(1)
    x = add_noise(x0, noise, sigma)
    v = noise - x0
    torch.testing.assert_close(euler(x, v, -sigma), x0, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(predict_x0(x, v, sigma), x0, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(velocity_from(x, x0, sigma), v, atol=1e-5, rtol=1e-4)


def test_renoise_with_its_own_noise_stays_on_the_path(sigma):
    x0, noise = draw(0), draw(1)
    x = renoise(add_noise(x0, noise, sigma), noise - x0, sigma, sigma / 2, noise)
    torch.testing.assert_close(x, add_noise(x0, noise, sigma / 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_and_noising_equal_the_scheduler_to_the_bit(dtype):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x, v, noise = draw(0, dtype, 1), draw(1, dtype, 1), draw(2, dtype, 1)
    sigmas = scheduler.sigmas
    for i, t in enumerate(scheduler.timesteps):
        assert torch.equal(add_noise(x, noise, sigmas[i : i + 1]), scheduler.scale_noise(x, t[None], noise))
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, t, x, return_dict=False)[0]
        x = euler(x, v, sigmas[i + 1 : i + 2] - sigmas[i : i + 1])
        assert x.dtype == dtype
        assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_renoise_equals_the_stochastic_scheduler_to_the_bit(dtype):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(4)
    x, v = draw(0, dtype, 1), draw(1, dtype, 1)
    own = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    expected = scheduler.step(v, scheduler.timesteps[0], x, generator=generator, return_dict=False)[0]
    assert torch.equal(renoise(x, v, scheduler.sigmas[:1], scheduler.sigmas[1:2], own), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guidance_equals_the_pipelines_expression_to_the_bit(dtype):
    pos, neg = draw(0, dtype), draw(1, dtype)
    w = 3.7777
    assert torch.equal(guide(pos, neg, w), neg + w * (pos - neg))


@pytest.mark.parametrize("w", [1.0, 0.3, -2.0])
def test_a_weight_of_one_or_less_takes_the_prompts_velocity(w):
    pos, neg = draw(0), draw(1)
    assert torch.equal(guide(pos, neg, w), pos)


def test_rows_that_are_not_guided_keep_their_own_velocity():
    pos, neg = draw(0), draw(1)
    out = guide(pos, neg, 4.0, torch.tensor([False, True, False, True]))
    assert torch.equal(out[::2], pos[::2])
    assert torch.equal(out[1::2], guide(pos, neg, 4.0)[1::2])
