"""What SECURA is compared with and nobody ships: strong LoRA, strong DoRA, the released way.

LoRA and DoRA are written as a careful implementer would, so that SECURA is not compared with slow
rivals alone. All three keep their adapters in the compute dtype and take a frozen ``nn.Linear``.

| module      | out                                     | saved for backward (no weights) |
|-------------|-----------------------------------------|---------------------------------|
| StrongLoRA  | x Wᵀ + b + s (x Aᵀ) Bᵀ                  | x, x Aᵀ                         |
| StrongDoRA  | x W'ᵀ + b, W' = d (W + s B A) / ‖·‖     | x, out                          |
| ReleasedWay | (2 y0 + Δ) / M, Δ = x (C A B R)ᵀ        | x, y0, Δ, M, …                  |

Sources: LoRA 2106.09685, DoRA 2402.09353 (its norm detached, section 4.3), SECURA 2502.18168.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secura_kernels import important_channels, init_a, select


class _LoRAFunction(torch.autograd.Function):
    """Both products end in an ``addmm`` onto the big one's output; x Aᵀ [T, r] is kept."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scaling) -> Tensor:
        z = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, z)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(z, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, a, b, z = ctx.saved_tensors
        h = g @ b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).addmm_(h, a, alpha=ctx.scaling)
        da = (h.t() @ x).mul_(ctx.scaling)
        db = (g.t() @ z).mul_(ctx.scaling)
        return dx, None, None, da, db, None


class _DoRAFunction(torch.autograd.Function):
    """B A is formed into W' and never alone; row scales go onto small tensors, never onto g."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, magnitude, scaling) -> Tensor:
        fused, gain = _DoRAFunction.fuse(weight, a, b, magnitude, None, scaling)
        out = F.linear(x, fused)
        ctx.save_for_backward(x, weight, a, b, magnitude, gain, out)
        ctx.scaling = scaling
        return out if bias is None else out + bias

    @staticmethod
    def fuse(weight, a, b, magnitude, gain, scaling) -> tuple[Tensor, Tensor]:
        """``(W' [N, K], d / ‖W + s B A‖ [N])``; the norm is taken once a step."""
        direction = torch.addmm(weight, b, a, alpha=scaling)
        if gain is None:
            norm = torch.linalg.vector_norm(direction, dim=1, dtype=torch.float32)
            gain = (magnitude / norm).to(weight.dtype)
        return direction.mul_(gain[:, None]), gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, a, b, magnitude, gain, out = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ _DoRAFunction.fuse(weight, a, b, magnitude, gain, ctx.scaling)[0]
        scaled = gain[:, None] * ctx.scaling
        da = (g @ (b * scaled)).t() @ x
        db = (g.t() @ (x @ a.t())).mul_(scaled)
        dmagnitude = torch.sum(g * out, 0, dtype=torch.float32) / magnitude
        return dx, None, None, da, db, dmagnitude.to(magnitude.dtype), None


class StrongLoRA(nn.Module):
    """LoRA by hand, with s = 1.

    Args:
        base: the frozen layer; its weight is shared, not copied.
        r: rank.
    """

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        n, k = base.weight.shape
        self.base, self.scaling = base, 1.0
        options: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.randn(r, k, **options) / k**0.5)
        self.lora_B = nn.Parameter(torch.zeros(n, r, **options))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., N]`` for ``x [..., K]``."""
        flat = x.reshape(-1, x.shape[-1])
        out = _LoRAFunction.apply(
            flat, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scaling
        )
        return out.view(*x.shape[:-1], -1)


class StrongDoRA(StrongLoRA):
    """DoRA by hand; ``magnitude [N]`` is d, which must stay away from 0."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__(base, r)
        norm = torch.linalg.vector_norm(base.weight, dim=1, dtype=torch.float32)
        self.magnitude = nn.Parameter(norm.to(base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., N]`` for ``x [..., K]``."""
        flat = x.reshape(-1, x.shape[-1])
        out = _DoRAFunction.apply(
            flat,
            self.base.weight,
            self.base.bias,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            self.scaling,
        )
        return out.view(*x.shape[:-1], -1)


class ReleasedWay(nn.Module):
    """SECURA as the released code goes about it, written from its description.

    ΔW is formed whole, x meets a second full product, and the norm runs elementwise on the outputs
    in eager torch, deciding on the host. C and R are copies.

    Args:
        base: the frozen layer.
        m: CUR rank; the inner rank is 2 m.
    """

    rows: Tensor
    cols: Tensor
    c: Tensor
    r: Tensor
    important: Tensor

    def __init__(self, base: nn.Linear, m: int) -> None:
        super().__init__()
        weight = base.weight.detach()
        self.base, self.scaling = base, 1.0
        rows, cols = select(weight, m)
        self.register_buffer("rows", rows)
        self.register_buffer("cols", cols)
        self.register_buffer("c", weight[:, cols])
        self.register_buffer("r", weight[rows])
        self.register_buffer("important", important_channels(weight, m))
        self.A = nn.Parameter(init_a(weight, m, 2 * m).to(weight.dtype))
        self.B = nn.Parameter(torch.zeros(2 * m, m, dtype=weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., N]`` for ``x [..., K]``."""
        base = self.base(x)
        delta = F.linear(x, self.c @ self.A @ self.B @ self.r)
        with torch.no_grad():
            gain = self._gain(base, delta)
            crowded = (gain <= 1.2).float().mean().item() > 0.9
        out = (base + (base + delta)) / gain
        return torch.where(self.important, out * 0.99, out) if crowded else out

    def _gain(self, base: Tensor, delta: Tensor) -> Tensor:
        rho = delta.abs() / (base.abs() + 1e-10)
        if bool((rho == 0).all()):
            return torch.full_like(rho, 2)
        rho / rho.max().item() - 0.5  # formed by the released code, then overwritten
        return 2 - torch.sigmoid(6.0 * rho)
