"""Every family on a GPU: the pipeline's bits row by row, and the same images from a CUDA graph."""

import pytest
import torch
from conftest import noises, relative_error, streamed
from random_pipelines import random_pipeline
from test_families import PLAIN, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("full_float32"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture
def pipes():
    return lambda family, dtype=torch.float32, **changes: random_pipeline(family, **changes).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_a_stream_draws_what_the_pipeline_draws(case, dtype, pipes):
    check(case, pipes, dtype=dtype)


@pytest.mark.parametrize("name", PLAIN)
def test_a_graph_draws_the_same(name, pipes):
    stream = PLAIN[name].stream(pipes, frames=1)
    latents = noises(stream, 4)
    plain = streamed(stream, latents)
    if stream.adapter.capturable:
        stream.accelerate("cuda-graph")
    else:
        with pytest.raises(RuntimeError, match="synchronises with its device.*accelerate\\('compile'\\)"):
            stream.accelerate("cuda-graph")
    assert relative_error(streamed(stream, latents), plain) < 1e-3
    stream.accelerate("none")
    assert torch.equal(streamed(stream, latents), plain)
