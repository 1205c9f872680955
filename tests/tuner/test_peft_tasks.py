"""Tasks and models that PEFT treats in ways of their own: heads, sound, images, traces."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from secura import AdapterConfig, SECURALinear
from secura.cli import main


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_tasks_whose_head_peft_adds_late(kind, task, head, targets, tmp_path):
    """The head is trained in full and saved once, whatever layers are adapted."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    base = kind(BertConfig(vocab_size=60, num_attention_heads=4, **sizes))
    state = {name: value.clone() for name, value in base.state_dict().items()}
    config = tiny.config(target_modules=targets, task_type=task, norm="channel")
    model = get_peft_model(base, config)
    tiny.perturb(model)
    with torch.no_grad():
        trained = [p for n, p in model.named_parameters() if head in n and p.requires_grad]
        for value in trained:
            value.add_(0.1)
    assert trained
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert head in saved and len(set(saved)) == len(saved)
    plain = kind(base.config)
    plain.load_state_dict(state)
    ids = torch.arange(3, 20)[None]
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids)[0], model.eval()(input_ids=ids)[0])


def test_a_model_without_token_embeddings_is_reloaded(tmp_path):
    """As a Trainer that resumes, or loads the best of its checkpoints, does it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Wav2Vec2Config(
        num_attention_heads=4, conv_dim=[8], conv_kernel=[4], conv_stride=[4], vocab_size=12,
        num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        **sizes,
    )  # fmt: skip
    model = get_peft_model(Wav2Vec2ForCTC(config), tiny.config(target_modules=["q_proj"]))
    tiny.perturb(model)
    model.save_pretrained(tmp_path)
    before = tiny.parts(model)[0].B.clone()
    tiny.perturb(model, 1)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(tiny.parts(model)[0].B, before)


def test_adapters_are_not_combined_into_one():
    model = tiny.adapted(norm="none")
    with pytest.raises(ValueError, match=r"not combined into one.*set_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_model_of_images_is_merged_by_the_command_line(tmp_path):
    """What embeds its patches has no weight a token."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = ViTConfig(num_attention_heads=4, image_size=8, patch_size=4, num_labels=3, **sizes)
    base = ViTForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    model = tiny.adapted(base, **settings)
    tiny.perturb(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    flags = ["--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert main(["merge", *flags]) == 0
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    image = torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(merged(image).logits, model.eval()(image).logits)


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_a_trace_computes_the_same(norm):
    """`torch.jit.trace` knows torch's operators alone."""
    layer = SECURALinear(nn.Linear(16, 12), AdapterConfig(r=4, norm=norm)).eval()
    nn.init.normal_(layer.B)
    x = torch.randn(3, 16)
    traced = torch.jit.trace(layer, (torch.randn(3, 16),))
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("norm", ["none", "channel"])
@pytest.mark.parametrize("saved", [None, ["classifier"], ["roberta.encoder.layer.0.output"]])
def test_a_head_without_a_weight_of_its_own_is_merged_and_unloaded(norm, saved):
    """RoBERTa's and others' head is a module of layers, as is a block that is saved in full."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = RobertaConfig(vocab_size=60, num_attention_heads=4, pad_token_id=1, **sizes)
    base = RobertaForSequenceClassification(config)
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(
        base,
        tiny.config(
            target_modules=["query", "value"], task_type=None if saved else "SEQ_CLS", norm=norm,
            modules_to_save=saved,
        ),
    ).eval()  # fmt: skip
    tiny.perturb(model)
    ids = torch.arange(3, 20)[None]
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(plain)
