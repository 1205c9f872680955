"""Making SECURA known to PEFT, by PEFT's own registry."""

from __future__ import annotations

from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "SECURA"


def peft_type() -> PeftType:
    """The member ``PeftType.SECURA``, added on first use.

    PEFT and transformers look methods up by enum member, and a plain string breaks transformers'
    adapter loader; an enum has no public way to gain a member.
    """
    if NAME not in PeftType._member_map_:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member._sort_order_ = len(PeftType._member_names_)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)


def register(config_cls: Any, model_cls: Any) -> None:
    """Register the method with PEFT, once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )


__all__ = ["peft_type", "register"]
