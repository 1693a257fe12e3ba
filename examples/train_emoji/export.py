"""Writes the trained networks as a StableDiffusion3 folder of diffusers, float16 safetensors, with the tiny twin in
`vae_tiny`.

    python examples/train_emoji/export.py --output streamflow/pretrained/emoji
"""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from networks import SHIPPED, TINY, Flow, build_tiny_vae, load_tokenizer
from training import load_average, options
from vae import finished_vae, read_factors


def build_pipeline(args) -> StableDiffusion3Pipeline:
    shape = TINY if args.tiny else SHIPPED
    tokenizer = load_tokenizer(args.work / "tokenizer")
    flow = load_average(args.work / f"{args.weights}.pt", Flow(shape, tokenizer))
    vae = finished_vae(args.work, shape)
    factors = read_factors(args.work)
    vae.register_to_config(scaling_factor=factors["scaling_factor"], shift_factor=factors["shift_factor"])
    return StableDiffusion3Pipeline(
        transformer=flow.transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=flow.text.encoders[0], text_encoder_2=flow.text.encoders[1], text_encoder_3=None,
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None,
    )  # fmt: skip


def say_float32(folder: Path) -> None:
    """The stored type is float16; without being asked for it, loading shall give float32 throughout."""
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def say_classes(folder: Path) -> None:
    """Names a stand-in that loads as None for T5, which a plain `from_pretrained` would otherwise miss, and the tokenizers'
    class that reads their files in transformers 4 too."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index |= {name: ["streamflow.pretrained", "Absent"] for name in ("text_encoder_3", "tokenizer_3")}
    index |= {name: ["transformers", "PreTrainedTokenizerFast"] for name in ("tokenizer", "tokenizer_2")}
    path.write_text(json.dumps(index, indent=2) + "\n")


def forget(path: Path, name: str) -> None:
    """Take an entry out of a JSON file."""
    entries = json.loads(path.read_text())
    del entries[name]
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def export(args) -> None:
    build_pipeline(args).to(torch.float16).save_pretrained(args.output)
    say_float32(args.output)
    say_classes(args.output)
    if (args.work / "tiny_vae.pt").exists():
        twin = load_average(args.work / "tiny_vae.pt", build_tiny_vae(TINY if args.tiny else SHIPPED))
        twin.half().save_pretrained(args.output / "vae_tiny")
        forget(args.output / "vae_tiny" / "config.json", "block_out_channels")  # diffusers derives it


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--weights", default="reflow", choices=["flow", "reflow"], help="which phase's transformer")
    parser.add_argument("--output", type=Path, required=True)
    export(parser.parse_args())
