"""Every op as a ``torch.library`` operator: opcheck, whole graphs, and autograd's other users."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from secura_kernels import (
    NormOptions,
    activation_dense,
    additive,
    dispatch,
    lowrank_linear,
    project,
)
from secura_kernels.dispatch import interpreting
from secura_kernels.merge import effective_weight

from .cases import draw, loss_of, run

SHAPE = (5, 13, 6, 4)
OPTIONS = [
    NormOptions("none"),
    NormOptions("channel"),
    NormOptions("channel", "paper", "averaged"),
    NormOptions("weight"),
    NormOptions("weight", "calibrated", "gated"),
    NormOptions("activation"),
    NormOptions("activation", "released", "averaged"),
]


def name(options):
    return "-".join(part for part in options[:3] if part)


every_option = pytest.mark.parametrize("options", OPTIONS, ids=name)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of each call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "secura":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded(options, **flags):
    with Recorder() as recorder:
        run(draw(SHAPE), options, "reference", **flags)
    return recorder.calls


@functools.cache
def all_calls():
    calls = []
    for options in OPTIONS[2:4] + OPTIONS[-1:]:
        calls += recorded(options)
        calls += recorded(options, folded=True, biased=False, delta_bias=False, restrain=True)
    calls += recorded(NormOptions("none"), fused=False, dropout=True)
    calls += recorded(NormOptions("channel", "paper", "averaged"), fused=False, dropout=True)
    for fused in (True, False):
        calls += recorded(NormOptions("activation"), folded=True, dropout=True, fused=fused)
    calls += recorded(NormOptions("activation"), save="8bit")
    case = draw(SHAPE, torch.bfloat16)
    with Recorder() as recorder:
        for norm in ("none", "channel", "weight"):
            for stochastic in (True, False):
                effective_weight(
                    case.weight, case.rows, case.p, NormOptions(norm),
                    stochastic_rounding=stochastic, impl="reference",
                )  # fmt: skip
        u = case.p[:4].clone().requires_grad_()
        project(case.weight, case.rows % 6, u).sum().backward()
    return calls + recorder.calls


def test_every_forward_and_backward_operator_passes_opcheck():
    for func, args, kwargs in all_calls():
        detached = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(func, tuple(detached), kwargs)
    seen = {str(func) for func, _, _ in all_calls()}
    ours = {
        f"{operator.replace('::', '.')}.default"
        for operator in torch._C._dispatch_get_all_op_names()
        if operator.startswith("secura::")
    }
    assert ours == seen


@every_option
def test_operators_are_dispatched_only_where_something_watches(options):
    case = draw(SHAPE)
    with torch.autograd.profiler.profile() as profiled:
        alone = run(case, options, "reference")
    assert not [event.name for event in profiled.function_events if "secura::" in event.name]
    with Recorder() as recorder:
        watched = run(case, options, "reference")
    assert recorder.calls
    torch.testing.assert_close(alone, watched, rtol=0, atol=0)


@every_option
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_operations_are_those_of_the_products_within(options, folded, fused, monkeypatch):
    def counted():
        # torch's own table lacks products in place
        in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            for shape in (SHAPE, (29, 13, 6, 4), (5, 13, 29, 4)):
                run(draw(shape), options, "reference", folded=folded, fused=fused)
        return counter.get_total_flops()

    by_formula = counted()
    monkeypatch.setattr(dispatch, "is_watched", lambda *args: False)
    assert by_formula == counted() > 0


@pytest.mark.parametrize("place", [0, 2])
def test_an_operator_that_gets_a_tensor_subclass_is_one(place):
    class Sharded(torch.Tensor):
        pass

    arguments = [torch.ones(1), None, torch.ones(1), 3]
    assert not dispatch.is_watched(*arguments)
    arguments[place] = arguments[place].as_subclass(Sharded)
    assert dispatch.is_watched(*arguments)


def test_fake_tensors_see_the_operator_outside_their_mode():
    mode = FakeTensorMode()
    case = draw(SHAPE)
    fake = [mode.from_tensor(value) for value in (case.x, case.weight, case.rows, case.p)]
    x, weight, rows, p = fake
    assert type(lowrank_linear(x, weight, None, rows, p, impl="triton")) is FakeTensor


@every_option
def test_compiles_whole(options):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=True)
    for rows in (6, 9):
        case = draw((rows, *SHAPE[1:]))
        leaves = [leaf.clone().requires_grad_() for leaf in (case.x, case.p, case.delta_bias)]
        got = torch.autograd.grad(compiled(case, options, *leaves), leaves)
        expected = torch.autograd.grad(loss_of(case, options, *leaves), leaves)
        torch.testing.assert_close(got, expected)
    assert all("torch.ops.secura." in graph for graph in graphs)


class Layer(torch.nn.Module):
    """An adapted layer as a module, for export."""

    def __init__(self, options):
        super().__init__()
        self.options, self.case = options, draw(SHAPE)
        self.p = torch.nn.Parameter(self.case.p)

    def forward(self, x):
        return loss_of(self.case, self.options, x, self.p, self.case.delta_bias)


@every_option
@pytest.mark.filterwarnings("ignore")
def test_exports_whole(options):
    layer = Layer(options)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (layer.case.x,), dynamic_shapes=({0: batch},))
    assert "torch.ops.secura." in program.graph_module.code
    x = layer.case.x[:4]
    torch.testing.assert_close(program.module()(x), layer(x))


def through(options, wrap):
    """Gradients of a layer whose forward and backward run inside ``wrap``."""
    case = draw(SHAPE)
    leaves = [leaf.clone().requires_grad_() for leaf in (case.x, case.p, case.delta_bias)]
    return torch.autograd.grad(wrap(lambda *args: loss_of(case, options, *args), leaves), leaves)


def offloaded(function, leaves):
    with torch.autograd.graph.save_on_cpu():
        return function(*leaves)


def checkpointed(function, leaves):
    return checkpoint(function, *leaves, use_reentrant=False)


@every_option
@pytest.mark.parametrize("wrap", [offloaded, checkpointed])
def test_offloading_and_checkpointing_change_nothing(options, wrap):
    expected = through(options, lambda function, leaves: function(*leaves))
    torch.testing.assert_close(through(options, wrap), expected, rtol=0, atol=0)


@every_option
def test_reentrant_checkpointing_changes_nothing(options):
    case = draw(SHAPE)
    grads = []
    for wrap in (lambda f, *args: f(*args), functools.partial(checkpoint, use_reentrant=True)):
        leaves = [leaf.clone().requires_grad_() for leaf in (case.x, case.p, case.delta_bias)]
        wrap(lambda *args: loss_of(case, options, *args), *leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@every_option
def test_saved_tensors_go_through_hooks_and_are_never_written(options):
    case = draw(SHAPE)
    leaves = [leaf.clone().requires_grad_() for leaf in (case.x, case.p, case.delta_bias)]
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor.clone()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(case, options, *leaves)
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        held = getattr(node, "__dict__", {}).values()
        assert not any(isinstance(value, torch.Tensor) for value in held), node
    torch.autograd.grad(loss, leaves)
    assert saved and all(torch.equal(tensor, copy) for tensor, copy in saved)


def kept_bytes_per_token(dtype=torch.bfloat16, **keywords) -> float:
    """Bytes an op keeps for backward a token, beyond its inputs, from two batch sizes."""
    kept = []
    for t in (64, 128):
        case = draw((t, *SHAPE[1:]), dtype)
        x = case.x.clone().requires_grad_()
        p = case.p.clone().requires_grad_()
        given = {value.untyped_storage().data_ptr() for value in (x, p, case.weight, case.bias)}
        sizes = {}

        def pack(tensor, given=given, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = lowrank_linear(x, case.weight, case.bias, case.rows, p, **keywords)
        kept.append(sum(sizes.values()))
        out.sum().backward()
    return (kept[1] - kept[0]) / 64


@pytest.mark.parametrize("share", [None, torch.rand(SHAPE[1])], ids=["none", "channel"])
def test_additive_spaces_keep_z_alone(share):
    m = SHAPE[3]
    assert kept_bytes_per_token(share=share) == 2 * m


@pytest.mark.parametrize("rebuild", [True, False])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=name)
def test_both_routes_of_the_input_gradient(options, rebuild, monkeypatch):
    monkeypatch.setattr(additive, "rebuilds_weight", lambda t, n, k, z_scale: rebuild)
    case = draw(SHAPE).to(torch.float64)
    for got, exact in zip(
        run(case, options, "reference"), run(case, options, "oracle"), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize(("folded", "dropout"), list(product((True, False), repeat=2)))
def test_both_routes_of_the_input_gradient_of_activation(thin, folded, dropout, monkeypatch):
    monkeypatch.setattr(activation_dense, "adds_thin", lambda n, k, combine, factor: thin)
    case, flags = draw(SHAPE).to(torch.float64), {"folded": folded, "dropout": dropout}
    options = NormOptions("activation", combine="gated")
    for got, exact in zip(
        run(case, options, "reference", **flags), run(case, options, "oracle", **flags), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def test_route_is_the_one_that_moves_fewer_bytes():
    assert additive.rebuilds_weight(8192, 4096, 4096, None)
    assert not additive.rebuilds_weight(512, 4096, 4096, None)
    assert not additive.rebuilds_weight(8192, 4096, 4096, torch.ones(8192, 4))


@pytest.mark.skipif(interpreting(), reason="the interpreter runs kernels on the CPU")
def test_an_implementation_that_cannot_run_is_an_error(monkeypatch):
    case = draw(SHAPE)
    arguments = (case.x, case.weight, None, case.rows, case.p)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        lowrank_linear(*arguments, impl="triton")
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        lowrank_linear(*arguments, impl="cuda")
    monkeypatch.setenv("SECURA_IMPL", "triton")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        lowrank_linear(*arguments)
    monkeypatch.setenv("SECURA_IMPL", "reference")
    assert lowrank_linear(*arguments).shape == case.grad.shape


@every_option
def test_double_backward_says_why(options):
    case = draw(SHAPE)
    x = case.x.clone().requires_grad_()
    loss = loss_of(case, options, x, case.p, case.delta_bias).square()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
