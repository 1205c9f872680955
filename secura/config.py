"""The adapter's settings, with no dependency beyond the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from secura_kernels.cur import INITS, SELECTIONS
from secura_kernels.norm import REFERENCES, SAVES, NormOptions, Restrain, resolve_norm

_NORM, _RESTRAIN = NormOptions._field_defaults, Restrain._field_defaults


@dataclass
class AdapterConfig:
    """Say how a linear layer ``W [N, K]`` is adapted; :class:`secura.SecuraConfig` adds PEFT's.

    Args:
        r: CUR rank, m in all formulas: how many rows and columns of W span the change.
        core: what of the core ``U [m, m]`` is trained: ``"ab"``, the factors of U = A B (the
            paper's), or ``"u"``, U itself, 0 at first. ``"u"`` is meant to be anchored before it is
            trained, by :func:`secura.anchor`. On the MLP of a 135M model, where both had learned
            96% of LoRA's best, it drifted 5.1 times as far from the base model as LoRA without an
            anchor, 0.60 with one, 0.37 with r=128 and a decay of 30 (docs/results.md).
        inner_r: inner rank, r in ``A [m, r]`` and ``B [r, m]``; None means 2 · ``r``, and with
            ``init="svd"`` it is at most the layer's in_features. With ``core="ab"`` alone.
        scaling: s of ΔW = s · C A B R.
        selection: ``"least_norm"`` (released) or ``"inverse_sampling"`` (CURLoRA, seeded).
        init: how A starts, where there is one: ``"svd"`` (released; a slice of W), ``"kaiming"``,
            ``"orthogonal"`` or ``"identity"``.
        norm: space of S-MagNorm: ``"weight"`` (the paper's), ``"channel"``, ``"activation"`` (the
            released code's) or ``"none"`` (CABR alone).
        norm_form: ``"paper"``, ``"released"``, ``"calibrated"``, or None for the space's default:
            ``paper`` in ``weight``, ``calibrated`` elsewhere.
        norm_combine: ``"gated"`` (also None): base + Δ/M, or ``"averaged"``, the paper's
            (2·base + Δ)/M, which scales the base too, from the first optimizer step on: in form
            ``paper`` by 1.0243 nearly everywhere in ``weight`` and ``activation``, and by about 1.6
            at r = 64 in ``channel``, whose channels change alike.
        norm_reference: ``"pretrained"`` (M2: the norm measures against the original weight) or
            ``"folded"`` (M1: against the folded one; what was folded is no longer divided by M, so
            a fold changes the layer from about W + ΔW/2 to W + ΔW).
        norm_scale: k of the sigmoid.
        norm_eps: ε of ρ = |Δ| / (|base| + ε). With the released 1e-10 one near-zero base entry sets
            ρ_max of form ``paper`` and leaves every other gain near 2.
        norm_eps_relative: whether ``norm_eps`` is a multiple of the base's root mean square.
        norm_save: what ``norm="activation"`` keeps for its backward pass: ``"recompute"`` the base
            layer's output, ``"8bit"`` one byte of 1/M an element, off by at most 0.2%.
        fold_every: optimizer steps between folds; 0 folds only when called. A Trainer folds only
            with ``FoldCallback`` among its callbacks; ``secura train`` adds it.
        train_bias: whether a bias ``[N]`` is trained too. Where the base layer has none, a merge
            gives it one, which transformers leaves out when it loads the merged checkpoint: serve
            such an adapter unmerged.
        stochastic_rounding: whether W' is rounded to bf16 stochastically, in the forward pass and
            in the merge alike (from ``seed`` and the layer's rows and columns), so that changes
            under a thousandth of the weight are not lost; not with ``norm="activation"``, nor with
            dropout. It costs a pass over W in every forward, as ``norm="weight"`` does
            (docs/norms.md), and does nothing where fp32 is computed in.
        share_inputs: whether layers that are given the same tensor (q, k and v; gate and up) add up
            its gradient in place, and under autocast cast it once: less to move and to save,
            nothing else (docs/kernels.md).
        keep_columns: whether C ``[N, m]`` is kept beside the weight, in its dtype, rather than read
            out of it in every pass, a sector of 32 bytes an element: quicker where batches are
            small, for 352 MB over all linears of Llama-3-8B at r = 128 (docs/kernels.md).
        dropout: probability that an entry of ``z = x Rᵀ`` is dropped; not with ``norm="weight"``.
        restrain: the released code's suppression of the most important output channels.
        restrain_percent: share of small gains above which it acts.
        restrain_edge: a gain up to this is small.
        restrain_decay: factor of the suppressed channels.
        seed: of every random choice, the same in each layer.
        init_weights: whether B, or U, starts at 0, so that a new adapter changes nothing; False
            draws it from torch's global generator (for tests).
        check_base: whether loading on another base weight is an error; a saved config always says
            so. To load there all the same,
            ``PeftModel.from_pretrained(model, folder, check_base=False)``, or give it a config from
            ``SecuraConfig.from_pretrained(folder, check_base=False)``.
        allow_inexact_merge: let ``norm="activation"``, which is not linear in x, merge W + ΔW, and
            any norm into a layer whose forward is more than ``x Wᵀ + b``.
        merge_dequantized: let a merge put a plain ``nn.Linear`` with the dequantised, merged weight
            in the place of a quantised base, in the model's dtype; unmerging puts it back.
        anchor_damping: λ, what :func:`secura.anchor` adds to its statistics, as a share of their
            mean.
        anchored: whether the adapter has an anchor; :func:`secura.anchor` sets it.

    Raises:
        ValueError: for a setting out of range; the message says what is allowed.
    """

    r: int = 64
    core: str = "ab"
    inner_r: int | None = None
    scaling: float = 1.0
    selection: str = "least_norm"
    init: str = "svd"
    norm: str = "weight"
    norm_form: str | None = None
    norm_combine: str | None = None
    norm_reference: str = "pretrained"
    norm_scale: float = _NORM["scale"]
    norm_eps: float = _NORM["eps"]
    norm_eps_relative: bool = _NORM["eps_relative"]
    norm_save: str = "recompute"
    fold_every: int = 0
    train_bias: bool = False
    stochastic_rounding: bool = False
    share_inputs: bool = False
    keep_columns: bool = False
    dropout: float = 0.0
    restrain: bool = False
    restrain_percent: float = _RESTRAIN["percent"]
    restrain_edge: float = _RESTRAIN["edge"]
    restrain_decay: float = _RESTRAIN["decay"]
    seed: int = 0
    init_weights: bool = True
    check_base: bool = True
    allow_inexact_merge: bool = False
    merge_dequantized: bool = False
    anchor_damping: float = 1e-2
    anchored: bool = False

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            check_switch(name, getattr(self, name))
        check_rank("r", self.r)
        if self.inner_r is not None:
            check_rank("inner_r", self.inner_r)
        _check_choice("core", self.core, CORES)
        if self.core == "u" and self.inner_r is not None:
            raise ValueError(
                f"inner_r={self.inner_r} is the inner rank of A and B, which core='u' has not: "
                "leave it out, or choose core='ab'"
            )
        check_damping("anchor_damping", self.anchor_damping)
        if self.anchored and self.core != "u":
            raise ValueError("anchored=True belongs to core='u': secura.anchor() sets it")
        _check_choice("selection", self.selection, SELECTIONS)
        _check_choice("init", self.init, INITS)
        _check_choice("norm_save", self.norm_save, SAVES)
        _check_choice("norm_reference", self.norm_reference, REFERENCES)
        resolve_norm(self.norm, self.norm_form, self.norm_combine)
        for name in ("scaling", "norm_scale", "norm_eps"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a finite number above 0")
            if not _FP32.tiny <= value <= _FP32.max:
                raise ValueError(
                    f"{name}={value!r} is 0 or infinite in fp32, which the norm is computed in: it "
                    f"must lie between {_FP32.tiny:.2g} and {_FP32.max:.2g}"
                )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1)")
        for name, least, most in (
            ("restrain_percent", 0, 1),
            ("restrain_edge", 1, 2),
            ("restrain_decay", 0, 1),
        ):
            value = getattr(self, name)
            if not _is_number(value) or not least <= value <= most:
                raise ValueError(f"{name}={value!r} must lie in [{least}, {most}]")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        if self.dropout and self.norm == "weight":
            raise ValueError(
                "dropout acts on z = x Rᵀ, which norm='weight' never forms: set dropout=0 or "
                "choose norm='channel', 'activation' or 'none'"
            )
        if self.stochastic_rounding and (self.dropout or self.norm == "activation"):
            raise ValueError(
                "stochastic_rounding is of one W' for all tokens, which norm='activation' and "
                "dropout do not have: set dropout=0 and choose norm='channel', 'weight' or 'none', "
                "or leave it off"
            )
        check_period("fold_every", self.fold_every)
        if self.restrain and self.norm == "none":
            raise ValueError("restrain needs a gain to count: choose a norm other than 'none'")

    @property
    def norm_options(self) -> NormOptions:
        """The norm as the kernels take it."""
        return NormOptions(
            self.norm,
            self.norm_form,
            self.norm_combine,
            float(self.norm_scale),
            float(self.norm_eps),
            self.norm_eps_relative,
        )

    @property
    def replaces_product(self) -> bool:
        """Whether a layer multiplies by another weight than the base's, which has to be at hand."""
        return self.norm_options.replaces_product or self.stochastic_rounding

    def checksum_settings(self, folded: bool) -> str:
        """The settings that the checksum covers, as text: those that decide the result.

        Args:
            folded: whether anything was folded, which the norm's reference is about.
        """
        parts: list[Any] = [self.scaling, self.norm]
        if self.norm != "none":
            parts += resolve_norm(self.norm, self.norm_form, self.norm_combine)
            parts += [self.norm_scale, self.norm_eps, self.norm_eps_relative]
            parts += [self.norm_reference] if folded else []
        if self.restrain:
            parts += [self.restrain_percent, self.restrain_edge, self.restrain_decay]
        return repr([float(part) if isinstance(part, int | float) else part for part in parts])


CORES = ("ab", "u")
_SWITCHES = tuple(of.name for of in fields(AdapterConfig) if of.type == "bool")

_FP32 = torch.finfo(torch.float32)


def check_damping(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` can be an anchor's damping.

    Beyond these what an anchor was made of is found in its fp32 roots with errors of many percent.
    """
    if not _is_number(value) or not 1e-6 <= value <= 1e3:
        raise ValueError(f"{name}={value!r} must lie between 1e-6 and 1000: 1e-2, say")


def _is_number(value: Any) -> bool:
    """Whether a setting is a finite number and no bool."""
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def check_rank(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")


def check_switch(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False: ``"no"`` would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_period(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r} must be an integer, 0 or more optimizer steps")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: choose one of {known}")


__all__ = ["AdapterConfig", "check_damping", "check_period", "check_rank", "check_switch"]
