"""``trainable_token_indices``: embeddings of some tokens, trained and saved beside the layers."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from adapter_files import CONFIG, WEIGHTS, edit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura import export_lora
from secura.cli import main

TOKENS = [3, 5, 30]
IDS = torch.tensor([[7, 3, 5, 30, 9, 4]])
FORMS = [TOKENS, {"embed_tokens": TOKENS}]


def llama(tied: bool = False):
    """A tiny Llama, with its output layer's weight that of its embeddings or not."""
    model = tiny.llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def adapted(tied: bool = False, tokens=None, **settings):
    """An adapter whose tokens were trained a step."""
    settings = {"norm": "channel", "trainable_token_indices": tokens or TOKENS} | settings
    model = tiny.adapted(llama(tied), **settings)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tiny.gradients(model, IDS)
    optimizer.step()
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", FORMS)
def test_those_rows_alone_are_trained_saved_loaded_and_merged(tied, tokens, tmp_path):
    model = adapted(tied, tokens)
    want, plain = tiny.logits(model, IDS), llama(tied)
    model.save_pretrained(tmp_path)
    extra = [n for n in load_file(tmp_path / WEIGHTS) if ".secura_adapter." not in n]
    assert extra == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert json.loads((tmp_path / CONFIG).read_text())["base_tensors"] is None
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(tied), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(tiny.logits(loaded, IDS), want)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, IDS), tiny.logits(plain, IDS))
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model, IDS), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model, IDS), want)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged, IDS), want, rtol=1e-4, atol=1e-5)
    rows = merged.get_input_embeddings().weight != plain.get_input_embeddings().weight
    assert rows.any(1).nonzero().flatten().tolist() == TOKENS


@pytest.mark.parametrize("tokens", ["weight", 3, [1.5], [-1], [True], {"embed_tokens": 3}, (3,)])
def test_what_is_no_list_of_tokens_is_an_error(tokens):
    with pytest.raises(ValueError, match="must be a list of token ids, or a dict of such lists"):
        tiny.config(trainable_token_indices=tokens)


def test_they_come_along_to_a_lora(tmp_path):
    model = adapted()
    lora = PeftModel.from_pretrained(llama(), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(
        tiny.logits(lora, IDS), tiny.logits(model, IDS), rtol=1e-4, atol=1e-5
    )


def test_other_tokens_than_those_that_were_trained_are_an_error(tmp_path):
    adapted().save_pretrained(tmp_path)
    edit(tmp_path, trainable_token_indices=[3, 6, 30])
    with pytest.raises(ValueError, match=r"saved with other settings.*the tokens were changed"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_row_of_the_batch_has_tokens_of_its_own():
    model = adapted()
    model.add_adapter("second", tiny.config(norm="channel"))
    tiny.perturb(model, 1, "second")
    ids, want = IDS.repeat(2, 1), []
    for row, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        want.append(tiny.logits(model, ids)[row])
    model.set_adapter("default")
    got = tiny.logits(model, ids, adapter_names=["default", "second"])
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_were_added(tied, base, tmp_path):
    """Where tied, PEFT saves the head's names beside the embedding's, as the table was resized."""
    own = AutoModelForCausalLM.from_pretrained(base)
    own.config.tie_word_embeddings = tied
    own.tie_weights()
    own.save_pretrained(tmp_path / "own")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "own")
    base = tmp_path / "own"

    def load():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(count + 2, mean_resizing=False)
        return model

    count = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    added = [count, count + 1]
    model = tiny.adapted(load(), norm="channel", trainable_token_indices={"embed_tokens": added})
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    rows.data.normal_()
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(adapter)
    loaded = PeftModel.from_pretrained(load(), adapter)
    loaded.load_adapter(adapter, "default", is_trainable=True)  # as a Trainer that resumes
    loaded.eval()
    ids = torch.tensor([[3, *added]])
    want = tiny.logits(model, ids)
    torch.testing.assert_close(tiny.logits(loaded, ids), want, rtol=0, atol=0)
    flags = f"--adapter {adapter} --output_dir {merged}"
    assert main(["merge", *flags.split()]) == 0
    plain = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(tiny.logits(plain, ids), want, rtol=1e-4, atol=1e-5)


def test_a_tied_heads_own_table_is_not_taken_from_a_file(tmp_path):
    """PEFT writes no such tensor but where it says so; it would overwrite the embeddings."""
    adapted(tied=True).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    table = llama(tied=True).get_input_embeddings().weight
    name = "base_model.model.lm_head.token_adapter.base_layer.weight"
    save_file(state | {name: torch.full_like(table, 7.0).detach()}, tmp_path / WEIGHTS)
    edit(tmp_path, checksum="", base_tensors=None)
    with pytest.raises(ValueError, match="would overwrite the model's"):
        PeftModel.from_pretrained(llama(tied=True), tmp_path)
