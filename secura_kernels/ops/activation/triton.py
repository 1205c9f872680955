"""The kernels of the space ``activation``: one pass over ``y0`` each way, and their launchers.

    base = y0 + z P_baseᵀ    Δ = zd Pᵀ + δb    zd = z · z_scale    1/M = inverse_gain(base, Δ)
    out  = (2 base + Δ) f / M            or  (base + Δ / M) f
    dΔ = g f / M    dbase = 2 g f / M  or  g f     h = (dΔ P) · z_scale + dbase P_base
    ∂P = dΔᵀ zd     ∂δb = Σ dΔ     ∂y0 = dbase,  ∂y0[:, rows] += h

| tensor                    | shape    | dtype: in / accumulate / out        |
|---------------------------|----------|-------------------------------------|
| y0, g, out, dΔ, ∂y0       | [T, N]   | bf16, fp16, fp32 / fp32 / the same  |
| z, zd                     | [T, m]   | as y0 / fp32 / as y0                |
| h                         | [T, m]   | fp32                                |
| P, P_base                 | [N, m]   | as y0; ∂P in fp32                   |
| kept (``save="8bit"``)    | [T, N]   | uint8: 255 (2/M − 1), to nearest    |
| [ε, slope, offset]        | [3]      | fp32, or numbers where known before |
| factor f, δb              | [N]      | fp32, any                           |

Bytes from memory, in units of one [T, N] tensor of the compute dtype (64 MiB at T=8192, N=4096,
bf16), what the base's own product reads of g or ∂y0 left out; κ = K / N; the thin tensors add m/N
of a unit each, and reading z's scattered columns up to 32 m / (N itemsize):

| what                                      | units  | of which                                |
|-------------------------------------------|--------|-----------------------------------------|
| forward                                   | 2      | + ½ with 8bit in 16-bit dtypes          |
| `paper`, `released`; `restrain`; rel. ε   | + 1    | a read each, before the forward         |
| backward, gated, ∂y0                      | 5      | g and y0 read, dΔ twice, ∂y0 written    |
| gated, h alone                            | 4 + 2κ | h R written and read in ∂y0's place     |
| averaged                                  | 4      | ∂P reads ∂y0                            |
| with 8bit, 16-bit dtypes                  | −½     | kept instead of y0                      |

dΔ is needed by ∂P alone (averaged, it is half of dbase), and ∂P sums over tokens: so a launch
writes a slice of dΔ's columns into a workspace of ``CHANGE_MIB``, cuBLAS makes the slice's rows
of ∂P of it, and the next slice takes its place. Slices of 16 MiB, for the L2 cache to keep, were
measured and lost to what more launches cost: on an H100 at T=8192, N=4096 262 µs, 229 with 32 MiB,
211 with 64 and with dΔ whole. The workspace bounds memory, not traffic.

A program has BLOCK_T tokens and its part of the launch's columns, with its h in registers; from one
launch to the next the parts' h are kept in fp32. Above 16384 tokens these are cut as well, below
that a launch needs them to fill a GPU. Where h does not fit in registers (m > 128, fp32) tokens
alone are cut, and cuBLAS makes h of the workspace.

h adds 8 m T bytes a launch and part (m / N of 4 units, mostly from L2). P is read once a block of
tokens, from L2: T N m / BLOCK_T elements, hence tall tiles. The columns ``rows`` of ∂y0 are added
in a launch of their own: at the end of a program their addresses alone would fill its registers,
and a barrier would have to order its stores. Every sum runs in a fixed order: equal inputs give
equal bits on one kind of GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import plan
from ...gpu import limits_of
from ...norm import Norm, suppression
from ..common import Measured, Terms, product_wide
from ..jit import cast, combine, dot, inverse_gain, load_scalars, relative_change, span
from ..launch import Kernel
from ..lowrank.triton import add_columns, gather
from ..operands import Tile, aligned, cdiv, dot_precision, padded, unit_stride
from ..triton import gain_scalars
from . import tiles
from .jit import base_and_delta, load_chunk, load_z

_TILES_A_PROGRAM = 8


@Kernel
@triton.jit(do_not_specialize=["t", "tiles", "programs_n"])
def activation_fwd_kernel(
    y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, factor_ptr,
    scalars_ptr, out_ptr, kept_ptr, partial_ptr,
    t, n, m, tiles, programs_n, stride_y0, edge, eps, slope, offset,
    PASS: tl.constexpr, AVERAGED: tl.constexpr, SIGMOID_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``PASS`` is ``out``, or what is measured before it: ``square``, ``peak`` or ``count``.

    ε, slope and offset are numbers, or at ``scalars_ptr`` where that is given.
    """
    pid = tl.program_id(0)
    offs_t = span(pid // programs_n, BLOCK_T)
    first = (pid % programs_n) * tiles
    if scalars_ptr is not None:
        eps, slope, offset = load_scalars(scalars_ptr)
    z, zd = load_z(z_ptr, zd_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    if PASS != "out":
        partial = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    last = tl.minimum(tiles, tl.cdiv(n, BLOCK_N) - first)
    for tile in tl.range(0, last, num_stages=STAGES if CHUNKS == 1 else 1):
        offs_n = (first + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_t[:, None] < t) & (offs_n[None, :] < n)
        p = load_chunk(p_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        p_base = load_chunk(p_base_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        base, delta = base_and_delta(
            z, zd, p, p_base, y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, offs_t,
            offs_n, t, n, m, stride_y0, PRECISION, BLOCK_M, CHUNKS, STAGES,
        )  # fmt: skip
        if PASS == "square":
            partial += base * base
        elif PASS == "peak":
            partial = tl.maximum(partial, tl.where(mask, relative_change(base, delta, eps), 0.0))
        else:
            inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
            if PASS == "count":
                partial += (mask & (inverse * edge >= 1.0)).to(tl.float32)
            else:
                out = combine(base, delta, inverse, AVERAGED)
                if factor_ptr is not None:
                    out *= tl.load(factor_ptr + offs_n, mask=offs_n < n, other=0.0)[None, :]
                place = offs_t[:, None] * n + offs_n[None, :]
                tl.store(out_ptr + place, cast(out, out_ptr.dtype.element_ty), mask=mask)
                if kept_ptr is not None:
                    level = (2.0 * inverse - 1.0) * 255.0 + 0.5
                    tl.store(kept_ptr + place, level.to(tl.int32).to(tl.uint8), mask=mask)
    if PASS == "peak":
        tl.store(partial_ptr + pid, tl.max(partial))
    elif PASS != "out":
        tl.store(partial_ptr + pid, tl.sum(partial))


@Kernel
@triton.jit(do_not_specialize=["t", "tokens"])
def activation_bwd_kernel(
    g_ptr, y0_ptr, kept_ptr, z_ptr, zd_ptr, z_scale_ptr, p_ptr, p_base_ptr, delta_bias_ptr,
    factor_ptr, scalars_ptr, ddelta_ptr, dbase_ptr, h_ptr, dbias_ptr,
    t, n, m, first, width, tokens, stride_g, stride_y0, stride_out, eps, slope, offset,
    AVERAGED: tl.constexpr, SIGMOID_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    HAS_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dΔ and dbase of ``n`` columns from ``first`` on, each where its pointer is given, and h.

    Every pointer is that of its first token and column in this launch; a program takes ``width``
    of the columns, the part of its second index. dΔ is contiguous, ``stride_out`` is that of
    ``kept`` and dbase.

    ``HAS_H``: the program adds its tokens' share of h [BLOCK_T, m] to what launches for earlier
    columns left for its part at ``h_ptr [parts, tokens, m]``.
    """
    pid = tl.program_id(0)
    offs_t = span(pid, BLOCK_T)
    mask_t = offs_t[:, None] < t
    offs_m = tl.arange(0, BLOCK_M)
    dtype = g_ptr.dtype.element_ty
    if kept_ptr is None:
        if scalars_ptr is not None:
            eps, slope, offset = load_scalars(scalars_ptr)
        z, zd = load_z(z_ptr, zd_ptr, offs_t, t, m, BLOCK_M, CHUNKS)
    h = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    h_base = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    begin = tl.program_id(1) * width
    for start in tl.range(
        begin, tl.minimum(begin + width, n), BLOCK_N, num_stages=STAGES if CHUNKS == 1 else 1
    ):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = mask_t & (offs_n[None, :] < n)
        place = offs_t[:, None] * stride_out + offs_n[None, :]
        g = tl.load(g_ptr + offs_t[:, None] * stride_g + offs_n[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if factor_ptr is not None:
            g *= tl.load(factor_ptr + offs_n, mask=offs_n < n, other=0.0)[None, :]
        p = load_chunk(p_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        p_base = load_chunk(p_base_ptr, offs_n, n, m, BLOCK_M, CHUNKS)
        if kept_ptr is None:
            base, delta = base_and_delta(
                z, zd, p, p_base, y0_ptr, z_ptr, zd_ptr, p_ptr, p_base_ptr, delta_bias_ptr, offs_t,
                offs_n, t, n, m, stride_y0, PRECISION, BLOCK_M, CHUNKS, STAGES,
            )  # fmt: skip
            inverse = inverse_gain(base, delta, eps, slope, offset, SIGMOID_WEIGHT)
        else:
            level = tl.load(kept_ptr + place, mask=mask, other=0).to(tl.float32)
            inverse = 0.5 + level * (0.5 / 255.0)
        ddelta = g * inverse
        low = cast(ddelta, dtype)
        dbase = cast(2.0 * ddelta if AVERAGED else g, dtype)
        if ddelta_ptr is not None:
            tl.store(ddelta_ptr + offs_t[:, None] * n + offs_n[None, :], low, mask=mask)
        if dbase_ptr is not None:
            tl.store(dbase_ptr + place, dbase, mask=mask)
        if dbias_ptr is not None:
            dbias = tl.sum(ddelta, axis=0)
            tl.store(dbias_ptr + pid.to(tl.int64) * n + offs_n, dbias, mask=offs_n < n)
        if HAS_H:
            h = dot(low, p, h, PRECISION)
            if p_base_ptr is not None:
                if z_scale_ptr is not None:
                    h_base = dot(dbase, p_base, h_base, PRECISION)
                else:
                    h = dot(dbase, p_base, h, PRECISION)
    if HAS_H:
        place_h = offs_t[:, None] * m + offs_m[None, :]
        mask = mask_t & (offs_m[None, :] < m)
        if z_scale_ptr is not None:
            z_scale = tl.load(z_scale_ptr + place_h, mask=mask, other=0.0)
            h = h * z_scale.to(tl.float32) + h_base
        place_h += tl.program_id(1).to(tl.int64) * tokens * m
        if first > 0:
            h += tl.load(h_ptr + place_h, mask=mask, other=0.0)
        tl.store(h_ptr + place_h, h, mask=mask)


class Operands:
    """The padded thin operands of both kernels."""

    def __init__(self, z: Tensor, terms: Terms) -> None:
        p, p_base, _, z_scale = terms
        self.zd = z if z_scale is None else (z * z_scale).to(z.dtype)
        self.m_rows = z.shape[1]
        same = p_base is None or (z_scale is None and tiles.in_registers(self.m_rows))
        self.by_token = None if same else padded(z), padded(self.zd)
        self.by_column = padded(p), None if p_base is None else padded(p_base)
        self.m = self.by_column[0].shape[1]


def _constants(tile: Tile, dtype: torch.dtype, norm: Norm) -> dict[str, Any]:
    """The constants of both kernels."""
    gain = {"AVERAGED": norm.averaged, "SIGMOID_WEIGHT": norm.sigmoid_weight}
    return gain | {"PRECISION": dot_precision(dtype)} | tile


def forward(
    y0: Tensor,
    z: Tensor,
    terms: Terms,
    norm: Norm,
    important: Tensor | None,
    keep: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(out, kept, [ε, slope, offset], factor)``; thin tensors in y0's dtype, nothing empty.

    Every measuring pass the norm asks for reads y0 once; the last one writes, over a contiguous
    y0 if ``in_place``: a tile is read and written by one program.
    """
    y0 = unit_stride(y0)
    delta_bias = None if terms.delta_bias is None else terms.delta_bias.contiguous()
    (t, n), limits, has_base = y0.shape, limits_of(y0), terms.p_base is not None
    thin = Operands(z, terms)
    is_aligned = aligned(n, y0.stride(0))
    tile = tiles.forward_tile(limits, y0.dtype, thin.m_rows, has_base, is_aligned)
    blocks_t, blocks_n = cdiv(t, tile["BLOCK_T"]), cdiv(n, tile["BLOCK_N"])
    in_turn = max(1, blocks_t * blocks_n // (2 * limits.processors))
    in_turn = min(_TILES_A_PROGRAM, 2 ** (in_turn.bit_length() - 1))
    programs_n = cdiv(blocks_n, in_turn)
    known, factor = norm.known, None
    scalars = None if known else torch.full((3,), norm.eps, dtype=torch.float32, device=y0.device)
    operands = (y0, *thin.by_token, *thin.by_column, delta_bias)
    sizes = (t, n, thin.m, in_turn, programs_n, y0.stride(0))
    constants = _constants(tile, y0.dtype, norm)

    def launch(
        which: str,
        out: Tensor | None = None,
        kept: Tensor | None = None,
        partial: Tensor | None = None,
        edge: float = 0.0,
    ) -> None:
        results = (out, kept, partial)
        numbers = known or (0.0, 0.0, 0.0)
        activation_fwd_kernel[(blocks_t * programs_n,)](
            *operands, factor, scalars, *results, *sizes, edge, *numbers, PASS=which, **constants
        )

    def measure(which: str, edge: float = 0.0) -> Tensor:
        partial = torch.empty(blocks_t * programs_n, dtype=torch.float32, device=y0.device)
        launch(which, partial=partial, edge=edge)
        return partial

    if scalars is not None:
        if norm.eps_relative:
            scalars[0] = norm.eps * (measure("square").sum() / y0.numel()).sqrt()
        gain_scalars(measure("peak") if norm.needs_peak else scalars, scalars, norm)
    if important is not None:
        small = measure("count", edge=norm.edge).sum(dtype=torch.float64)
        factor = suppression(small, y0.numel(), important, norm)
    out = y0 if in_place else torch.empty_like(y0, memory_format=torch.contiguous_format)
    kept = torch.empty_like(out, dtype=torch.uint8) if keep else None
    launch("out", out, kept)
    return out, kept, scalars, factor


def backward(
    g: Tensor,
    saved: Tensor,
    z: Tensor,
    rows: Tensor,
    terms: Terms,
    found: Measured,
    norm: Norm,
    needs: list[bool],
    h_alone: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(∂y0, ∂P, ∂δb)``, None where not needed; 1/M from ``saved`` itself where that is uint8.

    With ``h_alone`` (gated and without f, so that dbase is g) h ``[T, m]`` stands in ∂y0's place.
    """
    g = unit_stride(g)
    y0, kept = (None, saved) if saved.dtype == torch.uint8 else (unit_stride(saved), None)
    p, p_base, delta_bias, z_scale = terms
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    factor, known = found.factor if norm.restrained else None, norm.known
    scalars = None if known else found.scalars
    (t, n), averaged, limits = g.shape, norm.averaged, limits_of(g)
    ops = Operands(z, terms)
    in_registers = needs[0] and tiles.in_registers(ops.m_rows) and g.dtype != torch.float32
    multiplies = needs[0] and not in_registers
    chunks = [(slice(0, t), slice(0, n))]
    if reads_change := needs[1] or multiplies:
        chunks = list(plan.change_blocks(t, n, g.element_size(), multiplies))
    tokens, columns = (part.stop for part in chunks[0])
    is_aligned = aligned(n, g.stride(0), n if y0 is None else y0.stride(0))
    tile = tiles.backward_tile(
        limits, g.dtype, ops.m_rows, p_base is not None, y0 is None, is_aligned
    )

    dbase = g.new_empty(t, n) if needs[0] and not h_alone else None
    halves = averaged and dbase is not None
    workspace = g.new_empty(tokens * columns) if reads_change and not halves else None
    programs, blocks_n = cdiv(tokens, tile["BLOCK_T"]), cdiv(columns, tile["BLOCK_N"])
    split = plan.splits(programs, blocks_n, limits.processors)
    parts = split if in_registers else 1
    h = g.new_empty(parts, t, ops.m, dtype=torch.float32) if needs[0] else None
    dp = g.new_empty(p.shape, dtype=torch.float32) if needs[1] else None
    dbias = g.new_zeros(n, dtype=torch.float32) if needs[2] else None
    by_token = *ops.by_token, None if z_scale is None else padded(z_scale)
    by_column = *ops.by_column, delta_bias, factor
    strides = g.stride(0), 0 if y0 is None else y0.stride(0), n
    constants = _constants(tile, g.dtype, norm) | {"HAS_H": in_registers}

    for at, part in chunks:
        width_t, width_n = at.stop - at.start, part.stop - part.start
        programs, blocks_n = cdiv(width_t, tile["BLOCK_T"]), cdiv(width_n, tile["BLOCK_N"])
        ddelta = None if workspace is None else workspace[: width_t * width_n].view(width_t, -1)
        dbase_part = _part(dbase, at, part)
        sums = g.new_empty(programs, width_n, dtype=torch.float32) if needs[2] else None
        width = cdiv(blocks_n, split) * tile["BLOCK_N"]
        activation_bwd_kernel[(programs, split)](
            *(_part(tensor, at, part) for tensor in (g, y0, kept)),
            *(_part(tensor, at) for tensor in by_token),
            *(_part(tensor, part) for tensor in by_column),
            *(scalars, ddelta, dbase_part, _part(h, slice(None), at), sums),
            *(width_t, width_n, ops.m, part.start, width, t),
            *strides,
            *(known or (0.0, 0.0, 0.0)),
            **constants,
        )
        if dbias is not None and sums is not None:
            dbias[part] += sums.sum(0)
        change: Any = dbase_part if halves else ddelta  # dbase is dΔ doubled
        if dp is not None and at.start == 0:
            product_wide(change.t(), ops.zd[at], out=dp[part])
        elif dp is not None:
            dp[part] += product_wide(change.t(), ops.zd[at])
        if h is not None and multiplies:
            own = product_wide(change, p)
            if halves:
                own *= 0.5
            if z_scale is not None:
                own *= z_scale[at]
            if p_base is not None:
                own += product_wide((g if dbase is None else dbase)[at], p_base)
            h[0, at, : ops.m_rows] = own
    if dp is not None and halves:
        dp *= 0.5
    if h is None:
        return None, dp, dbias
    if dbase is None:
        whole = h[0] if parts == 1 else h.sum(0)
        return whole[:, : ops.m_rows].to(g.dtype), dp, dbias
    add_columns(dbase if averaged else g, None if averaged else factor, h, rows, dbase)
    return dbase, dp, dbias


def _part(tensor: Tensor | None, *index: slice) -> Tensor | None:
    return None if tensor is None else tensor[index]


__all__ = ["Operands", "backward", "forward", "gather"]
