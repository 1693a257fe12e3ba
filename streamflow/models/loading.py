"""Loads a diffusers pipeline: an embedded model, a hub id, a folder, or a single file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from streamflow import models, pretrained
from streamflow._files import read_json, read_text
from streamflow.models.protocols import Call, Function, Pipeline

if TYPE_CHECKING:
    from streamflow.models.adapter import FlowAdapter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # by the names that settings use


def default_device() -> str:
    """The first of these devices that torch has: "cuda", "mps", "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of weights where none is given: float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def prompt_defaults(pipe: Pipeline) -> Call:
    """Arguments for every prompt of this pipeline. Stable Diffusion 3 without its T5 would append 256 empty tokens."""
    return {"max_sequence_length": 0} if getattr(pipe, "text_encoder_3", pipe) is None else {}


def load(
    model: str = "embedded",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    family: str | None = None,
    **kwargs: object,
) -> Pipeline:
    """A loaded pipeline, ready for `StreamFlow`.

    Args:
        model: "embedded" or "embedded-video" (the models that are part of the package), a hub id such as
            "stabilityai/stable-diffusion-3.5-medium", a folder in diffusers' format, or a single `.safetensors` file.
        device: the device of the pipeline; None: the CPU.
        dtype: of all weights, or by the names of the parts and "default" for the others; None: diffusers' own choice.
        family: of a single file, a key of `streamflow.models.FAMILIES`.
        kwargs: more arguments of diffusers' `from_pretrained` or `from_single_file`.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without model_index.json. ValueError: a file of another
            kind (pickled weights run code when they are loaded), or a single file without its family. OSError: diffusers
            cannot load it.
    """
    options: Call = {**kwargs, **({} if dtype is None else {"dtype": dtype})}
    pipe = _open(str(model), family, options)
    return pipe if device is None else pipe.to(device)


def load_control(model: str, adapter: FlowAdapter, **options: object) -> nn.Module:
    """A control net for this adapter's network, by hub id or folder in diffusers' format, in the network's dtype, on its
    device. options: more arguments of `from_pretrained`. NotImplementedError: diffusers has none for the family. OSError:
    diffusers cannot load it. Also raises as `control_source`."""
    import diffusers

    net = adapter.net
    kind: Function = getattr(diffusers, models.control_rule(adapter).model).from_pretrained
    return kind(control_source(model), torch_dtype=net.dtype, **options).to(net.device)


def control_source(model: str) -> str:
    """The folder or the hub id of a control net. FileNotFoundError: there is no such folder."""
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return str(folder)
    if not _is_hub_id(model):
        raise FileNotFoundError(f"there is no folder {model!r}: pass a hub id, or a folder that save_pretrained has written")
    return model


def _open(model: str, family: str | None, options: Call) -> Pipeline:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    if are_progress_bars_disabled():  # diffusers does not ask, and transformers asks at its import only
        logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    from_pretrained: Function = DiffusionPipeline.from_pretrained
    path = _path(model)
    if path.is_file():
        return _single_file(path, family, options)
    if path.is_dir():
        return from_pretrained(path.absolute(), **{**_left_out(path), **options})
    if not _is_hub_id(model):
        raise FileNotFoundError(
            f"there is no file or folder {model}: pass 'embedded' or 'embedded-video', a hub id such as "
            f"'stabilityai/stable-diffusion-3.5-medium', a folder or a .safetensors file"
        )
    return from_pretrained(model, **options)


def _path(model: str) -> Path:
    """The folder of an embedded model, or the path that is written."""
    return Path(pretrained.MODELS[model]() if model in pretrained.MODELS else model).expanduser()


def _is_hub_id(model: str) -> bool:
    path = Path(model)
    a_path = path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".safetensors"
    return not a_path and model.count("/") == 1


def is_video(model: str) -> bool:
    """Whether a model is a video pipeline that `streamflow.VideoStream` draws, by its model_index.json. Of a hub id no more
    than that is downloaded. False for what `load` cannot load, which raises why."""
    path = _path(model)
    if path.exists() or not _is_hub_id(model):
        index = path / "model_index.json"
        parts = read_json(read_text(index)) if index.is_file() else {}
    else:
        from diffusers import DiffusionPipeline

        load_config: Function = DiffusionPipeline.load_config
        try:
            parts = load_config(model)
        except OSError:
            return False
    return parts.get("_class_name") in models.VIDEO_PIPELINES


def _left_out(folder: Path) -> dict[str, None]:
    """The parts that a saved pipeline does not have, such as a T5; from_pretrained must be passed None for them."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json: pass a folder that save_pretrained has written")
    parts = read_json(read_text(index))
    return {name: None for name, part in parts.items() if part == [None, None]}


def _single_file(path: Path, family: str | None, options: Call) -> Pipeline:
    import diffusers

    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is no .safetensors file: pickled weights can run code, so they are not loaded")
    if family not in models.FAMILIES:
        known = ", ".join(sorted(models.FAMILIES))
        raise ValueError(f"a single file does not name its family: pass family=, one of {known}, not {family!r}")
    pipeline = getattr(diffusers, models.adapter_class(family).text_pipeline)
    return pipeline.from_single_file(str(path), **options)
