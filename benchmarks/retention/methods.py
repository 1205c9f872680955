"""The methods that are compared, each one entry of a registry that variations can be made of.

``anchored-self@damping=0.1,decay=0.01`` is the method ``anchored-self`` with two of its fields
changed; a field that :class:`Method` has not is one of its adapter's config.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import peft

from benchmarks.retention.cells import TARGETS
from secura.tuner import SecuraConfig

LORA_RANKS = {"qv": 8, "mlp": 4, "all": 4}
CUR_RANK = 64


@dataclass(frozen=True)
class Method:
    """How a model is trained on one task after another.

    Args:
        name: in the registry, with its variations, as results call it.
        title: for people.
        adapter: ``"lora"``, ``"dora"``, ``"secura"``, or ``"full"`` for every weight.
        rank: of LoRA, or of the CUR decomposition; 0 takes the adapter's default for its place.
        config: further fields of the adapter's config.
        optimizer: ``"adamw"``, or ``"muon"`` for orthogonalised steps.
        decay: the optimizer's decoupled weight decay; of an anchored core, a penalty on leaving
            what the anchor saw.
        grows: whether the decay counts once for each task so far, as the precision of a posterior
            and EWC's penalty do.
        anchor: what anchors the core: the model's own samples (``"self"``), given news
            (``"text"``), or nothing.
        damping: of the anchor.
        kappa: of the anchor: ``"model"`` as it is, so that a unit of Ũ costs the same in all
            layers, or ``"layer"``, so that a step moves every layer's weight alike.
        sides: of the anchor: ``"both"``, ``"in"`` or ``"out"``.
        against: what is done against forgetting beside the adapter, a key of
            ``benchmarks.retention.strategies.STRATEGIES``.
        strength: of that: EWC's λ, or the share of a batch that is replayed.
        scale: of what was trained, after training; below 1 takes a part of it back.
        whiten: whether LoRA's A is trained in coordinates in which its inputs are white; before
            each next task it is then folded into the base weight.
        fold: when what was learned is folded into the frozen core: ``"never"``, before each next
            ``"task"``, or after each ``"step"``.
    """

    name: str
    title: str
    adapter: str
    rank: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    decay: float = 0.0
    grows: bool = False
    anchor: str = ""
    damping: float = 1e-2
    kappa: str = "layer"
    sides: str = "both"
    against: str = ""
    strength: float = 0.0
    scale: float = 1.0
    whiten: bool = False
    fold: str = "never"

    def make_config(self, targets: str, seed: int) -> Any:
        """The PEFT config for a place's layers; None trains every weight."""
        if self.adapter == "full":
            return None
        common: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "target_modules": list(TARGETS[targets]),
        }
        if self.adapter == "secura":
            ranks = {"r": self.rank} if self.rank else {}
            if self.config.get("released"):
                rest = {k: v for k, v in self.config.items() if k != "released"}
                return SecuraConfig.released(self.config["released"], **common, **ranks, **rest)
            return SecuraConfig(**{"r": CUR_RANK, "seed": seed, **common, **ranks, **self.config})
        rank = self.rank or LORA_RANKS[targets]
        dora = {"use_dora": True} if self.adapter == "dora" else {}
        return peft.LoraConfig(**common, r=rank, lora_alpha=2 * rank, **dora, **self.config)

    @property
    def trained_as(self) -> str:
        """The name without ``scale``: what is scaled down after training was trained whole."""
        return self._named(self.name.partition("@")[0], without="scale")

    @property
    def first_as(self) -> str:
        """The method that learns a first task as this one does, which then has nothing to keep."""
        if self.against in ("er", "ewc"):
            return self._named("lora", without="strength")
        return self._named(self.name.partition("@")[0], without="grows")

    def _named(self, base: str, *, without: str) -> str:
        parts = self.name.partition("@")[2].split(",")
        rest = ",".join(part for part in parts if part and part.partition("=")[0] != without)
        return f"{base}@{rest}" if rest else base


_U = {"core": "u", "norm": "none"}
_PAPER = {"norm": "weight", "norm_form": "paper"}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "LoRA", "lora"),
        Method("dora", "DoRA", "dora"),
        Method("full", "all weights", "full"),
        Method(
            "cur-lora",
            "CUR-LoRA",
            "secura",
            config=_U | {"selection": "inverse_sampling"},
            fold="task",
        ),
        Method("core-u", "U alone", "secura", config=_U, fold="task"),
        Method("cabr", "CABR", "secura", config={"norm": "none"}, fold="task"),
        Method(
            "secura-weight",
            "SECURA weight, averaged",
            "secura",
            config=_PAPER | {"norm_combine": "averaged", "norm_reference": "folded"},
            fold="task",
        ),
        Method(
            "secura-weight-gated",
            "SECURA weight, gated",
            "secura",
            config=_PAPER | {"norm_combine": "gated", "norm_reference": "folded"},
            fold="task",
        ),
        Method(
            "secura-weight-u",
            "SECURA weight, U alone",
            "secura",
            config=_PAPER | {"core": "u", "norm_combine": "gated", "norm_reference": "folded"},
            fold="task",
        ),
        Method("anchored-self", "anchored core", "secura", config=_U, anchor="self", fold="task"),
        Method(
            "anchored-text",
            "anchored core, by news",
            "secura",
            config=_U,
            anchor="text",
            fold="task",
        ),
        Method(
            "anchored-channel",
            "anchored core, S-MagNorm channel",
            "secura",
            config={"core": "u", "norm": "channel"},
            anchor="self",
            fold="task",
        ),
        Method("released-m1", "released M1", "secura", config={"released": "M1"}, fold="step"),
        Method(
            "released-m2", "released M2 (ours)", "secura", config={"released": "M2"}, fold="step"
        ),
        Method("ewc", "LoRA + EWC of earlier tasks", "lora", against="ewc", strength=3e4),
        Method("ewc-self", "LoRA + EWC of own samples", "lora", against="ewc-self", strength=3e4),
        Method("er", "LoRA + replay of earlier tasks", "lora", against="er", strength=0.2),
        Method(
            "replay-self",
            "LoRA + replay of own samples",
            "lora",
            against="replay-self",
            strength=0.2,
        ),
        Method("i-lora", "I-LoRA", "lora", against="i-lora", strength=0.2),
        Method("lora-whitened", "LoRA, A whitened", "lora", whiten=True),
    )
}


def get_method(name: str) -> Method:
    """The method of a name, with the variations that stand behind its ``@``.

    Raises:
        ValueError: for a name that is not known, with the nearest that is, or a value that a field
            does not take.
    """
    base, _, text = name.partition("@")
    if base not in METHODS:
        near = difflib.get_close_matches(base, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown method {base!r}: {hint}choose from {', '.join(METHODS)}")
    method = METHODS[base]
    kinds = {entry.name: type(getattr(method, entry.name)) for entry in fields(Method)}
    changed: dict[str, Any] = {"config": dict(method.config)}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key in kinds and key != "config":
            try:
                changed[key] = _BOOLS[value] if kinds[key] is bool else kinds[key](value)
            except (KeyError, ValueError) as error:
                raise ValueError(f"{name}: {key} takes {kinds[key].__name__}") from error
            if changed[key] not in _TAKEN.get(key, (changed[key],)):
                raise ValueError(f"{name}: {key} takes one of {', '.join(_TAKEN[key])}")
        else:
            changed["config"][key] = _value(value)
    title = f"{method.title}, {text}" if text else method.title
    return replace(method, name=name, title=title, **changed)


_BOOLS = {"True": True, "False": False}
_TAKEN = {
    "adapter": ("lora", "dora", "secura", "full"),
    "optimizer": ("adamw", "muon"),
    "anchor": ("", "self", "text"),
    "kappa": ("layer", "model"),
    "sides": ("both", "in", "out"),
    "against": tuple({"", *(method.against for method in METHODS.values())}),
    "fold": ("never", "task", "step"),
}
"""What the fields that are words may be."""


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {**_BOOLS, "None": None}.get(text, text)


__all__ = ["CUR_RANK", "LORA_RANKS", "METHODS", "Method", "get_method"]
