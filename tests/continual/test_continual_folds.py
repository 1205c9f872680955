"""Methods that know parameters by their values, where a fold or an anchor changes their sense."""

from __future__ import annotations

import pytest
import tiny
import torch
from continual_runs import adapted, cored, pad, parameters, rows, trainer

import secura
from secura import FoldCallback
from secura.continual import (
    AnchorCallback,
    AnchorDecayCallback,
    EWCCallback,
    Fisher,
    LongTermMemory,
)

BATCHES = [pad([row]) for row in rows(5)]


def ewc(model):
    return EWCCallback(Fisher.estimate(model, BATCHES), 1.0)


@pytest.mark.parametrize(
    "watching", [ewc, lambda model: LongTermMemory(), lambda model: AnchorDecayCallback(1.0)]
)
def test_a_fold_while_they_train_ends_the_run(watching, tmp_path):
    model = cored(anchored=False)
    callbacks = [FoldCallback(1), watching(model)]
    with pytest.raises(ValueError, match="was folded while training"):
        trainer(tmp_path, model, callbacks, max_steps=3).train()


def test_a_decay_beside_folds_is_refused_before_the_first_step(tmp_path):
    """It would pull on U alone, and what was learned would be in the core."""
    model = cored(anchored=False, fold_every=1)
    before = parameters(model)
    with pytest.raises(ValueError, match="fold_every=0"):
        trainer(tmp_path, model, [FoldCallback(), AnchorDecayCallback(1.0)]).train()
    tiny.assert_same(parameters(model), before)
    trainer(tmp_path, model, [FoldCallback(), AnchorDecayCallback(0.0)], max_steps=1).train()


def test_values_from_before_a_fold_are_refused(tmp_path):
    model = adapted("secura")
    fisher, memory = Fisher.estimate(model, BATCHES), LongTermMemory()
    trainer(tmp_path, model, [memory], max_steps=2).train()
    memory.save(tmp_path / "memory.safetensors")
    fisher.save(tmp_path / "fisher.safetensors")
    with memory.applied(model):
        pass
    going_on = LongTermMemory(start=tmp_path / "memory.safetensors")
    trainer(tmp_path, model, [going_on], max_steps=1).train()
    secura.fold(model)
    read = Fisher.load(tmp_path / "fisher.safetensors")
    start = LongTermMemory(start=tmp_path / "memory.safetensors")
    for use in (
        lambda: memory.copy_to(model),
        lambda: going_on.copy_to(model),
        lambda: Fisher.estimate(model, BATCHES, previous=fisher),
        lambda: trainer(tmp_path, model, [EWCCallback(read, 1.0)]).train(),
        lambda: trainer(tmp_path, model, [start]).train(),
    ):
        with pytest.raises(ValueError, match="before the adapter was folded or anchored anew"):
            use()


def test_values_from_before_another_anchor_are_refused(tmp_path):
    """They came back in the new coordinates, as another model."""
    model, memory = cored(), LongTermMemory()
    trainer(tmp_path, model, [memory, AnchorCallback(fold=False)], max_steps=2).train()
    with pytest.raises(ValueError, match="anchored anew"), memory.applied(model):
        pass


class ScheduleFree(torch.optim.SGD):
    """What an optimizer has that keeps a second copy of its parameters."""

    def train(self):
        """Put the one copy into the parameters."""

    def eval(self):
        """Put the other."""


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (FoldCallback(2), "a fold"),
        (AnchorDecayCallback(1.0), "anchor_decay"),
        (AnchorDecayCallback(), "anchor_decay"),
    ],
)
def test_an_optimizer_with_a_second_copy_is_refused_before_the_first_step(callback, what, tmp_path):
    """It would go on from that copy, in which nothing was folded and nothing decayed."""
    run = trainer(tmp_path, cored(anchored=False), [callback])
    run.optimizer = ScheduleFree([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=f"{what} does not reach the second copy that a Schedule"):
        run.train()
    assert run.state.global_step == 0


def test_an_optimizer_with_a_second_copy_trains_where_nothing_is_folded(tmp_path):
    run = trainer(tmp_path, cored(anchored=False), [FoldCallback(0), AnchorDecayCallback(0.0)])
    run.optimizer = ScheduleFree([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
    run.train()
    assert run.state.global_step == 4
