"""Opens a diffusers pipeline by what a person writes: the embedded model, a hub id, a folder, or a single file of weights.
Knows diffusers' loaders and the family table; no stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from streamflow import models, pretrained
from streamflow._files import read_json, read_text

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # by the names that settings use
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def load(
    model: str = "embedded",
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    **kwargs: Any,
) -> Any:
    """A loaded pipeline, ready for `StreamFlow`.

    Args:
        model: "embedded" (the model that is part of the package), a hub id such as
            "stabilityai/stable-diffusion-3.5-medium", a folder in diffusers' format, or a single `.safetensors` file.
        device: where to; None leaves it on the CPU.
        dtype: of all weights; None: diffusers' own choice.
        family: of a single file, a key of `streamflow.models.FAMILIES`.
        kwargs: more arguments of diffusers' `from_pretrained` or `from_single_file`.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without model_index.json. ValueError: a file of another
            kind (pickled weights run code when they are loaded), or a single file without its family. OSError: diffusers
            cannot load it.
    """
    options = {**kwargs, **({} if dtype is None else {"dtype": dtype})}
    pipe = _open(str(model), family, options)
    return pipe if device is None else pipe.to(device)


def _open(model: str, family: str | None, options: dict[str, Any]) -> Any:
    from diffusers import DiffusionPipeline

    if model == "embedded":
        return DiffusionPipeline.from_pretrained(pretrained.embedded(), **{**WITHOUT_T5, **options})
    path = Path(model).expanduser()
    if path.is_file():
        return _single_file(path, family, options)
    if path.is_dir():
        return DiffusionPipeline.from_pretrained(path, **{**_left_out(path), **options})
    if path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".safetensors" or model.count("/") != 1:
        raise FileNotFoundError(
            f"there is no file or folder {model}: pass 'embedded', a hub id such as "
            f"'stabilityai/stable-diffusion-3.5-medium', a folder or a .safetensors file"
        )
    return DiffusionPipeline.from_pretrained(model, **options)


def _left_out(folder: Path) -> dict[str, None]:
    """The parts that a saved pipeline was without, such as a T5; from_pretrained wants them named."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json: pass a folder that save_pretrained has written")
    parts = read_json(read_text(index))
    return {name: None for name, part in parts.items() if part == [None, None]}


def _single_file(path: Path, family: str | None, options: dict[str, Any]) -> Any:
    import diffusers

    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is no .safetensors file: pickled weights can run code, so they are not loaded")
    if family not in models.FAMILIES:
        known = ", ".join(sorted(models.FAMILIES))
        raise ValueError(f"a single file does not say what it is of: pass family=, one of {known}, not {family!r}")
    pipeline = getattr(diffusers, models.adapter_class(family).text_pipeline)
    return pipeline.from_single_file(str(path), **options)
