"""What is around the engines: options, profiles, finding TensorRT, comparing, and going on plainly while a new engine is
built. Where an engine would run, onnxruntime runs the same ONNX; what needs a GPU is in `--self-test`."""

from __future__ import annotations

import ast
import copy
import json
import logging
import math
import time
from pathlib import Path

import pytest
import torch
from tensorrt_helpers import Onnx, needs_rtx
from torch import nn

from streamflow.acceleration import KINDS, Part, check_options
from streamflow.acceleration.errors import BuildError
from streamflow.acceleration.onnx_export import export
from streamflow.acceleration.tensorrt import (
    EngineMismatch,
    MissingTensorRT,
    NoDevice,
    Options,
    OutsideProfile,
    accelerate_with_tensorrt,
    build,
    build_options,
    cache,
    default_engine_dir,
    library,
)
from streamflow.acceleration.tensorrt.adaptive import PATIENCE, Adaptive
from streamflow.acceleration.tensorrt.build import Build, check_room, load_or_build
from streamflow.acceleration.tensorrt.cache import entry_for, list_engines
from streamflow.acceleration.tensorrt.engine import CALLS, Trial, compare, varied
from streamflow.acceleration.tensorrt.library import Target
from streamflow.acceleration.tensorrt.options import profile_of
from streamflow.acceleration.watch import WeightWatch

CPU = torch.device("cpu")


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)).eval().requires_grad_(False)
    )


def part_with(rows: int, module: nn.Module | None = None, **fields) -> Part:
    x = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(rows))
    return Part("decoder", module or conv(), {"input": x}, **fields)


# -- options ------------------------------------------------------------------------------------------------------------


def test_engines_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_engine_dir() == tmp_path / "streamflow" / "engines" == Options().engine_dir
    assert not (tmp_path / "streamflow").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Path.home() in default_engine_dir().parents


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_batch": 0}, "max_batch must be an integer of 1 or more, not 0"),
        ({"min_batch": 4, "max_batch": 2}, "must ascend: min_batch=4, max_batch=2"),
        ({"min_height": 64, "opt_height": 32}, "must ascend: min_height=64, opt_height=32"),
        ({"opt_width": True}, "opt_width must be an integer"),
        ({"fallback": "plain"}, "choose None \\(raise\\) or 'eager'"),
        ({"tolerance_db": 0}, "tolerance_db must be above 0"),
        ({"workspace_gb": -1}, "workspace_gb must be above 0"),
        ({"optimization_level": 6}, "optimization_level must be 0 to 5, not 6"),
    ],
)
def test_options_are_checked_where_they_are_made(given, message):
    with pytest.raises(ValueError, match=message):
        Options(**given)


def test_without_a_gpu_it_says_so_and_what_to_do():
    assert "tensorrt" in KINDS
    with pytest.raises(NoDevice, match="this pipe is on cpu. What to do: .*accelerate\\('auto'\\)") as caught:
        check_options("tensorrt", CPU, {})
    assert caught.value.stage == "before export"
    assert check_options("tensorrt", CPU, {"fallback": "eager"}).fallback == "eager"


# -- profiles -----------------------------------------------------------------------------------------------------------


def test_a_profile_is_just_the_streams_shapes_unless_options_widen_it():
    part = part_with(3, free_size=True)
    (r,) = profile_of(part, Options()).ranges.values()
    assert r.smallest == r.best == r.largest == (3, 4, 8, 8)
    wide = Options(min_batch=1, max_batch=2, min_height=32, opt_height=128, max_width=256)
    (r,) = profile_of(part, wide, (8, 8)).ranges.values()
    assert (r.smallest, r.best, r.largest) == ((1, 4, 4, 8), (3, 4, 16, 8), (3, 4, 16, 32))
    assert r.free == (0, 2, 3)


def test_the_streams_own_rows_and_size_are_always_within():
    narrow = Options(min_batch=4, max_batch=4, min_height=512, max_height=512)
    profile = profile_of(part_with(1, free_size=True), narrow, (8, 8))
    assert profile.fits({"input": torch.zeros(1, 4, 8, 8)}) and profile.fits({"input": torch.zeros(4, 4, 64, 8)})


def test_parts_of_one_size_and_shared_inputs_ignore_sizes_and_batches():
    inputs = {"x": torch.zeros(2, 16, 64), "ids": torch.zeros(16, 3)}
    part = Part("velocity", conv(), inputs, shared=frozenset({"ids"}))
    ranges = profile_of(part, Options(max_batch=8, max_height=1024)).ranges
    assert ranges["x"].largest == (8, 16, 64) and ranges["ids"].largest == (16, 3)


def test_a_size_that_is_no_whole_number_of_latents_is_an_error():
    with pytest.raises(ValueError, match="sizes of the decoder must be multiples of 8 pixels, not 100"):
        profile_of(part_with(1, free_size=True), Options(max_height=100), (8, 8))


@pytest.mark.parametrize("shape", [(5, 4, 8, 8), (1, 4, 8, 9), (1, 4, 8), (1, 3, 8, 8)])
def test_shapes_outside_of_a_profile_are_refused_with_the_numbers(shape):
    profile = profile_of(part_with(1), Options(max_batch=4))
    with pytest.raises(OutsideProfile, match="built for \\[1, 4, 8, 8\\] to \\[4, 4, 8, 8\\]"):
        profile.check({"input": torch.zeros(shape)})
    with pytest.raises(OutsideProfile, match="inputs x given, input built for"):
        profile.check({"x": torch.zeros(1, 4, 8, 8)})


# -- finding TensorRT -----------------------------------------------------------------------------------------------------


def installed(monkeypatch, *kinds: str) -> None:
    there = {name for kind in kinds for name in library._MODULES[kind]}
    monkeypatch.setattr(library, "find_spec", lambda name: object() if name in there else None)


@pytest.mark.parametrize(
    ("kinds", "capability", "chosen"),
    [
        ((library.RTX, library.TENSORRT), (8, 9), library.RTX),
        ((library.RTX, library.TENSORRT), (9, 0), library.TENSORRT),
        ((library.RTX,), (12, 0), library.RTX),
        ((library.TENSORRT,), (8, 6), library.TENSORRT),
        ((library.RTX,), None, library.RTX),
    ],
)
def test_which_tensorrt_goes_by_the_gpu_and_by_what_is_installed(monkeypatch, kinds, capability, chosen):
    installed(monkeypatch, *kinds)
    assert library.choose(capability) == chosen


@pytest.mark.parametrize(
    ("kinds", "capability", "message"),
    [
        ((), (8, 9), "TensorRT for RTX for compute capability 8.9 is not installed.*env/install.py --tensorrt-rtx"),
        ((), (9, 0), "TensorRT for compute capability 9.0 is not installed.*env/install.py --tensorrt "),
        ((library.RTX,), (9, 0), "TensorRT for RTX is installed and does not run on this GPU.*\\[tensorrt\\]"),
    ],
)
def test_a_missing_tensorrt_names_the_command(monkeypatch, kinds, capability, message):
    installed(monkeypatch, *kinds)
    with pytest.raises(MissingTensorRT, match=message):
        library.choose(capability)


def test_nothing_heavy_is_imported_before_it_is_used():
    heavy = {
        "onnx",
        "onnxruntime",
        "onnxscript",
        "polygraphy",
        "tensorrt",
        "tensorrt_rtx_bindings",
        "filelock",
        "tqdm",
        "psutil",
    }
    for path in Path(library.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & heavy, path.name


@needs_rtx
@pytest.mark.tensorrt
def test_tensorrt_for_rtx_loads_without_a_gpu_and_polygraphy_knows():
    loaded = library.load(library.RTX)
    assert loaded.kind == library.RTX and loaded.trt.__version__[0].isdigit() and library.load(library.RTX) is loaded
    from polygraphy import config

    assert config.USE_TENSORRT_RTX


# -- StreamDiffusion's names ----------------------------------------------------------------------------------------------


class Recorder:
    """In the place of a stream: records the call of `accelerate`."""

    def accelerate(self, kind, **options):
        self.call = kind, Options(**options)


def test_streamdiffusions_function_asks_the_stream_and_returns_it(tmp_path):
    stream, given = Recorder(), {"opt_image_height": 512, "opt_batch_size": 2, "force_engine_build": True}
    assert accelerate_with_tensorrt(stream, tmp_path, 4, 2, True, given) is stream
    kind, options = stream.call
    assert kind == "tensorrt"
    assert options == Options(
        engine_dir=tmp_path, max_batch=4, min_batch=2, use_cuda_graph=True, opt_height=512, rebuild=True
    )
    assert given == {"opt_image_height": 512, "opt_batch_size": 2, "force_engine_build": True}
    accelerate_with_tensorrt(stream, str(tmp_path))
    assert stream.call[1] == Options(engine_dir=tmp_path, max_batch=2, min_batch=1)


def test_streamdiffusions_build_options_become_ours():
    dynamic = {"build_dynamic_shape": True, "min_image_resolution": 256, "max_image_resolution": 1024}
    assert build_options(dynamic, 2, 1) == {
        **{"max_batch": 2, "min_batch": 1, "min_height": 256, "min_width": 256},
        **{"max_height": 1024, "max_width": 1024},
    }
    assert build_options({"build_static_batch": True, "build_all_tactics": False}, 2, 1) == {}
    assert build_options({"tolerance_db": 30.0}, 2, 1)["tolerance_db"] == 30.0
    with pytest.raises(NotImplementedError, match="build_enable_refit: engines are built anew"):
        build_options({"build_enable_refit": True}, 2, 1)
    with pytest.raises(TypeError, match="has no nonsense; it may have"):
        build_options({"nonsense": 1}, 2, 1)


def test_fallback_runs_plainly_and_warns_with_the_cause(stream_of, caplog):
    stream = stream_of("sd3", (0, 1))
    before = stream.txt2img()
    stream.prepare("a red apple, 3d render", num_inference_steps=4)
    stream.accelerate("tensorrt", fallback="eager")
    assert torch.equal(stream.txt2img(), before)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    for name in ("velocity", "decoder", "encoder"):
        assert any(f"{name} runs without an engine" in text and "this pipe is on cpu" in text for text in warnings)
    with pytest.raises(NoDevice):
        stream.accelerate("tensorrt")


# -- comparing ------------------------------------------------------------------------------------------------------------


class Off(nn.Module):
    """A module with an error of a known size."""

    def __init__(self, module: nn.Module, error: float):
        super().__init__()
        self.module, self.error = module, error

    def forward(self, input):
        out = self.module(input)
        return out + self.error * (out.max() - out.min())


def test_an_engine_is_compared_over_varied_calls_and_refused_with_the_numbers():
    part, options = part_with(2), Options(min_batch=1, max_batch=3)
    profile = profile_of(part, options)
    assert compare(part, profile, part.module, 40.0) == math.inf
    assert compare(part, profile, Off(part.module, 1e-3), 40.0) == pytest.approx(60, abs=0.1)
    with pytest.raises(EngineMismatch, match="PSNR 20.0 dB of 8 calls \\(20.0, .*40.0 wanted") as caught:
        compare(part, profile, Off(part.module, 0.1), 40.0)
    assert caught.value.part == "decoder"
    with pytest.raises(EngineMismatch, match="-inf"):
        compare(part, profile, Off(part.module, math.nan), 40.0)


def test_the_calls_differ_and_stay_within_the_profile():
    inputs = {"x": torch.zeros(2, 4), "t": torch.full((2,), 1000.0), "ids": torch.arange(4.0)}
    part = Part("velocity", conv(), inputs, shared=frozenset({"ids"}))
    profile = profile_of(part, Options(min_batch=1, max_batch=4))
    sets = [varied(part, profile, k) for k in range(CALLS)]
    assert sets[0] == inputs and {len(found["x"]) for found in sets} == {1, 2, 4}
    for found in sets:
        profile.check(found)
        assert len(found["t"]) == len(found["x"]) and 0 <= found["t"].min() and found["t"].max() <= 1000
        assert found["ids"] is inputs["ids"]
    assert all(found["x"].any() for found in sets[1:])


def test_an_output_of_another_shape_is_a_mismatch():
    trial = Trial("decoder", 40.0, calls=1)
    trial.add(torch.zeros(1, 3), torch.ones(1, 4))
    with pytest.raises(EngineMismatch):
        trial.verdict()


# -- adapting -------------------------------------------------------------------------------------------------------------


class Made:
    """A build that is over: what `Build` is to `Adaptive`."""

    began = 0.0

    def __init__(self, profile, engine=None, error=None):
        self.profile, self.engine, self.error, self.cancelled = profile, engine, error, False

    def done(self):
        return True

    def result(self):
        if self.error:
            raise self.error
        return self.engine

    def cancel(self):
        self.cancelled = True


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.fixture
def adaptive():
    """`adaptive(start)`: a part of one row on an engine (its own module, counted) for just that."""

    def make(start=None, **options):
        part = part_with(1)
        made = Adaptive(part, lambda now: profile_of(now, Options()), start, 40.0, **options)
        engine = Counted(part.module)
        made.add(profile_of(part, Options()), engine)
        return made, engine

    return make


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8)


def test_an_engine_runs_where_it_fits_and_the_plain_module_elsewhere(adaptive):
    module, engine = adaptive()
    one, two = rows(1), rows(2)
    assert torch.equal(module(one), module.plain(one)) and torch.equal(module(input=one), module.plain(one))
    assert engine.calls == 2
    assert torch.equal(module(two), module.plain(two)) and engine.calls == 2


def test_shapes_that_come_again_get_an_engine_which_is_tried_for_eight_ticks(adaptive, caplog):
    started = []
    new = Counted(conv())

    def start(part, profile):
        started.append(profile)
        return Made(profile, new)

    module, _ = adaptive(start)
    for _ in range(PATIENCE - 1):
        module(rows(2))
    assert started == []
    module(rows(2))
    assert len(started) == 1 and module.building and new.calls == 0
    for k in range(CALLS):
        x = rows(2)
        assert torch.equal(module(x), module.plain(x)) and new.calls == k + 1
    assert not module.building
    module.plain = None  # from here on the engine alone is called
    module(rows(2))
    assert new.calls == CALLS + 1 and len(started) == 1
    text = " / ".join(record.message for record in caplog.records)
    assert "building one in a child process" in text and "engine ready" in text and "swapped in, PSNR inf dB" in text


def test_a_new_engine_that_differs_is_refused_and_not_built_again(adaptive, caplog):
    started = []

    def start(part, profile):
        started.append(profile)
        return Made(profile, Off(conv(), 0.1))

    module, _ = adaptive(start)
    for _ in range(3 * CALLS):
        x = rows(2)
        assert torch.equal(module(x), module.plain(x))
    assert len(started) == 1 and "no new engine, running the plain module" in caplog.text and "PSNR 20.0 dB" in caplog.text


def test_a_build_that_fails_is_logged_once_and_the_stream_goes_on(adaptive, caplog):
    module, engine = adaptive(lambda part, profile: Made(profile, error=BuildError("decoder", "building", "it", "wait")))
    for _ in range(6):
        x = rows(2)
        assert torch.equal(module(x), module.plain(x))
    assert caplog.text.count("no new engine") == 1
    module(rows(1))
    assert engine.calls == 1


CHANGES = {
    "in place": lambda m: m[0].weight.add_(1.0),
    "another tensor": lambda m: setattr(m[0].weight, "data", m[0].weight.data + 1.0),
    "loaded": lambda m: m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_drawn_plainly_at_once(adaptive, change, caplog):
    started = []

    def start(part, profile):
        started.append(profile)
        return Made(profile, conv_like(part.module))

    def conv_like(module):
        new = conv()
        new.load_state_dict(module.state_dict())
        return new

    module, engine = adaptive(start)
    module(rows(1))
    with torch.no_grad():
        CHANGES[change](module.plain)
    x = rows(1)
    assert torch.equal(module(x), module.plain(x)) and engine.calls == 1 and not module.on_engine
    assert "weights or adapters changed" in caplog.text
    for _ in range(PATIENCE + CALLS):
        module(x)
    assert module.on_engine and len(started) == 1 and engine.calls == 1
    assert torch.equal(module(x), module.plain(x))


def test_adapters_that_are_added_scaled_or_merged_are_seen():
    from peft import LoraConfig, inject_adapter_in_model

    module = nn.Sequential(nn.Linear(4, 4))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), module)
    layer = module[0]
    for change in (
        lambda: layer.scaling.update(default=0.5),
        lambda: layer.merge(),
        lambda: layer.unmerge(),
        lambda: layer.enable_adapters(False),
    ):
        watch = WeightWatch(module)
        assert not watch.changed()
        change()
        assert watch.changed()


def test_a_lora_that_comes_goes_or_weakens_is_seen(pipes):
    from peft import LoraConfig

    from streamflow.models import adapter_for

    pipe = copy.copy(pipes("sd3"))
    pipe.transformer = copy.deepcopy(pipe.transformer)
    velocity = adapter_for(pipe).velocity
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    for change in (
        lambda: pipe.transformer.add_adapter(lora, "red"),
        lambda: pipe.transformer.set_adapters("red", 0.5),
        lambda: pipe.transformer.fuse_lora(),
        lambda: pipe.transformer.unfuse_lora(),
        lambda: pipe.transformer.disable_adapters(),
        lambda: pipe.transformer.delete_adapters("red"),
    ):
        watch = WeightWatch(velocity)
        assert not watch.changed()
        change()
        assert watch.changed()


def test_closing_stops_builds_and_starts_none(adaptive):
    made = []

    class Slow(Made):
        def done(self):
            return False

    def start(part, profile):
        made.append(Slow(profile))
        return made[-1]

    module, _ = adaptive(start)
    for _ in range(PATIENCE):
        module(rows(2))
    assert module.building
    module.close()
    assert made[0].cancelled and not module.building and not module.on_engine
    for _ in range(2 * PATIENCE):
        module(rows(2))
    assert len(made) == 1


# -- a build in a child process -------------------------------------------------------------------------------------------


def test_no_room_is_refused_with_the_numbers(tmp_path):
    huge = nn.Linear(2**20, 2**20, bias=False, device="meta")
    part = Part("velocity", huge, {"input": torch.zeros(1, 4)})
    with pytest.raises(BuildError, match="disk: 13194.1 GB needed, .* GB free"):
        check_room(part, Options(engine_dir=tmp_path), Target())


def test_a_module_that_cannot_be_handed_to_a_child_is_refused(tmp_path):
    module = conv()
    module.layout = lambda x: x
    part = part_with(1, module)
    build = Build(part, profile_of(part, Options()), Options(engine_dir=tmp_path), Target(), None)
    with pytest.raises(BuildError, match="writing the weight snapshot: .*pickle"):
        build.result()
    assert list_engines(tmp_path) == [] and not list(tmp_path.glob("streamflow-snapshot-*"))


def ticks_until(module: Adaptive, x: torch.Tensor, done, seconds: float = 120.0) -> int:
    """Tick until something is so; every tick must equal the plain module. How many it took."""
    end, count = time.monotonic() + seconds, 0
    while not done():
        assert time.monotonic() < end, "it took too long"
        torch.testing.assert_close(module(x), module.plain(x), atol=1e-4, rtol=1e-4)
        count += 1
        time.sleep(0.05)  # leaves the processor to the child
    return count


@pytest.mark.slow
@needs_rtx
@pytest.mark.tensorrt
def test_an_engine_is_built_in_a_child_while_the_stream_goes_on(tmp_path, caplog):
    """The child exports and builds a real TensorRT engine; what is swapped in runs its ONNX, since engines need a GPU."""
    options, target = Options(engine_dir=tmp_path / "engines", optimization_level=0), Target()
    part = part_with(1)
    loaded = []

    def wanted(now):
        return profile_of(now, options)

    def onnx(module, n):
        now = part_with(n, module)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Onnx(export(now, folder, wanted(now).ranges))

    standing_in = {2: onnx(part.module, 2)}

    def load(data, profile):
        loaded.append(len(data))
        return standing_in[next(iter(profile.ranges.values())).best[0]]

    def start(now, profile):
        return Build(now, profile, options, target, load)

    module = Adaptive(part, wanted, start, 40.0)
    module.add(wanted(part), onnx(part.module, 1))
    x = rows(2)
    ticks = ticks_until(module, x, lambda: len(loaded) == 1 and not module.building)
    assert ticks > CALLS and "swapped in" in caplog.text and loaded[0] > 1000
    (entry,) = list_engines(options.engine_dir)
    now = part_with(2, part.module)
    facts = cache.facts(now, wanted(now), options, target, str(library.load(library.RTX)))
    assert entry == entry_for(options.engine_dir, "decoder", facts) and len(entry.read()) == loaded[0]

    with torch.no_grad():
        part.module[0].weight.mul_(0.5)
    standing_in[2] = onnx(part.module, 2)
    ticks_until(module, x, lambda: len(loaded) == 2 and not module.building)
    assert module.on_engine and len(list_engines(options.engine_dir)) == 2
    assert not list(options.engine_dir.glob("streamflow-snapshot-*"))


@needs_rtx
@pytest.mark.tensorrt
def test_the_error_of_a_child_is_its_last_line(tmp_path, capsys):
    part = Part("decoder", nn.Bilinear(4, 4, 4), {"input1": torch.randn(2, 4), "input2": torch.randn(2, 5)})
    options = Options(engine_dir=tmp_path / "engines")
    job = {"part": part, "profile": profile_of(part, options), "options": options, "target": Target()}
    torch.save(job, tmp_path / "job.pt")
    assert build.main(str(tmp_path / "job.pt")) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "decoder, tracing" in last and "bilinear" in last and "What to do" in last
    assert list_engines(options.engine_dir) == [] and not list(tmp_path.glob("*.*"))


@pytest.mark.slow
@needs_rtx
@pytest.mark.tensorrt
def test_a_real_build_killed_in_the_middle_leaves_nothing_usable(tmp_path, caplog):
    part, options, target = part_with(1), Options(engine_dir=tmp_path, optimization_level=0), Target()
    profile = profile_of(part, options)
    build = Build(part, profile, options, target, None)
    while not list(tmp_path.glob(".decoder-*.work")):
        assert not build.done(), "it ended before it could be killed"
        time.sleep(0.005)
    build._child.kill()
    with pytest.raises(BuildError, match="exit code -9"):
        build.result()
    assert list_engines(tmp_path) == []
    entry, data = load_or_build(part, profile, options, target)
    assert entry.read() == data and not list(tmp_path.glob(".decoder-*"))


@needs_rtx
@pytest.mark.tensorrt
def test_a_cancelled_build_ends_its_child(tmp_path):
    part = part_with(1)
    build = Build(part, profile_of(part, Options()), Options(engine_dir=tmp_path), Target(), None)
    while build._child is None:
        time.sleep(0.01)
    build.cancel()
    with pytest.raises(BuildError):
        build.result()
    assert build._child.returncode is not None and time.perf_counter() - build.began < 10 and list_engines(tmp_path) == []


# -- the self-test ----------------------------------------------------------------------------------------------------------


def self_test(*arguments: str) -> int:
    from streamflow.acceleration.tensorrt.__main__ import main

    return main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run the self-test itself")
def test_the_self_test_without_a_gpu_says_so_in_a_line_and_exits_with_2(capsys):
    assert self_test("--self-test") == 2
    text = capsys.readouterr()
    assert text.out == "" and text.err.count("\n") == 1 and "no CUDA device" in text.err


def test_the_self_test_without_tensorrt_says_so_in_a_line_and_exits_with_2(capsys, monkeypatch):
    installed(monkeypatch)
    assert self_test("--build-only") == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "env/install.py --tensorrt-rtx" in text


@pytest.mark.slow
@needs_rtx
@pytest.mark.tensorrt
def test_build_only_builds_and_ends_with_json(capsys, tmp_path, pipes):
    model, engines = str(tmp_path / "flux"), tmp_path / "engines"
    pipes("flux").save_pretrained(model)
    assert self_test("--build-only", "--models", model, "--parts", "encoder", "--engine-dir", str(engines)) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (row,) = report["parts"]
    assert report["ok"] and not report["executed"] and (row["model"], row["part"]) == (model, "encoder")
    assert row["seconds"] > 0 and row["error"] is None and len(list_engines(engines)) == 1
