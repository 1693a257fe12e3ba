"""Small real pipelines, made once a session, and the references that streams are compared with."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from family_table import Found
from random_pipelines import random_pipeline

from streamflow import StreamFlow
from streamflow.acceleration import quantize
from streamflow.app.signals import SIGNALS

PROMPT = "a red apple, 3d render"
FAMILIES = ("sd3", "flux", "schnell", "instaflow")
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason='needs torchao: pip install "streamflow-rf[quantize]"'
)


def edit_prompt(text: str) -> str:
    """The text as the JSON that FIBO Edit takes."""
    return json.dumps({"edit_instruction": text})


def slow(*values: object):
    """A parameter for the slow tier; another one asserts the same property in the plain tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", type=Path, metavar="FILE", help="write down what the parity tests find, by family")


def pytest_configure(config: pytest.Config) -> None:
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1)  # the networks are too small to gain from more


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session):
    """No garbage collection while the tests are imported, with a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def only_new_garbage():
    """Garbage collection leaves out what there is before a module's tests, so that `gc.collect()` in a test is quick."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pipes():
    """`pipes(family, dtype, **changes)`: a random-weight pipeline, made once."""
    made = {}

    def get(family: str, dtype: torch.dtype = torch.float32, **changes):
        key = (family, dtype, repr(changes))
        if key not in made:
            made[key] = random_pipeline(family, **changes).to(dtype=dtype)
        return made[key]

    return get


@pytest.fixture(scope="session")
def found(request):
    """Where parity tests say what they found (`family_table.Found`); written to the file of `--families`."""
    kept = Found()
    yield kept
    if request.config.getoption("--families"):
        kept.save(request.config.getoption("--families"))


@pytest.fixture
def small_matrices(monkeypatch):
    """The bounds of the matrices that are quantised, lowered to the size of small networks."""
    monkeypatch.setattr(quantize, "FEATURES", 32)
    monkeypatch.setattr(quantize, "ROWS", 16)


@pytest.fixture
def stream_of(pipes):
    """`stream_of(family, t_index_list, ..., prepare={})`: a prepared stream over a random pipeline."""

    def make(family: str = "sd3", t_index_list=(0, 1, 2, 3), *, dtype=torch.float32, prepare=None, changes=None, **options):
        options.setdefault("cfg_type", "none")
        if family == "instaflow":
            options.setdefault("family", "instaflow")
        stream = StreamFlow(pipes(family, dtype, **(changes or {})), list(t_index_list), **options)
        stream.prepare(PROMPT, **{"num_inference_steps": 4, **(prepare or {})})
        return stream

    return make


@pytest.fixture
def cuda_stream():
    """`cuda_stream(family, steps, dtype, prepare={}, ...)`: a prepared stream, its random pipeline on the GPU."""

    def make(family="sd3", steps=4, dtype=torch.float32, prepare=None, **options):
        pipe = random_pipeline(family).to("cuda", dtype)
        options = {"cfg_type": "none", **({"family": "instaflow"} if family == "instaflow" else {}), **options}
        stream = StreamFlow(pipe, range(steps), **options)
        stream.prepare(PROMPT, **{"num_inference_steps": steps, **(prepare or {})})
        return stream

    return make


@pytest.fixture
def full_float32():
    """No TF32 on a GPU: its rounding, 1e-3, is above the bounds that hold in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def signal_handlers():
    """Puts the handlers of SIGINT and SIGTERM back, which a command leaves in place once it was ended by one."""
    before = {one: signal.getsignal(one) for one in SIGNALS}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)
    atexit.unregister(signal.signal)


@contextmanager
def never_waiting():
    """Inside, whatever makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cuda_memory() -> tuple[int, int]:
    """Bytes that tensors hold on the GPU, and bytes that torch has taken of it, once all work is done."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.fixture
def picture():
    """`picture(k)`: a still, recognisable 64x64 RGB image, another one for every k."""
    from PIL import Image, ImageDraw

    def draw(k: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
        image = Image.new("RGB", size, (40 * k % 256, 90, 200 - 30 * k % 200))
        ImageDraw.Draw(image).ellipse((8 + 3 * k, 10, 40 + 3 * k, 50), fill=(230, 200 - 20 * k % 200, 30))
        return image

    return draw


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.INFO, logger="streamflow")


def recording_backend(graphs: list) -> Callable[..., Any]:
    """A new backend of torch.compile, which runs each graph as it is and keeps its inputs in this list."""

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., Any]:
        graphs.append(inputs)
        return graph.forward

    return backend


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| of the worst frame."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


def streamed(stream: StreamFlow, noises: torch.Tensor, **options) -> torch.Tensor:
    """All frames of `noises` `[n, ...]` through the stream, in order: n clean latents."""
    groups = [stream.predict_x0_batch(x, **options) for x in noises.split(stream.frame_bff_size)]
    return torch.cat([g for g in groups if g is not None] + stream.flush())


def noises(stream: StreamFlow, n: int) -> torch.Tensor:
    return torch.cat([stream.frame_noise(k) for k in range(n)])


class Taken(torch.nn.Module):
    """In the place of a decoder: keeps the latents, and draws black."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[torch.Tensor] = []

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        self.taken += latents.split(1)
        return torch.zeros(len(latents), 3, 64, 64)


def drawn(stream: StreamFlow, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The latents of these inputs of `frames`, in order. An input that is a function is called, and no input."""
    decoder, taken = stream.codec.decoder, Taken()

    def given():
        for one in inputs:
            if callable(one):
                one()
            else:
                yield one

    stream.codec.decoder = taken
    count = sum(1 for _ in stream.frames(given()))
    stream.codec.decoder = decoder
    return taken.taken[:count]
