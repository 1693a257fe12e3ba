"""Parts as ONNX equal torch, at every batch and size of their profile, and TensorRT for RTX builds an engine of each. The
engines are not executed: that takes a GPU (`python -m streamflow.acceleration.tensorrt --self-test`)."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch
from diffusers import AutoencoderTiny
from random_pipelines import random_tiny_vae
from tensorrt_helpers import Onnx, needs_rtx, resized
from torch import nn

from streamflow.acceleration import Part
from streamflow.acceleration.errors import BuildError
from streamflow.acceleration.onnx_export import OUTPUT, export
from streamflow.acceleration.tensorrt import ExportError, NotExportable, library
from streamflow.acceleration.tensorrt.__main__ import parts_of
from streamflow.acceleration.tensorrt.build import build
from streamflow.acceleration.tensorrt.library import Target
from streamflow.acceleration.tensorrt.options import Options, profile_of
from streamflow.models import load
from streamflow.models.codec import Codec
from streamflow.pretrained import embedded, embedded_tiny_vae

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
        reason="onnx, onnxscript and onnxruntime are not installed: python env/install.py --tensorrt-rtx",
    ),
]
BATCHES = (1, 2, 4, 3)
TOLERANCE = 1e-4  # float32: absolute, and relative to the largest value


def assert_equal(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= TOLERANCE * max(1.0, want.abs().max())


def conv(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, channels, 3, padding=1)).eval()


class Sum(nn.Module):
    """A module with every kind of input: rows, a number a row, and one without a batch."""

    def forward(self, x, t, ids):
        return x * t[:, None] + ids


@pytest.fixture(scope="module")
def conv_onnx(tmp_path_factory):
    part = Part("velocity", conv(), {"input": torch.randn(1, 4, 8, 8)}, free_size=True)
    profile = profile_of(part, Options(max_batch=4, min_height=4, max_height=16, max_width=32))
    return part, profile, export(part, tmp_path_factory.mktemp("onnx"), profile.ranges)


# -- quick: small modules -----------------------------------------------------------------------------------------------


def test_a_small_module_equals_torch_at_all_its_sizes(conv_onnx):
    part, profile, path = conv_onnx
    engine = Onnx(path)
    for rows, height, width in ((1, 8, 8), (4, 4, 32), (3, 16, 9)):
        x = torch.randn(rows, 4, height, width)
        assert profile.fits({"input": x})
        assert_equal(engine(x), part.module(x))


def test_inputs_and_output_are_named_and_only_what_the_profile_frees_is_free(tmp_path):
    import onnx

    part = Part(
        "velocity",
        Sum(),
        {"x": torch.randn(2, 5), "t": torch.ones(2), "ids": torch.randn(5)},
        shared=frozenset({"ids"}),
    )
    path = export(part, tmp_path)
    graph = onnx.load(path).graph
    free = {value.name: [bool(d.dim_param) for d in value.type.tensor_type.shape.dim] for value in graph.input}
    assert free == {"x": [True, False], "t": [True], "ids": [False]}
    assert [value.name for value in graph.output] == [OUTPUT]
    inputs = {"x": torch.randn(6, 5), "t": torch.rand(6), "ids": torch.randn(5)}
    assert_equal(Onnx(path)(**inputs), Sum()(**inputs))


def test_weights_keep_their_dtype(tmp_path):
    import onnx

    part = Part("decoder", conv().to(torch.bfloat16), {"input": torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)})
    graph = onnx.load(export(part, tmp_path)).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.BFLOAT16}
    assert onnx.TensorProto.BFLOAT16 in {weight.data_type for weight in graph.initializer}


def test_large_weights_go_beside_the_file(tmp_path, monkeypatch):
    from streamflow.acceleration import onnx_export as module

    monkeypatch.setattr(module, "EXTERNAL", 100)
    part = Part("decoder", conv(), {"input": torch.randn(2, 4, 8, 8)})
    path = module.export(part, tmp_path)
    assert [other.name for other in tmp_path.iterdir() if other != path] == ["decoder.onnx.data"]
    x = torch.randn(2, 4, 8, 8)
    assert_equal(Onnx(path)(x), part.module(x))


def test_exporting_leaves_the_module_as_it_was(conv_onnx):
    part, _, _ = conv_onnx
    again = conv()
    assert all(
        torch.equal(a, b) for a, b in zip(part.module.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not part.module.training and all(not m._forward_hooks for m in part.module.modules())


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Eig(nn.Module):
    """An operation that ONNX does not have."""

    def forward(self, x):
        return torch.linalg.eigvals(x).real


@pytest.mark.parametrize(
    ("module", "stage"), [(Branches(), "tracing"), (Eig(), "translating to ONNX")], ids=lambda value: type(value).__name__
)
def test_a_failed_export_says_stage_node_and_remedy(module, stage, tmp_path):
    part = Part("decoder", module, {"x": torch.randn(3, 4, 4)})
    with pytest.raises(ExportError) as caught:
        export(part, tmp_path)
    error = caught.value
    assert (error.part, error.stage) == ("decoder", stage) and error.__cause__ is not None
    assert "accelerate('compile')" in str(error) and "decoder" in str(error)
    if stage == "translating to ONNX":
        assert error.node is not None and "eig" in str(error)


def test_a_module_that_takes_lists_is_refused_by_name(tmp_path):
    part = Part("velocity", conv(), {"input": torch.randn(1, 4, 8, 8)}, exportable=False)
    with pytest.raises(NotExportable, match="velocity.*Sequential takes Python lists or has no ONNX form"):
        export(part, tmp_path)


@needs_rtx
@pytest.mark.tensorrt
def test_an_engine_is_built_without_a_gpu(conv_onnx):
    _, profile, path = conv_onnx
    engine = build(path, profile, Options(optimization_level=0, workspace_gb=1), library.load(library.RTX), Target())
    assert isinstance(engine, bytes) and len(engine) > 1000


@needs_rtx
@pytest.mark.tensorrt
def test_a_file_that_is_not_onnx_is_refused_with_the_stage(conv_onnx, tmp_path):
    _, profile, _ = conv_onnx
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not an ONNX file")
    with pytest.raises(BuildError, match="reading ONNX") as caught:
        build(path, profile, Options(), library.load(library.RTX), Target())
    assert caught.value.stage == "reading ONNX" and "What to do" in str(caught.value)


@needs_rtx
@pytest.mark.tensorrt
def test_an_operation_that_tensorrt_lacks_is_named_by_node(conv_onnx, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 4])
    out = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [1, 4])
    node = helper.make_node("Unheard", ["input"], [OUTPUT], name="the_odd_one", domain="nowhere")
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "odd", [value], [out]), opset_imports=imports), path)
    _, profile, _ = conv_onnx
    with pytest.raises(BuildError) as caught:
        build(path, profile, Options(), library.load(library.RTX), Target())
    assert caught.value.stage == "reading ONNX" and "the_odd_one" in caught.value.node


@needs_rtx
@pytest.mark.tensorrt
def test_a_profile_that_does_not_belong_to_the_file_is_a_build_error(conv_onnx):
    _, profile, path = conv_onnx
    (r,) = profile.ranges.values()
    wrong = dataclasses.replace(r, smallest=(1, 5, 4, 8), best=(1, 5, 8, 8), largest=(1, 5, 8, 8))
    with pytest.raises(BuildError) as caught:
        build(
            path,
            dataclasses.replace(profile, ranges={"input": wrong}),
            Options(),
            library.load(library.RTX),
            Target(),
        )
    assert caught.value.stage == "building the engine"


# -- slow: whole models ---------------------------------------------------------------------------------------------------


def tiny_vae_parts(vae: nn.Module, channels: int, factor: int):
    codec = Codec(vae.eval())
    latents = torch.randn(2, channels, 64 // factor, 64 // factor)
    return {
        "decoder": Part("decoder", codec.decoder, {"latents": latents}, free_size=True),
        "encoder": Part("encoder", codec.encoder, {"images": torch.rand(2, 3, 64, 64) * 2 - 1}, free_size=True),
    }


@pytest.fixture(scope="module")
def part_of(pipes):
    """`part_of(model, part)`: the parts of a model, made once."""
    made = {}

    def parts(model: str):
        if model == "embedded tiny vae":
            vae = AutoencoderTiny.from_pretrained(embedded_tiny_vae())
            return tiny_vae_parts(vae, vae.config.latent_channels, 2 ** (len(vae.config.decoder_block_out_channels) - 1))
        pipe = load(embedded()) if model == "embedded" else pipes(model)
        family = "instaflow" if model == "instaflow" else None
        return {part.name: part for part in parts_of(pipe, family, size=64 if model != "embedded" else None)}

    def get(model: str, part: str) -> Part:
        if model not in made:
            made[model] = parts(model)
        return made[model][part]

    return get


@pytest.fixture(scope="module")
def onnx_of(part_of, tmp_path_factory):
    """`onnx_of(model, part)`: (the part, its profile, its ONNX file), exported once."""
    made = {}

    def get(model: str, name: str):
        if (model, name) not in made:
            part = part_of(model, name)
            image = part_of(model, "encoder").inputs["images"].shape[-2:]
            own = next(iter(part.inputs.values())).shape[-2:]
            units = tuple(a // b for a, b in zip(image, own, strict=True)) if part.free_size else (1, 1)
            size = {
                "min_height": image[0],
                "max_height": 2 * image[0],
                "min_width": image[1],
                "max_width": 2 * image[1],
            }
            profile = profile_of(part, Options(min_batch=1, max_batch=4, **size), units)
            made[model, name] = part, profile, export(part, tmp_path_factory.mktemp("onnx"), profile.ranges)
        return made[model, name]

    return get


CASES = [
    ("sd3", "velocity"),  # a KL VAE that is free in size is in the embedded model, which is an SD3 too
    *[("flux", name) for name in ("velocity", "decoder", "encoder")],
    ("schnell", "velocity"),  # its VAE is flux's
    ("instaflow", "velocity"),
    *[("embedded", name) for name in ("velocity", "decoder", "encoder")],
    *[("embedded tiny vae", name) for name in ("decoder", "encoder")],
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), CASES)
@torch.no_grad()
def test_onnxruntime_equals_torch_at_every_batch_and_size(onnx_of, model, name):
    part, profile, path = onnx_of(model, name)
    engine = Onnx(path)
    first = next(iter(profile.ranges.values()))
    low, high = first.smallest[-2:], first.largest[-2:]
    assert (low != high) == part.free_size
    sizes = (low, (high[0], low[1]), (low[0], high[1]), high) if part.free_size else (None,) * 4
    for rows, size in zip(BATCHES, sizes, strict=True):
        inputs = resized(dict(part.inputs), part.shared, rows, size)
        profile.check(inputs)
        assert_equal(engine(**inputs), part.module(**inputs))


@pytest.mark.slow
@needs_rtx
@pytest.mark.tensorrt
@pytest.mark.parametrize(("model", "name"), CASES)
def test_tensorrt_for_rtx_builds_an_engine(onnx_of, model, name):
    _, profile, path = onnx_of(model, name)
    engine = build(path, profile, Options(), library.load(library.RTX), Target())
    assert len(engine) > 10_000


@pytest.mark.slow
@needs_rtx
@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_strongly_typed_engine_of_half_precision_is_built(tmp_path, dtype):
    part = Part("decoder", Codec(random_tiny_vae(4).to(dtype)).decoder, {"latents": torch.randn(1, 4, 8, 8, dtype=dtype)})
    profile = profile_of(part, Options())
    path = export(part, tmp_path, profile.ranges)
    assert len(build(path, profile, Options(), library.load(library.RTX), Target())) > 10_000
