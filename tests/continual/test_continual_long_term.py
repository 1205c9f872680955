"""Long-term memory: the moving average, the loss, and that nothing else changes."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import tiny
import torch
from continual_runs import ADAPTERS, adapted, begun, pad, parameters, rows, trainer
from tokenizers import Tokenizer, models
from trainer_runs import losses
from transformers import (
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import (
    SFTConfig,
    SFTTrainer,
)

from secura import fold
from secura.continual import LongTermMemory
from secura.continual.long_term import FILE

BATCH = pad(rows(3))


class Steps(TrainerCallback):
    """The parameters before training and after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(parameters(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(parameters(model))


class Interrupt(TrainerCallback):
    """Training that breaks off in the middle of a step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def mean_squared_difference(model, memory, items: int | None = None) -> torch.Tensor:
    """By hand: over the positions whose next token is scored, and the vocabulary."""
    plain = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    with torch.no_grad():
        working = model(**plain).logits
        with memory.applied(model):
            target = model(**plain).logits
    model.train()
    square = ((working - target)[:, :-1] ** 2).mean(-1)[BATCH["labels"][:, 1:] != -100]
    return square.mean() if items is None else square.sum() / items


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_average_is_that_of_the_steps(accumulation, tmp_path):
    model, steps, memory = adapted(), Steps(), LongTermMemory(ema=0.7)
    run = trainer(tmp_path, model, [steps, memory], gradient_accumulation_steps=accumulation)
    run.train()
    expected, *after = steps.seen
    for values in after:
        expected = {name: 0.7 * expected[name] + 0.3 * values[name] for name in expected}
    assert len(after) == 4
    torch.testing.assert_close(memory.values, expected)
    assert {value.dtype for value in memory.values.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_loss_is_cross_entropy_and_the_weighted_difference(kind):
    model = adapted(kind).train()
    plain = model(**BATCH).loss
    memory = begun(model, weight=3.0)
    added = 3.0 * mean_squared_difference(model, memory)
    assert added > 1e-3
    torch.testing.assert_close(model(**BATCH).loss, plain + added)
    items = torch.tensor(50)
    whole = model(**BATCH, num_items_in_batch=items).loss
    added = 3.0 * mean_squared_difference(model, memory, 50)
    torch.testing.assert_close(whole, plain * (BATCH["labels"] != -100).sum() / 50 + added)
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).loss, plain)
    torch.testing.assert_close(model.eval()(**BATCH).loss, plain)
    memory.detach(model)
    torch.testing.assert_close(model.train()(**BATCH).loss, plain)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_gradient_is_the_working_models_alone(kind):
    model = adapted(kind).train()
    memory = begun(model, weight=3.0)
    model(**BATCH).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    memory.detach(model)
    with torch.no_grad(), memory.applied(model):
        target = model.eval()(input_ids=BATCH["input_ids"]).logits
    model.train().zero_grad()
    output = model(**BATCH)
    scored = BATCH["labels"][:, 1:] != -100
    error = (output.logits - target)[:, :-1][scored]
    (output.loss + 3.0 * error.square().mean()).backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6)
    assert not any(value.requires_grad for value in memory.values.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_and_random_state_are_those_of_a_plain_run(checkpointing):
    outputs = []
    for memory in (False, True):
        model = adapted(dropout=0.5).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        if memory:
            begun(model)
        torch.manual_seed(7)
        output = model(**BATCH)
        output.loss.backward()
        outputs.append((output.logits, torch.get_rng_state()))
        assert all(module.training for module in model.modules())
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_weight_zero_trains_bit_for_bit_as_without(kind, tmp_path):
    runs = []
    for weight in (None, 0.0, 5.0):
        memory = [] if weight is None else [LongTermMemory(ema=0.9, weight=weight)]
        runs.append(trainer(tmp_path, adapted(kind, dropout=0.2), memory))
        runs[-1].train()
    plain, averaged, pulled = runs
    assert losses(plain) == losses(averaged) != losses(pulled)
    tiny.assert_same(parameters(plain.model), parameters(averaged.model))


def test_bf16_autocast_and_evaluation_while_training(tmp_path):
    model = adapted("secura")
    memory = LongTermMemory(ema=0.5)
    run = trainer(tmp_path, model, [memory], bf16=True, eval_strategy="steps", eval_steps=2)
    run.train()
    assert len(losses(run)) == 4
    (kept,) = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e and e["step"] == 4]
    assert run.evaluate()["eval_loss"] == kept
    with memory.applied(model):
        assert run.evaluate()["eval_loss"] != kept


@pytest.mark.parametrize("kind", ADAPTERS)
def test_resuming_equals_an_uninterrupted_run(kind, tmp_path):
    def run(resume=None, **settings):
        model, memory = adapted(kind, dropout=0.1), LongTermMemory(ema=0.6, weight=2.0)
        one = trainer(tmp_path, model, [memory], save_strategy="steps", save_steps=2, **settings)
        one.train(resume_from_checkpoint=resume)
        return one, memory

    whole, values = run()
    resumed, again = run(str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    tiny.assert_same(parameters(resumed.model), parameters(whole.model))
    tiny.assert_same(again.values, values.values)
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(ValueError, match=f"{FILE} is not there"):
        run(str(tmp_path / "checkpoint-2"))


def test_the_next_task_goes_on_from_the_values_of_the_one_before(tmp_path):
    first = LongTermMemory()
    model = adapted()
    trainer(tmp_path / "first", model, [first], max_steps=2).train()
    first.save(tmp_path / "kept.safetensors")
    second = LongTermMemory(start=tmp_path / "kept.safetensors")
    trainer(tmp_path / "second", model, [second], max_steps=1).train()
    for name, value in parameters(model).items():
        expected = 0.99 * first.values[name] + 0.01 * value
        torch.testing.assert_close(second.values[name], expected)
    with pytest.raises(ValueError, match="long-term memory in"):
        trainer(tmp_path / "third", adapted("secura"), [second], max_steps=1).train()


def test_a_second_run_of_the_same_model_goes_on_from_its_values(tmp_path):
    memory, model = LongTermMemory(), adapted()
    trainer(tmp_path / "first", model, [memory], max_steps=2).train()
    before = {name: value.clone() for name, value in memory.values.items()}
    trainer(tmp_path / "second", model, [memory], max_steps=1).train()
    for name, value in parameters(model).items():
        torch.testing.assert_close(memory.values[name], 0.99 * before[name] + 0.01 * value)
    pickle.loads(pickle.dumps(memory))


def test_a_run_of_other_parameters_begins_at_them(tmp_path):
    """Of another model, or of another adapter of it."""
    memory, model, other = LongTermMemory(ema=1.0), adapted(), adapted()
    trainer(tmp_path / "first", model, [memory], max_steps=1).train()
    with torch.no_grad():
        next(iter(p for p in other.parameters() if p.requires_grad)).add_(1)
    begin = parameters(other)
    trainer(tmp_path / "second", other, [memory], max_steps=1).train()
    tiny.assert_same(memory.values, begin)
    other.add_adapter("two", other.peft_config["default"])
    other.set_adapter("two")
    begin = parameters(other)
    trainer(tmp_path / "third", other, [memory], max_steps=1).train()
    tiny.assert_same(memory.values, begin)


def test_a_second_run_after_a_fold_is_refused_before_the_first_step(tmp_path):
    memory, model = LongTermMemory(), adapted("secura")
    trainer(tmp_path / "first", model, [memory], max_steps=1).train()
    fold(model)
    run = trainer(tmp_path / "second", model, [memory], max_steps=1)
    with pytest.raises(ValueError, match="take a new LongTermMemory"):
        run.train()
    assert run.state.global_step == 0


def test_the_best_checkpoint_brings_its_long_term_values(tmp_path):
    model, memory = adapted(), LongTermMemory(ema=0.5)
    run = trainer(
        tmp_path, model, [memory], save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, learning_rate=0.1,
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    fresh = LongTermMemory()
    fresh._read(type(tmp_path)(best) / FILE, model)
    tiny.assert_same(memory.values, fresh.values)


def test_one_process_alone_writes_the_values(tmp_path):
    memory = begun(adapted())
    args = SimpleNamespace(output_dir=tmp_path)
    for first in (False, True):
        state = SimpleNamespace(global_step=2, is_world_process_zero=first)
        memory.on_save(args, state, None)
        assert (tmp_path / "checkpoint-2" / FILE).exists() is first


def test_applied_swaps_and_restores_bit_for_bit():
    model = adapted("secura")
    memory = begun(model)
    before, outputs = parameters(model), tiny.logits(model.eval())
    with pytest.raises(RuntimeError, match="inside"), memory.applied(model):
        tiny.assert_same(parameters(model), memory.values)
        assert not torch.equal(tiny.logits(model), outputs)
        raise RuntimeError("inside")
    tiny.assert_same(parameters(model), before)
    assert torch.equal(tiny.logits(model), outputs)
    memory.copy_to(model)
    tiny.assert_same(parameters(model), memory.values)
    with pytest.raises(ValueError, match="other parameters"):
        memory.copy_to(adapted("lora"))
    with pytest.raises(ValueError, match="other parameters"), LongTermMemory().applied(model):
        pass
    own = parameters(model)
    with memory.applied(model):
        model.requires_grad_(False)
    tiny.assert_same({n: v for n, v in tiny.snapshot(model).items() if n in own}, own)


def test_training_that_breaks_off_is_taken_up_by_the_next(tmp_path):
    model = adapted().train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, [LongTermMemory(), Interrupt()]).train()
    assert len(model._forward_hooks) == 1
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, [LongTermMemory(), Interrupt()]).train()
    assert len(model._forward_hooks) == 1
    trainer(tmp_path, model, [LongTermMemory()]).train()
    assert not model._forward_hooks
    begun(model)
    LongTermMemory.detach(model)
    assert not model._forward_hooks


def sft(folder, model, callbacks=(), **settings) -> SFTTrainer:
    vocab = {f"t{index}": index for index in range(tiny.VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab)), pad_token="t0", eos_token="t2"
    )
    one = trainer(folder, model)
    arguments = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return SFTTrainer(
        model=model, args=SFTConfig(**(arguments | settings)), train_dataset=one.train_dataset,
        processing_class=tokenizer, callbacks=list(callbacks),
    )  # fmt: skip


def test_sft_trainer_trains_as_trainer_does(tmp_path):
    runs = []
    for make in (trainer, sft):
        model, memory = adapted(), LongTermMemory(ema=0.8, weight=20.0)
        settings = {"max_steps": 3, "gradient_accumulation_steps": 2}
        run = make(tmp_path, model, [memory], **settings)
        run.train()
        runs.append((losses(run), memory.values))
    plain = sft(tmp_path, adapted(), gradient_accumulation_steps=2)
    plain.train()
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-3)
    assert losses(plain)[1:] != pytest.approx(runs[1][0][1:], rel=1e-3)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-2, atol=1e-4)


def test_sft_trainers_random_state_is_that_of_a_plain_run(tmp_path):
    states = []
    for callbacks in ([], [LongTermMemory()]):
        sft(tmp_path, adapted(dropout=0.5), callbacks, max_steps=1).train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
