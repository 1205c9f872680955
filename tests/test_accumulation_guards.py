"""No step on a part of a gradient, and no part of another layer's: every way to one is an error."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import tiny
import torch
from micro_batches import batches, check_equal, layer, plainly, sgd
from torch import nn

import secura
from secura import cabr


def test_a_gradient_that_is_not_finished_is_an_error():
    """Before a step that would lack it, and on leaving."""
    model, (x, *_) = layer(), batches()
    with (
        pytest.raises(RuntimeError, match=r"1 layer\(s\) hold a part .* set accumulation\.last"),
        secura.accumulate(model, sgd(model)),
    ):
        model(x).sum().backward()
    assert model.held is None

    two = nn.ModuleList([layer(), layer()])
    before, optimizer = two[0].A.detach().clone(), sgd(two)
    with (
        pytest.raises(RuntimeError, match=r"\(1 first\), .* let it reach every layer"),
        secura.accumulate(two, optimizer) as accumulation,
    ):
        sum(one(x).sum() for one in two).backward()
        accumulation.last = True
        two[0](x).sum().backward()  # the other is not reached
        optimizer.step()
    assert torch.equal(two[0].A, before)
    assert "zero_grad" not in vars(optimizer)
    with pytest.raises(KeyError), secura.accumulate(model, optimizer):
        model(x).sum().backward()
        raise KeyError
    assert model.held is None


def test_another_optimizer_than_the_one_named():
    """Of other parameters it may take its steps; of these it is a training that was interrupted."""
    model, other, (x, *_) = layer(), layer(), batches()
    with secura.accumulate(model, sgd(model)) as accumulation:
        accumulation.last = True
        model(x).sum().backward()
        sgd(other).step()
        with pytest.raises(RuntimeError, match="another optimizer"):
            sgd(model).step()


def test_an_anchor_is_no_part_of_a_gradient_that_is_held():
    model, ids = tiny.adapted(core="u", norm="none"), tiny.tokens()
    with secura.accumulate(model, sgd(model)) as accumulation:
        secura.anchor(model, list(tiny.tokens(3, 9)))
        accumulation.check_finished()
        assert all(part.held is not None for part in tiny.parts(model))
        accumulation.last = True
        found = tiny.gradients(model, ids)
    for name, gradient in tiny.gradients(model, ids).items():
        torch.testing.assert_close(found[name], gradient)


def test_a_closure_has_to_finish_what_it_begins():
    model, (x, *_) = layer(), batches()
    optimizer = sgd(model)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with secura.accumulate(model, optimizer) as accumulation:
        with pytest.raises(RuntimeError, match=r"1 layer\(s\) hold .*\(the model itself first\)"):
            optimizer.step(closure)
        accumulation.drop()
        accumulation.last = True
        optimizer.step(closure)


def test_an_optimizer_of_master_copies_is_watched_too():
    model, (x, *_) = layer(), batches()
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, 0.1)
    with secura.accumulate(model, optimizer) as accumulation:
        model(x).sum().backward()
        masters[0].grad = torch.ones_like(masters[0])
        with pytest.raises(RuntimeError, match="hold a part"):
            optimizer.step()
        accumulation.drop()
    assert torch.equal(masters[0], next(model.parameters()))


def test_a_base_that_is_hooked_is_watched_too():
    model, (x, *_) = layer(), batches()
    model.base.register_forward_hook(lambda *_: None)
    with secura.accumulate(model, sgd(model)) as accumulation:
        model(x).sum().backward()
        with torch.no_grad():
            model.base.weight.mul_(2)
        with pytest.raises(RuntimeError, match="not the one whose gradient is held"):
            model(x)
        accumulation.drop()


def test_another_stream_takes_nothing_that_this_one_computed(monkeypatch):
    model, (x, *_) = layer(), batches()
    with secura.accumulate(model, sgd(model)) as accumulation:
        model(x)
        monkeypatch.setattr(cabr, "stream_of", lambda tensor: 7)
        before = model.held.layers
        model(x).sum().backward()
        assert model.held.layers == before + 1
        monkeypatch.setattr(cabr, "stream_of", lambda tensor: 0)
        with pytest.raises(RuntimeError, match="run on another CUDA stream"):
            model(x)
        accumulation.drop()


def test_static_graph_is_refused_wherever_it_stands(monkeypatch):
    model, (x, *_) = layer(), batches()
    whole = SimpleNamespace(static_graph=True)
    with secura.accumulate(model, sgd(model)):
        monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", whole)
        with pytest.raises(ValueError, match="leave out static_graph"):
            model(x)


@pytest.mark.parametrize("whose", ["drop", "zero_grad"])
def test_what_is_dropped(whose):
    """A batch that is skipped after its backward pass broke off leaves nothing behind."""
    model = nn.Sequential(layer(), nn.Linear(16, 24).double(), layer())
    micro, optimizer = batches(), sgd(model)
    expected = {n: g.clone() for n, g in plainly(model, micro).items()}
    model.zero_grad()

    def broken(grad):
        raise ArithmeticError

    with secura.accumulate(model, optimizer) as accumulation:
        out = model[0](micro[0])
        out.register_hook(broken)
        with pytest.raises(ArithmeticError):
            model[2](model[1](out)).sum().backward()
        model.zero_grad()
        (accumulation.drop if whose == "drop" else optimizer.zero_grad)()
        for x, accumulation.last in zip(micro, [False, False, True], strict=True):
            model(x).square().sum().backward()
    check_equal({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, expected)


@pytest.mark.parametrize("change", ["frozen", "replaced", "scaled", "base", "data"])
def test_an_adapter_that_changes_between_micro_batches(change):
    model, (x, *_) = layer(), batches()

    def changed():
        if change == "frozen":
            model.A.requires_grad_(False)
        elif change == "replaced":
            model.B = nn.Parameter(model.B.detach() * 2)
        elif change == "scaled":
            model.scaling = 0.5
        elif change == "data":
            nn.utils.vector_to_parameters(model.B.detach().flatten() * 2, [model.B])
        else:
            model.base.weight.data = model.base.weight.data * 2

    with secura.accumulate(model, sgd(model)) as accumulation:
        model(x)
        changed()
        inside = model(x)  # nothing of a gradient was held yet
        inside.sum().backward()
        if change == "frozen":
            model.A.requires_grad_(True)
        elif change == "scaled":
            model.scaling = 1.0
        else:
            changed()
        with pytest.raises(RuntimeError, match="not the one whose gradient is held"):
            model(x)
        accumulation.drop()
        last = model(x)
    torch.testing.assert_close(last, model(x), rtol=0, atol=0)
    changed()
    if change in ("frozen", "scaled"):
        torch.testing.assert_close(inside, model(x), rtol=0, atol=0)


def test_what_it_cannot_be_used_with():
    with pytest.raises(ValueError, match="no SECURA layer"):
        secura.accumulate(nn.Linear(2, 2), sgd(nn.Linear(2, 2))).__enter__()
    with pytest.raises(TypeError, match=r"str is no torch\.optim\.Optimizer, .* leave out"):
        secura.accumulate(layer(), "adam").__enter__()
    model = layer()
    optimizer = sgd(model)
    with secura.accumulate(model, optimizer, lambda: True) as accumulation:
        assert accumulation.last
        with pytest.raises(AttributeError, match="is_last was given"):
            accumulation.last = False
    with (
        secura.accumulate(model, optimizer),
        pytest.raises(ValueError, match=r"in another secura\.accumulate"),
    ):
        secura.accumulate(model, optimizer).__enter__()
    assert "zero_grad" not in vars(optimizer)


def test_what_is_left_late_or_was_there_before_stays():
    """A block that was interrupted ends its own holding; a zero_grad of a user's comes back."""
    model, optimizer = layer(), sgd(layer())
    first = secura.accumulate(model, sgd(model))
    first.__enter__()
    own = optimizer.zero_grad = lambda **_: None
    with secura.accumulate(model, optimizer):
        held = model.held
        first.__exit__(None, None, None)
        assert held is not None and model.held is held
        assert optimizer.zero_grad is not own
    assert optimizer.zero_grad is own and model.held is None


def test_a_block_adds_no_hook_to_those_of_all_optimizers():
    """torch walks them while another thread's optimizer steps, which may begin within a block."""
    hooks = import_module("torch.optim.optimizer")._global_optimizer_pre_hooks
    with secura.accumulate(first := layer(), sgd(first)):
        pass
    before = list(hooks)
    with secura.accumulate(first, sgd(first)) as outer:
        assert list(hooks) == before
        second = layer()
        with secura.accumulate(second, sgd(second)):
            assert list(hooks) == before
            first(batches()[0]).sum().backward()
            sgd(nn.Linear(2, 2)).step()
            with pytest.raises(RuntimeError, match="another optimizer than that"):
                sgd(first).step()
        outer.drop()
    assert list(hooks) == before


@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_a_micro_batch_that_is_dropped_by_zero_grad_is_not_in_the_next_step(owner):
    """A loop may drop one whose loss is NaN."""
    model, plain, (bad, x, *_) = layer(), layer(), batches()
    optimizer, zeroing = sgd(model), {}
    with secura.accumulate(model, optimizer) as accumulation:
        zeroing = {"optimizer": optimizer, "model": model}[owner]
        model(bad).sum().backward()
        zeroing.zero_grad()
        accumulation.last = True
        model(x).sum().backward()
        optimizer.step()
    assert "zero_grad" not in vars(model)
    plain(x).sum().backward()
    sgd(plain).step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
