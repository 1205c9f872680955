"""Layers of a model that are given the same x: autocast, hooks, compilers, checkpoints."""

import copy
from functools import partial

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from secura import SECURALinear


def adapted(shares, norm="weight", count=3):
    torch.manual_seed(0)
    layers = nn.ModuleList(
        SECURALinear.from_linear(nn.Linear(24, 16), r=4, norm=norm, share_inputs=shares)
        for _ in range(count)
    )
    for layer in layers:
        nn.init.normal_(layer.B)
    return layers


def test_in_another_dtype_it_is_another_input():
    layers, leaf = adapted(True, "none", 2), torch.randn(5, 24).requires_grad_()
    x = leaf * 1
    with torch.autocast("cpu", torch.bfloat16):
        low = layers[0](x)
    exact = layers[1](x)
    assert (low.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(exact, adapted(False, "none", 2)[1](x))
    (low.float().sum() + exact.sum()).backward()
    parts = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in adapted(False, "none", 2)]
    torch.testing.assert_close(leaf.grad, sum(parts), rtol=2e-2, atol=2e-2)


def test_autocast_casts_once_and_saves_one_tensor():
    saved, found = {}, {}
    for shares in (False, True):
        kept = set()

        def pack(tensor, kept=kept):
            if tensor.shape == (5, 24) and tensor.dtype == torch.bfloat16:
                kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        layers, leaf = adapted(shares), torch.linspace(-1, 1, 120).view(5, 24).requires_grad_()
        x = leaf * 1
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            loss = sum(layer(x).float().square().mean() for layer in layers)
        saved[shares] = len(kept)
        loss.backward()
        found[shares] = leaf.grad
    assert saved == {False: 3, True: 1}
    assert found[True].dtype == torch.float32
    torch.testing.assert_close(found[True], found[False], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("count", "most"), [(3, 1.5), (48, 10)])
@pytest.mark.parametrize("alike", [False, True])
def test_under_autocast_the_sum_is_rounded_to_its_dtype(count, most, alike):
    """So that ∂x errs more than autograd's sum in fp32 of parts that are rounded once each."""
    torch.manual_seed(0)
    layers = [SECURALinear.from_linear(nn.Linear(64, 64), r=4, norm="none") for _ in range(count)]
    for one in layers:
        nn.init.normal_(one.B)
        if alike:
            one.load_state_dict(layers[0].state_dict())
    x, g, found = torch.randn(32, 64), torch.randn(32, 64), []
    for way in ("exact", "autograd", "shared"):
        used = [copy.deepcopy(one).double() if way == "exact" else one for one in layers]
        for one in used:
            one.config.share_inputs = way == "shared"
        dtype = torch.float64 if way == "exact" else torch.float32
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            outs, entered = [], leaf * 1
            for one in used:
                outs.append(one(entered))
        torch.autograd.backward(outs, [g.to(out.dtype) for out in outs])
        found.append(leaf.grad.double())
    exact, plain, shared = found
    assert (plain - exact).norm() < 4e-3 * exact.norm()
    assert not torch.equal(plain, shared)
    assert (shared - exact).norm() < most * (plain - exact).norm()


def test_a_hook_on_a_layer_sees_its_own_part():
    layers, leaf = adapted(True), torch.randn(5, 24).requires_grad_()
    seen = {}
    layers[1].register_full_backward_hook(lambda module, given, out: seen.update(dx=given[0]))
    sum(layer(x).sum() for x in [leaf * 1] for layer in layers).backward()
    alone = leaf.detach().clone().requires_grad_()
    layers[1](alone * 1).sum().backward()
    torch.testing.assert_close(seen["dx"], alone.grad)
    whole = leaf.detach().clone().requires_grad_()
    sum(layer(whole) @ torch.ones(16, 1) for layer in adapted(False)).sum().backward()
    torch.testing.assert_close(leaf.grad, whole.grad)


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_a_model_trains_the_same(norm):
    found = []
    for shares in (False, True):
        model = tiny.adapted(norm=norm, share_inputs=shares)
        tiny.perturb(model)
        found.append(tiny.gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-7)


def test_a_compiler_is_left_to_it():
    layers = adapted(True, "none", 2)
    whole = torch.compile(
        lambda x: sum(layer(x).sum() for layer in layers), backend="aot_eager", fullgraph=True
    )
    leaf = torch.randn(5, 24).requires_grad_()
    whole(leaf * 1).backward()
    plain = leaf.detach().clone().requires_grad_()
    sum(layer(x).sum() for x in [plain * 1] for layer in layers).backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


@pytest.mark.parametrize("kept", [torch.ops.aten._to_copy.default, torch.ops.aten.mm.default])
def test_selective_checkpointing(kept):
    """Of one that keeps the cast of x, which a layer that shares x would do once a step."""

    def policy(context, op, *args, **kwargs):
        keeps = CheckpointPolicy.MUST_SAVE if op == kept else CheckpointPolicy.PREFER_RECOMPUTE
        return keeps

    found = []
    for shares in (False, True):
        layers, leaf = adapted(shares), torch.linspace(-1, 1, 120).view(5, 24).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(
                lambda x, layers=layers: sum(layer(x).float().square().mean() for layer in layers),
                leaf * 1,
                use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, policy),
            )
        loss.backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-3)
