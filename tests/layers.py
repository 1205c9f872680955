"""One small layer's tensors, and the grid of norms."""

from __future__ import annotations

from itertools import product

import torch

from secura_kernels import important_channels, init_a, projection, select
from secura_kernels.gain import COMBINES, FORMS, Restrain

NORM_GRID = [
    ("none", None, None),
    *product(("weight", "channel", "activation"), FORMS, COMBINES),
]


class Layer:
    """Random tensors of one adapted layer, fp64, with a base that was folded before."""

    def __init__(self, n=13, k=11, m=4, inner=6, t=7, *, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight, self.bias, self.x = draw(n, k), draw(n), draw(t, k)
        self.rows, self.cols = select(self.weight, m)
        columns = self.weight[:, self.cols]
        a = init_a(self.weight, m, inner).double()
        self.p = projection(columns, a @ draw(inner, m) * 0.1)
        self.p_base = projection(columns, draw(m, m) * 0.1)
        self.delta_bias = draw(n)
        self.grad = draw(t, n)
        self.z_scale = (torch.rand(t, m, generator=generator) > 0.3).double() / 0.7
        self.restrain = Restrain(important_channels(self.weight, m), 0.3, 1.9, 0.5)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(self, name, value.to(dtype))
