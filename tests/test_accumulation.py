"""Gradients of micro-batches, finished once a step: what plain accumulation gives."""

import pytest
import torch
from tiny import adapted, llama, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import secura
from secura import SECURALinear
from secura_kernels.held import Held
from secura_kernels.ops.channel import op as channel
from secura_kernels.ops.project import op as project
from secura_kernels.ops.weight import op as weight

SPACES = ("none", "channel", "activation", "weight")


def layer(norm="none", **settings):
    torch.manual_seed(0)
    made = SECURALinear.from_linear(nn.Linear(24, 16).double(), r=4, norm=norm, **settings)
    made = made.double()
    nn.init.normal_(made.B if made.U is None else made.U)
    return made


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, 24, dtype=torch.float64, generator=generator)


def run(model, micro, lasts, runs=lambda model, x: model(x)):
    """Gradients by name after the micro-batches, those at which ``lasts`` is True finishing."""
    model.zero_grad()
    with secura.accumulate(model) as accumulation:
        for x, accumulation.last in zip(micro, lasts, strict=True):
            runs(model, x.clone().requires_grad_()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def plainly(model, micro):
    model.zero_grad()
    for x in micro:
        model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_equal(found, expected, rtol=1e-11):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=rtol / 10)


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
    anchored.set_anchor(eye + 0.1, eye - 0.2, anchored.U.detach().clone())
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


def test_parameters_of_each_step():
    """Two steps of an optimizer, with a pass without gradient in between."""
    ends = []
    for held in (False, True):
        model, micro = layer(), batches(4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with secura.accumulate(model) as accumulation:
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
    """By their version; and past it, as ``p.data`` is, where only passes without gradient were."""
    model, (x, *_) = layer(), batches()
    with secura.accumulate(model) as accumulation:
        model(x)
        with torch.no_grad():
            model.B.mul_(3)
        written = model(x)
        accumulation.last = True
        written.sum().backward()
        with torch.no_grad():
            model(x)
        model.B.data.mul_(2)
        again = model(x)
    model.B.data.div_(2)
    torch.testing.assert_close(written, model(x), rtol=0, atol=0)
    model.B.data.mul_(2)
    torch.testing.assert_close(again, model(x), rtol=0, atol=0)


def test_a_gradient_that_is_not_finished_is_an_error():
    model, (x, *_) = layer(), batches()
    with (
        pytest.raises(RuntimeError, match=r"1 layers hold a part .* set accumulation\.last"),
        secura.accumulate(model),
    ):
        model(x).sum().backward()
    assert model.held is None

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(RuntimeError, match="step was taken while gradients were held"),
        secura.accumulate(model),
    ):
        model(x).sum().backward()
        model.A.grad = torch.zeros_like(model.A)
        optimizer.step()
        model(x)
    with secura.accumulate(model) as accumulation:
        model(x).sum().backward()
        accumulation.drop()
    with pytest.raises(KeyError), secura.accumulate(model):
        model(x).sum().backward()
        raise KeyError
    assert model.held is None


def test_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="no SECURA layer"), secura.accumulate(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("steps", [5, 2])
@pytest.mark.parametrize("norm", ["none", "channel"])
def test_a_trainer(norm, steps, tmp_path, monkeypatch):
    """With clipping, and an epoch's last step of fewer micro-batches than the others."""
    from transformers import Trainer, TrainingArguments

    finished, add = [], Held.add
    monkeypatch.setattr(
        Held, "add", lambda own, dp: (finished.append(add(own, dp)), finished[-1])[1]
    )

    rows = [{"input_ids": row, "labels": row} for row in tokens(7)]
    ends = []
    for callbacks in ([], [secura.AccumulateCallback()]):
        model = adapted(llama(), norm=norm)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            max_grad_norm=0.01,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
        assert all(part.held is None for part in model.modules() if hasattr(part, "held"))
    lasts = 2 * -(-7 // steps)  # two epochs
    assert sum(dp is not None for dp in finished) * 2 * 7 == lasts * len(finished)
    before = adapted(llama(), norm=norm).state_dict()
    for name, value in ends[0].items():
        assert (value - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5)
