"""The anchored core: U trained in coordinates in which every direction costs the same on old text.

R's rows and C's columns are the base weight's own, so both K-FAC factors of what the model knows
are ``[m, m]`` in their span, of tensors the layer has at hand:

    z = x Rᵀ            Σ = E[z zᵀ]       x: the layer's inputs on old text
    h = Cᵀ ∂ℓ/∂y        Γ = E[h hᵀ]       labels sampled from the model: the true Fisher
    S = (Σ + λ tr Σ/m)^−½     L = (Γ + λ tr Γ/m)^−½     U = κ L Ũ S,   Ũ trained, 0 at first

To second order, and as far as K-FAC's product of Γ and Σ is the Fisher matrix, a change U of one
layer costs ``½ tr(Γ U Σ Uᵀ)`` on old text, and κ of a layer makes that ``½ c² ‖Ũ‖²`` with one c for
the model (λ aside, in the mean over directions): every direction of Ũ the same, in every layer. So
weight decay on Ũ is a penalty against leaving old knowledge, see
:class:`secura.continual.AnchorDecayCallback`. c is such that a step moves the layers' weights as
far as one on U does, in their geometric mean (:mod:`secura.whitening`).

Each set of texts counts the same: Σ and Γ are divided by their mean eigenvalue before they are
added up. ``κ L`` and S are kept (2 m² numbers a layer), from which both sums follow.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cabr import CABR
from .config import check_damping
from .curvature import curvature
from .layers import active_adapters, evaluating
from .sharding import gathered, processes, reshard, unit_by_unit
from .texts import BATCH_SIZE, LENGTH, TOKENS, Texts, listed
from .whitening import Roots, roots_of, scales, sums_of


@dataclass(frozen=True)
class AnchorReport:
    """Say what an anchoring pass did.

    Attributes:
        layers: adapted layers that were anchored.
        tokens: of old text that were read, over all processes.
        seconds: how long the pass took, sampling included.
        sampled: whether the model wrote the text itself.
        unseen: names of layers that no token or no gradient reached (an expert, say): their core
            moves as an unanchored one does, and what is added later is all that it is anchored by.
    """

    layers: int
    tokens: int
    seconds: float
    sampled: bool
    unseen: tuple[str, ...] = ()


def anchor(
    model: nn.Module,
    texts: Texts | None = None,
    *,
    tokenizer: Any = None,
    damping: float | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    add: bool = False,
) -> AnchorReport:
    """Anchor the active adapters' cores ``U [m, m]`` by old text, before they are trained.

    One pass forward and backward over at most ``tokens`` tokens. What the model computes stays as
    it is, up to fp32's rounding: where U is not 0, Ũ is solved for. Call it before the optimizer,
    or an average of weights, is made. Every active adapter with such a core is anchored anew.

    Example:
        >>> model = get_peft_model(base, SecuraConfig(core="u", norm="none"))
        >>> secura.anchor(model, tokenizer=tokenizer)  # by the model's own samples

    Args:
        model: a PEFT model or any other that holds :class:`secura.SECURALinear`, with a forward
            that takes ``input_ids [B, T]`` and gives an object with ``logits [B, T, V]``. Under DDP
            or FSDP2 every process calls this, with the same arguments: each reads its share.
        texts: what the model is to keep: strings (one alone is one text), or token ids, a list or
            1-D tensor a text. None samples from the model itself, from its start token.
        tokenizer: for texts that are strings; also asked for the start token.
        damping: λ; None takes the config's ``anchor_damping`` (1e-2).
        tokens: how many to read at most; where the model writes them, every process writes one text
            or more. The first ``length`` tokens of every text come first, then the next of every
            text.
        length: tokens of a piece, within what the model reads at once; texts are cut into such.
        batch_size: pieces read at once.
        seed: of the sampled texts and labels; torch's own random state is left alone.
        add: whether the statistics of the anchor that is there count too, as they do at the end
            of a task; the damping of each is kept beside it.

    Returns:
        What was read and anchored, an :class:`AnchorReport`.

    Raises:
        ValueError: no adapter to anchor, no text, a text of fewer than two tokens or with ids that
            the model does not know, a mapping or a file's name as texts, strings without a
            tokenizer, a model that takes no ``input_ids``, gives one number or cannot sample, a U
            of 16 bits that is not 0, or statistics that are not finite; adapters are left as they
            were then, every one.
        RuntimeError: while an adapter is merged or disabled, or U is made of other tensors, or
            under ``torch.inference_mode()``.
    """
    start = time.perf_counter()
    adapters = u_adapters(model)
    check_anchorable(adapters)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("an anchor takes a backward pass: leave torch.inference_mode() for it")
    if any(getattr(layer, "disable_adapters", False) for _, layer in adapters.values()):
        raise RuntimeError("the adapters are disabled: enable them to anchor them")
    given = None if texts is None else listed(texts)
    check_reading(given, tokenizer, tokens=tokens, length=length, batch_size=batch_size)
    if damping is not None:
        check_damping("damping", damping)
    with _still(model, adapters):
        sums, read = curvature(
            model,
            adapters,
            given,
            tokenizer,
            tokens=tokens,
            length=length,
            batch_size=batch_size,
            seed=seed,
        )
    unseen = tuple(name for name, one in sums.items() if not one.seen)
    names = {adapter: name for name, (adapter, _) in adapters.items()}
    before = {adapter: sums_of(adapter) if add else None for adapter in names}
    known = {adapter: name for adapter, name in names.items() if before[adapter] is not None}
    alone = [name for name in unseen if name not in known.values()]
    if alone and processes()[0] == 0:
        warnings.warn(
            f"{len(alone)} of {len(sums)} layers saw none of the old text ({alone[0]} first: an "
            "expert, or a tower that reads images or sound), so nothing holds them to what they "
            "know: give texts that reach them, or leave them out with exclude_modules",
            stacklevel=2,
        )
    for name in names.values():
        if not all(bool(torch.isfinite(one).all()) for one in sums[name]):
            raise ValueError(
                f"{name}: the statistics of old text hold NaN or inf: nothing was anchored; load "
                "the model in fp32 or bf16"
            )
    dampings = {
        adapter: adapter.config.anchor_damping if damping is None else float(damping)
        for adapter in names
    }
    roots = {
        adapter: roots_of(sums[name], dampings[adapter], before[adapter])
        for adapter, name in names.items()
    }
    kappa = scales(roots)
    made = {
        adapter: (*_solve(adapter, kappa[adapter], roots[adapter]), dampings[adapter])
        for group in unit_by_unit(model, names)
        for adapter in group
    }
    for group in unit_by_unit(model, made):
        for adapter in group:
            adapter.set_anchor(*made[adapter])
    kept = len(unseen) - len(alone)
    seconds = time.perf_counter() - start
    return AnchorReport(len(made) - kept, read, seconds, texts is None, unseen)


@torch.no_grad()
def unanchor(model: nn.Module) -> int:
    """Put ``U = κ L Ũ S`` in the place of Ũ and drop L and S; what is computed stays as it is.

    The adapter's file is then about half as large. It can be trained on, in plain coordinates.

    Args:
        model: as for :func:`anchor`; its active adapters are looked at.

    Returns:
        How many layers had an anchor.

    Raises:
        ValueError: the model has no active adapter with ``core="u"``.
        RuntimeError: one is merged, or its U is made of other tensors.
    """
    found = [one for one, _ in u_adapters(model).values() if one.left is not None]
    for group in unit_by_unit(model, found):
        for adapter in group:
            adapter.drop_anchor()
    return len(found)


def u_adapters(model: nn.Module) -> dict[str, tuple[CABR, Any]]:
    """The active adapters with ``core="u"`` and the layers they are on, by the adapters' names.

    Raises:
        ValueError: there is none.
        RuntimeError: one is merged, or its U is made of other tensors.
    """
    active = active_adapters(model).items()
    found = {name: pair for name, pair in active if pair[0].config.core == "u"}
    if not found:
        raise ValueError(
            "the model has no active adapter with core='u': only that core is anchored, so make "
            "the adapter with SecuraConfig(core='u')"
        )
    if any(layer.merged for _, layer in found.values()):
        raise RuntimeError("an adapter is merged into the base weight: unmerge it first")
    for adapter, _ in found.values():
        adapter.check_written()
    return found


def check_anchorable(adapters: dict[str, tuple[CABR, Any]]) -> None:
    """Raise ``ValueError`` where one of :func:`u_adapters` is on experts."""
    for name, (adapter, _) in adapters.items():
        if adapter.rows.dim() > 1:
            raise ValueError(
                f"{name}: experts cannot be anchored, for an anchor is measured at a layer's own "
                "output: leave target_parameters out, or train without an anchor"
            )


def check_reading(
    texts: list[Any] | None, tokenizer: Any, *, tokens: int, length: int, batch_size: int
) -> None:
    """Raise ``ValueError`` for a number out of range, or strings without a tokenizer."""
    for name, value, least in (
        ("tokens", tokens, 2),
        ("length", length, 2),
        ("batch_size", batch_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    if tokenizer is None and any(isinstance(text, str) for text in texts or ()):
        raise ValueError("texts are strings: give the tokenizer, or token ids")


@contextmanager
def _still(model: nn.Module, adapters: dict[str, tuple[CABR, Any]]) -> Iterator[None]:
    """Eval mode, with gradients through the cores, none of them held; all as before after."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    cores: list[Any] = [one.U for one, _ in adapters.values()]
    frozen = [core for core in cores if not core.requires_grad]
    held = [(part, part.held) for part in model.modules() if isinstance(part, CABR)]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for core in frozen:
            core.requires_grad_(True)
        for part, _ in held:
            part.held = None
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for core in frozen:
            core.requires_grad_(False)
        for part, before in held:
            part.held = before
        for parameter, gradient in gradients:
            parameter.grad = gradient
        reshard(model)


def _solve(adapter: CABR, kappa: float, roots: Roots) -> tuple[Tensor, Tensor, Tensor]:
    """``(κ L, S, Ũ)`` of one layer, ``[m, m]`` each; Ũ computes what U did."""
    left, right = kappa * roots.left, roots.right
    u = gathered(adapter.U).detach().double()
    if adapter.left is not None and adapter.right is not None:
        u = adapter.left.double() @ u @ adapter.right.double()
    if bool(u.any()):
        check_precision(adapter.name, adapter)
        u = torch.linalg.solve(left, torch.linalg.solve(right, u.t()).t())
    for tensor in (left, right, u):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{adapter.name}: the anchor would hold NaN or inf: nothing was "
                "anchored; try a larger damping"
            )
    return left.float(), right.float(), u


def check_precision(name: str, adapter: CABR) -> None:
    """Raise ``ValueError`` where U is in 16 bits, whose rounding new coordinates would enlarge."""
    assert adapter.U is not None
    if adapter.U.dtype.itemsize < 4:
        raise ValueError(
            f"{name}: U is in {str(adapter.U.dtype).removeprefix('torch.')}, whose rounding would "
            "change what the model computes by percents in an anchor's coordinates: fold what was "
            "learned first, secura.fold(model), or train U in fp32"
        )


__all__ = [
    "AnchorReport",
    "anchor",
    "check_anchorable",
    "check_precision",
    "check_reading",
    "u_adapters",
    "unanchor",
]
