"""What training did to the singular values and directions of weights, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secura import bases
from secura._extras import require

TOP = 10
"""How many of the trained weight's leading directions are looked at: the paper's code's choice."""
COSINE = 0.5
"""A direction is new below this |cosine| with each direction the weight had: likewise."""
QUANTILES = 32


class WeightPair(NamedTuple):
    """One weight `[N, K]` before and after training, fp32; read only, `before` may be the model's.

    `inexact` says that no weight has the layer's effect, and `after` is W + ΔW without the norm.
    """

    name: str
    before: Tensor
    after: Tensor
    inexact: bool = False


def spectra(
    model: nn.Module,
    base_state: Mapping[str, Tensor] | None = None,
    target_modules: Sequence[str] = (),
    *,
    top: int = TOP,
    cosine: float = COSINE,
) -> list[dict[str, Any]]:
    """Every adapted weight's spectrum before and after, as :func:`compare` describes it.

    Args:
        model: a PEFT model with unmerged adapters, or one all of whose weights were trained.
        base_state: the weights before, by name in the plain model; for a model without adapters.
        target_modules: last parts of the names of the layers to look at, such as ``"q_proj"``;
            empty for all. A PEFT model's are those with adapters.
        top: see :func:`compare`.
        cosine: see :func:`compare`.

    Raises:
        ValueError: as :func:`weight_pairs`, or a weight that holds NaN or inf.
    """
    return [
        compare(pair, top=top, cosine=cosine)
        for pair in weight_pairs(model, base_state, target_modules)
    ]


def weight_pairs(
    model: nn.Module,
    base_state: Mapping[str, Tensor] | None = None,
    target_modules: Sequence[str] = (),
) -> Iterator[WeightPair]:
    """Each adapted weight before and after, one at a time; the model is not changed.

    Args:
        model: see :func:`spectra`.
        base_state: see :func:`spectra`.
        target_modules: see :func:`spectra`.

    Raises:
        ValueError: an adapter is merged, no layer fits, or the weights before are not given.
    """
    tuner_layer = require("peft.tuners.tuners_utils", "experiments").BaseTunerLayer
    modules = [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if not target_modules or name.rpartition(".")[2] in target_modules
    ]
    adapted = [(name, layer) for name, layer in modules if isinstance(layer, tuner_layer)]
    dense = [(name, layer) for name, layer in modules if _is_linear(layer)]
    if adapted:
        yield from (_adapted_pair(name, layer) for name, layer in adapted)
    elif not dense:
        raise ValueError(f"the model has no linear layers named {', '.join(target_modules)}")
    elif base_state is None:
        raise ValueError("the model has no adapters: give the weights before as base_state")
    else:
        for name, layer in dense:
            before = base_state[f"{name}.weight"]
            before = before.t() if bases.is_conv1d(layer) else before
            yield WeightPair(name, before.float(), bases.weight(layer).float())


def compare(pair: WeightPair, *, top: int = TOP, cosine: float = COSINE) -> dict[str, Any]:
    """What a weight's singular values σ and left singular vectors say about its change.

    Args:
        pair: the weight before and after.
        top: how many leading directions of the weight after are looked at.
        cosine: below which a direction is new.

    Returns:
        - ``name``, ``inexact``: the pair's.
        - ``norm_before``, ``norm_after``: ‖σ‖, which is the Frobenius norm.
        - ``nuclear_before``, ``nuclear_after``: the sum of σ.
        - ``change``: ‖ΔW‖ / ‖W‖, Frobenius.
        - ``stable_rank_before``, ``stable_rank_after``, ``stable_rank_change``: ‖σ‖² / σ₁² of W,
          W' and ΔW; 0 for a zero matrix.
        - ``effective_rank_change``: exp of the entropy of σ / Σσ of ΔW; 0 where that is zero.
        - ``new_directions``: of the `top` leading left singular vectors of W', how many have an
          absolute cosine below `cosine` with every one of W. These are the intruder dimensions of
          arXiv 2410.21228; 10 and 0.5 are the numbers of its authors' code.
        - ``quantiles_before``, ``quantiles_after``: 32 quantiles of σ, from the least on.

    Raises:
        ValueError: a weight holds NaN or inf.
    """
    for weight in (pair.before, pair.after):
        if not weight.isfinite().all():
            raise ValueError(f"the weight of {pair.name} holds NaN or inf")
    left, before, _ = torch.linalg.svd(pair.before, full_matrices=False)
    turned, after, _ = torch.linalg.svd(pair.after, full_matrices=False)
    change = torch.linalg.svdvals(pair.after - pair.before)
    nearest = (turned[:, :top].T @ left).abs().amax(dim=1)
    return {
        "name": pair.name,
        "inexact": pair.inexact,
        "norm_before": before.norm().item(),
        "norm_after": after.norm().item(),
        "nuclear_before": before.sum().item(),
        "nuclear_after": after.sum().item(),
        "change": (change.norm() / before.norm()).item(),
        "stable_rank_before": _stable_rank(before),
        "stable_rank_after": _stable_rank(after),
        "stable_rank_change": _stable_rank(change),
        "effective_rank_change": _effective_rank(change),
        "new_directions": int((nearest < cosine).sum()),
        "quantiles_before": _quantiles(before),
        "quantiles_after": _quantiles(after),
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or bases.is_conv1d(module)


@torch.no_grad()
def _adapted_pair(name: str, layer: Any) -> WeightPair:
    if layer.merged:
        raise ValueError(f"the adapter on {name} is merged into its weight: unmerge it first")
    before = bases.weight(layer.get_base_layer()).float()
    changed = copy.deepcopy(layer).float()
    inexact = _allow_inexact(changed)
    changed.merge()
    return WeightPair(name, before, bases.weight(changed.get_base_layer()).float(), inexact)


def _allow_inexact(layer: Any) -> bool:
    """Whether the layer's adapter has no exact merge; a merge then writes W + ΔW."""
    adapters: Iterable[Any] = getattr(layer, "secura_adapter", {}).values()
    inexact = False
    for adapter in adapters:
        if adapter.config.norm == "activation":
            adapter.config.allow_inexact_merge = inexact = True
    return inexact


def _stable_rank(sigma: Tensor) -> float:
    return (sigma.square().sum() / sigma[0].square()).item() if sigma[0] > 0 else 0.0


def _effective_rank(sigma: Tensor) -> float:
    if not sigma[0] > 0:
        return 0.0
    shares = sigma / sigma.sum()
    return torch.special.entr(shares).sum().exp().item()


def _quantiles(sigma: Tensor) -> list[float]:
    return sigma.quantile(torch.linspace(0, 1, QUANTILES, device=sigma.device)).tolist()


__all__ = ["COSINE", "QUANTILES", "TOP", "WeightPair", "compare", "spectra", "weight_pairs"]
