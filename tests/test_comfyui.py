"""The nodes of integrations/comfyui, called as ComfyUI calls them: what a sampler returns is what StreamFlow draws."""

from __future__ import annotations

import copy
import gc
import importlib.util
import inspect
import json
import os
import sys
import tomllib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import relative_error
from packaging.requirements import Requirement
from packaging.version import Version
from random_pipelines.control import random_control

from streamflow import StreamFlow
from streamflow.acceleration import KINDS
from streamflow.app.config import Acceleration
from streamflow.conditioning.blending import METHODS
from streamflow.flow.guidance import MODES
from streamflow.flow.noise import POLICIES
from streamflow.image_utils import denormalize
from streamflow.models.loading import DTYPES
from streamflow.stream.frames import Input

FOLDER = Path(__file__).resolve().parents[1] / "integrations/comfyui"
API = json.loads((FOLDER / "travel_and_restyle_api.json").read_text(encoding="utf-8"))
SIZE = 64
PEACH, FOX = "a peach, 3d render", "a fox, 3d render"


def imported():
    """The folder, imported as ComfyUI imports a folder of custom_nodes."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMFY = imported()
NODES = COMFY.NODE_CLASS_MAPPINGS
OWN = sys.modules[NODES["StreamFlowLoad"].__module__]


def inputs_of(cls):
    """{name: (type, options, whether it is required)}"""
    declared = cls.INPUT_TYPES()
    assert declared.keys() <= {"required", "optional"}
    return {
        name: (entry[0], entry[1] if len(entry) > 1 else {}, kind == "required")
        for kind, entries in declared.items()
        for name, entry in entries.items()
    }


def call(name, node=None, **given):
    """What a node returns, called with its defaults where nothing is given."""
    cls = NODES[name]
    values = {}
    for key, (kind, options, required) in inputs_of(cls).items():
        if key in given:
            values[key] = given.pop(key)
        elif required:
            values[key] = kind[0] if isinstance(kind, list) else options["default"]
    assert not given, f"{name} has no input {list(given)}"
    with torch.inference_mode():
        returned = getattr(node or cls(), cls.FUNCTION)(**values)
    assert isinstance(returned, tuple) and len(returned) == len(cls.RETURN_TYPES)
    return returned


@pytest.fixture(scope="module")
def folder_of(pipes, tmp_path_factory):
    """`folder_of(family)`: a random pipeline, saved."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            pipes(family).save_pretrained(made[family])
        return str(made[family])

    return get


@pytest.fixture(scope="module")
def loaded(folder_of):
    """`loaded(family, ...)`: the stream of a random pipeline, loaded by the node once."""
    made = {}

    def get(family="sd3", **changes):
        key = family, repr(changes)
        if key not in made:
            inputs = {"model": folder_of(family), "device": "cpu", "acceleration": "none", "width": SIZE, "height": SIZE}
            (made[key],) = call("StreamFlowLoad", **{**inputs, **changes})
        return made[key]

    return get


def images_of(n, seed=0, width=SIZE, height=SIZE):
    return torch.rand((n, height, width, 3), generator=torch.Generator().manual_seed(seed))


def prompt(text=PEACH, **inputs):
    return call("StreamFlowPrompt", text=text, **inputs)[0]


def sample(stream, text=PEACH, **inputs):
    """(images, latents); text: a text or a prompt."""
    given = {"stream": stream, "prompt": prompt(text) if isinstance(text, str) else text, "frames": 3, **inputs}
    images, latents = call("StreamFlowSample", **given)
    assert images.dtype == torch.float32 and images.device.type == "cpu" and latents.keys() == {"samples"}
    assert 0 <= images.min() and images.max() <= 1 and images.shape[1:] == (SIZE, SIZE, 3)
    assert len(images) == len(latents["samples"])
    return images, latents["samples"]


def own(pipe, text, inputs, prepare=None, update=None, **options):
    """What StreamFlow draws of these inputs, `[n, H, W, 3]` in [0, 1]; an input that is a function is called."""
    stream = StreamFlow(pipe, width=SIZE, height=SIZE, cfg_type="none", **options)
    stream.prepare(text, num_inference_steps=4, seed=2, **(prepare or {}))
    stream.update(**(update or {}))

    def given():
        for one in inputs:
            if callable(one):
                one(stream)
            else:
                yield one

    return torch.stack([denormalize(frame.image).permute(1, 2, 0) for frame in stream.frames(given())])


# -- the protocol ---------------------------------------------------------------------------------------------------------

TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "IMAGE", "LATENT", *(OWN.STREAM, OWN.PROMPT, OWN.CONTROL_NET)}
TYPES |= {OWN.CONTROLS, OWN.REFERENCES}


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_what_comfyui_takes_for_one(name):
    cls = NODES[name]
    assert COMFY.NODE_DISPLAY_NAME_MAPPINGS[name] and cls.CATEGORY and cls.DESCRIPTION
    assert len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES) and set(cls.RETURN_TYPES) <= TYPES
    declared, parameters = inputs_of(cls), inspect.signature(getattr(cls, cls.FUNCTION)).parameters
    assert [one for one in parameters if one != "self"] == list(declared)
    for key, (kind, options, required) in declared.items():
        assert required == (parameters[key].default is inspect.Parameter.empty), key
        if isinstance(kind, list):
            assert kind and all(isinstance(one, str) for one in kind), key
        else:
            assert kind in TYPES, key
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], key
        if not required and kind not in ("IMAGE", *(one for one in TYPES if one.startswith("STREAMFLOW"))):
            assert parameters[key].default == options["default"], key
    json.dumps(declared)  # ComfyUI's /object_info


def test_the_lists_are_streamflows_own():
    assert set(OWN.ACCELERATIONS) == set(get_args(get_type_hints(Acceleration)["kind"])) >= set(KINDS)
    assert set(OWN.DTYPES) == {"auto", *DTYPES}
    assert (set(OWN.GUIDANCE), set(OWN.NOISE), set(OWN.BLENDS)) == (set(MODES), set(POLICIES), set(METHODS))


def test_the_folder_is_one_that_the_registry_takes():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"].isidentifier() and "comfyui" not in project["project"]["name"]
    assert len(Version(project["project"]["version"]).release) == 3
    assert project["tool"]["comfy"].keys() == {"PublisherId", "DisplayName", "requires-comfyui"}
    lines = (FOLDER / "requirements.txt").read_text(encoding="utf-8").split()
    assert [Requirement(one).name for one in lines] == project["project"]["dependencies"] == ["streamflow-rf"]
    code = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    assert not any(word in code for word in ("subprocess", "eval(", "exec("))


def checked(graph):
    """Check a graph in the API's form as ComfyUI does before it runs one."""
    for node in graph.values():
        if node["class_type"] == "PreviewImage":
            assert types_of(graph, node["inputs"]["images"]) == "IMAGE"
            continue
        declared = inputs_of(NODES[node["class_type"]])
        assert {key for key, (_, _, required) in declared.items() if required} <= node["inputs"].keys() <= declared.keys()
        for key, value in node["inputs"].items():
            kind, options, _ = declared[key]
            if isinstance(value, list):
                assert types_of(graph, value) == kind, key
            elif isinstance(kind, list):
                assert value in kind, key
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], key


def types_of(graph, link):
    return NODES[graph[link[0]]["class_type"]].RETURN_TYPES[link[1]]


def test_the_example_is_valid_and_its_two_forms_are_one_graph():
    checked(API)
    saved = json.loads((FOLDER / "example_workflows/travel_and_restyle.json").read_text(encoding="utf-8"))
    links = {one[0]: [str(one[1]), one[2]] for one in saved["links"]}
    assert {str(node["id"]): node["type"] for node in saved["nodes"]} == {key: one["class_type"] for key, one in API.items()}
    for node in saved["nodes"]:
        given = API[str(node["id"])]["inputs"]
        linked = {one["name"]: links[one["link"]] for one in node["inputs"] if one.get("link") is not None}
        assert linked == {key: value for key, value in given.items() if isinstance(value, list)}
        values = [one for one in node.get("widgets_values", []) if one != "fixed" or node["type"] != "StreamFlowSample"]
        if node["type"] == "StreamFlowSample":  # one of its widgets, which says what becomes of the seed, is no input
            values = node["widgets_values"][:1] + node["widgets_values"][2:]
        assert values == [value for value in given.values() if not isinstance(value, list)]


@pytest.mark.slow
def test_the_example_draws(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    graph = copy.deepcopy(API)
    graph["3"]["inputs"]["frames"], graph["2"]["inputs"]["prompts"] = 3, "0: a red apple, 3d render\n2: a lemon, 3d render"
    done = {}

    def output(link):
        key, slot = link
        if key not in done:
            inputs = graph[key]["inputs"].items()
            given = {name: output(value) if isinstance(value, list) else value for name, value in inputs}
            done[key] = call(graph[key]["class_type"], **given)
        return done[key][slot]

    travel, restyled = output(["3", 0]), output(["6", 0])
    assert travel.shape == restyled.shape == (3, 128, 128, 3)
    red, yellow = travel[0], travel[2]  # of an apple and of a lemon
    green = [float(one[48:80, 48:80, 1].mean()) for one in (red, yellow)]
    assert green[0] < 0.4 < 0.6 < green[1] and relative_error(restyled, travel) > 0.05


# -- loading --------------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_once_until_something_of_it_changes(folder_of, tmp_path):
    cls, node = NODES["StreamFlowLoad"], NODES["StreamFlowLoad"]()
    inputs = {"model": folder_of("sd3"), "device": "cpu", "acceleration": "none"}
    first = call("StreamFlowLoad", node, **inputs)[0]
    again = call("StreamFlowLoad", node, **inputs, steps=2)[0]
    assert again.wrapper is first.wrapper and (first.steps, again.steps) == (4, 2)
    assert cls.IS_CHANGED(**inputs) == cls.IS_CHANGED(**inputs, steps=2)
    assert cls.IS_CHANGED(model="embedded") == cls.IS_CHANGED(model=None) == 0

    before = cls.IS_CHANGED(**inputs)
    os.utime(Path(inputs["model"]) / "model_index.json", ns=(before + 10**9, before + 10**9))
    (Path(inputs["model"]) / "link").symlink_to("nowhere")
    assert cls.IS_CHANGED(**inputs) == before + 10**9
    last = weakref.ref(first.wrapper)
    del first, again
    assert call("StreamFlowLoad", node, **inputs)[0].wrapper is not last()
    gc.collect()
    assert last() is None, "a model that is not used any more keeps its memory"


# -- the sampler ----------------------------------------------------------------------------------------------------------


def test_a_batch_comes_out_as_streamflow_draws_it(loaded, pipes):
    stream, batch = loaded(), images_of(5)
    drawn, _ = sample(stream, images=batch, denoise=0.75)
    inputs = [one.permute(2, 0, 1) for one in batch]
    assert torch.equal(drawn, own(pipes("sd3"), PEACH, inputs, {"strength": 0.75}))
    alone = own(pipes("sd3"), PEACH, inputs, {"strength": 0.75}, use_denoising_batch=False)
    assert relative_error(drawn, alone) < 1e-5 < relative_error(drawn[0], drawn[1])
    turned, _ = sample(stream, images=batch.flip(0), denoise=0.75)
    assert relative_error(turned.flip(0), drawn) < 1e-5


def test_frames_without_images_come_from_noise(loaded, pipes):
    drawn, _ = sample(loaded(), frames=4)
    assert torch.equal(drawn, own(pipes("sd3"), PEACH, [None] * 4))
    still, _ = sample(loaded(), frames=4, noise="constant")
    assert relative_error(still[0], still[3]) < 1e-5 and relative_error(drawn[0], drawn[3]) > 0.01


class Stopped:
    """The bar of a run that the user stops at its second frame, which ComfyUI's progress bar raises."""

    def __init__(self, total):
        self.left, self.total = 2, total

    def update(self, value):
        self.left -= value
        if not self.left:
            raise KeyboardInterrupt(self.total)


def stop(stream, monkeypatch, **inputs):
    """Stop a run of eight frames."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "comfy.utils", SimpleNamespace(ProgressBar=Stopped))
        with pytest.raises(KeyboardInterrupt, match="8"):
            sample(stream, frames=8, **inputs)


def test_samplers_of_one_stream_do_not_disturb_each_other(loaded, monkeypatch):
    stream = loaded()
    one = {"images": images_of(3), "denoise": 0.5, "seed": 7, "feedback": 0.3, "noise": "frame"}
    other = {"text": FOX, "frames": 2, "noise": "constant"}
    first, second = sample(stream, **one)[0], sample(stream, **other)[0]

    stop(stream, monkeypatch)
    assert torch.equal(sample(stream, **one)[0], first) and torch.equal(sample(stream, **other)[0], second)
    assert relative_error(sample(stream, **{**one, "seed": 8})[0], first) > 0.01
    assert relative_error(sample(stream, **{**one, "feedback": 0.0})[0], first) > 1e-3


def test_prompts_travel(loaded, pipes):
    travel = lambda text, blend="linear": call("StreamFlowPromptTravel", prompts=text, blend=blend)[0]  # noqa: E731
    prompts = travel(f"1: {PEACH}\n\n 5:{FOX} \n")
    assert [prompts.at(k) for k in (0, 1, 5, 9)] == [PEACH, PEACH, FOX, FOX]
    assert prompts.at(2) == [(PEACH, 0.75), (FOX, 0.25)]
    drawn, _ = sample(loaded(), prompts, frames=7, noise="constant")
    for k in range(7):  # each frame is that of its own prompt
        alone = own(pipes("sd3"), prompts.at(k), [None], update={"noise": "constant"}, use_denoising_batch=False)
        assert relative_error(drawn[k], alone[0]) < 1e-5
    assert relative_error(drawn[1], drawn[5]) > 1e-3
    along, _ = sample(loaded(), travel(f"1: {PEACH}\n5: {FOX}", "slerp"), frames=7, noise="constant")
    assert relative_error(along[1], drawn[1]) < 1e-5 < relative_error(along[3], drawn[3])


@pytest.mark.parametrize(("text", "says"), [("", "no prompts"), ("0: a\nb", "line 2 .* 'b'"), ("3: a\n3: b", "frame 3")])
def test_prompts_that_are_none_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        call("StreamFlowPromptTravel", prompts=text)


def test_guidance_acts(loaded, pipes):
    """With a negative prompt, at the model's own scale and at another."""
    stream = loaded(guidance="full")
    guided = sample(stream, prompt(PEACH, negative=FOX))[0]
    assert relative_error(guided, sample(stream)[0]) > 1e-4
    assert relative_error(guided, sample(stream, prompt(PEACH, negative=FOX), cfg=2.0)[0]) > 1e-4


@pytest.mark.parametrize("family", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_latents_are_those_that_the_vae_decodes(family, loaded, pipes):
    stream, vae = loaded(family), pipes(family).vae
    images, latents = sample(stream)
    assert latents.shape[:2] == (3, vae.config.latent_channels) and latents.dtype == torch.float32
    with torch.no_grad():
        own = denormalize(vae.decode(latents, return_dict=False)[0]).movedim(1, -1)
    assert relative_error(own, images) < 1e-6


def test_a_frame_has_its_latent(stream_of):
    stream = stream_of(frame_buffer_size=2)
    for frame in stream.frames([None] * 3):
        assert relative_error(stream.decode_image(frame.latent[None])[0], frame.image) < 1e-5
        frame.latent.zero_()  # a copy
        assert frame.latent.abs().sum() > 0


WRONG = {
    "empty": ({"images": images_of(0)}, "images: the batch is empty"),
    "size": ({"images": images_of(2, width=48)}, "images: 48x64 pixels, and the stream draws 64x64"),
    "alpha": ({"images": torch.zeros(2, SIZE, SIZE, 4)}, r"images: \[2, 64, 64, 4\] is no batch of RGB"),
    "integers": ({"images": torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)}, "images: pixels of torch.uint8"),
    "no frames": ({"frames": 0}, "frames: 0, and a stream draws at least one"),
    "negative": ({"text": OWN.Prompts(((0, PEACH),), FOX)}, "the negative prompt needs guidance"),
    "not finite": ({"images": torch.full((1, SIZE, SIZE, 3), torch.nan), "denoise": 0.5}, "NaN"),
    "nothing to keep": ({"denoise": 0.5}, "denoise 0.5 keeps part .* there are none"),
    "references": ({"references": (images_of(1),)}, "takes no reference images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_gets_one_line(case, loaded):
    inputs, says = WRONG[case]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=says) as caught:
        sample(loaded(), **inputs)
    assert "\n" not in str(caught.value)


def test_values_a_little_outside_are_clipped(loaded):
    batch = images_of(2)
    batch[0, 0, 0], batch[1, 0, 0] = 1.02, -0.02
    drawn, _ = sample(loaded(), images=batch, denoise=0.5)
    assert torch.equal(drawn, sample(loaded(), images=batch.clamp(0, 1), denoise=0.5)[0])


# -- control nets and references -------------------------------------------------------------------------------------------


def controls(net, images, **inputs):
    return call("StreamFlowApplyControlNet", control_net=net, images=images, **inputs)[0]


@pytest.mark.slow
def test_control_images_steer_frames(loaded, pipes, tmp_path, monkeypatch):
    stream, pipe, edges = loaded(), pipes("sd3"), images_of(3, 5)
    random_control(pipe.transformer).save_pretrained(tmp_path)
    (net,) = call("StreamFlowLoadControlNet", stream=stream, model=str(tmp_path))
    plain, _ = sample(stream)
    steered, _ = sample(stream, controls=controls(net, edges, strength=0.8, end_percent=0.75))

    def added(one):
        one.add_control("edges", random_control(pipe.transformer), 0.8, end=0.75)

    inputs = [Input(control={"edges": one.permute(2, 0, 1)}) for one in edges]
    assert torch.equal(steered, own(pipe, PEACH, [added, *inputs])) and relative_error(steered, plain) > 1e-3
    same, _ = sample(stream, controls=controls(net, edges[:1], strength=0.8, end_percent=0.75))
    assert torch.equal(same[0], steered[0]) and relative_error(same[1], steered[1]) > 1e-4
    names = dict(stream.wrapper.stream.controls)
    weak, _ = sample(stream, controls=controls(net, edges, strength=0.1, end_percent=0.75))
    assert names.keys() == stream.wrapper.stream.controls.keys(), "another strength needs no other net"
    assert 0 < relative_error(weak, plain) < relative_error(steered, plain)
    both = controls(net, edges, controls=controls(net, edges, strength=0.8, end_percent=0.75))
    assert len(both) == 2 and relative_error(sample(stream, controls=both)[0], steered) > 1e-4
    stop(stream, monkeypatch, controls=controls(net, edges[:1]))
    with monkeypatch.context() as patch:  # what was in flight is dropped, and the net is not called again
        patch.setattr(net.net, "forward", None)
        assert torch.equal(sample(stream)[0], plain), "a sampler without control images has no control nets"

    for bad, says in (
        (images_of(2), "control 0: 2 images for 3 frames"),
        (images_of(3, width=32), "control 0: 32x64 pixels"),
    ):
        with pytest.raises(ValueError, match=says):
            sample(stream, controls=controls(net, bad))
    with pytest.raises(ValueError, match="start 0.5 to end 0.2"):
        sample(stream, controls=controls(net, edges, start_percent=0.5, end_percent=0.2))


def test_a_control_net_that_cannot_be_is_refused(loaded, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder '/nowhere"):
        call("StreamFlowLoadControlNet", stream=loaded(), model="/nowhere/at/all")
    assert NODES["StreamFlowLoadControlNet"].IS_CHANGED(model=str(tmp_path)) == 0


@pytest.mark.slow
def test_a_family_without_control_nets_says_so(loaded):
    with pytest.raises(NotImplementedError, match="no control nets that Flux2Klein"):
        call("StreamFlowLoadControlNet", stream=loaded("flux2-klein"), model="owner/name")


@pytest.mark.slow
def test_references_are_seen(loaded, pipes):
    stream, batch, style = loaded("flux2-klein"), images_of(3, 1), images_of(1, 2, width=96, height=80)
    chain = lambda *batches: call("StreamFlowReference", images=batches[-1], **before(batches[:-1]))[0]  # noqa: E731
    before = lambda rest: {"references": chain(*rest)} if rest else {}  # noqa: E731
    drawn, _ = sample(stream, images=batch, references=chain(style, batch.flip(0)))
    as_is = lambda one: one.permute(2, 0, 1)  # noqa: E731
    inputs = [Input(as_is(batch[k]), reference=[as_is(style[0]), as_is(batch[2 - k])]) for k in range(3)]
    assert torch.equal(drawn, own(pipes("flux2-klein"), PEACH, inputs))
    assert relative_error(sample(stream, images=batch)[0], drawn) > 1e-4
    assert relative_error(sample(stream, references=chain(style))[0], drawn) > 1e-4
    with pytest.raises(ValueError, match="reference 1: 2 images for 3 frames"):
        sample(stream, images=batch, references=chain(style, batch[:2]))
    with pytest.raises(ValueError, match="denoise 0.5 .* sees its images as references"):
        sample(stream, images=batch, denoise=0.5)


@pytest.mark.slow
def test_a_family_of_whole_calls_draws_text_too(loaded, pipes):
    """Of the fallback, which has no loop to look into; its latents come out all the same, in the pipeline's form."""
    images, latents = sample(loaded("auraflow"))
    pipe = pipes("auraflow")
    call = {"num_inference_steps": 4, "height": SIZE, "width": SIZE, "guidance_scale": 1.0, "output_type": "latent"}
    noise = StreamFlow(pipe, width=SIZE, height=SIZE, cfg_type="none")
    noise.prepare(PEACH, num_inference_steps=4, seed=2)
    own = pipe(PEACH, latents=noise.frame_noise(1), **call).images
    assert images.shape[0] == 3 and relative_error(latents[1:2], own) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
def test_a_gpu_draws_the_same(loaded, full_float32):
    batch = {"images": images_of(5), "denoise": 0.75}
    on_gpu = loaded(device="cuda:0", dtype="float32", acceleration="cuda-graph")
    for of_cpu, of_gpu in zip(sample(loaded(), **batch), sample(on_gpu, **batch), strict=True):
        assert relative_error(of_gpu, of_cpu) < 1e-3
