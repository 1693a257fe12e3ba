"""Trains the light twin of the KL autoencoder: the same latents, already shifted and scaled, from and to pictures.

torchrun --nproc-per-node 2 examples/train_emoji/tiny_vae.py --seconds 60
"""

import json
import random
from dataclasses import dataclass

import torch
from networks import SHIPPED, TINY, build_tiny_vae, build_vae
from pictures import Pack, row_weights, training_pack
from torch import nn
from training import Phase, Worker, in_half, load_average, mixed_precision, options, worker
from vae import draw_images, picture_error


@dataclass(frozen=True)
class Recipe:
    batch: int = 64  # a worker
    lr: float = 1e-3
    plain: float = 0.5  # share of pictures on white, as they are
    encoder: float = 0.5  # weight of the latents' error
    noise: float = 0.1  # deviation of the noise on the latents that the decoder sees


class Loss(nn.Module):
    def __init__(self, tiny: nn.Module, recipe: Recipe):
        super().__init__()
        self.tiny, self.recipe = tiny, recipe

    def forward(self, images: torch.Tensor, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> the loss, and the errors of pictures and of latents."""
        kind = self.tiny.dtype
        noise = self.recipe.noise * torch.rand_like(latent[:, :1, :1, :1]) * torch.randn_like(latent)
        decoded = picture_error(self.tiny.decoder((latent + noise).to(kind)), images)
        encoded = (self.tiny.encoder(images.to(kind)).float() - latent).square().mean()
        return decoded + self.recipe.encoder * encoded, decoded, encoded


def train(me: Worker, args, recipe: Recipe) -> None:
    shape = TINY if args.tiny else SHIPPED
    pack = training_pack(args.data, args.holdout, args.limit)
    pack = Pack(pack.rows, pack.rgba.to(me.device))
    weights = row_weights(pack.rows).to(me.device)
    random.seed(me.rank)
    teacher = load_average(args.work / "vae.pt", build_vae(shape)).to(me.device).eval()
    factors = json.loads((args.work / "vae.json").read_text())
    tiny = build_tiny_vae(shape)
    phase = Phase.start(me, args.work / "tiny_vae.pt", tiny, args.seconds, recipe.lr, decay=0.998)
    loss_of = Loss(tiny, recipe)
    for fraction in phase.steps(args.stop_after):
        images = draw_images(pack, weights, recipe.batch, recipe.plain)
        with torch.no_grad(), mixed_precision(me):
            mean = teacher.encoder(images).float().chunk(2, 1)[0]
        latent = (mean - factors["shift_factor"]) * factors["scaling_factor"]
        loss, decoded, encoded = in_half(me, loss_of, images, latent)
        loss.backward()
        phase.step_with(fraction)
        phase.reading = {"decoded": decoded, "encoded": encoded}


if __name__ == "__main__":
    parser = options(__doc__, seconds=60)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="pictures a worker and step")
    arguments = parser.parse_args()
    with worker() as me:
        train(me, arguments, Recipe(batch=arguments.batch))
