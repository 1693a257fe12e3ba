"""The shapes of the shipped networks, and the tokenizer. One table each; the training scripts fill them with
weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 24  # of a prompt, its two ends included
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class Shape:
    """Everything that fixes a parameter count. `SHIPPED` is the model in the package, `TINY` is for trying the
    scripts.
    """

    width: int = 256
    layers: int = 10
    head: int = 64
    vae: tuple[int, ...] = (32, 64, 96, 128)
    tiny: int = 32
    text: tuple[tuple[int, int], ...] = ((128, 3), (128, 2))  # (width, layers) of each text encoder
    vocabulary: int = 3072


SHIPPED = Shape()
TINY = Shape(width=64, layers=2, head=32, vae=(8, 8, 16, 16), tiny=8, text=((32, 2), (32, 2)), vocabulary=1024)


def build_vae(shape: Shape) -> AutoencoderKL:
    """8-fold smaller, 16 channels; no attention, so that the decoder stays light on a CPU."""
    return AutoencoderKL(
        block_out_channels=shape.vae,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_tiny_vae(shape: Shape) -> AutoencoderTiny:
    """The light twin. Its latents are the KL ones already scaled and shifted, so its own factors are 1 and 0."""
    return AutoencoderTiny(
        encoder_block_out_channels=(shape.tiny,) * 4,
        decoder_block_out_channels=(shape.tiny,) * 4,
        latent_channels=16,
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, 1),
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer(shape: Shape) -> SD3Transformer2DModel:
    text_width = sum(width for width, _ in shape.text)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=shape.layers,
        attention_head_dim=shape.head,
        num_attention_heads=shape.width // shape.head,
        caption_projection_dim=shape.width,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


class TextEncoders(nn.Module):
    """The two CLIP text encoders of an SD3 pipeline, joined as that pipeline joins them."""

    def __init__(self, shape: Shape, tokenizer: CLIPTokenizer):
        super().__init__()
        self.encoders = nn.ModuleList(
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=4 * width,
                    projection_dim=width,
                    num_hidden_layers=layers,
                    num_attention_heads=width // 32,
                    max_position_embeddings=TOKENS,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    hidden_act="gelu",
                )
            )
            for width, layers in shape.text
        )

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, T] -> embeddings [B, T, E] (the layer before the last, as SD3 takes it) and pooled [B, E]."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        return (
            torch.cat([output.hidden_states[-2] for output in outputs], -1),
            torch.cat([output.text_embeds for output in outputs], -1),
        )


class Flow(nn.Module):
    """All that the flow trains: transformer and text encoders."""

    def __init__(self, shape: Shape, tokenizer: CLIPTokenizer):
        super().__init__()
        self.transformer = build_transformer(shape)
        self.text = TextEncoders(shape, tokenizer)


def train_tokenizer(texts: list[str], size: int, folder: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's form: every text has a spelling, the words of `texts` are mostly single tokens."""
    trainee = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainee.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainee.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size - 2 - len(alphabet),
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [BOS, EOS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    if not (Path(folder) / "tokenizer_config.json").exists():
        raise FileNotFoundError(f"no tokenizer in {folder}: run latents.py first")
    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64 [N, TOKENS], padded and truncated as the SD3 pipeline does."""
    batch = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids
