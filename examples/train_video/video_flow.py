"""What the phases of train.py learn from: encoded sequences, and the losses of the VAE and of the flow.

Everything is drawn on the device without the host, so that a CUDA graph can hold a step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from clips import CHUNKS, IMAGES, Clips, frames_of, still
from torch import nn
from training import Worker, mixed_precision
from video_model import FIRST_SIGMA, GRID, HISTORY, LATENTS, STEPS, TOKENS, Codec, VideoFlow, decoded, encoded

PAST = sum(HISTORY)


@dataclass(frozen=True)
class Recipe:
    clips: int = 8  # chunks that a step of the VAE draws
    vae_lr: float = 3e-3
    kl: float = 5e-4  # times the mean over latent elements
    spread: float = 0.05  # least deviation of the latents that the decoder is trained on
    batch: int = 256  # chunks in a step of the flow
    fresh: int = 4  # sequences that a step encodes anew
    stored: int = 2048  # encoded sequences
    flow_lr: float = 1.5e-3
    own_lr: float = 6e-4
    first: float = 0.35  # share of chunk 0 in the sequences that begin at rest
    with_image: float = 0.15  # share of these sequences that go on from an image, as the pipeline's `image` does
    clean: float = 0.25  # share of histories without noise
    noise: float = 0.25  # most noise of a history
    noise_first: float = 0.14  # most noise of the first image; the pipeline puts up to 0.135 on one that is given
    shade: float = 0.06  # deviation of a history's factor and offset in each channel
    at_one: float = 0.25  # share of the first sigma, where most is decided
    on_grid: float = 0.3  # share of the other sigmas of four steps


def image_error(off: torch.Tensor) -> torch.Tensor:
    """L1 of the errors [B, 3, T, H, W], of their differences along time, height and width, and of their means over blocks
    of 4, 8 and 16 pixels. Without these means, shapes are learnt long before colours."""
    means = (F.avg_pool3d(off, (1, side, side)).abs().mean() for side in (4, 8, 16))
    return off.abs().mean() + sum(off.diff(dim=d).abs().mean() for d in (2, 3, 4)) + sum(means)


class VaeLoss(nn.Module):
    """Computes in its parameters' type; errors are summed in float32."""

    def __init__(self, vae: nn.Module, recipe: Recipe):
        super().__init__()
        self.vae, self.recipe = vae, recipe

    def forward(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the error of the reconstruction alone."""
        kind = self.vae.dtype
        mean, log_variance = (one.float() for one in encoded(self.vae, chunks.to(kind)))
        log_variance = log_variance.clamp(-20, 10)
        deviation = (log_variance.exp() + self.recipe.spread**2).sqrt()
        latents = mean + deviation * torch.randn_like(mean)
        error = image_error(decoded(self.vae, latents.to(kind)).float() - chunks)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error + self.recipe.kl * kl, error


@dataclass(frozen=True)
class Rows:
    """Chunks to draw: x0 [B, C, 3, h, w]; past [B, C, 19, h, w], the latents before, 0 before the first one; first
    [B, C, 1, h, w], that of the first image, 0 where there is none yet; ids [B, TOKENS]. after [B]: a chunk comes before.
    second [B]: that chunk has the first image."""

    x0: torch.Tensor
    past: torch.Tensor
    first: torch.Tensor
    ids: torch.Tensor
    after: torch.Tensor
    second: torch.Tensor


class Store:
    """Encoded sequences on the device. Every step draws from it and replaces a few, so no sequence lasts."""

    def __init__(self, source: Clips, codec: Codec, size: int):
        device = source.rgba.device
        self.source, self.codec = source, codec
        channels = codec.mean.shape[1]
        self.latents = torch.zeros(size, CHUNKS * LATENTS + 1, channels, GRID, GRID, dtype=torch.float16, device=device)
        self.ids = torch.zeros(size, 2, TOKENS, dtype=torch.int16, device=device)
        self.switch = torch.zeros(size, dtype=torch.long, device=device)
        self.begins = torch.zeros(size, dtype=torch.bool, device=device)
        self.place = torch.zeros((), dtype=torch.long, device=device)

    @torch.no_grad()
    def refresh(self, count: int) -> None:
        """Replaces the `count` oldest sequences. Frame 0 of one is the last latent of a chunk at rest, as the pipeline makes
        it of an image; its chunks follow."""
        scenes, begins = self.source.scenes(count)
        time = frames_of(CHUNKS * IMAGES, self.place.device).expand(count, -1)
        images = self.source.render(scenes, time)
        resting = self.source.render(still(scenes), time[:, :1]).expand(-1, -1, IMAGES, -1, -1)
        chunks = torch.cat([images.unflatten(2, (CHUNKS, IMAGES)).transpose(1, 2), resting[:, None]], 1)
        latents = self.codec.encode(chunks.flatten(0, 1)).unflatten(0, (count, -1)).transpose(2, 3)
        latents = torch.cat([latents[:, -1, -1:], latents[:, :-1].flatten(1, 2)], 1)
        index = (self.place + torch.arange(count, device=self.place.device)) % len(self.ids)
        self.latents.index_copy_(0, index, latents.to(self.latents.dtype))
        self.ids.index_copy_(0, index, self.source.prompt_ids(scenes).to(self.ids.dtype))
        self.switch.index_copy_(0, index, scenes.switch // IMAGES)
        self.begins.index_copy_(0, index, begins)
        self.place += count

    def fill(self, at_once: int) -> None:
        for _ in range(0, len(self.ids), at_once):
            self.refresh(at_once)

    def draw(self, count: int, recipe: Recipe) -> tuple[Rows, Rows]:
        """Chunks, and the chunks before them; where there is none, what comes for it has no meaning."""
        device = self.place.device
        index = torch.randint(len(self.ids), (count,), device=device)
        begins = self.begins[index]
        chunk = torch.randint(1, CHUNKS, (count,), device=device)
        chunk = torch.where(begins & (torch.rand(count, device=device) < recipe.first), 0, chunk)
        image = begins & (torch.rand(count, device=device) < recipe.with_image)
        return self._rows(index, chunk, image), self._rows(index, (chunk - 1).clamp(min=0), image)

    def _rows(self, index: torch.Tensor, chunk: torch.Tensor, image: torch.Tensor) -> Rows:
        frame = LATENTS * chunk[:, None] + torch.arange(-PAST, LATENTS, device=chunk.device)  # -1 is the image's
        known = (frame >= 0) | ((frame == -1) & image[:, None])
        found = self.latents[index[:, None], frame.clamp(min=-1) + 1].float() * known[..., None, None, None]
        past, x0 = found.transpose(1, 2).split([PAST, LATENTS], 2)
        first = self.latents[index, 1].float()[:, :, None] * column((chunk > 0) | image)
        scene = (chunk >= self.switch[index]).long()
        return Rows(x0, past, first, self.ids[index, scene].long(), chunk > 0, (chunk == 1) & ~image)


def column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None, None]


def some_sigma(count: int, recipe: Recipe, device) -> torch.Tensor:
    """Sigma [B]: the first one, or of the steps that are used, or anything in between, mostly in the middle."""
    sigma = torch.sigmoid(torch.randn(count, device=device) + 0.3).clamp(1e-3, FIRST_SIGMA)
    on_grid = FIRST_SIGMA * torch.randint(1, STEPS, (count,), device=device) / STEPS
    choice = torch.rand(count, device=device)
    sigma = torch.where(choice < recipe.at_one + recipe.on_grid, on_grid, sigma)
    return torch.where(choice < recipe.at_one, FIRST_SIGMA, sigma)


def disturbed(rows: Rows, recipe: Recipe) -> torch.Tensor:
    """The history [B, C, 20, h, w] of some chunks, with noise and shade on it where it is not 0."""
    past, first, device = rows.past, rows.first, rows.x0.device
    count, channels, frames = past.shape[:3]

    def rand(*shape):
        return torch.rand(shape, device=device)

    dirty = rand(count, 1, 1, 1, 1) > recipe.clean
    noise = recipe.noise * dirty * rand(count, 1, 1, 1, 1) * (0.5 + 0.5 * rand(count, 1, frames, 1, 1))
    shade = recipe.shade * dirty * torch.randn(2, count, channels, 1, 1, 1, device=device)
    there = (past != 0).any(1, keepdim=True).any(-1, keepdim=True).any(-2, keepdim=True)
    past = there * (torch.lerp(past, torch.randn_like(past), noise) * (1 + shade[0]) + shade[1])
    noise = recipe.noise_first * (rand(count, 1, 1, 1, 1) > 0.5) * rand(count, 1, 1, 1, 1)
    there = (first != 0).flatten(1).any(1)
    first = column(there) * torch.lerp(first, torch.randn_like(first), noise)
    return torch.cat([first, past], 2)


@dataclass(frozen=True)
class Losses:
    """The losses of a step of the flow. Each draws its chunks, and returns the loss and what to show."""

    me: Worker
    network: VideoFlow
    store: Store
    recipe: Recipe

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, history: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with mixed_precision(self.me):
            return self.network(x, sigma, history, ids).float()

    @torch.no_grad()
    def drawn(self, noise: torch.Tensor, history: torch.Tensor, ids: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
        """Where `most` [B] of the four steps lead from noise."""
        x = noise
        for step in range(STEPS):
            sigma = torch.full((len(x),), FIRST_SIGMA * (1 - step / STEPS), device=x.device)
            x = torch.where(column(most > step), x - self.velocity(x, sigma, history, ids) * FIRST_SIGMA / STEPS, x)
        return x

    def flow(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        recipe = self.recipe
        self.store.refresh(recipe.fresh)
        rows, _ = self.store.draw(recipe.batch, recipe)
        noise, sigma = torch.randn_like(rows.x0), some_sigma(recipe.batch, recipe, rows.x0.device)
        v = self.velocity(torch.lerp(rows.x0, noise, column(sigma)), sigma, disturbed(rows, recipe), rows.ids)
        losses = (v - (noise - rows.x0)).square().mean((1, 2, 3, 4))
        start = (sigma == FIRST_SIGMA) & ~rows.after
        return losses.mean(), {"first": (losses * start).sum() / start.sum().clamp(min=1)}

    def own(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The first half of the rows follows a chunk that the flow has drawn; the two quarters in the middle start from
        where its own steps get to."""
        recipe = self.recipe
        half, quarter = recipe.batch // 2, recipe.batch // 4
        middle = slice(quarter, quarter + half)
        self.store.refresh(recipe.fresh)
        rows, before = self.store.draw(recipe.batch, recipe)
        given, history_before = disturbed(rows, recipe), disturbed(before, recipe)[:half]
        history = given[:half]
        noise, device = torch.randn_like(rows.x0), rows.x0.device
        last = self.drawn(torch.randn_like(noise[:half]), history_before, before.ids[:half], rows.after[:half] * STEPS)
        last = torch.where(column(rows.after[:half]), last, history[:, :, -LATENTS:])
        first = torch.where(column(rows.second[:half]), last[:, :, :1], history[:, :, :1])
        history = torch.cat([torch.cat([first, history[:, :, 1:-LATENTS], last], 2), given[half:]])
        steps = torch.randint(1, STEPS, (half,), device=device)
        reached = self.drawn(noise[middle], history[middle], rows.ids[middle], steps)
        sigma = some_sigma(recipe.batch, recipe, device)
        x = torch.lerp(rows.x0, noise, column(sigma))
        sigma = torch.cat([sigma[:quarter], FIRST_SIGMA * (1 - steps / STEPS), sigma[quarter + half :]])
        x = torch.cat([x[:quarter], reached, x[quarter + half :]])
        v = self.velocity(x, sigma, history, rows.ids)
        off = (v - (x - rows.x0) / column(sigma)).square().mean((1, 2, 3, 4))
        weight = torch.cat(
            [torch.ones_like(sigma[:quarter]), sigma[middle].square(), torch.ones_like(sigma[quarter + half :])]
        )
        shown = {"own": off[:quarter], "rolled": (weight * off)[middle], "plain": off[quarter + half :]}
        return (weight * off).mean(), {name: values.mean() for name, values in shown.items()}
