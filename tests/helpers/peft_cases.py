"""Models and settings that test_peft_cases.py goes through, and what it does with each."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from secura import SecuraConfig


class MLP(nn.Module):
    """Two linear layers, or two of transformers' ``Conv1D``, and a head of some outputs."""

    def __init__(self, linear=nn.Linear, outputs=5):
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = linear(12, 9) if linear is nn.Linear else linear(9, 12)
        self.lin1 = linear(9, 11) if linear is nn.Linear else linear(11, 9)
        self.head = nn.Linear(11, outputs)

    def forward(self, x):
        """``[B, 12]`` to ``[B, outputs]``."""
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


def conv1d():
    """An MLP of ``Conv1D`` with weights that are no noise."""
    model = MLP(Conv1D)
    for layer in (model.lin0, model.lin1):
        nn.init.normal_(layer.weight, std=0.3)
    return model


BOTH = ["lin0", "lin1"]
QV = ["q_proj", "v_proj"]
CASES = {
    "MLP one layer none": (MLP, {"target_modules": ["lin0"], "norm": "none"}),
    "MLP none": (MLP, {"target_modules": BOTH, "norm": "none"}),
    "MLP channel": (MLP, {"target_modules": BOTH, "norm": "channel"}),
    "MLP weight": (MLP, {"target_modules": BOTH, "norm": "weight"}),
    "MLP activation": (MLP, {"target_modules": BOTH, "norm": "activation"}),
    "MLP channel averaged": (
        MLP, {"target_modules": BOTH, "norm": "channel", "norm_combine": "averaged",
              "norm_form": "paper"},
    ),
    "MLP pattern": (MLP, {"target_modules": r".*lin\d", "norm": "channel"}),
    "MLP all-linear": (MLP, {"target_modules": "all-linear", "norm": "channel"}),
    "MLP ranks": (
        MLP, {"target_modules": BOTH, "norm": "none", "rank_pattern": {"lin1": 2}, "inner_r": 3},
    ),
    "MLP excluded": (
        MLP, {"target_modules": r".*lin.*", "exclude_modules": ["lin0"], "norm": "channel"},
    ),
    "MLP head in full": (
        MLP, {"target_modules": BOTH, "norm": "channel", "modules_to_save": ["head"]},
    ),
    "MLP bias": (MLP, {"target_modules": BOTH, "norm": "weight", "train_bias": True}),
    "MLP core u": (MLP, {"target_modules": BOTH, "norm": "none", "core": "u"}),
    "MLP drawn": (MLP, {"target_modules": BOTH, "norm": "none", "selection": "inverse_sampling"}),
    "MLP scaled": (MLP, {"target_modules": BOTH, "norm": "channel", "scaling": 0.5}),
    "one output": (
        lambda: MLP(outputs=1),
        {"target_modules": [*BOTH, "head"], "norm": "channel", "rank_pattern": {"head": 1}},
    ),
    "Conv1D none": (conv1d, {"target_modules": BOTH, "norm": "none"}),
    "Conv1D channel": (conv1d, {"target_modules": BOTH, "norm": "channel"}),
    "Conv1D weight": (conv1d, {"target_modules": BOTH, "norm": "weight"}),
    "Conv1D activation": (conv1d, {"target_modules": ["lin1"], "norm": "activation"}),
    "decoder none": (tiny.llama, {"target_modules": QV, "norm": "none", "task_type": "CAUSAL_LM"}),
    "decoder channel": (
        tiny.llama, {"target_modules": "all-linear", "norm": "channel", "task_type": "CAUSAL_LM"},
    ),
    "decoder weight": (tiny.llama, {"target_modules": None, "task_type": "CAUSAL_LM"}),
    "decoder one layer": (
        tiny.llama, {"target_modules": QV, "layers_to_transform": [1], "norm": "channel"},
    ),
    "decoder of Conv1D": (
        tiny.gpt2, {"target_modules": None, "norm": "channel", "task_type": "CAUSAL_LM"},
    ),
    "encoder-decoder none": (
        tiny.t5, {"target_modules": None, "norm": "none", "task_type": "SEQ_2_SEQ_LM"},
    ),
    "encoder-decoder weight": (
        tiny.t5, {"target_modules": ["q", "v", "wi"], "task_type": "SEQ_2_SEQ_LM"},
    ),
    "classifier channel": (
        tiny.classifier, {"target_modules": QV, "norm": "channel", "task_type": "SEQ_CLS"},
    ),
    "classifier weight": (tiny.classifier, {"target_modules": QV, "task_type": "SEQ_CLS"}),
}  # fmt: skip

PAIRS = {
    "the same layer": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    "another seed and rank": (
        {"target_modules": BOTH},
        {"target_modules": BOTH, "seed": 3, "r": 3, "selection": "inverse_sampling"},
    ),
    "layers of their own": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "one layer in common": ({"target_modules": ["lin0"]}, {"target_modules": BOTH}),
    "norms of their own": (
        {"target_modules": ["lin0"], "norm": "channel"},
        {"target_modules": ["lin1"], "norm": "weight"},
    ),
    "a core of its own": ({"target_modules": BOTH}, {"target_modules": BOTH, "core": "u"}),
}

over_cases = pytest.mark.parametrize("case", CASES)
over_pairs = pytest.mark.parametrize("pair", PAIRS)


def build(case: str) -> nn.Module:
    """A fresh base model of a case, always the same."""
    return CASES[case][0]().eval()


def config(case: str, **changes) -> SecuraConfig:
    return SecuraConfig(**({"r": 4} | CASES[case][1] | changes))


def adapted(case: str, **changes) -> PeftModel:
    """A case's model, adapted so that it computes something else than its base."""
    model = get_peft_model(build(case), config(case, **changes))
    tiny.perturb(model)
    return model.eval()


def inputs(model, seed: int = 0) -> torch.Tensor:
    if any(isinstance(part, MLP) for part in model.modules()):
        return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    return tiny.tokens(3, seed=seed)


def output(model) -> torch.Tensor:
    """What the model makes of its inputs, detached."""
    x = inputs(model)
    if x.is_floating_point():
        return model(x).detach()
    return tiny.logits(model, x)


def train(model, steps: int = 3) -> None:
    """Some steps towards smaller outputs."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    x = inputs(model)
    for _ in range(steps):
        if x.is_floating_point():
            out = model(x)
        else:
            more = {"decoder_input_ids": x} if model.config.is_encoder_decoder else {}
            out = model(input_ids=x, **more).logits
        optimizer.zero_grad()
        out.pow(2).mean().backward()
        optimizer.step()
    model.eval()


def changed_since(before: dict[str, torch.Tensor], model) -> set[str]:
    """Names of the tensors that are others than before, but for sums over a layer's tensors."""
    state = model.state_dict()
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    return {name for name in changed if not name.endswith(".checksum")}


def pair_of(names: str) -> PeftModel:
    first, second = ({"r": 4, "norm": "none"} | settings for settings in PAIRS[names])
    model = get_peft_model(MLP().eval(), SecuraConfig(**first), adapter_name="first")
    model.add_adapter("second", SecuraConfig(**second))
    for seed, name in enumerate(("first", "second")):
        tiny.perturb(model, seed, name)
    return model.eval()


def outputs_of(model) -> dict[str, torch.Tensor]:
    """The outputs of an adapter pair: of the base, of each, of the first again."""
    with model.disable_adapter():
        found = {"base": output(model)}
    for name in ("first", "second"):
        model.set_adapter(name)
        found[name] = output(model)
    for one, other in itertools.combinations(found.values(), 2):
        assert not torch.allclose(one, other)
    model.set_adapter("first")
    assert torch.equal(output(model), found["first"])
    return found
