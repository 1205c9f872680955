"""axolotl: ``adapter: secura``, with the adapter's settings in a block of that name."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel
from torch import nn

import secura

NAME = "secura"

_TAKEN = {
    "lora_modules_to_save": "modules_to_save",
    "peft_trainable_token_indices": "trainable_token_indices",
}
"""axolotl's own keys that the adapter takes, by its settings: those that new tokens ask for."""


class SecuraArgs(BaseModel):
    """The plugin's part of an axolotl configuration.

    Args:
        secura: settings of :class:`secura.SecuraConfig`, by name.
    """

    secura: dict[str, Any] | None = None


class SecuraPlugin(BasePlugin):
    """Trains, resumes and merges SECURA adapters, and folds them as their ``fold_every`` says.

    Example:
        plugins: [secura.integrations.axolotl.SecuraPlugin]
        adapter: secura
        secura: {r: 64, norm: channel, target_modules: all-linear}
    """

    def get_input_args(self) -> str:
        """Where axolotl finds the fields that the plugin adds to its configuration."""
        return f"{__name__}.{SecuraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """One adapter, which axolotl is not to load as a LoRA."""
        return [AdapterCapabilities(name=NAME)]

    def register(self, cfg: dict) -> None:
        """Check the settings, and merge by PEFT: axolotl's merge of single files knows LoRA alone.

        Raises:
            TypeError: for a setting that there is not.
            ValueError: for one out of range, ``merge_method: memory_efficient``, or a key of LoRA's
                or of quantisation, which would do nothing.
        """
        if cfg.get("adapter") != NAME:
            if cfg.get(NAME):
                raise ValueError(f"the block {NAME}: is read with adapter: {NAME} alone")
            return
        secura.SecuraConfig(**(cfg.get(NAME) or {}))
        unread = [
            key
            for key, value in cfg.items()
            if key.startswith(("lora_", "peft_")) and value
            if key not in _TAKEN and key != "lora_model_dir"
        ]
        if unread:
            raise ValueError(
                f"{', '.join(unread)}: adapter: {NAME} does not read them; take them out, and give "
                f"r, target_modules and the like in the block {NAME}:"
            )
        if quantised := [key for key in ("load_in_4bit", "load_in_8bit") if cfg.get(key)]:
            raise ValueError(
                f"{quantised[0]}: axolotl quantises for adapter: lora and qlora alone, and would "
                "load the model whole; take it out, or give a base_model that is saved quantised"
            )
        if cfg.get("merge_method") not in (None, "legacy"):
            raise ValueError(f"merge_method: {cfg['merge_method']} merges LoRA alone: take legacy")
        cfg["merge_method"] = "legacy"

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, secura.SecuraConfig] | None:
        """Put a new adapter on the model, or the one saved in ``lora_model_dir``.

        Args:
            model: the base model.
            cfg: axolotl's configuration.
            inference: leave a saved adapter frozen.
            config_only: for TRL's trainers, which put the adapter on by themselves.

        Returns:
            The model (None with ``config_only``) and the adapter's settings; None for an adapter
            that is not SECURA's.

        Raises:
            ValueError: for ``lora_model_dir`` with ``config_only``: TRL would start anew.
        """
        if cfg.adapter != NAME:
            return None
        own = {of: getattr(cfg, key, None) for key, of in _TAKEN.items()}
        config = secura.SecuraConfig(**(own | {"task_type": _task(model)} | (cfg.secura or {})))
        if config_only and cfg.lora_model_dir:
            raise ValueError(
                f"lora_model_dir: {cfg.lora_model_dir}: TRL is given settings, and its adapter "
                "would start anew; merge the saved one first, and give the merged model"
            )
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            saved = secura.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return saved, saved.peft_config["default"]
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[secura.FoldCallback]:
        """The callback that folds, which does nothing where ``fold_every`` is 0."""
        return [secura.FoldCallback()] if cfg.adapter == NAME else []


def _task(model: nn.Module | None) -> str:
    """PEFT's ``task_type`` by the kind of model, as axolotl's LoRA has it."""
    kinds = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    name = type(model).__name__
    return next((task for kind, task in kinds.items() if kind in name), "CAUSAL_LM")


__all__ = ["SecuraArgs", "SecuraPlugin"]
