"""The ops a layer is made of, each with the bytes it must move; what ceilings allow a layer.

Inputs count once and outputs once, forward, then backward; the bytes of what is a step of a whole
layer are those of :mod:`secura_kernels.plan` and :mod:`secura_kernels.inspection.costs`.
Operations are not written down here: torch counts them by the kernels' own formulas
(``secura_kernels`` registers them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import NormOptions, kept_weight, plan
from secura_kernels.inspection.costs import channel_norm, over_frozen, projection
from secura_kernels.inspection.examples import Case
from secura_kernels.norm import complete, pack
from secura_kernels.ops.activation.op import activation, activation_backward
from secura_kernels.ops.channel.op import channel
from secura_kernels.ops.common import Terms
from secura_kernels.ops.lowrank.op import lowrank, lowrank_backward
from secura_kernels.ops.project.op import project, project_backward
from secura_kernels.ops.weight.op import merged_weight, normed_weight
from secura_kernels.plan import Shape, Steps, sectors

from .registry import SPACES, Ranks, frozen_linear, secura


class Tensors:
    """Random tensors of one layer, outputs of order 1.

    Attributes:
        shape: the layer's, its itemsize of the weight's dtype.
        x, y0, grad: ``[T, K]``, ``[T, N]``, ``[T, N]``.
        weight: ``W [N, K]``.
        rows, cols: ``[m]`` int64.
        a, b, u: ``A [m, r]``, ``B [r, m]`` and their product, fp32.
        p, q: ``P = C A B [N, m]`` in fp32, and in x's dtype.
        gram, norms: of :func:`secura_kernels.with_norms`.
    """

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        t, n, k, m, _ = self.shape = shape._replace(itemsize=dtype.itemsize)
        case = Case(NormOptions("channel"), dtype, m, t, n, k, inner=min(2 * m, k), biased=False)
        drawn = case.draw(device, 0)
        layer = drawn.layer
        assert layer.weight is not None and drawn.b is not None
        assert layer.gram is not None and layer.base_norms is not None
        self.x, self.grad, self.weight = drawn.x, drawn.grad, layer.weight
        self.rows, self.cols = layer.rows.sort().values, layer.cols.sort().values
        self.a, self.b = drawn.a, drawn.b
        self.u = self.a @ self.b
        self.p = self.weight[:, self.cols].float() @ self.u
        self.q = self.p.to(dtype)
        self.y0 = linear(self.x, self.weight)
        self.gram, self.norms = layer.gram, layer.base_norms


class Op(NamedTuple):
    """Something to time.

    Attributes:
        name: what it is.
        run: the op on a layer's tensors in an implementation.
        back: its backward on what ``run`` gave, or None for what has none.
        moved: the bytes it must move forward and backward in a layer of a shape.
        rate: the ceiling its operations run under: ``gemm_tflop_s`` or ``fp32_tflop_s``.
    """

    name: str
    run: Callable[[Tensors, str], Any]
    back: Callable[[Tensors, str, Any], Any] | None
    moved: Callable[[Shape], tuple[float, float]]
    rate: str = "fp32_tflop_s"

    def calls(self, data: Tensors, impl: str) -> dict[str, Callable[[], Any]]:
        """``{"forward"}``, and ``"both"`` where it has a backward: what to time."""
        run, back = self.run, self.back

        def forward() -> Any:
            return run(data, impl)

        if back is None:
            return {"forward": forward}
        return {"forward": forward, "both": lambda: back(data, impl, run(data, impl))}

    def floors_us(
        self, calls: dict[str, Callable[[], Any]], data: Tensors, ceilings: dict[str, float]
    ) -> dict[str, float]:
        """The least microseconds of each of its calls, by bytes or by operations."""
        forward, backward = self.moved(data.shape)
        moved, floors = {"forward": forward, "both": forward + backward}, {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            flop = counter.get_total_flops()
            by_bytes = moved[name] / ceilings["copy_gb_s"] / 1e3
            floors[name] = max(by_bytes, flop / ceilings[self.rate] / 1e6)
        return floors


def _bytes(steps: Steps) -> float:
    return sum(step.bytes for step in steps.values())


def _merged(seed: int | None) -> Callable[[Tensors, str], Tensor]:
    return lambda d, impl: merged_weight(d.weight, d.rows, d.p, None, d.weight.dtype, seed, impl)


def _normed(data: Tensors, impl: str) -> Tensor:
    norm, dtype = pack(NormOptions("weight")), data.weight.dtype
    return normed_weight(data.weight, data.rows, data.p, None, None, norm, dtype, None, impl)


def _channel(form: str) -> Op:
    norm = pack(NormOptions("channel", form))
    return Op(
        f"channel: Q of P, {form}",
        lambda d, impl: channel(d.p, None, d.gram, d.norms, None, norm, d.weight.dtype, impl),
        lambda d, impl, found: d.p * found[2][:, None],
        lambda shape: (_bytes(channel_norm(shape)), 8 * shape.n * shape.m),
    )


def _activation(save: str) -> Op:
    keep, norm = save == "8bit", pack(NormOptions("activation"))

    def forward(d: Tensors, impl: str) -> Any:
        return activation(d.y0, None, None, d.rows, None, Terms(d.q), None, norm, keep, impl)

    def backward(d: Tensors, impl: str, found: Any) -> Any:
        _, z, _, kept, *measured = found
        saved = kept if keep else d.y0
        needs = [True, True, False]
        return activation_backward(
            d.grad, saved, z, None, d.rows, Terms(d.q), measured, norm, needs, impl
        )

    def moved(shape: Shape) -> tuple[float, float]:
        t, n, _, m, s = shape
        saved = (1 if keep else s) * t * n
        return (
            _bytes(plan.out_by_output(shape)) + keep * t * n,
            2 * s * t * n + saved + sectors(t, n, m, s) + s * m * (t + n),
        )

    return Op(f"activation: norm of y0, {save}", forward, backward, moved, "gemm_tflop_s")


def _added(d: Tensors, impl: str) -> Any:
    return lowrank(d.y0, None, None, d.rows, d.q, [None] * 4, True, False, None, impl)


def _added_back(d: Tensors, impl: str, found: Any) -> Any:
    needs = [True, True, False]
    return lowrank_backward(d.grad, found[1], None, d.rows, d.q, None, None, needs, impl)


def _added_moved(shape: Shape) -> tuple[float, float]:
    t, n, _, m, s = shape
    backward = 3 * s * t * n + sectors(t, n, m, s) + s * m * (t + n) + 4 * n * m
    return _bytes(plan.out_by_output(shape)), backward


def _weight_moved(times: int) -> Callable[[Shape], tuple[float, float]]:
    return lambda shape: (times * shape.itemsize * shape.n * shape.k, 0)


OPS = (
    Op(
        "A B",
        lambda d, impl: d.a @ d.b,
        lambda d, impl, u: (u @ d.b.t(), d.a.t() @ u),
        lambda shape: (20 * shape.m**2, 36 * shape.m**2),
    ),
    Op(
        "P = C U",
        lambda d, impl: project(d.weight, d.cols, d.u, torch.float32, impl),
        lambda d, impl, p: project_backward(p, d.weight, d.cols, None, impl),
        lambda shape: (_bytes(projection(shape, 4)),) * 2,
    ),
    _channel("calibrated"),
    _channel("paper"),
    Op(
        "none: thin product added to y0",
        _added,
        _added_back,
        _added_moved,
        "gemm_tflop_s",
    ),
    _activation("recompute"),
    _activation("8bit"),
    Op("none: W' to nearest", _merged(None), None, _weight_moved(2)),
    Op("none: W' rounded stochastically", _merged(0), None, _weight_moved(2)),
    Op("weight: W'", _normed, None, _weight_moved(3)),
)
"""The thin launches that stand between a layer and its floor, the norms on a given y0, and W'."""


def allowed_ratio(name: str, shape: Shape, ceilings: dict[str, float]) -> float | None:
    """What a machine's ceilings allow a SECURA layer in bf16, over the frozen layer's time.

    Args:
        name: a provider's; None is returned for one that is not SECURA's.
        shape: the layer's.
        ceilings: ``copy_gb_s`` and ``gemm_tflop_s``.
    """
    space = next((space for space in SPACES if name.startswith(f"secura {space}")), None)
    if space is None:
        return None
    chip = plan.Ceilings(ceilings["copy_gb_s"] * 1e9, ceilings["gemm_tflop_s"] * 1e12)
    norm = complete(NormOptions(space))
    return over_frozen(shape, norm, kept_weight.keeps_weight(), chip)


def every_op_once() -> None:
    """Run every op's and layer's kernels, forward and backward, on shapes that fill no block."""
    for m in (5, 64):
        for dtype in (torch.bfloat16, torch.float32):
            data = Tensors(Shape(67, 131, 77, m), "cuda", dtype)
            for op in OPS:
                if dtype == torch.bfloat16 or "stochastically" not in op.name:
                    for call in op.calls(data, "triton").values():
                        call()
            for space in SPACES:
                provider = secura(space, "triton")
                layer = provider.build(frozen_linear(data.weight), Ranks(m, m))
                with provider.running():
                    layer(data.x.clone().requires_grad_()).backward(data.grad)
    torch.cuda.synchronize()
