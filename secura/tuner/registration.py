"""Making SECURA known to PEFT, by PEFT's own registry."""

from __future__ import annotations

from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "SECURA"
CALLED_BY_PEFT = (
    *("_create_and_replace", "_replace_module", "_unload_and_optionally_merge"),
    "_get_adapter_state_dict",
    *("_remap_adapter_state_dict_for_load", "_remove_adapter_name_from_key"),
)
"""Methods of a tuner that PEFT calls, and in which ours checks and warns of what PEFT does not."""


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
    """Register the method with PEFT, once.

    Raises:
        ImportError: PEFT's tuners lack a method in which files are checked, so it would never be
            called: PEFT is older than 0.21, or much newer than this package.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    lacking = [name for name in CALLED_BY_PEFT if not hasattr(BaseTuner, name)]
    if lacking:
        raise ImportError(
            f"PEFT {peft.__version__} does not fit: its tuners have no {lacking[0]}, in which "
            "SECURA checks what is loaded or saved; install peft>=0.21, in a version that this "
            "one of secura knows"
        )
    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )


__all__ = ["CALLED_BY_PEFT", "peft_type", "register"]
