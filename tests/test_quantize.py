"""Eight-bit matrices: which layers they take, how far the images move, the weights back to the bit, and who is refused."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_torchao, noises, relative_error, streamed
from random_pipelines import random_pipeline, random_tiny_vae
from torch import nn

from streamflow import StreamFlow, models
from streamflow.acceleration import Part
from streamflow.acceleration import quantize as quantizing
from streamflow.acceleration.compile import Options, fuse_projections, repeated_blocks
from streamflow.acceleration.quantize import KINDS, quantize, require
from streamflow.acceleration.watch import Watch

FURTHER = Path(__file__).resolve().parent.parent / "examples" / "benchmark" / "further.py"
GRAPHLESS = {"backend": "eager"}  # dynamo's own tracing, without inductor's minutes
pytestmark = pytest.mark.usefixtures("small_matrices")


@pytest.fixture
def stream():
    pipe = random_pipeline("sd3", num_layers=4)
    pipe.vae = random_tiny_vae(16)
    stream = StreamFlow(pipe, [0, 1, 2, 3], cfg_type="none")
    stream.prepare("a red apple", num_inference_steps=4)
    return stream


@pytest.fixture
def part(stream) -> Part:
    return stream.parts().velocity


def eight_bit(module: nn.Module) -> dict[str, nn.Module]:
    from torchao.utils import TorchAOBaseTensor

    return {n: m for n, m in module.named_modules() if isinstance(getattr(m, "weight", None), TorchAOBaseTensor)}


def latents(stream, n: int = 4) -> torch.Tensor:
    return streamed(stream, noises(stream, n))


@pytest.mark.slow
@needs_torchao
def test_a_quantised_stream_draws_nearly_the_same_and_gets_its_weights_back(stream):
    before, weights = latents(stream), dict(stream.unet.named_parameters())
    values = {name: p.clone() for name, p in weights.items()}
    stream.accelerate("compile", quantize="int8", **GRAPHLESS)
    assert eight_bit(stream.unet)
    assert 0 < relative_error(latents(stream), before) < 0.03
    stream.accelerate("none")
    after = dict(stream.unet.named_parameters())
    assert list(after) == list(weights) and all(after[name] is p for name, p in weights.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert torch.equal(latents(stream), before)


@needs_torchao
def test_only_large_layers_that_see_many_rows_are_taken(part):
    blocks = repeated_blocks(part.module)
    undo = quantize(part, blocks, "int8")
    taken = eight_bit(part.module)
    inside = {id(m) for block in blocks for m in block.modules()}
    assert all(id(m) in inside for m in taken.values())
    assert any(name.endswith("attn.to_q") for name in taken) and any(".ff." in name for name in taken)
    assert not any("norm" in name for name in taken)  # modulation: one row an image
    undo()
    assert not eight_bit(part.module)


@needs_torchao
def test_joined_projections_are_taken_in_the_place_of_their_parts(part):
    unfuse = fuse_projections(part)
    undo = quantize(part, repeated_blocks(part.module), "int8")
    names = set(eight_bit(part.module))
    assert any(name.endswith("attn.to_qkv") for name in names) and not any(name.endswith("attn.to_q") for name in names)
    undo()
    unfuse()
    assert not eight_bit(part.module)


@needs_torchao
def test_a_watch_sees_quantised_weights_move(part):
    quantize(part, repeated_blocks(part.module), "int8")
    watch = Watch(part.module)
    assert not watch.changed()
    weight = next(iter(eight_bit(part.module).values())).weight
    weight.qdata = weight.qdata.clone()
    assert watch.changed()
    watch.renew()
    torch.utils.swap_tensors(weight, nn.Parameter(weight.dequantize(), requires_grad=False))  # what `module.to` may do
    assert watch.changed()


@needs_torchao
@pytest.mark.slow
def test_the_embedded_model_in_eight_bits_keeps_its_images(monkeypatch):
    monkeypatch.setattr(quantizing, "FEATURES", 256)
    stream = StreamFlow(models.load(), range(4), cfg_type="none")
    stream.prepare("a fox, 3d render", num_inference_steps=4, max_sequence_length=0)
    before = stream.decode_image(latents(stream)) / 2
    stream.accelerate("compile", quantize="int8", **GRAPHLESS)
    error = (stream.decode_image(latents(stream)) / 2 - before).square().flatten(1).mean(1).max().item()
    assert 40 < -10 * math.log10(error) < 80


@pytest.mark.slow
def test_the_script_measures_what_runs_and_records_what_does_not(capsys):
    command = "--model embedded --device cpu --backend eager --width 64 --height 64 --variants fuse_qkv,math,fp8"
    quick = "--rounds 1 --frames 1 --round-seconds 0.01"
    assert runpy.run_path(str(FURTHER))["main"]([*command.split(), *quick.split()]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["variants"]
    assert list(found) == ["baseline", "fuse_qkv", "math", "fp8", "baseline again"]
    assert "changes what this network computes" in found["fuse_qkv"]["failed"] and "not cpu" in found["fp8"]["failed"]
    assert found["math"]["difference"]["largest"] < 1e-4 and found["math"]["tick_ms"]["median"] > 0
    assert found["baseline again"]["difference"]["largest"] == 0.0


def test_adapters_are_refused(part):
    from peft import LoraConfig

    network = next(m for m in part.module.modules() if hasattr(m, "add_adapter"))
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match=r"adapters \(LoRA\): fuse_lora\(\)"):
        quantize(part, repeated_blocks(network), "int8")


def test_networks_without_repeated_blocks_are_refused(stream_of):
    part = stream_of("instaflow").parts().velocity
    with pytest.raises(ValueError, match=r"RectifiedUNetVelocity has \d+% of its weights in Linear layers"):
        quantize(part, repeated_blocks(part.module), "int8")


def test_networks_whose_layers_are_too_small_or_of_another_dtype_are_refused(part, monkeypatch):
    blocks = repeated_blocks(part.module)
    with pytest.raises(ValueError, match=r"takes weights in torch.bfloat16, and there are some in torch.float32: cast"):
        quantize(part, blocks, "fp8")
    monkeypatch.setattr(quantizing, "ROWS", 10**6)
    with pytest.raises(ValueError, match=r"with 1000000 or more rows: the largest of \d+ has 32, and \d+ are large enough"):
        quantize(part, blocks, "int8")


def test_rows_are_counted_until_every_layer_has_enough():
    """The call ends there: it may draw a whole video."""
    layers, calls = [nn.Linear(4, 4), nn.Linear(4, 4)], []

    def draw(_):
        for rows in (quantizing.ROWS - 1, quantizing.ROWS, 10**6):
            calls.append(rows)
            for layer in layers[: len(calls)]:
                layer(torch.zeros(rows, 4))

    rows = quantizing.count_rows(Part("velocity", nn.Identity(), {}, warm_up=draw), layers)
    assert [rows[layer] for layer in layers] == [quantizing.ROWS] * 2 == calls[1:] * 2


def test_rows_of_blocks_that_are_compiled_already_are_counted(part):
    blocks = repeated_blocks(part.module)
    rows = quantizing.count_rows(part, layers := [m for m in blocks[0].modules() if isinstance(m, nn.Linear)])
    for block in blocks:
        block.compile(**GRAPHLESS)
    part.call()
    assert quantizing.count_rows(part, layers) == rows and rows


@pytest.mark.parametrize("kind", ["fp8", "fp8-tensor"])
def test_a_gpu_that_cannot_is_told_what_it_can(monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    with pytest.raises(RuntimeError, match=r"capability 8\.9 or more, and A card has 8\.0: it can do int8"):
        require(kind, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="needs a CUDA device of capability 8.9 or more, not cpu"):
        Options(quantize=kind).for_device(torch.device("cpu"))


def test_what_is_unknown_or_not_installed_is_named(monkeypatch):
    with pytest.raises(ValueError, match=f"unknown quantize 'int7': choose one of {', '.join(KINDS)}"):
        Options(quantize="int7").for_device(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r'pip install "streamflow-rf\[quantize\]"'):
        require("int8", torch.device("cpu"))
    with pytest.raises(ValueError, match="takes a mode or options"):
        Options(mode="max-autotune", options={"max_autotune": True})
