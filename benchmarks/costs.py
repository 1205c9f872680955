"""What each method must compute and move at the least, by formula.

Bytes count every operand of a product or pass read once and its result written once, weights
included, thin ``[T, m]`` and ``[N, m]`` tensors left out; ``tn`` is short for T·N elements, and a
product ``abc`` counts 2abc operations. Beyond the frozen layer's ``TNK`` and ``tk nk tn`` each way:

| family         | forward: products  | bytes        | backward: products  | bytes         |
|----------------|--------------------|--------------|---------------------|---------------|
| none, channel  | TNm + Nm²          |              | 2TNm + TKm          |               |
| activation     | TNm + Nm²          | 2tn          | 3TNm (+ TKm)        | 2tn + tn ∧ 2tk|
| weight         | NKm + Nm²          | 2nk          | TNK + 2NKm          | 2nk tk        |
| lora           | TKr + TNr          | tk           | 2TKr + 2TNr         | tk            |
| dora           | NKr                | 2nk          | 2TKr + 2TNr + NKr   | tk tn 2nk     |
| released       | TNK + NKm + Nm²    | 9tn tk 2nk   | 2TNK + 2NKm         | 6tn 2tk 3nk   |

``activation`` writes ∂y0 (tn) or, where K ≤ N, h R and reads it again (2tk and TKm).

They are floors: an implementation that moves more shows it as a small share of the ceilings.
"""

from __future__ import annotations

from typing import NamedTuple

from .shapes import LayerCase


class Work(NamedTuple):
    """Floating-point operations and bytes."""

    flop: float
    bytes: float

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.flop + other.flop, self.bytes + other.bytes)


def work(family: str, case: LayerCase, itemsize: int) -> dict[str, Work]:
    """``{"forward", "backward", "both"}`` of a provider's family, as in the table above."""
    t, n, k, m, r = case.T, case.N, case.K, case.m, case.r
    tn, tk, nk = t * n, t * k, n * k
    gemm, moved = t * n * k, tn + tk + nk
    extra: dict[str, tuple[int, int, int, int]] = {
        "frozen": (0, 0, 0, 0),
        "secura none": (tn * m + n * m * m, 0, 2 * tn * m + tk * m, 0),
        "secura channel": (tn * m + n * m * m, 0, 2 * tn * m + tk * m, 0),
        "secura activation": (
            tn * m + n * m * m,
            2 * tn,
            3 * tn * m + (tk * m if k <= n else 0),
            2 * tn + (2 * tk if k <= n else tn),
        ),
        "secura weight": (nk * m + n * m * m, 2 * nk, gemm + 2 * nk * m, 2 * nk + tk),
        "lora": (tk * r + tn * r, tk, 2 * tk * r + 2 * tn * r, tk),
        "dora": (nk * r, 2 * nk, 2 * tk * r + 2 * tn * r + nk * r, tk + tn + 2 * nk),
        "released": (
            gemm + nk * m + n * m * m,
            9 * tn + tk + 2 * nk,
            2 * gemm + 2 * nk * m,
            6 * tn + 2 * tk + 3 * nk,
        ),
    }
    forward_macs, forward_moved, backward_macs, backward_moved = extra[family]
    forward = Work(2.0 * (gemm + forward_macs), itemsize * float(moved + forward_moved))
    backward = Work(2.0 * (gemm + backward_macs), itemsize * float(moved + backward_moved))
    return {"forward": forward, "backward": backward, "both": forward + backward}


def allowed_ratio(
    name: str, size: tuple[int, int, int, int], ceilings: dict[str, float]
) -> float | None:
    """What a machine's ceilings allow a SECURA layer, as a ratio to the frozen layer's time.

    The bytes of the passes as they are made (the ops' docstrings), at the speed of a copy, beside
    the two products at the speed of a product (``weight``: three); thin products are left out.

    Args:
        name: a provider's; None is returned for one that is not SECURA's.
        size: T, N, K, m.
        ceilings: ``copy_gb_s`` and ``gemm_tflop_s``.
    """
    t, n, k, m = size
    gather, tn, nk = 16 * t * m, t * n, n * k  # a sector of 32 bytes an element, in elements of 2
    additive = 2 * tn + gather + min(2 * nk, 2 * tn + gather) + tn
    passes = {
        "none": additive,
        "channel": additive,
        "activation": 2 * tn + gather + 3 * tn,
        "weight": 3 * nk + 2 * nk + nk,
    }
    space = next((space for space in passes if name.startswith(f"secura {space}")), None)
    if space is None:
        return None
    product_s = 2 * t * n * k / ceilings["gemm_tflop_s"] / 1e12
    moved_s = 2 * passes[space] / ceilings["copy_gb_s"] / 1e9
    products = 3 if space == "weight" else 2
    return (products * product_s + moved_s) / (2 * product_s)


__all__ = ["Work", "allowed_ratio", "work"]
