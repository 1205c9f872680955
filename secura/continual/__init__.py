"""Continual learning for any ``transformers.Trainer``: callbacks and a collator, no subclass.

Each task is one training run; what keeps the earlier tasks is added to that run. The methods work
on the trainable parameters, whatever they are (LoRA, SECURA, the whole model), and can be combined;
but what was kept before an adapter was folded or anchored anew is refused after it, for the same
numbers then stand for something else.

Elastic weight consolidation pulls the parameters that mattered to earlier tasks back to where they
were::

    trainer = Trainer(model, ..., callbacks=[EWCCallback(Fisher.load(path), ewc_lambda=1e3)])
    trainer.train()
    fisher = Fisher.estimate(model, batches_of_one_example, previous=Fisher.load(path))
    fisher.save(path)

Experience replay mixes a bounded memory of earlier examples into every batch::

    memory = ReplayBuffer([features_of_task_1, features_of_task_2], size=512, seed=0)
    trainer = Trainer(model, ..., data_collator=ReplayCollator(collator, memory, share=0.2))

I-LoRA adds a slow copy of the adapter, which training stays close to, and which is what one infers
with; its authors use it together with replay::

    memory = LongTermMemory(ema=0.99, weight=1.0)
    trainer = Trainer(model, ..., callbacks=[memory])
    trainer.train()
    with memory.applied(model):
        trainer.save_model(path)

The anchored core (:func:`secura.anchor`) stores no data either: at a task's end its statistics are
added to those of old text, and what was learned is folded::

    secura.anchor(model, tokenizer=tokenizer)
    trainer = Trainer(model, ..., callbacks=[AnchorCallback(), AnchorDecayCallback()])

Its callbacks are not refused under sharded training, in which they have not been tried within a
Trainer. The others work under one process and under DDP. Sharded training (FSDP, DeepSpeed) keeps
parameters and gradients where a callback cannot reach them, and is refused, as is an adapter whose
config folds during training (``fold_every``): folding moves what was learned out of the parameters
these methods watch. Fold at the end of a task, before ``Fisher.estimate``. For the same reason
:class:`LongTermMemory`, whose copy is used after a run, does not go with :class:`AnchorCallback`,
which folds and anchors anew at its end: ``applied``, ``copy_to`` and a second run are errors then.
"""

from __future__ import annotations

from .anchoring import AnchorCallback
from .decay import AnchorDecayCallback
from .ewc import EWCCallback, Fisher
from .long_term import LongTermMemory
from .replay import ReplayBuffer, ReplayCollator

__all__ = [
    "AnchorCallback",
    "AnchorDecayCallback",
    "EWCCallback",
    "Fisher",
    "LongTermMemory",
    "ReplayBuffer",
    "ReplayCollator",
]
