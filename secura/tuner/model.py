"""``SecuraModel``: the PEFT tuner that puts :class:`SecuraLayer` in the place of linear layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from secura import bases, products
from secura.cabr import CABR
from secura.layers import layers_with
from secura.names import INNER, is_own, without_wrappers
from secura_kernels.cur import RankError

from . import saved
from .config import SecuraConfig
from .experts import ParamWrapper, check_nesting
from .layer import SecuraLayer, SecuraLinear
from .overlooked import leave_out_read, refuse_overlooked, refuse_unheeded, warn_of_experts
from .several import BASE, REFERENCE
from .unmatched import unmatched_layers, unmatched_names, warn_unmatched

_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads by task, which PEFT adds to ``modules_to_save`` after the adapter was put on the model."""


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

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put the adapter on every targeted layer, or on none where one of them refuses it.

        Settings that name nothing of the model are told by an :class:`UnmatchedWarning` each.

        Raises:
            ValueError: for a rank that does not fit, a weight that cannot be decomposed, a target
                that PEFT would pass over, or a name that no adapter can have.
            TypeError: for a target that is no linear layer.
        """
        _check_name(adapter_name)
        given = self.peft_config[adapter_name]
        own = self.peft_config[adapter_name] = copy.copy(given)  # anchoring writes to it
        if own.modules_to_save is None and own.task_type in _HEADS:
            own.modules_to_save = [*_HEADS[own.task_type]]
        config = copy.copy(given)  # as given: PEFT fills in its targets
        refuse_overlooked(model, config)
        leave_out_read(model, own)
        warn_unmatched(unmatched_names(model, config))
        before = {layer: dict(layer.secura_adapter) for _, layer in _secura_layers(model)}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            check_nesting(model)
        except BaseException:  # an interrupt too
            if not any(adapter_name in adapters for adapters in before.values()):
                self.peft_config.pop(adapter_name)
            for name, layer in reversed(_secura_layers(model)):  # wrappers from within
                if layer in before:
                    layer.secura_adapter = nn.ModuleDict(before[layer])
                else:
                    model.set_submodule(name, layer.base_layer)
            raise
        warn_unmatched(unmatched_layers(model, config, adapter_name))
        warn_of_experts(model, config)
        copied = [name for name, own in self.peft_config.items() if own is given]
        if adapter_name == REFERENCE and copied:  # TRL copies parameters alone
            for _, layer in _secura_layers(model):
                both = layer.adapters_named([copied[0], adapter_name])
                if len(both) == 2:
                    both[1].take_fixed(both[0])

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any
    ) -> Any:
        return saved.for_loading(
            model,
            config,
            adapter_name,
            state_dict,
            super()._remap_adapter_state_dict_for_load,
        )

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        # copies, of which the checksums are made too: another thread may be training
        found = {n: t.clone() if is_own(n) else t for n, t in found.items()}
        config.id2label = saved.named_labels(model)
        layers = layers_with(model, adapter_name)
        for name, layer in layers.items():
            layer.renew_saved(found, f"{name}{INNER}{adapter_name}.", adapter_name)
        saved.warn_of_unsaved(model, config, adapter_name, layers, found)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_wrappers(super()._remove_adapter_name_from_key(key, adapter_name))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For one forward or generation, hand ``adapter_names`` to every layer that asks for them.

        They are one adapter name a row of the batch, ``"__base__"`` for none.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else self.model
        # a model without an encoder gives itself; an encoder sees the rows before they are repeated
        encoding = set() if encoder is self.model else set(encoder.modules())
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        handles = [
            part.register_forward_pre_hook(
                partial(_with_names, names=names if part in encoding else repeated),
                with_kwargs=True,
            )
            for part in self.modules()
            if isinstance(part, SecuraLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Any) -> None:
        if not isinstance(names, list | tuple):
            raise TypeError(f"adapter_names is a {type(names).__name__}: give a list of names")
        if self.training:
            raise ValueError(
                "adapter_names mixes adapters within a batch for inference alone: call eval(), and "
                "train one adapter at a time"
            )
        here = {name for _, layer in _secura_layers(self) for name in layer.secura_adapter}
        if unknown := sorted(set(names) - here - {BASE}):
            raise ValueError(f"adapter_names: the model has no adapter {', '.join(unknown)}")

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
        named: str | None = optional_kwargs.get("parameter_name")
        _check_other(current_key, target)
        adapted = target if isinstance(target, SecuraLayer) else None
        try:
            base: Any = target if adapted is None else adapted.get_base_layer()
            if named is None:
                refuse_unheeded(parent, target_name, current_key)
                bases.check_linear(base)
            if not bases.is_split(base):
                bases.check_at_hand(base if named is None else bases.Stack(base, named))
            if named is None:
                products.check_forward(base)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{current_key}: {error}") from error
        try:
            if adapted is not None and adapted.parameter_name == named:
                adapted.update_layer(adapter_name, peft_config, rank, name=current_key)
                return
            kind = SecuraLinear if named is None else ParamWrapper
            layer = kind(target, adapter_name, peft_config, rank, name=current_key)
            layer.train(target.training)
            layer.model_dtype = getattr(self.model, "dtype", None)
        except ValueError as error:
            advice = (
                "; lower r, or for this layer alone set rank_pattern or leave it out with "
                "exclude_modules"
            )
            lower = advice if isinstance(error, RankError) else ""
            raise ValueError(f"{current_key}: {error}{lower}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # these have no weight, or one that is computed and not to be assigned
        if isinstance(child, AuxiliaryTrainingWrapper | ParamWrapper) or isinstance(
            new_module, ParamWrapper
        ):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several together.

        Raises:
            ValueError: for a name that the model has no adapter of.
        """
        self._check_known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def _check_known(self, names: Iterable[str]) -> None:
        if unknown := sorted(set(names) - set(self.peft_config)):
            raise ValueError(
                f"the model has no adapter {', '.join(unknown)}, only {', '.join(self.peft_config)}"
            )

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuse before the first layer is written, so that no model is left half merged."""
        if adapter_names is not None and not adapter_names:
            raise ValueError("adapter_names is empty, so no adapter would be merged: leave it out")
        if adapter_names is not None and not isinstance(adapter_names, str):  # PEFT's own error
            self._check_known(adapter_names)
        owners: dict[Any, list[str]] = {}
        paths: dict[nn.Module, list[str]] = {}
        for name, part in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(part, []).append(f"{name}.base_layer")
            for parameter in part._parameters.values():
                owners.setdefault(parameter, []).append(name)
        for name, layer in _secura_layers(self.model):
            try:
                merging = layer.check_merge(adapter_names)
            except (RuntimeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
            weight = getattr(layer.adapted, "weight", None)
            others = [] if weight is None else owners.get(weight, [])
            shared = [other for other in others if not other.startswith(tuple(paths[layer]))]
            if merging and shared:
                raise ValueError(
                    f"{name}: its weight is also that of {shared[0]}, which the merge would change "
                    "too: give one of the two a weight of its own first (of a tied head: also set "
                    "tie_word_embeddings=False), or leave the layer out with exclude_modules"
                )

    def _unload_and_optionally_merge(
        self, merge: bool = True, *, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        for name, part in self.model.named_modules():
            above = isinstance(part, BaseTunerLayer) and not isinstance(part, SecuraLayer)
            if above and isinstance(getattr(part, "base_layer", None), SecuraLayer):
                raise ValueError(
                    f"{name}: a {type(part).__module__} layer lies over the adapter, and the two "
                    "would go as one: merge or unload that adapter first"
                )
        if merge:
            self._check_mergeable(adapter_names)
        gaining = saved.gaining_bias(self.model)
        model = super()._unload_and_optionally_merge(merge, adapter_names=adapter_names, **kwargs)
        if merge:
            _keep_dense(model)
            saved.warn_of_added_biases(model, gaining)
        return model

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the active adapters into the base weights, all or none.

        Raises:
            ValueError: see :meth:`SecuraLayer.merge`.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore every base weight that holds an adapter, bit for bit; warn where none does."""
        parts = [part for part in self.model.modules() if isinstance(part, BaseTunerLayer)]
        merged = [part for part in parts if part.merged]  # of trained tokens too
        if not merged:
            warnings.warn("nothing to undo: no adapter is merged", stacklevel=2)
        for part in merged:
            part.unmerge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: adapters of other rows and columns have no sum of that form.

        Raises:
            ValueError: always; the message says what adds up.
        """
        raise ValueError(
            "SECURA adapters are not combined into one: each has C and R of its own; with "
            "norm='none' several act and merge together, with base_model.set_adapter(['first', "
            "'second'])"
        )


def _check_other(name: str, target: nn.Module) -> None:
    """Raise ``TypeError`` where what lies on a layer is another tuner's, or trains it in full."""
    if isinstance(target, AuxiliaryTrainingWrapper):
        raise TypeError(
            f"{name}: an adapter of the model trains this layer itself (modules_to_save or "
            "trainable_token_indices): leave it out of one of them, here with exclude_modules"
        )
    if isinstance(target, BaseTunerLayer) and not isinstance(target, SecuraLayer):
        raise TypeError(
            f"{name}: a {type(target).__module__} layer is here already, and SECURA's columns and "
            "rows are of a weight: merge that adapter first, or leave the layer out with "
            "exclude_modules"
        )


def _check_name(adapter: str) -> None:
    if adapter in CABR.STATE:
        raise ValueError(
            f"adapter name {adapter!r} is a tensor's name in the adapter file: take another than "
            f"{CABR.STATE}"
        )
    if adapter == BASE or not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(
            f"adapter name {adapter!r} is {BASE!r} (which stands for none), empty, one of "
            "torch.nn.ModuleDict's attributes, or has a dot in it: take another"
        )


def _keep_dense(model: Any) -> None:
    """Have transformers save a merged model so that it finds the same one when it loads it again.

    It is told which layers of a quantised model are dense. A model that it dequantised while
    loading is saved dense: otherwise ``save_pretrained`` would convert it back to the quantised
    layout, which its config no longer describes.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(config, name):
            linears = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
            setattr(config, name, [n for n, m in linears if bases.dense_weight(m) is not None])
    conversions = getattr(model, "_weight_conversions", None) or ()
    steps = (step for one in conversions for step in getattr(one, "operations", ()))
    if config is None and any(getattr(step, "hf_quantizer", None) for step in steps):
        model._weight_conversions = None  # of no checkpoint: its class's own conversions are left


def _check_before_loading(module: SecuraModel, state_dict: Any, prefix: str, *unused: Any) -> None:
    """Refuse before the first tensor is copied, so that no adapter is left half loaded."""
    for name, layer in _secura_layers(module):
        layer.check_loadable(state_dict, f"{prefix}{name}.")


def _with_names(module: nn.Module, args: Any, kwargs: Any, *, names: Any) -> tuple[Any, Any]:
    if isinstance(module, AuxiliaryTrainingWrapper):  # which, unlike a layer, has to know them all
        known = module._get_available_adapters()
        names = [name if name in known else BASE for name in names]
    return args, kwargs | {"adapter_names": names}


def _secura_layers(model: Any) -> list[tuple[str, SecuraLayer]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, SecuraLayer)]


__all__ = ["SecuraModel"]
