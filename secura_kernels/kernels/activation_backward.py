"""Backward of the space ``activation``: dΔ in chunks of bounded memory, one read of g and y0.

    dΔ = g f / M    dbase = 2 g f / M  or  g f     h = (dΔ P) · z_scale + dbase P_base
    ∂P = dΔᵀ zd     ∂δb = Σ dΔ     ∂y0 = dbase,  ∂y0[:, rows] += h

dΔ is needed by ∂P alone (averaged, it is half of dbase), and ∂P sums over tokens: so a launch
writes a slice of dΔ's columns into a workspace of ``WORKSPACE_MIB``, cuBLAS makes the slice's rows
of ∂P of it, and the next slice takes its place. Slices of 16 MiB, for the L2 cache to keep, were
measured and lost to what more launches cost: on an H100 at T=8192, N=4096 262 µs, 229 with 32 MiB,
211 with 64 and with dΔ whole. The workspace bounds memory, not traffic.

A program has BLOCK_T tokens and its part of the launch's columns, with its h in registers; from one
launch to the next the parts' h are kept in fp32. Above 16384 tokens these are cut as well, below
that a launch needs them to fill a GPU. Where h does not fit in registers (m > 128, fp32) tokens
alone are cut, and cuBLAS makes h of the workspace.

Bytes from memory, in units of one [T, N] tensor of the compute dtype (64 MiB at T=8192, N=4096,
bf16), what the base's own product reads of g or ∂y0 left out; κ = K / N:

| what                     | dΔ whole | in L2     | of which                            |
|--------------------------|----------|-----------|-------------------------------------|
| gated, ∂y0               | 5        | 3         | reads g and y0, writes ∂y0          |
| gated, ``thin``          | 4 + 2κ   | 2 + 2κ    | h R written and read in place of it |
| averaged                 | 4        | 3         | ∂P reads its slice of ∂y0 from L2   |
| with 8bit, 16-bit dtypes | −½       | −½        | kept instead of y0                  |

h adds 8 m T bytes a launch and part (m / N of 4 units, mostly from L2), and P_base and P are read
from L2 once a block of tokens. The columns ``rows`` of ∂y0 are added in a launch of their own: at
the end of a program their addresses alone would fill its registers, and a barrier would have to
order its stores. Every sum runs in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..additive import product_wide
from ..gain import sigmoid_weight
from ..machine import machine_of
from .activation import Operands, backward_tile
from .activation_jit import activation_bwd_kernel
from .additive import add_columns
from .common import aligned, cdiv, dot_precision, padded, splits, unit_stride

WORKSPACE_MIB = 64
_ENOUGH_TOKENS = 16384
_STEP = 64  # a chunk's edges, of which every block is a divisor


def _chunks(t: int, n: int, itemsize: int, whole_rows: bool) -> Iterator[tuple[slice, slice]]:
    """``(tokens, columns)``: the blocks of a [T, N] tensor that ``WORKSPACE_MIB`` holds, in order.

    The first is the largest. ``whole_rows`` asks for all columns of fewer tokens.
    """
    size = WORKSPACE_MIB * 2**20 // itemsize
    tokens = max(_STEP, size // n // _STEP * _STEP) if whole_rows else _ENOUGH_TOKENS
    columns = n if whole_rows else max(_STEP, size // min(t, tokens) // _STEP * _STEP)
    for start in range(0, t, tokens):
        for first in range(0, n, columns):
            yield slice(start, min(t, start + tokens)), slice(first, min(n, first + columns))


def backward(
    g: Tensor,
    y0: Tensor | None,
    kept: Tensor | None,
    z: Tensor,
    rows: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    scalars: Tensor | None,
    factor: Tensor | None,
    known: list[float],
    form: str,
    combine: str,
    needs: list[bool],
    thin: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(∂y0, ∂P, ∂δb)``, None where not needed; 1/M from ``kept`` where that is given.

    With ``thin`` (gated and without f, so that dbase is g) h ``[T, m]`` stands in ∂y0's place.
    """
    g = unit_stride(g)
    y0 = None if y0 is None else unit_stride(y0)
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    (t, n), averaged, machine = g.shape, combine == "averaged", machine_of(g)
    ops = Operands(z, p, p_base, z_scale)
    in_registers = needs[0] and ops.chunks == 1 and g.dtype != torch.float32
    multiplies = needs[0] and not in_registers
    chunks = [(slice(0, t), slice(0, n))]
    if reads_change := needs[1] or multiplies:
        chunks = list(_chunks(t, n, g.element_size(), multiplies))
    tokens, columns = (part.stop for part in chunks[0])
    tile = backward_tile(
        machine, g.dtype, ops.m_rows, p_base is not None, y0 is None,
        aligned(n, g.stride(0), n if y0 is None else y0.stride(0)),
    )  # fmt: skip

    dbase = g.new_empty(t, n) if needs[0] and not thin else None
    halves = averaged and dbase is not None
    workspace = g.new_empty(tokens * columns) if reads_change and not halves else None
    programs, blocks_n = cdiv(tokens, tile.block_t), cdiv(columns, tile.block_n)
    split = splits(programs, blocks_n, machine.processors)
    parts = split if in_registers else 1
    h = g.new_empty(parts, t, ops.m, dtype=torch.float32) if needs[0] else None
    dp = g.new_empty(p.shape, dtype=torch.float32) if needs[1] else None
    dbias = g.new_zeros(n, dtype=torch.float32) if needs[2] else None
    by_token = *ops.padded[:2], None if z_scale is None else padded(z_scale)
    by_column = *ops.padded[2:], delta_bias, factor

    def launch(tokens: slice, columns: slice) -> Any:
        """The chunk's dΔ, or dbase where that is its double."""
        width_t, width_n = tokens.stop - tokens.start, columns.stop - columns.start
        programs, blocks_n = cdiv(width_t, tile.block_t), cdiv(width_n, tile.block_n)
        ddelta = None if workspace is None else workspace[: width_t * width_n].view(width_t, -1)
        dbase_part = _part(dbase, tokens, columns)
        sums = g.new_empty(programs, width_n, dtype=torch.float32) if needs[2] else None
        activation_bwd_kernel[(programs, split)](
            *(_part(tensor, tokens, columns) for tensor in (g, y0, kept)),
            *(_part(tensor, tokens) for tensor in by_token),
            *(_part(tensor, columns) for tensor in by_column),
            scalars, ddelta, dbase_part, _part(h, slice(None), tokens), sums,
            width_t, width_n, ops.m, columns.start, cdiv(blocks_n, split) * tile.block_n,
            g.stride(0), 0 if y0 is None else y0.stride(0), n, t * ops.m,
            *(known or (0.0, 0.0, 0.0)),
            AVERAGED=averaged, SIGMOID_WEIGHT=sigmoid_weight(form),
            PRECISION=dot_precision(g.dtype), HAS_H=in_registers,
            BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_M=ops.block_m, CHUNKS=ops.chunks,
            STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if dbias is not None and sums is not None:
            dbias[columns] += sums.sum(0)
        return dbase_part if halves else ddelta

    share = 0.5 if halves else 1.0
    for at, span in chunks:
        change = launch(at, span)
        if dp is not None and at.start == 0:
            product_wide(change.t(), ops.zd[at], out=dp[span])
        elif dp is not None:
            dp[span] += product_wide(change.t(), ops.zd[at])
        if h is not None and multiplies:
            own = product_wide(change, p).mul_(share)
            if z_scale is not None:
                own *= z_scale[at]
            if p_base is not None:
                own += product_wide((g if dbase is None else dbase)[at], p_base)
            h[0, at, : ops.m_rows] = own
    if dp is not None and halves:
        dp *= share
    if h is None:
        return None, dp, dbias
    if dbase is None:
        return h.sum(0)[:, : ops.m_rows].to(g.dtype), dp, dbias
    add_columns(dbase if averaged else g, None if averaged else factor, h, rows, dbase)
    return dbase, dp, dbias


def _part(tensor: Tensor | None, *index: slice) -> Tensor | None:
    return None if tensor is None else tensor[index]


__all__ = ["WORKSPACE_MIB", "backward"]
