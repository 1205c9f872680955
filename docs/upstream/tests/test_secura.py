# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import copy

import pytest
import torch
from torch import nn

from peft import PeftModel, SecuraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.secura import SecuraLinear


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 8, bias=bias)

    def forward(self, x):
        return self.lin1(self.relu(self.lin0(x)))


VARIANTS = pytest.mark.parametrize(
    "settings",
    [
        {"core": "ab", "norm": "none"},
        {"core": "ab", "norm": "channel"},
        {"core": "u", "norm": "none"},
        {"core": "u", "norm": "channel", "scaling": 0.5, "norm_scale": 2.0},
    ],
    ids=["ab-none", "ab-channel", "u-none", "u-channel"],
)


def get_model(settings, bias=True, **kwargs):
    """A new SECURA model and the MLP that it was made of; it acts unless init_weights is set."""
    torch.manual_seed(0)
    base_model = MLP(bias=bias)
    kwargs = {"r": 4, "target_modules": ["lin0", "lin1"], "init_weights": False, **settings, **kwargs}
    return get_peft_model(copy.deepcopy(base_model), SecuraConfig(**kwargs)).eval(), base_model


class TestSecura:
    @property
    def inputs(self):
        return torch.linspace(-1, 1, 50).view(5, 10)

    @VARIANTS
    def test_a_new_adapter_has_no_effect(self, settings):
        model, base_model = get_model(settings, init_weights=True)
        assert torch.equal(model(self.inputs), base_model(self.inputs))

    @VARIANTS
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_forward_pass_is_that_of_the_changed_weight(self, settings, bias):
        """It reads x @ R.T from the base layer's output; here the change is formed and multiplied."""
        model, base_model = get_model(settings, bias=bias)
        assert not torch.allclose(model(self.inputs), base_model(self.inputs), atol=1e-3)
        with torch.no_grad():
            for name in ("lin0", "lin1"):
                delta_weight = getattr(model.base_model.model, name).get_delta_weight("default")
                getattr(base_model, name).weight += delta_weight
        torch.testing.assert_close(model(self.inputs), base_model(self.inputs))

    def test_the_gain_lies_between_one_and_two_and_falls_with_the_change(self):
        model, _ = get_model({"core": "u", "norm": "channel"})
        layer = model.base_model.model.lin0
        nn.init.eye_(layer.secura_U["default"])
        gains = []
        for scaling in (1e-4, 1e-1, 1.0, 100.0):
            layer.scaling["default"] = scaling
            changed = layer.get_delta_weight("default")
            layer.norm["default"] = "none"
            gains.append((layer.get_delta_weight("default") / changed).mean(dim=1))
            layer.norm["default"] = "channel"
        assert all((smaller > larger).all() for smaller, larger in zip(gains, gains[1:]))
        torch.testing.assert_close(gains[0], torch.full_like(gains[0], 2.0), rtol=1e-2, atol=0)
        torch.testing.assert_close(gains[-1], torch.ones_like(gains[-1]), rtol=1e-2, atol=0)

    def test_rows_and_columns_of_least_norm_are_chosen(self):
        linear = nn.Linear(6, 5)
        with torch.no_grad():
            linear.weight.copy_(torch.outer(torch.tensor([3.0, 1, 0, 2, 5]), torch.tensor([6.0, 5, 1, 3, 2, 4])))
        config = SecuraConfig(r=2, inner_r=4)
        layer = SecuraLinear(linear, "default", config=config, r=2)
        assert layer.secura_rows["default"].tolist() == [1, 3]  # row 2 is zero and could carry nothing
        assert layer.secura_cols["default"].tolist() == [2, 4]

    @VARIANTS
    def test_only_the_core_is_trained_and_training_lowers_the_loss(self, settings):
        model, _ = get_model(settings, init_weights=True)
        trained = {name.split(".")[-2] for name, param in model.named_parameters() if param.requires_grad}
        assert trained == ({"secura_U"} if settings["core"] == "u" else {"secura_A", "secura_B"})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
        losses = []
        for _ in range(20):
            loss = (model(self.inputs) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @VARIANTS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_unmerging_restores_the_base_weight_exactly(self, settings, dtype):
        model, base_model = get_model(settings)
        model, base_model = model.to(dtype), base_model.to(dtype)
        inputs = self.inputs.to(dtype)
        expected = model(inputs)
        model.merge_adapter(safe_merge=True)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(model(inputs), expected, **tolerance)
        model.unmerge_adapter()
        for name in ("lin0", "lin1"):
            weight = getattr(model.base_model.model, name).get_base_layer().weight
            assert torch.equal(weight, getattr(base_model, name).weight)
        assert torch.equal(model(inputs), expected)

    def test_safe_merge_refuses_nan(self):
        model, base_model = get_model({"core": "u", "norm": "none"})
        nn.init.constant_(model.base_model.model.lin0.secura_U["default"], float("nan"))
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(model.base_model.model.lin0.get_base_layer().weight, base_model.lin0.weight)

    @pytest.mark.parametrize("norm", ["none", "channel"])
    def test_two_active_adapters_add_up_and_merge(self, norm):
        """Each is measured against the original weight, so that their order does not matter."""
        model, base_model = get_model({"core": "u", "norm": norm})
        model.add_adapter("other", SecuraConfig(r=3, norm=norm, target_modules=["lin0", "lin1"], init_weights=False))
        model.base_model.set_adapter(["default", "other"])
        expected = model(self.inputs)
        for name in ("lin0", "lin1"):
            layer = getattr(model.base_model.model, name)
            with torch.no_grad():
                for adapter in ("default", "other"):
                    getattr(base_model, name).weight += layer.get_delta_weight(adapter)
        torch.testing.assert_close(expected, base_model(self.inputs))
        merged = model.merge_and_unload()
        assert isinstance(merged.lin0, nn.Linear)
        torch.testing.assert_close(merged(self.inputs), expected)

    def test_adding_an_adapter_while_one_is_merged_is_refused(self):
        model, _ = get_model({"core": "u"})
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge it first"):
            model.add_adapter("other", SecuraConfig(r=2, target_modules=["lin0"]))

    @VARIANTS
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_save_and_load(self, settings, low_cpu_mem_usage, tmp_path):
        model, base_model = get_model(settings)
        expected = model(self.inputs)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(self.inputs), expected)

    def test_the_saved_indices_hold(self, tmp_path):
        """The file says which rows and columns were meant, not the weight it is loaded on."""
        model, base_model = get_model({"core": "u"})
        layer = model.base_model.model.lin0
        layer.secura_rows["default"] = torch.tensor([0, 5, 10, 15])
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model, tmp_path)
        assert loaded.base_model.model.lin0.secura_rows["default"].tolist() == [0, 5, 10, 15]
        assert torch.equal(loaded(self.inputs), model(self.inputs))

    @VARIANTS
    def test_conversion_to_lora_of_the_same_rank_is_exact(self, settings):
        model, base_model = get_model(settings)
        expected = model(self.inputs)
        lora_config, state_dict = convert_to_lora(model, rank=4)
        lora_model = get_peft_model(base_model, lora_config).eval()
        set_peft_model_state_dict(lora_model, state_dict)
        torch.testing.assert_close(lora_model(self.inputs), expected, rtol=1e-4, atol=1e-5)

    def test_ranks_by_pattern(self):
        model, _ = get_model({"core": "u"}, rank_pattern={"lin1": 2})
        assert model.base_model.model.lin0.secura_U["default"].shape == (4, 4)
        assert model.base_model.model.lin1.secura_U["default"].shape == (2, 2)

    def test_dropout_acts_in_training_alone(self):
        model, _ = get_model({"core": "u"}, secura_dropout=0.5)
        assert torch.equal(model(self.inputs), model(self.inputs))
        model.train()
        assert not torch.equal(model(self.inputs), model(self.inputs))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"core": "abc"}, "`core` must be"),
            ({"core": "u", "inner_r": 4}, "`inner_r` is the inner rank"),
            ({"norm": "weight"}, "`norm` must be"),
            ({"norm_scale": 0.0}, "`norm_scale` must be"),
            ({"r": 9}, "`r` should be a positive integer of at most 8"),
            ({"inner_r": 11}, r"`inner_r` \(11\) must be between"),
        ],
    )
    def test_wrong_settings_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            get_model(settings)

    def test_other_layers_are_refused(self):
        with pytest.raises(TypeError, match="is not supported"):
            get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), SecuraConfig(r=2, target_modules=["0"]))
