"""The tasks of the experiments: what is asked, from which data, and how an answer is scored.

`load_task` gives the examples of a packaged task, or of the user's own data in its place. Whatever
the source, prompts over `PROMPT_WORDS` words are left out, an example stands in a split once, and
no test example's passage (or prompt, where there is none) stands in the training split.

The examples scored are the first of one fixed permutation, whatever the seed: it draws those
trained on alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secura.asset_table import Asset
from secura.assets import fetch, get_asset, load_news
from secura.cli.data import load_split
from secura.cli.errors import UserError, suggest
from secura.experiments import sources
from secura.experiments.examples import Example, TaskData

PROMPT_WORDS = 300
HELD_OUT = 0.3  # the part of a source without a test split that is kept for testing
_FIXED_SEED = 0

T = TypeVar("T")
Reader = Callable[[Path], Iterable[Example]]


@dataclass(frozen=True)
class Task:
    """One task and where its examples come from.

    Args:
        name: its key in `TASKS`.
        title: its name for people.
        metric: `"exact_match"` (the number after `####`, or any of the references), `"accuracy"`
            (the likeliest choice), `"rouge_l"` or `"bleu"`.
        train: the asset trained on and its reader; None for a task that is only scored.
        test: the asset scored and its reader; None where `train` is cut in two (see `HELD_OUT`).
        max_new_tokens: how much to write in answer; 0 for multiple choice.
        note: what a reader of its scores must know.
    """

    name: str
    title: str
    metric: str
    train: tuple[str, Reader] | None = None
    test: tuple[str, Reader] | None = None
    max_new_tokens: int = 0
    note: str = ""

    @property
    def assets(self) -> tuple[str, ...]:
        """Names of the packaged files it reads."""
        return tuple(source[0] for source in (self.train, self.test) if source)


def _multiple_choice(name: str, title: str, note: str = "") -> Task:
    reader = sources.read_olmes
    return Task(
        name, title, "accuracy", (f"{name}-train", reader), (f"{name}-test", reader), note=note
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            title="GSM8K",
            metric="exact_match",
            train=("gsm8k-train", sources.read_gsm8k),
            test=("gsm8k-test", sources.read_gsm8k),
            max_new_tokens=256,
            note="answers keep the calculator notes (<<...>>) they were released with",
        ),
        Task(
            name="logiqa",
            title="LogiQA",
            metric="accuracy",
            train=("logiqa-train", sources.read_lettered),
            test=("logiqa-test", sources.read_chat),
            note="two packages' parts of LogiQA, not its own splits; some options of the training "
            "part lack their first characters",
        ),
        _multiple_choice("arc-easy", "ARC-Easy"),
        _multiple_choice("arc-challenge", "ARC-Challenge"),
        _multiple_choice("csqa", "CommonsenseQA"),
        _multiple_choice("openbookqa", "OpenBookQA"),
        _multiple_choice("piqa", "PIQA"),
        _multiple_choice("hellaswag", "HellaSwag"),
        _multiple_choice(
            "winogrande",
            "WinoGrande",
            "the likelihood is that of an option and the sentence's rest, not of the rest alone",
        ),
        _multiple_choice("boolq", "BoolQ"),
        Task(
            name="xsum",
            title="XSum",
            metric="rouge_l",
            train=("xsum-test", sources.read_xsum),
            max_new_tokens=64,
            note=f"articles cut after {sources.ARTICLE_WORDS} words; splits of our own; a few "
            "characters of the package's text are damaged",
        ),
        Task(
            name="en-de",
            title="English to German",
            metric="bleu",
            train=("en-de-messages", sources.read_messages),
            max_new_tokens=64,
            note="messages of two programs of at least four words, not news; splits of our own",
        ),
        Task(
            name="mmlu",
            title="MMLU",
            metric="accuracy",
            test=("mmlu-test", sources.read_lettered),
            note="answers' texts, not letters; 50 questions of each subject",
        ),
        Task(
            name="triviaqa",
            title="TriviaQA",
            metric="exact_match",
            test=("triviaqa-test", sources.read_triviaqa),
            max_new_tokens=16,
            note="without context",
        ),
    )
}


def get_task(name: str) -> Task:
    """The task called `name`; `ValueError` names the nearest where there is none."""
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}{suggest(name, TASKS)}; the tasks are {', '.join(TASKS)}"
        )
    return TASKS[name]


def load_task(name: str, train: int, test: int, seed: int = 0, hub: str | None = None) -> TaskData:
    """A seeded subset of a task.

    Args:
        name: a key of `TASKS`.
        train: training examples at most; 0 for none.
        test: examples to score at most; the same ones whatever `seed`, and those of a smaller
            `test` are the first of a larger one's.
        seed: draws the training examples, in their order.
        hub: data in place of the packaged: a data set of the hub, `openai/gsm8k` or
            `openai/gsm8k:main`, with a split `train` and one of `test` and `validation`; a local
            folder of that kind; or a local file, which is cut in two (see `HELD_OUT`). Its columns
            are those of `sources.read_row`.

    Returns:
        The examples, at most as many as asked for.

    Raises:
        ValueError: unknown task, a number below 0, no example of a split that was asked for, rows
            that do not suit the task.
        UserError: `hub` cannot be read.
        secura.assets.AssetError: the package cannot be fetched, or differs from the known one.
    """
    task = get_task(name)
    if train < 0 or test < 0:
        raise ValueError(f"task {name!r}: {train} training and {test} test examples make no sense")
    data = load_all(task, hub)
    for split, wanted, found in (("training", train, data.train), ("test", test, data.test)):
        if wanted and not found:
            raise ValueError(f"task {name!r} has no {split} examples{f' in {hub}' * bool(hub)}")
    return TaskData(_draw(data.train, train, seed), _draw(data.test, test, _FIXED_SEED))


def load_all(task: Task, hub: str | None = None) -> TaskData:
    """Every example of a task that can be used; arguments and errors as for `load_task`."""
    parts = _packaged(task) if hub is None else _own(task, hub)
    train, test = parts if len(parts) == 2 else _cut(parts[0])
    train, test = _usable(train), _usable(test)
    known = {_material(example) for example in train}
    return TaskData(tuple(train), tuple(e for e in test if _material(e) not in known))


def parse_datasets(mappings: Iterable[str]) -> dict[str, str]:
    """Data sets by task, from texts such as `gsm8k=openai/gsm8k:main`.

    Raises:
        ValueError: a text without `=`, or an unknown task.
    """
    found = {}
    for mapping in mappings:
        name, equals, source = mapping.partition("=")
        if not equals or not source:
            raise ValueError(
                f"{mapping!r} names no data for a task; write TASK=DATA, such as "
                "gsm8k=openai/gsm8k:main or en-de=pairs.jsonl"
            )
        found[get_task(name).name] = source
    return found


def load_text(n: int) -> list[str]:
    """General text: `n` news articles, none of which the task `xsum` trains on.

    Raises:
        ValueError: there are fewer.
        secura.assets.AssetError: as for `load_task`.
    """
    _, held_out = _cut(load_news())
    if not 0 < n <= len(held_out):
        raise ValueError(f"from 1 to {len(held_out)} articles can be had, not {n}")
    return list(_draw(held_out, n, _FIXED_SEED))


def describe(name: str, hub: str | None = None) -> dict[str, str]:
    """A row about a task for reports: title, metric, source, licence (the packages') and note."""
    task = get_task(name)
    assets = [get_asset(asset) for asset in task.assets]
    return {
        "title": task.title,
        "metric": task.metric,
        "source": hub or ", ".join(dict.fromkeys(asset.source for asset in assets)),
        "licence": "" if hub else ", ".join(dict.fromkeys(asset.licence for asset in assets)),
        "note": "" if hub else "; ".join(filter(None, (task.note, *_notes(assets)))),
    }


def _notes(assets: Iterable[Asset]) -> Iterable[str]:
    return dict.fromkeys(asset.note for asset in assets)


def _packaged(task: Task) -> list[list[Example]]:
    """A task's own examples: both splits, or one to be cut."""
    splits = [task.train, task.test] if task.test else [task.train]
    return [list(split[1](fetch(split[0]))) if split else [] for split in splits]


def _own(task: Task, source: str) -> list[list[Example]]:
    """The user's examples for a task: both splits, or one to be cut."""
    path = Path(source).expanduser()
    name, _, config = (source, "", "") if path.exists() else source.partition(":")
    rows = [load_split(name, config or None, "train")]
    if not path.is_file():
        try:
            rows.append(load_split(name, config or None, "test"))
        except UserError:
            rows.append(load_split(name, config or None, "validation"))
    return [_read_rows(task, source, split) for split in rows]


def _read_rows(task: Task, source: str, rows: Iterable[dict]) -> list[Example]:
    examples = []
    for index, row in enumerate(rows):
        try:
            example = sources.read_row(row)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"task {task.name!r}: row {index} of {source} has the columns "
                f"{', '.join(row)} and makes no example ({error!r}); wanted: 'prompt' and "
                "'completion', or 'question' and 'answer', or 'document' and 'summary', or 'en' "
                "and 'de', and 'choices' for multiple choice"
            ) from error
        if example and (task.metric == "accuracy") != bool(example.choices):
            raise ValueError(
                f"task {task.name!r}: row {index} of {source} has "
                f"{'choices, but is to be written' if example.choices else 'no column choices'}"
            )
        if example:
            examples.append(example)
    return examples


def _cut(rows: Sequence[T]) -> tuple[list[T], list[T]]:
    """The same cut of `rows` in two every time, the second part being `HELD_OUT` of them."""
    order = list(range(len(rows)))
    random.Random(_FIXED_SEED).shuffle(order)
    held_out = set(order[: round(HELD_OUT * len(rows))])
    parts: tuple[list[T], list[T]] = ([], [])
    for index, row in enumerate(rows):
        parts[index in held_out].append(row)
    return parts


def _draw(rows: Sequence[T], n: int, seed: int) -> tuple[T, ...]:
    """The first `n` of a permutation of `rows`."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return tuple(rows[index] for index in order[:n])


def _usable(examples: Iterable[Example]) -> list[Example]:
    """The examples with a prompt of a fit length, each once, in the order they come."""
    found: dict[tuple[str, ...], Example] = {}
    for example in examples:
        if 0 < len(example.prompt.split()) <= PROMPT_WORDS:
            answers = sorted(example.choices or (example.completion,))
            found.setdefault((_plain(example.prompt), *map(_plain, answers)), example)
    return list(found.values())


def _material(example: Example) -> str:
    """What both splits must not share: the passage asked about, or else the whole prompt."""
    passage, _, _ = example.prompt.rpartition("\nQuestion:")
    return " ".join(re.findall(r"\w+", (passage or example.prompt).casefold()))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


__all__ = [
    "HELD_OUT",
    "PROMPT_WORDS",
    "TASKS",
    "Task",
    "describe",
    "get_task",
    "load_all",
    "load_task",
    "load_text",
    "parse_datasets",
]
