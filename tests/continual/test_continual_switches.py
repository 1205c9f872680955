"""Methods that know parameters by name, in runs in which others come to be trained."""

from __future__ import annotations

import pytest
import tiny
import torch
from continual_runs import adapted, pad, rows, trainer
from transformers import TrainerCallback

from secura import FoldCallback
from secura.continual import AnchorDecayCallback, EWCCallback, Fisher, LongTermMemory

BATCHES = [pad([row]) for row in rows(3)]


class After(TrainerCallback):
    """Does something to the model before the third step."""

    def __init__(self, do) -> None:
        self.do = do

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Do it."""
        if state.global_step == 2:
            self.do(model)


def freeze_first(model) -> None:
    """Train the first decoder layer no more."""
    for name, value in model.named_parameters():
        if ".layers.0." in name:
            value.requires_grad_(False)


def activate_second(model) -> None:
    model.set_adapter("second")


@pytest.mark.parametrize("change", [freeze_first, activate_second])
@pytest.mark.parametrize(
    "watching",
    [
        lambda model: EWCCallback(Fisher.estimate(model, BATCHES), 1.0),
        lambda model: LongTermMemory(),
        lambda model: LongTermMemory(weight=0),
    ],
)
def test_other_parameters_end_the_run(watching, change, tmp_path):
    """The values of what is frozen would be taken from the model in training."""
    model = adapted("secura")
    model.add_adapter("second", tiny.config(norm="channel"))
    run = trainer(tmp_path, model, [watching(model), After(change)])
    with pytest.raises(ValueError, match="parameters that are trained changed while training"):
        run.train()
    assert run.state.global_step <= 3


def test_cores_that_are_frozen_do_not_decay(tmp_path):
    """Nothing would pull the other way."""
    model, frozen = tiny.cored(), {}

    def freeze(model):
        freeze_first(model)
        frozen.update({n: p.clone() for n, p in model.named_parameters() if ".layers.0." in n})

    trainer(tmp_path, model, [After(freeze), AnchorDecayCallback(20.0)]).train()
    after = dict(model.named_parameters())
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())
    assert any(name.endswith(".U") and value.any() for name, value in frozen.items())


def test_an_adapter_that_was_activated_and_folded_ends_the_run(tmp_path):
    model = tiny.cored()
    model.add_adapter("second", tiny.config(core="u", norm="none"))
    callbacks = [AnchorDecayCallback(1.0), After(activate_second), FoldCallback(3)]
    with pytest.raises(ValueError, match=r"was folded while training|trains none of the model's"):
        trainer(tmp_path, model, callbacks).train()
