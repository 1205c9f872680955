"""What a layer's steps cost by bytes and operations, and every choice that is made of it.

A choice compares the ways to one result by the time that a chip's ceilings allow them: each step at
its bytes over the chip's bytes a second or its operations over the chip's operations a second,
whichever is longer. Ceilings are parameters: a choice is a function of a layer's shape and a chip.

| choice                       | ways                               | made by                 |
|------------------------------|------------------------------------|-------------------------|
| forward of `none`, `channel` | through y0, or through W' and x Rᵀ | :func:`takes_weight`    |
| their ∂x                     | g W', h R + g W or ∂y0 W           | :func:`input_way`       |
| ∂x of `activation`           | ∂y0 W, or h R + g W                | :func:`adds_h`          |
| its dΔ, of which ∂P is made  | blocks of tokens and columns       | :func:`change_blocks`   |
| gᵀx of `weight`, the same    | blocks of W's rows                 | :func:`rows_of_chunk`   |
| programs on a row of tiles   | how many                           | :func:`splits`          |

Counted are tensors that go through memory, inputs once and outputs once, and of scattered columns
the 32-byte sectors that they lie in. Not seen by a count: the gaps between launches, how many of a
chip's multiprocessors a launch fills, what stays in the L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .gpu import H100
from .norm import Norm

SECTOR_BYTES = 32
MOST_SPLITS = 8
CHANGE_MIB = 64
"""Workspace of dΔ, of which ∂P is made."""
CHUNK_MIB, SMALL_MIB = 32, 2
"""Workspace of gᵀx, and the size of a W that is one chunk."""
MOST_ROW_SPLITS, ROWS_OF_A_SPLIT = 64, 32  # of ∂U's sum over W's rows
_ROWS_OF_A_TILE = 128
_ENOUGH_TOKENS = 16384
_STEP = 64  # a block's edges, of which every tile is a divisor
ROWS_OF_A_PROGRAM = 64  # tokens of one that makes h, rows of W of one that makes ∂P


class Ceilings(NamedTuple):
    """The ceilings of a chip.

    Attributes:
        bytes_s: bytes a second of a large copy.
        flop_s: operations a second of a large 16-bit matrix product.
        processors: multiprocessors.
        launch_s: what a launch takes beyond what it moves: choices count it, times do not.
    """

    bytes_s: float
    flop_s: float
    processors: int = H100.processors
    launch_s: float = 2.5e-6  # LoRA's launches in a graph, at T = 512 (benchmarks/LOG.md)


CEILINGS = {"h100": Ceilings(3.0e12, 798e12), "h200": Ceilings(4.3e12, 790e12)}
"""Ceilings as measured."""
DEFAULT = CEILINGS["h100"]  # for others too: the ratio, on which most choices hang, is much alike


@functools.cache
def _ceilings(index: int) -> Ceilings:
    chip = torch.cuda.get_device_properties(index)
    name = chip.name.lower()
    found = next((ceilings for key, ceilings in CEILINGS.items() if key in name), DEFAULT)
    return found._replace(processors=chip.multi_processor_count)


def ceilings_of(tensor: Tensor) -> Ceilings:
    """The ceilings of the GPU that ``tensor`` is on; rates as of an H100 if it is not known."""
    return _ceilings(tensor.get_device()) if tensor.is_cuda else DEFAULT


class Shape(NamedTuple):
    """T tokens, N outputs, K inputs, CUR rank m, bytes an element."""

    t: int
    n: int
    k: int
    m: int
    itemsize: int = 2


@dataclass(frozen=True)
class Cost:
    """Bytes through memory and operations of matrix products; a product and a sum are two."""

    bytes: float = 0.0
    flop: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        """The least that the chip's ceilings allow."""
        return max(self.bytes / ceilings.bytes_s, self.flop / ceilings.flop_s)


Steps = dict[str, Cost]
"""The launches of one way, by what they make, in order."""


def seconds(steps: Steps, ceilings: Ceilings) -> float:
    """The least time of steps that run one after the other."""
    return sum(step.seconds(ceilings) for step in steps.values())


def _price(steps: Steps, ceilings: Ceilings) -> float:
    """What a choice compares: :func:`seconds`, and the launches."""
    return seconds(steps, ceilings) + len(steps) * ceilings.launch_s


def sectors(height: int, width: int, m: int, itemsize: int) -> float:
    """Bytes of the sectors that m random columns of a ``[height, width]`` tensor lie in."""
    count = max(1.0, width * itemsize / SECTOR_BYTES)
    return height * SECTOR_BYTES * count * (1 - (1 - 1 / count) ** m)


def splits(programs: int, blocks: int, processors: int) -> int:
    """In how many parts programs share their blocks of columns: two programs a multiprocessor.

    One alone leaves it idle while it waits for memory. Each part has an h of its own to be added
    up, hence not more than ``MOST_SPLITS``.
    """
    return max(1, min(blocks, MOST_SPLITS, 2 * processors // programs))


def product(shape: Shape) -> Cost:
    """``[T, K] · [K, N]``, or with any two exchanged: s (T K + N K + T N) bytes."""
    t, n, k, _, s = shape
    return Cost(s * (t * k + n * k + t * n), 2 * t * n * k)


def fused_weight(shape: Shape) -> Steps:
    """W' of W, P and R, read where it lies: s (2 N K + m (N + K)) bytes, 2 N K m operations."""
    _, n, k, m, s = shape
    return {"W'": Cost(s * (2 * n * k + m * (n + k)), 2 * n * k * m)}


def gathered_rows(shape: Shape) -> Steps:
    """R, W's rows read and written: 2 s m K bytes."""
    return {"R": Cost(2 * shape.itemsize * shape.m * shape.k)}


def out_by_output(shape: Shape) -> Steps:
    """``z`` gathered from y0, then y0 + z Qᵀ: sectors + s (2 T N + 2 T m + N m) bytes."""
    t, n, _, m, s = shape
    return {
        "z": Cost(sectors(t, n, m, s) + s * t * m),
        "y0 + z Qᵀ": Cost(s * (2 * t * n + t * m + n * m), 2 * t * n * m),
    }


def out_by_weight(shape: Shape) -> Steps:
    """W' before the product, and ``z = x Rᵀ``: W', R and s (T K + T m + m K) bytes."""
    t, _, k, m, s = shape
    z = {"z": Cost(s * (t * k + t * m + m * k), 2 * t * k * m)}
    return fused_weight(shape) | gathered_rows(shape) | z


def parts_of_h(shape: Shape, ceilings: Ceilings) -> int:
    """In how many parts h ``[T, m]`` is made."""
    return splits(-(-max(1, shape.t) // ROWS_OF_A_PROGRAM), MOST_SPLITS, ceilings.processors)


def summed_h(shape: Shape, ceilings: Ceilings = DEFAULT) -> Steps:
    """h of its parts, and in the compute dtype."""
    t, _, _, m, s = shape
    parts = parts_of_h(shape, ceilings)
    return {"h": Cost((4 * (parts + 1) * (parts > 1) + 4 + s) * t * m)}


def output_gradient(shape: Shape, ceilings: Ceilings = DEFAULT) -> Steps:
    """``∂y0`` of g and Q: 2 s T N + s N m, h in its parts, three times the sectors of m columns.

    A column is read from g, and an element written alone has its sector read and written.
    """
    t, n, _, m, s = shape
    h = 4 * parts_of_h(shape, ceilings) * t * m
    return {
        "∂y0": Cost(s * (2 * t * n + n * m) + h, 2 * t * n * m),
        "its columns": Cost(3 * sectors(t, n, m, s) + h),
    }


def added_h(shape: Shape) -> Steps:
    """``h R + g W``, h at hand: R, h R written, and the product, which reads it as its addend."""
    t, _, k, m, s = shape
    g_w = product(shape)
    return gathered_rows(shape) | {
        "h R": Cost(s * (t * m + m * k + t * k), 2 * t * k * m),
        "product": Cost(g_w.bytes + s * t * k, g_w.flop),
    }


def input_ways(
    shape: Shape, per_token: bool = False, scaled: bool = False, ceilings: Ceilings = DEFAULT
) -> dict[str, Steps]:
    """The ways to ∂x of an additive layer, products and all.

    R is gathered for W' in plain torch, which chooses by this too; a kernel reads it in W.

    Args:
        shape: the layer's.
        per_token: whether z has a scale for each token (dropout): each then has a W' of its own.
        scaled: whether the base has a scale of its own, so that g itself is not ∂y0.
        ceilings: the chip's.
    """
    t, n, _, m, s = shape
    whole, ways = {"product": product(shape)}, {}
    if not per_token:
        ways["weight"] = gathered_rows(shape) | fused_weight(shape) | whole
    if not scaled:
        h = Cost(s * (t * n + n * m + t * m), 2 * t * n * m)
        ways["h"] = {"h": h} | added_h(shape)
    return ways | {"output": output_gradient(shape, ceilings) | whole}


@functools.lru_cache(4096)
def input_way(
    shape: Shape, per_token: bool = False, scaled: bool = False, ceilings: Ceilings = DEFAULT
) -> str:
    """Which of :func:`input_ways` is the quickest: ``"weight"``, ``"h"`` or ``"output"``.

    At m = 128 in 16 bits and K = N = 4096 that is W' from T = 3528 tokens on, h R + g W from 614
    on, and ∂y0 W below.
    """
    ways = input_ways(shape, per_token, scaled, ceilings)
    return min(ways, key=lambda way: _price(ways[way], ceilings))


@functools.lru_cache(4096)
def takes_weight(shape: Shape, kept: bool = False, ceilings: Ceilings = DEFAULT) -> bool:
    """Whether the kernels' forward of an additive layer goes through W' rather than through y0.

    Args:
        shape: the layer's.
        kept: whether W' is kept for the backward pass, which then has but a product for ∂x.
        ceilings: the chip's.
    """
    by_weight, by_output = (_price(way(shape), ceilings) for way in (out_by_weight, out_by_output))
    if kept:
        by_weight += _price({"product": product(shape)}, ceilings)
        by_output += min(
            _price(way, ceilings) for way in input_ways(shape, ceilings=ceilings).values()
        )
    return by_weight < by_output


def base_gradient(shape: Shape, ceilings: Ceilings = DEFAULT) -> Steps:
    """``∂y0 W`` of `activation`: ∂y0 written, its columns added, the product."""
    t, n, _, _, s = shape
    columns = output_gradient(shape, ceilings)["its columns"]
    return {"∂y0": Cost(s * t * n), "its columns": columns, "product": product(shape)}


@functools.lru_cache(4096)
def adds_h(shape: Shape, norm: Norm, ceilings: Ceilings = DEFAULT) -> bool:
    """Whether ∂x of `activation` is h R + g W rather than ∂y0 W.

    Only where ∂base is g itself: gated, without the restraint's factor.
    """
    if norm.averaged or norm.restrained:
        return False
    added = summed_h(shape, ceilings) | added_h(shape)
    return _price(added, ceilings) <= _price(base_gradient(shape, ceilings), ceilings)


def change_blocks(t: int, n: int, itemsize: int, whole_rows: bool) -> Iterator[tuple[slice, slice]]:
    """``(tokens, columns)``: the blocks of a [T, N] tensor that ``CHANGE_MIB`` holds, in order.

    The first is the largest. ``whole_rows`` asks for all columns of fewer tokens.
    """
    size = CHANGE_MIB * 2**20 // itemsize
    tokens = max(_STEP, size // n // _STEP * _STEP) if whole_rows else _ENOUGH_TOKENS
    columns = n if whole_rows else max(_STEP, size // min(t, tokens) // _STEP * _STEP)
    for start in range(0, t, tokens):
        for first in range(0, n, columns):
            yield slice(start, min(t, start + tokens)), slice(first, min(n, first + columns))


def rows_of_chunk(n: int, k: int, itemsize: int) -> int:
    """Rows of W in a chunk of gᵀx: within ``CHUNK_MIB``, whole tiles, at most half of W.

    A W of at most ``SMALL_MIB`` is one chunk: three launches less, where they are what takes time.
    """
    if n * k * itemsize <= SMALL_MIB * 2**20:
        return max(1, n)
    most = max(1, CHUNK_MIB * 2**20 // max(1, k * itemsize))
    chunks = max(2, -(-n // most))
    rows = max(1, -(-n // chunks))
    whole_tiles = -(-rows // _ROWS_OF_A_TILE) * _ROWS_OF_A_TILE
    return whole_tiles if whole_tiles <= min(most, n - 1) else min(rows, most)


__all__ = [
    "CEILINGS",
    "CHANGE_MIB",
    "CHUNK_MIB",
    "DEFAULT",
    "MOST_ROW_SPLITS",
    "MOST_SPLITS",
    "ROWS_OF_A_PROGRAM",
    "ROWS_OF_A_SPLIT",
    "SMALL_MIB",
    "Ceilings",
    "Cost",
    "Shape",
    "Steps",
    "added_h",
    "adds_h",
    "base_gradient",
    "ceilings_of",
    "change_blocks",
    "fused_weight",
    "gathered_rows",
    "input_way",
    "input_ways",
    "out_by_output",
    "out_by_weight",
    "parts_of_h",
    "product",
    "rows_of_chunk",
    "seconds",
    "sectors",
    "splits",
    "summed_h",
    "takes_weight",
]
