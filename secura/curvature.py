"""The curvature of what a model knows in the span of its adapters, read off old text.

One pass forward and backward over texts (:mod:`secura.texts`) sums z zᵀ and h hᵀ of every adapted
layer (formulas in :mod:`secura.anchoring`), each process over its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bases
from .cabr import CABR
from .language_models import check_reads, positions
from .sharding import largest, processes
from .texts import batches, draw, pieces_of, sample


class Statistics(NamedTuple):
    """What one layer's tokens sum up to, and its own C and R, fp32, ``[m, m]`` but for a count.

    Attributes:
        sigma: the sum of z zᵀ.
        gamma: the sum of h hᵀ.
        columns: CᵀC.
        rows: R Rᵀ.
        tokens: how many there were, one number.
    """

    sigma: Tensor
    gamma: Tensor
    columns: Tensor
    rows: Tensor
    tokens: Tensor

    @property
    def seen(self) -> bool:
        """Whether a token and a gradient reached the layer."""
        return bool(self.sigma.any() and self.gamma.any())


def curvature(
    model: nn.Module,
    adapters: Mapping[str, tuple[CABR, Any]],
    texts: list[Any] | None,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Statistics], int]:
    """Each layer's sums over old text, and how many tokens were read, over all processes.

    Args:
        model: gives ``logits`` for ``input_ids``; gradients have to reach the adapted layers.
        adapters: the adapters and the layers they are on, by name.
        texts, tokenizer, tokens, length, batch_size, seed: see :func:`secura.anchor`.

    Raises:
        ValueError: no text, one of fewer than two tokens, a model that gives no logits for
            ``input_ids`` or cannot sample, or logits that are not finite.
    """
    check_reads(model)
    for _, layer in adapters.values():
        bases.check_whole(layer.adapted)
    device = next(iter(adapters.values()))[0].rows.device
    rank, world = processes()
    generator = torch.Generator(device).manual_seed(seed + 1_000_003 * rank)
    length = min(length, tokens, positions(model))
    finite = True
    if texts is None:
        count = max(1, tokens // (length * world))
        pieces, finite = sample(model, tokenizer, count, length, batch_size, generator)
        _check_finite(finite, device)
        own = every = batches(pieces, batch_size)
    else:
        every = batches(pieces_of(model, texts, tokenizer, tokens, length), batch_size)
        own = every[rank::world]
    sums, handles, watches = {}, [], []
    try:
        for name, (adapter, layer) in adapters.items():
            sums[name] = _nothing(adapter.core)
            watches.append(_Watch(adapter, sums[name]))
            handles.append(layer.register_forward_hook(watches[-1]))
        # all processes read as often, for sharded ones wait for one another, and fail together
        for index in range(largest(len(own), device)):
            for watch in watches:
                watch.counts = index < len(own)
            batch = own[index] if index < len(own) else every[0]
            finite &= _read(model, batch.to(device), generator)
            if not finite and world == 1:
                break
    finally:
        for handle in handles:
            handle.remove()
    _check_finite(finite, device)
    read = torch.tensor(sum(batch.numel() for batch in own), device=device)
    if world > 1:
        torch.distributed.all_reduce(read)
        for one in sums.values():
            _add_up(one)
    return sums, int(read)


def _nothing(like: Tensor) -> Statistics:
    """Sums of no token, each ``[m, m]`` as ``like``."""
    sigma, gamma, columns, rows = (torch.zeros_like(like) for _ in range(4))
    return Statistics(sigma, gamma, columns, rows, like.new_zeros(()))


def _check_finite(finite: bool, device: torch.device) -> None:
    """Raise ``ValueError`` on all processes where the logits of one were not finite."""
    if largest(int(not finite), device):
        raise ValueError("the model's logits hold NaN or inf on old text: nothing was anchored")


def _add_up(sums: Statistics) -> None:
    """Add the sums of all processes; C and R are those of any that a token reached."""
    reached = sums.rows.any().float()
    for tensor in (*sums, reached):
        torch.distributed.all_reduce(tensor)
    for tensor in (sums.columns, sums.rows):
        tensor.div_(reached.clamp_min(1))


def _read(model: Any, ids: Tensor, generator: Any) -> bool:
    """One pass forward and backward over ``ids [B, T]``, with labels drawn from the model.

    Returns:
        Whether its logits are finite; if not, the pass is made all the same, for the others' sake.
    """
    logits = model(input_ids=ids).logits
    labels, finite = draw(logits.detach(), generator)
    flat = logits.float().flatten(0, -2)
    F.cross_entropy(flat, labels.flatten(), reduction="sum").backward()
    for parameter in model.parameters():
        parameter.grad = None
    return finite


class _Watch:
    """A forward hook that adds a layer's z zᵀ and h hᵀ to its sums once its gradient is there.

    Where nothing ``counts``, it adds nothing.
    """

    def __init__(self, adapter: CABR, sums: Statistics) -> None:
        self.adapter, self.sums, self.counts = adapter, sums, True

    def __call__(self, layer: Any, inputs: tuple, out: Tensor) -> None:
        if not out.requires_grad:
            return
        base = layer.adapted
        with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
            weight = bases.weight(base)
            rows = weight.index_select(0, self.adapter.rows)
            columns = weight.index_select(1, self.adapter.cols)
            if not bool(self.sums.rows.any()):  # later, the weight may be elsewhere
                self.sums.rows.copy_(rows.float() @ rows.float().t())
                self.sums.columns.copy_(columns.float().t() @ columns.float())
            z = (_flat(inputs[0]).to(weight.dtype) @ rows.t()).float()
            squares = z.t() @ z

        def add(gradient: Tensor) -> None:
            if not self.counts:
                return
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                h = (_flat(gradient).to(columns.dtype) @ columns).float()
                self.sums.sigma.add_(squares)
                self.sums.gamma.add_(h.t() @ h)
                self.sums.tokens.add_(len(h))

        out.register_hook(add)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


__all__ = ["Statistics", "curvature"]
