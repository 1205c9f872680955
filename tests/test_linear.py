"""``SECURALinear``: the layer against the oracle, what it forms and saves, and how it refuses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secura import AdapterConfig, SECURALinear, fold
from secura_kernels import NormOptions, naive
from secura_kernels.norm import REFERENCES

N, K, M, T = 40, 56, 4, 23
SPACES = ("none", "weight", "channel", "activation")


def make(norm="channel", *, bias=True, dtype=torch.float64, learned=True, **settings):
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=bias, dtype=dtype)
    layer = SECURALinear(base, AdapterConfig(r=M, norm=norm, **settings))
    if learned:
        learn(layer)
    return layer


def learn(layer):
    nn.init.normal_(layer.B, std=0.5)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)


def oracle(layer, x):
    """The layer's output from its tensors alone."""
    config, base = layer.config, layer.base
    weight = base.weight.detach()
    columns = weight[:, layer.cols].double()
    p = columns @ (config.scaling * layer.A.double() @ layer.B.double())
    p_base = columns @ layer.core.double() if layer.folded else None
    if p_base is not None and (config.norm == "none" or config.norm_reference == "pretrained"):
        p, p_base = p + p_base, None
    return naive.linear(
        x, weight, base.bias, layer.rows, p, config.norm_options, p_base=p_base,
        delta_bias=layer.bias, restrain=layer._restrain(),
    )  # fmt: skip


SETTINGS = [
    {}, {"bias": False}, {"train_bias": True}, {"scaling": 0.5}, {"inner_r": 3},
    {"norm_reference": "folded"}, {"selection": "inverse_sampling"}, {"init": "orthogonal"},
    {"restrain": True, "restrain_percent": 0.1, "restrain_edge": 2.0, "restrain_decay": 0.7},
]  # fmt: skip
NORMED = [pair for pair in itertools.product(SPACES, SETTINGS) if pair[0] != "none"]


@pytest.mark.parametrize(
    ("norm", "settings"), [*(("none", settings) for settings in SETTINGS[:-1]), *NORMED], ids=str
)
@pytest.mark.parametrize("folds", [0, 2])
def test_forward_equals_oracle(norm, settings, folds):
    layer = make(norm, **settings)
    for _ in range(folds):
        layer.fold()
        assert (layer.B == 0).all()
        learn(layer)
    x = torch.randn(2, T, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), oracle(layer, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_a_fresh_adapter_changes_nothing(norm):
    layer = make(norm, learned=False)
    x = torch.randn(T, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base(x))


def test_a_fresh_weight_norm_changes_nothing():
    """M = 2 exactly where nothing moved, so (2 W + 0) / 2 is W bit for bit."""
    layer = make("weight", learned=False, dtype=torch.float32)
    assert torch.equal(layer.effective_weight(), layer.base.weight)


@pytest.mark.parametrize("norm", SPACES)
def test_only_the_adapter_learns(norm):
    layer = make(norm, train_bias=True)
    before = layer.base.weight.clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(T, K, dtype=torch.float64), torch.randn(T, N, dtype=torch.float64)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(layer.base.weight, before) and layer.base.weight.grad is None
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B", "bias"}


class Shapes(TorchDispatchMode):
    """Record every op with the shapes it takes and makes."""

    def __init__(self):
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        made = [o for o in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(o)]
        self.ops.append(
            (str(func), [tuple(t.shape) for t in tensors], [tuple(o.shape) for o in made])
        )
        return out


@pytest.fixture
def open_ops(monkeypatch):
    """The ops' bodies in the place of the ops, for a dispatch mode sees no further than an op."""
    monkeypatch.setattr("secura_kernels.api.is_watched", lambda *_: False)


@pytest.mark.parametrize("combine", ["averaged", "gated"])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_neither_the_change_nor_the_down_projection_is_formed(norm, folded, combine, open_ops):
    layer = make(norm, dtype=torch.float32, norm_combine=combine)
    if folded:
        layer.fold()
        learn(layer)
    x = torch.randn(T, K, requires_grad=True)
    with Shapes() as seen:
        layer(x).sum().backward()
    views = ("aten.t.", "aten.detach.", "aten.transpose.", "aten.view.", "aten.alias.")
    for name, taken, made in seen.ops:
        if not name.startswith(views):
            assert (N, K) not in made and (K, N) not in made, f"{name} forms an [N, K] tensor"
        if "mm" in name:
            pairs = set(itertools.pairwise(taken))
            assert ((T, K), (K, M)) not in pairs, f"{name} computes x Rᵀ"
        assert (M, K) not in made, f"{name} gathers R"
    assert any("mm" in name for name, _, _ in seen.ops)


@pytest.mark.parametrize(
    ("norm", "size"),
    [
        ("none", T * M * 4),
        ("channel", T * M * 4),
        ("activation", T * (M + N) * 4),
        ("activation 8bit", T * (M * 4 + N)),
        ("weight", T * K * 4),
    ],
)
def test_saved_activations(norm, size):
    """docs/design.md: z in `none` and `channel`, y0 or 1/M in `activation`, x in `weight`."""
    norm, _, save = norm.partition(" ")
    layer = make(norm, dtype=torch.float32, norm_save=save or "recompute")
    saved = {}

    def pack(tensor):
        if tensor.shape[:1] == (T,):
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = torch.randn(T, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(saved.values()) == size


def test_state_is_small_and_holds_neither_c_nor_r():
    layer = SECURALinear(nn.Linear(512, 384), AdapterConfig(r=128, norm="channel"))
    state = {n: t for n, t in layer.state_dict().items() if not n.startswith("base.")}
    assert sum(t.numel() * t.element_size() for t in state.values()) <= 0.35e6
    assert set(state) == {"A", "B", "rows", "cols", "core", "fingerprint", "checksum"}
    held = [tuple(t.shape) for t in (*layer.buffers(), *layer.parameters())]
    assert (128, 512) not in held and (384, 128) not in held


@pytest.mark.parametrize("reference_kind", ["folded", "pretrained"])
@pytest.mark.parametrize("norm", SPACES)
def test_fold_keeps_the_additive_weight(norm, reference_kind):
    layer = make(norm, norm_reference=reference_kind, dtype=torch.float32)
    before, weight = layer.delta_weight(), layer.base.weight.clone()
    assert before.abs().max() > 0
    layer.fold()
    torch.testing.assert_close(layer.delta_weight(), before)
    assert torch.equal(layer.base.weight, weight)


def test_fold_of_a_model_counts_its_layers():
    model = nn.Sequential(
        make("none"), nn.ReLU(), SECURALinear(nn.Linear(N, 9), AdapterConfig(r=2))
    )
    assert fold(model) == 2
    with pytest.raises(ValueError, match="no SECURA layer"):
        fold(nn.Linear(2, 2))


@pytest.mark.parametrize("norm", ["none", "weight", "channel"])
@pytest.mark.parametrize("draws", [True, False])
def test_small_changes_reach_the_output_where_they_are_rounded_stochastically(norm, draws):
    """Of a ΔW of a thousandth of the weight all arrives in bf16, where else half is rounded off."""
    torch.manual_seed(0)
    base, x = nn.Linear(256, 256, bias=False).bfloat16(), torch.randn(256, 256).bfloat16()
    layer = SECURALinear(base, AdapterConfig(r=16, norm=norm, stochastic_rounding=draws))
    learn(layer)
    layer.B.data.mul_(1e-3 * base.weight.float().norm() / layer.delta_weight().norm())
    effect = oracle(layer, x.double()) - x.double() @ base.weight.double().t()
    shown = (layer(x) - base(x)).double()
    share = (shown * effect).sum() / effect.square().sum()
    assert (0.85 < share < 1.15) if draws else (share < 0.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["none", "weight", "channel"])
def test_merge_is_exact_and_unmerge_bit_for_bit(norm, dtype):
    layer = make(norm, dtype=dtype, train_bias=True).eval()
    layer.fold()
    learn(layer)
    x = torch.randn(T, K, dtype=dtype)
    weight, bias, out = layer.base.weight.clone(), layer.base.bias.clone(), layer(x)
    layer.merge()
    assert layer.merged and layer.base.weight.dtype == dtype
    close = {"rtol": 4e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(layer(x), out, **close)
    layer.unmerge()
    assert torch.equal(layer.base.weight, weight) and torch.equal(layer.base.bias, bias)
    torch.testing.assert_close(layer(x), out, rtol=0, atol=0)


def test_merge_gives_a_biasless_base_the_trained_bias():
    layer = make("channel", bias=False, train_bias=True).eval()
    x = torch.randn(T, K, dtype=torch.float64)
    out = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), out, rtol=1e-6, atol=1e-6)
    layer.unmerge()
    assert layer.base.bias is None


def test_merge_of_activation_is_refused_and_changes_nothing():
    layer = make("activation")
    before = layer.base.weight.clone()
    with pytest.raises(ValueError, match=r"not linear in x.*allow_inexact"):
        layer.merge()
    assert torch.equal(layer.base.weight, before) and not layer.merged
    layer.merge(allow_inexact=True)
    layer.unmerge()
    delta = layer.delta_weight()
    layer.merge(allow_inexact=True)
    torch.testing.assert_close(layer.base.weight.data, before + delta)
    narrow = make("activation", dtype=torch.bfloat16)
    assert narrow.effective_weight(allow_inexact=True).dtype == torch.bfloat16


def test_merge_refuses_nan_and_changes_nothing():
    layer = make("channel")
    before = layer.base.weight.clone()
    layer.A.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="nothing was merged"):
        layer.merge()
    assert torch.equal(layer.base.weight, before) and not layer.merged


def test_merged_layers_refuse_what_makes_no_sense():
    layer = make("none")
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    for act in (layer.merge, layer.fold, layer.delta_weight, layer.effective_weight):
        with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
            act()
    with pytest.raises(RuntimeError, match="training would not reach it"):
        layer(torch.randn(1, K, dtype=torch.float64))
    with torch.no_grad():
        layer(torch.randn(1, K, dtype=torch.float64))


@pytest.mark.parametrize("norm", SPACES)
def test_state_dict_round_trip(norm):
    layer = make(norm, train_bias=True)
    layer.fold()
    learn(layer)
    other = make(norm, train_bias=True, learned=False)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(T, K, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_hooked_and_trainable_bases_run_as_they_are():
    layer, plain = make("channel"), make("channel")
    calls = []
    layer.base.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(T, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))
    assert calls == [1]


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.0


def test_a_subclass_of_linear_keeps_its_forward():
    torch.manual_seed(0)
    layer = SECURALinear(Scaled(K, N).double(), AdapterConfig(r=M, norm="none"))
    learn(layer)
    x = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, oracle(layer, x), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(oracle(layer, x).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "channel", "activation"])
def test_dropout_acts_while_training_alone(norm):
    layer = make(norm, dropout=0.5)
    x = torch.randn(T, K, dtype=torch.float64)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), oracle(layer, x), rtol=1e-6, atol=1e-6)


def test_core_stays_fp32_when_the_module_is_cast():
    layer = make("channel", dtype=torch.float32)
    layer.fold()
    core = layer.core.clone()
    layer.to(torch.bfloat16)
    assert layer.A.dtype == torch.bfloat16 and torch.equal(layer.core, core)
    assert layer.gram.dtype == layer.base_norms.dtype == torch.float32
    layer(torch.randn(T, K, dtype=torch.bfloat16)).sum().backward()


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (K,), (1, 2, 3, K)], ids=str)
@pytest.mark.parametrize("norm", SPACES)
def test_leading_dimensions_empty_ones_included(norm, shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    out = make(norm)(x)
    assert out.shape == (*shape[:-1], N)
    out.sum().backward()


def test_bad_bases():
    with pytest.raises(TypeError, match="Conv2d is no linear layer"):
        SECURALinear(nn.Conv2d(3, 3, 1), AdapterConfig(r=2))
    with pytest.raises(ValueError, match="between 1 and min"):
        SECURALinear(nn.Linear(8, 4), AdapterConfig(r=5))
    with pytest.raises(ValueError, match="lower inner_r"):
        SECURALinear(nn.Linear(4, 8), AdapterConfig(r=3))
    broken = nn.Linear(8, 8)
    broken.weight.data[3, 3] = torch.inf
    with pytest.raises(ValueError, match="NaN or inf: repair"):
        SECURALinear(broken, AdapterConfig(r=2))
    broken.weight.data[3] = 0
    with pytest.raises(ValueError, match=r"row.s. of the weight are zero.*least_norm"):
        SECURALinear(broken, AdapterConfig(r=2, selection="inverse_sampling"))


def test_bad_inputs():
    layer = make("channel", dtype=torch.float32)
    with pytest.raises(TypeError, match=r"floating inputs, not torch.int64"):
        layer(torch.ones(2, K, dtype=torch.long))
    with pytest.raises(TypeError, match=r"not torch.complex64"):
        layer(torch.ones(2, K, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"last dimension is 57, the layer's in_features 56"):
        layer(torch.ones(2, K + 1))
    with pytest.raises(TypeError, match=r"cast one of them, or run under torch.autocast"):
        layer(torch.ones(2, K, dtype=torch.bfloat16))


def test_options_reach_the_kernels():
    config = AdapterConfig(
        norm="weight", norm_form="calibrated", norm_combine="gated", norm_scale=4, norm_eps=0.1,
        norm_eps_relative=True,
    )  # fmt: skip
    assert config.norm_options == NormOptions("weight", "calibrated", "gated", 4.0, 0.1, True)


def test_the_norms_reference_counts_where_something_was_folded():
    """Until then both references compute the same, so a file may be continued under either."""
    first, second = (AdapterConfig(r=4, norm="channel", norm_reference=name) for name in REFERENCES)
    assert first.checksum_settings(False) == second.checksum_settings(False)
    assert first.checksum_settings(True) != second.checksum_settings(True)
