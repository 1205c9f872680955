"""The plain weight that computes an adapted layer: what a merge writes.

| norm         | W'                                    |
|--------------|---------------------------------------|
| `none`       | W + (P_base + P) R                    |
| `channel`    | share · W + Q R, see ``channel``      |
| `weight`     | elementwise, see ``weight``           |
| `activation` | there is none: it is not linear in x  |
"""

from __future__ import annotations

import torch
from torch import Tensor

from .channel import channel_product, row_norms
from .gain import NormOptions, Restrain
from .weight import normed_weight


def effective_weight(
    weight: Tensor,
    rows: Tensor,
    p: Tensor,
    options: NormOptions,
    *,
    p_base: Tensor | None = None,
    restrain: Restrain | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``W' [N, K]`` in ``dtype`` or W's own, rounded once. No gradient; W is not written.

    Args:
        weight: ``W [N, K]``.
        rows: ``[m]`` int64.
        p: ``P [N, m]``, scaling included.
        options: the norm.
        p_base: ``[N, m]``, what was folded into the base, or None.
        restrain: the suppression, or None.
        dtype: of the result.

    Raises:
        ValueError: for ``norm="activation"``.
    """
    if options.norm == "activation":
        raise ValueError("norm='activation' is not linear in x: no plain weight computes it")
    if options.norm == "weight":
        return normed_weight(
            weight, rows, p, options, p_base=p_base, restrain=restrain, dtype=dtype
        )
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        share = None
        if options.norm == "channel":
            gram, norms = row_norms(weight, rows, p_base)
            q, share = channel_product(p, p_base, gram, norms, options, restrain)
        else:
            q = p if p_base is None else p + p_base
        wide = torch.promote_types(torch.promote_types(weight.dtype, q.dtype), torch.float32)
        base = weight.to(wide) if share is None else weight.to(wide) * share[:, None]
        r = weight.index_select(0, rows).to(wide)
        return torch.addmm(base, q.to(wide), r).to(dtype or weight.dtype)


__all__ = ["effective_weight"]
