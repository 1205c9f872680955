"""The kernels on a GPU: the interpreter's table and what only a device can show.

``python -m benchmarks.gpu_tests`` runs these with pytest alone, split over processes.
"""

from __future__ import annotations

import os
from itertools import product

# cuBLAS needs it to be deterministic, and reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from secura_kernels import (
    NormOptions,
    activation_linear,
    activation_norm,
    lowrank_add,
    lowrank_linear,
    weight_norm_linear,
)
from secura_kernels.dispatch import resolve

from .cases import (
    SHAPES,
    assert_no_worse,
    check,
    check_layer_op,
    check_project,
    draw,
    forward,
    loss_of,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPTIONS = [
    NormOptions("none"),
    NormOptions("channel"),
    NormOptions("channel", "paper", "averaged"),
    NormOptions("weight"),
    NormOptions("weight", "calibrated", "gated"),
    NormOptions("activation"),
    NormOptions("activation", "released", "averaged"),
]
DEVICE_SHAPES = [*SHAPES, (300, 1031, 517, 128), (70, 640, 768, 512), (1024, 512, 256, 64)]
DEVICE_SHAPES += [(9000, 2048, 512, 128)]  # several chunks of dΔ, and N > 2 K
# q and o, k and v, gate and up, down of an 8B Llama: N, K
PROJECTIONS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
MIB = 2**20


def name(options):
    return "-".join(part for part in options[:3] if part)


every_option = pytest.mark.parametrize("options", OPTIONS, ids=name)


def big_enough(gib: float) -> None:
    have = torch.cuda.get_device_properties(0).total_memory / 2**30
    if have < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, has {have:.0f}")


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated and never written is NaN, and operators without a fixed order raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def test_auto_takes_the_kernels():
    assert resolve("auto", torch.empty(1, device="cuda")) == "triton"


@every_option
@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(options, shape, dtype):
    check(shape, options, dtype, "cuda")


@pytest.mark.parametrize("shape", [(131, 67, 33), (4096, 512, 128), (1100, 600, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_projection(shape, dtype, transposed):
    check_project(*shape, dtype, "cuda", transposed=transposed)


@every_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_with_dropout_and_restraint(options, dtype):
    flags = {"restrain": options.norm != "none", "dropout": options.norm == "activation"}
    check((131, 67, 71, 33), options, dtype, "cuda", folded=True, **flags)


@pytest.mark.parametrize(
    ("norm", "dropout"), list(product(["none", "channel", "activation"], [False, True]))
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_on_a_given_output(norm, dropout, dtype):
    check(
        (131, 67, 71, 33), NormOptions(norm, combine="averaged"), dtype, "cuda",
        dropout=dropout, fused=False,
    )  # fmt: skip


@every_option
@pytest.mark.parametrize(("n", "k"), PROJECTIONS)
def test_layers_of_an_8b_model(options, n, k):
    big_enough(20)
    check((2048, n, k, 128), options, torch.bfloat16, "cuda")


@every_option
@pytest.mark.parametrize("folded", [None, "base", "change"])
def test_layer_op_is_its_ops(options, folded):
    """Twice and on fresh tensors: the second launch of each kernel skips Triton's look-up."""
    for shape in ((256, 512, 256, 64), (255, 512, 256, 64), (70, 96, 67, 33)):
        dropout = options.norm != "weight"
        for flags in ({}, {"bias": True, "dropout": dropout, "scaling": 0.5}):
            check_layer_op(
                shape, options, torch.bfloat16, "cuda", impl="triton", seeds=(0, 1), folded=folded,
                **flags,
            )  # fmt: skip


@every_option
def test_nan_is_not_hidden(options):
    """A row of P that is NaN shows in the output and in the gradient of x."""
    case = draw((64, 96, 64, 16), torch.bfloat16, "cuda")
    case.p[7] = torch.nan
    out, dx, *_ = run(case, options, "triton", delta_bias=False)
    assert out[:, 7].isnan().all() and dx.isnan().any()


@pytest.mark.parametrize("norm", ["none", "activation"])
@pytest.mark.parametrize("t", [70, 2048])
def test_rows_named_twice(norm, t):
    case = draw((t, 640, 640, 100), torch.bfloat16, "cuda")
    case.rows[50:] = case.rows[:50].flip(0)
    ours, plain = (run(case, NormOptions(norm), impl) for impl in ("triton", "reference"))
    exact = run(case.to(torch.float64), NormOptions(norm), "oracle")
    assert_no_worse(ours, plain, exact, torch.bfloat16)


@every_option
def test_layer_op_sees_where_tensors_begin(options):
    """A tensor that begins between two multiples of 16 bytes has compiled code of its own."""
    case = draw((64, 96, 64, 16), torch.bfloat16, "cuda")
    expected = run(case, options, "triton")
    padding = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    for name in ("x", "weight", "grad"):
        tensor = getattr(case, name)
        moved = torch.cat((padding, tensor.flatten()))[1:].view(tensor.shape)
        assert moved.data_ptr() % 16
        setattr(case, name, moved)
    for got, value in zip(run(case, options, "triton"), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=2e-2, atol=2e-2)


@every_option
def test_same_bits_twice(options):
    case = draw((1024, 1536, 1024, 128), torch.bfloat16, "cuda")
    first, second = (run(case, options, "triton", restrain=options.norm != "none") for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_option
def test_expanded_and_strided_gradients(options):
    case = draw((70, 96, 64, 16), torch.bfloat16, "cuda")
    for grad in (
        torch.ones((), dtype=torch.bfloat16, device="cuda").expand(70, 96),
        case.grad.t().contiguous().t(),
        case.grad.repeat_interleave(2, 1)[:, ::2],
    ):
        case.grad = grad
        strided = run(case, options, "triton")
        case.grad = grad.contiguous()
        for got, expected in zip(strided, run(case, options, "triton"), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def leaves_of(case):
    return [leaf.clone().requires_grad_() for leaf in (case.x, case.p, case.delta_bias)]


@every_option
def test_partial_gradients(options):
    case = draw((70, 96, 64, 16), torch.bfloat16, "cuda")
    for index in range(3):
        leaves = [case.x.clone(), case.p.clone(), case.delta_bias.clone()]
        leaves[index].requires_grad_()
        loss_of(case, options, *leaves, "triton").backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(3)]


@every_option
def test_autocast(options):
    case = draw((70, 96, 64, 16), torch.float32, "cuda")
    leaves = leaves_of(case)
    with torch.autocast("cuda", torch.bfloat16):
        out = forward(case, options, "triton", *leaves)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, case.grad.bfloat16())
    expected = run(case, options, "triton")[1:]
    for grad, wide in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - wide).norm() <= 0.05 * wide.norm()


@every_option
def test_offloading_changes_nothing(options):
    case = draw((70, 96, 64, 16), torch.bfloat16, "cuda")
    leaves = leaves_of(case)
    expected = torch.autograd.grad(loss_of(case, options, *leaves, "triton"), leaves)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = loss_of(case, options, *leaves, "triton")
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected, rtol=0, atol=0)


@every_option
def test_side_stream(options):
    case = draw((1024, 512, 512, 64), torch.bfloat16, "cuda")
    expected = run(case, options, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run(case, options, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_option
def test_cuda_graph(options):
    case = draw((256, 512, 512, 64), torch.bfloat16, "cuda")
    leaves = leaves_of(case)

    def step():
        out = forward(case, options, "triton", *leaves)
        return out, *torch.autograd.grad(out, leaves, case.grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = draw((256, 512, 512, 64), torch.bfloat16, "cuda", seed=1)
    with torch.no_grad():
        leaves[0].copy_(fresh.x)
        leaves[1].copy_(fresh.p)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@every_option
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(options, backend):
    torch._dynamo.reset()
    case = draw((64, 96, 64, 16), torch.bfloat16, "cuda")
    leaves = leaves_of(case)
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(case, options, *leaves, "triton"), leaves)
    expected = torch.autograd.grad(loss_of(case, options, *leaves, "triton"), leaves)
    for value, reference in zip(got, expected, strict=True):
        assert (value - reference).norm() <= 0.02 * reference.norm() + 1e-6


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_more_elements_than_32_bits_count(norm):
    big_enough(40)
    t, n, m = 2**17 + 3, 2**14, 16
    case = draw((8, n, 64, m), torch.bfloat16, "cuda")
    y0 = torch.randn(t, n, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(t, n, dtype=torch.bfloat16, device="cuda")
    share = case.bias.abs() if norm == "channel" else None
    last = slice(t - 100, t)

    def both(y, g):
        y = y.requires_grad_()
        p = case.p.clone().requires_grad_()
        if norm == "activation":
            out = activation_norm(y, None, case.rows, p, NormOptions(norm), impl="triton")
        else:
            out = lowrank_add(y, None, case.rows, p, share=share, impl="triton")
        return out.detach(), torch.autograd.grad(out, y, g)[0]

    whole = [tensor[last].clone() for tensor in both(y0, grad)]
    part = both(y0.detach()[last].clone(), grad[last].clone())
    for got, expected in zip(whole, part, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def memory_of(call, x, p, given) -> tuple[int, int]:
    """Bytes an op keeps for backward beyond ``given``, and the forward's peak beyond the start."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    call(x, p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(x, p)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del out
    return sum(kept.values()), peak


T, N, K, M = 4096, 4096, 4096, 128
OUT, Z, THIN = 2 * T * N, 2 * T * M, 4 * N * M
SLACK = MIB


@pytest.mark.parametrize("share", [False, True])
def test_additive_memory(share):
    case = draw((T, N, K, M), torch.bfloat16, "cuda")
    x, p = case.x.requires_grad_(), case.p.requires_grad_()
    shares = case.bias.abs() if share else None

    def call(x, p):
        return lowrank_linear(x, case.weight, None, case.rows, p, share=shares, impl="triton")

    kept, peak = memory_of(call, x, p, (x, p, case.weight, case.rows, case.bias))
    assert kept <= Z + THIN + SLACK
    assert peak <= OUT + Z + THIN + SLACK


@pytest.mark.parametrize(("save", "an_element"), [("recompute", 0), ("8bit", 1)])
def test_activation_memory(save, an_element):
    case = draw((T, N, K, M), torch.bfloat16, "cuda")
    y0, p = case.grad.requires_grad_(), case.p.requires_grad_()

    def call(y0, p):
        return activation_norm(
            y0, None, case.rows, p, NormOptions("activation"), save=save, impl="triton"
        )

    kept, peak = memory_of(call, y0, p, (y0, p, case.rows))
    assert kept <= an_element * T * N + 2 * Z + 2 * THIN + SLACK
    assert peak <= OUT + an_element * T * N + 2 * Z + 2 * THIN + SLACK


@pytest.mark.parametrize(("save", "an_element"), [("recompute", 2), ("8bit", 1)])
def test_activation_linear_memory(save, an_element):
    """In 8 bits no y0 beside out; gated with N ≥ K neither ∂y0 nor more dΔ than the workspace."""
    from secura_kernels.kernels.activation_backward import WORKSPACE_MIB

    case = draw((T, N, K // 4, M), torch.bfloat16, "cuda")
    x, p = case.x.requires_grad_(), case.p.requires_grad_()

    def call(x, p):
        return activation_linear(
            x, case.weight, None, case.rows, p, NormOptions("activation"), save=save, impl="triton"
        )

    kept, peak = memory_of(call, x, p, (x, p, case.weight, case.rows))
    small = 2 * Z + 2 * THIN + SLACK
    assert kept <= an_element * T * N + small
    assert peak <= OUT + an_element * T * N + small
    out = call(x, p)
    grad = torch.randn_like(out)
    torch.autograd.grad(out, (x, p), grad, retain_graph=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, (x, p), grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 2 * T * K // 4 + WORKSPACE_MIB * MIB + 4 * Z + 4 * THIN + 4 * SLACK


def test_weight_memory():
    case = draw((T, N, K, M), torch.bfloat16, "cuda")
    x, p = case.x.requires_grad_(), case.p.requires_grad_()

    def call(x, p):
        return weight_norm_linear(
            x, case.weight, None, case.rows, p, NormOptions("weight"), impl="triton"
        )

    kept, peak = memory_of(call, x, p, (x, p, case.weight, case.rows))
    small = 4 * (4 * N * M + 4 * M * K)
    assert kept <= small + SLACK
    assert peak <= OUT + 2 * N * K + small + SLACK
    out = call(x, p)
    grad = torch.randn_like(out)
    torch.autograd.grad(out, (x, p), grad, retain_graph=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, (x, p), grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 2 * T * K + 2 * N * K + 32 * MIB + small + SLACK
