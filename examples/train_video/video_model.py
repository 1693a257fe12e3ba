"""The video model: a small Helios pipeline, its parts, and the network that train.py trains.

The text encoder is a UMT5 without layers: its hidden states are the embeddings of the tokens, normalised. What the words
mean together is left to the transformer. A chunk is 9 images, which a small AutoencoderKLWan encodes as 3 latents.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from clips import IMAGES, SIZE
from diffusers import AutoencoderKLWan, HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel
from emoji_folder import HERE
from model_folder import write_folder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TOKENS = 20  # of a prompt
GRID = 16  # latents of an image's side
LATENTS = 3  # of a chunk: one image, and four images twice
HISTORY = (16, 2, 1)  # the pipeline's history_sizes
STEPS = 4
FIRST_SIGMA = 0.999  # where the pipeline begins
PAD, END = "<pad>", "</s>"
EPSILON = 1e-6
LIMIT_MIB = 10
CALL = {  # how the pipeline is called
    "height": SIZE,
    "width": SIZE,
    "num_latent_frames_per_chunk": LATENTS,
    "num_inference_steps": STEPS,
    "guidance_scale": 1.0,
    "max_sequence_length": TOKENS,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of all parts. `SHIPPED` fits into LIMIT_MIB, `TINY` is for trying the scripts."""

    heads: int = 5
    head: int = 32
    rope: tuple[int, int, int] = (8, 12, 12)
    layers: int = 7
    mlp: int = 480
    text: int = 96  # width of a token's embedding
    words: int = 640
    latent: int = 12  # channels
    encoder: int = 24  # channels of the VAE's first level
    decoder: int = 24
    levels: tuple[int, ...] = (1, 2, 2)  # factors of the channels


SHIPPED = Shape()
TINY = Shape(heads=2, head=16, rope=(4, 6, 6), layers=2, mlp=64, text=32, latent=8, encoder=4, decoder=4, levels=(1, 2, 2))


def build_vae(shape: Shape) -> AutoencoderKLWan:
    """8 x 8 pixels and 4 images a latent. Its first level works on 2 x 2 pixels, which makes it light on a CPU.

    As in the VAE of Wan 2.2, each level has a shortcut, of averaged or repeated channels. The convolutions begin with the
    newest image alone, the residual branches are quiet, and there is little noise on the latents. So what an image shows
    reaches the other end from the first step on, and less of the training is lost.
    """
    vae = AutoencoderKLWan(
        base_dim=shape.encoder,
        decoder_base_dim=shape.decoder,
        z_dim=shape.latent,
        dim_mult=list(shape.levels),
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        latents_mean=[0.0] * shape.latent,
        latents_std=[1.0] * shape.latent,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            images = module.kernel_size[0] if isinstance(module, nn.Conv3d) else 1
            branch = name.endswith(("conv2", "resample.1", "time_conv"))
            quiet = 0.1 if name == "decoder.conv_out" else 0.3 if branch else 1.0
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear").data *= quiet * images**0.5
            nn.init.zeros_(module.bias)
            if images > 1:
                module.weight.data[:, :, :-1] = 0
    vae.quant_conv.weight.data[shape.latent :] *= 0.1
    vae.quant_conv.bias.data[shape.latent :] = -6
    return vae


def encoded(vae: AutoencoderKLWan, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks [B, 3, 9, 128, 128] in [-1, 1] to the mean and the log variance of their latents, each [B, C, 3, 16, 16]."""
    patch = vae.config.patch_size
    blocks = chunks.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, 3, T, h, down, w, right]
    x = blocks.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3).contiguous(memory_format=torch.channels_last_3d)
    vae.clear_cache()
    pieces = []
    for some in x.split([1, *[4] * (x.shape[2] // 4)], 2):
        vae._enc_conv_idx = [0]
        pieces.append(vae.encoder(some, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    vae.clear_cache()
    return vae.quant_conv(torch.cat(pieces, 2)).chunk(2, 1)


def decoded(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """As `vae.decode`, without its clamp, whose gradient is 0 where it acts: [B, C, 3, 16, 16] to [B, 3, 9, 128, 128]."""
    latents = vae.post_quant_conv(latents.contiguous(memory_format=torch.channels_last_3d))
    vae.clear_cache()
    pieces = []
    for k in range(latents.shape[2]):
        vae._conv_idx = [0]
        memory = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx, "first_chunk": k == 0}
        pieces.append(vae.decoder(latents[:, :, k : k + 1], **memory))
    vae.clear_cache()
    patch = vae.config.patch_size
    blocks = torch.cat(pieces, 2).unflatten(1, (-1, patch, patch))  # [B, 3, right, down, T, h, w]
    return blocks.permute(0, 1, 4, 5, 3, 6, 2).flatten(3, 4).flatten(4, 5)


def flat_convolutions(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Computes its 3D convolutions as 2D ones whose channels are those of neighbouring images: GPUs have quicker kernels for
    these. In place."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = partial(_flat, module)
    return vae


def _flat(conv: nn.Conv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    side, _, _, _, before, _ = conv._padding
    if cache_x is not None and before:
        x, before = torch.cat([cache_x, x], 2), before - cache_x.shape[2]
    x = F.pad(x, (0, 0, 0, 0, before, 0))
    (images, *_), (stride, *_) = conv.kernel_size, conv.stride
    last = x.shape[2] - images
    beside = torch.cat([x[:, :, k : last + k + 1 : stride] for k in range(images)], 1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    out = F.conv2d(beside.transpose(1, 2).flatten(0, 1), weight, conv.bias, padding=side)
    return out.unflatten(0, (len(x), -1)).transpose(1, 2)


@dataclass(frozen=True)
class Codec:
    """Chunks to the latents that the transformer sees, and back."""

    vae: AutoencoderKLWan
    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, vae: AutoencoderKLWan) -> "Codec":
        config, device = vae.config, vae.post_quant_conv.weight.device
        values = (config.latents_mean, config.latents_std)
        return cls(vae, *(torch.tensor(one, device=device).view(1, -1, 1, 1, 1) for one in values))

    @torch.no_grad()
    def encode(self, chunks: torch.Tensor) -> torch.Tensor:
        return (encoded(self.vae, chunks.to(self.vae.dtype))[0].float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decoded(self.vae, (latents * self.std + self.mean).to(self.vae.dtype)).float().clamp(-1, 1)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, batches) -> None:
    """Sets the mean and the deviation of each channel, from chunks."""
    found = torch.cat([encoded(vae, some)[0].float().cpu() for some in batches]).double()
    mean, std = found.mean((0, 2, 3, 4)), found.std((0, 2, 3, 4)).clamp(min=EPSILON)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


# -- text ------------------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """The embeddings of the tokens as a UMT5 without layers gives them; 0 for padding, as the pipeline fills it."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPSILON)
        return self.weight * rows * (ids != 0)[..., None]


def text_encoder(words: Words) -> UMT5EncoderModel:
    count, width = words.table.weight.shape
    config = UMT5Config(
        vocab_size=count, d_model=width, d_kv=1, d_ff=1, num_layers=0, num_heads=1, layer_norm_epsilon=EPSILON,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = UMT5EncoderModel(config)
    model.shared.weight.data.copy_(words.table.weight.data)
    model.encoder.final_layer_norm.weight.data.copy_(words.weight.data)
    return model.eval()


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of words, which ends every text with END: every text has a spelling, and the words of `texts` are
    mostly single tokens. The tokens of a text are those of its parts, wherever it is cut between words."""
    trainee = Tokenizer(models.BPE())
    trainee.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainee.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), bytes_of])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[PAD, END], show_progress=False
    )  # fmt: skip
    trainee.train_from_iterator(texts, trainer)
    trainee.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=trainee, pad_token=PAD, eos_token=END, padding_side="right", model_max_length=TOKENS
    )  # fmt: skip


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """int64 [N, TOKENS], as the pipeline makes them."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


# -- the network -----------------------------------------------------------------------------------------------------------


def build_transformer(shape: Shape) -> HeliosTransformer3DModel:
    """The velocity starts at 0."""
    transformer = HeliosTransformer3DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head,
        in_channels=shape.latent,
        out_channels=shape.latent,
        text_dim=shape.text,
        freq_dim=128,
        ffn_dim=shape.mlp,
        num_layers=shape.layers,
        rope_dim=shape.rope,
        rope_theta=100.0,
    )
    nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


class VideoFlow(nn.Module):
    """All that the flow trains: the transformer and the embeddings of the tokens."""

    def __init__(self, shape: Shape, words: int):
        super().__init__()
        self.shape = shape
        self.transformer = build_transformer(shape)
        self.words = Words(words, shape.text)
        first, *past, now = torch.arange(1 + sum(HISTORY) + LATENTS)[None].split([1, *HISTORY, LATENTS], 1)
        places = {"long": past[0], "mid": past[1], "short": torch.cat([first, past[2]], 1), "now": now}
        for name, place in places.items():
            self.register_buffer(f"place_{name}", place, persistent=False)

    def load(self, pipe: HeliosPipeline) -> None:
        """Takes the weights of a pipeline of this shape."""
        self.transformer.load_state_dict(pipe.transformer.state_dict())
        self.words.table.load_state_dict(pipe.text_encoder.shared.state_dict())
        self.words.weight.data.copy_(pipe.text_encoder.encoder.final_layer_norm.weight)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, history: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The velocity [B, C, 3, 16, 16] at x and sigma [B], after the latent of the first image and the last 19 latents,
        history [B, C, 20, 16, 16], under token ids [B, TOKENS]."""
        first, long, middle, last = history.split([1, *HISTORY], 2)
        return self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=self.words(ids),
            indices_hidden_states=self.place_now,
            indices_latents_history_short=self.place_short,
            indices_latents_history_mid=self.place_mid,
            indices_latents_history_long=self.place_long,
            latents_history_short=torch.cat([first, last], 2),
            latents_history_mid=middle,
            latents_history_long=long,
            return_dict=False,
        )[0]


# -- the folder ------------------------------------------------------------------------------------------------------------


def pipeline(flow: VideoFlow, tokenizer: PreTrainedTokenizerFast, vae: AutoencoderKLWan) -> HeliosPipeline:
    return HeliosPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(flow.words),
        vae=vae,
        scheduler=HeliosScheduler(stages=1, stage_range=[0, 1], scheduler_type="euler"),
        transformer=flow.transformer,
    )


@torch.no_grad()
def embeddings(pipe: HeliosPipeline, prompts: list[str]) -> torch.Tensor:
    """What `pipe.encode_prompt` gives, [N, TOKENS, width], without the package ftfy."""
    ids = token_ids(pipe.tokenizer, prompts).to(pipe.text_encoder.device)
    mask = ids != 0
    return pipe.text_encoder(ids, mask).last_hidden_state * mask[..., None]


def write(pipe: HeliosPipeline, folder: Path) -> float:
    """Writes the pipeline in float16 with its card and licences, and CALL for streams. Returns its size in MiB. ValueError:
    it is larger than LIMIT_MIB; the folder is there all the same."""
    size = write_folder(pipe, folder, HERE / "card.md", LIMIT_MIB, "video_model.py")
    (folder / "call.json").write_text(json.dumps(CALL, indent=2) + "\n")
    return size


assert 4 * LATENTS - 3 == IMAGES and GRID * 8 == SIZE
