"""What works on a small model with PEFT's LoRA and in each of SECURA's norms: docs/limits.md."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
from adapter_files import edit, rewrite
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from secura import SecuraConfig, export_lora

COLUMNS = ("LoRA", *tiny.NORMS)
REFUSALS = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


def config(kind: str, **settings):
    """LoRA's or SECURA's, of rank 4 on q and v."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
    return LoraConfig(**settings) if kind == "LoRA" else SecuraConfig(norm=kind, **settings)


def adapted(kind: str, base=None, **settings) -> PeftModel:
    """A tiny Llama whose adapter does something."""
    model = get_peft_model(base or tiny.llama(), config(kind, **settings))
    change(model, 0, "default")
    return model.eval()


def change(model, seed: int, adapter: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if f".lora_B.{adapter}." in name or name.endswith(f".{adapter}.B"):
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3)


def two(kind: str) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model with two adapters, and the logits of each alone."""
    model = adapted(kind)
    model.add_adapter("second", config(kind))
    change(model, 1, "second")
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = tiny.logits(model)
    assert not torch.allclose(*alone.values())
    return model, alone


def same(first, second) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


# One function a line of the table: it ends well where the thing works


def saves_and_loads(kind, folder):
    model = adapted(kind)
    model.save_pretrained(folder)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=low)
        same(tiny.logits(loaded), tiny.logits(model))


def merges_exactly(kind, folder):
    model = adapted(kind)
    want = tiny.logits(model)
    same(tiny.logits(model.merge_and_unload()), want)


def unmerges_bit_for_bit(kind, folder):
    model = adapted(kind)
    before = tiny.snapshot(model.get_base_model())
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def adds_up(kind, folder):
    model, alone = two(kind)
    model.base_model.set_adapter(["default", "second"])
    assert not any(torch.allclose(tiny.logits(model), other) for other in alone.values())


def merges_one_after_the_other(kind, folder):
    model, _ = two(kind)
    model.merge_adapter(["default"])
    first = tiny.logits(model)
    model.merge_adapter(["second"])
    assert not torch.allclose(tiny.logits(model), first)


def has_an_adapter_a_row(kind, folder):
    model, alone = two(kind)
    names = ["second", "default", "second"]
    got = tiny.logits(model, adapter_names=names)
    same(got, torch.stack([alone[name][row] for row, name in enumerate(names)]))


def weighs_adapters(kind, folder):
    model, _ = two(kind)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "third", "linear")


def swaps_in_place(kind, folder):
    model, alone = two(kind)
    model.save_pretrained(folder)
    model.set_adapter("default")
    hotswap_adapter(model, str(folder / "second"), adapter_name="default", torch_device="cpu")
    same(tiny.logits(model), alone["second"])


def scales(kind, folder):
    model = adapted(kind)
    before = tiny.logits(model)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 2.0)
    assert not torch.allclose(tiny.logits(model), before)


def becomes_a_lora_by_peft(kind, folder):
    model = adapted(kind)
    peft.save_as_lora(folder, model, rank=4)
    same(tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder)), tiny.logits(model))


def becomes_a_lora_by_secura(kind, folder):
    model = adapted(kind)
    lora = PeftModel.from_pretrained(tiny.llama(), export_lora(model, folder / "lora"))
    same(tiny.logits(lora), tiny.logits(model))


def trains_tokens(kind, folder):
    model = adapted(kind, trainable_token_indices=[4, 5]).train()
    assert any("trainable_tokens" in name for name in tiny.gradients(model))


def trains_modules_in_full(kind, folder):
    model = adapted(kind, modules_to_save=["lm_head"]).train()
    assert any("lm_head.modules_to_save" in name for name in tiny.gradients(model))


def drops_out(kind, folder):
    model = adapted(kind, **{"lora_dropout" if kind == "LoRA" else "dropout": 0.5}).train()
    assert not torch.equal(tiny.logits(model), tiny.logits(model))


def trains_a_bias(kind, folder):
    model = adapted(kind, **({"lora_bias": True} if kind == "LoRA" else {"train_bias": True}))
    assert any(name.endswith("bias") for name in tiny.gradients(model.train()))


def takes_conv1d(kind, folder):
    adapted(kind, tiny.gpt2(), target_modules=["c_attn"])


def takes_embeddings(kind, folder):
    adapted(kind, target_modules=["embed_tokens"])


def repeats_layers(kind, folder):
    adapted(kind, layer_replication=[[0, 2], [1, 2]])


def notices_a_changed_tensor(kind, folder):
    adapted(kind).save_pretrained(folder)
    rewrite(folder, lambda state: next(iter(state.values())).view(-1)[0].add_(1))
    assert refused(lambda: PeftModel.from_pretrained(tiny.llama(), folder))


def notices_another_base(kind, folder):
    adapted(kind).save_pretrained(folder)
    assert refused(lambda: PeftModel.from_pretrained(tiny.llama(1), folder))


def notices_an_edited_scaling(kind, folder):
    adapted(kind).save_pretrained(folder)
    edit(folder, **({"lora_alpha": 99} if kind == "LoRA" else {"scaling": 99.0}))
    assert refused(lambda: PeftModel.from_pretrained(tiny.llama(), folder))


def refuses_to_merge_nan(kind, folder):
    model = adapted(kind)
    for name, value in model.named_parameters():
        if ".lora_B." in name or name.endswith(".B"):
            value.data.fill_(torch.nan)
    assert refused(model.merge_and_unload)


def refused(do) -> bool:
    try:
        do()
    except REFUSALS:
        return True
    return False


Y, R, N = "yes", "refused", "no"
TABLE = {
    saves_and_loads: ("save and load, also with `low_cpu_mem_usage`", Y, Y, Y, Y, Y),
    merges_exactly: ("merge, the same function afterwards", Y, Y, Y, Y, R),
    unmerges_bit_for_bit: ("unmerge bit for bit", N, Y, Y, Y, R),
    adds_up: ("several adapters active together on a layer", Y, Y, R, R, R),
    merges_one_after_the_other: ("adapters of one layer merged in turn", Y, Y, R, R, R),
    has_an_adapter_a_row: ("an adapter a row of the batch (`adapter_names`)", Y, Y, Y, Y, Y),
    weighs_adapters: ("`add_weighted_adapter`", Y, R, R, R, R),
    swaps_in_place: ("`hotswap_adapter`", Y, R, R, R, R),
    scales: ("`set_scale`, `scale_layer`", Y, Y, Y, Y, Y),
    becomes_a_lora_by_peft: ("PEFT's `convert_to_lora`, exact", Y, Y, R, R, R),
    becomes_a_lora_by_secura: ("`export_lora`, exact", R, Y, Y, R, R),
    trains_tokens: ("`trainable_token_indices`", Y, Y, Y, Y, Y),
    trains_modules_in_full: ("`modules_to_save`", Y, Y, Y, Y, Y),
    drops_out: ("dropout", Y, Y, Y, R, Y),
    trains_a_bias: ("a trained bias", Y, Y, Y, Y, Y),
    takes_conv1d: ("transformers' `Conv1D` as target", Y, Y, Y, Y, Y),
    takes_embeddings: ("embedding layers as target", Y, R, R, R, R),
    repeats_layers: ("`layer_replication`", Y, R, R, R, R),
    notices_a_changed_tensor: ("a tensor changed in the file is noticed", N, Y, Y, Y, Y),
    notices_another_base: ("another base weight is noticed", N, Y, Y, Y, Y),
    notices_an_edited_scaling: ("a scaling edited in the config is noticed", N, Y, Y, Y, Y),
    refuses_to_merge_nan: ("NaN is not merged, without `safe_merge`", N, Y, Y, Y, Y),
}


@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=COLUMNS)
@pytest.mark.parametrize("feature", TABLE, ids=lambda feature: feature.__name__)
def test_beside_lora(feature, column, tmp_path):
    """``yes`` ends well, ``refused`` is an error in words, ``no`` goes wrong without one."""
    wanted, kind = TABLE[feature][1 + column], COLUMNS[column]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if wanted == Y:
            feature(kind, tmp_path)
            return
        with pytest.raises(REFUSALS if wanted == R else AssertionError):
            feature(kind, tmp_path)


def test_the_table_in_the_docs_is_this_one():
    names = [*COLUMNS[:1], *(f"`{norm}`" for norm in COLUMNS[1:])]
    lines = [["", *names, "test"], ["---"] * (len(COLUMNS) + 2)]
    lines += [[*cells, f"`{feature.__name__}`"] for feature, cells in TABLE.items()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")
    page = Path(__file__).parents[2] / "docs" / "limits.md"
    assert table in page.read_text(encoding="utf-8"), f"put this into {page.name}:\n{table}"
