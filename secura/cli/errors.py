"""What a user can get wrong, told in one line."""

from __future__ import annotations

from safetensors import SafetensorError

from secura._extras import MissingExtraError, how_to_install


class UserError(Exception):
    """Bad input to a command: the message says what is wrong and what to do."""


# Core and libraries report bad input as these. Anything else is a defect and keeps its traceback.
# An ImportError is a package that a flag such as `--optim adamw_8bit` needs, a SafetensorError most
# often a full disk.
USER_ERRORS = (
    *(UserError, MissingExtraError, ImportError, ValueError, OSError, RuntimeError),
    SafetensorError,
)

EXTRAS = {"bitsandbytes": "quant", "matplotlib": "bench", "gguf": "bench"}
"""Extras of SECURA's by the package whose absence a library reports in its own words."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line; its type's name where it has none.

    A package that is missing is named with the extra that brings it.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError) and not isinstance(error, MissingExtraError):
        extra = next((extra for package, extra in EXTRAS.items() if package in text), None)
        return text + (f" ({how_to_install(extra)})" if extra else "")
    return text


__all__ = ["USER_ERRORS", "UserError", "one_line"]
