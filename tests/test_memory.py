"""Little memory: weights that are quantised on their way to the device, without a plain copy, and text encoders that stay on
the CPU."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from weakref import ref

import pytest
import torch
from conftest import needs_torchao, noises, relative_error, slow, streamed
from random_pipelines import random_pipeline
from torch import nn

from streamflow import StreamFlow, StreamFlowWrapper
from streamflow.acceleration import quantize as quantizing
from streamflow.acceleration.compile import Options, repeated_blocks
from streamflow.acceleration.memory import place
from streamflow.acceleration.quantize import FEW_ROWS, count_rows
from streamflow.models.pipe_parts import quantized_kinds

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "benchmark" / "memory.py"
INT8 = {"quantize": "int8", "backend": "eager"}  # dynamo's own tracing, without inductor's minutes
DEEP = {"num_layers": 4}
pytestmark = pytest.mark.usefixtures("small_matrices")


def stream_of(pipe) -> StreamFlow:
    stream = StreamFlow(pipe, range(2), cfg_type="none")
    stream.prepare("a red apple", num_inference_steps=2)
    return stream


def drawn(stream) -> torch.Tensor:
    return streamed(stream, noises(stream, 2))


@pytest.mark.slow
@needs_torchao
def test_a_placed_network_draws_what_a_quantised_one_draws():
    plain, stream = stream_of(random_pipeline("sd3", **DEEP)), stream_of(random_pipeline("sd3", **DEEP))
    stream.accelerate("compile", **INT8)
    placed = stream_of(place(random_pipeline("sd3", **DEEP), "cpu", quantize="int8"))
    assert quantized_kinds(placed.unet) == {"int8"} and not quantized_kinds(stream.unet)
    assert torch.equal(drawn(placed), drawn(stream))
    assert 0 < relative_error(drawn(placed), drawn(plain)) < 0.03
    placed.accelerate("none")  # nothing was quantised by the stream, so there is nothing to put back
    assert torch.equal(drawn(placed), drawn(stream))


@needs_torchao
@pytest.mark.slow
def test_plain_weights_are_dropped_and_what_needs_them_is_refused():
    pipe = random_pipeline("sd3", **DEEP)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    stream, kept = stream_of(pipe), ref(layer.weight)
    stream.accelerate("compile", **INT8, keep_plain=False)
    before = drawn(stream)
    assert kept() is None and quantized_kinds(stream.unet) == {"int8"}
    for kind, options in (("none", {}), ("compile", {"backend": "eager"}), ("compile", INT8)):
        with pytest.raises(RuntimeError, match=r"quantised to int8 without keeping the plain ones.*load the pipe again"):
            stream.accelerate(kind, **options)
    with pytest.raises(RuntimeError, match=r"to which LoRAs belong: load the pipe again, call its load_lora_weights"):
        stream.load_lora("lora.safetensors")
    assert torch.equal(drawn(stream), before), "after an error it draws as before"
    stream.accelerate("compile", **INT8, keep_plain=False, fullgraph=False)
    stream.vae = stream.pipe.vae  # accelerates anew
    assert torch.equal(drawn(stream), before)
    stream.close()
    assert torch.equal(drawn(stream_of(pipe)), before), "the pipe stays quantised"


NAMED = ("qwenimage", *map(slow, ("sd3", "flux", "flux2-klein", "lumina2", "zimage", "bria-fibo", "chroma", "sana")))


@pytest.mark.parametrize("family", NAMED)
def test_modulation_is_known_by_its_name(family, monkeypatch):
    """The layers that `place` chooses by name are those that see many rows in a call."""
    monkeypatch.setattr(quantizing, "FEATURES", 4)
    monkeypatch.setattr(quantizing, "MULTIPLE", 4)
    monkeypatch.setattr("streamflow.acceleration.compile.REPEATS", 1)
    monkeypatch.setattr("streamflow.acceleration.compile.BLOCK_SHARE", 0)
    stream = StreamFlow(random_pipeline(family), range(4), cfg_type="none")
    stream.prepare("a red apple", num_inference_steps=4)
    part = stream.parts().velocity
    large = list(quantizing._large(repeated_blocks(part.module)))
    rows = count_rows(part, [layer for _, layer in large])
    assert large
    assert {name for name, layer in large if rows.get(layer, 0) < 16} == {n for n, _ in large if FEW_ROWS.search(n)}


def test_what_cannot_be_placed_is_refused_with_the_remedy():
    pipe = random_pipeline("sd3", **DEEP)
    with pytest.raises(ValueError, match="keeps text encoders off a GPU, and the device is cpu: leave it out"):
        place(pipe, "cpu", offload_text_encoders=True)
    with pytest.raises(RuntimeError, match="quantize='fp8' needs a CUDA device"):
        place(pipe, "cpu", quantize="fp8")
    with pytest.raises(ValueError, match="keep_plain=False is for quantised weights: pass quantize=, one of fp8"):
        Options(keep_plain=False)
    with pytest.raises(ValueError, match="fuse_qkv=True keeps the plain weights of projections"):
        Options(quantize="int8", keep_plain=False, fuse_qkv=True)
    assert not quantized_kinds(pipe.transformer)


@needs_torchao
def test_networks_without_blocks_and_with_adapters_are_refused():
    from peft import LoraConfig

    with pytest.raises(ValueError, match="finds no repeated blocks with Linear layers of 32 or more features"):
        place(random_pipeline("instaflow"), "cpu", quantize="int8", family="instaflow")
    pipe = random_pipeline("sd3", **DEEP)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match=r"adapters \(LoRA\): fuse_lora\(\)"):
        place(pipe, "cpu", quantize="int8")


def test_text_encoders_that_move_layer_by_layer_encode_the_same():
    """On a CPU layers are copied without a stream; the hooks are the same as on a GPU."""
    from diffusers.hooks import apply_group_offloading

    pipe, cpu = random_pipeline("sd3"), torch.device("cpu")
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            apply_group_offloading(part, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    stream, plain = stream_of(pipe), stream_of(random_pipeline("sd3"))
    for one in (stream, plain):
        one.update_prompt("a blue fox")
    assert torch.equal(stream.prompt_embeds, plain.prompt_embeds) and torch.equal(drawn(stream), drawn(plain))


@needs_torchao
@pytest.mark.slow
def test_a_wrapper_loads_and_quantises_layer_by_layer(monkeypatch):
    monkeypatch.setattr(quantizing, "FEATURES", 256)
    how = {"acceleration": "compile", "acceleration_options": {**INT8, "keep_plain": False}}
    own = {"mode": "txt2img", "cfg_type": "none", "device": "cpu", "output_type": "pt", "warmup": 0}
    prepare = {"prompt": "a fox, 3d render", "num_inference_steps": 4}
    with (
        StreamFlowWrapper("embedded", **own, **how, prepare=prepare) as wrapper,
        StreamFlowWrapper("embedded", **own, acceleration="none", prepare=prepare) as plain,
    ):
        assert quantized_kinds(wrapper.stream.unet) == {"int8"}
        error = (wrapper() - plain()).square().mean()
        assert 0 < error < 1e-4  # 40 dB
    with pytest.raises(ValueError, match="keeps text encoders off a GPU"):
        StreamFlowWrapper("embedded", **own, offload_text_encoders=True)


@pytest.mark.slow
def test_the_script_measures_and_makes_its_table(tmp_path, capsys):
    main, output = runpy.run_path(str(SCRIPT))["main"], tmp_path / "memory.json"
    assert main(["--models", "tiny", "--ways", "plain", "--device", "cpu", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["model"] == "tiny" and row["way"] == "plain" and row["prompt_s"] > 0 and row["images_per_s"] > 0
    assert "| tiny |" in capsys.readouterr().out
