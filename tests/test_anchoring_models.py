"""``secura.anchor`` on models that read or give something else, and where no gradient comes."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForSequenceClassification,
)

from secura import anchor

TEXTS = [torch.arange(3, 25)]


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 24, "vocab_size": tiny.VOCAB}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        **sizes, **heads, **tokens, forced_eos_token_id=2, max_position_embeddings=64
    )
    return BartForConditionalGeneration(config)


def reward():
    config = tiny.llama().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def tuples():
    model = tiny.llama()
    forward = model.forward
    model.forward = lambda input_ids, **rest: forward(input_ids, **rest).to_tuple()
    return model


@pytest.mark.parametrize(
    ("make", "targets", "texts", "message"),
    [
        (tiny.t5, ["q", "v"], TEXTS, "T5ForConditionalGeneration says You must specify"),
        (
            tiny.vit,
            "all-linear",
            TEXTS,
            "take input_ids alone.*: ViTForImageClassification reads pixel_values",
        ),
        (tiny.classifier, ["q_proj"], None, "cannot sample: .* a classifier's are; give texts"),
        (
            tiny.bert,
            ["query"],
            None,
            "cannot sample: a BertForMaskedLM writes no text .*; give texts",
        ),
        (bart, ["q_proj"], None, "cannot sample: a BartForConditionalGeneration writes no text"),
        (reward, ["q_proj"], TEXTS, "LlamaForSequenceClassification gives one number, a reward"),
        (tuples, ["q_proj"], TEXTS, "LlamaForCausalLM gives a tuple without"),
    ],
)
def test_models_that_read_or_give_something_else(make, targets, texts, message):
    config = tiny.config(core="u", norm="none", target_modules=targets, task_type=None)
    model = get_peft_model(make(), config)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        anchor(model, texts, tokens=64)
    tiny.assert_same(tiny.snapshot(model), before)


def test_an_encoder_decoder_that_reads_input_ids_alone():
    adapter = tiny.config(core="u", norm="none", task_type=None)
    model = get_peft_model(bart(), adapter)
    assert anchor(model, TEXTS).layers == len(tiny.parts(model))


def test_where_no_gradient_comes():
    model = tiny.adapted(core="u", norm="none")
    with model.disable_adapter(), pytest.raises(RuntimeError, match="enable them to anchor"):
        anchor(model, TEXTS)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"leave torch.inference_mode"):
        anchor(model, TEXTS)


def test_an_anchor_that_fails_while_it_prepares_leaves_no_hook(monkeypatch):
    model = tiny.cored()
    plain, made = torch.zeros_like, []

    def fail_later(like):
        made.append(like)
        if len(made) == 7:
            raise torch.OutOfMemoryError
        return plain(like)

    monkeypatch.setattr(torch, "zeros_like", fail_later)
    with pytest.raises(torch.OutOfMemoryError):
        anchor(model, TEXTS)
    assert not any(layer._forward_hooks for layer in tiny.layers(model).values())
