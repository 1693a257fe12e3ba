"""Trains the rectified flow: transformer and text encoders together, on the cached latents.

    torchrun --nproc-per-node 2 examples/train_emoji/flow.py --seconds 600

x = (1 - sigma) x0 + sigma noise, and the network learns v = noise - x0. A caption in its canonical form names one
image, so at high sigma it is taught that image unmoved; moved ones are taught below sigma 0.8, where x itself
shows where they are.

An SD3 pipeline without T5 appends `max_sequence_length` zero tokens to the text. They are all alike, so one zero
token whose attention logits carry log(count) stands for all of them, exactly; the training draws that count, mostly
0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from latents import CAPTIONS, KNOWN, Table, read_table
from networks import SHIPPED, TINY, Flow, load_tokenizer, token_ids
from training import Phase, Worker, cumulated, earlier, mixed_precision, options, pick, worker

ZERO_TOKENS = {0: 0.85, 256: 0.12, 77: 0.03}  # how many are appended, and how often
MOVED_BELOW = 0.8  # sigma


@dataclass(frozen=True)
class Recipe:
    batch: int = 384  # a worker
    lr: float = 1.5e-3
    unprompted: float = 0.06  # share of empty captions
    at_one: float = 0.25  # share of sigma = 1, where an image is decided
    on_grid: float = 0.25  # share of the sigmas of the 2, 4 and 8 step schedules


class JointAttention:
    """SD3's attention with a bias [B, 1, 1, L] on the logits of each key (image tokens first, then text)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, bias=None):
        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        q = torch.cat(
            [
                heads(attn.to_q(hidden_states), attn.norm_q),
                heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q),
            ],
            2,
        )
        k = torch.cat(
            [
                heads(attn.to_k(hidden_states), attn.norm_k),
                heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k),
            ],
            2,
        )
        v = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], 2)
        mask = None if bias is None else bias.to(q.dtype).expand(-1, 1, q.shape[2], -1)
        mixed = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)
        image, text = mixed.transpose(1, 2).flatten(2).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[0](image), text


def zero_token_bias(counts: torch.Tensor, others: int) -> torch.Tensor:
    """Bias [B, 1, 1, others + 1] that makes the last, zero token stand for `counts` [B] of them."""
    bias = torch.zeros(len(counts), 1, 1, others + 1, device=counts.device)
    bias[:, 0, 0, -1] = torch.where(counts > 0, counts.clamp(min=1).float().log(), -1e4)
    return bias


def velocity(transformer, x, sigma, embeds, pooled, bias) -> torch.Tensor:
    """v [B, 16, 16, 16] at x and sigma [B]; `embeds` without the zero token, which is added here."""
    return transformer(
        hidden_states=x,
        timestep=sigma * 1000,
        encoder_hidden_states=F.pad(embeds, (0, 0, 0, 1)),
        pooled_projections=pooled,
        joint_attention_kwargs={"bias": bias},
        return_dict=False,
    )[0]


def velocity_loss(transformer, x, target, sigma, embeds, pooled, bias) -> torch.Tensor:
    """Mean square error of the velocity of each row, [B]."""
    return (velocity(transformer, x, sigma, embeds, pooled, bias).float() - target).square().mean((1, 2, 3))


def schedule(steps: int) -> torch.Tensor:
    """The sigmas [steps + 1] of the shipped scheduler (no shift): linear from 1 to 1/1000, then 0."""
    return torch.cat([torch.linspace(1, 1e-3, steps), torch.zeros(1)])


GRID = torch.cat([schedule(steps)[1:-1] for steps in (4, 4, 8)] + [schedule(2)[1:-1]])


class Draws:
    """What a step draws, on the device and without the host, so that a CUDA graph can hold it.

    `nothing` are the token ids [T] of the empty caption.
    """

    def __init__(self, table: Table, nothing: torch.Tensor):
        device = nothing.device
        self.table, self.nothing = table, nothing
        self.shares = cumulated(table.weight)
        self.grid = GRID.to(device)
        self.zero_counts = torch.tensor(list(ZERO_TOKENS), device=device)
        self.zero_shares = cumulated(torch.tensor(list(ZERO_TOKENS.values()), device=device))

    def rows(self, count: int, unprompted: float, captions: tuple[int, int] = (0, CAPTIONS)):
        """-> latents [B, 16, 16, 16], token ids [B, T], moved [B], and which of `captions` was taken [B] (-1: none)."""
        device = self.nothing.device
        index = pick(self.shares, count)
        which = torch.randint(*captions, (count,), device=device)
        which = torch.where(torch.rand(count, device=device) < unprompted, -1, which)
        ids = torch.where(which[:, None] < 0, self.nothing, self.table.ids[index, which.clamp(min=0)].long())
        return self.table.latent[index].float(), ids, self.table.moved[index], which

    def sigma(self, recipe: Recipe, moved: torch.Tensor) -> torch.Tensor:
        """Sigma [B]: exactly 1, or of a short schedule, or anything; only the last, below 0.8, where `moved` [B]."""
        count, device = len(moved), moved.device
        anything = torch.rand(count, device=device)
        on_grid = self.grid[torch.randint(len(self.grid), (count,), device=device)]
        choice = torch.rand(count, device=device)
        sigma = torch.where(choice < recipe.at_one + recipe.on_grid, on_grid, anything)
        sigma = torch.where(choice < recipe.at_one, 1.0, sigma)
        return torch.where(moved, anything * MOVED_BELOW, sigma).clamp(min=1e-3)

    def bias(self, count: int) -> torch.Tensor:
        """`zero_token_bias` of as many rows, their numbers of zero tokens drawn by ZERO_TOKENS."""
        return zero_token_bias(self.zero_counts[pick(self.zero_shares, count)], 64 + len(self.nothing))


def is_matrix(name: str) -> bool:
    """Matrices that Muon trains: those of the blocks, not the embeddings and the ends of the network."""
    return ("transformer_blocks" in name or "encoder.layers" in name) and name.endswith("weight")


def make_flow(me: Worker, args, compiled: bool = True) -> tuple[Flow, torch.Tensor]:
    """The network ready to train, and the token ids [T] of the empty caption."""
    tokenizer = load_tokenizer(args.work / "tokenizer")
    flow = Flow(TINY if args.tiny else SHIPPED, tokenizer)
    flow.transformer.set_attn_processor(JointAttention())
    if compiled and not args.no_compile:
        flow.text.compile(dynamic=False)
        for block in flow.transformer.transformer_blocks:
            block.compile(dynamic=False)
    return flow.to(me.device), token_ids(tokenizer, [""])[0].to(me.device)


def train(me: Worker, args, recipe: Recipe) -> None:
    flow, nothing = make_flow(me, args)
    draws = Draws(read_table(args.work, me.device), nothing)
    begin = earlier(args, "reflow", "flow")
    phase = Phase.start(me, args.work / "flow.pt", flow, args, recipe.lr, is_matrix, begin=begin)

    def loss_of():
        x0, ids, moved, which = draws.rows(recipe.batch, recipe.unprompted)
        noise = torch.randn_like(x0)
        sigma = draws.sigma(recipe, moved)
        x = torch.lerp(x0, noise, sigma[:, None, None, None])
        bias = draws.bias(recipe.batch)
        with mixed_precision(me):
            embeds, pooled = flow.text(ids)
            losses = velocity_loss(flow.transformer, x, noise - x0, sigma, embeds, pooled, bias)
        certain = (sigma == 1) & (which >= 0) & (which < KNOWN)
        return losses.mean(), {"named at one": (losses * certain).sum() / certain.sum()}

    phase.run(loss_of, args.stop_after)


if __name__ == "__main__":
    parser = options(__doc__, seconds=600)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="latents a worker and step")
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    arguments = parser.parse_args()
    with worker() as me:
        train(me, arguments, Recipe(batch=arguments.batch, lr=arguments.lr))
