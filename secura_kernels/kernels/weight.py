"""Space ``weight`` on the GPU: W' in one pass over W, and ∂P without ∂W.

    base = W + P_base R      Δ = P R      R = W[rows]      1/M from ρ = |Δ| / (|base| + ε)
    W' = (2 base + Δ)/M · f   or   (base + Δ/M) · f        f: the restraint's factor of a row
    ∂P = D Rᵀ,  D = (f/M) · (gᵀ x)

| tensor    | shape  | dtype                                                       |
|-----------|--------|-------------------------------------------------------------|
| W         | [N, K] | its own, any strides; W' in the compute dtype, W's layout   |
| P, P_base | [N, m] | cast once to the compute dtype, which the dots multiply in  |
| R         | [m, K] | read through ``rows`` from W where K is W's unit stride     |
| x, g      | [T, K] [T, N] | compute dtype                                        |
| D         | [chunk, K]    | compute dtype, at most ``WORKSPACE_MIB``             |
| ∂P, scalars, factor | [N, m] [3] [N] | fp32                                      |

Accumulators, ρ and M are fp32. Nothing is saved but the three scalars (ε, slope, offset) and the
factors; base, Δ and M are rebuilt.

Floors, with w bytes an entry of W and of the compute dtype each, and N·m, m·K ≪ N·K:

- W': 2w·N·K bytes (W in, W' out) and 2·N·K·m operations, three times that when folded.
  ``paper`` and ``released`` add a pass of w·N·K bytes and the same operations for the largest ρ,
  the restraint another. Every tile also reads its blocks of P and R from L2:
  w·(m/BLOCK_K + m/BLOCK_N) bytes an entry.
- ∂P, row chunks (this file): gᵀx 2·T·N·K operations by cuBLAS, the gain's 2·N·K·m and the
  contraction's 2·N·K·m; bytes of g + x per chunk + 5w·N·K, of which 4w·N·K (D written, read and
  rewritten by the division, read by the contraction) stay in L2 where a chunk fits there.
- ∂P in one kernel would save those 4w·N·K bytes, move gᵀx's operations from cuBLAS into Triton and
  need 4·splits·N·m bytes of partial sums to stay deterministic. At T = 8192 and 200 operations a
  byte the bytes are a tenth of gᵀx's time if none of them stays in L2, so it pays only where
  Triton's product comes closer than that to cuBLAS. Not written.

Deterministic: tile maxima, sums and counts are written to their own places; one program of
``weight_scalars_kernel`` turns the maxima into slope and offset, torch adds the rest.
Source: DESIGN sections 4 and 6.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..additive import product_wide
from ..gain import (
    Restrain,
    effective_eps,
    needs_peak,
    restrained,
    sigmoid_weight,
)
from .aot import Config
from .common import block_of, dot_precision
from .weight_jit import (
    weight_bwd_kernel,
    weight_fwd_kernel,
    weight_scalars_kernel,
    weight_stat_kernel,
)

WORKSPACE_MIB = 16
_ROWS_OF_A_TILE = 128

BLOCKS_16BIT = {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}
STAT_STAGES = 3  # with 2, sm_100's largest-ρ pass spills
BLOCKS_32BIT = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}


class Tiles:
    """W, R and P as the kernels take them, and the arguments that every launch shares.

    Args:
        weight: ``W [N, K]`` or a slice of its rows.
        source: where R's rows are read: the whole W with ``rows``, or ``R [m, K]`` with None.
        rows: ``[m]`` int64 or None.
        p: ``P [N, m]`` of the same rows as ``weight``.
        p_base: :func:`parts` of P_base, of the same rows, or None.
        dtype: the compute dtype.
    """

    def __init__(self, weight, source, rows, p, p_base, dtype: torch.dtype) -> None:
        self.weight = weight
        self.p = p.to(dtype).contiguous()
        self.p_base = p_base
        self.tensors = (weight, source, rows, self.p, self.p_base)
        n, k = weight.shape
        stride_low = 0 if p_base is None else p_base.stride(0)
        self.sizes = (n, k, p.shape[1], *weight.stride(), *source.stride(), stride_low)
        blocks = BLOCKS_32BIT if dtype == torch.float32 else BLOCKS_16BIT
        self.grid = (triton.cdiv(k, blocks["BLOCK_K"]), triton.cdiv(n, blocks["BLOCK_N"]))
        self.options = dict(
            HAS_BASE=p_base is not None,
            GATHER=rows is not None,
            PRECISION=dot_precision(dtype),
            BLOCK_M=block_of(p.shape[1], 16, 32 if dtype == torch.float32 else 64),
            **blocks,
        )

    @classmethod
    def whole(cls, weight, rows, p, p_base, dtype: torch.dtype) -> Tiles:
        """All of W. R is gathered in the kernel, unless its rows are scattered in memory."""
        p_base = parts(p_base, dtype)
        if weight.stride(1) == 1:
            return cls(weight, weight, rows, p, p_base, dtype)
        return cls(weight, weight.index_select(0, rows), None, p, p_base, dtype)


def parts(p_base: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``P_base [N, m]`` as summands ``[1 or 2, N, m]`` in ``dtype``, two where it has 16 bits."""
    if p_base is None:
        return None
    high = p_base.to(dtype)
    if dtype == torch.float32:
        return high.contiguous()[None]
    return torch.stack((high, (p_base - high).to(dtype)))


def measure(
    tiles: Tiles, important: Tensor | None, form: str, combine: str, scale: float, eps: float,
    eps_relative: bool, limits: list[float],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The global part of the norm, on the device: ``([ε, slope, offset], f [N] or None)``."""
    weight = tiles.weight
    scalars = torch.full((3,), eps, dtype=torch.float32, device=weight.device)
    if eps_relative and weight.numel():
        if tiles.p_base is None:
            scalars[0] = effective_eps(weight, eps, True)
        else:
            square = _stat("square", tiles, scalars, form).sum() / weight.numel()
            scalars[0] = eps * square.sqrt()
    peaks = _stat("peak", tiles, scalars, form) if needs_peak(form) else scalars
    with torch.cuda.device_of(weight):
        weight_scalars_kernel[(1,)](peaks, scalars, peaks.numel(), scale, FORM=form, BLOCK=1024)
    if important is None:
        return scalars, None
    restrain = Restrain(important, *limits)
    count = _stat("count", tiles, scalars, form, restrain.edge).sum(dtype=torch.float64)
    return scalars, restrained(count, weight.numel(), restrain)


def _stat(what: str, tiles: Tiles, scalars: Tensor, form: str, edge: float = 0.0) -> Tensor:
    out = scalars.new_empty(tiles.grid[0] * tiles.grid[1])
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(tiles.weight):
        weight_stat_kernel[tiles.grid](
            *tiles.tensors, scalars, out, edge, *tiles.sizes,
            STAT=what, SIGMOID_WEIGHT=sigmoid_weight(form),
            **tiles.options | {"num_stages": STAT_STAGES},
        )  # fmt: skip
    return out


def fused_weight(
    tiles: Tiles,
    scalars: Tensor | None,
    factor: Tensor | None,
    form: str | None,
    combine: str | None,
    dtype: torch.dtype,
    seed: int | None = None,
) -> Tensor:
    """W' ``[N, K]`` in ``dtype`` and W's layout; ``factor · base + Δ`` where ``form`` is None."""
    out = torch.empty_like(tiles.weight, dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(out):
            weight_fwd_kernel[tiles.grid](
                *tiles.tensors, scalars, factor, out, seed or 0, *tiles.sizes, *out.stride(),
                SIGMOID_WEIGHT=sigmoid_weight(form or "paper"), NORMED=form is not None,
                AVERAGED=combine == "averaged", HAS_FACTOR=factor is not None,
                STOCHASTIC=seed is not None, **tiles.options,
            )  # fmt: skip
    return out


def grad_p(
    g: Tensor, x: Tensor, weight: Tensor, rows: Tensor, p: Tensor, p_base: Tensor | None,
    scalars: Tensor, factor: Tensor | None, form: str,
) -> Tensor:  # fmt: skip
    """``∂P = ((f · gᵀx) / M) Rᵀ [N, m]``, fp32, in chunks of W's rows."""
    n, k = weight.shape
    dp = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    if weight.numel() == 0:
        return dp.zero_()
    r, g = weight.index_select(0, rows).to(x.dtype), g.contiguous()
    p, p_base = p.to(x.dtype), parts(p_base, x.dtype)
    step = chunk_rows(n, k, x.element_size())
    workspace = x.new_empty(step, k)
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        d = workspace[: part.stop - start]
        torch.mm(g[:, part].t(), x, out=d)
        base_part = None if p_base is None else p_base[:, part]
        tiles = Tiles(weight[part], r, None, p[part], base_part, x.dtype)
        with torch.cuda.device_of(d):
            weight_bwd_kernel[tiles.grid](
                d, *tiles.tensors, scalars, None if factor is None else factor[part], *tiles.sizes,
                SIGMOID_WEIGHT=sigmoid_weight(form), HAS_FACTOR=factor is not None, **tiles.options,
            )  # fmt: skip
        dp[part] = product_wide(d, r.t())
    return dp


def chunk_rows(n: int, k: int, itemsize: int) -> int:
    """Rows of W in a chunk: within ``WORKSPACE_MIB``, whole tiles, at most half of W."""
    most = max(1, WORKSPACE_MIB * 2**20 // max(1, k * itemsize))
    chunks = max(2, triton.cdiv(n, most))
    rows = max(1, triton.cdiv(n, chunks))
    whole_tiles = triton.cdiv(rows, _ROWS_OF_A_TILE) * _ROWS_OF_A_TILE
    return whole_tiles if whole_tiles <= min(most, n - 1) else min(rows, most)


def _config(kernel, name: str, dtype: str = "bf16", *, folded: bool, **flags) -> Config:
    """A launch of ``kernel`` at m a multiple of 16 and W of ``dtype``, K its unit stride."""
    transposed, compute = flags.pop("transposed", False), flags.pop("compute", dtype)
    blocks = dict(BLOCKS_32BIT if compute == "fp32" else BLOCKS_16BIT)
    warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    measures = kernel is weight_stat_kernel
    stages = STAT_STAGES if measures else stages
    types = {
        "w_ptr": dtype, "r_ptr": dtype, "rows_ptr": "i64", "p_ptr": compute, "p_base_ptr": compute,
        "scalars_ptr": "fp32", "factor_ptr": "fp32", "d_ptr": compute,
        "out_ptr": "fp32" if measures else dtype,
    }  # fmt: skip
    types = {key: f"*{value}" for key, value in types.items()}
    integers = [key for key in kernel.arg_names if key in ("N", "K", "M") or "stride_" in key]
    types |= dict.fromkeys(integers, "i32") | {"edge": "fp32", "seed": "i32"}
    gather = not transposed and kernel is not weight_bwd_kernel
    constexprs = {
        "SIGMOID_WEIGHT": 2.0, "NORMED": True, "AVERAGED": folded, "STOCHASTIC": False,
        "STAT": "peak", "HAS_BASE": folded, "HAS_FACTOR": folded, "GATHER": gather,
        "PRECISION": "ieee" if compute == "fp32" else "tf32",
        "BLOCK_M": 32 if compute == "fp32" else 64, **blocks, "stride_rk": 1,
    } | flags  # fmt: skip
    constexprs |= dict.fromkeys(
        ("stride_wn", "stride_on") if transposed else ("stride_wk", "stride_ok"), 1
    )
    absent = {"rows_ptr": gather, "p_base_ptr": folded, "factor_ptr": folded}
    constexprs |= {key: None for key, present in absent.items() if not present}
    names = kernel.arg_names
    return Config(
        name=f"weight {name} {dtype}{' folded' if folded else ''}",
        kernel=kernel,
        types={key: value for key, value in types.items() if key in names},
        constexprs={key: value for key, value in constexprs.items() if key in names},
        multiples_of_16=tuple(key for key in integers if key not in constexprs),
        num_warps=warps, num_stages=stages,
        wide_stores=0 if measures else 1,
        narrow=None if transposed else 0,
        mma=compute != "fp32",
    )  # fmt: skip


# A folded launch holds a second accumulator, so it bounds the plain one's registers and memory.
CONFIGS = [
    _config(kernel, name, dtype, folded=folded, **flags)
    for kernel, name, dtype, folded, flags in (
        (weight_fwd_kernel, "W'", "bf16", False, {}),
        (weight_fwd_kernel, "W'", "bf16", True, {}),
        (weight_fwd_kernel, "W'", "fp16", True, {}),
        (weight_fwd_kernel, "W'", "fp32", True, {}),
        (weight_fwd_kernel, "W' transposed", "bf16", True, {"transposed": True}),
        (weight_fwd_kernel, "merge", "bf16", True, {"compute": "fp32", "STOCHASTIC": True}),
        (weight_stat_kernel, "largest ρ", "bf16", False, {}),
        (weight_stat_kernel, "largest ρ", "bf16", True, {}),
        (weight_stat_kernel, "small gains", "bf16", True, {"STAT": "count"}),
        (weight_stat_kernel, "largest ρ", "fp32", True, {}),
        (weight_bwd_kernel, "∂W' / M", "bf16", False, {}),
        (weight_bwd_kernel, "∂W' / M", "bf16", True, {}),
        (weight_bwd_kernel, "∂W' / M", "fp32", True, {}),
    )
]
CONFIGS.append(
    Config(
        name="weight slope and offset",
        kernel=weight_scalars_kernel,
        types={"peaks_ptr": "*fp32", "scalars_ptr": "*fp32", "count": "i32", "scale": "fp32"},
        constexprs={"FORM": "paper", "BLOCK": 1024},
        wide_loads=0,
        wide_stores=0,
        mma=False,
    )
)

__all__ = ["CONFIGS", "WORKSPACE_MIB", "Tiles", "chunk_rows", "fused_weight", "grad_p", "measure"]
