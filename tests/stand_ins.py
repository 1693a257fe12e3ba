"""What takes the place of a hub, a GPU or a camera where the code blocks of README and docs are run as printed.

A block that needs something says so in a comment before it: `<!-- needs: hub, gpu -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, SD3ControlNetModel, StableDiffusion3Pipeline
from PIL import Image
from random_pipelines import random_pipeline, random_tiny_vae
from random_pipelines.control import random_control
from random_pipelines.image_prompts import clip_encoder, save_adapter
from test_loras import TARGETS, write_lora
from transformers import CLIPVisionModelWithProjection

from streamflow.conditioning import control_makers
from streamflow.io.addresses import SINKS, SOURCES
from streamflow.models import tiny_vae
from streamflow.pretrained import embedded
from streamflow.samples import CLIP, IMAGE

BLOCK = re.compile(r"(?:<!-- needs: ([^>]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)

NOT_RUN = {
    "shell-install": ".ci/run and .github/workflows/readme.yml run the README's two commands in a fresh clone",
    "torchrun": "tests/test_parallel_distributed.py runs examples/torchrun_decode.py",
    "ray": "tests/test_ray.py does the same",
    "tensorrt": "engines run on RTX cards only",
    "quantize": "fp8 needs a GPU; tests/test_gpu_quantize.py",
    "midi": "needs a controller; tests/test_control.py plays its messages",
    "video-model": "the networks are large; tests/test_video.py makes these calls with small ones",
    "redux": "tests/test_image_prompts.py does it with a small prior",
}
FAMILY_OF = {
    "StableDiffusion3Pipeline": "sd3",
    "AuraFlowPipeline": "auraflow",
    "DiffusionPipeline": "sd3",
    "FluxPipeline": "schnell",
    "BriaFiboEditPipeline": "bria-fibo-edit",
}
LARGE = {"sd3": {"pos_embed_max_size": 128}, "auraflow": {"pos_embed_max_size": 4096}}  # for 512x512


def blocks(text: str, *languages: str) -> list[tuple[frozenset[str], str]]:
    """(what it needs, its text) of every block in these languages, in order."""
    found = [(needs, text) for needs, language, text in BLOCK.findall(text) if language in languages]
    return [(frozenset(re.split(r",\s*", needs)) - {""}, text) for needs, text in found]


def not_run(needs: Iterable[str]) -> list[str]:
    """Why a block is not run here; empty where it is."""
    return [f"{need}: {NOT_RUN[need]}" for need in needs if need in NOT_RUN]


def stand_in(needs: Iterable[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give a block what it needs, until `monkeypatch` ends. KeyError for a need that has no stand-in."""
    for need in needs:
        STAND_INS[need](monkeypatch, folder)


def _hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A tiny random pipeline of the same class for every model that is not a folder; a LoRA, a control net, an adapter of
    image prompts, and gray images for those of a depth model."""
    plain, made = DiffusionPipeline.from_pretrained.__func__, {}

    def from_pretrained(cls: type, path: str | Path, **options: Any) -> DiffusionPipeline:
        if Path(path).is_dir():
            return plain(cls, path, **options)
        family = "flux2-klein" if "klein" in str(path) else FAMILY_OF[cls.__name__]
        made["pipe"] = random_pipeline(family, **LARGE.get(family, {}))
        return made["pipe"]

    def load_tiny(path: str) -> AutoencoderTiny:
        if Path(path).is_dir():
            return AutoencoderTiny.from_pretrained(path)
        vae = made["pipe"].vae.config
        return random_tiny_vae(vae.latent_channels, len(vae.block_out_channels))

    def adapter_file(*args: object, **options: object) -> str:
        if "pipe" in made:  # a later block goes on with the pipe of an earlier one
            save_adapter(made["pipe"], folder / "adapter.safetensors")
        return str(folder / "adapter.safetensors")

    monkeypatch.setattr("diffusers.loaders.ip_adapter._get_model_file", adapter_file)
    monkeypatch.setattr(CLIPVisionModelWithProjection, "from_pretrained", lambda *a, **k: clip_encoder())
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(tiny_vae, "load", load_tiny)
    depth = control_makers.WITH_MODEL["depth"][1]
    gray = (lambda model, device: lambda image: image.convert("L")), depth
    monkeypatch.setitem(control_makers.WITH_MODEL, "depth", gray)
    model = plain(StableDiffusion3Pipeline, embedded())
    control = random_control(model.transformer)
    monkeypatch.setattr(SD3ControlNetModel, "from_pretrained", lambda *a, **k: control)
    if not (folder / "owner/lora").exists():
        write_lora(model, TARGETS["sd3"], folder / "owner/lora", seed=0)


def _gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The CPU."""
    plain = DiffusionPipeline.to

    def to(self: DiffusionPipeline, *arguments: object, **options: Any) -> DiffusionPipeline:
        return plain(self, *("cpu" if one == "cuda" else one for one in arguments), **options)

    monkeypatch.setattr(DiffusionPipeline, "to", to)


def _camera(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A folder of two images; and nothing for a window."""
    frames = folder / "camera"
    frames.mkdir(exist_ok=True)
    for k in range(2):
        Image.open(IMAGE).rotate(20 * k, fillcolor="white").save(frames / f"{k}.png")
    monkeypatch.setitem(SOURCES, "camera", ("folder", "FolderSource", lambda rest: {"path": str(frames)}))
    monkeypatch.setitem(SINKS, "window", ("null", "NullSink", lambda rest: {}))


def _video(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """PyAV itself."""
    pytest.importorskip("av", reason="needs PyAV: python env/install.py --video")


def _endless(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """`arguments` adds --seconds 1."""


STAND_INS = {"hub": _hub, "gpu": _gpu, "camera": _camera, "video": _video, "endless": _endless}


def arguments(words: list[str], needs: Iterable[str]) -> list[str]:
    """The arguments of a `streamflow` command, so that it ends soon and has a clip."""
    more = []
    if "endless" in needs:
        more += ["--seconds", "1"]
    if words[1] == "video" and "--in" not in words:
        more += ["--in", str(CLIP)]  # the default
    return [*words[1:], *more]


def run_python(text: str, name: str, scope: dict[str, Any]) -> None:
    """Run a block, without gradients and one thread as in the tests."""
    with torch.random.fork_rng(devices=[]):
        exec(compile(text, name, "exec"), scope)
