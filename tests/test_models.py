"""The family table: who speaks for whom, what is refused, and how a family is added."""

import copy
import inspect

import pytest
import torch
from conftest import FAMILIES, PROMPT
from random_pipelines import random_pipeline, random_tiny_vae

from streamflow import StreamFlow, models


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    monkeypatch.setattr(models, "PIPELINES", dict(models.PIPELINES))


def test_every_entry_of_the_table_names_a_diffusers_class_and_an_adapter():
    import diffusers

    from streamflow.models.adapter import FlowAdapter

    for family in models.FAMILIES:
        adapter = models.adapter_class(family)
        if family == "fallback":  # of any pipeline
            continue
        assert issubclass(adapter, FlowAdapter), family
        kinds = {parameter.kind for parameter in inspect.signature(adapter.Velocity.forward).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD in kinds, f"{family} passes no extra arguments to its network"
        assert hasattr(diffusers, adapter.text_pipeline) and hasattr(diffusers, adapter.image_pipeline)
    elsewhere = {"RectifiedFlowPipeline"}  # InstaFlow's own repository
    assert {name for name in models.PIPELINES if not hasattr(diffusers, name)} <= elsewhere
    assert set(models.PIPELINES.values()) <= set(models.FAMILIES)


def test_a_diffusion_model_is_refused_with_what_to_pass(pipes):
    with pytest.raises(ValueError, match="diffusion model, not a flow.*family='instaflow'"):
        StreamFlow(pipes("instaflow"), [0])
    with pytest.raises(ValueError, match="diffusion model, not a flow.*family='sdxl'"):
        StreamFlow(pipes("sdxl"), [0])


def test_unknown_classes_and_families_list_the_known(pipes):
    pipe = copy.copy(pipes("sd3"))
    pipe.__class__ = type("SomethingElsePipeline", (type(pipe).__mro__[1],), {})
    with pytest.raises(ValueError, match="SomethingElsePipeline.*FluxPipeline.*StableDiffusion3Pipeline"):
        models.adapter_for(pipe)
    with pytest.raises(ValueError, match="unknown family 'sd4'.*flux, .*instaflow, .*sd3"):
        models.adapter_for(pipes("sd3"), "sd4")
    with pytest.raises(ValueError, match="has no unet"):
        models.adapter_for(pipes("sd3"), "instaflow")


def test_a_subclass_of_a_known_pipeline_is_known(pipes):
    pipe = copy.copy(pipes("sd3"))
    pipe.__class__ = type("MyPipeline", (type(pipe),), {})
    assert type(models.adapter_for(pipe)).__name__ == "StableDiffusion3"


def test_register_adds_a_family_and_family_overrides(pipes, table):
    from streamflow.models.families.sd3 import StableDiffusion3

    class Mine(StableDiffusion3):
        """The opposite sign, so that it is told apart."""

        class Velocity(StableDiffusion3.Velocity):
            def forward(self, *args, **kwargs):
                return -super().forward(*args, **kwargs)

    models.register("mine", Mine, ("MinePipeline",))
    own, plain = StreamFlow(pipes("sd3"), [0], family="mine"), StreamFlow(pipes("sd3"), [0])
    for stream in (own, plain):
        stream.prepare(PROMPT, num_inference_steps=4)
    noise = own.frame_noise(0)
    times = own.sub_timesteps_tensor
    assert torch.equal(own.unet_step(noise, times)[1], -plain.unet_step(noise, times)[1])
    pipe = copy.copy(pipes("sd3"))
    pipe.__class__ = type("MinePipeline", (type(pipe),), {})
    assert isinstance(models.adapter_for(pipe), Mine)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_pipelines_are_a_function_of_their_seed(family):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b, c = random_pipeline(family), random_pipeline(family), random_pipeline(family, seed=1)
    assert torch.equal(torch.get_rng_state(), before)

    def weights(pipe):
        network = getattr(pipe, "transformer", None) or pipe.unet
        return torch.cat([p.flatten() for p in network.parameters()])

    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))
    assert all(parameter.any() for parameter in (getattr(a, "transformer", None) or a.unet).parameters())


def test_random_pipelines_say_which_families_they_know():
    with pytest.raises(ValueError, match="sd3, flux, schnell, instaflow"):
        random_pipeline("sd4")


def test_a_vae_of_another_kind_is_refused(stream_of):
    stream = stream_of("sd3")
    before = stream.vae
    with pytest.raises(ValueError, match="4 latent channels.*16"):
        stream.vae = random_tiny_vae(4)
    assert stream.vae is before


def test_the_probe_sees_what_the_network_is_given(pipes):
    """Masks, ids and embedded guidance reach the network exactly as in the pipeline's own call."""
    from streamflow.models.probe import record

    pipe = pipes("flux")
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    arguments = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 2.5, "height": 64, "width": 64}
    pipe(**arguments, output_type="latent")
    hook.remove()
    recording = record(pipe, "transformer", "hidden_states", **arguments)
    (call,) = recording.calls
    for name in ("encoder_hidden_states", "pooled_projections", "guidance", "txt_ids", "img_ids", "timestep"):
        assert torch.equal(call[name], seen[0][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "model,network,vae,tiny", [("sdxl", 2567.46e6, 83.65e6, 2.445e6), ("sana", 1604.46e6, 312.25e6, 3.95e6)]
)
def test_the_full_sizes_of_further_families_are_the_published_ones(model, network, vae, tiny):
    from streamflow.benchmark import full_size as sizes

    def count(module):
        return sum(p.numel() for p in module.parameters())

    pipe = sizes.full_size(model, "meta")
    adapter = models.adapter_for(pipe, sizes.size_of(model).family)
    found = count(adapter.net), count(pipe.vae), count(sizes.full_size_tiny_vae(model, "meta"))
    assert found == pytest.approx((network, vae, tiny), rel=2e-3)
    assert set(sizes.prompt_arguments(model, "cpu")) <= set(adapter._parameters())
