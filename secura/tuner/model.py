"""``SecuraModel``: the PEFT tuner that puts :class:`SecuraLayer` in the place of linear layers."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from secura import bases
from secura.adapter import CABR

from .config import SecuraConfig
from .layer import SecuraLayer


class SecuraModel(BaseTuner):
    """A model whose targeted linear layers carry SECURA adapters.

    Made by ``get_peft_model(model, SecuraConfig(...))``; arXiv 2502.18168.

    Args:
        model: the base model, changed in place.
        config: the settings.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create A and B on the meta device, to be filled by loading.
    """

    prefix: str = "secura_"
    tuner_layer_cls = SecuraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_before_loading)

    def _create_and_replace(
        self,
        peft_config: SecuraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        pattern = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        rank = peft_config.rank_pattern.get(pattern, peft_config.r)
        try:
            if isinstance(target, SecuraLayer):
                target.update_layer(adapter_name, peft_config, rank)
                return
            bases.check_linear(target)
            layer = SecuraLayer(target, adapter_name, peft_config, rank)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        """Refuse before the first layer is written, so that no model is left half merged."""
        super()._check_merge_allowed()
        model = cast(nn.Module, self.model)
        for name, module in model.named_modules():
            if not isinstance(module, SecuraLayer):
                continue
            if module.merged:
                raise RuntimeError(
                    f"{name}: adapters {module.merged_adapters} are merged already: "
                    "unmerge_adapter() first, or unload() to keep the merged weights"
                )
            if bases.dense_weight(module.get_base_layer()) is None:
                raise ValueError(
                    f"{name} holds a quantised weight: load the model in full precision to merge"
                )
            for adapter in module._active():
                config = adapter.config
                if config.norm == "activation" and not config.allow_inexact_merge:
                    raise ValueError(
                        "norm='activation' is not linear in x, so no merged weight is exact: keep "
                        "the adapter, or merge W + ΔW as the released code does by setting "
                        "allow_inexact_merge=True in its config"
                    )
                if not all(bool(value.isfinite().all()) for value in adapter.parameters()):
                    raise ValueError(f"{name}: the adapter holds NaN or inf: training diverged")

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the active adapters into the base weights, all or none.

        Raises:
            RuntimeError: when merged already.
            ValueError: see :meth:`SecuraLayer.merge`.
        """
        self._check_merge_allowed()
        super().merge_adapter(adapter_names, safe_merge)


def _check_before_loading(module: SecuraModel, state_dict: Any, prefix: str, *_: Any) -> None:
    for name, adapter in module.named_modules():
        if isinstance(adapter, CABR):
            adapter.check_loadable(state_dict, f"{prefix}{name}.")


__all__ = ["SecuraModel"]
