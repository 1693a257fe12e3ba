"""Which split suits a network on several devices: rows of every step, or whole frames in turn."""

from __future__ import annotations

import logging

import pytest
from random_pipelines import random_pipeline

from streamflow import StreamFlow, StreamFlowWrapper
from streamflow.parallel import spread
from streamflow.parallel.in_turn import InterleavedVelocity
from streamflow.parallel.rows import ShardedVelocity
from streamflow.parallel.split import Costs, split_costs

# One H100, 512x512, 4 stages on 4 devices (static/benchmarks/scaling-h100x4.json): milliseconds at 4 rows and at one.
SMALL = Costs(4, 10.4e-3, 4.3e-3)
LARGE = Costs(4, 250e-3, 66e-3)


@pytest.mark.parametrize(
    "costs,target,split",
    [
        (SMALL, None, "frames"),
        (SMALL, 200, "rows"),  # 233 a second
        (SMALL, 300, "frames"),
        (LARGE, None, "rows"),
        (Costs(2, 1 / 5.75, 1 / 10), 11, "frames"),  # which alone hold it
        (LARGE, 30, "rows"),  # neither holds it, and frames gain little
        (Costs(2, 1.0, 0.5), None, "rows"),
        (Costs(2, 1.0, 1.0), None, "frames"),
    ],
)
def test_rows_where_they_hold_the_rate_and_else_what_is_worth_it(costs, target, split):
    assert costs.choose(target) == split


def prepared(**options) -> StreamFlow:
    stream = StreamFlow(random_pipeline("sd3"), range(4), width=32, height=32, **{"cfg_type": "none", **options})
    guided = stream.cfg_type == "full"
    stream.prepare("a", "b" if guided else "", num_inference_steps=4, guidance_scale=3.0 if guided else 1.0)
    return stream


@pytest.mark.parametrize("cfg_type", ["none", "full"])
def test_costs_are_of_all_rows_and_of_a_share(cfg_type):
    stream, seen = prepared(cfg_type=cfg_type), []
    stream.adapter.velocity.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    costs = split_costs(stream, 2)
    assert costs.devices == 2 and costs.whole > 0 and costs.share > 0
    rows = 8 if cfg_type == "full" else 4
    assert set(seen) == {rows, rows // 2}


def test_the_stream_is_spread_by_the_split_that_is_returned_and_logged(caplog):
    stream = prepared()
    with caplog.at_level(logging.INFO, "streamflow.parallel.split"):
        split = spread(stream, ["cpu", "cpu"])
    assert isinstance(stream.adapter.velocity, {"rows": ShardedVelocity, "frames": InterleavedVelocity}[split])
    assert f"split by {split}" in caplog.text and "frames" in caplog.text


def test_feedback_needs_rows():
    stream = prepared(feedback=0.2)
    assert spread(stream, ["cpu", "cpu"]) == "rows"


def test_a_stream_that_is_not_prepared_is_refused():
    with pytest.raises(RuntimeError, match="prepare"):
        spread(StreamFlow(random_pipeline("sd3"), range(4), width=32, height=32), ["cpu", "cpu"])


@pytest.mark.slow
def test_the_wrapper_chooses_at_its_first_preparation():
    options = {
        "mode": "txt2img",
        "cfg_type": "none",
        "warmup": 0,
        "device_ids": ["cpu", "cpu"],
        "device": "cpu",
    }
    with StreamFlowWrapper("embedded", split="auto", target_rate=1e-6, **options) as wrapper:
        plain = wrapper.stream.adapter.velocity
        wrapper.prepare("a fox, 3d render", num_inference_steps=2)
        spread_to = wrapper.stream.adapter.velocity
        assert isinstance(spread_to, ShardedVelocity) and spread_to.source is plain  # rows hold this rate
        wrapper.prepare("a dog, 3d render", num_inference_steps=2)
        assert wrapper.stream.adapter.velocity is spread_to


@pytest.mark.parametrize("rate,error", [(0, ValueError), (-5, ValueError), (float("nan"), ValueError), ("fast", TypeError)])
def test_a_target_rate_is_a_positive_number(rate, error):
    with pytest.raises(error, match="target_rate"):
        spread(prepared(), ["cpu", "cpu"], target_rate=rate)


def test_a_stream_with_frames_in_flight_is_refused():
    stream = prepared()
    stream.predict_x0_batch(stream.frame_noise(0))
    with pytest.raises(RuntimeError, match="1 groups of frames are in flight"):
        spread(stream, ["cpu", "cpu"])


@pytest.mark.parametrize(
    "given,error,says",
    [
        ({"split": "rows", "target_rate": 30}, ValueError, "for split='auto'"),
        ({"split": "auto", "acceleration": "fast"}, ValueError, "unknown acceleration 'fast'"),
    ],
)
def test_the_wrapper_refuses_at_once(given, error, says):
    with pytest.raises(error, match=says):
        StreamFlowWrapper("embedded", mode="txt2img", cfg_type="none", device_ids=["cpu", "cpu"], device="cpu", **given)
