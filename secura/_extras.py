"""Import an optional package, or say which extra installs it."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package that one of SECURA's extras brings is not installed."""


def how_to_install(extra: str) -> str:
    """How to get an extra of the distribution, which is on no package index."""
    return f"pip install '.[{extra}]' in a clone of secura"


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module: dotted name of the module, such as `"peft"` or `"peft.tuners"`.
        extra: the extra of the distribution that brings it, such as `"train"`.

    Returns:
        The module itself (`peft.tuners`, not `peft`).

    Raises:
        MissingExtraError: the package is not installed; says how to install it. An import that
            fails inside an installed package is raised as it is.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{package} is not installed; get it with: {how_to_install(extra)}",
            name=error.name,
        ) from error


__all__ = ["MissingExtraError", "how_to_install", "require"]
