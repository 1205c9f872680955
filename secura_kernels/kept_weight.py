"""Whether the W' that a forward pass makes is kept for its backward pass, or rebuilt there."""

from __future__ import annotations

import os

import torch

KEEPS = ("auto", "always", "never")


def keeps_weight(watched: bool = False) -> bool:
    """Whether a W' that a forward makes is kept for its backward pass, N K elements a layer.

    ``SECURA_KEEP_WEIGHT`` says ``always`` or ``never``. ``auto``, which it is where nothing is set,
    keeps it under checkpointing (:func:`checkpointing`): held there from the recomputation until
    the backward pass has come through the checkpointed part.

    Args:
        watched: under torch.compile or a dispatch mode: ``auto`` then keeps nothing, and a compiler
            is shown nothing kept.

    Raises:
        ValueError: for anything else that the variable says.
    """
    said = os.environ.get("SECURA_KEEP_WEIGHT", "auto")
    if said not in KEEPS:
        raise ValueError(f"unknown SECURA_KEEP_WEIGHT={said!r}: choose one of {KEEPS}")
    if said != "auto":
        return said == "always" and not (watched and torch.compiler.is_compiling())
    return not watched and bool(checkpointing())


def holds_weight() -> bool:
    """Whether a W' that is kept is held over the micro-batches of a step too: with ``always``."""
    return os.environ.get("SECURA_KEEP_WEIGHT") == "always"


def checkpointing() -> str:
    """How ``torch.utils.checkpoint`` is at work, ``""`` if not: what is saved is soon used.

    ``"hooked"``, not re-entering: both its passes run under its hooks and must save tensors of the
    same shapes. ``"again"``, re-entering: the second pass, within a backward pass; the first saves
    nothing and is like any without gradient.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":
        return "hooked"
    return "again" if torch._C._current_graph_task_id() != -1 else ""


def foresees_kept() -> bool:
    """Return whether the choice of a forward pass's way may count on a W' that will be kept.

    Not in the second pass of re-entrant checkpointing: the first could not, and both must give the
    same bits.
    """
    return holds_weight() or checkpointing() != "again"


__all__ = ["checkpointing", "foresees_kept", "holds_weight", "keeps_weight"]
