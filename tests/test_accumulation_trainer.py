"""Gradients held in a Trainer, by ``AccumulateCallback``."""

from contextlib import nullcontext

import pytest
import torch
from micro_batches import sgd, sums
from tiny import adapted, llama, tokens

import secura


def arguments(folder, steps, **more):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=steps,
        max_grad_norm=0.01,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )


def test_a_trainer_that_stops_within_a_step(tmp_path):
    """By its own callbacks it ends as ever; interrupted, no other optimizer may take its sums."""
    from transformers import Trainer, TrainerCallback

    class Stops(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if self.breaks:
                raise KeyboardInterrupt
            control.should_training_stop = True

    stops, holding = Stops(), secura.AccumulateCallback()
    rows = [{"input_ids": row, "labels": row} for row in tokens(7)]
    for stops.breaks in (False, True):
        model = adapted(llama())
        trainer = Trainer(
            model, arguments(tmp_path, 3), train_dataset=rows, callbacks=[holding, stops]
        )
        with pytest.raises(KeyboardInterrupt) if stops.breaks else nullcontext():
            trainer.train()
    own = sgd(model)
    model(**{name: row[None] for name, row in rows[0].items()}).loss.backward()
    with pytest.raises(RuntimeError, match=r"call close\(\) of its AccumulateCallback"):
        own.step()
    holding.close()
    own.step()


@pytest.mark.parametrize("steps", [5, 2])
@pytest.mark.parametrize("norm", ["none", "channel"])
def test_a_trainer(norm, steps, tmp_path, monkeypatch):
    """With clipping, and an epoch's last step of fewer micro-batches than the others."""
    from transformers import Trainer

    given = sums(monkeypatch)
    rows = [{"input_ids": row, "labels": row} for row in tokens(7)]
    ends = []
    for callbacks in ([], [secura.AccumulateCallback()]):
        model = adapted(llama(), norm=norm)
        settings = arguments(tmp_path, steps, num_train_epochs=2)
        trainer = Trainer(model, settings, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
        assert all(part.held is None for part in model.modules() if hasattr(part, "held"))
    lasts = 2 * -(-7 // steps)  # two epochs
    assert given and sum(dp is not None for dp in given) * 2 * 7 == lasts * len(given)
    before = adapted(llama(), norm=norm).state_dict()
    for name, value in ends[0].items():
        assert (value - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-5)
