"""Adapters on the base, the vocabulary and the tokenizer they were trained with."""

from __future__ import annotations

import json
import os

import pytest
import tiny
import torch
from cli_fixtures import fails, train_flags
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from secura.cli import adapters, main

PROMPT = ["--prompt", "ann has 3 apples", "--max_new_tokens", "6"]
CHAT = (
    "{% for turn in messages %}<s> {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}answer is {% endif %}"
)


def argv(command, adapter, *more):
    return [command, "--adapter", str(adapter), *map(str, more)]


def adapter_on(model, base, folder, tokenizer=None, **settings):
    """An adapter of `model` that names `base`, in `folder`; and the model."""
    model = tiny.adapted(model, norm="channel", **settings)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


def logits(model, ids=None):
    with torch.inference_mode():
        return model(torch.arange(3, 20)[None] if ids is None else ids).logits


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_an_adapter_in_a_models_place(command, trained, tmp_path, capfd):
    more = PROMPT if command == "generate" else ["--output_dir", tmp_path / "out"]
    flags = argv(command, trained, "--model", trained, *more)
    fails(flags, capfd, "is an adapter, not a model", "--adapter_name_or_path")
    if command == "generate":
        fails(["generate", "--model", trained, *more], capfd, "is an adapter, not a model")


@pytest.mark.parametrize("command", ["train", "merge", "export_lora", "generate"])
def test_revision_and_trust_are_given_to_transformers(
    command, base, data, tmp_path, capfd, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter_on(model, base, tmp_path / "adapter", task_type="CAUSAL_LM")
    more = PROMPT if command == "generate" else ["--output_dir", tmp_path / "out"]
    flags = argv(command, tmp_path / "adapter", *more)
    if command == "train":
        flags = train_flags(base, data, tmp_path / "out")
    given = {}

    def load(name, **kwargs):
        given.update(kwargs)
        raise OSError("no more is asked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    for asked, expected in (
        ([], ("main", False)),
        (["--model_revision", "v2", "--trust_remote_code"], ("v2", True)),
    ):
        fails([*flags, *asked], capfd, "no more is asked")
        assert (given["revision"], given["trust_remote_code"]) == expected


@pytest.mark.parametrize("named", [True, False])
def test_a_classifier_is_merged_with_its_head(named, base, tmp_path, capfd):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    settings = {"task_type": "SEQ_CLS"} if named else {"modules_to_save": ["score"]}
    model = adapter_on(model, base, tmp_path / "adapter", **settings)
    flags = argv("merge", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert main(flags) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    model.config.pad_token_id = merged.config.pad_token_id
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    if named:
        fails(argv("generate", tmp_path / "adapter", *PROMPT), capfd, "SEQ_CLS", "no text")


def test_a_head_that_neither_base_nor_adapter_has_is_not_merged(base, tmp_path, capfd):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapter_on(model, base, tmp_path / "adapter")
    flags = argv("merge", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    fails(flags, capfd, "lacks score.weight, which would be random")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_what_the_adapter_brings_or_is_not_asked_for_may_be_missing(task, base, tmp_path):
    """A pooler, in the adapter's file by a name with dots; of a model without a head, unused."""
    config = BertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    under = tmp_path / "base"
    BertForMaskedLM(config).save_pretrained(under)
    AutoTokenizer.from_pretrained(base).save_pretrained(under)
    classes = {"SEQ_CLS": BertForSequenceClassification, "FEATURE_EXTRACTION": BertModel}
    own = ["bert.pooler"] if task == "SEQ_CLS" else None
    settings = {"target_modules": ["query"], "task_type": task, "modules_to_save": own}
    adapter_on(classes[task].from_pretrained(under), under, tmp_path / "adapter", **settings)
    assert main(argv("merge", tmp_path / "adapter", "--output_dir", tmp_path / "merged")) == 0


@pytest.mark.parametrize("own", [True, False])
def test_a_classifiers_labels_keep_their_names(own, base, tmp_path, capfd):
    names = {0: "good", 1: "bad", 2: "ugly"}
    ids = {name: label for label, name in names.items()}
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, id2label=names, label2id=ids
    )
    under = tmp_path / "base" if own else base
    if own:  # the base knows its labels itself
        model.save_pretrained(under)
        AutoTokenizer.from_pretrained(base).save_pretrained(under)
    adapter_on(model, under, tmp_path / "adapter", task_type="SEQ_CLS")
    assert main(argv("merge", tmp_path / "adapter", "--output_dir", tmp_path / "merged")) == 0
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert (config.id2label, config.label2id) == (names, ids)
    assert main(argv("export_lora", tmp_path / "adapter", "--output_dir", tmp_path / "lora")) == 0
    assert "no place for the labels' names {0: 'good', 1: 'bad'" in capfd.readouterr().out


def test_a_classifier_is_no_language_model(base, data, tmp_path, capfd):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    say = ("is no language model (LlamaForSequenceClassification)", "lm_head.weight")
    fails(train_flags(tmp_path / "base", data, tmp_path / "out"), capfd, *say)
    fails(["generate", "--model", tmp_path / "base", *PROMPT], capfd, *say)
    assert not (tmp_path / "out").exists()


def test_a_model_of_images_is_told_what_it_is_not(base, data, tmp_path, capfd):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    say = ("Unrecognized configuration class", "with PEFT and a Trainer")
    shown = fails(train_flags(tmp_path / "base", data, tmp_path / "out"), capfd, *say)
    assert "Model type should be one of" not in (shown or "") and not (tmp_path / "out").exists()
    adapter_on(model, tmp_path / "base", tmp_path / "adapter", target_modules="all-linear")
    fails([*argv("generate", tmp_path / "adapter"), *PROMPT], capfd, "writes no text from a text")


def test_the_merged_configurations_agree_with_the_tokenizer(base, data, tmp_path):
    flags = ("--eos_token", "is", "--save_strategy", "no", "--max_steps", 1)
    assert main(train_flags(base, data, tmp_path / "adapter", *flags)) == 0
    merged = tmp_path / "merged"
    assert main(argv("merge", tmp_path / "adapter", "--output_dir", merged)) == 0
    eos = AutoTokenizer.from_pretrained(merged).eos_token_id
    assert eos != 2
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == eos
    ends = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [eos, 2]


def test_the_adapters_chat_template_is_used(base, tmp_path, capfd):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = CHAT
    model = adapter_on(
        AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "adapter", tokenizer,
        target_modules="all-linear",
    )  # fmt: skip
    assert main(argv("generate", tmp_path / "adapter", *PROMPT)) == 0
    answer = capfd.readouterr().out.split()
    ids = tokenizer("<s> ann has 3 apples </s> answer is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
    assert answer == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).split()
    assert main(argv("generate", tmp_path / "adapter", *PROMPT, "--raw")) == 0
    assert capfd.readouterr().out.split() != answer


def grown(base):
    """The base with two more tokens, its tokenizer, and their ids."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens(["<x>", "<y>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer, torch.tensor([[len(tokenizer) - 2, len(tokenizer) - 1, 5, 6]])


def test_added_tokens_outlast_merging_and_exporting(base, tmp_path, capfd):
    model, tokenizer, ids = grown(base)
    saved = ["embed_tokens", "lm_head"]
    model = get_peft_model(model, tiny.config(norm="channel", modules_to_save=saved))
    tiny.perturb(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:] += 1
    model = adapter_on_peft(model, base, tmp_path / "adapter", tokenizer)
    out = ("--output_dir", tmp_path / "merged")
    assert main(argv("merge", tmp_path / "adapter", *out)) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert main(argv("generate", tmp_path / "adapter", *PROMPT)) == 0
    assert main(argv("export_lora", tmp_path / "adapter", "--output_dir", tmp_path / "lora")) == 0
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert lora["base_model.model.lm_head.weight"].shape[0] == len(tokenizer)
    only_head = {
        name: value
        for name, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
        if "embed_tokens" not in name
    }
    save_file(only_head, tmp_path / "adapter/adapter_model.safetensors")
    flags = argv("merge", tmp_path / "adapter", "--output_dir", tmp_path / "again")
    fails(flags, capfd, "39 tokens, its base has 37", "embed_tokens", "--modules_to_save")


def adapter_on_peft(model, base, folder, tokenizer):
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("command", ["merge", "generate"])
def test_added_tokens_that_nothing_holds(command, base, tmp_path, capfd):
    _, tokenizer, _ = grown(base)
    adapter_on(AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "adapter", tokenizer)
    more = PROMPT if command == "generate" else ["--output_dir", tmp_path / "out"]
    flags = argv(command, tmp_path / "adapter", *more)
    fails(flags, capfd, "39 tokens, its base has 37", "--modules_to_save embed_tokens lm_head")
    assert not (tmp_path / "out").exists()


def test_resized_embeddings_that_the_file_holds_are_carried_on(base, tmp_path, capfd):
    model, tokenizer, ids = grown(base)
    model = adapter_on(model, base, tmp_path / "adapter", tokenizer)
    assert "base_model.model.lm_head.weight" in load_file(
        tmp_path / "adapter/adapter_model.safetensors"
    )
    for command in ("export_lora", "merge"):
        assert main(argv(command, tmp_path / "adapter", "--output_dir", tmp_path / command)) == 0
    assert "vLLM takes no modules_to_save, trained tokens or resized" in capfd.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merge")
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lora = PeftModel.from_pretrained(larger, tmp_path / "export_lora")
    torch.testing.assert_close(logits(lora, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_a_lora_whose_tokenizer_is_not_written_is_not_there(base, tmp_path, monkeypatch, capfd):
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    adapter_on(model, base, tmp_path / "adapter", tokenizer)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    flags = argv("export_lora", tmp_path / "adapter", "--output_dir", tmp_path / "lora")
    fails(flags, capfd, "No space left")
    assert not (tmp_path / "lora").exists()


def test_an_adapter_config_of_no_sense_is_one_line(trained, tmp_path, capfd):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in trained.glob("adapter_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((trained / "adapter_config.json").read_text())
    out = ["--output_dir", tmp_path / "merged"]
    for change in ({"target_modules": 3}, {"r": "4"}, {"rank_pattern": []}, {"modules_to_save": 1}):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        fails(argv("merge", folder, *out), capfd)
    told = (b"[]", b'{"r": ', b"\xff\xfe", json.dumps(config | {"init": 0}).encode())
    for damaged in (*told, json.dumps(config | {"base_model_name_or_path": 2.5}).encode()):
        (folder / "adapter_config.json").write_bytes(damaged)
        fails(argv("merge", folder, *out), capfd, str(folder), "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "post_processor": {"type": "No"}}')
    fails(argv("merge", folder, *out), capfd, str(folder))
    (folder / "adapter_model.safetensors").unlink()
    fails(argv("merge", folder, *out), capfd, "the folder has no adapter_model.safetensors; give")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_file_is_told_wherever_it_is_opened(tmp_path, monkeypatch):
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"half")
    with pytest.raises(ValueError, match="cut short or is no safetensors file"):
        adapters.undeclared(tiny.adapted(), file)
    monkeypatch.setattr(adapters, "undeclared", lambda *_: [])
    with pytest.raises(ValueError, match="cut short or is no safetensors file"):
        adapters.refuse_left_out(tiny.adapted(), file, "adapter")


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("kind", ["new", "empty", "link", "here"])
def test_where_a_merged_checkpoint_goes(kind, trained, tmp_path, monkeypatch):
    folder = tmp_path / "merged"
    if kind != "new":
        folder.mkdir()
    target = folder
    if kind == "link":
        target = tmp_path / "link"
        target.symlink_to(folder)
    if kind == "here":
        monkeypatch.chdir(folder)
        target = "."
    before = os.umask(0o022)
    try:
        assert main(argv("merge", trained, "--output_dir", target)) == 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755
    assert os.path.samefile(target, folder)
    assert {path.name for path in tmp_path.iterdir()} <= {"merged", "link"}
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= names and ".saving" not in names


def test_a_revision_is_of_the_base_that_the_adapter_names():
    config = tiny.config(revision="a-branch", base_model_name_or_path="owner/base")
    assert adapters.base_of(config, "it", None, None) == ("owner/base", "a-branch")
    assert adapters.base_of(config, "it", None, "other") == ("owner/base", "other")
    assert adapters.base_of(config, "it", "owner/copy", None) == ("owner/copy", "main")
