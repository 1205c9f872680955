"""SECURA: fine-tuning with a CUR adapter and a norm that halves small changes.

Names are loaded when first used: ``SecuraConfig``, ``SecuraModel``, the callbacks, ``export_lora``
and ``from_pretrained`` load PEFT and transformers, the others need torch and safetensors alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accumulation import accumulate
    from .anchoring import AnchorReport, anchor, unanchor
    from .callbacks import AccumulateCallback, FoldCallback
    from .config import AdapterConfig
    from .export import export_lora
    from .folding import fold
    from .linear import SECURALinear
    from .rates import learning_rate
    from .tuner import SecuraConfig, SecuraModel, from_pretrained

__version__ = "0.1.0"

_LAZY = {
    "AccumulateCallback": "secura.callbacks",
    "AdapterConfig": "secura.config",
    "AnchorReport": "secura.anchoring",
    "FoldCallback": "secura.callbacks",
    "SECURALinear": "secura.linear",
    "SecuraConfig": "secura.tuner",
    "SecuraModel": "secura.tuner",
    "accumulate": "secura.accumulation",
    "anchor": "secura.anchoring",
    "export_lora": "secura.export",
    "fold": "secura.folding",
    "from_pretrained": "secura.tuner",
    "learning_rate": "secura.rates",
    "unanchor": "secura.anchoring",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'secura' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


__all__ = [
    "AccumulateCallback",
    "AdapterConfig",
    "AnchorReport",
    "FoldCallback",
    "SECURALinear",
    "SecuraConfig",
    "SecuraModel",
    "accumulate",
    "anchor",
    "export_lora",
    "fold",
    "from_pretrained",
    "learning_rate",
    "unanchor",
]
