"""Experience replay: a bounded memory of earlier tasks, mixed into every batch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Features = Mapping[str, Any]
"""One tokenised example, as a data set hands it to its collator: ``input_ids``, ``labels``, …"""


class ReplayBuffer(Sequence[Features]):
    """At most ``size`` examples of earlier tasks, the same number of each where they have as many.

    Which ones depends on the seed and on the place of their task in the order alone: as tasks are
    added, each keeps a part of what was kept of it before, so the memory could have been filled
    while the tasks went by.

    Args:
        examples: each earlier task's features, in the order the tasks were learned.
        size: the most examples to keep.
        seed: of the choice.

    Raises:
        ValueError: for a size below 1, no task, a task without examples, or tasks whose features
            differ in their columns.
    """

    def __init__(self, examples: Sequence[Sequence[Features]], size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be 1 or more examples")
        if not len(examples) or not all(len(task) for task in examples):
            raise ValueError("a replay memory needs at least one example of each earlier task")
        orders = [
            random.Random(f"{seed} {place}").sample(range(len(task)), min(size, len(task)))
            for place, task in enumerate(examples)
        ]
        turns = [
            task[order[turn]]
            for turn in range(size)
            for task, order in zip(examples, orders, strict=True)
            if turn < len(order)
        ]
        self._kept = turns[:size]
        for features in self._kept:
            _check_columns(features, self._kept[0], "another task of the memory")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return self._kept[index]


class ReplayCollator:
    """Append examples from a memory to every batch, then collate.

    To ``B`` features come ``round(B · share / (1 − share))`` from the memory, at least one (half of
    a batch of one): of the final batch, ``share`` is replayed. The draw is a function of the seed
    and of the batch's token ids in their order, and of nothing else: a run that is resumed, or that
    loads its data in other processes, gets the batches it would have had. It is without repetition
    while the memory lasts.

    The loss's normalisation is right without more: the Trainer counts the tokens of a step in the
    batches this collator returns.

    The Trainer uses its one collator for evaluation as well, where replayed examples would count in
    the loss: evaluate with the wrapped collator (``trainer.data_collator = replay.collator``).

    Args:
        collator: what makes a batch of features.
        memory: a :class:`ReplayBuffer`, or any sequence of features.
        share: part of the final batch that is replayed, above 0 and below 1.
        seed: of the draw.

    Raises:
        ValueError: for a share out of its range or an empty memory. When called: for features that
            have no ``input_ids``, or other columns than the memory's.
    """

    def __init__(
        self,
        collator: Callable[[list[Features]], Any],
        memory: Sequence[Features],
        share: float = 0.2,
        seed: int = 0,
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share={share} must be above 0 and below 1")
        if not len(memory):
            raise ValueError("there is nothing to replay, the memory is empty: give it examples")
        self.collator = collator
        self.memory = memory
        self.share = share
        self.seed = seed

    def __call__(self, features: list[Features]) -> Any:
        """The collated batch of ``features`` and what was drawn, in this order."""
        return self.collator([*features, *self.draw(features)])

    def draw(self, features: Sequence[Features]) -> list[Features]:
        """What is replayed with a batch of these features."""
        for feature in features:
            _check_columns(feature, self.memory[0], "the memory")
        count = max(1, round(len(features) * self.share / (1 - self.share)))
        generator = random.Random(self._key(features))
        places = range(len(self.memory))
        if count <= len(places):
            return [self.memory[place] for place in generator.sample(places, count)]
        return [self.memory[place] for place in generator.choices(places, k=count)]

    def _key(self, features: Sequence[Features]) -> bytes:
        digest = hashlib.sha256(str(self.seed).encode())
        for feature in features:
            if "input_ids" not in feature:
                raise ValueError(f"replay needs token ids, and got {_columns(feature)} alone")
            digest.update(np.asarray(feature["input_ids"], dtype=np.int64).tobytes())
        return digest.digest()


def _check_columns(features: Features, expected: Features, of: str) -> None:
    if features.keys() != expected.keys():
        raise ValueError(
            f"features with the columns {_columns(features)} cannot be batched with those of {of}, "
            f"which have {_columns(expected)}: tokenise both alike, and leave out what the model "
            "does not take"
        )


def _columns(features: Features) -> str:
    return ", ".join(sorted(features))


__all__ = ["ReplayBuffer", "ReplayCollator"]
