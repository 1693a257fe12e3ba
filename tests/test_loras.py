"""LoRA: a stream with one draws what the pipeline draws with it, whatever was loaded, weighed, fused or unloaded before; and
what fails leaves the stream as it was."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import PROMPT, noises, relative_error, slow, streamed
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from random_pipelines import random_pipeline

from streamflow import StreamFlow

ATTENTION = ["to_q", "to_v"]
TARGETS = {
    "sd3": {"transformer": ATTENTION, "text_encoder": ["q_proj"], "text_encoder_2": ["q_proj", "fc1"]},
    "flux": {"transformer": ATTENTION, "text_encoder": ["v_proj"]},
    "instaflow": {"unet": ATTENTION, "text_encoder": ["q_proj", "v_proj"]},
    "network": {"transformer": ATTENTION},
}
GUIDANCE = {"sd3": {"guidance_scale": 1.0}, "flux": {}}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """`lora(family, name, parts)`: a folder that `save_lora_weights` wrote, a random LoRA for these parts."""
    made = {}

    def get(family: str, name: str, parts: str | None = None) -> str:
        key = family, name, parts
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp(name))
            write_lora(random_pipeline(family), TARGETS[parts or family], made[key], seed=len(made))
        return made[key]

    return get


def write_lora(pipe, targets, folder, seed):
    torch.manual_seed(seed)
    layers = {}
    for part, names in targets.items():
        network = getattr(pipe, part)
        network.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=names, init_lora_weights=False))
        tensors = get_peft_model_state_dict(network)
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(tensors) if part.startswith("text") else tensors
    type(pipe).save_lora_weights(folder, **layers)


@pytest.fixture
def own_stream():
    """`own_stream(family, steps)`: a prepared stream over a copy of a random pipeline, which may be changed."""

    def make(family: str = "sd3", steps: int = 2, **options) -> StreamFlow:
        named = {"family": "instaflow"} if family == "instaflow" else {}
        options = {"cfg_type": "none", **named, **options}
        stream = StreamFlow(random_pipeline(family), range(steps), **options)
        stream.prepare(PROMPT, num_inference_steps=steps)
        return stream

    return make


def drawn_by_pipe(pipe, stream):
    """What the pipe itself draws from the stream's noise, or, where it is no reference, a fresh stream of it."""
    x = noises(stream, 2)
    if pipe.__class__.__name__ == "StableDiffusionPipeline":
        fresh = StreamFlow(pipe, range(2), cfg_type="none", family="instaflow")
        fresh.prepare(PROMPT, num_inference_steps=2)
        fresh.velocity = fresh.adapter.row_by_row(False)
        return streamed(fresh, x)
    family = "flux" if "Flux" in pipe.__class__.__name__ else "sd3"
    call = {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        **GUIDANCE[family],
    }
    return torch.cat([pipe(latents=one, **call).images for one in x.split(1)])


def modules(stream):
    return [id(m) for part in stream.pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]


@pytest.mark.parametrize("family", ["sd3", slow("flux"), slow("instaflow")])
def test_the_stream_draws_what_the_pipeline_with_the_same_loras_draws(own_stream, lora, family):
    stream, pipe = own_stream(family), random_pipeline(family)
    stream.velocity = stream.adapter.row_by_row(False)
    x, tree = noises(stream, 2), modules(stream)
    plain = streamed(stream, x)
    folders = [lora(family, "a"), lora(family, "b")]

    def check():
        drawn = streamed(stream, x)
        assert torch.equal(drawn, drawn_by_pipe(pipe, stream))
        return drawn

    assert stream.load_lora(folders[0]) == "default_0"
    pipe.load_lora_weights(folders[0], adapter_name="default_0")
    assert relative_error(check(), plain) > 1e-3

    assert stream.load_lora(folders[1], "b") == "b" and stream.loras == ("default_0", "b")
    pipe.load_lora_weights(folders[1], adapter_name="b")
    check()

    stream.set_adapters({"default_0": 0.7, "b": -0.3})
    pipe.set_adapters(["default_0", "b"], [0.7, -0.3])
    both = check()

    stream.fuse_lora()
    pipe.fuse_lora(components=list(TARGETS[family]))
    assert relative_error(check(), both) < 1e-5
    with pytest.raises(RuntimeError, match=r"LoRA 'b' is fused into the weights: unfuse_lora\(\) first"):
        stream.unload_lora("b")
    stream.unfuse_lora()
    assert relative_error(streamed(stream, x), both) < 1e-5

    stream.unload_lora("default_0")
    assert stream.loras == ("b",)
    stream.unload_lora("b")
    assert stream.loras == () and modules(stream) == tree
    assert relative_error(streamed(stream, x), plain) < 1e-5  # not to the bit: fused and taken out again


def test_without_fusing_the_networks_are_what_they_were(own_stream, lora):
    stream = own_stream()
    x, tree = noises(stream, 2), modules(stream)
    plain = streamed(stream, x)
    stream.load_lora(lora("sd3", "a"))
    stream.unload_lora()
    assert torch.equal(streamed(stream, x), plain) and modules(stream) == tree


def test_frames_in_flight_take_the_network_and_new_ones_the_prompt_too(own_stream, lora):
    """A swap while rows are in flight, from another thread; frames that enter afterwards equal a stream that had it from
    the first."""
    stream, reference = own_stream(steps=3), own_stream(steps=3)
    x = noises(stream, 6)
    plain = streamed(stream, x)
    stream.prepare(PROMPT, num_inference_steps=3)
    reference.load_lora(lora("sd3", "a"))
    groups = [stream.predict_x0_batch(one) for one in x[:4].split(1)]
    thread = threading.Thread(target=stream.load_lora, args=(lora("sd3", "a"),))
    thread.start()
    thread.join()
    groups += [stream.predict_x0_batch(one) for one in x[4:].split(1)]
    drawn = torch.cat([group for group in groups if group is not None] + stream.flush())
    assert torch.equal(drawn[:2], plain[:2])
    assert not any(torch.equal(drawn[k], plain[k]) for k in (2, 3))
    assert relative_error(drawn[4:], streamed(reference, x[4:])) < 1e-5


def test_a_tick_is_not_changed_in_its_middle(own_stream, lora):
    stream = own_stream()
    thread = threading.Thread(target=stream.load_lora, args=(lora("sd3", "a"), "a"))
    seen = []

    def while_it_runs(network, args, kwargs):
        if not thread.ident:
            thread.start()
            thread.join(0.5)
            seen.append((thread.is_alive(), stream.loras))

    with stream.unet.register_forward_pre_hook(while_it_runs, with_kwargs=True):
        stream.predict_x0_batch(noises(stream, 1))
    thread.join()
    assert seen == [(True, ())] and stream.loras == ("a",)


FAILS = {
    "another transformer": (lambda s, lora: s.load_lora(lora("flux", "a")), "does not fit StableDiffusion3Pipeline"),
    "its network alone": (lambda s, lora: s.load_lora(lora("flux", "n", "network")), r"\(2 of its 4 layers have a place"),
    "a UNet": (lambda s, lora: s.load_lora(lora("instaflow", "u")), "family that it was trained for"),
    "no LoRA at all": (lambda s, lora: s.load_lora({"weight": torch.ones(2)}), "does not fit StableDiffusion3Pipeline"),
    "a taken name": (lambda s, lora: s.load_lora(lora("sd3", "a"), "a"), r"named 'a': unload_lora\('a'\), another name, or"),
    "half of it too wide, swapped in place": (
        lambda s, lora: s.load_lora(WIDE, "a", hotswap=True),
        "StableDiffusion3Pipeline",
    ),
    "an unknown name": (lambda s, lora: s.set_adapters({"a": 1.0, "c": 1.0}), "no LoRA is named 'c': loaded are a"),
    "no number": (lambda s, lora: s.set_adapters({"a": float("nan")}), "a LoRA's weight must be finite, not nan"),
    "too few weights": (lambda s, lora: s.set_adapters(["a"], [0.1, 0.2]), "adapter names 1 is not equal to.* weights 2"),
    "unloading what is not there": (lambda s, lora: s.unload_lora("c"), "no LoRA is named 'c': loaded are a"),
    "fusing nothing": (lambda s, lora: s.fuse_lora(False, False), "choose the network, the text encoders or both"),
}
BLOCK = "transformer.transformer_blocks.{}.attn.to_q.lora_{}.weight"
WIDE = {BLOCK.format(i, m): torch.ones(n) for i, k in ((0, 32), (1, 48)) for m, n in (("A", (2, k)), ("B", (k, 2)))}


def test_what_fails_leaves_the_stream_as_it_was(own_stream, lora):
    stream, undisturbed = own_stream(steps=3), own_stream(steps=3)
    for one in (stream, undisturbed):
        one.load_lora(lora("sd3", "a", "network"), "a")
        one.set_adapters("a", 0.5)
    tree, x = modules(stream), noises(stream, len(FAILS))
    groups, expected = [], streamed(undisturbed, x)
    for one, (call, message) in zip(x.split(1), FAILS.values(), strict=True):
        groups.append(stream.predict_x0_batch(one))
        with pytest.raises(ValueError, match=message):
            call(stream, lora)
        assert modules(stream) == tree and stream.loras == ("a",)
    assert torch.equal(torch.cat([group for group in groups if group is not None] + stream.flush()), expected)


def test_a_hot_swap_moves_no_weights(own_stream, lora):
    stream, fresh = own_stream(), own_stream()
    stream.load_lora(lora("sd3", "a", "network"), "a")
    before = [p.data_ptr() for p in stream.unet.parameters()]
    stream.load_lora(lora("sd3", "other", "network"), "a", hotswap=True)
    assert [p.data_ptr() for p in stream.unet.parameters()] == before
    fresh.load_lora(lora("sd3", "other", "network"))
    x = noises(stream, 2)
    assert torch.equal(streamed(stream, x), streamed(fresh, x))


def test_where_a_lora_cannot_be_heard_it_is_refused(own_stream, lora):
    stream = StreamFlow(random_pipeline("sd3"), range(2), cfg_type="none")
    stream.accelerate("compile", fuse_qkv=True)
    with pytest.raises(RuntimeError, match=r"fuse_qkv=\.\.\.\) has changed the layers.*load and fuse_lora"):
        stream.load_lora(lora("sd3", "a"))
    stream.accelerate("none")
    stream.unet = copy.deepcopy(stream.unet)
    with pytest.raises(RuntimeError, match="not the pipe's own network"):
        stream.load_lora(lora("sd3", "a"))
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.unload_lora()


CHANGES = (
    lambda s, lora: s.load_lora(lora("sd3", "a"), "a"),
    lambda s, lora: s.set_adapters("a", 0.4),
    lambda s, lora: s.fuse_lora(),
    lambda s, lora: s.unfuse_lora(),
    lambda s, lora: s.unload_lora(),
)


@pytest.mark.slow
def test_loras_come_and_go_under_acceleration_and_over_devices(own_stream, lora):
    """torch.compile without a code generator, then copies of the network."""
    from streamflow.parallel.rows import shard_denoiser

    stream, plain = own_stream(), own_stream()
    x = noises(stream, 3)
    stream.accelerate("compile", backend="eager")
    for change in CHANGES:
        change(stream, lora)
        change(plain, lora)
        assert relative_error(streamed(stream, x), streamed(plain, x)) < 1e-5
    stream.accelerate("none")
    shard_denoiser(stream, ["cpu"] * 2)
    stream.load_lora(lora("sd3", "a"), "a")
    plain.load_lora(lora("sd3", "a"), "a")
    with pytest.raises(RuntimeError, match=r"have changed since.*shard_denoiser\(stream, devices\) again"):
        stream.predict_x0_batch(x[:1])
    stream.prepare(PROMPT, num_inference_steps=2)
    shard_denoiser(stream, ["cpu"] * 2)
    assert relative_error(streamed(stream, x), streamed(plain, x)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_graphs_are_captured_anew_for_a_lora(cuda_stream, lora):
    stream, plain = cuda_stream(steps=2), cuda_stream(steps=2)
    stream.accelerate("cuda-graph")
    x = noises(stream, 3)
    streamed(stream, x)
    for change in (
        lambda s: s.load_lora(lora("sd3", "a"), "a"),
        lambda s: s.set_adapters("a", 0.4),
        lambda s: s.unload_lora(),
    ):
        change(stream)
        change(plain)
        assert relative_error(streamed(stream, x), streamed(plain, x)) < 1e-3
