"""Training with transformers' Trainer: folding, resuming, what is written and what is not."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import trainer_runs
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trainer_runs import losses
from transformers import TrainerCallback, TrainerState

from secura import FoldCallback, fold
from secura.cli.callbacks import DivergedError, FiniteCallback, trained_tensors

STEPS = 6


class Recorder(TrainerCallback):
    """After each step, before a FoldCallback that comes later in the list: B and the core."""

    def __init__(self) -> None:
        self.zero_b: list[bool] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.zero_b.append(all(not part.B.any() for part in tiny.parts(model)))


def data(count: int = 24) -> Dataset:
    """Walks around a circle of four tokens: soon learnt."""
    starts = torch.randint(0, 4, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (starts + torch.arange(8)) % 4 + 3
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


LEARNS = {"r": 8, "target_modules": "all-linear", "train_bias": True}


def trainer(folder, model, callbacks=(), **settings):
    settings = {"max_steps": STEPS, "learning_rate": 3e-2} | settings
    return trainer_runs.trainer(folder, model, data(), data(4), callbacks, **settings)


@pytest.mark.parametrize(
    ("norm", "gradient_checkpointing"), [*zip(tiny.NORMS, [False, True] * 2, strict=True)]
)
def test_the_loss_goes_down_and_the_base_stays(norm, gradient_checkpointing, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(norm=norm, **LEARNS))
    run = trainer(tmp_path, model, max_steps=12, gradient_checkpointing=gradient_checkpointing)
    run.train()
    first, last = sum(losses(run)[:3]), sum(losses(run)[-3:])
    assert last < 0.85 * first
    tiny.assert_same(tiny.base_weights(model), tiny.snapshot(tiny.llama()))
    assert all(part.B.any() and part.bias.any() for part in tiny.parts(model))
    assert all(math.isfinite(loss) for loss in losses(run))


def test_bf16_training_keeps_fp32_adapters_and_the_bf16_base(tmp_path):
    model = get_peft_model(tiny.llama(dtype=torch.bfloat16), tiny.config(**LEARNS))
    before = tiny.base_weights(model)
    run = trainer(tmp_path, model, max_steps=12, bf16=True)
    run.train()
    assert sum(losses(run)[-3:]) < 0.85 * sum(losses(run)[:3])
    tiny.assert_same(tiny.base_weights(model), before)
    assert {part.B.dtype for part in tiny.parts(model)} == {torch.float32}


@pytest.mark.parametrize("source", ["config", "argument"])
def test_the_callback_folds_every_few_optimizer_steps(source, tmp_path):
    model = get_peft_model(
        tiny.llama(), tiny.config(norm="channel", fold_every=2 if source == "config" else 0)
    )
    before, after = Recorder(), Recorder()
    callback = FoldCallback() if source == "config" else FoldCallback(2)
    run = trainer(tmp_path, model, [before, callback, after], gradient_accumulation_steps=2)
    run.train()
    assert before.zero_b == [False] * STEPS
    assert after.zero_b == [False, True] * (STEPS // 2)
    assert all(part.core.any() for part in tiny.parts(model))
    tiny.assert_same(tiny.base_weights(model), tiny.snapshot(tiny.llama()))


def test_without_fold_every_the_callback_does_nothing(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(norm="channel"))
    trainer(tmp_path, model, [FoldCallback()]).train()
    assert not any(part.core.any() for part in tiny.parts(model))
    for never in (-1, 2.5, True):
        with pytest.raises(ValueError, match=f"fold_every={never} must be an integer"):
            FoldCallback(never)


@pytest.mark.parametrize("fold_every", [None, 0, 1])
def test_the_callback_on_a_model_without_adapters(fold_every, tmp_path):
    run = trainer(tmp_path, tiny.llama(), [FoldCallback(fold_every)])
    with pytest.raises(ValueError, match="no SECURA layer to fold"):
        run.train()
    assert run.state.global_step == 0


def test_the_callback_on_transformers_own_adapters(tmp_path):
    model = tiny.llama()
    model.add_adapter(tiny.config(norm="channel", fold_every=2))
    trainer(tmp_path, model, [FoldCallback()], max_steps=3).train()
    assert all(part.core.any() and part.B.any() for part in tiny.parts(model))


def test_a_callback_that_joins_late_folds_all_the_same():
    model = tiny.adapted(norm="channel", fold_every=2)
    for step, folds in ((1, False), (2, True)):
        FoldCallback().on_step_end(None, TrainerState(global_step=step), None, model=model)
        assert all(part.core.any() == folds for part in tiny.parts(model))


def adapters_on_different_layers(first: int, second: int):
    model = tiny.adapted(norm="channel", target_modules=["q_proj"], fold_every=first)
    model.add_adapter("second", tiny.config(target_modules=["v_proj"], fold_every=second))
    tiny.perturb(model, 1, "second")
    return model


def test_the_callback_refuses_active_adapters_that_disagree(tmp_path):
    model = adapters_on_different_layers(2, 3)
    model.base_model.set_adapter(["default", "second"])
    run = trainer(tmp_path, model, [FoldCallback()])
    with pytest.raises(ValueError, match=r"active adapters differ in fold_every \(2, 3\)"):
        run.train()
    assert run.state.global_step == 0
    model.set_adapter("second")
    trainer(tmp_path, model, [FoldCallback()], max_steps=3).train()
    assert folded(model) == {"second"}
    model.base_model.set_adapter(["default", "second"])
    trainer(tmp_path, model, [FoldCallback(1)], max_steps=1).train()
    assert folded(model) == {"default", "second"}


def test_fold_counts_the_layers_with_an_active_adapter():
    model = adapters_on_different_layers(0, 0)
    assert fold(model) == 2
    assert folded(model) == {"default"}


def folded(model) -> set[str]:
    """Names of the adapters with something in a core."""
    return {
        name
        for layer in tiny.layers(model).values()
        for name, part in layer.secura_adapter.items()
        if part.core.any()
    }


def test_fold_does_all_layers_or_none():
    model = tiny.adapted(norm="channel")
    tiny.layers(model).popitem()[1].merge()
    with pytest.raises(RuntimeError, match="unmerge it to fold"):
        fold(model)
    assert not any(part.core.any() for part in tiny.parts(model))
    model = tiny.adapted(norm="none")
    model.add_adapter("second", tiny.config(norm="channel", target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="only norm='none' adds up"):
        fold(model)
    assert not any(part.core.any() for part in tiny.parts(model))


@pytest.mark.parametrize("reference", ["folded", "pretrained"])
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_fold_keeps_the_additive_weight(norm, reference):
    model = tiny.adapted(norm=norm, norm_reference=reference)
    layers = tiny.layers(model).values()
    before = [layer.get_delta_weight("default") for layer in layers]
    outputs = tiny.logits(model)
    assert fold(model) == len(before)
    for layer, delta in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    if norm == "none" or reference == "pretrained":
        torch.testing.assert_close(tiny.logits(model), outputs, rtol=0, atol=1e-5)
    else:
        assert not torch.allclose(tiny.logits(model), outputs, atol=1e-3)


def test_fold_touches_the_active_adapter_alone():
    model = tiny.adapted(norm="none")
    model.add_adapter("second", tiny.config(norm="none"))
    tiny.perturb(model, 1)
    fold(model)
    assert all(part.core.any() and not part.B.any() for part in tiny.parts(model))
    assert not any(part.core.any() or not part.B.any() for part in tiny.parts(model, "second"))


def test_released_settings_leave_a_without_gradient(tmp_path):
    settings = {"r": 4, "inner_r": 6}
    model = get_peft_model(tiny.llama(), type(tiny.config()).released("M1", **settings))
    before = [part.A.clone() for part in tiny.parts(model)]
    trainer(tmp_path, model, [FoldCallback()], weight_decay=0.0).train()
    for part, a in zip(tiny.parts(model), before, strict=True):
        assert torch.equal(part.A, a)
        assert part.core.any()


@torch.no_grad()
def test_the_released_norm_acts_through_the_bias_alone():
    """Folded after every step, A B is 0 in every forward, and the trained bias is not."""
    settings = {"r": 4, "inner_r": 6}
    model = get_peft_model(tiny.llama(), type(tiny.config()).released("M1", **settings))
    layer = next(iter(tiny.layers(model).values()))
    x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
    base = layer.base_layer(x)
    torch.testing.assert_close(layer(x), base)
    tiny.parts(model)[0].bias.fill_(1e-3)
    assert (layer(x) / base).median() == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["A", "B", "core", "bias"])
def test_a_trained_tensor_that_is_not_finite_is_noticed(name, value):
    model = tiny.adapted(norm="channel", train_bias=True)
    callback, state = FiniteCallback(), TrainerState(global_step=7)
    callback.on_step_end(None, state, None, model=model)
    with torch.no_grad():
        getattr(tiny.parts(model)[-1], name).view(-1)[-1] = value
    with pytest.raises(DivergedError, match=rf"after step 7, 1 of 16 .*v_proj.*{name}"):
        callback.on_step_end(None, state, None, model=model)


def test_large_values_and_frozen_ones_are_no_divergence():
    model = tiny.adapted(norm="channel")
    with torch.no_grad():
        tiny.parts(model)[0].B.fill_(3e38)
        model.get_input_embeddings().weight[0] = math.nan
    assert not any("embed_tokens" in name for name in trained_tensors(model))
    FiniteCallback().on_step_end(None, TrainerState(), None, model=model)


@pytest.mark.parametrize("name", ["loss", "train_loss"])
def test_a_loss_that_is_not_finite_is_noticed(name):
    callback = FiniteCallback()
    callback.on_log(None, TrainerState(), None, logs={name: 1.0, "grad_norm": math.inf})
    with pytest.raises(DivergedError, match="the loss is nan"):
        callback.on_log(None, TrainerState(), None, logs={name: math.nan})


@pytest.mark.parametrize(("norm", "fold_every"), [("channel", 2), ("weight", 0), ("activation", 2)])
def test_resuming_equals_an_uninterrupted_run(norm, fold_every, tmp_path):
    settings = {
        "norm": norm, "fold_every": fold_every, "train_bias": True,
        "dropout": 0.0 if norm == "weight" else 0.1,
    }  # fmt: skip

    def run(folder, resume=None, **more):
        model = get_peft_model(tiny.llama(), tiny.config(**settings))
        one = trainer(folder, model, [FoldCallback()], **more)
        one.train(resume_from_checkpoint=resume)
        return one

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=3)
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    tiny.assert_same(tiny.snapshot(resumed.model), tiny.snapshot(whole.model))
    trained = tiny.snapshot(whole.model)
    start = tiny.snapshot(get_peft_model(tiny.llama(), tiny.config(**settings)))
    assert any(not torch.equal(trained[name], start[name]) for name in start)


def test_trainer_saves_what_peft_loads(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(norm="channel", fold_every=2))
    run = trainer(tmp_path, model, [FoldCallback()])
    run.train()
    run.save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("adapter_model.bin"))
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model.eval()))


def test_the_chosen_checkpoint_is_loaded_at_the_end(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(norm="channel", fold_every=2, **LEARNS))
    run = trainer(
        tmp_path, model, [FoldCallback()], load_best_model_at_end=True, save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    first = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-2")
    last = PeftModel.from_pretrained(tiny.llama(), tmp_path / f"checkpoint-{STEPS}")
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(first))
    assert not torch.equal(tiny.logits(last), tiny.logits(first))
