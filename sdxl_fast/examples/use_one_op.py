"""Use single operations in a model of one's own: a gated feed-forward with its norm and residual.

python -m sdxl_fast.examples.use_one_op
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdxl_fast import ops


class FeedForward(nn.Module):
    """LayerNorm of a sum, projection, value * GELU(gate), projection: three operations of this package.

    They are differentiable, work under autocast and in `torch.compile(fullgraph=True)`, and run on a CPU too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x and residual [..., width] to [..., width]."""
        normed, total = ops.layer_norm(x, self.norm.weight, self.norm.bias, eps=self.norm.eps, residual=residual)
        y: Tensor = total + self.down(ops.geglu(self.up(normed)))
        return y


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Fits the module to a fixed function of its input and returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    model = FeedForward(32).to(given.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, residual = (torch.randn(64, 32, device=given.device) for _ in range(2))
    losses = []
    for _ in range(given.steps):
        loss = (model(x, residual) - torch.sin(3 * x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {given.steps} steps")
    return losses


if __name__ == "__main__":
    main()
