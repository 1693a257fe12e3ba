"""Trains the KL decoder a little longer, the encoder as it is, so that what the flow draws comes out crisper.

Half of the loss is on encoded images, half on latents that the straightened flow draws in four steps for captions that
name one image: both shall decode to the true image. Latents stay what they were.

    torchrun --nproc-per-node 2 examples/train_emoji/polish.py --seconds 60
"""

from dataclasses import dataclass

import torch
from captions import BACKGROUNDS, canonical
from flow import make_flow, schedule, velocity, zero_token_bias
from networks import SHIPPED, TINY, build_vae, load_tokenizer, token_ids
from pack import compose, training_pack
from reflow import euler
from training import Phase, Worker, half_type, in_half, load_average, mixed_precision, options, pick, worker
from vae import ImageSampler, encoded, image_error, read_factors


@dataclass(frozen=True)
class Recipe:
    batch: int = 48  # a worker, of each half
    lr: float = 5e-4
    plain: float = 0.6  # share of the encoded images on white, as they are
    white: float = 0.6  # share of the drawn ones on white
    noise: float = 0.05  # deviation of the noise on encoded latents
    steps: int = 4


def caption_ids(pack, tokenizer, device) -> torch.Tensor:
    """Token ids int16 [N, backgrounds, T] of each image's canonical caption on each background."""
    texts = [canonical(row, "", background) for row in pack.rows for background in BACKGROUNDS]
    return token_ids(tokenizer, texts).view(len(pack.rows), len(BACKGROUNDS), -1).to(device, torch.int16)


def train(me: Worker, args, recipe: Recipe) -> None:
    shape = TINY if args.tiny else SHIPPED
    pack = training_pack(args.data, args.holdout, args.limit)
    sampler = ImageSampler(pack, me.device)
    ids = caption_ids(pack, load_tokenizer(args.work / "tokenizer"), me.device)
    vae = load_average(args.work / "vae.pt", build_vae(shape)).to(me.device)
    factors = read_factors(args.work)
    flow, nothing = make_flow(me, args, compiled=False)
    load_average(args.work / "reflow.pt", flow).eval()
    bias = zero_token_bias(torch.zeros(recipe.batch, device=me.device), 64 + len(nothing))
    sigmas = schedule(recipe.steps).tolist()
    phase = Phase.start(me, args.work / "polish.pt", vae.decoder, args, recipe.lr, decay=0.998)

    @torch.no_grad()
    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        """Images, and their latents as the decoder takes them."""
        images = sampler.draw(recipe.batch, recipe.plain)
        latent = encoded(me, vae, images)
        return images, latent + recipe.noise * torch.randn_like(latent)

    @torch.no_grad()
    def generate() -> tuple[torch.Tensor, torch.Tensor]:
        """Images, and the latents that the flow draws for their captions."""
        index = pick(sampler.shares, recipe.batch)
        back = torch.randint(len(BACKGROUNDS), (recipe.batch,), device=me.device)
        back = torch.where(torch.rand(recipe.batch, device=me.device) < recipe.white, 0, back)
        images = compose(sampler.rgba[index], sampler.backgrounds[back])
        noise = torch.randn(recipe.batch, 16, 16, 16, device=me.device)
        with mixed_precision(me):
            text = flow.text(ids[index, back].long())
            latent = euler(lambda x, sigma: velocity(flow.transformer, x, sigma, *text, bias), noise, sigmas)
        return images, latent / factors["scaling_factor"] + factors["shift_factor"]

    def loss_of():
        (true, latent), (asked, drawn) = encode(), generate()
        decoded = in_half(me, vae.decoder, torch.cat([latent, drawn]).to(half_type(me)))
        of_encoded, of_drawn = image_error(decoded[: len(true)], true), image_error(decoded[len(true) :], asked)
        return (of_encoded + of_drawn) / 2, {"encoded": of_encoded, "drawn": of_drawn}

    phase.run(loss_of, args.stop_after)


if __name__ == "__main__":
    parser = options(__doc__, seconds=60)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="images a worker and step, of each half")
    arguments = parser.parse_args()
    with worker() as me:
        train(me, arguments, Recipe(batch=arguments.batch))
