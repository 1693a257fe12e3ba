"""The nodes: a model as a stream, prompts, control nets, references, and the sampler, which sends a batch of images through
the stream as frames.

ComfyUI calls a node when its inputs have changed, and keeps what it returned, so `Load` loads a model once. A sampler does
not depend on what was drawn before: it begins with an empty ring, and sets all that it draws with. IMAGE is `[B, H, W, 3]`
in [0, 1], LATENT is a dict with "samples", both float32 on the CPU.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from streamflow import StreamFlow, StreamFlowWrapper
    from streamflow.stream.frames import Input

CATEGORY = "StreamFlow"
STREAM, PROMPT, CONTROL_NET = "STREAMFLOW_STREAM", "STREAMFLOW_PROMPT", "STREAMFLOW_CONTROLNET"
CONTROLS, REFERENCES = "STREAMFLOW_CONTROLS", "STREAMFLOW_REFERENCES"

# As StreamFlow names them, so that the nodes can be listed before it is imported.
ACCELERATIONS = ["auto", "none", "cuda-graph", "compile", "tensorrt", "onnxruntime", "openvino", "max"]
DTYPES = ["auto", "float32", "float16", "bfloat16"]
GUIDANCE = ["none", "full", "self", "initialize"]
NOISE = ["fixed", "frame", "interpolated", "constant"]
BLENDS = ["linear", "slerp"]
INPUTS = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Stream:
    """A loaded model and the number of its steps."""

    wrapper: StreamFlowWrapper
    steps: int


@dataclass(frozen=True)
class Prompts:
    """Texts at frames, in rising order, and the negative prompt of all frames."""

    keys: tuple[tuple[int, str], ...]
    negative: str = ""
    blend: str = "linear"

    def at(self, frame: int) -> str | list[tuple[str, float]]:
        """The text of a frame, or between two of them both, with weights that sum to 1."""
        before = [key for key in self.keys if key[0] <= frame]
        after = [key for key in self.keys if key[0] > frame]
        if not before or not after:
            return before[-1][1] if before else after[0][1]
        (start, one), (end, other) = before[-1], after[0]
        weight = (frame - start) / (end - start)
        return one if weight == 0 or one == other else [(one, 1 - weight), (other, weight)]


@dataclass(frozen=True, eq=False)
class ControlNet:
    """A diffusers control net, and the model that it was loaded from."""

    net: Any
    model: str


@dataclass(frozen=True, eq=False)
class Control:
    """A control net with its images `[1 or B, H, W, 3]`, and how strongly and in which part of the steps it acts."""

    loaded: ControlNet
    images: Tensor
    strength: float
    start: float
    end: float

    @property
    def key(self) -> str:
        """What a stream that has this net under this name need not change."""
        return f"{self.loaded.model} from {self.start} to {self.end} ({id(self.loaded.net)})"


class Load:
    """A model as a stream."""

    DESCRIPTION = "Loads a rectified-flow model of diffusers as a stream. It stays loaded while the inputs stay as they are."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (STREAM,), ("stream",)

    def __init__(self) -> None:
        self._loaded: tuple[tuple[Any, ...], StreamFlowWrapper | None] = (), None

    @classmethod
    def INPUT_TYPES(cls) -> INPUTS:
        devices = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        devices += ["mps"] if torch.backends.mps.is_available() else []
        pixels = {"default": 0, "min": 0, "max": 8192, "step": 8, "tooltip": "of the images, in pixels; 0: the model's own"}
        return {
            "required": {
                "model": (
                    "STRING",
                    {"default": "embedded", "tooltip": "embedded, a hub id, a folder or a .safetensors file"},
                ),
                "steps": (
                    "INT",
                    {"default": 4, "min": 1, "max": 1000, "tooltip": "steps of a frame: the stages of the ring"},
                ),
                "guidance": (GUIDANCE, {"tooltip": "kind of guidance (cfg_type); none for models that are distilled"}),
                "acceleration": (ACCELERATIONS, {"tooltip": "auto: torch.compile with a CUDA graph on a GPU, else none"}),
                "dtype": (DTYPES, {"tooltip": "auto: float32 on a CPU, bfloat16 elsewhere"}),
                "device": (devices, {"tooltip": "auto: a GPU where there is one"}),
                "width": ("INT", pixels),
                "height": ("INT", pixels),
            },
            "optional": {
                "frame_buffer_size": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "frames that enter together"}),
                "tiny_vae": ("BOOLEAN", {"default": False, "tooltip": "decode with the family's tiny VAE"}),
                "family": (
                    "STRING",
                    {"default": "", "tooltip": "of a single file or a rectified diffusion model, else empty"},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, model: str | None = None, **inputs: Any) -> int:
        """When the files of a model that lies on this machine were last written."""
        return last_written(model)

    def load(
        self,
        model: str,
        steps: int,
        guidance: str,
        acceleration: str,
        dtype: str,
        device: str,
        width: int,
        height: int,
        frame_buffer_size: int = 1,
        tiny_vae: bool = False,
        family: str = "",
    ) -> tuple[Stream]:
        """The stream. Only `steps` can change without loading the model again."""
        inputs = model, last_written(model), guidance, acceleration, dtype, device, width, height
        inputs += frame_buffer_size, tiny_vae, family
        made_with, wrapper = self._loaded
        if wrapper is None or made_with != inputs:
            self._loaded, wrapper = ((), None), None
            gc.collect()  # the last model, before there are two
            from streamflow import StreamFlowWrapper
            from streamflow.models.loading import DTYPES as BY_NAME

            with torch.inference_mode(False):  # in which ComfyUI calls nodes, and weights would be inference tensors
                wrapper = StreamFlowWrapper(
                    model,
                    device=None if device == "auto" else device,
                    dtype=BY_NAME.get(dtype),
                    frame_buffer_size=frame_buffer_size,
                    width=width or None,
                    height=height or None,
                    warmup=0,
                    acceleration=acceleration,
                    use_tiny_vae=tiny_vae,
                    cfg_type=guidance,
                    family=family or None,
                )
            self._loaded = inputs, wrapper
        return (Stream(wrapper, steps),)


class Prompt:
    """One prompt for all frames."""

    DESCRIPTION = "A prompt for all frames of a sampler."
    CATEGORY, FUNCTION = CATEGORY, "read"
    RETURN_TYPES, RETURN_NAMES = (PROMPT,), ("prompt",)

    @classmethod
    def INPUT_TYPES(cls) -> INPUTS:
        return {
            "required": {"text": ("STRING", {"default": "a fox, 3d render", "multiline": True, "dynamicPrompts": True})},
            "optional": {"negative": ("STRING", {"default": "", "multiline": True, "tooltip": "needs guidance"})},
        }

    def read(self, text: str, negative: str = "") -> tuple[Prompts]:
        return (Prompts(((0, text),), negative),)


class PromptTravel:
    """Prompts at frames, blended in between."""

    DESCRIPTION = "Prompts at frames, one a line: '0: a fox'. The frames in between are drawn under a blend of the two."
    CATEGORY, FUNCTION = CATEGORY, "read"
    RETURN_TYPES, RETURN_NAMES = (PROMPT,), ("prompt",)

    @classmethod
    def INPUT_TYPES(cls) -> INPUTS:
        return {
            "required": {
                "prompts": ("STRING", {"default": "0: a peach, 3d render\n15: a tangerine, 3d render", "multiline": True}),
                "blend": (BLENDS, {"tooltip": "of the encoded prompts: along a line, or along the sphere"}),
            },
            "optional": {"negative": ("STRING", {"default": "", "multiline": True, "tooltip": "needs guidance"})},
        }

    def read(self, prompts: str, blend: str, negative: str = "") -> tuple[Prompts]:
        """The prompts. ValueError: a line that is no 'frame: text', or a frame that does not follow the one before."""
        keys: list[tuple[int, str]] = []
        for number, line in enumerate(prompts.splitlines(), 1):
            found = re.fullmatch(r"\s*(\d+)\s*:\s*(.*?)\s*", line)
            if found is None and line.strip():
                raise ValueError(
                    f"line {number} of the prompts is {line.strip()!r}, and not 'frame: text', such as '8: a fox'"
                )
            if found is not None:
                frame, text = int(found[1]), found[2]
                if keys and frame <= keys[-1][0]:
                    raise ValueError(f"line {number} of the prompts is at frame {frame}, which is not after {keys[-1][0]}")
                keys.append((frame, text))
        if not keys:
            raise ValueError("there are no prompts: write one a line, 'frame: text', such as '0: a fox'")
        return (Prompts(tuple(keys), negative, blend),)


class LoadControlNet:
    """A control net for the model of a stream."""

    DESCRIPTION = "Loads a ControlNet of diffusers for the model of a stream, on its device, in its dtype."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (CONTROL_NET,), ("control_net",)

    @classmethod
    def INPUT_TYPES(cls) -> INPUTS:
        where = {"default": "InstantX/SD3-Controlnet-Canny", "tooltip": "a hub id, or a folder in diffusers' format"}
        return {"required": {"stream": (STREAM,), "model": ("STRING", where)}}

    @classmethod
    def IS_CHANGED(cls, model: str | None = None, **inputs: Any) -> int:
        """When the files of a control net that lies on this machine were last written."""
        return last_written(model)

    def load(self, stream: Stream, model: str) -> tuple[ControlNet]:
        from streamflow.models.loading import load_control

        with torch.inference_mode(False):
            net = load_control(model, stream.wrapper.stream.adapter)
        return (ControlNet(net, model),)


class ApplyControlNet:
    """Control images of frames, for one net after others."""

    DESCRIPTION = "Control images, such as edges, one for all frames or one for each."
    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES, RETURN_NAMES = (CONTROLS,), ("controls",)

    @classmethod
    def INPUT_TYPES(cls) -> INPUTS:
        part = {"min": 0.0, "max": 1.0, "step": 0.001, "tooltip": "part of the steps in which it acts"}
        return {
            "required": {
                "control_net": (CONTROL_NET,),
                "images": ("IMAGE",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}),
                "start_percent": ("FLOAT", {"default": 0.0, **part}),
                "end_percent": ("FLOAT", {"default": 1.0, **part}),
            },
            "optional": {"controls": (CONTROLS, {"tooltip": "of other control nets"})},
        }

    def apply(
        self,
        control_net: ControlNet,
        images: Tensor,
        strength: float,
        start_percent: float,
        end_percent: float,
        controls: tuple[Control, ...] = (),
    ) -> tuple[tuple[Control, ...]]:
        return ((*controls, Control(control_net, images, strength, start_percent, end_percent)),)


class AddReference:
    """Reference images of frames, after others."""

    DESCRIPTION = "Reference images for an edit model, one for all frames or one for each. They may have any size."
    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (REFERENCES,), ("references",)

    @classmethod
    def INPUT_TYPES(cls) -> INPUTS:
        return {
            "required": {"images": ("IMAGE",)},
            "optional": {"references": (REFERENCES, {"tooltip": "that come before this one"})},
        }

    def add(self, images: Tensor, references: tuple[Tensor, ...] = ()) -> tuple[tuple[Tensor, ...]]:
        return ((*references, images),)


class Sample:
    """A batch of images as frames of a stream."""

    DESCRIPTION = "Sends each image of a batch through the stream, as one frame; without images it draws frames from noise."
    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "LATENT"), ("images", "latents")
    OUTPUT_TOOLTIPS = ("The frames, in order.", "Their latents, in the VAE's own scale.")

    @classmethod
    def INPUT_TYPES(cls) -> INPUTS:
        seed = {"default": 2, "min": 0, "max": 2**64 - 1, "control_after_generate": True, "tooltip": "of all noise"}
        own = {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
        part = {"min": 0.0, "step": 0.01, "round": 0.001}
        return {
            "required": {
                "stream": (STREAM,),
                "prompt": (PROMPT,),
                "seed": ("INT", seed),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        **part,
                        "min": 0.01,
                        "max": 1.0,
                        "tooltip": "how much of the images is drawn anew; 1: all of it",
                    },
                ),
                "cfg": ("FLOAT", {**own, "tooltip": "the weight of guidance; 0: the model's own"}),
                "noise": (NOISE, {"tooltip": "fixed: one for all images, fresh for frames without; constant: one for all"}),
                "feedback": (
                    "FLOAT",
                    {"default": 0.0, "max": 0.99, **part, "tooltip": "of the last frame, against flicker"},
                ),
                "frames": (
                    "INT",
                    {"default": 16, "min": 1, "max": 100000, "tooltip": "how many, where there are no images"},
                ),
            },
            "optional": {
                "images": ("IMAGE", {"tooltip": "in the stream's size; an edit model sees them as references"}),
                "controls": (CONTROLS,),
                "references": (REFERENCES, {"tooltip": "for edit models"}),
            },
        }

    def sample(
        self,
        stream: Stream,
        prompt: Prompts,
        seed: int,
        denoise: float,
        cfg: float,
        noise: str,
        feedback: float,
        frames: int,
        images: Tensor | None = None,
        controls: tuple[Control, ...] = (),
        references: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One output for each image, in order.

        Raises:
            ValueError: an empty batch, images of another size than the stream's, control or reference images that are not
                one or one a frame, a `denoise` without images to start from, or a negative prompt without guidance.
            TypeError: pixels of an integer dtype. Also whatever StreamFlow raises.
        """
        from streamflow.image_utils import denormalize
        from streamflow.models import reference_rule

        flow = stream.wrapper.stream
        size = flow.width, flow.height
        start = None if images is None else pixels("images", images, size)
        count = frames if start is None else len(start)
        if count < 1:
            raise ValueError(f"frames: {count}, and a stream draws at least one")
        if prompt.negative and flow.cfg_type == "none":
            raise ValueError("the negative prompt needs guidance: choose a kind of it where the model is loaded")
        steered = [
            for_frames(f"control {i}", pixels(f"control {i}", one.images, size), count) for i, one in enumerate(controls)
        ]
        seen = [for_frames(f"reference {i}", pixels(f"reference {i}", one), count) for i, one in enumerate(references)]
        if seen:
            reference_rule(flow.adapter)  # NotImplementedError where the model takes none
        drawn_from = start is not None and flow.adapter.reference is None
        if denoise < 1 and not drawn_from:
            why = "there are none" if start is None else "this model sees its images as references and starts from noise"
            raise ValueError(f"denoise {denoise:g} keeps part of the images that frames start from, and {why}: set it to 1")
        if flow.prepared:
            flow.reset()  # what an earlier run has left in flight, where it was stopped
        names = use_controls(flow, controls)

        def inputs() -> Iterator[Input]:
            from streamflow.stream.frames import Input

            text = prompt.at(0)
            for k in range(count):
                if prompt.at(k) != text:
                    text = prompt.at(k)
                    flow.update(prompt=text, scope="frame")
                control = {name: one[k] for name, one in zip(names, steered, strict=True)}
                reference = [one[k] for one in seen]
                yield Input(None if start is None else start[k], control=control or None, reference=reference or None)

        arguments: dict[str, Any] = {"seed": seed, "blend": prompt.blend, "num_inference_steps": stream.steps}
        arguments |= {"guidance_scale": cfg} if cfg else {}
        arguments |= {"strength": denoise} if drawn_from else {}
        stream.wrapper.prepare(prompt.at(0), prompt.negative, **arguments)
        flow.update(noise=noise, feedback=feedback, scope="frame")
        decoder = flow.adapter.codec(flow.pipe.vae, flow.height, flow.width).decoder
        done, latents, shown = [], [], progress(count)
        with closing(flow.frames(inputs())) as drawn:
            for frame in drawn:
                done.append(denormalize(frame.image.float()).movedim(0, -1).cpu())
                latents.append(decoder.unscaled(frame.latent[None]).float().cpu())
                shown()
        return torch.stack(done), {"samples": torch.cat(latents)}


def last_written(model: str | None) -> int:
    """When the newest file of a model folder, or a file, was written; 0 for other models, and where the name comes from
    another node."""
    path = Path(model or "").expanduser()
    saved = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    files = [*path.rglob("*")] if model and saved else [path] if path.is_file() else []
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)  # a link may lead nowhere


def pixels(name: str, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """An IMAGE as `[n, 3, h, w]` in [0, 1]. size: the (width, height) that it must have. ValueError: what a stream cannot
    take."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{name}: {list(images.shape)} is no batch of RGB images [B, H, W, 3]; take away what is transparent"
        )
    if not images.is_floating_point():
        raise TypeError(f"{name}: pixels of {images.dtype}, and an IMAGE is floating, in [0, 1]: divide 0..255 by 255")
    n, height, width, _ = images.shape
    if not n:
        raise ValueError(f"{name}: the batch is empty, and a stream draws at least one frame")
    if size is not None and (width, height) != size:
        raise ValueError(
            f"{name}: {width}x{height} pixels, and the stream draws {size[0]}x{size[1]}: scale them with Upscale Image, or "
            f"set width and height where the model is loaded"
        )
    return images.movedim(-1, 1).clamp(0, 1)  # resizing leaves values a little outside, which ComfyUI's nodes clip too


def for_frames(name: str, images: Tensor, count: int) -> Tensor:
    """The same, one for each frame. ValueError unless there are one or `count`."""
    if len(images) not in (1, count):
        raise ValueError(f"{name}: {len(images)} images for {count} frames: connect one, or one for each frame")
    return images.expand(count, -1, -1, -1)


def use_controls(flow: StreamFlow, controls: tuple[Control, ...]) -> list[str]:
    """Let a stream have these control nets and no others, at their strengths. Returns their names in the stream. Nets that
    it has stay, since a change of nets accelerates the network anew."""
    names = [f"{i}: {one.key}" for i, one in enumerate(controls)]
    for name in flow.controls:
        if name not in names:
            flow.remove_control(name)
    for name, one in zip(names, controls, strict=True):
        if name in flow.controls:
            flow.set_control_scale(name, one.strength)
        else:
            flow.add_control(name, one.loaded.net, one.strength, one.start, one.end)
    return names


def progress(count: int) -> Any:
    """A function to call after each frame: it moves ComfyUI's progress bar and raises where the user has stopped the run."""
    comfy = sys.modules.get("comfy.utils")
    bar = comfy and comfy.ProgressBar(count)
    return lambda: bar and bar.update(1)


NODES = {
    "StreamFlowLoad": (Load, "Load StreamFlow Model"),
    "StreamFlowPrompt": (Prompt, "StreamFlow Prompt"),
    "StreamFlowPromptTravel": (PromptTravel, "StreamFlow Prompt Travel"),
    "StreamFlowSample": (Sample, "StreamFlow Sampler"),
    "StreamFlowLoadControlNet": (LoadControlNet, "Load StreamFlow ControlNet"),
    "StreamFlowApplyControlNet": (ApplyControlNet, "Apply StreamFlow ControlNet"),
    "StreamFlowReference": (AddReference, "StreamFlow Reference"),
}
NODE_CLASS_MAPPINGS = {name: cls for name, (cls, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
