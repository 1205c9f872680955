"""Elastic weight consolidation: the Fisher information, its file, and the callback."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import tiny
import torch
from continual_runs import ADAPTERS, adapted, pad, parameters, rows, trainer
from safetensors.torch import save_file
from transformers import TrainerCallback

from secura.continual import EWCCallback, Fisher

BATCHES = [pad([row]) for row in rows(5)]


def fisher_of(model, *, strength: float = 1.0, center: float = 0.0) -> Fisher:
    """Equal importances, and a center a little off the model."""
    values = parameters(model)
    return Fisher(
        {name: torch.full_like(value, strength) for name, value in values.items()},
        {name: value + center for name, value in values.items()},
    )


class Gradients(TrainerCallback):
    """What the optimizer is about to see, a copy for each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_a_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        fisher_of(adapted()).save(tmp_path / "fisher.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "fisher.safetensors").stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ADAPTERS)
def test_fisher_is_the_mean_of_each_examples_squared_gradient(kind):
    model = adapted(kind, dropout=0.5).train()
    expected = {name: torch.zeros_like(value) for name, value in parameters(model).items()}
    model.eval()
    for batch in BATCHES:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, value in model.named_parameters():
            if value.requires_grad:
                expected[name] += value.grad**2 / len(BATCHES)
    model.zero_grad()
    model.train()
    before = torch.get_rng_state()
    fisher = Fisher.estimate(model, BATCHES)
    torch.testing.assert_close(fisher.importance, expected)
    assert any(bool(value.any()) for value in expected.values())
    tiny.assert_same(fisher.center, parameters(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(value.grad is None for value in model.parameters())
    there = parameters(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    tiny.assert_same(fisher.center, there)


def test_the_importances_of_tasks_add_up_and_the_center_moves():
    model = adapted()
    first = Fisher.estimate(model, BATCHES[:2])
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1)
    second = Fisher.estimate(model, BATCHES[2:])
    both = Fisher.estimate(model, BATCHES[2:], previous=first)
    for name, value in both.importance.items():
        assert torch.equal(value, first.importance[name] + second.importance[name])
    tiny.assert_same(both.center, parameters(model))


def test_what_fisher_cannot_be_estimated_from():
    model = adapted()
    with pytest.raises(ValueError, match="at least one batch"):
        Fisher.estimate(model, [])
    with pytest.raises(ValueError, match="loss is missing"):
        Fisher.estimate(model, [{"input_ids": tiny.tokens()}])
    unscored = {"input_ids": tiny.tokens(), "labels": torch.full((3, 7), -100)}
    with pytest.raises(ValueError, match="loss is nan"):
        Fisher.estimate(model, [unscored])
    with pytest.raises(ValueError, match="no trainable parameter"):
        Fisher.estimate(model.requires_grad_(False), BATCHES)
    merged = adapted("secura")
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        Fisher.estimate(merged, BATCHES)


@pytest.mark.parametrize("part", [None, "importance", "center"])
def test_processes_with_different_numbers_are_refused(part, monkeypatch):
    """Each process says in turn what it has; the second one has another number in ``part``."""
    model = adapted()
    fisher, said = Fisher.estimate(model, BATCHES), []

    def gather(found, own):
        said.append(own)
        found[:] = [first[len(said) - 1] if first else own, own]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    first = []
    EWCCallback(fisher, 1.0).on_train_begin(None, None, None, model=model)
    first, said = said, []
    if part is None:
        EWCCallback(fisher, 1.0).on_train_begin(None, None, None, model=model)
        return
    next(iter(getattr(fisher, part).values())).add_(1)
    with pytest.raises(ValueError, match=r"different numbers of the Fisher .*load that file"):
        EWCCallback(fisher, 1.0).on_train_begin(None, None, None, model=model)


def test_fisher_survives_its_file(tmp_path):
    fisher = Fisher.estimate(adapted(), BATCHES)
    fisher.save(tmp_path / "new" / "fisher.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fisher.safetensors"]
    loaded = Fisher.load(tmp_path / "new" / "fisher.safetensors")
    tiny.assert_same(loaded.importance, fisher.importance)
    tiny.assert_same(loaded.center, fisher.center)


def test_damaged_files_are_one_clear_error(tmp_path):
    fisher, file = fisher_of(adapted()), tmp_path / "fisher.safetensors"
    with pytest.raises(ValueError, match="is not there"):
        Fisher.load(file)
    fisher.save(file)
    whole = file.read_bytes()
    for damaged in (whole[:-7], whole[:20], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut short"):
            Fisher.load(file)
    name = next(iter(fisher.center))
    good = {f"importance.{name}": torch.ones(2), f"center.{name}": torch.ones(2)}
    for change in (
        {f"importance.{name}": torch.full((2,), torch.nan)},
        {f"importance.{name}": -torch.ones(2)},
        {f"importance.{name}": torch.ones(3)},
        {"importance.other": torch.ones(2)},
        {"something": torch.ones(2)},
        {f"center.{name}": torch.ones(2, dtype=torch.int64)},
    ):
        save_file(good | change, file)
        with pytest.raises(ValueError, match="damaged"):
            Fisher.load(file)
    save_file(good, file)
    with pytest.raises(ValueError, match="other parameters"):
        EWCCallback(Fisher.load(file), 1.0).penalty(adapted())


def test_another_models_fisher_is_refused(tmp_path):
    fisher = fisher_of(adapted("secura"))
    with pytest.raises(ValueError, match="other parameters"):
        trainer(tmp_path, adapted("lora"), [EWCCallback(fisher, 1.0)]).train()
    with pytest.raises(ValueError, match="other parameters"):
        Fisher.estimate(adapted("lora"), BATCHES, previous=fisher)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_penaltys_gradient_is_added_once_a_step(kind, accumulation, tmp_path):
    model = adapted(kind)
    fisher = Fisher.estimate(model, BATCHES)
    fisher = Fisher(fisher.importance, {n: v + 0.3 for n, v in fisher.center.items()})
    callback = EWCCallback(fisher, 50.0)
    trained = [value for value in model.parameters() if value.requires_grad]
    expected = torch.autograd.grad(callback.penalty(model), trained)
    before, after = Gradients(), Gradients()
    run = trainer(
        tmp_path, model, [before, callback, after], max_steps=1,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    run.train()
    assert len(after.seen) == 1
    for pull, own, sum_ in zip(
        expected, before.seen[0].values(), after.seen[0].values(), strict=True
    ):
        torch.testing.assert_close(sum_ - own, pull, rtol=1e-4, atol=1e-6)
        assert bool(pull.any())


def test_the_penalty_is_half_lambda_f_d_squared():
    model = adapted()
    count = sum(value.numel() for value in parameters(model).values())
    penalty = EWCCallback(fisher_of(model, strength=2.0, center=0.5), 3.0).penalty(model)
    assert penalty.item() == pytest.approx(3.0 / 2 * 2.0 * 0.25 * count, rel=1e-4)


def test_a_strong_lambda_keeps_the_parameters_near_the_center(tmp_path):
    moved = {}
    for strength in (0.0, 90.0):
        model = adapted()
        start = parameters(model)
        callback = EWCCallback(fisher_of(model), strength)
        trainer(
            tmp_path, model, [callback], max_steps=20, optim="sgd", learning_rate=1e-2,
            lr_scheduler_type="constant", max_grad_norm=0.0,
        ).train()  # fmt: skip
        moved[strength] = sum(
            float((value - start[name]).square().sum()) for name, value in parameters(model).items()
        )
    assert 0 < moved[90.0] < 0.02 * moved[0.0]


def test_parameters_without_a_gradient_are_pulled_as_well():
    model = adapted()
    callback = EWCCallback(fisher_of(model, center=1.0), 2.0)
    callback.on_pre_optimizer_step(SimpleNamespace(max_grad_norm=1.0), None, None, model=model)
    assert all(
        torch.allclose(value.grad, torch.tensor(-2.0))
        for value in model.parameters()
        if value.requires_grad
    )


def test_gradients_that_are_still_scaled_are_refused():
    model = adapted()
    callback = EWCCallback(fisher_of(model), 1.0)
    optimizer = SimpleNamespace(scaler=object())
    with pytest.raises(ValueError, match="set max_grad_norm"):
        callback.on_pre_optimizer_step(
            SimpleNamespace(max_grad_norm=0.0), None, None, model=model, optimizer=optimizer
        )


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_lambda_that_makes_no_sense(value):
    with pytest.raises(ValueError, match="ewc_lambda"):
        EWCCallback(fisher_of(adapted()), value)


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused(sharding, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    model = adapted()
    with pytest.raises(ValueError, match=f"not with {sharding}"):
        EWCCallback(fisher_of(model), 1.0).on_train_begin(None, None, None, model=model)


def test_an_adapter_that_folds_while_training_is_refused(tmp_path):
    model = adapted("secura")
    model.active_peft_config.fold_every = 2
    with pytest.raises(ValueError, match="fold_every=0"):
        trainer(tmp_path, model, [EWCCallback(fisher_of(model), 1.0)]).train()
    model = tiny.llama()
    model.add_adapter(tiny.config(fold_every=2))
    with pytest.raises(ValueError, match="fold_every=0"):
        trainer(tmp_path, model, [EWCCallback(fisher_of(model), 1.0)]).train()
