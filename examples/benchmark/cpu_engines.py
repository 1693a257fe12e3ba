"""What draws an image soonest on a CPU: torch as it is, torch.compile, onnxruntime or OpenVINO.

    python examples/benchmark/cpu_engines.py --output static/benchmarks/cpu_engines.json
    python examples/benchmark/cpu_engines.py --engines eager compile onnxruntime --rounds 3

One tick of a 4-stage stream of the embedded model at its own size: the network on four rows, then the decoder on one. Each
engine has a process of its own, so that none waits for another one's threads; rounds go from engine to engine, so that
drift meets all alike, and only one runs at a time. OpenVINO is no dependency: `pip install openvino`, or leave it out.
The largest difference is of whole ticks' images, on [0, 1], from eager torch. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on torchvision, which nothing here needs

import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from streamflow import StreamFlow, models, pretrained  # noqa: E402
from streamflow.acceleration import Part, bind_arguments  # noqa: E402
from streamflow.acceleration.compile import channels_last  # noqa: E402
from streamflow.acceleration.onnx_export import export  # noqa: E402
from streamflow.benchmark.report import write_json  # noqa: E402

Modules = Mapping[str, nn.Module]


def make_stream(size: int | None, stages: int) -> StreamFlow:
    """A prepared stream of the embedded model."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    stream = StreamFlow(models.load(), range(stages), width=size, height=size, cfg_type="none")
    stream.prepare(pretrained.EXAMPLE_PROMPTS[1], num_inference_steps=stages, max_sequence_length=0)
    return stream


# -- engines: a stream in, its velocity and decoder by another way out ---------------------------------------------------


def eager(stream: StreamFlow) -> Modules:
    return {"velocity": stream.velocity, "decoder": stream.codec.decoder}


def decoder_channels_last(stream: StreamFlow) -> Modules:
    channels_last(stream.codec.decoder)
    return eager(stream)


def compiled(stream: StreamFlow, **options: Any) -> Modules:
    stream.accelerate("compile", **options)
    return eager(stream)


def frozen(stream: StreamFlow) -> Modules:
    """Inductor with the weights as constants, which it then packs for oneDNN."""
    torch._inductor.config.freezing = True
    return compiled(stream, regional=False)


def bfloat16(stream: StreamFlow) -> Modules:
    return {name: Autocast(module) for name, module in eager(stream).items()}


def exported(stream: StreamFlow, engine: Callable[[Part, Path], nn.Module], int8: bool = False) -> Modules:
    """Each part through ONNX into an engine of the stream's own shapes. int8: the network's matrices dynamically quantised,
    by onnxruntime's `quantize_dynamic`."""
    parts = stream.parts()
    with tempfile.TemporaryDirectory() as folder:
        files = {part.name: export(part, Path(folder)) for part in (parts.velocity, parts.decoder)}
        if int8:
            files["velocity"] = dynamic_int8(files["velocity"])
        return {part.name: engine(part, files[part.name]) for part in (parts.velocity, parts.decoder)}


def dynamic_int8(path: Path) -> Path:
    """The ONNX file with eight-bit weights for its matrix products, whose other input is quantised in every call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantised = path.with_stem(f"{path.stem}-int8")
    quantize_dynamic(path, quantised, ["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
    return quantised


def torchao_int8(stream: StreamFlow) -> Modules:
    """Inductor with torchao's eight-bit matrices, of any size."""
    from streamflow.acceleration import quantize

    quantize.FEATURES, quantize.ROWS = 64, 1
    return compiled(stream, quantize="int8")


class Autocast(nn.Module):
    """A module under bfloat16 autocast."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(*args, **kwargs).float()


SPINNING = {"force_spinning_stop": "session.force_spinning_stop", "allow_spinning": "session.intra_op.allow_spinning"}


class OnnxRuntime(nn.Module):
    """An ONNX file on onnxruntime's CPU provider, all shapes fixed. Its threads wait for work by spinning: within a call
    (`force_spinning_stop`), between calls too (`allow_spinning` alone, the default), or never."""

    def __init__(self, part: Part, path: Path, **spinning: str):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        for name, value in (spinning or {"force_spinning_stop": "1"}).items():
            options.add_session_config_entry(SPINNING[name], value)
        for name, size in _free(path, part).items():
            options.add_free_dimension_override_by_name(name, size)
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        inputs = bind_arguments(self.names, args, kwargs)
        (out,) = self.session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(out)


def _free(path: Path, part: Part) -> dict[str, int]:
    """The names of an ONNX file's free dimensions, and the part's own sizes of them."""
    import onnx

    free = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        shape = part.inputs[value.name].shape
        free |= {d.dim_param: n for d, n in zip(value.type.tensor_type.shape.dim, shape, strict=True) if d.dim_param}
    return free


class OpenVino(nn.Module):
    """An ONNX file on OpenVINO's CPU device, all shapes fixed, tuned for the time of one call."""

    def __init__(self, part: Part, path: Path, precision: str = "f32"):
        super().__init__()
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        model.reshape({name: list(value.shape) for name, value in part.inputs.items()})
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        settings |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        self.names = list(part.inputs)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        inputs = bind_arguments(self.names, args, kwargs)
        out = self.request.infer({name: value.numpy() for name, value in inputs.items()}, share_inputs=True)
        return torch.from_numpy(out[0])


ENGINES: dict[str, Callable[[StreamFlow], Modules]] = {
    "eager": eager,
    "decoder channels last": decoder_channels_last,
    "compile": compiled,
    "compile, whole": partial(compiled, regional=False),
    "compile, whole, frozen": frozen,
    "onnxruntime": partial(exported, engine=OnnxRuntime),
    "onnxruntime, always spinning": partial(exported, engine=partial(OnnxRuntime, allow_spinning="1")),
    "onnxruntime, never spinning": partial(exported, engine=partial(OnnxRuntime, allow_spinning="0")),
    "onnxruntime, int8": partial(exported, engine=OnnxRuntime, int8=True),
    "compile, int8": torchao_int8,
    "openvino": partial(exported, engine=OpenVino),
    "openvino, int8": partial(exported, engine=OpenVino, int8=True),
    "bfloat16 autocast": bfloat16,
    "openvino, bfloat16": partial(exported, engine=partial(OpenVino, precision="bf16")),
}
BFLOAT16 = ("bfloat16 autocast", "openvino, bfloat16")


def available() -> list[str]:
    """The engines that this machine can run."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    left_out = () if "avx512_bf16" in flags or "amx_bf16" in flags else BFLOAT16
    there = {name: find_spec(name) is not None for name in ("onnxruntime", "openvino")}
    return [name for name in ENGINES if name not in left_out and there.get(name.split(",")[0], True)]


# -- measuring ------------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], calls: int) -> float:
    """One call's, after one that is not counted."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def worker(pipe: Connection, name: str, size: int | None, stages: int) -> None:
    """Build one engine, say how long that took and what it draws, then measure as often as asked."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)  # a cold start, unless one is given
        stream = make_stream(size, stages)
        parts = {part.name: part for part in stream.parts() if part.name != "encoder"}
        x = torch.randn(parts["velocity"].inputs["x"].shape, generator=torch.Generator().manual_seed(0))
        inputs = {**parts["velocity"].inputs, "x": x}
        start = time.perf_counter()
        modules = ENGINES[name](stream)
        v = modules["velocity"](**inputs)
        clean = x[-1:] - (inputs["t"][-1] / 1000) * v[-1:]
        image = (modules["decoder"](clean) + 1) / 2
        pipe.send((time.perf_counter() - start, image.numpy()))
        calls = {
            "velocity": lambda: modules["velocity"](**inputs),
            "decoder": lambda: modules["decoder"](clean),
            "tick": lambda: (modules["velocity"](**inputs), modules["decoder"](clean)),
        }
        while count := pipe.recv():
            pipe.send({kind: seconds(call, count) * 1e3 for kind, call in calls.items()})


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every engine, round by round, and how its image differs from the first engine's."""
    context = get_context("spawn")
    running, found, images = {}, {}, {}
    for name in tqdm(a.engines, desc="start", unit="engine"):
        near, far = context.Pipe()
        process = context.Process(target=worker, args=(far, name, a.size, a.stages), daemon=True)
        process.start()
        far.close()
        start_up, images[name] = near.recv()
        error = images[name] - images[a.engines[0]]
        found[name] = {"start_s": round(start_up, 2), "largest_difference": float(abs(error).max())}
        found[name]["psnr_db"] = -10 * math.log10(max(1e-12, float((error**2).mean())))
        running[name] = process, near
    raw: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for _ in tqdm(range(a.rounds), desc="measure", unit="round"):
        for name, (_, near) in running.items():
            near.send(a.calls)
            raw[name].append(near.recv())
    for process, near in running.values():
        near.send(0)
        process.join()
    for name, rounds in raw.items():
        for kind in ("velocity", "decoder", "tick"):
            values = sorted(one[kind] for one in rounds)
            found[name][f"{kind}_ms"] = {"median": median(values), "min": values[0], "max": values[-1]}
        ratios = sorted(one["tick"] / mine["tick"] for one, mine in zip(raw[a.engines[0]], rounds, strict=True))
        found[name]["ratio"] = {"median": median(ratios), "min": ratios[0], "max": ratios[-1]}
    return found


def table(found: Mapping[str, Any], first: str) -> str:
    """The figures for people."""
    head = f"| engine | network, ms | decode, ms | tick, ms | against {first} | start, s | largest difference |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, f in found.items():
        cells = [f"{f[f'{k}_ms']['median']:.1f}" for k in ("velocity", "decoder")]
        cells.append("{median:.1f} ({min:.1f} to {max:.1f})".format(**f["tick_ms"]))
        cells.append("{median:.2f} ({min:.2f} to {max:.2f})".format(**f["ratio"]))
        cells += [f"{f['start_s']:.1f}", f"{f['largest_difference']:.1e}, {f['psnr_db']:.0f} dB"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = available()
    p.add_argument("--engines", nargs="+", choices=ENGINES, default=there, help=f"default: {', '.join(there)}")
    p.add_argument("--rounds", type=int, default=9, help="default 9")
    p.add_argument("--calls", type=int, default=5, help="calls a round, default 5")
    p.add_argument("--stages", type=int, default=4, help="rows of the network, default 4")
    p.add_argument("--size", type=int, help="pixels a side (default: the model's, 128)")
    p.add_argument("--output", type=Path, help="also write the JSON here")
    a = p.parse_args()
    found = measure(a)
    print(table(found, a.engines[0]))
    result = {"command": " ".join(["python", *sys.argv]), "cpu": platform.processor() or platform.machine()}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": "float32"}
    result |= {"stages": a.stages, "rounds": a.rounds, "calls": a.calls, "engines": found}
    write_json(result, a.output)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
