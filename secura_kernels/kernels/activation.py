"""Forward of the space ``activation``: one pass over ``y0``; tiles and the compiled table of both.

    base = y0 + z P_baseᵀ    Δ = zd Pᵀ + δb    zd = z · z_scale    1/M = inverse_gain(base, Δ)
    out  = (2 base + Δ) f / M            or  (base + Δ / M) f

| tensor                    | shape    | dtype: in / accumulate / out        |
|---------------------------|----------|-------------------------------------|
| y0, g, out, dΔ, ∂y0       | [T, N]   | bf16, fp16, fp32 / fp32 / the same  |
| z, zd                     | [T, m]   | as y0 / fp32 / as y0                |
| h                         | [T, m]   | fp32                                |
| P, P_base                 | [N, m]   | as y0; ∂P in fp32                   |
| kept (``save="8bit"``)    | [T, N]   | uint8: 255 (2/M − 1), to nearest    |
| eps, slope, offset        | []       | fp32, loaded by pointer             |
| factor f, δb              | [N]      | fp32, any                           |

Bytes, in units of one [T, N] tensor of the compute dtype (64 MiB at T=8192, N=4096, bf16); the
thin tensors add m/N of a unit each, and reading z's scattered columns up to 32 m / (N itemsize):

| step                                     | floor | these kernels                           |
|------------------------------------------|-------|-----------------------------------------|
| forward                                  | 2     | 2 (+ ½ with 8bit in 16-bit dtypes)      |
| `paper`, `released`; `restrain`; rel. ε  | 1     | + 1 read each, before the forward       |
| backward                                 |       | see :mod:`.activation_backward`         |

P is read once a block of tokens, from L2: T N m / BLOCK_T elements, hence tall tiles. Every sum
runs in a fixed order: equal inputs give equal bits on one kind of GPU.

Source: DESIGN sections 3, 4 and 6; SECURA (arXiv 2502.18168).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..gain import NormOptions, Restrain, coefficients, needs_peak, restrained, sigmoid_weight
from .activation_jit import activation_bwd_kernel, activation_fwd_kernel
from .aot import Config
from .common import block_of, dot_precision, unit_stride

LARGEST_M_IN_REGISTERS = 128
_CHUNK = 64
_LARGE_SHARED = 160 * 1024  # A100
_LARGEST_SHARED = 224 * 1024  # H100
_TILES_A_PROGRAM = 8


class Tile(NamedTuple):
    """How a kernel is cut: tokens and columns of a tile, warps of a program, pipeline depth."""

    block_t: int
    block_n: int
    num_warps: int
    num_stages: int


class Machine(NamedTuple):
    """What the choice of a tile depends on: shared memory a program may have, multiprocessors."""

    shared_bytes: int
    processors: int


def forward_tile(machine: Machine, dtype: torch.dtype, m: int, has_base: bool) -> Tile:
    """Tall tiles, for P is read once a block of tokens; fp32 has no matrix instructions."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    if machine.shared_bytes < _LARGE_SHARED:
        return Tile(64, 64, 8, 2)
    if not has_base:
        return Tile(128, 64, 8, 2)  # two programs a multiprocessor
    return Tile(128, 64, 8, 2) if m <= LARGEST_M_IN_REGISTERS else Tile(64, 64, 8, 3)


def backward_tile(
    machine: Machine, dtype: torch.dtype, t: int, m: int, has_base: bool, keeps: bool
) -> Tile:
    """A program owns its tokens for all of N: shorter tiles where there are few tokens."""
    large = machine.shared_bytes >= _LARGE_SHARED
    if dtype == torch.float32:
        return Tile(32, 32 if large else 16, 4, 2)
    if m > LARGEST_M_IN_REGISTERS:
        return Tile(64, 64, 8, 3 if large else 2)
    if 2 * triton.cdiv(t, 64) < machine.processors or (has_base and not large and not keeps):
        return Tile(32, 32, 4, 2)
    if has_base:
        return Tile(64, 32, 8, 2)
    # h's product chains on dΔ, so all warps share 64 rows: more than 4 would repeat the work.
    if machine.shared_bytes >= _LARGEST_SHARED or keeps:
        return Tile(64, 64, 4, 3)
    return Tile(64, 32, 4, 3 if large else 2)


def machine_of(tensor: Tensor) -> Machine:
    """The device of ``tensor``; an H100 for the CPU, where the interpreter runs."""
    return _machine(tensor.device.index if tensor.is_cuda else None)


@functools.cache
def _machine(index: int | None) -> Machine:
    if index is None:
        return Machine(227 * 1024, 132)
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return Machine(shared, properties.multi_processor_count)


def _blocks_m(m: int) -> tuple[int, int]:
    """``(BLOCK_M, CHUNKS)``."""
    if m <= LARGEST_M_IN_REGISTERS:
        return block_of(m, 16, LARGEST_M_IN_REGISTERS), 1
    return _CHUNK, triton.cdiv(m, _CHUNK)


def padded(thin: Tensor | None) -> Tensor | None:
    """``[*, m]`` contiguous with m a multiple of 16, zeros behind: rows then start aligned."""
    if thin is None:
        return None
    short = -thin.shape[1] % 16
    return F.pad(thin, (0, short)) if short else thin.contiguous()


class Operands:
    """The padded thin operands of both kernels."""

    def __init__(self, z, p, p_base, z_scale) -> None:
        self.zd = scaled(z, z_scale)
        self.m_rows = z.shape[1]
        self.block_m, self.chunks = _blocks_m(self.m_rows)
        same = p_base is None or (z_scale is None and self.chunks == 1)
        self.padded = padded(None if same else z), padded(self.zd), padded(p), padded(p_base)
        self.m = self.m_rows + -self.m_rows % 16


def scaled(z: Tensor, z_scale: Tensor | None) -> Tensor:
    """``zd = z · z_scale`` in z's dtype."""
    return z if z_scale is None else (z * z_scale).to(z.dtype)


def forward(
    y0: Tensor,
    z: Tensor,
    p: Tensor,
    p_base: Tensor | None,
    delta_bias: Tensor | None,
    z_scale: Tensor | None,
    options: NormOptions,
    restrain: Restrain | None,
    keep: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """``(out, kept, eps, slope, offset, factor)``; thin tensors in y0's dtype, nothing empty.

    Every measuring pass the options ask for reads y0 once; the last one writes, over a contiguous
    y0 if ``in_place``: a tile is read and written by one program.
    """
    y0 = unit_stride(y0)
    delta_bias = None if delta_bias is None else delta_bias.contiguous()
    t, n = y0.shape
    thin = Operands(z, p, p_base, z_scale)
    machine = machine_of(y0)
    tile = forward_tile(machine, y0.dtype, thin.m_rows, p_base is not None)
    blocks_t, blocks_n = triton.cdiv(t, tile.block_t), triton.cdiv(n, tile.block_n)
    tiles = max(1, blocks_t * blocks_n // (2 * machine.processors))
    tiles = min(_TILES_A_PROGRAM, 2 ** (tiles.bit_length() - 1))
    programs_n = triton.cdiv(blocks_n, tiles)
    form, eps, slope, offset, factor = options.form or "calibrated", None, None, None, None

    def launch(which, out=None, kept=None, partial=None, edge=0.0) -> None:
        activation_fwd_kernel[(blocks_t * programs_n,)](
            y0, *thin.padded, delta_bias, factor, eps, slope, offset, out, kept, partial,
            t, n, thin.m, tiles, programs_n, y0.stride(0), edge,
            PASS=which, AVERAGED=options.combine == "averaged",
            SIGMOID_WEIGHT=sigmoid_weight(form), PRECISION=dot_precision(y0.dtype),
            BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_M=thin.block_m, CHUNKS=thin.chunks,
            STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def measure(which, edge=0.0) -> Tensor:
        partial = torch.empty(blocks_t * programs_n, dtype=torch.float32, device=y0.device)
        launch(which, partial=partial, edge=edge)
        return partial

    if options.eps_relative:
        eps = options.eps * (measure("square").sum() / y0.numel()).sqrt()
    else:
        eps = torch.full((), options.eps, dtype=torch.float32, device=y0.device)
    peak = measure("peak").amax() if needs_peak(form) else None
    slope, offset = coefficients(form, options.scale, peak, eps)
    if restrain is not None:
        small = measure("count", edge=restrain.edge).sum(dtype=torch.float64)
        factor = restrained(small, y0.numel(), restrain)
    out = y0 if in_place else torch.empty_like(y0, memory_format=torch.contiguous_format)
    kept = torch.empty_like(out, dtype=torch.uint8) if keep else None
    launch("out", out, kept)
    return out, kept, eps, slope, offset, factor


# What the launchers pass, for the ahead-of-time table: every case on the chips that share its tile.
_ROCM = ("gfx942",)
_FAMILIES = (
    (Machine(163 * 1024, 108), ("sm_80",)),
    (Machine(227 * 1024, 132), ("sm_90", "sm_100")),
    (Machine(99 * 1024, 108), ("sm_89", "sm_120")),
    (Machine(64 * 1024, 304), _ROCM),
)
_ALIGNED = ("n", "m", "m_rows", "first", "width", "stride_y0", "stride_g", "stride_out")
_TYPES = {
    **dict.fromkeys(
        ("y0", "g", "z", "zd", "z_scale", "p", "p_base", "out", "ddelta", "dbase"), None
    ),
    **dict.fromkeys(
        ("delta_bias", "factor", "eps", "slope", "offset", "partial", "h", "dbias"), "*fp32"
    ),
    "kept": "*u8",
    "rows": "*i64",
}


def _config(
    name: str, kernel: Any, tile: Tile, targets: tuple[str, ...], m: int, dtype: str, none: str,
    **constexprs: Any,
) -> Config:  # fmt: skip
    block_m, chunks = _blocks_m(m)
    columns = constexprs.get("HAS_H", False) and targets != _ROCM
    columns = columns and not constexprs["AVERAGED"] and "rows" not in none
    absent = {f"{pointer}_ptr": None for pointer in none.split()}
    if targets == _ROCM:
        absent.pop("h_ptr", None)
    return Config(
        f"{name} {dtype} m={m}",
        kernel,
        {f"{name}_ptr": kind or f"*{dtype}" for name, kind in _TYPES.items()}
        | dict.fromkeys(("t", "tiles", "programs_n", *_ALIGNED), "i32") | {"edge": "fp32"},
        absent | constexprs | {
            "COLUMNS": columns,
            "SIGMOID_WEIGHT": 3.0, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "BLOCK_M": block_m, "CHUNKS": chunks,
            "STAGES": tile.num_stages,
        },
        _ALIGNED, tile.num_warps, tile.num_stages,
        wide_stores=int(constexprs.get("PASS", "out") == "out"),
        narrow=tile.block_t * block_m // (16 * tile.num_warps) if columns else 0,
        mma=dtype != "fp32", targets=targets,
    )  # fmt: skip


def _configs() -> Iterator[Config]:
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    forward_cases = (
        ("", 128, "bf16", "z p_base delta_bias factor kept partial", "out", False),
        (" peak", 128, "bf16", "z p_base delta_bias factor kept out slope offset", "peak", False),
        ("", 512, "bf16", "z p_base delta_bias factor kept partial", "out", False),
        (" all", 128, "bf16", "partial", "out", True),
        (" all", 512, "bf16", "partial", "out", True),
        (" all", 128, "fp32", "partial", "out", True),
    )
    thin = "z z_scale p_base delta_bias factor dbase rows dbias"
    backward_cases = (
        ("", 8192, 128, "bf16", "z kept z_scale p_base delta_bias factor h dbias", False),
        (" few tokens", 64, 128, "bf16", "z kept z_scale p_base delta_bias factor h dbias", False),
        (" all", 8192, 128, "bf16", "kept h", False),
        (" averaged all", 8192, 128, "bf16", "kept ddelta", True),
        (" 8bit", 8192, 128, "bf16", "y0 z z_scale p_base delta_bias factor h dbias", False),
        (" averaged 8bit all", 8192, 128, "bf16", "y0 ddelta delta_bias", True),
        (" last chunk all", 8192, 128, "bf16", "kept", False),
        (" thin", 8192, 128, "bf16", f"kept {thin}", False),
        (" thin 8bit", 8192, 128, "bf16", f"y0 {thin}", False),
        (" all", 8192, 512, "bf16", "kept h", False),
        (" all", 8192, 128, "fp32", "kept h", False),
    )
    for machine, targets in _FAMILIES:
        for name, m, dtype, none, which, averaged in forward_cases:
            tile = forward_tile(machine, kinds[dtype], m, "p_base" not in none)
            yield _config(
                f"activation forward{name}", activation_fwd_kernel, tile, targets, m, dtype, none,
                PASS=which, AVERAGED=averaged,
            )  # fmt: skip
        for name, t, m, dtype, none, averaged in backward_cases:
            absent = none.split()
            has_base, keeps = "p_base" not in absent, "kept" not in absent
            tile = backward_tile(machine, kinds[dtype], t, m, has_base, keeps)
            yield _config(
                f"activation backward{name}", activation_bwd_kernel, tile, targets, m, dtype, none,
                AVERAGED=averaged, HAS_H=_blocks_m(m)[1] == 1 and dtype != "fp32",
            )  # fmt: skip


CONFIGS = list(_configs())


__all__ = [
    "CONFIGS",
    "Machine",
    "Operands",
    "backward_tile",
    "forward",
    "forward_tile",
    "machine_of",
    "padded",
]
