"""Adapters on models whose weights come later: they become real with them, and lose nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from secura import AdapterConfig, SECURALinear, fold, integrity
from secura_kernels import init_a
from secura_kernels.cur import INITS


def unloaded():
    with torch.device("meta"):
        return tiny.llama()


def load(model, fresh):
    """The weights of ``fresh`` into the adapted ``model``, and what no state_dict holds."""
    names = {name.replace(".base_layer", ""): name for name in model.state_dict()}
    state = {names[f"base_model.model.{n}"]: v for n, v in fresh.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.base_model.model.model.rotary_emb = fresh.model.rotary_emb


def assign(model, fresh):
    """As a loader does that sets tensors one by one, past the adapters."""
    base = model.base_model.model
    for name, value in fresh.named_parameters():
        owner, _, own = name.rpartition(".")
        module = base.get_submodule(owner)
        setattr(getattr(module, "base_layer", module), own, value.requires_grad_(False))
    base.model.rotary_emb = fresh.model.rotary_emb
    tiny.logits(model)  # the first use


@pytest.mark.parametrize("bring", [load, assign])
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_an_adapter_becomes_real_with_its_base(norm, bring):
    settings = {"norm": norm, "restrain": norm != "none", "train_bias": True}
    plain = tiny.adapted(**settings)
    model = get_peft_model(unloaded(), tiny.config(**settings))
    trained = [value for value in model.parameters() if value.requires_grad]
    bring(model, tiny.llama())
    now = [value for value in model.parameters() if value.requires_grad]
    assert all(one is other for one, other in zip(trained, now, strict=True))  # an optimizer's too
    tiny.perturb(model)
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(plain))
    got, expected = tiny.gradients(model), tiny.gradients(plain)
    tiny.assert_same(got, expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_file_loaded_before_its_base_is_kept_and_compared_with_it(
    seed, low_cpu_mem_usage, tmp_path
):
    plain = tiny.adapted(norm="channel", selection="inverse_sampling")
    fold(plain)
    tiny.perturb(plain, seed=3)
    plain.save_pretrained(tmp_path)
    how = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(unloaded(), tmp_path, **how).eval()
    load(model, tiny.llama(seed))
    if seed:
        with pytest.raises(ValueError, match="trained on another base weight"):
            tiny.logits(model)
    else:
        assert torch.equal(tiny.logits(model), tiny.logits(plain))


@pytest.mark.parametrize("to_empty", [True, False])
def test_what_was_moved_to_the_meta_device_comes_back(to_empty):
    model = tiny.adapted(norm="channel")
    fold(model)
    tiny.perturb(model)
    before, kept = tiny.logits(model), tiny.snapshot(model)
    rotary = tiny.llama().model.rotary_emb
    model.to("meta")
    names = model.state_dict().keys()
    assert not [n for n in names if n.endswith(("rows", "cols", "core", "checksum"))]
    if to_empty:
        model.to_empty(device="cpu")
    given = {name: kept[name] for name in names}
    model.load_state_dict(given, strict=not to_empty, assign=not to_empty)
    model.base_model.model.model.rotary_emb = rotary
    assert torch.equal(tiny.logits(model), before)


def test_ranks_are_checked_before_the_weights_come():
    with pytest.raises(ValueError, match="between 1 and min"):
        SECURALinear(nn.Linear(8, 4, device="meta"), AdapterConfig(r=5))


@pytest.mark.parametrize("core", ["ab", "u"])
def test_a_layer_made_within_the_meta_device_takes_a_file(core):
    """The context's device is that of every new tensor that names none."""
    config = AdapterConfig(r=4, norm="channel", core=core)
    trained = SECURALinear(nn.Linear(8, 6), config)
    nn.init.normal_(trained.trained)
    with torch.device("meta"):
        layer = SECURALinear(nn.Linear(8, 6), config)
    layer.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), trained(x))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_made_within_the_meta_device_on_a_real_layer(init):
    base = nn.Linear(8, 6)
    with torch.device("meta"):
        layer = SECURALinear(base, AdapterConfig(r=4, init=init, inner_r=4))
        layer.state_dict()
    assert not any(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    assert layer(torch.randn(3, 8)).shape == (3, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("norm", tiny.NORMS)
def test_another_default_dtype_changes_no_adapter(norm, dtype):
    """As where a recipe builds a model in bf16."""
    weight = torch.randn(6, 8)
    torch.set_default_dtype(dtype)
    try:
        layer = SECURALinear(nn.Linear(8, 6), AdapterConfig(r=4, norm=norm, train_bias=True))
        layer(torch.randn(3, 8)).sum().backward()
        layer.fold()
        layer(torch.randn(3, 8))
        assert {init_a(weight, 4, 4, init).dtype for init in INITS} == {torch.float32}
        assert integrity.fingerprint(weight).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    own = {"A": layer.A, "B": layer.B, "bias": layer.bias, "core": layer.core}
    own |= {"fingerprint": layer.fingerprint, "gram": layer.gram}
    wide = layer.gram is not None and torch.promote_types(dtype, torch.float32)
    for name, tensor in own.items():
        expected = wide if name == "gram" else torch.float32
        assert tensor is None or tensor.dtype == expected, name


def emptied():
    with torch.device("meta"):
        layer = SECURALinear(nn.Linear(8, 6), AdapterConfig(r=4, norm="channel"))
    return layer.to_empty(device="cpu")


def copied(lacking=""):
    """A trained layer, and an emptied one into which its tensors were copied in place.

    As torch.distributed.checkpoint loads, without load_state_dict.
    """
    trained, layer = SECURALinear(nn.Linear(8, 6), AdapterConfig(r=4, norm="channel")), emptied()
    nn.init.normal_(trained.B)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name != lacking:
                tensor.copy_(trained.state_dict()[name])
    return trained, layer


def test_tensors_that_are_copied_in_place_are_taken_over():
    trained, layer = copied()
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), trained(x)) and torch.equal(layer.rows, trained.rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [("core", "do not match their checksum"), ("base.weight", "trained on another base weight")],
)
def test_a_copy_that_is_damaged_or_for_another_base_is_refused(name, message):
    _, layer = copied()
    with torch.no_grad():
        layer.get_parameter(name).add_(1) if "." in name else layer.core.add_(1)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(3, 8))


def test_an_emptied_layer_chooses_where_nothing_was_copied():
    layer = emptied()
    layer.base.reset_parameters()
    for index in (layer.rows, layer.cols):  # what DistributedDataParallel sends at random
        index.copy_(torch.zeros(4, dtype=torch.int64))
    layer(torch.randn(3, 8))
    assert layer.rows.unique().numel() == layer.cols.unique().numel() == 4 and not layer.B.any()


@pytest.mark.parametrize("lacking", ["A", "core", "fingerprint"])
def test_a_part_of_the_tensors_is_not_taken_for_all(lacking):
    _, layer = copied(lacking)
    layer(torch.randn(3, 8))
    assert not layer.B.any() and not layer.core.any()
