"""SECURA as a PEFT method: targeting, dtypes, saving, several adapters, what surrounds a layer."""

from __future__ import annotations

import copy

import peft
import peft.helpers
import pytest
import tiny
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import nn

from secura import SecuraConfig, SECURALinear

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted_names(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in tiny.layers(model)}


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "down_proj"], ("self_attn.q_proj", "mlp.down_proj")),
        (["layers.1.self_attn.q_proj"], None),
        (r".*self_attn\.(k|o)_proj", ("self_attn.k_proj", "self_attn.o_proj")),
        (None, ("self_attn.q_proj", "self_attn.v_proj")),
        (
            "all-linear",
            tuple(f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in ALL_LINEAR),
        ),
    ],
    ids=["list", "one layer", "regex", "architecture's", "all-linear"],
)
def test_target_modules(target_modules, expected):
    model = get_peft_model(tiny.llama(), tiny.config(target_modules=target_modules))
    layers = ("0", "1")
    if expected is None:
        expected, layers = ("self_attn.q_proj",), ("1",)
    assert adapted_names(model) == {f"model.layers.{i}.{name}" for i in layers for name in expected}


def test_only_adapters_are_trainable_and_change_nothing_at_first():
    base = tiny.llama()
    before = tiny.logits(base)
    model = get_peft_model(base, tiny.config(train_bias=True))
    trainable = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"A", "B", "bias"}
    assert all("secura_adapter" in n for n, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(tiny.logits(model), before)
    assert not torch.equal(tiny.logits(tiny.adapted(train_bias=True)), before)


def test_exclude_modules_and_layers_to_transform():
    model = get_peft_model(
        tiny.llama(), tiny.config(target_modules="all-linear", exclude_modules=r".*mlp.*")
    )
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == set(ALL_LINEAR[:4])
    model = get_peft_model(
        tiny.llama(), tiny.config(layers_to_transform=[1], layers_pattern="layers")
    )
    assert adapted_names(model) == {f"model.layers.1.self_attn.{n}" for n in ("q_proj", "v_proj")}


def test_rank_pattern():
    model = tiny.adapted(rank_pattern={"v_proj": 3, r"layers\.1.*q_proj": 6})
    assert [part.rows.numel() for part in tiny.parts(model)] == [4, 3, 6, 3]


def test_conv1d_of_gpt2():
    model = tiny.adapted(tiny.gpt2(), target_modules=["c_attn", "c_proj"])
    part = tiny.parts(model)[0]
    assert (part.out_features, part.in_features) == (72, 24)
    delta = next(iter(tiny.layers(model).values())).get_delta_weight("default")
    assert delta.shape == (24, 72)
    assert tiny.gradients(model).keys() == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    adapted = tiny.logits(model)
    assert not torch.equal(adapted, tiny.logits(tiny.gpt2()))
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", tiny.NORMS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(norm, low_cpu_mem_usage, tmp_path):
    model = tiny.adapted(norm=norm, train_bias=True, restrain=norm == "channel")
    for layer in tiny.layers(model).values():
        layer.fold()
    tiny.perturb(model, 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(value.is_meta for value in loaded.state_dict().values())
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    tiny.assert_same(tiny.snapshot(loaded), tiny.snapshot(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert tiny.gradients(trainable).keys() == tiny.gradients(model).keys() != set()


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_bf16_base_keeps_fp32_adapters(norm):
    model = tiny.adapted(tiny.llama(dtype=torch.bfloat16), norm=norm, restrain=norm == "weight")
    part = tiny.parts(model)[0]
    assert {part.A.dtype, part.B.dtype} == {torch.float32}
    assert next(iter(tiny.layers(model).values())).base_layer.weight.dtype == torch.bfloat16
    exact = tiny.adapted(norm=norm, restrain=norm == "weight")
    tiny.perturb(exact)
    base_error = (tiny.logits(tiny.llama(dtype=torch.bfloat16)) - tiny.logits(tiny.llama())).abs()
    error = (tiny.logits(model) - tiny.logits(exact)).abs()
    assert error.max() <= 3 * base_error.max()
    assert all(g.dtype == torch.float32 for g in tiny.gradients(model).values())


@pytest.mark.parametrize("norm", ["none", "channel"])
def test_core_stays_fp32_when_the_model_is_cast(norm):
    model = tiny.adapted(norm=norm)
    for layer in tiny.layers(model).values():
        layer.fold()
    cores = [part.core.clone() for part in tiny.parts(model)]
    before = tiny.logits(model)
    model.to(torch.bfloat16)
    for part, core in zip(tiny.parts(model), cores, strict=True):
        assert part.A.dtype == torch.bfloat16
        assert part.core.dtype == torch.float32
        assert torch.equal(part.core, core)
    assert core.to(torch.bfloat16).float().ne(core).any()
    torch.testing.assert_close(tiny.logits(model).float(), before, rtol=0, atol=0.05)


def test_disable_adapter_is_the_base():
    model = tiny.adapted(norm="weight")
    adapted = tiny.logits(model)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    assert torch.equal(tiny.logits(model), adapted)
    assert not torch.equal(adapted, tiny.logits(tiny.llama()))


def test_modules_to_save(tmp_path):
    model = tiny.adapted(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save.default.weight
    grads = tiny.gradients(model)
    assert any("lm_head" in name for name in grads)
    with torch.no_grad():
        head += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert torch.equal(
        tiny.logits(loaded.merge_and_unload()), tiny.logits(model.merge_and_unload())
    )


def test_dropout_acts_in_training_alone():
    model = tiny.adapted(norm="channel", dropout=0.4)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.adapted(norm="channel")))
    model.train()
    assert not torch.equal(tiny.logits(model), tiny.logits(model))


@pytest.mark.parametrize("norm", tiny.NORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(norm, reentrant):
    model = tiny.adapted(norm=norm, dropout=0.0 if norm == "weight" else 0.3).train()
    torch.manual_seed(0)
    expected = tiny.gradients(model)
    calls = count_forwards(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    got = tiny.gradients(model)
    assert len(calls) == 2 * len(tiny.layers(model))
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


def count_forwards(model) -> list:
    calls: list = []
    for layer in tiny.layers(model).values():
        layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_autocast(norm):
    model = tiny.adapted(norm=norm, train_bias=True)
    exact, plain = tiny.logits(model), tiny.logits(tiny.llama())
    grads = tiny.gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, cast_grads = tiny.logits(model), tiny.gradients(model)
        base_error = (tiny.logits(tiny.llama()) - plain).abs().max()
        layer = next(iter(tiny.layers(model).values()))
        assert layer(torch.randn(2, 24)).dtype == torch.bfloat16
    assert (got.float() - exact).abs().max() <= 3 * base_error
    for name, value in cast_grads.items():
        assert value.dtype == torch.float32
        assert (value - grads[name]).norm() <= 0.1 * grads[name].norm()


@pytest.mark.parametrize("norm", ["none", "channel", "weight", "activation"])
def test_torch_compile_takes_a_block_of_layers_whole(norm):
    config = tiny.config(r=3, norm=norm, norm_reference="folded")
    shapes = ((16, 12), (12, 16))
    up, down = (SECURALinear(nn.Linear(*shape), config) for shape in shapes)
    block = nn.Sequential(up, nn.GELU(), down)
    leaves = [torch.randn(5, 16, requires_grad=True), up.A, up.B, down.A, down.B]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for layer in (up, down):
            nn.init.normal_(layer.B)
        for run in (compiled, block):
            out = run(leaves[0])
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
        up.fold()


def test_config_round_trip(tmp_path):
    """Every field has a value that is not the default, in one of two: some exclude each other."""
    settings = dict(
        r=7, scaling=0.5, selection="inverse_sampling", init="kaiming", norm="channel",
        norm_form="released", norm_combine="averaged", norm_reference="folded",
        norm_save="8bit",
        norm_scale=5.0, norm_eps=1e-6, norm_eps_relative=True, fold_every=3, train_bias=True,
        dropout=0.1, restrain=True, restrain_percent=0.5, restrain_edge=1.5, restrain_decay=0.9,
        seed=4, init_weights=False, allow_inexact_merge=True, target_modules=["q_proj", "k_proj"],
        exclude_modules=["lm_head"], layers_to_transform=[0], layers_pattern="layers",
        modules_to_save=["lm_head"], rank_pattern={"q_proj": 3}, task_type="CAUSAL_LM",
        trainable_token_indices={"embed_tokens": [3, 5]}, merge_dequantized=True,
        target_parameters=["experts.down_proj"], share_inputs=True, keep_columns=True,
    )  # fmt: skip
    configs = (
        SecuraConfig(inner_r=9, **settings),
        SecuraConfig(core="u", anchor_damping=0.5, anchored=True, **settings),
    )
    default = SecuraConfig(r=8).to_dict().items()
    same = [{n for n, v in default if v == config.to_dict()[n]} for config in configs]
    assert same[0] & same[1] <= {
        "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
        "inference_mode", "format_version", "check_base", "checksum", "base_tensors",
        "how_to_load", "layer_replication", "id2label",
        "stochastic_rounding",  # which goes with neither dropout nor a trained bias
    }  # fmt: skip
    for config in configs:
        config.save_pretrained(tmp_path)
        for loaded in (
            SecuraConfig.from_pretrained(tmp_path), peft.PeftConfig.from_pretrained(tmp_path)
        ):  # fmt: skip
            assert type(loaded) is SecuraConfig
            assert loaded == config


@pytest.mark.parametrize(
    ("kind", "norm", "reference"),
    [("M1", "activation", "folded"), ("M2", "activation", "pretrained"), ("CABR", "none", None)],
)
def test_released_settings(kind, norm, reference):
    config = SecuraConfig.released(kind)
    assert (config.r, config.inner_r, config.fold_every) == (150, 200, 1)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.train_bias
    assert config.norm == norm
    if reference:
        assert config.norm_reference == reference
        assert (config.norm_form, config.norm_combine) == ("released", "averaged")
    model = get_peft_model(tiny.llama(), SecuraConfig.released(kind, r=4, inner_r=6))
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_unknown_released_kind():
    with pytest.raises(
        ValueError, match=r"unknown kind 'M3': choose one of \('M1', 'M2', 'CABR'\)"
    ):
        SecuraConfig.released("M3")


def test_transformers_own_adapter_methods(tmp_path):
    model = tiny.llama()
    model.add_adapter(tiny.config(norm="channel"))
    tiny.perturb(model)
    for layer in tiny.layers(model).values():
        layer.fold()
    tiny.perturb(model, 1)
    model.save_pretrained(tmp_path)
    adapted = tiny.logits(model.eval())
    loaded = tiny.llama()
    loaded.load_adapter(tmp_path)
    assert torch.equal(tiny.logits(loaded), adapted)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), adapted)
    loaded.disable_adapters()
    assert torch.equal(tiny.logits(loaded), tiny.logits(tiny.llama()))
    other = tiny.llama(1)
    for load in (lambda: other.load_adapter(tmp_path), lambda: tiny.logits(other)):
        with pytest.raises(
            ValueError, match=r"layers\.0\.self_attn\.q_proj: .* another base weight"
        ):
            load()


def test_deep_copy_is_independent():
    model = tiny.adapted(norm="channel")
    copied = copy.deepcopy(model)
    before = tiny.logits(model)
    tiny.perturb(copied, 1)
    assert torch.equal(tiny.logits(model), before)
    assert not torch.equal(tiny.logits(copied), before)


def test_a_merge_that_gives_layers_a_bias_says_that_transformers_would_lose_it(recwarn):
    bare = {"norm": "channel", "target_modules": ["down_proj"]}
    merged = tiny.adapted(train_bias=True, **bare).merge_and_unload()
    assert merged.model.layers[0].mlp.down_proj.bias is not None
    said = [str(one.message) for one in recwarn if "have a trained bias" in str(one.message)]
    assert len(said) == 1 and "transformers leaves it out" in said[0]
    recwarn.clear()
    tiny.adapted(**bare).merge_and_unload()
    tiny.adapted(train_bias=True, **bare).unload()
    tiny.adapted(norm="channel", train_bias=True).merge_and_unload()  # on layers that have one
    assert not [one for one in recwarn if "have a trained bias" in str(one.message)]


def test_pefts_helper_that_leaves_inputs_uncast_finds_its_switch():
    model = tiny.adapted()
    before = tiny.logits(model)
    with peft.helpers.disable_input_dtype_casting(model):
        assert torch.equal(tiny.logits(model), before)
