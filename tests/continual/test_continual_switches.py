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


WATCHING = [
    lambda model: EWCCallback(Fisher.estimate(model, BATCHES), 1.0),
    lambda model: LongTermMemory(),
    lambda model: LongTermMemory(weight=0),
]


@pytest.mark.parametrize("watching", WATCHING)
def test_another_adapter_that_is_trained_ends_the_run(watching, tmp_path):
    model = adapted("secura")
    model.add_adapter("second", tiny.config(norm="channel"))
    run = trainer(tmp_path, model, [watching(model), After(activate_second)])
    with pytest.raises(ValueError, match=r"second\.A is trained by now, and the .* began"):
        run.train()
    assert run.state.global_step <= 3


@pytest.mark.parametrize("watching", WATCHING)
def test_layers_that_are_trained_later_end_the_run(watching, tmp_path):
    model = adapted("secura")
    later = [value for name, value in model.named_parameters() if ".layers.0." in name]
    trained = [value for value in later if value.requires_grad]
    for value in trained:
        value.requires_grad_(False)

    def train_them(model):
        for value in trained:
            value.requires_grad_(True)

    with pytest.raises(ValueError, match="is trained by now"):
        trainer(tmp_path, model, [watching(model), After(train_them)]).train()


@pytest.mark.parametrize("watching", WATCHING)
def test_layers_that_are_frozen_on_the_way_stay_as_they_are(watching, tmp_path):
    model, frozen = adapted("secura"), {}

    def freeze(model):
        freeze_first(model)
        frozen.update({n: p.clone() for n, p in model.named_parameters() if ".layers.0." in n})

    trainer(tmp_path, model, [watching(model), After(freeze)]).train()
    after = dict(model.named_parameters())
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())


def test_the_long_term_model_has_its_own_values_of_frozen_layers(tmp_path):
    """They would be taken from the model in training."""
    model, twin = adapted("secura"), adapted("secura").eval()
    memory, found = LongTermMemory(ema=0.5), []
    plain = memory._long_term_logits

    def compare(model, args, inputs):
        logits = plain(model, args, inputs)
        memory.copy_to(twin)
        found.append((logits - twin(*args, **inputs).logits).abs().max().item())
        return logits

    memory._long_term_logits = compare
    trainer(tmp_path, model, [memory, After(freeze_first)]).train()
    assert len(found) == 4 and max(found) < 1e-5


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
    run = trainer(tmp_path, model, callbacks)
    cores = [value for name, value in model.named_parameters() if name.endswith(".U")]
    run.optimizer = torch.optim.SGD(cores, lr=0.01)
    with pytest.raises(ValueError, match="was folded while training"):
        run.train()


def test_an_adapter_that_does_not_act_may_be_folded(tmp_path):
    model = tiny.cored()
    model.add_adapter("second", tiny.config(core="u", norm="none"))

    def load(model):
        for layer in tiny.layers(model).values():
            layer.secura_adapter["second"].core.add_(1.0)

    trainer(tmp_path, model, [AnchorDecayCallback(1.0), After(load)]).train()
