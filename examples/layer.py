"""Fine-tune one linear layer with SECURA in a plain loop, fold it, merge it: torch alone.

Run it: python examples/layer.py --norm channel --steps 100
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from secura import AdapterConfig, SECURALinear


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train the layer towards a changed one.

    Returns:
        The mean squared errors before and after.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--norm", default="channel", choices=("none", "channel", "weight"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    base = nn.Linear(96, 64)
    layer = SECURALinear(base, AdapterConfig(r=16, norm=args.norm))
    # A target within reach: W with its least important rows and columns recombined.
    change = 0.1 * base.weight[:, layer.cols] @ torch.randn(16, 16) @ base.weight[layer.rows]
    x = torch.randn(512, 96)
    target = nn.functional.linear(x, base.weight + change, base.bias).detach()

    trained = [p for p in layer.parameters() if p.requires_grad]  # A and B; W is frozen
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    first = nn.functional.mse_loss(layer(x), target).item()
    for _ in range(args.steps):
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    last = nn.functional.mse_loss(layer(x), target).item()

    layer.fold()  # what was learned moves into the frozen core: the outputs stay
    adapted = layer(x).detach()
    layer.merge()  # W' is written into the base weight; unmerge() restores W bit for bit
    torch.testing.assert_close(layer.base(x), adapted, rtol=1e-4, atol=1e-4)
    print(f"{args.norm}: error {first:.5f} before, {last:.5f} after {args.steps} steps; merged")
    return first, last


if __name__ == "__main__":
    main()
