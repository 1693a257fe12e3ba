"""Calls in any order, and odd values for the pure parts, made by hypothesis: a call gives what the model of the ring
(`fuzz_model`) says, or raises what the docstrings say with a message, and the stream goes on working."""

from __future__ import annotations

import math
import socket
import time
from functools import cache

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from conftest import relative_error
from fuzz_model import Frame, Group, Look, Model, Refused

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from streamflow import StreamFlow  # noqa: E402
from streamflow.app import config  # noqa: E402
from streamflow.app.config import ConfigError, Settings  # noqa: E402
from streamflow.conditioning.inpaint import read_mask  # noqa: E402
from streamflow.flow.schedule import Schedule  # noqa: E402
from streamflow.image_utils import Normalized, normalize_image  # noqa: E402
from streamflow.io.addresses import open_sink, open_source  # noqa: E402
from streamflow.live.remote.settings import Mapping  # noqa: E402
from streamflow.stream.frames import Input  # noqa: E402

pytestmark = pytest.mark.extras
SIZE = 32
TOLERANCE = 1e-4
DOCUMENTED = (ValueError, TypeError, RuntimeError, NotImplementedError)
KEYS = st.integers(0, 3)
INDICES = st.sampled_from([(1, 3), (3,), (1, 2, 3), (0, 2)])
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(["a boat", "a red apple, 3d render", (("a cat", 0.7), ("a dog", 0.3))]),
        "negative_prompt": st.sampled_from(["", "blurry"]),
        "guidance_scale": st.sampled_from([1.0, 2.0, 5.0]),
        "delta": st.sampled_from([0.5, 1.0]),
        "num_inference_steps": st.sampled_from([3, 4, 6]),
        "t_index_list": INDICES,
        "strength": st.sampled_from([0.5, 0.7, 1.0]),
        "noise": st.sampled_from(["fixed", "frame"]),
        "feedback": st.sampled_from([0.0, 0.3]),
        "seed": st.sampled_from([2, 3]),
    },
)
GENTLE = st.none() | st.sampled_from(
    [{"prompt": "a boat"}, {"prompt": "a hill", "scope": "frame"}, {"guidance_scale": 4.0}, {"t_index_list": (2, 3)}]
)  # always taken
BAD = {
    "an unknown scope": lambda s: s.update(scope="later", prompt="a"),
    "an unknown argument": lambda s: s.update(colour="red"),
    "no prompt": lambda s: s.prepare(),
    "a prompt of numbers": lambda s: s.update_prompt(3),
    "NaN": lambda s: s.update(guidance_scale=math.nan),
    "all feedback": lambda s: s.update(feedback=1.0),
    "no steps": lambda s: s.prepare("a", num_inference_steps=0),
    "repeated": lambda s: s.update(t_index_list=[2, 2]),
    "half a seed": lambda s: s.update(seed=0.5),
    "a text": lambda s: s("picture.png"),
    "NaN in a picture": lambda s: s(torch.full((s.frame_bff_size, 3, SIZE, SIZE), math.nan)),
    "too many pictures": lambda s: s([PIL.Image.new("RGB", (8, 8))] * 5),
    "a mask of another size": lambda s: s(still(0).repeat(s.frame_bff_size, 1, 1, 1), mask=np.ones((3, 3), bool)),
    "a mask alone": lambda s: s(mask=np.ones((SIZE, SIZE), bool)),
    "no mask": lambda s: s.inpaint(PIL.Image.new("RGB", (8, 8))),
    "no frames": lambda s: s.txt2img(0),
    "other latents": lambda s: s.predict_x0_batch(torch.zeros(7, 1, 2, 2)),
    "NaN of a filter": lambda s: s.enable_similar_image_filter(math.nan),
    "no function": lambda s: s.on_step(3),
    "no frame to trace": lambda s: s.trace(0),
    "an unknown kind": lambda s: s.accelerate("magic"),
    "a batch of 1": lambda s: s.set_denoising_batch(1),
    "frames of nothing": lambda s: list(s.frames(None)),
}


@cache
def still(key: int) -> Normalized:
    """One of some images that are as unlike each other as can be, `[1, 3, SIZE, SIZE]`."""
    dice = torch.Generator().manual_seed(key)
    return normalize_image((torch.rand(3, SIZE, SIZE, generator=dice) > 0.5).float(), SIZE, SIZE)


@cache
def mask(key: int) -> np.ndarray:
    return np.random.default_rng(key).random((SIZE, SIZE)) > 0.5


class Reference:
    """What the sequential loop draws of one frame alone, and how a stream would stop at its levels."""

    def __init__(self, pipe, **options) -> None:
        self.stream = StreamFlow(pipe, (1, 3), width=SIZE, height=SIZE, use_denoising_batch=False, **options)
        self.embedded = self.stream.adapter.guidance_argument != "guidance_scale"
        self._prepared: Look | None = None
        self._sigmas: dict[tuple, tuple[float, ...]] = {}

    def sigmas(self, look: Look) -> tuple[float, ...]:
        """The noise levels of its stages. ValueError where it cannot be."""
        key = look.num_inference_steps, look.t_index_list, look.strength
        if key not in self._sigmas:
            self._prepare(look)
            self._sigmas[key] = tuple(self.stream.beta_prod_t_sqrt.flatten().tolist())
        return self._sigmas[key]

    def latents(self, key: int) -> torch.Tensor:
        return torch.randn((1, *self.stream._model.shape), generator=torch.Generator().manual_seed(100 + key))

    def draw(self, frame: Frame) -> torch.Tensor:
        """The image `[1, 3, SIZE, SIZE]` of a frame, by what it entered with."""
        self._prepare(frame.look)
        known, drawn = frame.region or (None, None)
        kind, *key = frame.origin
        if frame.region:
            self.stream.inpaint(None if known is None else still(known), mask(drawn))
        try:
            if kind == "picture":
                return self.stream(still(*key)).clone()
            noise = self.stream.frame_noise(frame.id) if kind == "text" else self.latents(*key)
            return self.stream.txt2img(latents=noise).clone()
        finally:
            self.stream.inpaint(None)

    def _prepare(self, look: Look) -> None:
        if look == self._prepared:
            return
        self.stream._updates.defaults |= {"t_index_list": look.t_index_list, "noise": look.noise}
        values = {name: getattr(look, name) for name in PREPARED}
        self.stream.prepare(weighted(look.prompt), look.negative_prompt, **values)
        self._prepared = look


PREPARED = ("num_inference_steps", "guidance_scale", "delta", "strength", "seed")


def weighted(prompt):
    return prompt if isinstance(prompt, str) else list(prompt)


class Calls(RuleBasedStateMachine):
    """A stream, its model, and every call in any order. `references(**options)`: a `Reference` of such a stream."""

    def __init__(self, pipe, references, **options) -> None:
        super().__init__()
        self.pipe, self.references, self.options = pipe, references, options
        self.stream: StreamFlow | None = None

    @initialize(
        frames=st.sampled_from([1, 2]),
        batched=st.sampled_from([True, True, True, False]),
        cfg_type=st.sampled_from(["none", "full", "self", "initialize"]),
        do_add_noise=st.booleans(),
    )
    def make(self, frames, batched, cfg_type, do_add_noise) -> None:
        options = {"cfg_type": cfg_type, "do_add_noise": do_add_noise, **self.options}
        self.reference = self.references(**options)
        self.stream = StreamFlow(
            self.pipe, (1, 3), width=SIZE, height=SIZE, frame_buffer_size=frames, use_denoising_batch=batched, **options
        )
        with pytest.raises(RuntimeError, match="prepare"):
            self.stream.txt2img()
        self.model = Model(frames, batched, Look(), self.reference.sigmas, self.reference.embedded)
        self.last, self.trace, self.steps, self.raise_in = None, None, [], 0
        self.stream.prepare(Look.prompt, guidance_scale=2.0, num_inference_steps=4, seed=2)
        self.stream.on_step(self._step)

    def _step(self, step) -> None:
        self.steps.append((step.ids, step.copies))
        self.raise_in -= 1
        if self.raise_in == 0:
            raise RuntimeError("the function fails")

    # -- the two of them --------------------------------------------------------------------------------------------------

    def both(self, real, predict):
        """(what the stream gave, what the model predicted); None where both refuse."""
        try:
            predicted = predict()
        except Refused as refused:
            with pytest.raises(refused.kind) as raised:
                real()
            assert str(raised.value)
            self.same_steps()
            return None
        got = real()
        self.same_steps()
        return got, predicted

    def same_steps(self) -> None:
        """The frames in the rows of every step were the model's."""
        assert self.steps == self.model.steps
        self.steps.clear(), self.model.steps.clear()

    def same_pictures(self, pictures: torch.Tensor, frames: list[Frame], latents: bool = False) -> None:
        """Of some frames: that they are what a sequential run draws. Latents know nothing of pixels pasted back."""
        assert pictures.shape == (len(frames), 3, SIZE, SIZE) and pictures.isfinite().all()
        for picture, frame in zip(pictures, frames, strict=True):
            own = frame.origin[0] == "picture"
            known = frame.sure and not frame.look.feedback and not (own and frame.look.noise == "frame")
            if known and not (latents and frame.region) and frame.id % 3 == 0:
                assert relative_error(picture[None], self.reference.draw(frame)) <= TOLERANCE, frame

    def same_groups(self, pictures: torch.Tensor, groups: list[Group]) -> None:
        """Of whole groups, whose rows beyond their frames are padding."""
        assert len(pictures) == len(groups) * self.model.F
        for rows, group in zip(pictures.split(self.model.F), groups, strict=True):
            self.same_pictures(rows[: len(group.frames)], list(group.frames))

    def same_latents(self, latents: torch.Tensor, group: Group) -> None:
        self.same_pictures(self.stream.decode_image(latents[: len(group.frames)]), list(group.frames), latents=True)

    @invariant()
    def as_many_in_flight(self) -> None:
        if self.stream is not None:
            assert self.stream._denoiser.in_flight() == self.model.in_flight

    # -- settings ---------------------------------------------------------------------------------------------------------

    @rule(changes=CHANGES)
    def prepare(self, changes) -> None:
        look = Look(**{**changes, "feedback": 0.0, "noise": "fixed", "t_index_list": (1, 3)})
        values = {name: getattr(look, name) for name in PREPARED}
        self.both(
            lambda: self.stream.prepare(weighted(look.prompt), look.negative_prompt, **values),
            lambda: self.model.prepare(look),
        )
        self.trace = None

    @rule(changes=CHANGES, scope=st.sampled_from([None, "frame", "now"]))
    def update(self, changes, scope) -> None:
        asked = {**changes, **({"prompt": weighted(changes["prompt"])} if "prompt" in changes else {})}
        self.both(lambda: self.stream.update(scope=scope, **asked), lambda: self.model.update(scope, **changes))

    @rule(prompt=st.text(max_size=30), scope=st.sampled_from(["frame", "now"]))
    def update_prompt(self, prompt, scope) -> None:
        self.both(lambda: self.stream.update_prompt(prompt, scope=scope), lambda: self.model.update(scope, prompt=prompt))

    @rule()
    def reset(self) -> None:
        self.both(self.stream.reset, self.model.reset)
        self.trace = None

    @rule(known=st.none() | KEYS, drawn=st.none() | KEYS)
    def inpaint(self, known, drawn) -> None:
        if drawn is None:
            self.stream.inpaint(None)
        else:
            self.stream.inpaint(None if known is None else still(known), mask(drawn))
        self.model.region = None if drawn is None else (known, drawn)
        self.model.redraw()

    @rule(on=st.booleans(), most=st.sampled_from([0, 1, 10]))
    def similar_filter(self, on, most) -> None:
        if on:
            self.stream.enable_similar_image_filter(max_skip_frame=most)
            self.model.filter.most = most
            self.model.filter.forget()
        else:
            self.stream.disable_similar_image_filter()
        self.model.filter.on = on

    @rule(batched=st.booleans())
    def set_batch(self, batched) -> None:
        self.both(lambda: self.stream.set_denoising_batch(batched), lambda: self.model.set_batch(batched))

    @rule()
    def accelerate_none(self) -> None:
        self.stream.accelerate("none")

    @rule(count=st.integers(1, 3))
    def look_at(self, count) -> None:
        self.trace, self.traced_from = self.stream.trace(count), self.model.next_id

    @rule(name=st.sampled_from(sorted(BAD)))
    def bad(self, name) -> None:
        with pytest.raises(DOCUMENTED) as raised:
            BAD[name](self.stream)
        assert str(raised.value)

    # -- draw -------------------------------------------------------------------------------------------------------------

    @rule(keys=st.tuples(KEYS, KEYS), drawn=st.none() | st.none() | KEYS)
    def picture(self, keys, drawn) -> None:
        keys = keys[: self.model.F]
        got = self.both(
            lambda: self.stream(torch.cat([still(key) for key in keys]), None if drawn is None else mask(drawn)),
            lambda: self.model.pictures(keys, drawn),
        )
        if got and got[1] is None:
            assert got[0] is self.last
        elif got:
            self.last = got[0]
            self.same_groups(got[0], [got[1]])

    @rule(groups=st.integers(1, 3), keys=st.none() | st.lists(KEYS, min_size=6, max_size=6))
    def text(self, groups, keys) -> None:
        count = groups * self.model.F
        keys = None if keys is None else tuple(keys[:count])
        given = None if keys is None else torch.cat([self.reference.latents(key) for key in keys])
        got = self.both(lambda: self.stream.txt2img(count, given), lambda: self.model.text(groups, keys))
        if got:
            self.last = got[0]
            self.same_groups(*got)

    @rule(keys=st.tuples(KEYS, KEYS))
    def tick(self, keys) -> None:
        x = torch.cat([self.reference.latents(key) for key in keys[: self.model.F]])
        got = self.both(lambda: self.stream.predict_x0_batch(x), lambda: self.model.tick(keys[: self.model.F]))
        if got:
            assert (got[0] is None) == (got[1] is None)
            if got[0] is not None:
                self.same_latents(*got)

    @rule()
    def flush(self) -> None:
        got = self.both(self.stream.flush, self.model.flush)
        if got:
            assert len(got[0]) == len(got[1])
            for latents, group in zip(*got, strict=True):
                assert len(latents) == len(group.frames)
                self.same_latents(latents, group)

    @rule(
        inputs=st.lists(st.tuples(GENTLE, st.none() | KEYS, st.none() | st.none() | KEYS), max_size=5),
        most=st.none() | st.integers(0, 2),
    )
    def frames(self, inputs, most) -> None:
        """All of them, or so many until the caller loses interest."""
        inputs = [(change, key, drawn if key is not None else None) for change, key, drawn in inputs]
        origins = [(c, ("text",) if key is None else ("picture", key), drawn) for c, key, drawn in inputs]

        def given():
            for change, key, drawn in inputs:
                if change:
                    self.stream.update(**change)
                yield Input(None if key is None else still(key), None if drawn is None else mask(drawn))

        got = self.both(lambda: self.stream.frames(given()), lambda: self.model.frames(origins))
        told = 0
        while got and told != most:
            one = self.both(lambda: next(got[0], None), lambda: next(got[1], None))
            if one is None or one == (None, None):
                break
            frame, (number, source) = one
            assert (frame.id, frame.skipped) == (number, number != source.id)
            self.same_pictures(frame.image[None], [source])
            told += 1
        for generator in got or ():
            generator.close()

    @rule(steps=st.integers(1, 6))
    def function_will_fail(self, steps) -> None:
        """An error in `on_step`'s function ends the call in which it comes; a frame that leaves in that step comes next."""
        self.raise_in = self.model.raise_in = steps

    @rule(keys=st.tuples(KEYS, KEYS))
    def network_fails(self, keys) -> None:
        """Then the ring is as it was before, and an update that would have emptied it first still waits."""

        def fail(*arguments) -> None:
            raise RuntimeError("the network fails")

        hook, self.model.broken = self.stream.unet.register_forward_pre_hook(fail), True
        try:
            self.tick(keys)
        finally:
            hook.remove()
            self.model.broken = False

    @invariant()
    def a_trace_is_of_the_frames_that_came_next(self) -> None:
        if self.stream is not None and self.trace is not None:
            stages = {len(one.v) for one in self.trace.frames.values()}
            assert all(one >= self.traced_from for one in self.trace.frames) and 0 not in stages
            assert all(float(one.sigma[-1]) == 0 for one in self.trace.frames.values())

    def teardown(self) -> None:
        if self.stream is not None:
            self.raise_in = self.model.raise_in = 0
            self.flush()
            assert self.stream._denoiser.in_flight() == 0
            self.stream.close(), self.stream.close()
            for call in (self.stream.flush, self.stream.txt2img, self.stream.reset, lambda: self.stream.prepare("a")):
                with pytest.raises(RuntimeError, match="closed"):
                    call()


EXAMPLES = {
    "few": ("sd3", 10, 14, []),
    "some": ("sd3", 40, 25, [pytest.mark.slow]),
    "many": ("sd3", 3000, 40, [pytest.mark.soak]),
    "many, InstaFlow": ("instaflow", 500, 40, [pytest.mark.soak]),
    "many, Flux": ("flux", 500, 40, [pytest.mark.soak]),
}
# The same examples every time, and no shrinking, which takes minutes; a failure prints its calls.
PROFILE = {
    "phases": [hypothesis.Phase.generate],
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=one[-1]) for name, one in EXAMPLES.items()])
def test_calls_in_any_order(pipes, name):
    family, examples, steps, _ = EXAMPLES[name]
    pipe = pipes(family)
    options = {"family": family} if family == "instaflow" else {}

    @cache
    def references(**given):
        return Reference(pipe, **given)

    profile = settings(max_examples=examples, stateful_step_count=steps, **PROFILE)
    run_state_machine_as_test(lambda: Calls(pipe, references, **options), settings=profile)


# -- pure parts -----------------------------------------------------------------------------------------------------------

FEW = settings(max_examples=60, **PROFILE)
ANY_NUMBER = st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.booleans() | st.none() | st.text(max_size=3)
DTYPES = st.sampled_from(["uint8", "float32", "float16", "float64", "int32", "bool", "complex64"])
ARRAYS = DTYPES.flatmap(lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)))
PICTURES = DTYPES.flatmap(
    lambda kind: hnp.arrays(kind, st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([1, 3, 4])))
)
TREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=3),
    max_leaves=9,
)
NAMES = st.sampled_from(sorted(Settings.model_fields))


def documented(call, *kinds):
    """What the call gives, or None where it raises one of these kinds, with a message."""
    try:
        return call()
    except kinds as error:
        assert type(error) in kinds or issubclass(type(error), ConfigError), repr(error)
        assert str(error).strip()


@FEW
@given(ARRAYS | PICTURES, st.booleans(), st.booleans(), st.sampled_from([(0, 1), (-1, 1), (0, 255)]))
def test_what_is_no_image_is_refused_and_what_is_one_is_in_range(array, as_tensor, resize, input_range):
    given_in = torch.from_numpy(array) if as_tensor else array
    before = array.copy()
    made = documented(lambda: normalize_image(given_in, 4, 4, input_range, resize), ValueError, TypeError)
    np.testing.assert_array_equal(array, before)
    if made is not None:
        assert made.shape[1:] == (3, 4, 4) and made.dtype == torch.float32 and type(made) is Normalized
        assert made.isfinite().all() and made.abs().max() <= 1.01
        assert torch.equal(normalize_image(made, 4, 4, input_range, resize), made)


@FEW
@given(ARRAYS, st.booleans())
def test_what_is_no_mask_is_refused(array, as_tensor):
    made = documented(lambda: read_mask(torch.from_numpy(array) if as_tensor else array, 4, 4), ValueError, TypeError)
    assert made is None or (made.shape[1:] == (1, 4, 4) and made.dtype == torch.bool)


@FEW
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9, unique=True), st.lists(ANY_NUMBER, max_size=4))
def test_stages_go_down_to_the_image_whatever_is_picked(levels, picked):
    sigmas = torch.tensor([*sorted(levels, reverse=True), 0]) / 1000
    stages = documented(lambda: Schedule(1000 * sigmas[:-1], sigmas).pick(picked), ValueError, TypeError)
    if stages is not None:
        assert list(stages.indices) == picked and stages.sigmas_next[-1] == 0
        assert (stages.sigmas > stages.sigmas_next).all() and torch.equal(stages.sigmas[1:], stages.sigmas_next[:-1])


@FEW
@given(TREE | st.dictionaries(NAMES, TREE | ANY_NUMBER, max_size=4))
def test_settings_of_any_data_are_settings_or_a_config_error(data):
    made = documented(lambda: config.parse(data), ConfigError)
    if made is not None:
        assert config.parse(yaml.safe_load(config.commented(made))) == made


@FEW
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | TREE.map(lambda data: yaml.dump(data).encode()))
def test_any_file_is_settings_or_a_config_error(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "settings.yaml"
    file.write_bytes(data)
    documented(lambda: config.load(file), ConfigError)


@pytest.mark.parametrize(
    "text",
    ["a: &x [*x]", "seed: " + "9" * 5000, "prompt: 2001-99-99", "[" * 500, "prompt: \x00", "!!python/object:os.system {}"],
    ids=["a list in itself", "a long number", "no date", "deep", "a null", "code"],
)
def test_files_that_yaml_stumbles_over(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match="a.yaml"):
        config.load(tmp_path / "a.yaml")


KINDS = st.sampled_from(["file", "folder", "picture", "mjpeg", "camera", "window", "record", "null", "ndi", "x", ""])


@FEW
@given(KINDS, st.text(max_size=20) | st.sampled_from([":1", "1:x", "[::1]:99", "http://h:1/", "a" * 5000]), st.booleans())
def test_addresses_are_opened_or_refused(kind, rest, colon):
    for opened in (open_source, open_sink):
        address = f"{kind}:{rest}" if colon else rest
        documented(lambda opened=opened, address=address: opened(address), ValueError, ImportError, OSError)


@FEW
@given(st.dictionaries(st.sampled_from(sorted(Mapping.model_fields)), TREE | ANY_NUMBER | st.just("osc:/a"), max_size=5))
def test_a_mapping_of_any_data_scales_into_its_range_or_is_refused(data):
    from pydantic import ValidationError

    from streamflow.live.remote.knobs import scaled

    made = documented(lambda: Mapping.model_validate({"address": "osc:/a", "field": "strength", **data}), ValidationError)
    if made is not None and made.kind != "text":
        low, high = sorted(made.range)
        for value in (-1e300, -1, 0, 0.3, 1, 64, 127, 1e300):
            assert low <= scaled(made, value) <= high


@pytest.mark.extras
def test_osc_of_any_bytes_is_heard_or_dropped():
    """And a good message is still heard after them."""
    pytest.importorskip("pythonosc", reason="OSC needs the extra control")
    from pythonosc.osc_message_builder import OscMessageBuilder

    from streamflow.live.remote.osc import OscInput

    heard = []
    osc = OscInput("127.0.0.1", 0, lambda *message: heard.append(message))
    builder = OscMessageBuilder("/end")
    builder.add_arg(1.0)
    end = builder.build().dgram

    @FEW
    @given(st.binary(max_size=64) | st.tuples(st.integers(0, len(end)), st.binary(max_size=9)))
    def send(data):
        data = data if isinstance(data, bytes) else end[: data[0]] + data[1] + end[data[0] :]
        sender.sendto(data, osc.bound)

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            send()
            heard.clear()
            until = time.monotonic() + 10
            while ("osc:/end", 1.0) not in heard and time.monotonic() < until:
                sender.sendto(end, osc.bound)
                time.sleep(0.02)
        assert ("osc:/end", 1.0) in heard
    finally:
        osc.close()


# -- what they found ------------------------------------------------------------------------------------------------------


def test_a_skipped_image_never_shows_another_ones(stream_of):
    """Not after `frames`, and not where the filter was off in between."""
    a, b = (stream_of("sd3", [3], width=SIZE, height=SIZE)(still(key)) for key in (0, 1))
    stream = stream_of("sd3", [3], width=SIZE, height=SIZE)
    stream.enable_similar_image_filter()
    stream(still(0))
    list(stream.frames([still(1)]))
    assert relative_error(stream(still(1)), b) <= TOLERANCE
    stream.disable_similar_image_filter()
    stream(still(0))
    stream.enable_similar_image_filter()
    assert relative_error(stream(still(1)), b) <= TOLERANCE < relative_error(a, b)


def test_a_prompt_that_waits_is_not_undone_by_a_slider(stream_of):
    """Of a network that the guidance scale is embedded in."""
    drawn = []
    for prompt, scale in (("a boat", None), ("a boat", 3.5 + 1e-6), (None, None)):
        stream = stream_of("flux", width=SIZE, height=SIZE, prepare={"guidance_scale": 3.5})
        stream.txt2img()
        if prompt:
            stream.update_prompt(prompt)
        if scale:
            stream.update(guidance_scale=scale)
        drawn.append(stream.txt2img())
    assert relative_error(drawn[1], drawn[0]) <= TOLERANCE < relative_error(drawn[2], drawn[0])


def test_frames_that_had_left_are_kept_where_running_out_fails(stream_of):
    def failing_at(count: int):
        def fail(step) -> None:
            nonlocal count
            count -= 1
            if count == 0:
                raise RuntimeError("the function fails")

        return fail

    for call in (lambda stream: stream.flush(), lambda stream: stream.txt2img()):
        stream = stream_of("sd3", width=SIZE, height=SIZE)
        stream.txt2img()
        stream.update(t_index_list=[2, 3])
        stream.on_step(failing_at(3))
        with pytest.raises(RuntimeError, match="the function fails"):
            call(stream)
        assert len(stream._denoiser.state.stages.sigmas) == 4 and len(stream.flush()) == 3
        stream.txt2img()
        assert stream.t_list == [2, 3]
