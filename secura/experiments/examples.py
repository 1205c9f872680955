"""What a task is made of: examples with one right completion, and the two splits of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Example:
    """One prompt and what is to follow it.

    Args:
        prompt: the text before; it ends without a space.
        completion: the right text after, with whatever separates it from the prompt; for multiple
            choice it is ``choices[answer]``.
        choices: the completions to choose between, empty for tasks that generate.
        references: every text that counts as right where there is more than `completion`, such
            as the aliases of an answer; without what separates it from the prompt.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def answer(self) -> int:
        """Index of the right choice."""
        return self.choices.index(self.completion)


@dataclass(frozen=True)
class TaskData:
    """A task's examples: those trained on, and those scored, which share no example."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def checksum(self) -> str:
        """SHA256 of both splits as they are used."""
        return checksum([*self.train, *self.test])


def checksum(examples: Sequence[Example]) -> str:
    """SHA256 of the examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), ensure_ascii=False).encode())
    return digest.hexdigest()


__all__ = ["Example", "TaskData", "checksum"]
