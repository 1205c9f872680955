"""The learning rate at which a step of Adam moves adapted weights by a share of their size.

Adam moves every entry of what it trains by about the rate η. If the signs were random, a step would
move a weight (in the Frobenius norm) by

    η s ‖C κL‖ ‖S R‖                                     on U; without an anchor κL and S are 1
    η s (‖C A‖ ‖R‖ + ‖C‖ ‖B R‖ + 2 n η √r ‖C‖ ‖R‖)       on A and B together

of which the last part is what A and B have grown by after n steps at the peak, if their signs were
always the same. Where those of a step agree, this is about its largest singular value. A layer's
size is the one that W would have if its entries were random, ``σ (√N + √K)`` with σ their root mean
square: a step's share of it tells what it does to the layer's output (Yang, Simon, Bernstein,
arXiv 2310.17813).

C and R are pieces of W, so at one rate the share goes with σ and m, and one rate means other steps
in models of like size (docs/results.md, "Rates"). The rate is that at which the root mean square of
the layers' shares is ``SHARE``, so that the layers that move most decide.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

from secura_kernels.dispatch import without_autocast

from . import bases
from .layers import active_adapters
from .sharding import from_rank_0, gathered, number_of_rank_0

SHARE = 0.137
"""Of its size: what a step at the peak moves in the anchored core that was measured most (5e-4 at
r = 128 on the MLP of SmolLM2-135M)."""
_HALVINGS = 60


@torch.no_grad()
def learning_rate(model: nn.Module, steps: int) -> float:
    """Compute a peak learning rate for Adam from the weights that the model's adapters act on.

    It is where to begin, found on two small models (docs/results.md, "Rates"): a step on U then
    moves a weight by 14% of its size, one on A and B once these have grown. M of a norm, which may
    halve a change, is not counted.

    Example:
        >>> model = get_peft_model(base, SecuraConfig(r=64, norm="channel"))
        >>> TrainingArguments("out", learning_rate=secura.learning_rate(model, steps=1000))

    Args:
        model: a PEFT model or any other with active SECURA adapters. Where processes work together,
            every one calls this.
        steps: of the optimizer in all, under a schedule that falls to 0 (linear, cosine); twice as
            many under a constant one. A and B grow on the way (up to a fold, with ``fold_every``),
            so that of more steps the rate is lower; that of U is not.

    Returns:
        The rate, to two digits; about the same for a core U that is anchored and one that is not.

    Raises:
        TypeError: for ``steps`` that is no integer.
        ValueError: for fewer steps than 1, a model with no active adapter that is trained, and
            weights that are 0, not at hand, or split by tensor parallelism.
        RuntimeError: for an adapter that is merged.
    """
    if isinstance(steps, bool) or not hasattr(steps, "__index__"):
        raise TypeError(f"steps={steps!r} must be an integer")
    steps = operator.index(steps)
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more")
    pairs = list(active_adapters(model).values())
    for adapter, layer in pairs:
        if layer.merged:
            raise RuntimeError(f"{adapter.name} is merged into the base weight: unmerge it first")
    if any(bases.is_elsewhere(layer.adapted) for _, layer in pairs):  # all have a part of it
        rate = _rate(pairs, steps / 2)
    else:
        none = torch.zeros((), dtype=torch.float64)
        rate = from_rank_0(lambda: {"rate": _rate(pairs, steps / 2)}, {"rate": none})["rate"]
    return float(f"{number_of_rank_0(float(rate)):.1e}")  # else a last bit might round otherwise


def _rate(pairs: list[tuple[Any, Any]], count: float) -> Tensor:
    """The rate, 0-dim fp64, of adapters and their layers after ``count`` steps at the peak."""
    layers: dict[nn.Module, Tensor] = {}
    for adapter, layer in pairs:  # what several adapters of a layer do adds up
        layers[layer] = layers.get(layer, 0) + _shares(adapter, layer, count)
    linear, square = torch.cat([torch.zeros(2, 0), *layers.values()], 1).double()
    moving = (linear > 0) | (square > 0)
    linear, square = linear[moving], square[moving]
    if not len(linear):
        raise ValueError(
            "no active adapter of the model is trained, or what it acts on is 0: put one on with "
            "get_peft_model, or load it with is_trainable=True"
        )
    each = 2 * SHARE / (linear + (linear.square() + 4 * SHARE * square).sqrt())
    low, high = each.min(), each.min() * math.sqrt(len(each))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        share = (middle * linear + middle.square() * square).square().mean().sqrt()
        low, high = (middle, high) if share < SHARE else (low, middle)
    return middle


def _shares(adapter: Any, layer: Any, count: float) -> Tensor:
    """What a step moves of a layer's size, ``[2, E]`` for η and η²; E of a stack's experts, or 1.

    0 where no step moves it.
    """
    bases.check_whole(layer.adapted)
    weight = bases.weight(layer.adapted)
    stack = weight if weight.dim() == 3 else weight[None]
    e, n, k = stack.shape
    rows, cols = (index.view(e, -1) for index in (adapter.rows % n, adapter.cols % k))
    with torch.enable_grad():  # else one that is computed would seem frozen
        own = {name: getattr(adapter, name) for name in ("A", "B", "U", "left", "right")}
        trained = {name for name, one in own.items() if one is not None and one.requires_grad}
    parts = {name: _stacked(one, e) for name, one in own.items() if one is not None}
    with without_autocast(weight.device.type):
        c = stack.gather(2, cols[:, None, :].expand(-1, n, -1)).float()
        r = stack.gather(1, rows[:, :, None].expand(-1, -1, k)).float()
        if "U" in parts:
            if "left" in parts:
                c, r = c @ parts["left"], parts["right"] @ r
            first, grown = _norm(c) * _norm(r) * ("U" in trained), torch.zeros_like(_norm(c))
        else:
            a, b = parts["A"], parts["B"]
            first = _norm(c @ a) * _norm(r) * ("B" in trained)
            first = first + _norm(c) * _norm(b @ r) * ("A" in trained)
            until = min(count, adapter.config.fold_every or count)
            both = 2 * until * math.sqrt(b.shape[1]) * ({"A", "B"} <= trained)
            grown = both * _norm(c) * _norm(r)
    size = _norm(stack) * (n**-0.5 + k**-0.5)
    shares = abs(adapter.scaling) * torch.stack([first, grown]) / size
    return shares.where(size > 0, 0.0).cpu()


def _stacked(part: Tensor, count: int) -> Tensor:
    """A tensor of an adapter, fp32 ``[count, ., .]``, whole."""
    whole = gathered(part).detach().float()
    return whole.view(count, *whole.shape[-2:])


def _norm(stack: Tensor) -> Tensor:
    """Frobenius norms ``[E]`` of matrices ``[E, ., .]``, fp32 or wider."""
    dtype = torch.promote_types(stack.dtype, torch.float32)
    return torch.linalg.vector_norm(stack, dim=(1, 2), dtype=dtype).float()


__all__ = ["SHARE", "learning_rate"]
