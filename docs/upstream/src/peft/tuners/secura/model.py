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

import torch

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_SECURA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key

from .config import SecuraConfig
from .layer import SecuraLayer, SecuraLinear


class SecuraModel(BaseTuner):
    """
    Creates a SECURA model from a pretrained transformers model.

    The method is described in https://huggingface.co/papers/2502.18168.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`SecuraConfig`]): The configuration of the SECURA model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The SECURA model.

    Example:
        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import SecuraConfig, get_peft_model

        >>> base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        >>> model = get_peft_model(base_model, SecuraConfig(r=64, target_modules="all-linear"))
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`SecuraConfig`]): The configuration of the SECURA model.
    """

    prefix: str = "secura_"
    tuner_layer_cls = SecuraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_SECURA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        secura_config: SecuraConfig,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")

        r_key = get_pattern_key(secura_config.rank_pattern.keys(), current_key)
        r = secura_config.rank_pattern.get(r_key, secura_config.r)

        if isinstance(target, SecuraLinear):
            target.update_layer(adapter_name, r, config=secura_config)
        else:
            new_module = self._create_new_module(secura_config, adapter_name, target, r=r)
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(secura_config: SecuraConfig, adapter_name: str, target: torch.nn.Module, r: int):
        if isinstance(target, BaseTunerLayer):
            target_base_layer = target.get_base_layer()
        else:
            target_base_layer = target

        # the quantized layers of bitsandbytes are subclasses of nn.Linear, but their weight is packed
        if not isinstance(target_base_layer, torch.nn.Linear) or not target_base_layer.weight.is_floating_point():
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` that is not quantized is "
                "supported."
            )
        return SecuraLinear(target, adapter_name, config=secura_config, r=r)
