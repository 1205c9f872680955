"""The learning rate at which a step of Adam moves adapted weights by a share of their size.

Adam moves every entry of what it trains by up to the rate η, so a step on B moves the weight by
``η s ‖C A‖ ‖R‖`` (Frobenius), which is also its largest singular value if all signs agree, one on A
by ``η s ‖C‖ ‖B R‖``, one on U by ``η s ‖C‖ ‖R‖`` and on an anchored one by ``η s ‖C κL‖ ‖S R‖``. A
and B grow, by up to η a step, so that after n steps at the peak both together move it by
``2 n η² √r s ‖C‖ ‖R‖`` more. A layer's size is the largest singular value that W would have if its
entries were random, ``σ (√N + √K)`` with σ their root mean square: the share of it is what a step
does to the layer's output (Yang, Simon, Bernstein, arXiv 2310.17813).

C and R are pieces of W, so at one rate the share goes with σ and m, and between models of like size
it differs by ten times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secura_kernels.dispatch import without_autocast

from . import bases
from .layers import active_adapters
from .sharding import from_rank_0, gathered, number_of_rank_0

SHARE = 0.134
"""What a step at the peak moves: that of the anchored core that was measured most (5e-4 at r = 128
on the MLP of SmolLM2-135M)."""


@torch.no_grad()
def learning_rate(model: nn.Module, steps: int) -> float:
    """Compute a peak learning rate for Adam from the weights that the model's adapters act on.

    At it a step moves a weight by 13% of its size, in the layers' geometric mean. It is where to
    begin: found on two small models (docs/results.md, "Rates"), and M of a norm, which may halve a
    change, is not counted.

    Example:
        >>> model = get_peft_model(base, SecuraConfig(r=64, norm="channel"))
        >>> TrainingArguments("out", learning_rate=secura.learning_rate(model, steps=1000))

    Args:
        model: a PEFT model or any other with active SECURA adapters; where it is sharded, every
            process calls this. Anchored or not, a core U has the same rate.
        steps: of the optimizer in all, under a schedule that falls to 0 (linear, cosine). A and B
            grow on the way, so that of more steps the rate is lower; that of U is not.

    Returns:
        The rate, to two digits.

    Raises:
        TypeError: for ``steps`` that is no integer.
        ValueError: for fewer steps than 1, a model with no active adapter that is trained, and
            weights that are 0, not at hand, or split by tensor parallelism.
        RuntimeError: for an adapter that is merged.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps={steps!r} must be an integer")
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more")
    found = from_rank_0(
        lambda: {"mean": _mean_log(model, steps)}, {"mean": torch.zeros((), dtype=torch.float64)}
    )
    mean = number_of_rank_0(float(found["mean"]))  # else a last bit might round otherwise there
    return float(f"{math.exp(mean):.1e}")


def _mean_log(model: nn.Module, steps: int) -> Tensor:
    """The mean logarithm of the layers' rates, 0-dim fp64."""
    logs = [
        math.log(rate)
        for adapter, layer in active_adapters(model).values()
        for rate in _rates(adapter, layer, steps / 2)
    ]
    if not logs:
        raise ValueError(
            "no active adapter of the model is trained, or what it acts on is 0: put one on with "
            "get_peft_model, or load it with is_trainable=True"
        )
    return torch.tensor(logs, dtype=torch.float64).mean()


def trains_others(model: nn.Module) -> bool:
    """Return whether more is trained than adapters: whole weights, which take lower rates."""
    own = {
        id(part) for adapter, _ in active_adapters(model).values() for part in adapter.parameters()
    }
    return any(part.requires_grad and id(part) not in own for part in model.parameters())


def _rates(adapter: Any, layer: Any, count: float) -> Iterator[float]:
    """The rate of a layer, or of each expert of a stack, after ``count`` steps at the peak.

    None of a layer that no step moves.
    """
    if layer.merged:
        raise RuntimeError(f"{adapter.name} is merged into the base weight: unmerge it first")
    bases.check_whole(layer.adapted)
    weight = bases.weight(layer.adapted)
    stack = weight if weight.dim() == 3 else weight[None]
    e, n, k = stack.shape
    rows, cols = (index.view(e, -1) for index in (adapter.rows % n, adapter.cols % k))
    with without_autocast(weight.device.type):
        c = stack.gather(2, cols[:, None, :].expand(-1, n, -1)).float()
        r = stack.gather(1, rows[:, :, None].expand(-1, -1, k)).float()
        a, b, u, left, right = (
            _stacked(getattr(adapter, name), e) for name in ("A", "B", "U", "left", "right")
        )
        if u is not None:
            if left is not None and right is not None:
                c, r = c @ left, right @ r
            first, grown = _norm(c) * _norm(r) * adapter.U.requires_grad, torch.zeros(e)
        else:
            assert a is not None and b is not None
            first = _norm(c @ a) * _norm(r) * adapter.B.requires_grad
            first = first + _norm(c) * _norm(b @ r) * adapter.A.requires_grad
            both = adapter.A.requires_grad and adapter.B.requires_grad
            grown = 2 * count * math.sqrt(len(b[0])) * both * _norm(c) * _norm(r)
    size = _norm(stack) * (n**-0.5 + k**-0.5)
    for moved, more, whole in zip(first.tolist(), grown.tolist(), size.tolist(), strict=True):
        linear, square = (abs(adapter.scaling) * part for part in (moved, more))
        if linear > 0 or square > 0:
            share = SHARE * whole
            yield 2 * share / (linear + math.sqrt(linear**2 + 4 * square * share))


def _stacked(part: Tensor | None, count: int) -> Tensor | None:
    """A tensor of an adapter, fp32 ``[count, ...]``, whole."""
    if part is None:
        return None
    whole = gathered(part).detach().float()
    return whole.view(count, *whole.shape[-2:])


def _norm(stack: Tensor) -> Tensor:
    """Frobenius norms ``[E]`` of matrices ``[E, ., .]``, fp32."""
    return torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float32)


__all__ = ["SHARE", "learning_rate", "trains_others"]
