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

from secura_kernels import NormOptions, dispatch, effective_weight, plan
from secura_kernels.inspection.examples import Example

from .draws import OPTIONS, SIZES, draw, every_option, every_space, name
from .rule import exactly


class Recorder(TorchDispatchMode):
    """Keeps the arguments of each call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "secura":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@functools.cache
def all_calls():
    lacking = {"folded": "base", "biased": False, "trains_bias": False, "restrained": True}
    cases = [(options, flags) for options in OPTIONS[2:4] + OPTIONS[-1:] for flags in ({}, lacking)]
    for options in (OPTIONS[0], OPTIONS[2], OPTIONS[5]):
        for given in (True, False):
            cases.append((options, {"folded": "base", "dropout": True, "given": given}))
        cases.append((options, {"given": True, "own_z": True}))
    cases.append((OPTIONS[5], {"save": "8bit"}))
    with Recorder() as recorder:
        for options, flags in cases:
            draw(options, **flags).run("reference")
        for options in (OPTIONS[0], OPTIONS[1], OPTIONS[3]):
            example = draw(options, dtype=torch.bfloat16)
            for seed in (1, None):
                layer = example.layer._replace(rounding_seed=seed)
                effective_weight(layer, example.a, example.b, impl="reference")
                example._replace(layer=layer).run("reference")
    return recorder.calls


def detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return [detached(part) for part in value] if isinstance(value, list | tuple) else value


def kind(value):
    """What opcheck can tell from another: a tensor's shape, dtype and strides, else the value."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.stride()
    return tuple(map(kind, value)) if isinstance(value, list | tuple) else value


def test_every_forward_and_backward_operator_passes_opcheck():
    kinds = {(str(func), kind(args)): (func, args, kwargs) for func, args, kwargs in all_calls()}
    for func, args, kwargs in kinds.values():
        torch.library.opcheck(func, tuple(map(detached, args)), kwargs)
    seen = {str(func) for func, _, _ in all_calls()}
    ours = {
        f"{operator.replace('::', '.')}.default"
        for operator in torch._C._dispatch_get_all_op_names()
        if operator.startswith("secura::")
    }
    assert ours == seen


def test_no_operator_takes_more_than_ten_arguments():
    operators = {func for func, _, _ in all_calls()}
    assert len(operators) == 11
    assert max(len(func._schema.arguments) for func in operators) <= 10


@every_option
@pytest.mark.parametrize("given", [False, True])
def test_operators_are_dispatched_only_where_something_watches(options, given):
    if given and options.norm == "weight":
        pytest.skip("the space takes no y0")
    example = draw(options, given=given, folded="base", scaling=0.5)
    with torch.autograd.profiler.profile() as profiled:
        alone = example.run("reference")
    assert not [event.name for event in profiled.function_events if "secura::" in event.name]
    with Recorder() as recorder:
        watched = example.run("reference")
    assert recorder.calls
    torch.testing.assert_close(alone, watched, rtol=0, atol=0)


def test_no_byte_of_the_gain_is_kept_where_no_backward_pass_follows():
    example = draw(OPTIONS[5], save="8bit")
    for context, kept in ((torch.enable_grad, True), (torch.no_grad, False)):
        with context(), Recorder() as recorder:
            example.output("reference")
        (taken,) = (args for func, args, _ in recorder.calls if "activation" in str(func))
        assert [arg for arg in taken if isinstance(arg, bool)] == [kept]


def test_fake_tensors_see_the_operator_outside_their_mode():
    mode, example = FakeTensorMode(), draw(NormOptions("none"), biased=False)
    layer, fake = example.layer, mode.from_tensor
    layer = layer._replace(weight=fake(layer.weight), rows=fake(layer.rows), cols=fake(layer.cols))
    moved = Example(
        fake(example.x), layer, fake(example.a), fake(example.b), fake(example.delta_bias), None,
        example.grad, False,
    )  # fmt: skip
    assert type(moved.output("triton")) is FakeTensor


def loss_of(example, x, a, b, delta_bias):
    """A scalar of a layer's output."""
    out = example._replace(x=x, a=a, b=b, delta_bias=delta_bias).output("reference")
    return (out * torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)).sum()


def leaves_of(example):
    held = (example.x, example.a, example.b, example.delta_bias)
    return [leaf.clone().requires_grad_() for leaf in held]


FLAGS = [{}, {"folded": "base", "restrained": True, "dropout": True}, {"given": True}]


@every_space
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags) or "plain")
def test_compiles_whole(options, flags):
    if flags.get("given") and options.norm == "weight":
        pytest.skip("the space takes no y0")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (6, 9):
        example = draw(options, t=tokens, **flags)
        leaves = leaves_of(example)
        got = torch.autograd.grad(compiled(example, *leaves), leaves)
        expected = torch.autograd.grad(loss_of(example, *leaves), leaves)
        torch.testing.assert_close(got, expected)
    assert all("torch.ops.secura." in graph for graph in graphs)


def test_eight_bits_compile_whole():
    example = draw(NormOptions("activation", "paper", "averaged"), save="8bit", restrained=True)
    leaves = leaves_of(example)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(example, *leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(loss_of(example, *leaves), leaves))


def test_no_compiler_is_asked_to_trace_a_change_of_device(monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, device="cuda")
    assert isinstance(dispatch.alone(x), torch.cuda.device_of)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not isinstance(dispatch.alone(x), torch.cuda.device_of)


class Layer(torch.nn.Module):
    """An adapted layer as a module, for export."""

    def __init__(self, options):
        super().__init__()
        self.example = draw(options)
        self.a = torch.nn.Parameter(self.example.a)

    def forward(self, x):
        return loss_of(self.example, x, self.a, self.example.b, self.example.delta_bias)


@every_space
@pytest.mark.filterwarnings("ignore")
def test_exports_whole(options):
    layer = Layer(options)
    x = layer.example.x
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    operators = 3 if options.norm == "channel" else 2
    assert program.graph_module.code.count("torch.ops.secura.") == operators
    torch.testing.assert_close(program.module()(x[:4]), layer(x[:4]))


def through(options, wrap):
    """Gradients of a layer whose forward and backward run inside ``wrap``."""
    example = draw(options)
    leaves = leaves_of(example)
    return torch.autograd.grad(wrap(functools.partial(loss_of, example), leaves), leaves)


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
    example = draw(options)
    grads = []
    for wrap in (lambda f, *args: f(*args), functools.partial(checkpoint, use_reentrant=True)):
        leaves = leaves_of(example)
        wrap(functools.partial(loss_of, example), *leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@every_option
def test_saved_tensors_go_through_hooks_and_are_never_written(options):
    example = draw(options)
    leaves, saved = leaves_of(example), []

    def pack(tensor):
        saved.append((tensor, tensor.clone()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(example, *leaves)
    nodes, seen = [loss.grad_fn], set()
    frozen = {id(value) for value in example.layer if isinstance(value, torch.Tensor)}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            parts = value.layer if hasattr(value, "layer") else [value]
            held = [part for part in parts if isinstance(part, torch.Tensor)]
            assert {id(part) for part in held} <= frozen, node
    torch.autograd.grad(loss, leaves)
    assert saved and all(torch.equal(tensor, copy) for tensor, copy in saved)


def kept_bytes_per_token(options) -> float:
    """Bytes a layer keeps for backward a token, beyond its inputs, from two batch sizes."""
    kept = []
    for t in (64, 128):
        example = draw(options, t=t, dtype=torch.bfloat16)
        leaves = leaves_of(example)
        held = (*leaves, *(part for part in example.layer if isinstance(part, torch.Tensor)))
        given = {value.untyped_storage().data_ptr() for value in held}
        sizes = {}

        def pack(tensor, given=given, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            x, a, b, delta_bias = leaves
            out = example._replace(x=x, a=a, b=b, delta_bias=delta_bias).output()
        kept.append(sum(sizes.values()))
        out.sum().backward()
    return (kept[1] - kept[0]) / 64


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_additive_spaces_keep_z_alone(norm):
    assert kept_bytes_per_token(NormOptions(norm)) == 2 * SIZES["m"]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=name)
@pytest.mark.parametrize("way", ["weight", "h", "output"])
def test_every_way_to_the_input_gradient(way, options, dropout, monkeypatch):
    takes, asked = plan.input_way, []

    def forced(shape, *flags):
        ways = plan.input_ways(shape, *flags)
        asked.append(way if way in ways else takes(shape, *flags))
        return asked[-1]

    monkeypatch.setattr(plan, "input_way", forced)
    example = draw(options, dtype=torch.float64, dropout=dropout)
    for got, exact in zip(example.run("reference"), exactly(example), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("h_alone", [True, False])
@pytest.mark.parametrize(("folded", "dropout"), list(product(("base", ""), (True, False))))
def test_both_routes_of_the_input_gradient_of_activation(h_alone, folded, dropout, monkeypatch):
    monkeypatch.setattr(plan, "adds_h", lambda shape, norm, ceilings: h_alone)
    options = NormOptions("activation", combine="gated")
    example = draw(options, dtype=torch.float64, folded=folded, dropout=dropout)
    for got, exact in zip(example.run("reference"), exactly(example), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
