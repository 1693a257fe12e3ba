"""Trains the KL autoencoder: 128x128 images to 16 channels of 16x16 and back.

L1 of pixels and of their differences, a KL term, and a quarter of the batch decoded from latents at half the size,
which keeps coarse structure in coarse latents and so makes them easier for the flow to model.

    torchrun --nproc-per-node 2 examples/train_emoji/vae.py --seconds 240
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import BACKGROUNDS
from diffusers import AutoencoderKL
from networks import SHIPPED, TINY, Shape, build_vae
from pack import Pack, background_rgb, compose, placement, row_weights, training_pack
from torch import nn
from training import Phase, Worker, cumulated, earlier, in_half, load_average, mixed_precision, options, pick, worker


@dataclass(frozen=True)
class Recipe:
    batch: int = 64  # a worker
    lr: float = 1e-3
    kl: float = 2e-3  # times the mean over latent elements, at first
    kl_end: float = 1e-3  # and at the end
    plain: float = 0.5  # share of images on white, as they are
    noise: float = 0.05  # least deviation of the latents that the decoder is trained on
    half_size: float = 0.25  # share also decoded at half size


class ImageSampler:
    """The pack on the device, drawn from without the host, so that a CUDA graph can hold it."""

    def __init__(self, pack: Pack, device: torch.device):
        self.rgba = pack.rgba.to(device)
        self.shares = cumulated(row_weights(pack.rows)).to(device)
        self.backgrounds = background_rgb(list(BACKGROUNDS), device)

    def draw(self, count: int, plain: float) -> torch.Tensor:
        """Images [count, 3, 128, 128] in [-1, 1]: some plain on white, the rest moved, turned, mirrored, on any
        colour.
        """
        device = self.rgba.device
        untouched = torch.rand(count, device=device) < plain
        scale = torch.where(untouched, 1.0, torch.empty(count, device=device).uniform_(0.7, 1.15))
        shift = torch.empty(count, 2, device=device).uniform_(-10, 10) * ~untouched[:, None]
        turn = torch.empty(count, device=device).uniform_(-0.3, 0.3) * ~untouched
        named = self.backgrounds[torch.randint(len(self.backgrounds), (count,), device=device)]
        anything = torch.where(torch.rand(count, 1, device=device) < 0.5, named, torch.rand(count, 3, device=device))
        place = placement(scale, shift, turn)
        images = compose(self.rgba[pick(self.shares, count)], torch.where(untouched[:, None], 1.0, anything), place)
        mirrored = (torch.rand(count, device=device) < 0.5) & ~untouched
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def image_error(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels plus L1 of their horizontal and vertical differences."""
    off = made.float() - wanted
    return off.abs().mean() + off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()


class Loss(nn.Module):
    """Computes in its parameters' type; errors are summed in float32."""

    def __init__(self, vae: nn.Module, recipe: Recipe):
        super().__init__()
        self.vae, self.recipe = vae, recipe

    def forward(self, images: torch.Tensor, over: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the loss when `over` (0 to 1) of the phase is over, and the error of the reconstruction alone."""
        kind = self.vae.dtype
        mean, log_variance = self.vae.encoder(images.to(kind)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-20, 10)
        deviation = (log_variance.exp() + self.recipe.noise**2).sqrt()
        latent = (mean + deviation * torch.randn_like(mean)).to(kind)
        error = image_error(self.vae.decoder(latent), images)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        few = max(1, int(len(images) * self.recipe.half_size))
        small = image_error(self.vae.decoder(F.avg_pool2d(latent[:few], 2)), F.avg_pool2d(images[:few], 2))
        weight = self.recipe.kl + (self.recipe.kl_end - self.recipe.kl) * over
        return error + weight * kl + self.recipe.half_size * small, error


@torch.no_grad()
def measure(vae: nn.Module, pack: Pack) -> dict:
    """Mean and deviation of the latents of all images on white, and PSNR (dB, of pixels in [0, 1]) of the 3d ones."""
    latents, errors = [], []
    for start in range(0, len(pack.rows), 128):
        images = compose(pack.rgba[start : start + 128], torch.ones(1, 3, device=pack.rgba.device))
        mean = vae.encode(images).latent_dist.mean
        error = ((vae.decode(mean).sample.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
        latents.append(mean.cpu())
        errors.append(error.cpu())
    of_3d = torch.tensor([row["style"] == "3d" for row in pack.rows])
    psnr = -10 * torch.log10(torch.cat(errors)[of_3d])
    latent = torch.cat(latents)
    return {
        "shift_factor": latent.mean().item(),
        "scaling_factor": 1 / latent.std().item(),
        "psnr_3d": psnr.mean().item(),
        "psnr_3d_lowest": psnr.min().item(),
    }


def read_factors(work: Path) -> dict:
    """The shift and the scale between the autoencoder's latents and those of the flow: (latent - shift) * scale."""
    return json.loads((work / "vae.json").read_text())


@torch.no_grad()
def encoded(me: Worker, vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The posterior means, float32 [B, 16, 16, 16], neither shifted nor scaled."""
    with mixed_precision(me):
        return vae.encoder(images).float().chunk(2, 1)[0]


def finished_vae(work: Path, shape: Shape) -> AutoencoderKL:
    """The trained autoencoder; with the polished decoder, once polish.py has run."""
    vae = load_average(work / "vae.pt", build_vae(shape))
    if (work / "polish.pt").exists():
        load_average(work / "polish.pt", vae.decoder)
    return vae


def train(me: Worker, args, recipe: Recipe) -> None:
    shape = TINY if args.tiny else SHIPPED
    pack = training_pack(args.data, args.holdout, args.limit)
    sampler = ImageSampler(pack, me.device)
    vae = build_vae(shape)
    phase = Phase.start(me, args.work / "vae.pt", vae, args, recipe.lr, decay=0.998, begin=earlier(args, "vae"))
    errors_of = Loss(vae, recipe)

    def loss_of():
        loss, error = in_half(me, errors_of, sampler.draw(recipe.batch, recipe.plain), phase.over)
        return loss, {"error": error}

    phase.run(loss_of, args.stop_after)
    if me.leads:
        some = pack.select(lambda row: int(row["id"].split("-")[0], 16) % 4 == 0)
        some = Pack(some.rows, some.rgba.to(me.device))
        report = measure(load_average(args.work / "vae.pt", build_vae(shape)).to(me.device), some)
        (args.work / "vae.json").write_text(json.dumps(report, indent=1))
        print(json.dumps(report), flush=True)
    me.barrier()


if __name__ == "__main__":
    parser = options(__doc__, seconds=240)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="images a worker and step")
    arguments = parser.parse_args()
    with worker() as me:
        train(me, arguments, Recipe(batch=arguments.batch))
