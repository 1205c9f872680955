"""Gradients of micro-batches, finished once a step: what plain accumulation gives."""

import copy

import pytest
import torch
from micro_batches import batches, check_equal, layer, plainly, sgd
from torch import nn
from torch.utils.checkpoint import checkpoint

import secura
from secura_kernels.ops.channel import op as channel
from secura_kernels.ops.project import op as project
from secura_kernels.ops.weight import op as weight

SPACES = ("none", "channel", "activation", "weight")


def run(model, micro, lasts, runs=lambda model, x: model(x)):
    """Gradients by name after the micro-batches, those at which ``lasts`` is True finishing."""
    model.zero_grad()
    with secura.accumulate(model, sgd(model)) as accumulation:
        for x, accumulation.last in zip(micro, lasts, strict=True):
            runs(model, x.clone().requires_grad_()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"core": "u"}, {"train_bias": True, "scaling": 0.5}])
@pytest.mark.parametrize("norm", SPACES)
def test_the_gradients_of_plain_accumulation(norm, settings):
    model, micro = layer(norm, **settings), batches()
    expected = plainly(model, micro)
    check_equal(run(model, micro, [False, False, True]), expected)
    check_equal(run(model, micro, [True, False, True]), expected)


@pytest.mark.parametrize("keeps", ["always", "never"])
def test_a_kept_weight_is_made_once(keeps, monkeypatch):
    monkeypatch.setenv("SECURA_KEEP_WEIGHT", keeps)
    model, micro = layer("weight"), batches()
    check_equal(run(model, micro, [False, False, True]), plainly(model, micro))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norm", SPACES)
def test_under_checkpointing(norm, reentrant):
    model, micro = layer(norm), batches()

    def recomputed(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    check_equal(run(model, micro, [False, False, True], recomputed), plainly(model, micro))


def test_a_folded_core_and_an_anchor():
    model, micro = layer("channel", norm_reference="folded"), batches()
    model.fold()
    nn.init.normal_(model.B)
    check_equal(run(model, micro, [False, False, True]), plainly(model, micro))
    anchored = layer(core="u")
    eye = torch.eye(4, dtype=torch.float64)
    anchored.set_anchor(eye + 0.1, eye - 0.2, anchored.U.detach().clone(), 0.01)
    expected = plainly(anchored, micro)  # of an anchor in fp32, by which each part is rounded
    check_equal(run(anchored, micro, [False, False, True]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("norm", "ops"),
    [
        ("none", (project.project, project.project_backward)),
        ("channel", (project.project, channel.channel, project.project_backward)),
        ("weight", (project.project, weight.weight, project.project_backward)),
    ],
)
def test_once_a_step(norm, ops, monkeypatch):
    """P, what is made of it and ∂U are made once for three micro-batches; then nothing is held."""
    monkeypatch.setenv("SECURA_KEEP_WEIGHT", "always")
    made = dict.fromkeys(ops, 0)
    for op in ops:

        def counted(*args, op=op, body=op.body, **named):
            made[op] += 1
            return body(*args, **named)

        monkeypatch.setattr(op, "body", counted)
    model, micro = layer(norm), batches()
    run(model, micro, [False, False, True])
    assert set(made.values()) == {1}
    plainly(model, micro)
    assert set(made.values()) == {4}
    assert model.held is None
    optimizer = sgd(model)
    with secura.accumulate(model, optimizer) as accumulation:
        for x in micro:
            accumulation.last = True
            model(x).sum().backward()
            optimizer.step()
        made.update(dict.fromkeys(ops, 0))
        for x, accumulation.last in zip(micro, [False, False, True], strict=True):
            model(x).sum().backward()
    assert set(made.values()) == {1}


def test_parameters_of_each_step():
    """Two steps of an optimizer, with a pass without gradient in between."""
    ends = []
    for held in (False, True):
        model, micro = layer(), batches(4)
        optimizer = sgd(model)
        with secura.accumulate(model, optimizer) as accumulation:
            for index, x in enumerate(micro):
                accumulation.last = index % 2 == 1 if held else True
                model(x).square().mean().backward()
                if index % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    with torch.no_grad():
                        model(x)
        ends.append({"A": model.A.detach(), "B": model.B.detach()})
    assert (ends[0]["B"] - layer().B).abs().max() > 1e-3
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-10, atol=1e-12)


def test_parameters_that_were_written_to():
    """By their version; and past it, as ``p.data`` is, once the last backward pass is over."""
    model, (x, *_) = layer(), batches()
    with secura.accumulate(model, sgd(model)) as accumulation:
        model(x)
        with torch.no_grad():
            model.B.mul_(3)
        written = model(x)
        accumulation.last = True
        written.sum().backward()
        model(x)
        model.B.data.mul_(2)
        again = model(x)
    torch.testing.assert_close(again, model(x), rtol=0, atol=0)
    model.B.data.div_(2)
    torch.testing.assert_close(written, model(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_an_optimizer_that_leaves_versions_as_they_are(norm):
    """A fused one does, and FSDP2; with a metric's forward between the last pass and the step."""
    ends = []
    for held in (False, True):
        model, micro = layer(norm), batches(8)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
        with secura.accumulate(model, optimizer) as accumulation:
            for index, x in enumerate(micro):
                accumulation.last = not held or index % 2 == 1
                model(x).square().mean().backward()
                if index % 2:
                    model(x)
                    version = model.A._version
                    optimizer.step()
                    assert model.A._version == version
                    optimizer.zero_grad()
        ends.append(model.A.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-10)


def test_passes_that_do_not_add_to_the_gradients_of_a_and_b():
    """What is asked of another tensor, or returned, neither takes from the sum nor adds to it."""
    model, micro = layer(), batches()
    expected = plainly(model, micro)
    alone = torch.autograd.grad(model(micro[0]).sum(), model.A)[0]
    model.zero_grad()
    with secura.accumulate(model, sgd(model)) as accumulation:
        for index, x in enumerate(micro):
            accumulation.last = index == 2
            probe = x.clone().requires_grad_()
            out = model(probe)
            torch.autograd.grad(out.sum(), probe, retain_graph=True)
            out.sum().backward(inputs=[probe], retain_graph=True)
            if index == 0:
                found = torch.autograd.grad(out.sum(), model.A, retain_graph=True)[0]
                torch.testing.assert_close(found, alone, rtol=1e-11, atol=1e-12)
            out.square().sum().backward()
    check_equal({"A": model.A.grad, "B": model.B.grad}, expected)


def test_a_part_of_what_a_pass_may_be_asked_for():
    """Of A alone, or of what an anchored core is made of: nothing is held, nothing is taken."""
    model, micro = layer(), batches(2)
    with secura.accumulate(model, sgd(model)) as accumulation:
        model(micro[0]).square().sum().backward(inputs=[model.A])
        accumulation.last = True
        model(micro[1]).square().sum().backward()
    found = {"A": model.A.grad, "B": model.B.grad}
    model.zero_grad()
    model(micro[0]).square().sum().backward(inputs=[model.A])
    model(micro[1]).square().sum().backward()
    check_equal(found, {"A": model.A.grad, "B": model.B.grad})

    anchored, eye = layer(core="u"), torch.eye(4, dtype=torch.float64)
    anchored.set_anchor(eye + 0.1, eye - 0.2, anchored.U.detach().clone(), 0.01)
    expected, alone = plainly(anchored, micro), plainly(anchored, micro[:1])
    anchored.zero_grad()
    with secura.accumulate(anchored, sgd(anchored)) as accumulation:
        for index, x in enumerate(micro):
            accumulation.last = index == 1
            out = anchored(x).square().sum()
            found = torch.autograd.grad(out, anchored.U, retain_graph=True)[0]
            if index == 0:
                check_equal({"U": found}, alone)
            out.backward()
    check_equal({"U": anchored.U.grad}, expected, rtol=1e-5)


def test_all_that_a_core_without_b_has_is_all_of_it():
    """A pass for U alone holds its part, though δb is trained too and not asked for."""
    model, (x, *_) = layer(core="u", train_bias=True), batches()
    with secura.accumulate(model, sgd(model)) as accumulation:
        model(x).square().sum().backward(inputs=[model.U])
        assert model.held.waits and model.U.grad is None
        accumulation.drop()


def test_gains_hold_no_p_that_nothing_reads_again():
    model, (x, *_) = layer("channel"), batches()
    with secura.accumulate(model, sgd(model)) as accumulation:
        accumulation.last = True
        out = model(x)
        assert model.held.get("U") and model.held.get(("Q", x.dtype))
        assert model.held.get(("P", x.dtype)) is None
        out.sum().backward()


def test_the_last_pass_of_another_layer_than_the_present():
    """Two graphs, scaled in between, before either's backward pass."""
    model, micro = layer(), batches()

    def run(last):
        first = model(micro[0]).square().sum()
        model.scaling = 0.5
        (first + model(micro[1]).square().sum()).backward()
        last()
        model(micro[2]).square().sum().backward()
        model.scaling = 1.0
        return {"A": model.A.grad, "B": model.B.grad}

    expected = run(lambda: None)
    model.zero_grad()
    with secura.accumulate(model, sgd(model)) as accumulation:
        check_equal(run(lambda: setattr(accumulation, "last", True)), expected)


def test_a_weight_is_held_over_a_step_only_where_that_was_asked_for(monkeypatch):
    """Checkpointing, which keeps W' of a block for its backward pass, does not hold all blocks'."""
    model, (x, *_) = layer("weight"), batches()
    for said in ("auto", "always"):
        monkeypatch.setenv("SECURA_KEEP_WEIGHT", said)
        with secura.accumulate(model, sgd(model)) as accumulation:
            accumulation.last = True
            out = checkpoint(model, x, use_reentrant=False)
            assert (model.held.get(("W'", x.dtype)) is not None) == (said == "always")
            out.sum().backward()


def test_a_backward_pass_after_it_is_left():
    model, (x, *_) = layer(), batches()
    expected = plainly(model, [x])
    model.zero_grad()
    with secura.accumulate(model, sgd(model)):
        loss = model(x).square().sum()
    loss.backward()
    check_equal({"A": model.A.grad, "B": model.B.grad}, expected)


def test_a_copy_holds_nothing(tmp_path):
    model, (x, *_) = layer(), batches()
    with secura.accumulate(model, sgd(model)) as accumulation:
        model(x).sum().backward()
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "whole.pt")
        accumulation.drop()
    assert twin.held is None
    assert torch.load(tmp_path / "whole.pt", weights_only=False).held is None
    twin.zero_grad()
    check_equal(plainly(twin, [x]), plainly(model, [x]))


def test_a_replica_holds_nothing():
    """``DataParallel`` copies a module's attributes to other devices and threads."""
    model, (x, *_) = layer(), batches()
    expected = plainly(model, [x])
    model.zero_grad()
    with secura.accumulate(model, sgd(model)):
        model._is_replica = True
        model(x).square().sum().backward()
    check_equal({"A": model.A.grad, "B": model.B.grad}, expected)
