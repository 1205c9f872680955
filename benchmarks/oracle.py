"""How far a layer is from what it should compute in fp64. No figure stands without it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .registry import WrongError, delta_weight, expected, named

# ‖got − expected‖ / ‖expected‖, largest allowed: output and dx, then the adapters' gradients
TOLERANCES = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (1e-2, 5e-2),
    torch.float16: (1e-2, 5e-2),
}
CHANGE = 0.1
"""‖ΔW‖ / ‖W‖ of the adapters under test: enough that a lost Δ breaks every tolerance."""


@torch.no_grad()
def randomise(module: nn.Module, weight: Tensor, change: float = CHANGE) -> None:
    """Give a fresh adapter, which changes nothing, a ΔW of ``change · ‖W‖``."""
    parameters = trainable(module)
    if not parameters:
        return
    second = named(parameters, "lora_B" if any("lora_B" in name for name in parameters) else "B")
    second.normal_()
    wide = {name: parameter.double() for name, parameter in parameters.items()}
    size = delta_weight(module, weight.double(), wide).norm()
    second.mul_((change * weight.double().norm() / size).to(second.dtype))
    for name, parameter in parameters.items():
        if "magnitude" in name:
            parameter.mul_(1 + change * torch.randn_like(parameter))


def output(module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """``[T, N]`` in fp64: what a layer of these parameters, in any dtype, should give."""
    wide = {name: parameter.detach().double() for name, parameter in trainable(module).items()}
    bias = None if bias is None else bias.double()
    return expected(module, weight.double(), bias, wide, x.double())


def errors(
    module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor
) -> dict[str, float]:
    """Relative errors of a layer's output, dx and parameter gradients, dropout off.

    Args:
        module: the layer, on ``weight [N, K]``.
        weight: frozen, in the compute dtype, as are bias, x and grad.
        bias: ``[N]`` or None.
        x: ``[T, K]``.
        grad: ``∂loss/∂out [T, N]``.

    Returns:
        ``{"out", "dx", "parameters"}``, the last the worst of them (0 where there are none).
    """
    parameters = trainable(module)
    drops = [part for part in module.modules() if isinstance(part, nn.Dropout) and part.training]
    for part in drops:
        part.eval()
    leaf = x.detach().clone().requires_grad_()
    out = module(leaf)
    got = torch.autograd.grad(out, [leaf, *parameters.values()], grad)
    for part in drops:
        part.train()
    out = out.detach()
    wide = {
        name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()
    }
    leaf64 = x.detach().double().requires_grad_()
    bias64 = None if bias is None else bias.detach().double()
    right = expected(module, weight.detach().double(), bias64, wide, leaf64)
    right_grads = torch.autograd.grad(right, [leaf64, *wide.values()], grad.double())
    pairs = zip(got[1:], right_grads[1:], strict=True)
    return {
        "out": relative_error(out, right.detach()),
        "dx": relative_error(got[0], right_grads[0]),
        "parameters": max((relative_error(*pair) for pair in pairs), default=0.0),
    }


def check(found: Mapping[str, float], dtype: torch.dtype) -> None:
    """Hold :func:`errors` of a layer of ``dtype`` against ``TOLERANCES``.

    Raises:
        WrongError: where one is out of tolerance.
    """
    most, most_parameters = TOLERANCES[dtype]
    allowed = {"out": most, "dx": most, "parameters": most_parameters}
    bad = [
        f"{name} {found[name]:.1e} > {limit:.0e}"
        for name, limit in allowed.items()
        if not found[name] <= limit
    ]
    if bad:
        raise WrongError(f"against fp64: {', '.join(bad)}")


def relative_error(got: Tensor, right: Tensor) -> float:
    """``‖got − right‖ / ‖right‖``; infinite for NaN, so that it compares."""
    value = ((got.double() - right).norm() / right.norm()).item()
    return value if math.isfinite(value) else math.inf


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}
