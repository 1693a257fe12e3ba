"""onnxruntime on a CPU gives the same images, follows changes of weights, and can be undone."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from conftest import noises, streamed
from random_pipelines import random_pipeline, random_tiny_vae
from torch import nn

from streamflow import StreamFlow
from streamflow.acceleration import Part, openvino
from streamflow.acceleration.onnxruntime import NEEDS, Options, Sessions

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        not all(find_spec(name) for name in NEEDS),
        reason=f"{', '.join(NEEDS)} are not installed: python env/install.py --tensorrt-rtx",
    ),
]


def drawn(stream, n=3):
    return (stream.decode_image(streamed(stream, noises(stream, n))) + 1) / 2


@pytest.fixture
def stream():
    pipe = random_pipeline("sd3")
    pipe.vae = random_tiny_vae(pipe.vae.config.latent_channels)
    made = StreamFlow(pipe, [0, 1, 2, 3], cfg_type="none")
    made.prepare("a red apple", num_inference_steps=4)
    return made


def conv_part(rows: int = 2) -> Part:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU()).eval()
    return Part("decoder", module, {"input": torch.randn(rows, 3, 8, 8)}, free_size=True)


def assert_same(sessions, part, x):
    with torch.no_grad():
        assert torch.allclose(sessions(x), part.module(x), atol=1e-5)


@pytest.mark.slow
def test_the_same_images_until_it_is_undone(stream, picture):
    before, encoded = drawn(stream), stream.encode_image(stream.preprocess(picture()))
    stream.accelerate("onnxruntime")
    assert (drawn(stream) - before).abs().max() <= 2 / 255
    assert torch.allclose(stream.encode_image(stream.preprocess(picture())), encoded, atol=1e-4)
    sessions = stream.velocity
    stream.update(t_index_list=[0, 2])  # fewer rows need no session of their own
    fewer = drawn(stream)
    assert sessions is stream.velocity and sessions.kept == 1
    stream.accelerate("none")
    assert stream.velocity is stream.adapter.velocity
    assert (drawn(stream) - fewer).abs().max() <= 2 / 255
    stream.update(t_index_list=[0, 1, 2, 3])
    drawn(stream)  # what was in flight leaves first
    assert torch.equal(drawn(stream), before)


@pytest.mark.slow
def test_other_sizes_have_sessions_of_their_own_and_the_longest_unused_leaves():
    part = conv_part()
    sessions = Sessions(part, Options(threads=1, limit=1))
    for shape in ((2, 3, 8, 8), (5, 3, 8, 8), (1, 3, 4, 6)):
        assert_same(sessions, part, torch.randn(shape))
        assert sessions.kept == 1
    first = sessions(torch.ones(1, 3, 4, 6))
    kept = first.clone()
    sessions(torch.zeros(1, 3, 4, 6))
    assert torch.equal(first, kept)  # the caller's to keep


@pytest.mark.slow
def test_weights_changed_in_place_are_exported_anew():
    part, x = conv_part(), torch.randn(2, 3, 8, 8)
    sessions = Sessions(part, Options(threads=1))
    assert_same(sessions, part, x)
    with torch.no_grad():
        part.module[0].weight.mul_(2)
    assert_same(sessions, part, x)


def test_what_cannot_be_is_refused_with_the_remedy(stream):
    with pytest.raises(ValueError, match="limit must be an integer of 1 or more, not 0"):
        stream.accelerate("onnxruntime", limit=0)
    with pytest.raises(RuntimeError, match="this pipe is on cuda:0: use accelerate"):
        Options().for_device(torch.device("cuda", 0))
    half = StreamFlow(stream.pipe.to(dtype=torch.bfloat16), [0, 1], cfg_type="none")
    half.prepare("a red apple", num_inference_steps=2)
    with pytest.raises(ValueError, match="for float32 and the velocity takes torch.bfloat16"):
        half.accelerate("onnxruntime")
    assert half.acceleration == "none"


@pytest.mark.slow
@torch.no_grad()
def test_adapters_are_followed(stream):
    from peft import LoraConfig

    torch.manual_seed(0)
    part = stream.parts().velocity
    inputs = {**part.inputs, "x": torch.randn_like(part.inputs["x"])}
    sessions, before = Sessions(part, Options(threads=1)), part.module(**inputs)
    assert torch.allclose(sessions(**inputs), before, atol=1e-4)
    lora = LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    stream.unet.add_adapter(lora, "style")
    styled = part.module(**inputs)
    assert (styled - before).abs().max() > 1e-3
    assert torch.allclose(sessions(**inputs), styled, atol=1e-4)
    stream.unet.fuse_lora()
    assert torch.allclose(sessions(**inputs), styled, atol=1e-4)


def test_openvino_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="unknown precision 'f16': choose one of bf16, f32"):
        openvino.Options("f16")
    with pytest.raises(RuntimeError, match="openvino is for CPUs here and this pipe is on cuda:0"):
        openvino.Options().for_device(torch.device("cuda", 0))
    monkeypatch.setattr(openvino, "find_spec", lambda name: None if name == "openvino" else name)
    with pytest.raises(ImportError, match=r"needs openvino: pip install 'streamflow-rf\[openvino\]'"):
        openvino.Options().for_device(torch.device("cpu"))


@pytest.mark.slow
def test_openvino_draws_the_same_until_it_is_undone(stream):
    core = pytest.importorskip("openvino", reason="needs OpenVINO, pip install 'streamflow-rf[openvino]'").Core()
    before = drawn(stream)
    stream.accelerate("openvino", precision="f32")
    assert (drawn(stream) - before).abs().max() <= 2 / 255
    sessions = stream.velocity
    stream.update(t_index_list=[0, 2])
    drawn(stream)
    assert stream.velocity is sessions and sessions.kept == 2, "every number of rows has a session"
    stream.update(t_index_list=[0, 1, 2, 3])
    drawn(stream)
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" in able:
        stream.accelerate("openvino")
        assert 0 < (drawn(stream) - before).square().mean() < 1e-4  # 40 dB
    else:
        with pytest.raises(RuntimeError, match="does not compute in bf16.*precision='f32'"):
            stream.accelerate("openvino")
    stream.accelerate("none")
    assert torch.equal(drawn(stream), before)
