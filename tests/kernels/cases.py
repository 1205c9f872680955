"""One adapted layer, every op on it, and the error rule, for the interpreter and GPU tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_kernels import (
    Layer,
    NormOptions,
    Restrain,
    activation_linear,
    activation_norm,
    channel_product,
    important_channels,
    lowrank_add,
    lowrank_linear,
    project,
    reference,
    row_norms,
    secura_linear,
    weight_norm_linear,
)

# (T, N, K, m): ones, nothing, primes, more than one block of each dimension, rank above a block;
# rows that start aligned (N, K multiples of 16) and not, which the kernels cut in other tiles
SHAPES = [
    (1, 1, 1, 1),
    (0, 5, 4, 2),
    (7, 13, 11, 4),
    (131, 67, 23, 5),
    (67, 71, 40, 33),
    (16, 64, 64, 64),
    (9, 70, 67, 65),
    (70, 80, 48, 33),
]

FLOORS = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CAPS = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@dataclass
class Case:
    """Tensors of one layer; ``x, p, delta_bias`` are what gradients reach."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    rows: Tensor
    p: Tensor
    p_base: Tensor
    delta_bias: Tensor
    grad: Tensor
    z_scale: Tensor
    restrain: Restrain

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype."""
        values = {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in vars(self).items()
        }
        return Case(**values)


def draw(shape, dtype=torch.float32, device="cpu", seed=0) -> Case:
    """A layer with entries of order 1 and outputs of order 1; P stays fp32, as adapters do."""
    t, n, k, m = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, device=device) * scale

    weight = normal(n, k, scale=k**-0.5).to(dtype)
    rows = torch.randperm(n, generator=generator, device=device)[:m]
    keep = torch.rand(t, m, generator=generator, device=device) > 0.3
    return Case(
        x=normal(t, k).to(dtype),
        weight=weight,
        bias=normal(n).to(dtype),
        rows=rows,
        p=normal(n, m, scale=0.5 * m**-0.5),
        p_base=normal(n, m, scale=0.5 * m**-0.5),
        delta_bias=normal(n, scale=0.3),
        grad=normal(t, n).to(dtype),
        z_scale=(keep / 0.7).to(dtype),
        restrain=Restrain(important_channels(weight, m), 0.3, 1.9, 0.5),
    )


def forward(
    case: Case, options: NormOptions, impl: str | None, x: Tensor, p: Tensor,
    delta_bias: Tensor | None, *, folded=False, biased=True, dropout=False, restrain=False,
    fused=True, **how,
) -> Tensor:  # fmt: skip
    """The op that serves a space on the leaves given; the oracle for ``impl="oracle"``.

    Not ``fused`` means on the output of the frozen layer; ``how`` goes to ``activation`` ops.
    """
    keywords = {
        "p_base": case.p_base if folded else None,
        "delta_bias": delta_bias,
        "restrain": case.restrain if restrain else None,
    }
    if options.norm != "weight":
        keywords["z_scale"] = case.z_scale if dropout else None
    bias = case.bias if biased else None
    if impl == "oracle":
        return reference.linear(x, case.weight, bias, case.rows, p, options, **keywords)
    keywords["impl"] = impl
    if options.norm == "weight":
        return weight_norm_linear(x, case.weight, bias, case.rows, p, options, **keywords)
    if options.norm == "activation":
        keywords |= how
        if fused:
            return activation_linear(x, case.weight, bias, case.rows, p, options, **keywords)
        y0 = linear(x, case.weight, bias)
        return activation_norm(y0, bias, case.rows, p, options, **keywords)
    p_base, limits = keywords.pop("p_base"), keywords.pop("restrain")
    q = p if p_base is None else p + p_base
    if options.norm == "channel":
        gram, norms = row_norms(case.weight, case.rows, p_base)
        q, share = channel_product(p, p_base, gram, norms, options, limits, impl=impl)
        keywords["share"] = share
    if fused:
        return lowrank_linear(x, case.weight, bias, case.rows, q, **keywords)
    return lowrank_add(linear(x, case.weight, bias), bias, case.rows, q, **keywords)


def loss_of(
    case: Case, options: NormOptions, x: Tensor, p: Tensor, delta_bias: Tensor,
    impl: str = "reference",
) -> Tensor:  # fmt: skip
    """A scalar of an op's output."""
    out = forward(case, options, impl, x, p, delta_bias)
    weights = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype, device=out.device)
    return (out * weights).sum()


def run(
    case: Case, options: NormOptions, impl: str | None, *, delta_bias: bool = True, **flags
) -> tuple[Tensor, ...]:
    """Output and gradients (x, P, δb) of :func:`forward`."""
    x, p, db = (leaf.clone().requires_grad_() for leaf in (case.x, case.p, case.delta_bias))
    out = forward(case, options, impl, x, p, db if delta_bias else None, **flags)
    leaves = (x, p, db) if delta_bias else (x, p)
    return out.detach(), *torch.autograd.grad(out, leaves, case.grad.to(out.dtype))


def assert_no_worse(ours, plain, exact, dtype: torch.dtype) -> None:
    """Error against fp64 ≤ 2 × that of plain torch in the same dtype + a floor, under a cap.

    Relative to entries of order 1 at least: what cancels may keep the error of its terms.
    """
    for index, (got, same_dtype, oracle) in enumerate(zip(ours, plain, exact, strict=True)):
        assert got.shape == oracle.shape and not got.isnan().any(), f"tensor {index}"
        scale = oracle.norm().clamp_min(0.3 * oracle.numel() ** 0.5 + 1e-30)
        error = float((got.double() - oracle).norm() / scale)
        yardstick = float((same_dtype.double() - oracle).norm() / scale)
        limit = min(2 * yardstick + FLOORS[dtype], CAPS[dtype])
        assert error <= limit, f"tensor {index}: error {error:.2e}, allowed {limit:.2e}"


def check(shape, options: NormOptions, dtype=torch.float32, device="cpu", **flags) -> None:
    """The Triton op of a space against the oracle, by the error rule."""
    case = draw(shape, dtype, device)
    ours = run(case, options, "triton", **flags)
    plain = run(case, options, "reference", **flags)
    flags.pop("fused", None)
    exact = run(case.to(torch.float64), options, "oracle", **flags)
    assert_no_worse(ours, plain, exact, dtype)
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in plain]


def check_project(n, k, m, dtype, device="cpu", *, seed=0, transposed=False) -> None:
    """``project`` of a ``[n, k]`` weight and its gradient, by Triton, against fp64."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    weight = (draw(k, n).t() if transposed else draw(n, k)).to(dtype)
    cols = torch.randperm(k, generator=generator, device=device)[:m]
    u, dp = draw(m, m) * m**-0.5, draw(n, m) * n**-0.5

    def run(impl):
        leaf = u.clone().requires_grad_()
        p = project(weight, cols, leaf, impl=impl)
        return p.detach(), *torch.autograd.grad(p, leaf, dp)

    columns = weight.double()[:, cols]
    ours, exact = run("triton"), (columns @ u.double(), columns.T @ dp.double())
    assert_no_worse(ours, run("reference"), exact, torch.float32)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 2


def check_layer_op(shape, options: NormOptions, dtype, device="cpu", *, impl, seeds=(0,), **flags):
    """``secura_linear`` against its ops one after the other: the same bits, gradients included.

    ``flags``: folded (``"base"``, ``"change"`` or None), dropout, bias, restrain, scaling.
    """
    for seed in seeds:
        case = draw(shape, dtype, device, seed)
        (_, _, k, m), generator = shape, torch.Generator(device).manual_seed(seed)

        def normal(*size, generator=generator):
            return torch.randn(*size, generator=generator, device=device)

        cols = torch.randperm(k, generator=generator, device=device)[:m]
        core = normal(m, m) / m if flags.get("folded") else None
        is_base = flags.get("folded") == "base"
        p_base = project(case.weight, cols, core) if is_base else None
        gram, norms = row_norms(case.weight, case.rows, p_base)
        layer = Layer(
            case.weight, case.bias if flags.get("bias") else None, case.rows, cols, options,
            flags.get("scaling", 1.0), core, is_base, gram, norms,
            case.restrain if flags.get("restrain") else None, flags.get("save", "recompute"),
        )  # fmt: skip
        a, b = normal(m, 2 * m) / m, normal(2 * m, m) / m
        found = []
        for run_layer in (secura_linear, secura_linear, _composed_layer):
            leaves = [leaf.clone().requires_grad_() for leaf in (case.x, a, b, case.delta_bias)]
            out = run_layer(
                leaves[0], layer, leaves[1], leaves[2],
                delta_bias=leaves[3] if flags.get("bias") else None,
                z_scale=case.z_scale if flags.get("dropout") else None, impl=impl,
            )  # fmt: skip
            wanted = leaves if flags.get("bias") else leaves[:3]
            found.append([out.detach(), *torch.autograd.grad(out, wanted, case.grad)])
        for other in found[:2]:
            for got, expected in zip(other, found[2], strict=True):
                assert got.dtype == expected.dtype
                torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _composed_layer(x, layer, a, b, *, delta_bias, z_scale, impl):
    from secura_kernels.linear import _composed

    return _composed(x, layer, a, b, delta_bias, z_scale, impl)
