"""The edit model: a small Flux2Klein pipeline, its parts, and the network that train.py trains.

The pipeline reads hidden states 9, 18 and 27 of a Qwen3 model. Here they are all the embeddings of the tokens: the Qwen3
has 28 layers of two dimensions whose weights are zero. What the words mean together is left to the transformer, whose first
block has weights of its own for text. The VAE is that of the embedded model in AutoencoderKLFlux2, with batch norm
statistics measured here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from emoji_modules import HERE, ROOT
from model_folder import write_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TOKENS = 16  # of a prompt: the pipeline's max_sequence_length
GRID = 8  # tokens of an image's side
CHANNELS = 64  # of a token: 2x2 latents of 16 channels
LAYERS = (9, 18, 27)  # of the text encoder, as the pipeline's text_encoder_out_layers
START, PAD = "<|im_start|>", "<|pad|>"
CHAT = "{{ '" + START + "' + messages[0]['content'] | trim }}"
EMOJI = ROOT / "streamflow" / "pretrained" / "emoji"
LIMIT_MIB = 22


@dataclass(frozen=True)
class Shape:
    """The sizes of transformer and text. `SHIPPED` fits into LIMIT_MIB, `TINY` is for trying the scripts."""

    width: int = 256
    heads: int = 4
    double: int = 1  # blocks with weights of their own for text
    single: int = 7
    mlp: float = 2.0
    text: int = 96  # width of a token's embedding
    words: int = 2048


SHIPPED = Shape()
TINY = Shape(width=64, heads=2, single=2, text=16, words=512)


def build_transformer(shape: Shape) -> Flux2Transformer2DModel:
    """Every block starts as the identity and the velocity at 0."""
    head = shape.width // shape.heads
    transformer = Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=head,
        num_attention_heads=shape.heads,
        joint_attention_dim=len(LAYERS) * shape.text,
        timestep_guidance_channels=128,
        mlp_ratio=shape.mlp,
        axes_dims_rope=(head // 4,) * 4,
        rope_theta=100,
        guidance_embeds=False,
    )
    for linear in (
        transformer.double_stream_modulation_img.linear,
        transformer.double_stream_modulation_txt.linear,
        transformer.single_stream_modulation.linear,
        transformer.norm_out.linear,
        transformer.proj_out,
    ):
        nn.init.zeros_(linear.weight)
    return transformer


class EditFlow(nn.Module):
    """All that is trained: the transformer and the embeddings of the tokens."""

    def __init__(self, shape: Shape, words: int):
        super().__init__()
        self.shape = shape
        self.transformer = build_transformer(shape)
        self.words = nn.Embedding(words, shape.text, padding_idx=0)
        latents = torch.zeros(1, CHANNELS, GRID, GRID)
        image_ids = Flux2KleinPipeline._prepare_latent_ids(latents)
        ids = torch.cat([image_ids, Flux2KleinPipeline._prepare_image_ids([latents])], 1)
        self.register_buffer("image_ids", ids, persistent=False)
        text_ids = Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, TOKENS, 1))
        self.register_buffer("text_ids", text_ids, persistent=False)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The velocity [B, 64, 8, 8] at x and sigma [B], under references [B, 64, 8, 8] and token ids [B, TOKENS]."""
        tokens = torch.cat([x.flatten(2), reference.flatten(2)], 2).transpose(1, 2)
        out = self.transformer(
            hidden_states=tokens,
            timestep=sigma,
            encoder_hidden_states=self.words(ids).repeat(1, 1, len(LAYERS)),
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return out[:, : GRID * GRID].transpose(1, 2).reshape(x.shape)


# -- text ------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text has a spelling, the words of `texts` are mostly single tokens."""
    trainee = Tokenizer(models.BPE())
    trainee.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainee.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=[PAD, START], show_progress=False
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=trainee,
        pad_token=PAD,
        bos_token=START,
        padding_side="right",
        model_max_length=TOKENS,
        chat_template=CHAT,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """int64 [N, TOKENS], as the pipeline makes them."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    return tokenizer(chats, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def text_encoder(words: nn.Embedding) -> Qwen3ForCausalLM:
    """A Qwen3 whose hidden states are the embeddings, in every layer."""
    count, width = words.weight.shape
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=count,
            hidden_size=width,
            intermediate_size=2,
            num_hidden_layers=LAYERS[-1] + 1,  # hidden state 27 is the last one without the final norm
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
    )
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            nn.init.zeros_(parameter)
    model.model.embed_tokens.weight.data.copy_(words.weight.data)
    return model.eval()


# -- latents ---------------------------------------------------------------------------------------------------------------


def build_vae(folder: Path = EMOJI) -> AutoencoderKLFlux2:
    """The VAE of the embedded model with the batch norm of Flux.2, whose statistics `measure` fills in."""
    source = json.loads((folder / "vae" / "config.json").read_text())
    left_out = ("_class_name", "_diffusers_version", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
    config = {name: value for name, value in source.items() if name not in (*left_out, "force_upcast")}
    vae = AutoencoderKLFlux2(**config)
    weights = {k: v.float() for k, v in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items()}
    vae.load_state_dict({**vae.state_dict(), **weights})
    return vae.eval().requires_grad_(False)


def patches(vae: AutoencoderKLFlux2, images: torch.Tensor) -> torch.Tensor:
    """Float32 [B, 64, 8, 8]: the posterior means as the pipeline patches them, before the batch norm."""
    mean = vae.encoder(images.to(vae.dtype)).float().chunk(2, 1)[0]
    return Flux2KleinPipeline._patchify_latents(mean)


@torch.no_grad()
def measure(vae: AutoencoderKLFlux2, batches) -> None:
    """Fills the batch norm's statistics from images, batches [B, 3, 128, 128]."""
    found = torch.cat([patches(vae, images).cpu() for images in batches]).double()
    vae.bn.running_mean.copy_(found.mean((0, 2, 3)))
    vae.bn.running_var.copy_(found.var((0, 2, 3)))


@dataclass(frozen=True)
class Encoder:
    """Images [B, 3, 128, 128] to the latents [B, 64, 8, 8] that the transformer sees."""

    vae: AutoencoderKLFlux2
    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, vae: AutoencoderKLFlux2, dtype: torch.dtype) -> "Encoder":
        """Convolutions in `dtype`, statistics in float32."""
        mean = vae.bn.running_mean.float().view(1, -1, 1, 1).clone()
        std = torch.sqrt(vae.bn.running_var.float().view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return cls(vae.to(dtype), mean, std)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (patches(self.vae, images) - self.mean) / self.std


# -- the folder ------------------------------------------------------------------------------------------------------------


def pipeline(flow: EditFlow, tokenizer: PreTrainedTokenizerFast, vae: AutoencoderKLFlux2) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        transformer=flow.transformer,
        text_encoder=text_encoder(flow.words),
        tokenizer=tokenizer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        is_distilled=True,
    )


def write(pipe: Flux2KleinPipeline, folder: Path) -> float:
    """Writes the pipeline in float16 with its card and licences. Returns its size in MiB. ValueError: it is larger than
    LIMIT_MIB; the folder is there all the same."""
    return write_folder(pipe, folder, HERE / "card.md", LIMIT_MIB, "edit_model.py")
