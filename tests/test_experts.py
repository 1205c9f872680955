"""Fused experts (``target_parameters``): each by its own equation, and in whole models."""

from __future__ import annotations

import copy
import warnings
from itertools import product

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import secura
from secura import SecuraConfig, anchor, export_lora
from secura.bases import Stack
from secura.continual import AnchorCallback, AnchorDecayCallback
from secura_kernels import Layer, NormOptions, naive
from secura_kernels.experts import expert_weights
from secura_kernels.norm import COMBINES, FORMS

NORMS = ("none", "channel", "weight")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip


def mixtral():
    return MixtralForCausalLM(MixtralConfig(num_local_experts=3, **SIZES))


def qwen():
    own = {"num_experts": 4, "moe_intermediate_size": 12}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**own, **SIZES))


def gpt_oss():
    """Whose experts are stored ``[E, K, N]``."""
    return GptOssForCausalLM(GptOssConfig(num_local_experts=3, **SIZES))


MODELS = (mixtral, qwen, gpt_oss)


def made(model):
    torch.manual_seed(0)
    return model().eval()


def adapted(model, **settings):
    config = SecuraConfig(**({"r": 4, "target_parameters": TARGETS} | settings))
    model = get_peft_model(made(model), config)
    tiny.perturb(model)
    return model.eval()


def oracle(layer, weight):
    """W' ``[E, N, K]`` by each expert's own equation, differentiable in the adapter's tensors."""
    part, options = layer.secura_adapter["default"], layer.secura_adapter["default"].config
    _, n, k = weight.shape
    a, b = part.factors()
    core = part.core if part.folded else [None] * len(weight)
    of_base = options.norm_reference == "folded"
    return torch.stack([
        naive.effective_weight(
            Layer(weight[e], None, part.rows[e] % n, part.cols[e] % k, options.norm_options,
                  part.scaling, core[e], of_base),
            a[e], None if b is None else b[e],
        )
        for e in range(len(weight))
    ])  # fmt: skip


def by_equation(model, ids):
    """Logits and loss of the base model with every stack's W' in place of its parameter."""
    weights = {}
    for name, layer in tiny.layers(model).items():
        stack = layer.adapted
        fused = oracle(layer, stack.weight.mT if stack.transposed else stack.weight)
        key = name.removeprefix("base_model.model.").replace(".base_layer", "")
        weights[f"{key}.{layer.parameter_name}"] = fused.mT if stack.transposed else fused
    base = copy.deepcopy(model).unload()
    return functional_call(base, weights, (), {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("norm", [("none", None, None), *product(("channel", "weight"), FORMS,
                                                                COMBINES)], ids=str)  # fmt: skip
def test_each_expert_is_a_layer_of_its_own(norm):
    """W' and ∂U in fp64, of strided weights, with a core of the base and without, ε relative."""
    count, n, k, m = 3, 7, 9, 4
    torch.manual_seed(0)
    weight = torch.randn(count, k, n, dtype=torch.float64).mT
    rows = torch.stack([torch.randperm(n)[:m] for _ in range(count)])
    cols = torch.stack([torch.randperm(k)[:m] for _ in range(count)])
    u, core = (torch.randn(count, m, m, dtype=torch.float64) for _ in range(2))
    u.requires_grad_()
    for u_base, relative in ((None, False), (core, True)):
        options = NormOptions(*norm, 6.0, 1e-3, relative)
        got = expert_weights(weight, rows, cols, u, options, u_base=u_base)
        expected = torch.stack([
            naive.effective_weight(
                Layer(weight[e], None, rows[e], cols[e], options,
                      core=None if u_base is None else u_base[e], core_is_base=True), u[e],
            )
            for e in range(count)
        ])  # fmt: skip
        torch.testing.assert_close(got, expected)
        g = torch.randn_like(got)
        grads = (torch.autograd.grad(one, u, g)[0] for one in (got, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("norm", NORMS)
def test_trains_saves_loads_merges(model, norm, tmp_path):
    """Outputs and gradients by the equation, before and after steps and a fold; then a merge."""
    core = "u" if norm == "channel" else "ab"
    reference = "folded" if norm == "weight" else "pretrained"
    one = adapted(model, norm=norm, core=core, norm_reference=reference).train()
    ids = tiny.tokens()
    assert len(tiny.layers(one)) == 4
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(3):
        grads = tiny.gradients(one, ids)
        assert len(grads) == (4 if core == "u" else 8)
        expected = by_equation(one, ids)
        trained = {n: p for n, p in one.named_parameters() if p.requires_grad}
        wanted = torch.autograd.grad(expected.loss, list(trained.values()))
        for name, value in zip(trained, wanted, strict=True):
            torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(tiny.logits(one, ids), expected.logits, rtol=1e-4, atol=1e-5)
        losses.append(expected.loss.item())
        optimizer.step()
        if step == 1:
            secura.fold(one)
            tiny.perturb(one, 1)
    assert losses[1] < losses[0]
    one.eval()
    before, weights = tiny.logits(one), tiny.base_weights(one)
    assert not torch.allclose(before, tiny.logits(made(model)))
    one.save_pretrained(tmp_path)
    again = secura.from_pretrained(made(model), tmp_path, low_cpu_mem_usage=norm == "channel")
    assert torch.equal(tiny.logits(again), before)
    other = get_peft_model(model().eval(), again.peft_config["default"])
    other.load_state_dict(one.state_dict())
    assert torch.equal(tiny.logits(other), before)
    one.merge_adapter()
    torch.testing.assert_close(tiny.logits(one), before, rtol=1e-5, atol=1e-6)
    one.unmerge_adapter()
    tiny.assert_same(tiny.base_weights(one), weights)
    plain = one.merge_and_unload()
    assert type(plain) is type(made(model)) and not tiny.layers(plain)
    torch.testing.assert_close(tiny.logits(plain), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("norm", NORMS)
def test_sharded_experts_are_the_same(model, norm, mesh):
    """FSDP2 by decoder layer: outputs, ΔW, a fold and a merge, and back bit for bit."""
    plain, sharded = (adapted(model, norm=norm) for _ in range(2))
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):
        assert torch.equal(tiny.logits(sharded), tiny.logits(plain))
        both = zip(tiny.layers(sharded).values(), tiny.layers(plain).values(), strict=True)
        for one, other in both:
            deltas = (each.get_delta_weight("default") for each in (one, other))
            assert torch.equal(*deltas)
        before = tiny.logits(sharded)
        for one in (sharded, plain):
            one.merge_adapter()
        assert torch.equal(tiny.logits(sharded), tiny.logits(plain))
        assert not torch.equal(tiny.logits(sharded), tiny.logits(made(model)))
        for one in (sharded, plain):
            one.unmerge_adapter()
        assert torch.equal(tiny.logits(sharded), before)
        for one in (sharded, plain):
            secura.fold(one)


def test_adapters_come_and_go():
    one = adapted(mixtral, norm="none")
    before, base = tiny.logits(one), tiny.logits(made(mixtral))
    with one.disable_adapter():
        assert torch.equal(tiny.logits(one), base)
    one.add_adapter("other", SecuraConfig(r=3, norm="channel", target_parameters=TARGETS))
    assert len(tiny.layers(one)) == 4
    one.set_adapter("other")
    torch.testing.assert_close(tiny.logits(one), base)
    one.set_adapter("default")
    assert torch.equal(tiny.logits(one), before)
    one.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="experts take one"):
        tiny.logits(one)
    assert torch.equal(tiny.logits(one.unload()), base)


def test_a_damaged_file_and_another_base_are_noticed(tmp_path):
    one = adapted(qwen, norm="none")
    for part in tiny.parts(one):
        part.B.data /= 200
    one.save_pretrained(tmp_path)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"experts.*another base weight"):
        secura.from_pretrained(qwen(), tmp_path)
    with pytest.raises(ValueError, match="merged into this model"):
        secura.from_pretrained(one.merge_and_unload(), tmp_path)


def test_a_weight_of_a_layer_is_one_expert():
    """target_parameters takes [N, K] too, and computes what target_modules does."""
    settings = {"r": 4, "norm": "weight", "core": "u"}
    parameter = adapted(mixtral, target_parameters=["q_proj.weight"], **settings)
    layer = get_peft_model(made(mixtral), SecuraConfig(target_modules=["q_proj"], **settings))
    tiny.perturb(layer)
    torch.testing.assert_close(tiny.logits(parameter), tiny.logits(layer.eval()))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"norm": "activation"}, r"norm='activation' acts on a layer's output"),
        ({"norm": "none", "dropout": 0.1}, "dropout acts on a layer's output"),
        ({"norm": "none", "train_bias": True}, "train_bias=True acts on a layer's output"),
        ({"norm": "channel", "restrain": True}, "restrain=True acts on a layer's output"),
        ({"norm": "none", "stochastic_rounding": True}, "stochastic_rounding is not there for"),
        ({"norm": "none", "r": 40}, r"expert 0: r=40 .* must lie between 1 and"),
    ],
)
def test_what_experts_do_not_take_is_refused_and_nothing_changed(settings, reason):
    model = made(qwen)
    names = [name for name, _ in model.named_modules()]
    config = SecuraConfig(**({"r": 4, "target_parameters": TARGETS} | settings))
    with pytest.raises(
        ValueError, match=rf"^model\.layers\.0\.mlp\.experts\.gate_up_proj: {reason}"
    ):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("modules", [None, ["q_proj"]])
@pytest.mark.parametrize("loaded", [False, True])
def test_experts_that_stay_in_mxfp4_are_refused_and_nothing_changed(modules, loaded):
    """Whose weights are bytes, and no parameters any more once transformers' kernels have them."""
    model = made(gpt_oss)
    for layer in model.model.layers:
        layer.mlp.experts = experts = Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj") if loaded else ():
            setattr(experts, name, (experts._parameters.pop(name),))
    names = [name for name, _ in model.named_modules()]
    reason = r"gate_up_proj is no parameter of floating.*Mxfp4Config\(dequantize=True\)"
    with pytest.raises(
        ValueError, match=rf"^model\.layers\.0\.mlp\.experts.gate_up_proj: {reason}"
    ):
        get_peft_model(model, SecuraConfig(r=4, target_parameters=TARGETS, target_modules=modules))
    assert [name for name, _ in model.named_modules()] == names


def test_wrappers_in_wrappers_are_taken_off_again_where_a_later_layer_is_refused():
    model, ranks = made(qwen), {"layers.1.mlp.experts.down_proj": 40}
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.down_proj: expert 0"):
        get_peft_model(model, SecuraConfig(r=4, target_parameters=TARGETS, rank_pattern=ranks))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(0, 4, 4), r"weight is \[0, 4, 4\].*none of them empty"),
        (torch.zeros(4), r"weight is \[4\].*\[E, N, K\]"),
        (torch.zeros(2, 2, 4, 4), r"weight is \[2, 2, 4, 4\]"),
        (torch.zeros(2, 4, 4, dtype=torch.int8), "no parameter of floating numbers"),
    ],
)
def test_a_parameter_that_is_no_stack_of_weights_is_refused(value, reason):
    owner = nn.Module()
    owner.weight = nn.Parameter(value, requires_grad=False)
    with pytest.raises(ValueError, match=reason):
        Stack(owner, "weight")


def test_experts_are_neither_exported_nor_anchored(tmp_path):
    one = adapted(mixtral, norm="none", core="u")
    with pytest.raises(ValueError, match="target_parameters adapts experts"):
        export_lora(one, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"experts.*cannot be anchored"):
        anchor(one, [torch.randint(3, tiny.VOCAB, (9,))])
    with pytest.raises(ValueError, match=r"experts.*cannot be anchored"):  # before the first step
        AnchorCallback().on_train_begin(None, None, None, model=one)
    AnchorDecayCallback(1.0).on_train_begin(None, None, None, model=one)  # decay takes them


BY_PARAMETER = [TARGETS, TARGETS[:1], TARGETS[1:]]
LOADED_ALONE = [*((one, one) for one in BY_PARAMETER), (TARGETS, TARGETS[1:]),
                (TARGETS[1:], TARGETS), (TARGETS[1:], ["mlp." + TARGETS[1]])]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"), [*product(BY_PARAMETER, BY_PARAMETER), LOADED_ALONE[-1]], ids=str
)
def test_a_second_adapter_of_parameters_is_loaded_alone_or_refused(first, second, tmp_path):
    """A file tells the wrappers of a module by how many others lie around each."""
    one = adapted(mixtral, norm="none", target_parameters=first)
    before = tiny.snapshot(one)
    added = SecuraConfig(r=3, norm="none", target_parameters=second, init_weights=False)
    if (first, second) not in LOADED_ALONE:
        with pytest.raises(ValueError, match=r"target_parameters of the adapter .* give all adap"):
            one.add_adapter("other", added)
        assert list(one.peft_config) == ["default"]
        tiny.assert_same(before, tiny.snapshot(one))
        return
    one.add_adapter("other", added)
    one.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        loaded = secura.from_pretrained(made(mixtral), folder).eval()
        one.set_adapter(name)
        torch.testing.assert_close(tiny.logits(loaded), tiny.logits(one))


def test_what_reaches_no_parameter_is_told_and_what_does_is_not():
    def told(**settings):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", secura.tuner.UnmatchedWarning)
            config = SecuraConfig(**({"r": 4, "target_parameters": TARGETS} | settings))
            get_peft_model(made(mixtral), config)
        return [str(one.message) for one in found if "UnmatchedWarning" in str(one.category)]

    assert not told() and not told(rank_pattern={"experts.gate_up_proj": 2})
    assert not told(layers_to_transform=[0, 1])
    for settings in ({"exclude_modules": ["experts"]}, {"exclude_modules": r".*\.1\..*experts"},
                     {"layers_to_transform": [1]}):  # fmt: skip
        (message,) = told(**settings)
        layer = 1 if "1" in str(settings.get("exclude_modules")) else 0
        start = f"{next(iter(settings))} does not reach target_parameters, so model.layers.{layer}."
        assert message.startswith(start)
    whole = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in TARGETS]
    assert not told(layers_to_transform=[1], target_parameters=whole)
    linears = {"target_parameters": [], "target_modules": ["q_proj", "o_proj"]}
    assert not told(exclude_modules=["self_attn.k_proj", "model.layers.1.self_attn"], **linears)
    (message,) = told(rank_pattern={"experts.down": 2})
    assert "rank_pattern: 'experts.down' matches no layer" in message


def test_llama_4_stores_its_experts_inputs_first():
    """And does not say so: a gain of ``channel`` is one of an output row all the same."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 3}
    owner = Llama4TextExperts(Llama4TextConfig(**sizes)).requires_grad_(False)
    for weight in owner.parameters():
        nn.init.normal_(weight)
    config = SecuraConfig(r=4, norm="channel", target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(nn.ModuleDict({"experts": owner}), config)
    (layer,) = tiny.layers(model).values()
    tiny.perturb(model)
    assert layer.adapted.transposed
    change = layer.get_delta_weight("default").detach()
    (part,) = tiny.parts(model)
    weight = owner.gate_up_proj.mT
    plain = torch.stack([
        weight[e][:, part.cols[e] % 16] @ part.A[e] @ part.B[e] @ weight[e][part.rows[e] % 48]
        for e in range(3)
    ])  # fmt: skip
    gains = plain / (change.mT if change.shape != plain.shape else change)
    torch.testing.assert_close(gains, gains[..., :1].expand_as(gains), rtol=1e-3, atol=1e-3)
