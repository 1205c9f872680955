"""What bf16's blind zone does to learning: SmolLM2-135M learns GSM8K at a small rate.

    python -m benchmarks.landing_model --out benchmarks/results/landing_model-cpu.json

In fp32, in bf16, and in bf16 with W' rounded stochastically, from the same weights (which bf16
holds), on the same batches. Adapters and AdamW are fp32 throughout. Products as in
:mod:`.landing`. Each row is one run; ``--resume`` goes on after the last that was finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from statistics import fmean, median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from secura import SecuraConfig

from .assets import load_model
from .count_tables import landing_model_table
from .landing import wide_products
from .retention.data import load_task
from .schema import SPENT, Result, Row
from .session import Session, command, parser
from .training import packaged_or_tiny

SEEDS = 3
PLANS = {
    "quick": {"steps": 12, "batch": 4, "length": 32, "held_out": 24},
    "tiny": {"steps": 2, "batch": 2, "length": 8, "held_out": 8},
}
ADAPTERS: dict[str, tuple[Callable[..., Any], float, dict[str, Any]]] = {
    "peft lora": (LoraConfig, 5e-4, {"r": 8, "lora_alpha": 8}),
    "secura none": (SecuraConfig, 1e-5, {"r": 64, "norm": "none"}),
}
"""By name: its config, the rate, its settings; on all linear layers."""
ARITHMETICS = ("fp32", "bf16", "bf16 stochastic")


def runs() -> Iterator[tuple[int, str, str]]:
    """``(seed, adapter, arithmetic)`` of every run."""
    for seed in range(SEEDS):
        for name in ADAPTERS:
            for arithmetic in ARITHMETICS[: 2 if name == "peft lora" else 3]:
                yield seed, name, arithmetic


def tokens(preset: str, plan: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Token ids to train on and held out, ``[rows, length]``; GSM8K's, one after the other."""
    sizes = plan["steps"] * plan["batch"], plan["held_out"]
    if preset != "quick":
        return torch.randint(64, (sizes[0], plan["length"])), torch.arange(64).view(8, 8)
    (_, tokenizer), split, parts = load_model(), load_task("gsm8k"), []
    for size, examples in zip(sizes, (split.train, split.held_out), strict=True):
        ids: list[int] = []
        for example in examples[: 2 * size]:
            ids += tokenizer(example.prompt + example.completion)["input_ids"]
        parts.append(torch.tensor(ids[: size * plan["length"]]).view(size, plan["length"]))
    return parts[0], parts[1]


def learn(preset: str, name: str, arithmetic: str, seed: int) -> dict[str, float]:
    """Held-out losses of one run, before and after it, and those of its adapter in fp32."""
    torch.manual_seed(seed)
    plan, (config, rate, settings) = PLANS[preset], ADAPTERS[name]
    if arithmetic == "bf16 stochastic":
        settings = settings | {"stochastic_rounding": True}
    if preset == "tiny":
        settings = settings | {"r": 4}
    base = packaged_or_tiny(preset, torch.bfloat16)
    base = base.float() if arithmetic == "fp32" else base
    model = get_peft_model(base, config(target_modules="all-linear", **settings)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rows, held_out = tokens(preset, plan)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    for ids in rows[order].split(plan["batch"]):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after, before = loss(model, held_out), before_training(preset)
    after_fp32 = after if arithmetic == "fp32" else loss(model.float(), held_out)
    return {
        "before": before["fp32" if arithmetic == "fp32" else "bf16"],
        "after": after,
        "before_fp32": before["fp32"],
        "after_fp32": after_fp32,
        "change": median(changes(model)),
    }


@cache
def before_training(preset: str) -> dict[str, float]:
    """Held-out losses of the base model, which a fresh adapter leaves as they are."""
    base, (_, held_out) = packaged_or_tiny(preset, torch.bfloat16), tokens(preset, PLANS[preset])
    return {"bf16": loss(base, held_out), "fp32": loss(base.float(), held_out)}


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Nats a token of ``ids [rows, length]``, from logits in fp32."""
    model.eval()
    losses = []
    for part in ids.split(8):
        logits = model(input_ids=part).logits[:, :-1].float()
        losses.append(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item())
    model.train()
    return fmean(losses)


@torch.no_grad()
def changes(model: Any) -> Iterator[float]:
    """‖ΔW‖ / ‖W‖ of each adapted layer."""
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer"):
            weight = layer.base_layer.weight
            yield float(layer.get_delta_weight("default").norm() / weight.norm())


def run(options: Any) -> Result:
    """Everything the command line asked for."""
    options.dtype = options.dtype or "bf16"
    session = Session("landing_model", options, {})
    recorder = session.recorder
    done = [(row.case["seed"], row.provider) for row in recorder.result.rows]
    with wide_products():
        for seed, name, arithmetic in runs():
            provider = f"{name}, {arithmetic}"
            if (seed, provider) in done or (options.providers or "") not in provider:
                continue
            case = PLANS[options.preset] | {"seed": seed, "rate": ADAPTERS[name][1]}
            row = Row(case, provider, "skipped", SPENT)
            if time.monotonic() < session.end:
                row = Row(case, provider, figures=learn(options.preset, name, arithmetic, seed))
            recorder.add([row])
    recorder.close()
    return session.result


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", tuple(PLANS))
    return command(flags, arguments, run, landing_model_table)


if __name__ == "__main__":
    raise SystemExit(main())
