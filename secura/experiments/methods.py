"""The methods that are compared, each a name in one registry.

M1 and M2 differ in what the norm measures against once something was folded, which happens where a
next task begins, and ER and EWC act on earlier tasks: on the first task they are the same run as
another method (`first_as`), which is computed once and counts for both.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from secura._extras import require

if TYPE_CHECKING:
    from secura.experiments.presets import Settings

# A grid a family. C and R carry W's own scale, so that at one rate C A B R moves a weight some
# twenty times as far as LoRA does (exp0); full fine-tuning moves all of it.
LORA_RATES = (3e-4, 1e-3, 3e-3)
CUR_RATES = (1e-4, 3e-4, 1e-3)
FULL_RATES = (1e-5, 3e-5, 1e-4)


@dataclass(frozen=True)
class Method:
    """How a model is trained on one task after another.

    Args:
        name: in the registry, on the command line and in results.
        title: for people.
        make_config: the PEFT config for given settings and seed; None trains every weight.
        strategy: what is done against forgetting beside the adapter, a key of
            `secura.experiments.strategies.STRATEGIES`.
        folds: whether what was learned is folded into the frozen core before each next task.
        frozen: names of parameters (the part after the last ``secura_``) that stay as they start.
        first_as: the method whose run on a first task this one's is.
        first_only: whether it is compared on the first task alone.
        rates: the learning rates its own best is chosen from.
    """

    name: str
    title: str
    make_config: Callable[[Settings, int], Any] | None
    strategy: str = "none"
    folds: bool = False
    frozen: tuple[str, ...] = ()
    first_as: str | None = None
    first_only: bool = False
    rates: tuple[float, ...] = LORA_RATES


def _lora(**fields: Any) -> Callable[[Settings, int], Any]:
    def make(settings: Settings, seed: int) -> Any:
        return require("peft", "experiments").LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=list(settings.target_modules),
            **fields,
        )

    return make


def _secura(**fields: Any) -> Callable[[Settings, int], Any]:
    def make(settings: Settings, seed: int) -> Any:
        chosen = {"r": settings.rank, "inner_r": settings.inner_rank, "seed": seed} | fields
        if fields.get("init") == "identity":
            chosen["inner_r"] = settings.rank
        return require("secura.tuner", "experiments").SecuraConfig(
            task_type="CAUSAL_LM", target_modules=list(settings.target_modules), **chosen
        )

    return make


# The form and combination of each space in `METHODS`; `norm_forms` has all others.
_FORM = {
    "weight": ("paper", "averaged"),
    "channel": ("calibrated", "gated"),
    "activation": ("calibrated", "gated"),
}


def _norms() -> list[Method]:
    """SECURA in every norm space, against the folded weight (M1) and the original one (M2)."""
    return [
        Method(
            name=f"secura-{space}-{kind}",
            title=f"SECURA {space} {kind.upper()}",
            make_config=_secura(
                norm=space, norm_form=form, norm_combine=combine, norm_reference=reference
            ),
            folds=True,
            first_as=f"secura-{space}-m1" if kind == "m2" else None,
            rates=CUR_RATES,
        )
        for space, (form, combine) in _FORM.items()
        for kind, reference in (("m1", "folded"), ("m2", "pretrained"))
    ]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "LoRA (SEQ)", _lora()),
        Method("dora", "DoRA", _lora(use_dora=True)),
        Method(
            "cur-lora",
            "CUR-LoRA",
            _secura(norm="none", init="identity", selection="inverse_sampling"),
            frozen=("A",),
            rates=CUR_RATES,
        ),
        Method("cabr", "CABR only", _secura(norm="none"), folds=True, rates=CUR_RATES),
        *_norms(),
        Method("i-lora", "I-LoRA", _lora(), strategy="long-term"),
        Method("er", "ER", _lora(), strategy="replay", first_as="lora"),
        Method("ewc", "EWC", _lora(), strategy="ewc", first_as="lora"),
        Method("full", "Full fine-tuning", None, rates=FULL_RATES),
    )
}
"""What a run compares where it is not told."""
ALIASES = {"seq": "lora"}
FORMS = "forms"
"""The name that stands for all of `norm_forms`."""
BASE = "base"
"""The untouched model's name in results."""


@cache
def norm_forms() -> dict[str, Method]:
    """S-MagNorm in every form and combination but those that `METHODS` has."""
    gain = require("secura_kernels.norm", "experiments")
    return {
        (name := f"secura-{space}-{form}-{combine}"): Method(
            name=name,
            title=f"SECURA {space}, {form}, {combine}",
            make_config=_secura(norm=space, norm_form=form, norm_combine=combine),
            first_only=True,
            rates=CUR_RATES,
        )
        for space, form, combine in product(_FORM, gain.FORMS, gain.COMBINES)
        if (form, combine) != _FORM[space]
    }


def get_method(name: str) -> Method:
    """The method of a name, which may be an alias.

    Raises:
        ValueError: for a name that is not known, with the nearest that is.
    """
    found = METHODS.get(ALIASES.get(name, name)) or norm_forms().get(name)
    if found is None:
        near = difflib.get_close_matches(name, [*METHODS, *ALIASES, FORMS, *norm_forms()], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join([*METHODS, FORMS])
        raise ValueError(f"unknown method {name!r}: {hint}choose from {known}")
    return found


def get_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, `FORMS` being several, in the registry's order, each once.

    Raises:
        ValueError: for a name that is not known, with the nearest that is.
    """
    each = [one for name in names for one in (norm_forms() if name == FORMS else [name])]
    chosen = {get_method(name).name for name in each}
    every = METHODS if chosen <= set(METHODS) else METHODS | norm_forms()
    return [method for name, method in every.items() if name in chosen]


__all__ = ["ALIASES", "BASE", "METHODS", "Method", "get_method", "get_methods", "norm_forms"]
