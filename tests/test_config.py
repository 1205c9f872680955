"""Settings out of range are refused where they are made, with what is allowed."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from secura import AdapterConfig, SecuraConfig, SECURALinear
from secura_kernels import NormOptions, Restrain


@pytest.mark.parametrize("kind", [AdapterConfig, SecuraConfig])
def test_numbers_of_the_norm_are_the_released_codes(kind):
    config, restrain = kind(), Restrain(torch.zeros(1))
    assert config.norm_options == NormOptions("weight")
    assert (config.norm_scale, config.norm_eps, config.norm_eps_relative) == (6.0, 1e-10, False)
    limits = config.restrain_percent, config.restrain_edge, config.restrain_decay
    assert limits == tuple(restrain)[1:] == (0.9, 1.2, 0.99)


@pytest.mark.parametrize("kind", [AdapterConfig, SecuraConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0 must be a positive integer"),
        ({"r": 2.5}, "r=2.5 must be a positive integer"),
        ({"r": True}, "must be a positive integer"),
        ({"inner_r": 0}, "inner_r=0 must be a positive integer"),
        ({"inner_r": -3}, "inner_r=-3 must be"),
        ({"norm": "rows"}, "unknown norm 'rows': choose one of"),
        ({"norm_form": "exact"}, "unknown norm_form 'exact'"),
        ({"norm_combine": "sum"}, "unknown norm_combine 'sum'"),
        ({"norm_reference": "none"}, "unknown norm_reference 'none': choose one of"),
        ({"selection": "largest"}, "unknown selection 'largest': choose one of"),
        ({"init": "zeros"}, "unknown init 'zeros': choose one of"),
        ({"norm_save": "4bit"}, "unknown norm_save"),
        ({"scaling": 0}, "scaling=0 must be a finite number above 0"),
        ({"norm_eps": 1e-46}, "norm_eps=1e-46 is 0 or infinite in fp32"),
        ({"norm_scale": 1e39}, "norm_scale=1e\\+39 is 0 or infinite in fp32"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"dropout": 0.1, "norm": "weight"}, "never forms"),
        ({"dropout": 0.1, "norm": "none", "stochastic_rounding": True}, "one W' for all tokens"),
        ({"norm": "activation", "stochastic_rounding": True}, "one W' for all tokens"),
        ({"fold_every": -1}, "fold_every=-1 must be an integer, 0 or more"),
        ({"fold_every": 1.5}, "must be an integer"),
        ({"fold_every": True}, "must be an integer"),
        ({"restrain": True, "norm": "none"}, "restrain needs a gain"),
        ({"restrain_decay": float("nan")}, "restrain_decay=nan must lie in"),
        ({"restrain_percent": 7}, "restrain_percent=7 must lie in"),
        ({"restrain_edge": 0.5}, "restrain_edge=0.5 must lie in"),
        ({"scaling": True}, "scaling=True must be a finite number"),
        ({"dropout": "0.1", "norm": "none"}, "dropout='0.1' must lie in"),
        ({"seed": "x"}, "seed='x' must be an integer"),
        ({"dropout": 0.1}, "dropout acts on z"),
    ],
    ids=str,
)
def test_bad_settings(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("kind", [AdapterConfig, SecuraConfig])
@pytest.mark.parametrize("value", ["no", "false", 1, None])
@pytest.mark.parametrize("name", [of.name for of in fields(AdapterConfig) if of.type == "bool"])
def test_a_switch_is_true_or_false(name, value, kind):
    """`"no"` counts as True."""
    with pytest.raises(ValueError, match=f"{name}={value!r} must be True or False"):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform needs"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"task_type": "SING"}, "SING"),
    ],
    ids=str,
)
def test_bad_settings_of_pefts(settings, message):
    with pytest.raises(ValueError, match=message):
        SecuraConfig(**settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_alpha", "'lora_alpha': take scaling"),
        ("lora_dropout", "'lora_dropout': take dropout"),
        ("target_module", r"'target_module'; did you mean target_modules\?"),
        ("use_dora", r"'use_dora'; see docs/from_lora\.md"),
    ],
)
def test_settings_that_there_are_not_are_told_what_is_meant(name, message):
    refusal = rf"^SecuraConfig\.__init__\(\) got an unexpected keyword argument {message}"
    with pytest.raises(TypeError, match=refusal):
        SecuraConfig(**{name: 1})


def test_a_config_of_ones_own_takes_its_own_settings():
    class Own(SecuraConfig):
        def __init__(self, size, **settings):
            super().__init__(r=size, **settings)

    assert Own(size=3, norm="none").r == 3


def test_a_layer_wants_a_config():
    with pytest.raises(TypeError, match=r"config=64 is no AdapterConfig: .*from_linear"):
        SECURALinear(torch.nn.Linear(4, 4), 64)
