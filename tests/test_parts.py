"""The parts of a stream by themselves, without `StreamFlow`: each is given what it needs, and does its own work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_pipelines import random_pipeline
from random_pipelines.control import random_control
from random_pipelines.image_prompts import WIDTH, random_adapter, with_encoder
from test_loras import write_lora
from torch import Tensor, nn

from streamflow import models
from streamflow.acceleration import Accelerated, Part, Parts
from streamflow.acceleration.accelerator import Accelerator
from streamflow.conditioning.controlnet import LEVELS, image_name
from streamflow.conditioning.image_prompt import SCALES, embeds_name
from streamflow.image_utils import mark
from streamflow.stream.conditioner import Conditioner, Start
from streamflow.stream.controlnets import ControlNets
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.engine import ENGINES, make_engine
from streamflow.stream.hooks import Hooks
from streamflow.stream.image_prompts import ImagePrompts
from streamflow.stream.inputs import ImageReader, Inputs
from streamflow.stream.loras import Loras
from streamflow.stream.model import Model
from streamflow.stream.outputs import Outputs
from streamflow.stream.planner import Planner
from streamflow.stream.request import NotPreparedError, Request
from streamflow.stream.ring import Carried, Done, Group, Loop, Ring
from streamflow.stream.updates import Updates

DEFAULTS = {
    "t_index_list": (2, 3),
    "cfg_type": "none",
    "do_add_noise": False,
    "noise": "fixed",
    "noise_period": 30,
    "feedback": 0.0,
}


@dataclass(frozen=True, eq=False)
class Made:
    """The parts that the others are given."""

    model: Model
    planner: Planner
    denoiser: Denoiser
    outputs: Outputs
    updates: Updates
    reader: ImageReader
    inputs: Inputs

    def group(self, images: Tensor | None = None, **options: Any) -> Group:
        """The group of the next frames."""
        return self.inputs.group(self.denoiser.next_ids(self.model.frames), images=images, **options)


@pytest.fixture
def made(pipes):
    """`made(frames=1, batched=True, prepare=True, ...)`: parts over a small random pipeline."""

    def make(frames: int = 1, batched: bool = True, prepare: bool = True, pipe: Any = None, **defaults: Any) -> Made:
        pipe = pipe or pipes("sd3")
        model = Model(pipe, models.adapter_for(pipe), None, None, frames, None)
        planner, denoiser = Planner(model), Denoiser(model, batched)
        outputs = Outputs(model, denoiser)
        updates = Updates(model, planner, denoiser, outputs, **{**DEFAULTS, **defaults})
        reader = ImageReader(model, denoiser)
        parts = Made(model, planner, denoiser, outputs, updates, reader, Inputs(model, denoiser, reader))
        if prepare:
            updates.prepare("a red apple", num_inference_steps=4, seed=3)
        return parts

    return make


class Log:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def note(self) -> None:
        self.calls += 1


def image_of(value: float, count: int = 1) -> Tensor:
    """A grey image, `[count, 3, 64, 64]` in [-1, 1]."""
    return torch.full((count, 3, 64, 64), value)


# -- requests and updates -------------------------------------------------------------------------------------------------


def test_a_planner_makes_stages_a_prompt_and_a_weight_of_a_request(made):
    planner = made(prepare=False).planner
    request = Request("a cat", "blur", 4, guidance_scale=3.0, t_index_list=(1, 3), cfg_type="full")
    plan = planner.plan(request, None, 7)
    assert plan.stages.indices == (1, 3) and len(plan.schedule) == 4
    assert torch.equal(plan.stages.sigmas, plan.schedule.sigmas[[1, 3]])
    assert plan.stages.sigmas_next.tolist() == [plan.stages.sigmas[1].item(), 0.0]
    assert plan.prompt.uncond is not None and plan.prompt.differing(planner.plan(request, None, 7).prompt) == frozenset()
    assert plan.weight == 3.0 and plan.guidance_scale == 3.0 and plan.noise.seed == 7
    unguided = planner.plan(replace(request, cfg_type="none"), None, 7)
    assert unguided.weight == 1.0 and unguided.prompt.uncond is None
    with pytest.raises(ValueError, match="the schedule has 4 steps"):
        planner.plan(replace(request, t_index_list=(1, 4)), None, 7)


def test_a_planner_encodes_each_text_once(made, monkeypatch):
    parts = made(prepare=False)
    planner, adapter, reads = parts.planner, parts.model.adapter, []
    read = adapter.read
    monkeypatch.setattr(
        adapter, "read", lambda arguments, *rest: reads.append(arguments["prompt"]) or read(arguments, *rest)
    )
    request = Request([("a cat", 0.5), ("a dog", 0.5)], num_inference_steps=4, t_index_list=(2, 3), cfg_type="none")
    plan = planner.plan(request, None, 1)
    assert reads == ["a cat", "a dog"]
    changed = planner.change(plan, replace(request, prompt=[("a cat", 0.9), ("a fox", 0.1)]), None)
    assert reads[2:] == ["a fox"] and plan.prompt.differing(changed.prompt)
    assert changed.stages is plan.stages, "the same noise levels are the same object"
    planner.plan_again(plan)
    assert reads[3:] == ["a cat", "a dog"]


def test_updates_merge_and_one_that_fails_changes_nothing(made):
    parts = made(cfg_type="self")
    updates, before = parts.updates, parts.denoiser.state
    assert updates.update(guidance_scale=3.0) == 1 and updates.update(prompt="a cat", delta=0.5) == 2
    pending = updates.pending
    request = pending.target.request
    assert (request.prompt, request.guidance_scale, request.delta) == ("a cat", 3.0, 0.5) and pending.entries
    assert parts.denoiser.state is before and updates.requested() is pending.target
    for wrong in ({"delta": None}, {"t_index_list": [9]}, {"no_such_argument": 1}, {"scope": "later"}):
        with pytest.raises((TypeError, ValueError)):
            updates.update(**wrong)
        assert updates.pending is pending and updates.count == 2
    updates.take()
    assert parts.denoiser.state is pending.target and updates.pending is None
    assert parts.denoiser.running().weight == pending.target.weight == 2.0
    updates.take()
    assert parts.denoiser.state is pending.target


def test_new_stages_let_frames_in_flight_finish_first(made):
    parts = made()
    parts.denoiser.tick(parts.group())
    parts.updates.update(t_index_list=[3])
    assert not parts.denoiser.finished and len(parts.denoiser.running().settings.stages) == 2
    parts.updates.take()
    assert [done.ids for done in parts.denoiser.finished] == [(0,)]
    assert len(parts.denoiser.running().settings.stages) == 1 and parts.denoiser.running().empty


# -- what enters ----------------------------------------------------------------------------------------------------------


def test_an_image_becomes_noised_latents_and_carries_its_anchor(made):
    parts = made(cfg_type="self")
    model, inputs, state = parts.model, parts.inputs, parts.denoiser.prepared()
    images = inputs.images(mark(image_of(0.25)))
    group = parts.group(images)
    x0, noise = model.encode(images), inputs.fixed_noise(state.noise)
    assert torch.equal(group.x, model.adapter.path(x0, noise, parts.denoiser.running().first_sigma))
    assert group.ids == (0,) and group.prompts == (state.prompt,)
    assert set(group.carried) == {"anchor"} and torch.equal(group.carried["anchor"].value, x0.float())
    for wrong, message in (("a.png", "not str"), (image_of(2.0), "outside of"), (torch.zeros(1, 64, 64), "not .1, 64, 64.")):
        with pytest.raises((TypeError, ValueError), match=message):
            inputs.images(wrong)


def test_a_text_frame_starts_from_its_own_noise_or_from_latents(made):
    parts = made(frames=2, do_add_noise=True)
    state = parts.denoiser.prepared()
    group = parts.group()
    own = torch.cat([state.noise.draw(0), state.noise.draw(1)])
    assert torch.equal(group.x, own) and torch.equal(group.carried["noise"].value, own) and group.ids == (0, 1)
    latents = torch.randn(2, *parts.model.shape)
    given = parts.group(latents=latents, anchor=latents)
    assert torch.equal(given.x, latents) and "anchor" not in given.carried, "this guidance has no anchors"
    assert parts.inputs.group_count(None, None) == 1 and parts.inputs.group_count(4, None) == 2
    with pytest.raises(ValueError, match="multiple of frame_buffer_size 2"):
        parts.inputs.group_count(3, None)
    with pytest.raises(ValueError, match="latents must be"):
        parts.inputs.group_count(4, latents)


class Brightness(Conditioner):
    """A condition of each frame that the package does not have: a number that brightens the drawn image, which shifts the
    start too and travels with the frame."""

    name = "brightness"
    active = False
    uses_image = False

    def read(self, given: Any, images: Tensor | None, positions: range) -> list[Any]:
        values = given if isinstance(given, list) else [given] * len(positions)
        if len(values) != len(positions):
            raise ValueError(f"{len(values)} values of brightness for {len(positions)} frames")
        return values

    def compared(self, entries: Sequence[Any]) -> Tensor | None:
        return torch.tensor(entries).reshape(-1, 1, 1, 1).expand(-1, 1, 64, 64)

    def join(self, group: Group, entries: Sequence[Any], start: Start) -> Group:
        values = torch.tensor(entries).reshape(-1, 1, 1, 1)
        return replace(
            group,
            x=group.x + start.sigma * values,
            carried={**group.carried, "brightness": Carried(values)},
            finish=lambda images: images + values,
        )


def test_a_conditioner_of_ones_own_is_read_compared_and_joined(made):
    parts = made(frames=2)
    inputs, denoiser, own = parts.inputs, parts.denoiser, Brightness()
    conditioner: Conditioner = own
    inputs.conditioners = (conditioner,)
    images = image_of(0.0, 2)
    assert inputs.conditions({"brightness": None}, images, range(2)) == []
    assert inputs.compared(images, []) is images
    with pytest.raises(ValueError, match="3 values of brightness for 2 frames"):
        inputs.conditions({"brightness": [0.1, 0.2, 0.3]}, images, range(2))
    conditions = inputs.conditions({"brightness": [0.25, 0.5]}, images, range(2))
    assert conditions == [(own, [0.25, 0.5])]
    compared = inputs.compared(images, conditions)
    assert compared.shape == (2, 4, 64, 64) and compared[1, 3].unique().tolist() == [0.5]
    plain, group = parts.group(images), parts.group(images, conditions=conditions)
    shift = denoiser.running().first_sigma * torch.tensor([0.25, 0.5]).reshape(-1, 1, 1, 1)
    assert torch.allclose(group.x - plain.x, shift.expand_as(group.x), atol=1e-6)
    denoiser.tick(group)
    denoiser.tick(plain)
    done = denoiser.oldest()
    drawn = parts.outputs.decode(done)
    assert torch.equal(drawn, parts.model.codec.decode(done.x0) + torch.tensor([0.25, 0.5]).reshape(-1, 1, 1, 1))


# -- what leaves ----------------------------------------------------------------------------------------------------------


def test_outputs_decode_and_apply_what_the_group_brought(made):
    parts = made()
    x0 = parts.model.encode(image_of(0.5))
    plain = parts.outputs.decode(Done(x0, (0,), False))
    assert plain.shape == (1, 3, 64, 64) and torch.equal(plain, parts.model.codec.decode(x0))
    finished = Done(x0, (0,), False, lambda images: -images)
    assert torch.equal(parts.outputs.decode(finished), -plain)
    later = parts.outputs.decode_later(finished)
    assert later.done() and torch.equal(later.result(), -plain)


def test_outputs_fill_an_empty_ring_with_copies(made):
    parts = made()
    drawn = parts.outputs.enter(parts.group(image_of(0.5)))
    assert drawn.shape == (1, 3, 64, 64) and parts.denoiser.calls_behind == 1 and parts.denoiser.in_flight() == 0
    parts.outputs.enter(parts.group(image_of(0.1)))
    assert parts.denoiser.calls_behind == 1 and parts.denoiser.in_flight() == 1


def test_the_filter_skips_equal_images_and_keeps_the_last_finite_ones(made):
    outputs = made().outputs
    good, bad = image_of(0.5), image_of(float("nan"))
    assert outputs.show(good) is good and outputs.prev_image_result is good and outputs.not_finite == 0
    with pytest.raises(ValueError, match="max_skip_frame"):
        outputs.enable_filter(0.5, -1)
    assert not outputs.similar_image_filter
    outputs.enable_filter(0.5, max_skip_frame=1)
    assert [outputs.skips(good) for _ in range(4)] == [False, True, False, True]
    outputs.redraw()
    assert [outputs.skips(good) for _ in range(3)] == [False, False, True], "two stages are drawn first"
    assert outputs.show(bad) is bad and torch.equal(outputs.prev_image_result, good) and outputs.not_finite == 1
    assert not outputs.skips(good), "no frame is skipped for one that was not finite"


# -- frames in flight -----------------------------------------------------------------------------------------------------


def test_a_denoiser_counts_hands_out_and_empties(made):
    parts = made()
    denoiser, emptied = parts.denoiser, Log()
    denoiser.on_empty.add(emptied.note)
    for _ in range(4):
        denoiser.tick(parts.group())
    assert denoiser.next_id == 4 and denoiser.in_flight() == 4 and denoiser.calls_behind == 4
    first, second, third = denoiser.finished
    assert [one.ids for one in denoiser.finished] == [(0,), (1,), (2,)] and denoiser.oldest() is first
    denoiser.hand_out([second])
    assert denoiser.oldest() is first, "groups leave in order"
    denoiser.hand_out([first, second])
    assert denoiser.oldest() is third and torch.equal(denoiser.last_x0, third.x0)
    assert [len(left) for left in denoiser.flush()] == [1, 1] and denoiser.in_flight() == 0 and denoiser.next_id == 4
    denoiser.tick(parts.group())
    denoiser.reset()
    assert denoiser.next_id == 0 and denoiser.last_x0 is None and denoiser.running().empty and emptied.calls == 1


def test_a_denoiser_refuses_calls_inside_a_step(made):
    parts = made()
    denoiser = parts.denoiser
    calls = (denoiser.flush, denoiser.reset, denoiser.close, lambda: denoiser.set_batched(False))
    with denoiser.step():
        for call in (*calls, lambda: denoiser.check_free("stream(image)"), lambda: denoiser.tick(parts.group())):
            with pytest.raises(RuntimeError, match="inside a step"):
                call()
    denoiser.tick(parts.group())
    with pytest.raises(RuntimeError, match="1 frames are in flight"):
        denoiser.set_batched(False)
    denoiser.flush()
    denoiser.set_batched(False)
    assert isinstance(denoiser.running(), Loop) and denoiser.stages == 1


def test_a_denoiser_has_nothing_to_draw_before_prepare_and_after_close(made):
    parts = made(prepare=False)
    denoiser, ended = parts.denoiser, Log()
    denoiser.on_close.add(ended.note)
    for call in (denoiser.prepared, denoiser.running, denoiser.flush, lambda: denoiser.check_free("stream(image)")):
        with pytest.raises(NotPreparedError, match="prepare"):
            call()
    parts.updates.prepare("a red apple", num_inference_steps=4)
    denoiser.close()
    denoiser.close()
    assert ended.calls == 1 and parts.model.closed
    for call in (denoiser.prepared, denoiser.running, denoiser.flush, denoiser.reset):
        with pytest.raises(RuntimeError, match="was closed"):
            call()


def test_a_denoiser_is_closed_where_a_function_of_its_end_raises(made):
    parts = made()

    class Failing:
        def undo(self) -> None:
            raise RuntimeError("the layers cannot be put back")

    failing = Failing()
    parts.denoiser.on_close.add(failing.undo)
    with pytest.raises(RuntimeError, match="cannot be put back"):
        parts.denoiser.close()
    assert parts.model.closed and parts.denoiser.state is None
    with pytest.raises(RuntimeError, match="was closed"):
        parts.denoiser.running()
    parts.denoiser.close()


def test_an_adapter_names_its_engine(made, monkeypatch):
    parts = made()
    adapter, settings, weight = parts.model.adapter, parts.denoiser.running().settings, parts.denoiser.prepared().weight
    assert isinstance(make_engine(adapter, settings, weight, batched=True), Ring)
    assert isinstance(make_engine(adapter, settings, weight, batched=False), Loop)
    monkeypatch.setattr(type(adapter), "engine", "backwards")
    with pytest.raises(ValueError, match=r"unknown engine 'backwards' of .*: choose one of ring, pipeline_calls"):
        make_engine(adapter, settings, weight, batched=True)
    monkeypatch.setitem(ENGINES, "backwards", lambda adapter, settings, weight, batched, devices: Loop(settings, weight))
    parts.denoiser.set_batched(True)
    assert isinstance(parts.denoiser.running(), Loop)


# -- conditions, LoRAs, hooks, acceleration -------------------------------------------------------------------------------


def test_control_nets_are_added_scaled_read_joined_and_removed(made):
    parts = made()
    model, denoiser, redrawn = parts.model, parts.denoiser, Log()
    nets = ControlNets(model, denoiser, redrawn.note, parts.reader)
    assert nets.controls == {} and nets.read(None, None, range(2)) == [None, None]
    with pytest.raises(ValueError, match="no control is named 'edges'"):
        nets.read({"edges": image_of(0.5)}, None, range(1))
    plain = model.adapter.velocity
    with pytest.raises(TypeError, match="control nets of SD3Transformer2DModel"):
        nets.add_control("edges", nn.Linear(1, 1))
    assert model.adapter.velocity is plain and nets.controls == {} and not nets.active
    nets.add_control("edges", random_control(model.adapter.net), scale=0.5)
    nets.set_control_scale("edges", 0.75)
    assert nets.controls == {"edges": 0.75} and nets.active and redrawn.calls == 2
    with pytest.raises(ValueError, match="no image for control 'edges'"):
        nets.read({}, None, range(1))
    entries = nets.read({"edges": mark(image_of(0.5))}, None, range(1))
    assert nets.compared(entries).shape == (1, 3, 64, 64)
    group = parts.group()
    joined = nets.join(group, entries, Start(group.x, denoiser.running().first_sigma))
    cond = joined.prompts[0].cond
    assert torch.equal(cond.rows[image_name(0)], model.encode(image_of(0.5)))
    denoiser.tick(joined)
    assert cond.shared[LEVELS].tolist()[0][0] == 0.75, "scales act before a step"
    nets.remove_control("edges")
    assert nets.controls == {} and not nets.active and denoiser.before_step.methods == []
    assert [done.ids for done in denoiser.finished] == [(0,)]


def test_image_prompts_are_loaded_scaled_read_joined_and_taken_out_again(made):
    parts = made(pipe=with_encoder(random_pipeline("sd3")))
    model, denoiser, redrawn = parts.model, parts.denoiser, Log()
    prompts = ImagePrompts(model, denoiser, redrawn.note, parts.reader)
    assert not prompts.active and prompts.read(None, None, range(2))[0].images == {}
    plain = model.adapter.velocity
    with pytest.raises(ValueError, match="does not fit SD3Transformer2DModel"):
        prompts.load({"image_proj": {}, "ip_adapter": {}})
    assert model.adapter.velocity is plain and prompts.adapters == {} and redrawn.calls == 0
    assert prompts.load(random_adapter(model.pipe), "style") == ("style",)
    assert prompts.active and prompts.adapters == {"style": 0.5}
    entries = prompts.read(image_of(0.5), None, range(1))
    assert prompts.compared(entries) is None
    group = parts.group()
    joined = prompts.join(group, entries, Start(group.x, denoiser.running().first_sigma))
    cond = joined.prompts[0].cond
    assert cond.rows[embeds_name(0)].shape == (1, 4, WIDTH) and cond.rows[SCALES].tolist() == [[0.5]]
    assert prompts.join(group, entries, Start(group.x, group.x)).prompts[0] is joined.prompts[0], "the same is made once"
    denoiser.tick(joined)
    prompts.set_scale(0.25)
    denoiser.tick(prompts.join(parts.group(), prompts.read(None, None, range(1)), Start(group.x, group.x)))
    assert denoiser.running()._flight.prompts[1].cond.rows[SCALES].tolist() == [[0.25]], "scales act before a step"
    assert prompts.example(group.prompts[0]).cond.rows.keys() == cond.rows.keys()
    prompts.unload()
    assert model.adapter.velocity.__class__ is plain.__class__ and denoiser.before_step.methods == []
    assert [done.ids for done in denoiser.finished] == [(0,), (1,)]


def test_loras_are_loaded_named_and_taken_out_again(made, tmp_path):
    write_lora(random_pipeline("sd3"), {"transformer": ["to_q"]}, str(tmp_path), seed=1)
    parts = made(pipe=random_pipeline("sd3"))
    redrawn = Log()
    loras = Loras(parts.model, parts.denoiser, parts.updates, redrawn.note)
    x = torch.randn(2, *parts.model.shape, generator=torch.Generator().manual_seed(0))
    state = parts.denoiser.prepared()
    drawn = lambda: parts.denoiser.running().rows.advance(parts.model.velocity, x, (state.prompt,) * 2, state.weight)[1]  # noqa: E731
    with torch.no_grad():
        before = drawn()
        assert loras.load_lora(str(tmp_path)) == "default_0" and loras.loras == ("default_0",)
        assert not torch.equal(drawn(), before) and redrawn.calls == 1
        with pytest.raises(ValueError, match="no LoRA is named 'style': loaded are default_0"):
            loras.set_adapters({"style": 1.0})
        loras.set_adapters({"default_0": 0.0})
        assert torch.allclose(drawn(), before, atol=1e-6)
        parts.model.acceleration = "compile", SimpleNamespace(fuse_qkv=True)
        with pytest.raises(RuntimeError, match="has changed the layers"):
            loras.unload_lora()
        parts.model.acceleration = "none", None
        loras.unload_lora()
        assert loras.loras == () and torch.equal(drawn(), before)


def test_hooks_show_each_step_and_record_trajectories(made):
    parts = made()
    denoiser = parts.denoiser
    hooks = Hooks(parts.model, denoiser)
    assert hooks.observer is None and denoiser.running().observer is None
    seen = []
    hooks.on_step(lambda step: seen.append(step) or step.x_next + 1.0)
    trace = hooks.trace(1)
    assert denoiser.running().observer == hooks.observer
    rows, (first, second) = denoiser.running().rows, (parts.group(), None)
    x, v, x_next = torch.randn(3, 2, *parts.model.shape).unbind()
    assert torch.equal(hooks.observer(rows, (first, second), x, v, x_next), x_next + 1.0)
    assert seen[0].ids == (0, None) and seen[0].stages == (0, 1) and not trace.done
    hooks.observer(rows, (None, first), x, v, x_next)
    assert trace.done and torch.equal(trace.frames[0].x, torch.stack((x[0], x[1], x_next[1] + 1.0)))
    endless = hooks.trace(5)
    with pytest.raises(RuntimeError, match="replays CUDA graphs"):
        hooks.check_acceleration("cuda-graph", None)
    denoiser.reset()
    hooks.on_step(None)
    assert hooks.observer is None and denoiser.running().observer is None and not endless.done
    hooks.check_acceleration("cuda-graph", None)


class Accelerable:
    """A model as an `Accelerator` takes it, a way to accelerate its parts, and a record of what was used."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.acceleration: tuple[str, Any] = ("none", None)
        self.accelerated: Accelerated | None = None
        one = Part("velocity", nn.Linear(2, 2), {"x": torch.zeros(1, 2)})
        self.parts: Parts | None = Parts(one, replace(one, name="decoder"), replace(one, name="encoder"))
        self.undone, self.used, self.fails = 0, [], False

    def accelerate(self, kind: str, parts: Parts, options: Any) -> Accelerated:
        if self.fails:
            raise RuntimeError("no compiler")
        return Accelerated({part.name: nn.Identity() for part in parts}, self.undo, {"velocity": 0.5})

    def use(self, accelerated: Accelerated | None) -> None:
        self.accelerated = accelerated
        self.used.append(accelerated)

    def undo(self) -> None:
        self.undone += 1

    def ticks(self, groups: int):
        return iter([torch.zeros(1, 3, 2, 2)] * groups)

    def check(self, kind, options):
        if kind == "cuda-graph" or (kind == "compile" and options.backend == "inductor"):
            raise NotImplementedError(f"not this one, {kind}")


def test_an_accelerator_accelerates_undoes_and_accelerates_anew():
    model = Accelerable()
    accelerator = Accelerator(model, lambda: model.parts, model.accelerate, model.check, model.ticks)
    accelerator.put_back()
    accelerator.rebuild()
    assert accelerator.kind == "none" and model.used == []
    accelerator.accelerate("compile", backend="eager")
    assert accelerator.kind == "compile" and set(model.used[-1].modules) == {"velocity", "decoder", "encoder"}
    accelerator.put_back()
    accelerator.put_back()
    assert model.undone == 1 and model.used[-1] is None and accelerator.kind == "compile", "it stays requested"
    accelerator.rebuild()
    assert len(model.used) == 3 and model.used[-1] is not None
    with pytest.raises(NotImplementedError, match="not this one"):
        accelerator.accelerate("compile", backend="inductor")
    with pytest.raises(ValueError, match="unknown acceleration"):
        accelerator.accelerate("magic")
    assert accelerator.kind == "compile" and model.undone == 1, "what is refused changes nothing"
    accelerator.accelerate("none")
    assert accelerator.kind == "none" and model.undone == 2 and model.used[-1] is None


def test_an_accelerator_waits_for_shapes_and_an_error_leaves_none():
    model = Accelerable()
    parts, model.parts = model.parts, None
    accelerator = Accelerator(model, lambda: model.parts, model.accelerate, model.check, model.ticks)
    accelerator.accelerate("compile", backend="eager")
    assert accelerator.kind == "compile" and model.used == []
    model.parts, model.fails = parts, True
    with pytest.raises(RuntimeError, match="no compiler"):
        accelerator.rebuild()
    assert accelerator.kind == "none" and model.used == []
    accelerator.rebuild()
    assert model.used == [], "nothing is requested any more"
