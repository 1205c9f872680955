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
from torch.utils._python_dispatch import TorchDispatchMode

from secura_kernels import NormOptions
from secura_kernels.dispatch import resolve
from secura_kernels.inspection.examples import Case
from secura_kernels.plan import CHANGE_MIB, CHUNK_MIB, MOST_SPLITS

from .draws import every_option
from .rule import SHAPES, case_of, check, check_example, check_project

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEVICE_SHAPES = [*SHAPES, (300, 1031, 517, 128), (70, 640, 768, 512), (1024, 512, 256, 64)]
DEVICE_SHAPES += [(9000, 2048, 512, 128)]  # several chunks of dΔ, and N > 2 K
# q and o, k and v, gate and up, down of an 8B Llama: N, K
PROJECTIONS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
MIB = 2**20


def big_enough(gib: float) -> None:
    have = torch.cuda.get_device_properties(0).total_memory / 2**30
    if have < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, has {have:.0f}")


@pytest.fixture(autouse=True)
def emptied(poisoned):
    """Memory that torch keeps is given back after each test."""
    yield
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
    dropout = options.norm in ("channel", "activation")
    flags = {"restrained": True, "dropout": dropout, "folded": "base", "scaling": 0.5}
    check((131, 67, 71, 33), options, dtype, "cuda", **flags)


@pytest.mark.parametrize(
    ("norm", "dropout"), list(product(["none", "channel", "activation"], [False, True]))
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_on_a_given_output(norm, dropout, dtype):
    options = NormOptions(norm, combine="averaged")
    check((131, 67, 71, 33), options, dtype, "cuda", dropout=dropout, given=True)


@every_option
@pytest.mark.parametrize(("n", "k"), PROJECTIONS)
def test_layers_of_an_8b_model(options, n, k):
    big_enough(20)
    check((2048, n, k, 128), options, torch.bfloat16, "cuda")


class Watching(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@every_option
@pytest.mark.parametrize("folded", ["", "base", "change"])
def test_layer_op_is_its_ops(options, folded):
    """The bits of its ops, each through torch's dispatcher, twice and on fresh tensors.

    The second launch of each kernel skips Triton's look-up.
    """
    for shape in ((256, 512, 256, 64), (255, 512, 256, 64), (70, 96, 67, 33)):
        for flags in ({"biased": False}, {"dropout": True, "scaling": 0.5, "inner": 128}):
            case = case_of(shape, options, torch.bfloat16, folded=folded, **flags)
            for seed in (0, 1):
                example = case.draw("cuda", seed)
                first, again = example.run("triton"), example.run("triton")
                with Watching():
                    watched = example.run("triton")
                for others in (again, watched):
                    for got, expected in zip(others, first, strict=True):
                        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@every_option
def test_nan_is_not_hidden(options):
    """What is NaN in U shows in the output and in the gradient of x."""
    example = small(options)
    a = example.a.clone()
    a[:, 7] = torch.nan
    out, dx, *_ = example._replace(a=a).run("triton")
    assert out.isnan().any(dim=0).all() and dx.isnan().any()


@pytest.mark.parametrize("norm", ["none", "activation"])
@pytest.mark.parametrize("t", [70, 2048])
def test_rows_named_twice(norm, t):
    example = case_of((t, 640, 640, 100), NormOptions(norm), torch.bfloat16).draw("cuda")
    rows = example.layer.rows.clone()
    rows[50:] = rows[:50].flip(0)
    check_example(example._replace(layer=example.layer._replace(rows=rows)))


@every_option
def test_layer_op_sees_where_tensors_begin(options):
    """A tensor that begins between two multiples of 16 bytes has compiled code of its own."""
    example = small(options)
    expected = example.run("triton")
    padding = torch.zeros(1, dtype=torch.bfloat16, device="cuda")

    def moved(tensor):
        tensor = torch.cat((padding, tensor.flatten()))[1:].view(tensor.shape)
        assert tensor.data_ptr() % 16
        return tensor

    layer = example.layer._replace(weight=moved(example.layer.weight))
    other = example._replace(x=moved(example.x), grad=moved(example.grad), layer=layer)
    for got, value in zip(other.run("triton"), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=2e-2, atol=2e-2)


def small(options, dtype=torch.bfloat16, shape=(70, 96, 64, 16), **flags):
    return case_of(shape, options, dtype, **flags).draw("cuda")


@every_option
def test_same_bits_twice(options):
    example = small(options, shape=(1024, 1536, 1024, 128), restrained=True)
    first, second = (example.run("triton") for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_option
def test_expanded_and_strided_gradients(options):
    example = small(options)
    for grad in (
        torch.ones((), dtype=torch.bfloat16, device="cuda").expand(70, 96),
        example.grad.t().contiguous().t(),
        example.grad.repeat_interleave(2, 1)[:, ::2],
    ):
        strided = example._replace(grad=grad).run("triton")
        plain = example._replace(grad=grad.contiguous()).run("triton")
        for got, expected in zip(strided, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def leaves_of(example):
    held = {"x": example.x, "a": example.a, "delta_bias": example.delta_bias}
    return {name: leaf.clone().requires_grad_() for name, leaf in held.items()}


def loss_of(example, x, a, delta_bias):
    """A scalar of a layer's output."""
    out = example._replace(x=x, a=a, delta_bias=delta_bias).output("triton")
    weights = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype, device=out.device)
    return (out * weights).sum()


@every_option
def test_partial_gradients(options):
    example = small(options)
    for wanted in ("x", "a", "delta_bias"):
        leaves = {name: leaf.detach() for name, leaf in leaves_of(example).items()}
        leaves[wanted].requires_grad_()
        loss_of(example, **leaves).backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@every_option
def test_autocast(options):
    example = small(options, torch.float32)
    leaves = leaves_of(example)
    with torch.autocast("cuda", torch.bfloat16):
        out = example._replace(**leaves).output("triton")
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, list(leaves.values()), example.grad.bfloat16())
    for grad, wide in zip(grads, example.run("triton")[1:], strict=True):
        assert grad.dtype == torch.float32
        assert (grad - wide).norm() <= 0.05 * wide.norm()


@every_option
def test_offloading_changes_nothing(options):
    example = small(options)
    leaves = leaves_of(example)
    wanted = list(leaves.values())
    expected = torch.autograd.grad(loss_of(example, **leaves), wanted)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = loss_of(example, **leaves)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), expected, rtol=0, atol=0)


@every_option
def test_side_stream(options):
    example = small(options, shape=(1024, 512, 512, 64))
    expected = example.run("triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = example.run("triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_option
def test_cuda_graph(options):
    case = case_of((256, 512, 512, 64), options, torch.bfloat16)
    example = case.draw("cuda")
    leaves = leaves_of(example)

    def step():
        out = example._replace(**leaves).output("triton")
        return out, *torch.autograd.grad(out, list(leaves.values()), example.grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = case.draw("cuda", seed=1)
    with torch.no_grad():
        leaves["x"].copy_(fresh.x)
        leaves["a"].copy_(fresh.a)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@every_option
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(options, backend):
    torch._dynamo.reset()
    example = small(options, shape=(64, 96, 64, 16))
    leaves = leaves_of(example)
    wanted = list(leaves.values())
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(example, **leaves), wanted)
    expected = torch.autograd.grad(loss_of(example, **leaves), wanted)
    for value, reference in zip(got, expected, strict=True):
        assert (value - reference).norm() <= 0.02 * reference.norm() + 1e-6


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_more_elements_than_32_bits_count(norm):
    big_enough(40)
    t, n = 2**17 + 3, 2**14
    flags = {"given": True, "biased": False, "trains_bias": False}
    example = case_of((8, n, 64, 16), NormOptions(norm), torch.bfloat16, **flags).draw("cuda")
    y0 = torch.randn(t, n, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(t, n, dtype=torch.bfloat16, device="cuda")
    last = slice(t - 100, t)

    def both(y, g):
        y = y.requires_grad_()
        out = example._replace(x=y).output("triton")
        return out.detach(), torch.autograd.grad(out, y, g)[0]

    whole = [tensor[last].clone() for tensor in both(y0, grad)]
    part = both(y0.detach()[last].clone(), grad[last].clone())
    for got, expected in zip(whole, part, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


T, N, K, M = 4096, 4096, 4096, 128
OUT, Z, THIN = 2 * T * N, 2 * T * M, 4 * N * M
SLACK = MIB


class Memory:
    """Bytes of one layer's passes, beyond its own tensors.

    Attributes:
        kept: what is kept for the backward pass.
        forward, backward: the peak of each.
    """

    def __init__(self, case: Case) -> None:
        example = case.draw("cuda")
        x, a = example.x.requires_grad_(), example.a.requires_grad_()
        example = example._replace(x=x, a=a)
        tensors = (x, a, *(part for part in example.layer if isinstance(part, torch.Tensor)))
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        out = example.output("triton")
        torch.autograd.grad(out, (x, a), example.grad)
        del out
        start = self.begin()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = example.output("triton")
        self.forward, self.kept = self.peak(start), sum(kept.values())
        start = self.begin()
        torch.autograd.grad(out, (x, a), example.grad)
        self.backward = self.peak(start)

    @staticmethod
    def begin() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    @staticmethod
    def peak(start: int) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start


def memory(options, shape=(T, N, K, M), **flags) -> Memory:
    return Memory(case_of(shape, options, torch.bfloat16, trains_bias=False, **flags))


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_additive_memory(norm):
    found = memory(NormOptions(norm))
    assert found.kept <= Z + 2 * THIN + SLACK
    assert found.forward <= OUT + Z + 3 * THIN + SLACK


@pytest.mark.parametrize(("save", "an_element"), [("recompute", 0), ("8bit", 1)])
def test_activation_memory(save, an_element):
    found = memory(NormOptions("activation"), given=True, save=save, biased=False)
    assert found.kept <= an_element * T * N + 2 * Z + 2 * THIN + SLACK
    assert found.forward <= OUT + an_element * T * N + 2 * Z + 2 * THIN + SLACK


@pytest.mark.parametrize(("save", "an_element"), [("recompute", 2), ("8bit", 1)])
def test_activation_linear_memory(save, an_element):
    """In 8 bits no y0 beside out; gated with N ≥ K neither ∂y0 nor more dΔ than the workspace."""
    options, shape = NormOptions("activation"), (T, N, K // 4, M)
    found = memory(options, shape, save=save, biased=False)
    small = 2 * Z + 2 * THIN + SLACK
    assert found.kept <= an_element * T * N + small
    assert found.forward <= OUT + an_element * T * N + small
    most = 2 * T * K // 4 + CHANGE_MIB * MIB + 4 * Z + 5 * THIN + 4 * SLACK
    assert found.backward <= most


def test_weight_memory():
    found = memory(NormOptions("weight"), biased=False)
    small = 4 * (4 * N * M + 4 * M * K)
    assert found.kept <= small + SLACK
    assert found.forward <= OUT + 2 * N * K + small + SLACK
    parts = 4 * (MOST_SPLITS + 1) * N * M
    chunk = (CHUNK_MIB + 16) * MIB
    assert found.backward <= 2 * T * K + 2 * N * K + chunk + parts + small + SLACK
