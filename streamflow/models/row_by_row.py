"""The reference forward: the network is called frame by frame, with the shapes of the pipeline's own calls. So a stream
equals the pipeline to the bit, whatever rounding differences a batch makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowByRow(nn.Module):
    """Wraps a velocity module. pairs: rows are [negatives..., prompts...], and the pipeline calls its network with
    [negative, prompt] of one frame; otherwise, and where a call has rows of one kind only, a call has one row. shared:
    arguments without a batch dimension."""

    def __init__(self, velocity: nn.Module, pairs: bool = False, shared: tuple[str, ...] = ()):
        super().__init__()
        self.velocity = velocity
        self.pairs = pairs
        self.shared = shared

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        n = len(x)
        pairs = self.pairs and n % 2 == 0 and torch.equal(t[: n // 2], t[n // 2 :])
        frames = n // 2 if pairs else n
        outputs = []
        for i in range(frames):
            rows = [i, frames + i] if pairs else [i]
            batched = {name: value if name in self.shared else value[rows] for name, value in cond.items()}
            outputs.append(self.velocity(x[rows], t[rows], **batched))
        return torch.stack(outputs, dim=1).flatten(0, 1) if pairs else torch.cat(outputs)
