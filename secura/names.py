"""Names of modules and tensors in a PEFT model and in its adapter file."""

from __future__ import annotations

PREFIX = "base_model.model."
"""Before a name of the model that PEFT was given."""

INNER = ".secura_adapter."
"""Between the name of an adapted layer and that of one of its adapter's tensors."""


def without_wrappers(name: str) -> str:
    """A module's or tensor's name without what ``torch.compile`` and FSDP1 add to it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def bare(name: str) -> str:
    """A name as it is in the model that PEFT was given."""
    return without_wrappers(name).removeprefix(PREFIX)


def is_own(name: str) -> bool:
    """Whether a tensor of that name is a SECURA adapter's."""
    return INNER in f".{name}"


__all__ = ["INNER", "PREFIX", "bare", "is_own", "without_wrappers"]
