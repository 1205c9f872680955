"""SECURA: fine-tuning with a CUR adapter and a norm that holds important weights back.

``SecuraConfig``, ``SecuraModel`` and ``FoldCallback`` load PEFT and transformers when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import AdapterConfig
from .folding import fold
from .linear import SECURALinear

if TYPE_CHECKING:
    from .callbacks import FoldCallback
    from .tuner import SecuraConfig, SecuraModel

__version__ = "0.1.0"

_LAZY = {
    "FoldCallback": "secura.callbacks",
    "SecuraConfig": "secura.tuner",
    "SecuraModel": "secura.tuner",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'secura' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "AdapterConfig",
    "FoldCallback",
    "SECURALinear",
    "SecuraConfig",
    "SecuraModel",
    "fold",
]
