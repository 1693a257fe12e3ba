"""Writes the folder of a small pipeline: in float16, with its card and licences, within a size."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

NOTICE = Path(__file__).resolve().parents[2] / "streamflow" / "pretrained" / "emoji" / "NOTICE"


def set_entries(path: Path, **entries: object) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}, indent=2) + "\n")


def write_folder(pipe: DiffusionPipeline, folder: Path, card: Path, limit_mib: float, where: str) -> float:
    """Writes the pipeline in float16 with its card and licences. Returns its size in MiB.

    Raises:
        ValueError: it is larger than `limit_mib`; `where` is the file that has its Shape. The folder is there all the same.
    """
    pipe.to(torch.float16).save_pretrained(folder)
    set_entries(folder / "text_encoder" / "config.json", dtype="float32")  # what a plain from_pretrained gives
    tokenizer = "PreTrainedTokenizerFast"  # reads the files in transformers 4 too
    set_entries(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class=tokenizer)
    set_entries(folder / "model_index.json", tokenizer=["transformers", tokenizer])
    shutil.copy(card, folder / "README.md")
    shutil.copy(NOTICE, folder / "NOTICE")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    if size > limit_mib:
        raise ValueError(f"{folder} is {size:.2f} MiB and may be {limit_mib}: choose a smaller Shape in {where}")
    return size
