"""The oracle against the equations written out by hand, entry by entry, in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from secura_kernels import Layer, NormOptions, cur, effective_weight, naive, with_norms
from secura_kernels.inspection.examples import Case
from secura_kernels.norm import (
    COMBINES,
    FORMS,
    Restrain,
    coefficients,
    complete,
    gain,
    restrain_factor,
)

# W [3, 4], rows [0, 2], P [3, 2], x [2, 4]: small enough to check with a pencil
W = np.array([[1.0, -2.0, 0.5, 3.0], [0.25, 4.0, -1.0, 2.0], [-1.5, 0.75, 2.5, -0.5]])
ROWS = [0, 2]
P = np.array([[0.5, -0.25], [0.0, 1.0], [-0.75, 0.125]])
P_BASE = np.array([[0.1, 0.2], [-0.3, 0.05], [0.0, -0.1]])
X = np.array([[1.0, 0.5, -2.0, 0.25], [-0.5, 1.5, 1.0, 2.0]])
BIAS = np.array([0.5, -1.0, 0.25])
DELTA_BIAS = np.array([0.01, -0.02, 0.03])
K_SCALE, EPS = 6.0, 1e-10


def loop_matmul(a, b):
    out = [[0.0] * len(b[0]) for _ in a]
    for i, row in enumerate(a):
        for j in range(len(b[0])):
            for k, value in enumerate(row):
                out[i][j] += value * b[k][j]
    return out


def loop_gain(rho, form):
    """M of a list of lists of ρ, one scalar at a time."""
    flat = [value for row in rho for value in row]
    peak = max(flat)
    gains = []
    for row in rho:
        gains.append([])
        for value in row:
            if form == "calibrated":
                m = 2 - math.tanh(K_SCALE * value / 2)
            elif peak == 0:
                m = 2.0
            else:
                t = K_SCALE * (value / peak - 0.5) if form == "paper" else K_SCALE * value
                m = 2 - 1 / (1 + math.exp(-t))
            gains[-1].append(m)
    return gains


def loop_norm(base, delta, form, combine):
    rho = [
        [abs(d) / (abs(b) + EPS) for b, d in zip(b_row, d_row, strict=True)]
        for b_row, d_row in zip(base, delta, strict=True)
    ]
    out = []
    for b_row, d_row, m_row in zip(base, delta, loop_gain(rho, form), strict=True):
        row = []
        for b, d, m in zip(b_row, d_row, m_row, strict=True):
            row.append((b + (b + d)) / m if combine == "averaged" else b + d / m)
        out.append(row)
    return out


def by_hand(norm, form, combine, folded):
    r = [list(W[i]) for i in ROWS]
    delta_w = loop_matmul(P, r)
    base_w = [list(row) for row in W]
    if folded:
        for row, extra in zip(base_w, loop_matmul(P_BASE, r), strict=True):
            for j, value in enumerate(extra):
                row[j] += value

    def product(x, w):
        return loop_matmul(x, [list(column) for column in zip(*w, strict=True)])

    if norm == "activation":
        base = [[v + b for v, b in zip(row, BIAS, strict=True)] for row in product(X, base_w)]
        delta = [
            [v + b for v, b in zip(row, DELTA_BIAS, strict=True)] for row in product(X, delta_w)
        ]
        return np.array(loop_norm(base, delta, form, combine))
    if norm == "weight":
        fused = loop_norm(base_w, delta_w, form, combine)
    elif norm == "channel":
        lengths = [
            [[math.sqrt(sum(v * v for v in row))] for row in matrix] for matrix in (base_w, delta_w)
        ]
        rho = [[d[0] / (b[0] + EPS)] for b, d in zip(*lengths, strict=True)]
        fused = []
        for b_row, d_row, (m,) in zip(base_w, delta_w, loop_gain(rho, form), strict=True):
            fused.append([
                (2 * b + d) / m if combine == "averaged" else b + d / m
                for b, d in zip(b_row, d_row, strict=True)
            ])  # fmt: skip
    else:
        fused = [
            [b + d for b, d in zip(b_row, d_row, strict=True)]
            for b_row, d_row in zip(base_w, delta_w, strict=True)
        ]
    return np.array(product(X, fused)) + BIAS + DELTA_BIAS


@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_equals_the_equations_by_hand(options, folded):
    tensors = [torch.tensor(value) for value in (X, W, BIAS)]
    out = naive.linear(
        *tensors, torch.tensor(ROWS), torch.tensor(P), options,
        p_base=torch.tensor(P_BASE) if folded else None, delta_bias=torch.tensor(DELTA_BIAS),
    )  # fmt: skip
    form = options.form or "calibrated"
    expected = by_hand(options.norm, form, options.combine or "gated", folded)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12)


def test_known_gains():
    """As docs/design.md has them: 2 at rest, 1.333 from the released jump, limits of each."""
    rho = torch.tensor([0.0, 1e-9, 1.0, 1e9], dtype=torch.float64)
    calibrated = naive.magnitude_gain(rho, "calibrated", 6.0)
    assert calibrated[0] == 2 and calibrated[3] == 1
    released = naive.magnitude_gain(rho, "released", 6.0)
    assert released[0] == 1.5 and released[3] == 1
    paper = naive.magnitude_gain(rho, "paper", 6.0)
    assert paper[3].item() == pytest.approx(2 - 1 / (1 + math.exp(-3)))
    assert paper[0].item() == pytest.approx(2 - 1 / (1 + math.exp(3)))
    for form in FORMS:
        assert (naive.magnitude_gain(torch.zeros(3), form, 6.0) == 2).all()
    base, delta = torch.tensor([3.0]), torch.tensor([1e-12])
    gain = naive.magnitude_gain(delta / base, "released", 6.0)
    assert naive.combine(base, delta, gain, "averaged").item() == pytest.approx(4.0)


class Terms:
    """A small layer in fp64 with P and P_base of its own."""

    def __init__(self, n=13, k=11, m=4, t=7):
        source = torch.Generator().manual_seed(0)
        self.x, self.weight, self.bias, self.delta_bias, self.p, self.p_base = (
            torch.randn(size, generator=source, dtype=torch.float64)
            for size in ((t, k), (n, k), (n,), (n,), (n, m), (n, m))
        )
        self.z_scale = torch.rand(t, m, generator=source, dtype=torch.float64)
        self.rows = torch.randperm(n, generator=source)[:m]


@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_gradcheck_with_the_norm_held_constant(options, folded):
    layer = Terms(5, 6, 3, 3)
    p_base = layer.p_base if folded else None
    fixed = {"p_base": p_base, "z_scale": layer.z_scale, "restrain": None}
    if options.norm == "activation":
        y0 = layer.x @ layer.weight.T + layer.bias
        z = layer.x @ layer.weight[layer.rows].T
        base = y0 if p_base is None else y0 + z @ p_base.T
        delta = (z * layer.z_scale) @ layer.p.T + layer.delta_bias
        rho = naive.relative_change(base, delta, options)
        gain = naive.magnitude_gain(rho, options.form, options.scale)
    elif options.norm == "none":
        gain = None
    else:
        gain = naive.weight_gain(layer.weight, layer.rows, layer.p, options, p_base=p_base)

    def run(x, p, delta_bias):
        return naive.linear(
            x, layer.weight, layer.bias, layer.rows, p, options,
            delta_bias=delta_bias, gain=gain, **fixed,
        )  # fmt: skip

    inputs = [tensor.clone().requires_grad_() for tensor in (layer.x, layer.p, layer.delta_bias)]
    assert torch.autograd.gradcheck(run, inputs)
    if gain is not None:
        free = naive.linear(
            layer.x, layer.weight, layer.bias, layer.rows, layer.p, options,
            delta_bias=layer.delta_bias, **fixed,
        )  # fmt: skip
        torch.testing.assert_close(run(*inputs), free, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("folded", ["", "base", "change"])
@pytest.mark.parametrize("inner", [0, 6])
def test_the_same_functions_as_the_door_are_the_equations_of_p(options, folded, inner):
    example = Case(options, torch.float64, folded=folded, inner=inner, scaling=0.5).draw()
    layer, weight = example.layer, example.layer.weight
    u = example.a if example.b is None else example.a @ example.b
    p, p_base = weight[:, layer.cols] @ (0.5 * u), None
    if folded:
        p_base = weight[:, layer.cols] @ layer.core
    if folded == "change" or (folded and options.norm == "none"):
        p, p_base = p + p_base, None
    arguments = (example.x, weight, layer.bias, layer.rows, p, options)
    expected = naive.linear(*arguments, p_base=p_base, delta_bias=example.delta_bias)
    torch.testing.assert_close(example.output(functions=naive), expected)
    if not options.replaces_product:
        y0 = example.x @ weight.T + layer.bias
        added = example._replace(x=y0, given=True).output(functions=naive)
        torch.testing.assert_close(added, expected)


def test_svd_init_is_the_block_of_the_weight():
    """docs/design.md: the released U[:m] Σ V[:r]ᵀ, computed as released, is W[:m, :r]."""
    weight = torch.randn(20, 14, dtype=torch.float64)
    u, s, v = torch.svd(weight)
    released = u[:6, :] @ torch.diag(s) @ v[:9, :].T
    a = cur.init_a(weight, 6, 9)
    torch.testing.assert_close(a.double(), released, rtol=1e-6, atol=1e-6)
    assert a.dtype == torch.float32


def test_a_parameters_block_is_a_leaf_to_train():
    """As torch's ``nn.Linear`` holds W: else A is part of a graph, and gets no gradient."""
    a = cur.init_a(torch.nn.Linear(8, 6).weight, 4, 3).requires_grad_()
    assert a.is_leaf


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_other_inits_are_seeded(init):
    weight = torch.randn(9, 8)
    draws = [
        cur.init_a(weight, 4, 20, init, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    if init == "orthogonal":
        torch.testing.assert_close(draws[0] @ draws[0].T, torch.eye(4), rtol=1e-5, atol=1e-5)
    else:
        assert 0.9 * 20**-0.5 < draws[0].abs().max() < 20**-0.5  # as nn.Linear's of 20 inputs


def test_identity_makes_u_start_as_b():
    a = cur.init_a(torch.randn(9, 8), 4, 4, "identity")
    b = torch.randn(4, 4)
    assert torch.equal(a @ b, b)


def test_least_norm_takes_the_smallest_by_a_loop():
    weight = torch.randn(17, 12)
    rows, cols = cur.select(weight, 5)
    lengths = sorted((math.fsum(v * v for v in row), i) for i, row in enumerate(weight.tolist()))
    assert rows.tolist() == sorted(i for _, i in lengths[:5])
    lengths = sorted((math.fsum(v * v for v in c), i) for i, c in enumerate(weight.T.tolist()))
    assert cols.tolist() == sorted(i for _, i in lengths[:5])


def test_inverse_sampling_follows_its_distribution():
    weight = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    generator = torch.Generator().manual_seed(0)
    draws = [cur.select(weight, 1, "inverse_sampling", generator)[0].item() for _ in range(3000)]
    expected = np.array([1, 1 / 4, 1 / 16]) / (1 + 1 / 4 + 1 / 16)
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 3000, expected, atol=0.03)


def test_inverse_sampling_is_distinct_and_seeded():
    weight = torch.randn(30, 20)
    first, again, other = (
        cur.select(weight, 20, "inverse_sampling", torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert first[0].unique().numel() == 20
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("norm", ["none", "weight", "channel"])
def test_effective_weight_computes_the_layer(norm):
    flags = {"folded": "base", "restrained": True, "trains_bias": False}
    example = Case(NormOptions(norm), torch.float64, **flags).draw()
    weight = naive.effective_weight(example.layer, example.a)
    out = example.output(functions=naive)
    torch.testing.assert_close(example.x @ weight.T + example.layer.bias, out)


def test_activation_has_no_effective_weight():
    example = Case(NormOptions("activation")).draw()
    with pytest.raises(ValueError, match="not linear in x"):
        naive.effective_weight(example.layer, example.a)


@pytest.mark.parametrize("combine", COMBINES)
def test_restrain_acts_only_where_most_gains_are_small(combine):
    layer = Terms()
    options = NormOptions("channel", "calibrated", combine)
    arguments = (layer.x, layer.weight, layer.bias, layer.rows, layer.p, options)
    free = naive.linear(*arguments) - layer.bias
    gain = naive.weight_gain(layer.weight, layer.rows, layer.p, options)
    edge = float(gain.median())
    share = float((gain <= edge).double().mean())
    important = cur.important_channels(layer.weight, 4)
    assert important.sum() == (13 - 4) // 2
    for percent, acts in ((share - 0.01, True), (share + 0.01, False)):
        restrain = Restrain(important, percent, edge, 0.5)
        out = naive.linear(*arguments, restrain=restrain) - layer.bias
        factor = torch.where(important & acts, 0.5, 1.0)
        torch.testing.assert_close(out, free * factor)


@pytest.mark.parametrize(
    ("weight", "r", "selection", "message"),
    [
        (torch.randn(4, 6), 0, "least_norm", "between 1 and"),
        (torch.randn(4, 6), 5, "least_norm", "between 1 and"),
        (torch.randn(4, 6), 2, "largest", "unknown selection"),
        (torch.full((4, 6), math.nan), 2, "least_norm", "NaN or inf"),
        (torch.full((4, 6), math.inf), 2, "inverse_sampling", "NaN or inf"),
        (torch.eye(4, 6), 2, "inverse_sampling", "column.s. of the weight are zero"),
        (torch.eye(4, 6)[:, [0, 4, 5]], 2, "least_norm", "not zero, fewer than r=2"),
    ],
)
def test_bad_weights_and_ranks(weight, r, selection, message):
    with pytest.raises(ValueError, match=message):
        cur.select(weight, r, selection)


def test_least_norm_passes_over_zero_columns():
    weight = torch.eye(4, 6)
    assert cur.select(weight, 2)[1].tolist() == [0, 1]


def test_bad_inits():
    with pytest.raises(ValueError, match="unknown init"):
        cur.init_a(torch.randn(4, 6), 2, 4, "zeros")
    with pytest.raises(ValueError, match="lower inner_r"):
        cur.init_a(torch.randn(4, 6), 2, 7)


@pytest.mark.parametrize("percent", [0.9, 1.0])
def test_the_restraint_acts_above_its_share_of_gains_up_to_the_edge(percent):
    """Not at it: with a share of 1 never. A gain that is the edge is small."""
    important = torch.tensor([True, False])
    norm = complete(NormOptions("weight"), Restrain(important, percent, 1.5, 0.5))
    small = round(percent * 10)
    for count, factor in ((small, 1.0), (min(10, small + 1), 1.0 if percent == 1 else 0.5)):
        gains = torch.full((10,), 1.75).masked_fill(torch.arange(10) < count, 1.5)
        assert restrain_factor([gains], 10, important, norm).tolist() == [factor, 1.0]


def test_the_papers_gain_is_the_same_however_small_all_changes_are():
    norm = complete(NormOptions("weight", "paper"))
    rho = torch.rand(50)
    whole, tiny = (gain(r, *coefficients(norm, r.max(), r), norm) for r in (rho, rho * 1e-20))
    torch.testing.assert_close(tiny, whole)


@pytest.mark.parametrize(
    ("norm", "settings", "shares"),
    [
        ("weight", {}, (0.51, 0.51, 0.51, 0.51)),
        ("weight", {"eps": 1e-2, "eps_relative": True}, (0.51, 0.51, 0.51, 0.51)),
        ("weight", {"form": "calibrated"}, (0.56, 0.77, 0.96, 0.99)),
        ("channel", {}, (0.51, 0.59, 0.92, 0.99)),
    ],
)
def test_what_passes_of_a_change_is_what_the_page_says(norm, settings, shares):
    """docs/norms.md: on random matrices, at ‖ΔW‖/‖W‖ = 0.01, 0.1, 0.5 and 1."""
    torch.manual_seed(0)
    weight = torch.randn(576, 1536) * 0.02
    rows, cols = cur.select(weight, 64)
    layer = Layer(weight, None, rows, cols, NormOptions(norm, **settings))
    layer = with_norms(layer) if norm == "channel" else layer
    a = torch.randn(64, 64)
    whole = effective_weight(layer._replace(options=NormOptions("none")), a) - weight
    for change, share in zip((0.01, 0.1, 0.5, 1.0), shares, strict=True):
        scale = change * weight.norm() / whole.norm()
        passed = (effective_weight(layer, a * scale) - weight).norm() / (whole.norm() * scale)
        assert float(passed) == pytest.approx(share, abs=0.01)
