"""A wrapper by a file in the format of livepeer's fork of StreamDiffusion: YAML or JSON whose keys are the wrapper's
arguments.
The project's own files are `streamflow.app.config`'s; this one reads what people already have."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path

from streamflow._files import Json, read_json, read_text, read_yaml
from streamflow.models.loading import DTYPES
from streamflow.wrapper import NOT_HERE, StreamFlowWrapper

READERS = {".yaml": read_yaml, ".yml": read_yaml, ".json": read_json}
ARGUMENTS = signature(StreamFlowWrapper).parameters.keys() - {"model_id_or_path", "not_here"}
PREPARATION = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "delta")
BLENDING = {"prompt_blending": "prompt_list", "seed_blending": "seed_list"}
UNUSED = {"name", "description", "pipeline_type", "use_taesd", "safety_checker", "build_engines_if_missing"}  # there as here


def load_config(config_path: str | Path) -> Json:
    """What such a file holds, checked by `check_config`.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, or what it holds cannot be.
    """
    path = Path(config_path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path.name} is of no kind that is read: choose one of {', '.join(READERS)}")
    try:
        config = READERS[path.suffix.lower()](read_text(path))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    check_config(config)
    return config


def check_config(config: object) -> None:
    """ValueError unless this is a mapping with a model_id and known keys; all that is wrong with them in one message."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a configuration is keys and values, not {type(config).__name__}")
    wrong = [] if config.get("model_id") else ["model_id is missing"]
    weights = "normalize_prompt_weights", "normalize_seed_weights"
    known = {*ARGUMENTS, *PREPARATION, *BLENDING, *UNUSED, *NOT_HERE, "model_id", "ipadapters", *weights}
    wrong += [f"{key!r} is no key" for key in config if key not in known]
    for key, inner in BLENDING.items():
        if key in config and not (isinstance(config[key], Mapping) and config[key].get(inner)):
            wrong.append(f"{key} needs a {inner}, pairs of a value and its weight")
    if isinstance(config.get("dtype"), str) and config["dtype"] not in DTYPES:
        wrong.append(f"dtype {config['dtype']!r} is none of {', '.join(DTYPES)}")
    if wrong:
        raise ValueError(f"this configuration cannot be used: {'; '.join(wrong)}")


def create_wrapper_from_config(config: Json, **overrides: object) -> StreamFlowWrapper:
    """The wrapper of a configuration, prepared and warm. `overrides`: keys that take the place of its own.

    Raises:
        ValueError: as `check_config`. NotImplementedError: it asks for what is not there, with the reason. Otherwise as
            `StreamFlowWrapper`.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"a configuration is keys and values, as load_config gives them, not {type(config).__name__}")
    config = {name: value for name, value in {**config, **overrides}.items() if value is not None}
    check_config(config)
    preparation = {name: config[name] for name in PREPARATION if name in config}
    prompts, seeds = config.get("prompt_blending"), config.get("seed_blending")
    if prompts is not None:
        preparation["prompt"] = [tuple(one) for one in prompts["prompt_list"]]
        preparation["blend"] = prompts.get("interpolation_method", "slerp")
    if seeds is not None:
        preparation["seed_list"] = seeds["seed_list"]
        preparation["seed_interpolation_method"] = seeds.get("interpolation_method", "linear")
    if config.get("normalize_seed_weights") is False:
        raise NotImplementedError("normalize_seed_weights=False changes the noise's variance, which a flow draws as blur")
    if "normalize_prompt_weights" in config:
        preparation["normalize"] = config["normalize_prompt_weights"]
    passed = (ARGUMENTS - UNUSED) | NOT_HERE.keys()
    arguments = {name: value for name, value in config.items() if name in passed}
    if config.get("ipadapters"):
        arguments |= {"use_ipadapter": True, "ipadapter_config": config["ipadapters"]}
    if isinstance(arguments.get("dtype"), str):
        arguments["dtype"] = DTYPES[arguments["dtype"]]
    return StreamFlowWrapper(config["model_id"], prepare={**preparation, **arguments.pop("prepare", {})}, **arguments)
