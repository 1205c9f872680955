"""``core="u"`` and its anchor: the equations, what stays as it was, and what it is added to."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from tiny import TEXTS, cored
from torch import nn

import secura
from secura import AdapterConfig, SECURALinear, anchor, quantised, unanchor


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_what_the_model_computes_stays_and_so_do_its_flags(norm):
    model = tiny.adapted(core="u", norm=norm, scaling=0.5)
    before = tiny.logits(model)
    part = tiny.parts(model)[0]
    part.U.grad = torch.ones_like(part.U)
    state, training = torch.random.get_rng_state(), [m.training for m in model.modules()]
    tiny.parts(model)[1].U.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    anchor(model, TEXTS)
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=2e-5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(part.U.grad, torch.ones_like(part.U))
    anchor(model, TEXTS[:1])
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=2e-5)
    assert unanchor(model) == 4 and tiny.anchors(model)[0] == (None, None)
    assert not model.peft_config["default"].anchored
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("norm", tiny.NORMS)
def test_gradients_are_those_of_the_product(norm):
    model = tiny.adapted(core="u", norm=norm)
    anchor(model, TEXTS)
    got = tiny.gradients(model)
    whitened = {name: part.U.detach().clone() for name, part in named(model).items()}
    sides = {name: (part.left, part.right) for name, part in named(model).items()}
    unanchor(model)
    plain = tiny.gradients(model)
    assert len(whitened) == 4
    for name, (left, right) in sides.items():
        key = f"{name}.U"
        torch.testing.assert_close(
            got[key], left.t() @ plain[key] @ right.t(), rtol=1e-3, atol=1e-5
        )


def named(model):
    return {
        f"{n}.secura_adapter.default": m.secura_adapter["default"]
        for n, m in tiny.layers(model).items()
    }


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_no_token_twice(reentrant):
    plain, checkpointed = cored(), cored()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.train()
    for model in (plain, checkpointed):
        anchor(model, TEXTS)
    for a, b in zip(tiny.anchors(plain), tiny.anchors(checkpointed), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_recomputed_outputs_count_once():
    layer = SECURALinear(nn.Linear(12, 12), AdapterConfig(r=4, core="u", norm="none"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(16, 12), layer

        def forward(self, input_ids):
            x = self.embed(input_ids)
            if self.recompute:
                x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
            else:
                x = self.layer(x)
            return type("Out", (), {"logits": x @ self.embed.weight.t()})

    model = Model()
    model.recompute = False
    anchor(model, [torch.arange(2, 12)])
    expected = layer.left.clone(), layer.right.clone()
    model.recompute = True
    anchor(model, [torch.arange(2, 12)])
    assert torch.equal(layer.left, expected[0]) and torch.equal(layer.right, expected[1])


@pytest.mark.parametrize("norm", ["none", "channel", "weight"])
def test_merge_fold_and_export_know_the_core(norm, tmp_path):
    model = tiny.adapted(core="u", norm=norm, norm_reference="pretrained")
    anchor(model, TEXTS)
    before = tiny.logits(model)
    assert secura.fold(model) == 4
    assert not tiny.parts(model)[0].U.any() and tiny.parts(model)[0].core.any()
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=2e-5)
    tiny.perturb(model, 1)
    before = tiny.logits(model)
    if norm != "weight":
        secura.export_lora(model, tmp_path / "lora")
        lora = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
        torch.testing.assert_close(tiny.logits(lora), before, rtol=0, atol=2e-5)
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), before, rtol=0, atol=5e-5)


def test_several_adapters_are_anchored_one_at_a_time():
    model = cored()
    model.add_adapter("other", tiny.config(core="u", norm="none", r=3))
    anchor(model, TEXTS)
    assert tiny.parts(model)[0].left is not None
    assert tiny.parts(model, "other")[0].left is None
    assert not model.peft_config["other"].anchored
    model.base_model.set_adapter(["default", "other"])
    assert anchor(model, TEXTS).layers == 8


def unreached(model):
    """The adapter on a layer that hands on nothing of what the base makes."""
    model.base_model.model.model.layers[1].self_attn.v_proj.forward = lambda x: x.new_zeros(
        *x.shape[:-1], 12
    )
    return tiny.parts(model)[3]


def is_plain(part):
    """Whether both sides of an anchor are multiples of the identity."""
    sides = [side / side.diagonal().mean() for side in (part.left, part.right)]
    return all(torch.allclose(side, torch.eye(len(side)), atol=1e-5) for side in sides)


@pytest.mark.parametrize("add", [False, True])
def test_a_layer_that_no_token_reached_is_named_and_moves_as_without_an_anchor(add):
    model = cored()
    part = unreached(model)
    with pytest.warns(UserWarning, match=r"2 of 4 layers saw none .*layers\.1"):
        report = anchor(model, TEXTS, add=add)
    assert [name for name in report.unseen if "layers.1" in name and "v_proj" in name]
    assert is_plain(part) and not is_plain(tiny.parts(model)[1])


def test_added_text_leaves_the_anchor_of_a_layer_that_it_does_not_reach():
    model = cored()
    anchor(model, TEXTS)
    part = tiny.parts(model)[3]
    left, right = part.left.clone(), part.right.clone()
    unreached(model)
    with warnings.catch_warnings(action="error"):  # its anchor holds it
        report = anchor(model, TEXTS, add=True)
    assert report.layers + len(report.unseen) == len(tiny.parts(model)) > report.layers
    torch.testing.assert_close(part.right, right, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        part.left / part.left.norm(), left / left.norm(), rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(tiny.parts(model)[1].right, right, rtol=0.1)
    with pytest.warns(UserWarning, match="saw none"):
        anchor(model, TEXTS)
    assert is_plain(part)


def test_text_that_said_nothing_of_a_layer_counts_as_none_once_other_text_is_added():
    model, fresh = cored(), cored()
    part = unreached(model)
    with pytest.warns(UserWarning, match="saw none"):
        anchor(model, TEXTS)
    eye = torch.eye(len(part.left))
    assert torch.equal(part.left, eye) and torch.equal(part.right, eye)  # not 1 / (1 + λ) as far
    del model.base_model.model.model.layers[1].self_attn.v_proj.forward
    anchor(model, TEXTS, add=True)
    anchor(fresh, TEXTS)
    wanted = tiny.parts(fresh)[3]
    torch.testing.assert_close(part.left / part.left.norm(), wanted.left / wanted.left.norm())
    torch.testing.assert_close(part.left, wanted.left, rtol=0.1, atol=0.1)  # of the layers' level
    torch.testing.assert_close(part.right, wanted.right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_core_of_16_bits_is_folded_before_it_is_anchored(dtype):
    model = cored()
    for part in tiny.parts(model):
        part.to(dtype)
    secura.fold(model)
    anchor(model, TEXTS)  # U is 0
    with torch.no_grad():
        tiny.parts(model)[0].U.fill_(0.1)
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"U is in b?float16, whose rounding .* fold"):
        anchor(model, TEXTS)
    tiny.assert_same(tiny.snapshot(model), before)
    secura.fold(model)
    anchor(model, TEXTS)


def test_layers_that_no_gradient_reaches_are_named():
    model = cored()
    model.base_model.model.lm_head.weight.data.zero_()
    with pytest.warns(UserWarning, match="4 of 4 layers"):
        report = anchor(model, TEXTS)
    assert len(report.unseen) == report.layers == len(tiny.parts(model))


@pytest.mark.parametrize("where", ["embed_tokens", "layers.1.mlp.down_proj"])
def test_statistics_with_nan_are_refused(where):
    model = cored()
    weight = model.base_model.model.model.get_submodule(where).weight
    weight.data[4] = float("nan")
    before = {name: value for name, value in tiny.snapshot(model).items() if "secura" in name}
    with pytest.raises(ValueError, match="NaN or inf"):
        anchor(model, TEXTS)
    after = {name: value for name, value in tiny.snapshot(model).items() if "secura" in name}
    tiny.assert_same(after, before)


def test_only_that_core_is_anchored():
    with pytest.raises(ValueError, match="no active adapter with core='u'"):
        anchor(tiny.adapted(), TEXTS)
    model = cored()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge it first"):
        anchor(model, TEXTS)


@pytest.mark.parametrize(
    "settings",
    [{"core": "v"}, {"core": "u", "inner_r": 8}, {"anchored": True}, {"anchor_damping": -1}],
)
def test_settings_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match=r"core|damping"):
        tiny.config(**settings)


def test_the_cost_of_a_change_on_old_text_is_the_same_in_every_direction():
    """The sum over old text of the KL that a small change makes, against ½ κ² ‖Ũ‖².

    In fp64: rounded to fp32, log-probabilities differ by as much as these changes make them.
    """
    torch.manual_seed(0)
    base = tiny.llama(dtype=torch.float64)
    model = get_peft_model(base, tiny.config(core="u", norm="none", target_modules=["q_proj"]))
    part = tiny.parts(model)[1]
    texts = [torch.randint(3, tiny.VOCAB, (40,)) for _ in range(60)]
    before = [tiny.logits(model, text[None]).log_softmax(-1) for text in texts]

    def spread():
        costs = []
        for _ in range(12):
            direction = torch.randn(4, 4).to(part.U)
            part.U.data = direction / direction.norm() * 0.02
            after = [tiny.logits(model, text[None]).log_softmax(-1) for text in texts]
            pairs = zip(before, after, strict=True)
            costs.append(sum((a.exp() * (a - b)).sum() for a, b in pairs))
        part.U.data.zero_()
        costs = torch.stack(costs)
        return (costs.std() / costs.mean()).item()

    plain = spread()
    anchor(model, texts, damping=1e-4)
    assert spread() < 0.5 * plain


class Packed(nn.Linear):
    """A linear layer whose weight is stored in 8 bits, as a quantised one's is."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        stored = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * self.scale).t()

    def dequantize(self):
        return self.weight * self.scale


def test_a_quantised_base_is_anchored(monkeypatch):
    """Its statistics are those of the weight that it stands for."""
    kind = lambda base: base.dequantize if isinstance(base, Packed) else None  # noqa: E731
    monkeypatch.setattr(quantised, "dequantizer", kind)
    models = []
    for packs in (True, False):
        model = tiny.llama(bias=False)
        for block in model.model.layers:
            packed = Packed(block.self_attn.q_proj)
            dense = nn.Linear(24, 24, bias=False)
            dense.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
            block.self_attn.q_proj = packed if packs else dense
        models.append(tiny.adapted(model, core="u", norm="none", target_modules=["q_proj"]))
    for model in models:
        anchor(model, TEXTS)
    for got, expected in zip(*map(tiny.anchors, models), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tiny.logits(models[0]), tiny.logits(models[1]), rtol=0, atol=1e-4)
