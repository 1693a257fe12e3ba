"""A FLUX.2 Klein folder with random weights, to try the edit examples where no model can be downloaded: its images mean
nothing, and speed, sizes and behaviour are those of a model of that size.

    python examples/edit/random_klein.py --output outputs/klein
    python examples/edit/random_klein.py --size 4b --device cuda --output outputs/klein-4b

`4b` has the network of FLUX.2-klein-4B and its VAE (8 GB); its text encoder is a table of random embeddings.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NETWORKS = {  # with the width of the text encoder's states
    "4b": (dict(num_layers=5, num_single_layers=20, num_attention_heads=24), {}, 2560),
    "tiny": (
        dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8,) * 4),
        dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        16,
    ),
}  # fmt: skip
CHAT = "{{ messages[0]['content'] }}"


def pipeline(size: str) -> Flux2KleinPipeline:
    network, vae, width = NETWORKS[size]
    alphabet = {letter: i for i, letter in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    letters = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel()
    text = partial(Qwen3Config, intermediate_size=2, num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**network, joint_attention_dim=3 * width, guidance_embeds=False),
        vae=AutoencoderKLFlux2(**vae),
        text_encoder=Qwen3ForCausalLM(text(vocab_size=len(alphabet), hidden_size=width, head_dim=2)),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", chat_template=CHAT),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=True,
    )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=NETWORKS, default="tiny", help="default: %(default)s")
    p.add_argument("--device", default="cpu", help="that makes the weights (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/klein"), help="folder (default: %(default)s)")
    a = p.parse_args(argv)

    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(a.device):
            pipeline(a.size).save_pretrained(a.output)
    finally:
        torch.set_default_dtype(torch.float32)
    print(f"wrote {a.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
