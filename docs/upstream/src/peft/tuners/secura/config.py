# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

from peft.config import PeftConfig
from peft.utils import PeftType


@dataclass
class SecuraConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`SecuraModel`].

    Args:
        r (`int`):
            The CUR rank: how many rows and columns of the frozen weight span the change. It must not exceed the
            smaller side of any targeted weight.
        core (`Literal["ab", "u"]`):
            What is trained of the core `U` (`r` x `r`) of the change `C @ U @ R`. `"ab"` trains the factors of
            `U = A @ B`, as in the paper; `"u"` trains `U` itself.
        inner_r (`Optional[int]`):
            The inner rank of `A` and `B`, at most the in_features of any targeted layer. If not set, it is `2 * r`, or
            in_features where that is less. Only with `core="ab"`.
        scaling (`float`):
            The factor of the change.
        norm (`Literal["none", "channel"]`):
            `"none"` applies the change as it is. `"channel"` divides each output channel's change by a gain in [1, 2]:
            2 where the channel's weight has not changed yet, close to 1 where the change is as large as the weight.
        norm_scale (`float`):
            How fast the gain falls with the relative change. Only with `norm="channel"`.
        secura_dropout (`float`):
            The dropout probability of the inputs of the core.
        target_modules (`Optional[Union[List[str], str]]`):
            The names of the modules to apply the adapter to. If this is specified, only the modules with the specified
            names will be replaced. When passing a string, a regex match will be performed. When passing a list of
            strings, either an exact match will be performed or it is checked if the name of the module ends with any
            of the passed strings. If this is specified as 'all-linear', then all linear modules are chosen, excluding
            the output layer. If this is not specified, modules will be chosen according to the model architecture. If
            the architecture is not known, an error will be raised -- in this case, you should specify the target
            modules manually.
        exclude_modules (`Optional[Union[List[str], str]]`):
            The names of the modules to not apply the adapter. When passing a string, a regex match will be performed.
            When passing a list of strings, either an exact match will be performed or it is checked if the name of the
            module ends with any of the passed strings.
        rank_pattern (`dict`):
            The mapping from layer names or regular expressions to ranks which are different from `r`. For example,
            `{'^model.decoder.layers.0.encoder_attn.k_proj': 16}`.
        init_weights (`bool`):
            Whether the adapter starts without effect (`B`, or `U`, is zero). Don't change this setting, except if you
            know exactly what you're doing.
        layers_to_transform (`Union[List[int], int]`):
            The layer indices to transform. If a list of ints is passed, it will apply the adapter to the layer indices
            that are specified in this list. If a single integer is passed, it will apply the transformations on the
            layer at this index.
        layers_pattern (`Optional[Union[List[str], str]]`):
            The layer pattern name, used only if `layers_to_transform` is different from `None`.
        modules_to_save (`List[str]`):
            List of modules apart from adapter layers to be set as trainable and saved in the final checkpoint.
    """

    r: int = field(default=64, metadata={"help": "CUR rank: rows and columns of the weight that span the change."})
    core: Literal["ab", "u"] = field(
        default="ab",
        metadata={"help": "What of the core U is trained: 'ab' the factors of U = A @ B, 'u' U itself."},
    )
    inner_r: Optional[int] = field(
        default=None, metadata={"help": "Inner rank of A and B; None means 2 * r. Only with core='ab'."}
    )
    scaling: float = field(default=1.0, metadata={"help": "Factor of the change."})
    norm: Literal["none", "channel"] = field(
        default="channel",
        metadata={"help": "'channel' divides each output channel's change by a gain in [1, 2]; 'none' does not."},
    )
    norm_scale: float = field(
        default=6.0, metadata={"help": "How fast the gain falls with the relative change. Only with norm='channel'."}
    )
    secura_dropout: float = field(default=0.0, metadata={"help": "Dropout of the inputs of the core."})
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "List of module names or regex expression of the module names to replace with SECURA.",
            "example": "For example, ['q', 'v'] or '.*decoder.*(SelfAttention|EncDecAttention).*(q|v)$' ",
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "List of module names or regex expression of the module names to exclude from SECURA."},
    )
    rank_pattern: Optional[dict] = field(
        default_factory=dict,
        metadata={"help": "Mapping from layer names or regular expressions to ranks different from `r`."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": (
                "Whether the adapter starts without effect. Don't change this setting, except if you know exactly "
                "what you're doing."
            )
        },
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "The layer indexes to transform; None means all of them."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "The layer pattern name, used only if `layers_to_transform` is set."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "List of modules apart from SECURA layers to be set as trainable and saved in the final checkpoint."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SECURA
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        )
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

        if self.core not in ("ab", "u"):
            raise ValueError(f"`core` must be 'ab' or 'u' but is {self.core!r}")
        if self.core == "u" and self.inner_r is not None:
            raise ValueError("`inner_r` is the inner rank of A and B, which `core='u'` does not have.")
        if self.norm not in ("none", "channel"):
            raise ValueError(f"`norm` must be 'none' or 'channel' but is {self.norm!r}")
        if self.norm_scale <= 0:
            raise ValueError(f"`norm_scale` must be above 0 but is {self.norm_scale}")
