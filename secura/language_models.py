"""What a model tells of itself as a language model: its kind, positions and special tokens."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_MEDIA = ("image", "video", "audio")
_READS = "an anchor is for models that take input_ids alone and give logits"


def is_causal(model: Any) -> bool:
    """Whether a model writes from left to right: no encoder-decoder, no masked language model."""
    auto: Any = sys.modules.get("transformers.models.auto.modeling_auto")
    masked = getattr(auto, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {}).values()
    pairs = getattr(_config(model), "is_encoder_decoder", False)
    return not pairs and class_name(model) not in masked


def class_name(model: Any) -> str:
    """The name of the model's class, beneath PEFT's."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def positions(model: Any) -> int:
    """How many tokens the model's positions allow at once."""
    limit = getattr(_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else 1 << 30


def _config(model: Any) -> Any:
    """The configuration of the language model in ``model``, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary(model: Any) -> int | None:
    """How many token ids the model's config says it knows, or None."""
    return getattr(_config(model), "vocab_size", None)


def token_ids(model: Any, tokenizer: Any, kind: str) -> list[int]:
    """The ids that tokenizer and model give a ``"bos"``, ``"eos"`` or ``"pad"``."""
    owners = (tokenizer, _config(model))
    found: list[Any] = [getattr(owner, f"{kind}_token_id", None) for owner in owners]
    flat = (one if isinstance(one, list) else [one] for one in found)
    return [int(token) for one in flat for token in one if token is not None]


def placeholders(model: Any) -> list[int]:
    """The ids that stand in texts where images, videos and sound go, which are no text."""
    config = getattr(model, "config", None)
    names = (f"{kind}_token_{what}" for kind in _MEDIA for what in ("id", "index"))
    found = [getattr(config, name, None) for name in names]
    return [token for token in found if type(token) is int and token >= 0]


@torch.no_grad()
def check_reads(model: Any) -> None:
    """Raise ``ValueError`` where a model, in eval mode, cannot read two tokens of ``input_ids``."""
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    try:
        out = model(input_ids=ids)
    except Exception as error:  # whatever a forward of another kind says
        reads = getattr(model, "main_input_name", "input_ids")
        says = f"says {error}" if reads == "input_ids" else f"reads {reads}"
        raise ValueError(f"{_READS}: {class_name(model)} {says}") from error
    if not isinstance(getattr(out, "logits", None), Tensor):
        raise ValueError(
            f"{_READS}: {class_name(model)} gives a {type(out).__name__} without "
            "(return_dict=False in its config, or a model without a head)"
        )
    if out.logits.shape[-1] < 2:
        raise ValueError(
            f"{_READS}: {class_name(model)} gives one number, a reward or a regression, of which "
            "no label can be drawn"
        )


__all__ = [
    "check_reads",
    "class_name",
    "is_causal",
    "placeholders",
    "positions",
    "token_ids",
    "vocabulary",
]
