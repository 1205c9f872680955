"""The plain weight that computes an adapted layer: what a merge writes.

| norm         | W'                                    |
|--------------|---------------------------------------|
| `none`       | W + (P_base + P) R                    |
| `channel`    | share · W + Q R, see ``channel``      |
| `weight`     | elementwise, see ``weight``           |
| `activation` | there is none: it is not linear in x  |

One pass over W: products in fp32, one rounding to W's dtype at the end. bf16 keeps 8 bits, so
where |ΔW| is under 1/512 of |W| rounding to nearest drops it; ``stochastic_rounding`` keeps it in
the mean. For W in 16 bits triton multiplies in TF32 on sm_100 even so: an error of 2⁻¹¹ of ΔW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .channel import channel_product, row_norms
from .checks import check_operands
from .dispatch import absent, op, supported, wide, without_autocast
from .gain import NormOptions, Restrain
from .weight import generator, normed_weight, round_stochastically


def effective_weight(
    weight: Tensor,
    rows: Tensor,
    p: Tensor,
    options: NormOptions,
    *,
    p_base: Tensor | None = None,
    restrain: Restrain | None = None,
    dtype: torch.dtype | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    impl: str | None = None,
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
        stochastic_rounding: round each entry up with the probability of the part that is cut off;
            bf16 alone. Entries that bf16 holds exactly never change.
        seed: of the rounding. One seed gives one result on one kind of device; give each layer its
            own.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; None takes ``SECURA_IMPL``'s.

    Raises:
        ValueError: for ``norm="activation"``, stochastic rounding to another dtype than bf16,
            shapes that do not fit, or an unknown form or ``impl``.
        RuntimeError: for ``impl="triton"`` where no kernel can take ``weight``.
    """
    dtype = dtype or weight.dtype
    if options.norm == "activation":
        raise ValueError("norm='activation' is not linear in x: no plain weight computes it")
    if stochastic_rounding and dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for torch.bfloat16, not {dtype}: leave it off")
    check_operands((), weight.shape[0], rows, p=p, p_base=p_base, restrain=restrain)
    draw = seed if stochastic_rounding else None
    p = p.to(wide(p.dtype))  # a 16-bit P is not to be rounded again on the way to W'
    p_base = None if p_base is None else p_base.to(wide(p_base.dtype))
    if options.norm == "weight":
        return normed_weight(
            weight, rows, p, options, p_base=p_base, restrain=restrain, dtype=dtype, seed=draw,
            impl=impl,
        )  # fmt: skip
    with torch.no_grad(), without_autocast(weight.device.type):
        share = None
        if options.norm == "channel":
            gram, norms = row_norms(weight, rows, p_base)
            q, share = channel_product(p, p_base, gram, norms, options, restrain, impl=impl)
        else:
            q = p if p_base is None else p + p_base
        return merged_weight(weight, rows, q, share, dtype, draw, impl)


@op("merged_weight")
def merged_weight(
    weight: Tensor,
    rows: Tensor,
    q: Tensor,
    share: Tensor | None,
    dtype: torch.dtype,
    seed: int | None,
    impl: str | None,
) -> Tensor:
    """``share · W + Q R`` in ``dtype`` and W's layout, rounded from ``seed`` or to nearest."""
    if supported(impl, weight, absent(weight, dtype)) == "triton":
        from .kernels import weight as kernels

        tiles = kernels.Tiles.whole(weight, rows, q, None, torch.float32)
        return kernels.fused_weight(tiles, None, share, None, None, dtype, seed)
    compute = torch.promote_types(wide(weight.dtype), q.dtype)
    base = weight.to(compute) if share is None else weight.to(compute) * share[:, None]
    out = torch.addmm(base, q.to(compute), weight.index_select(0, rows).to(compute))
    draw = generator(weight, seed)
    fused = torch.empty_like(weight, dtype=dtype)
    return fused.copy_(round_stochastically(out, draw) if draw else out)


@merged_weight.register_fake
def _merged_weight_fake(weight, rows, q, share, dtype, seed, impl):
    return torch.empty_like(weight, dtype=dtype)


__all__ = ["effective_weight"]
