"""TRL's trainers: a ``SecuraConfig`` where they take a LoRA's, and what they compare with."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from secura import FoldCallback, anchor, fold, from_pretrained

TEXT = {"text": [f"t{3 + i} t{4 + i} t{5 + i} t{6 + i}" for i in range(8)]}
PAIRS = {
    "prompt": [f"t{3 + i} t{4 + i}" for i in range(8)],
    "chosen": [f" t{5 + i}" for i in range(8)],
    "rejected": [f" t{15 + i} t7" for i in range(8)],
}
JUDGED = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False] * 4}


def reward(completions, **columns) -> list[float]:
    """Not the same for the completions of one prompt."""
    return [float(place % 2) for place, _ in enumerate(completions)]


TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, TEXT, {}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        {"prompt": PAIRS["prompt"]},
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
    ),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {}),
    "kto": (KTOTrainer, KTOConfig, JUDGED, {}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def trainer(method, folder, tokenizer, model, *, rows=None, settings=None, **more):
    """A trainer of two steps; ``settings`` are its config's, ``more`` its own."""
    cls, config, usual, needed = TRAINERS[method]
    args = config(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=3e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, **needed, **(settings or {}),
    )  # fmt: skip
    if method == "grpo":
        more["reward_funcs"] = reward
    return cls(
        model=model, args=args, train_dataset=Dataset.from_dict(rows or usual),
        processing_class=tokenizer, **more,
    )  # fmt: skip


def fresh(method):
    """The base model of a trainer: a decoder, or for a reward one with a head."""
    return tiny.classifier(labels=1) if method == "reward" else tiny.llama()


@pytest.mark.parametrize(
    ("method", "norm"),
    [*zip(TRAINERS, ("weight", "channel", "none", "activation", "channel"), strict=True)],
)
def test_trainers_take_the_config(method, norm, tokenizer, tmp_path):
    run = trainer(
        method, tmp_path, tokenizer, fresh(method), peft_config=tiny.config(norm=norm),
        callbacks=[FoldCallback(2)],
    )  # fmt: skip
    assert isinstance(run.model, PeftModel)
    run.train()
    assert run.state.global_step == 2
    assert all(part.core.any() for part in tiny.parts(run.model))
    heads = {"score.modules_to_save.default.weight", "score.original_module.weight", "score.weight"}
    base, now = tiny.snapshot(fresh(method)), tiny.base_weights(run.model)
    assert now.keys() - heads == base.keys() - heads
    assert all(torch.equal(base[name], now[name]) for name in base.keys() - heads)
    run.save_model(tmp_path / "saved")
    loaded = from_pretrained(fresh(method), tmp_path / "saved")
    assert torch.equal(tiny.logits(loaded.eval()), tiny.logits(run.model.eval()))


@pytest.mark.parametrize(("core", "anchored"), [("ab", False), ("u", False), ("u", True)])
@pytest.mark.parametrize("folded", [False, True])
def test_the_reference_is_the_adapter_as_it_was(folded, core, anchored, tokenizer, tmp_path):
    """TRL copies parameters alone; what was folded, anchored or rescaled is in it all the same."""
    model = tiny.adapted(norm="channel", norm_reference="folded", core=core)
    for layer in tiny.layers(model).values():
        layer.set_scale("default", 1.5)
    if anchored:
        anchor(model, list(tiny.tokens(3, 9)))
    if folded:
        fold(model)
        tiny.perturb(model)
    before = tiny.logits(model)
    run = trainer("dpo", tmp_path, tokenizer, model)
    run.model.set_adapter("ref")
    torch.testing.assert_close(tiny.logits(run.model.eval()), before)
    run.model.set_adapter("default")
    run.train()
    assert abs(run.state.log_history[0]["rewards/chosen"]) < 1e-6
    fold(run.model)
    run.model.set_adapter("ref")
    torch.testing.assert_close(tiny.logits(run.model.eval()), before)


def test_another_adapter_with_the_same_config_starts_anew():
    model = tiny.adapted(norm="none")
    fold(model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.llama()))


def test_sft_trainer_trains_the_tokens_of_another_models_chat_template(tokenizer, tmp_path):
    other, own = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    other.chat_template = (
        "{% for m in messages %}<|start|> {{ m.role }} {{ m.content }} </s>{% endfor %}"
    )
    other.save_pretrained(tmp_path / "other")
    turns = [("user", "t4 t5 t6"), ("assistant", "t7 t8")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    run = trainer(
        "sft", tmp_path, own, tiny.llama(), rows={"messages": [row["messages"]] * 8},
        settings={"chat_template_path": str(tmp_path / "other")},
        peft_config=tiny.config(norm="channel"),
    )  # fmt: skip
    config, embeddings = run.model.peft_config["default"], run.model.get_input_embeddings()
    added, count = config.trainable_token_indices["embed_tokens"], embeddings.weight.shape[0]
    assert added == list(range(tiny.VOCAB, count))
    before = embeddings.weight.detach().clone()
    run.train()
    changed = (embeddings.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [own.convert_tokens_to_ids("<|start|>")]
    run.save_model(tmp_path / "saved")
    base = tiny.llama()
    base.resize_token_embeddings(count)
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    ids = torch.tensor([[4, changed[0], 5]])
    assert torch.equal(tiny.logits(loaded, ids), tiny.logits(run.model.eval(), ids))
