"""ms-swift: SECURA as a tuner type of ``swift sft``, ``swift rlhf`` and ``swift infer``."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model
from swift.callbacks import callbacks_map
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

import secura

NAME = "secura"

_TASKS = {
    "EMBEDDING": None,
    "RERANKER": "SEQ_CLS",
    "GENERATIVE_RERANKER": "CAUSAL_LM",
    "DECISION": "CAUSAL_LM",
}
"""PEFT's ``task_type`` by ms-swift's, where it is another: as ms-swift's LoRA has it."""


def register(**settings: Any) -> None:
    """Make ``--tuner_type secura`` and ``--callbacks secura``, which folds, known to ms-swift.

    Called from a file of the user's own, which ms-swift imports with ``--external_plugins``.

    Example:
        >>> register(norm="channel", fold_every=10)

    Args:
        **settings: of :class:`secura.SecuraConfig`. ``r``, ``target_modules``,
            ``target_parameters`` and ``modules_to_save`` are ms-swift's ``--lora_rank``,
            ``--target_modules`` (or ``--target_regex``), ``--target_parameters`` and
            ``--modules_to_save`` unless given here.

    Raises:
        TypeError: for a setting that there is not.
        ValueError: for one out of range.
    """
    secura.SecuraConfig(**settings)

    class SecuraTuner(PeftTuner):
        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> PeftModel:
            task = args.task_type.upper()
            given = {
                "r": args.lora_rank,
                "target_modules": get_target_modules(args, model),
                "target_parameters": getattr(args, "target_parameters", None),
                "modules_to_save": get_modules_to_save(args, model, task) or None,
                "task_type": _TASKS.get(task, task),
            }
            config = secura.SecuraConfig(**(given | settings))
            if config.fold_every and NAME not in args.callbacks:
                raise ValueError(f"fold_every={config.fold_every} needs --callbacks {NAME}")
            return get_peft_model(model, config)

        from_pretrained = staticmethod(secura.from_pretrained)

    tuners_map[NAME] = SecuraTuner
    callbacks_map[NAME] = lambda args, trainer: secura.FoldCallback()


__all__ = ["register"]
