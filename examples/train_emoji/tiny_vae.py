"""Trains the light twin of the KL autoencoder: the same latents, already shifted and scaled, from and to images.

torchrun --nproc-per-node 2 examples/train_emoji/tiny_vae.py --seconds 60
"""

from dataclasses import dataclass

import torch
from networks import SHIPPED, TINY, build_tiny_vae
from pack import training_pack
from torch import nn
from training import Phase, Worker, earlier, half_type, in_half, options, worker
from vae import ImageSampler, encoded, finished_vae, image_error, read_factors


@dataclass(frozen=True)
class Recipe:
    batch: int = 64  # a worker
    lr: float = 1.5e-3
    plain: float = 0.5  # share of images on white, as they are
    encoder: float = 0.5  # weight of the latents' error
    true: float = 0.3  # weight of the true images' error, beside that of the KL decoder's images
    noise: float = 0.3  # largest deviation of the noise on the latents that both decoders see


class Loss(nn.Module):
    def __init__(self, tiny: nn.Module, recipe: Recipe):
        super().__init__()
        self.tiny, self.recipe = tiny, recipe

    def forward(self, images, latent, seen, taught) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images and their latents; the latents that the decoder sees and what the KL decoder makes of them.

        -> the loss, and the errors of images and of latents.
        """
        kind = self.tiny.dtype
        made = self.tiny.decoder(seen.to(kind))
        decoded = image_error(made, taught)
        encoded = (self.tiny.encoder(images.to(kind)).float() - latent).square().mean()
        loss = decoded + self.recipe.true * image_error(made, images) + self.recipe.encoder * encoded
        return loss, decoded, encoded


def train(me: Worker, args, recipe: Recipe) -> None:
    shape = TINY if args.tiny else SHIPPED
    sampler = ImageSampler(training_pack(args.data, args.holdout, args.limit), me.device)
    teacher = finished_vae(args.work, shape).to(me.device).eval()
    factors = read_factors(args.work)
    shift, scale = factors["shift_factor"], factors["scaling_factor"]
    tiny = build_tiny_vae(shape)
    begin = earlier(args, "tiny_vae")
    phase = Phase.start(me, args.work / "tiny_vae.pt", tiny, args, recipe.lr, decay=0.998, begin=begin)
    errors_of = Loss(tiny, recipe)

    @torch.no_grad()
    def lesson() -> tuple:
        """What `Loss` takes."""
        images = sampler.draw(recipe.batch, recipe.plain)
        latent = (encoded(me, teacher, images) - shift) * scale
        seen = latent + recipe.noise * torch.rand_like(latent[:, :1, :1, :1]) * torch.randn_like(latent)
        taught = in_half(me, teacher.decoder, (seen / scale + shift).to(half_type(me))).float().clamp(-1, 1)
        return images, latent, seen, taught

    def loss_of():
        loss, decoded, latent_error = in_half(me, errors_of, *lesson())
        return loss, {"decoded": decoded, "encoded": latent_error}

    phase.run(loss_of, args.stop_after)


if __name__ == "__main__":
    parser = options(__doc__, seconds=60)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="images a worker and step")
    arguments = parser.parse_args()
    with worker() as me:
        train(me, arguments, Recipe(batch=arguments.batch))
