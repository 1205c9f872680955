"""Long-term memory: runs, models and forwards to whose loss it cannot add."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
from continual_runs import adapted, begun, pad, rows
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

from secura.continual import LongTermMemory

BATCH = pad(rows(3))


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"torch_compile": True},
        {"n_gpu": 2},
        {"loss_type": "dft"},
    ],
)
def test_runs_whose_loss_it_cannot_add_to_are_refused(settings):
    model = adapted()
    with pytest.raises(ValueError, match="adds to the model's own loss"):
        begun(model, **settings)
    assert not model._forward_hooks


class OwnSFT(SFTConfig):
    """Somebody's own arguments of an SFTTrainer."""


class OwnPairs(DPOConfig):
    """Somebody's own arguments of a DPOTrainer."""


class Distilling(SFTConfig):
    """TRL's own, of a trainer that makes another loss, as its GKDConfig is."""

    __module__ = "trl.experimental.gkd"


def test_arguments_of_sft_are_taken(tmp_path):
    args = OwnSFT(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    model = adapted()
    LongTermMemory().on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)
    LongTermMemory.detach(model)


@pytest.mark.parametrize(
    "kind", [DPOConfig, OwnPairs, KTOConfig, GRPOConfig, RLOOConfig, RewardConfig, Distilling]
)
def test_trainers_that_make_a_loss_of_their_own_are_refused(kind, tmp_path):
    """Of log-probabilities: what was added to them would change sign with the pair's other side."""
    model, args = adapted(), kind(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    state = SimpleNamespace(global_step=0)
    with pytest.raises(ValueError, match=f"with a {kind.__name__} take EWC, replay or weight=0"):
        LongTermMemory().on_train_begin(args, state, None, model=model)
    LongTermMemory(weight=0).on_train_begin(args, state, None, model=model)
    assert not model._forward_hooks


@pytest.mark.parametrize("make", [tiny.t5, tiny.bert])
def test_models_that_score_other_positions_are_refused(make):
    model = make()
    with pytest.raises(ValueError, match="is for causal language models"):
        begun(model)
    begun(model, weight=0)
    assert not model._forward_hooks


def test_forwards_it_cannot_add_to_are_refused():
    model = adapted().train()
    begun(model)
    with pytest.raises(ValueError, match="this forward has none"):
        model(input_ids=BATCH["input_ids"])
    with pytest.raises(ValueError, match="this forward has none"):
        model(**BATCH, return_dict=False)
    for settings in ({"ema": 1.1}, {"ema": -0.1}, {"weight": -1.0}, {"weight": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            LongTermMemory(**settings)
