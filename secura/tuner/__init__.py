"""SECURA as a PEFT method: importing this package registers it."""

from __future__ import annotations

from secura._extras import require

require("peft", "train")

from .config import SecuraConfig  # noqa: E402
from .layer import SecuraLayer  # noqa: E402
from .loading import from_pretrained  # noqa: E402
from .model import SecuraModel  # noqa: E402
from .registration import register  # noqa: E402
from .unmatched import UnmatchedWarning  # noqa: E402

register(SecuraConfig, SecuraModel)

__all__ = ["SecuraConfig", "SecuraLayer", "SecuraModel", "UnmatchedWarning", "from_pretrained"]
