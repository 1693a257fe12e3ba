"""Acceleration from outside: the same images, the plain modules untouched once it is undone, and errors that say what."""

import hashlib
import warnings

import pytest
import torch
from conftest import noises, streamed
from random_pipelines import random_pipeline, random_tiny_vae
from torch import nn

from streamflow import StreamFlow, acceleration
from streamflow.acceleration import Part, compile, cuda_graph
from streamflow.acceleration.compile import CompiledCall, Options, compile_part, repeated_blocks, repeated_classes
from streamflow.acceleration.cuda_graph import Graphed, signature
from streamflow.acceleration.watch import Watch

GRAPHLESS = {"backend": "eager"}  # dynamo's own tracing, without inductor's minutes


@pytest.fixture
def own_stream():
    """A stream over a pipeline of its own, since acceleration acts in place; with a tiny VAE, which is traced sooner."""

    def make(family="sd3", *, prepare=True, changes=None, tiny=True, **options):
        pipe = random_pipeline(family, **(changes or {}))
        if tiny:
            pipe.vae = random_tiny_vae(pipe.vae.config.latent_channels)
        more = {"family": "instaflow"} if family == "instaflow" else {}
        stream = StreamFlow(pipe, [0, 1, 2, 3], cfg_type="none", **more, **options)
        if prepare:
            stream.prepare("a red apple", num_inference_steps=4)
        return stream

    return make


def fingerprint(*modules: nn.Module) -> str:
    """Names, bytes and layout of all weights."""
    seen = hashlib.blake2b()
    for module in modules:
        for name, value in module.state_dict().items():
            seen.update(f"{name} {tuple(value.shape)} {value.stride()}".encode())
            seen.update(value.contiguous().numpy().tobytes())
    return seen.hexdigest()


def drawn(stream, n=5):
    latents = streamed(stream, noises(stream, n))
    return (stream.decode_image(latents) + 1) / 2


@pytest.mark.parametrize(
    "family,options",
    [
        pytest.param("sd3", {}, marks=pytest.mark.slow),
        pytest.param("flux", {}, marks=pytest.mark.slow),
        pytest.param("instaflow", {}, marks=pytest.mark.slow),
        pytest.param("sd3", {"fuse_qkv": True}, marks=pytest.mark.slow),
        pytest.param("instaflow", {"fuse_qkv": True}, marks=pytest.mark.slow),
        pytest.param("flux", {"channels_last": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_draws_the_same_and_can_be_undone(own_stream, family, options):
    stream = own_stream(family, tiny=family == "flux")
    before, weights = drawn(stream), fingerprint(stream.unet, stream.vae)
    stream.accelerate("compile", **GRAPHLESS, **options)
    assert stream.acceleration == "compile"
    assert (drawn(stream) - before).abs().max() <= 4 / 255
    stream.accelerate("none")
    assert stream.acceleration == "none"
    assert fingerprint(stream.unet, stream.vae) == weights
    assert torch.equal(drawn(stream), before)


@pytest.mark.slow
def test_images_go_in_through_the_compiled_encoder_too(own_stream, picture):
    stream = own_stream()
    before = stream.encode_image(stream.preprocess(picture()))
    stream.accelerate("compile", **GRAPHLESS)
    assert torch.allclose(stream.encode_image(stream.preprocess(picture())), before, atol=1e-5)


@pytest.mark.slow
def test_before_prepare_it_takes_effect_there(own_stream):
    stream = own_stream(prepare=False)
    stream.accelerate("compile", **GRAPHLESS)
    plain = stream.velocity
    assert plain is stream.adapter.velocity
    stream.prepare("a red apple", num_inference_steps=4)
    assert stream.velocity is not plain
    reference = own_stream()
    assert torch.allclose(drawn(stream), drawn(reference), atol=1e-5)


def test_an_update_reaches_the_compiled_network(own_stream):
    fast, plain = own_stream(), own_stream()
    fast.accelerate("compile", **GRAPHLESS)
    for stream in (fast, plain):
        drawn(stream)
        stream.update(prompt="a boat with a longer name", seed=7)
        stream.update(t_index_list=[0, 2])
    assert torch.allclose(drawn(fast), drawn(plain), atol=1e-5)


@pytest.mark.slow
def test_another_network_or_vae_is_accelerated_in_its_place(own_stream):
    stream, other = own_stream(), random_pipeline("sd3", seed=1)
    stream.accelerate("compile", **GRAPHLESS)
    stream.vae = random_tiny_vae(16, seed=1)
    stream.unet = other.transformer
    assert stream.velocity is not stream.adapter.velocity
    expected = own_stream()
    expected.unet, expected.vae = other.transformer, random_tiny_vae(16, seed=1)
    assert torch.allclose(drawn(stream), drawn(expected), atol=1e-5)


@pytest.mark.slow
def test_closing_leaves_the_pipe_as_it_was(own_stream):
    stream = own_stream("instaflow")
    weights = fingerprint(stream.pipe.unet, stream.pipe.vae)
    stream.accelerate("compile", **GRAPHLESS)
    assert fingerprint(stream.pipe.unet, stream.pipe.vae) != weights  # channels last
    stream.close()
    assert fingerprint(stream.pipe.unet, stream.pipe.vae) == weights


def test_a_failure_leaves_the_stream_plain(own_stream, monkeypatch):
    stream = own_stream()
    weights = fingerprint(stream.unet, stream.vae)
    monkeypatch.setattr(type(stream.unet), "forward", _breaks_the_graph(type(stream.unet).forward))
    with pytest.raises(RuntimeError, match="fullgraph=False"):
        stream.accelerate("compile", **GRAPHLESS, regional=False)
    assert stream.acceleration == "none" and stream.velocity is stream.adapter.velocity
    assert fingerprint(stream.unet, stream.vae) == weights
    stream.accelerate("compile", **GRAPHLESS, regional=False, fullgraph=False)
    assert drawn(stream).isfinite().all()


@pytest.mark.filterwarnings("ignore:torch.compile does not trace this")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_an_error_of_the_network_is_raised_as_it_is(own_stream, monkeypatch, fullgraph):
    def forward(self, hidden_states, *args, **kwargs):
        warnings.warn("torch.compile does not trace this", stacklevel=2)
        raise ValueError(f"no mask for {hidden_states.shape[0]} rows")

    stream = own_stream()
    monkeypatch.setattr(type(stream.unet), "forward", forward)
    with pytest.raises(ValueError, match="no mask for 4 rows"):
        stream.accelerate("compile", **GRAPHLESS, regional=False, fullgraph=fullgraph)
    assert stream.acceleration == "none"


def _breaks_the_graph(forward):
    def broken(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    return broken


def test_blocks_that_repeat_are_found_where_they_hold_most_weights():
    flux = random_pipeline("flux", num_layers=4, num_single_layers=4).transformer
    assert [type(b).__name__ for b in repeated_blocks(flux)] == ["FluxTransformerBlock"] * 4 + [
        "FluxSingleTransformerBlock"
    ] * 4
    assert repeated_blocks(random_pipeline("instaflow").unet) == []
    assert repeated_blocks(random_pipeline("flux").transformer) == []  # one of each does not repeat


@pytest.mark.slow
def test_regional_compilation_is_undone(own_stream):
    stream = own_stream("flux", changes={"num_layers": 4, "num_single_layers": 4})
    before = drawn(stream)
    stream.accelerate("compile", **GRAPHLESS)
    blocks = repeated_blocks(stream.unet)
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert (drawn(stream) - before).abs().max() <= 4 / 255
    stream.accelerate("none")
    assert all(block._compiled_call_impl is None for block in blocks)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_stay_compiled_until_the_last_stream_of_a_network_has_undone_it(order):
    """Then they are as the user has left them."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].compile(backend="eager")
    own = network[0]._compiled_call_impl
    part = Part("velocity", network, {"x": torch.zeros(1, 2)}, blocks=list(network))
    undo = [compile_part(part, Options(backend="eager"))[1] for _ in range(2)]
    undo[order[0]]()
    assert all(isinstance(block._compiled_call_impl, CompiledCall) for block in network)
    undo[order[1]]()
    assert [block._compiled_call_impl for block in network] == [own, None]


def test_a_unets_repeated_classes_hold_most_of_its_weights():
    unet = random_pipeline("instaflow", layers_per_block=3).unet
    assert {type(block).__name__ for block in repeated_classes(unet)} == {"ResnetBlock2D", "Transformer2DModel"}
    assert repeated_classes(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


@pytest.mark.slow
def test_a_unet_is_compiled_by_its_repeated_classes(own_stream):
    stream = own_stream("instaflow", changes={"layers_per_block": 3})
    before = drawn(stream)
    stream.accelerate("compile", **GRAPHLESS, regional=True)
    blocks = repeated_classes(stream.unet)
    assert len(blocks) > 8 and all(block._compiled_call_impl is not None for block in blocks)
    assert (drawn(stream) - before).abs().max() <= 4 / 255
    stream.accelerate("none")
    assert all(block._compiled_call_impl is None for block in blocks)


@pytest.mark.parametrize(
    "kind,options,error,message",
    [
        ("fast", {}, ValueError, "unknown acceleration 'fast': choose one of none, auto, cuda-graph, compile, tensorrt"),
        ("none", {"limit": 3}, TypeError, "takes no options, and got limit"),
        ("compile", {"speed": 9}, TypeError, "has no option speed; it has cuda_graph, regional"),
        ("compile", {"regional": True, "backend": "eager"}, ValueError, "no repeated blocks"),
        ("cuda-graph", {"limit": 0}, ValueError, "1 or more, not 0"),
        ("cuda-graph", {}, RuntimeError, "need a CUDA device and this pipe is on cpu"),
        ("compile", {"cuda_graph": True}, RuntimeError, "need a CUDA device and this pipe is on cpu"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(own_stream, kind, options, error, message):
    stream = own_stream()
    before = drawn(stream)
    with pytest.raises(error, match=message):
        stream.accelerate(kind, **options)
    assert stream.acceleration == "none" and torch.equal(drawn(stream), before)


def test_auto_means_compile_on_cuda_and_nothing_elsewhere():
    assert acceleration.resolve("auto", torch.device("cuda")) == "compile"
    assert acceleration.resolve("auto", torch.device("cpu")) == "none"


def test_a_watch_sees_weights_that_move_and_not_values_that_change():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    watch = Watch(module)
    module[0].weight.data += 1
    assert not watch.changed()
    module[0].weight.data = module[0].weight.data.clone()
    assert watch.changed()
    watch.renew()
    assert not watch.changed()


def test_a_watch_sees_adapters_come_go_and_change_strength():
    from peft import LoraConfig

    network = random_pipeline("sd3").transformer
    watch = Watch(network)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    assert watch.changed()
    watch.renew()
    network.set_adapters("style", 0.5)
    assert watch.changed()
    watch.renew()
    network.fuse_lora()  # a graph captured before would apply it twice
    assert watch.changed()
    network.unfuse_lora()
    assert not watch.changed()
    network.disable_adapters()
    assert watch.changed()
    watch.renew()
    network.delete_adapters("style")
    assert watch.changed()


def test_a_graph_takes_tensors_only():
    with pytest.raises(TypeError, match="x is a list"):
        signature({"x": [1]})
    x = torch.zeros(2, 3)
    assert signature({"x": x, "y": None}) != signature({"x": x.half(), "y": None})
    assert signature({"x": x, "y": None}) != signature({"x": x[:1], "y": None})
    assert Graphed(nn.Identity()).captured == 0


@pytest.mark.slow
def test_inductor_draws_the_same_on_a_cpu(own_stream):
    stream = own_stream("sd3")
    before = drawn(stream)
    stream.accelerate("compile")
    assert (drawn(stream) - before).abs().max() <= 4 / 255


def test_what_waits_for_its_device_is_never_captured():
    plain = nn.Linear(2, 2)
    velocity = acceleration.Part("velocity", plain, {"x": torch.zeros(1, 2)}, capturable=False)
    others = (acceleration.Part(name, plain, {"x": torch.zeros(1, 2)}) for name in ("decoder", "encoder"))
    parts = acceleration.Parts(velocity, *others)
    with pytest.raises(RuntimeError, match="velocity: this Linear synchronises.*accelerate\\('compile'\\)"):
        cuda_graph.accelerate(parts, cuda_graph.Options())
    made = compile.accelerate(parts, compile.Options(cuda_graph=True, backend="eager"))
    assert [isinstance(made.modules[part.name], Graphed) for part in parts] == [False, True, True]
