"""Whether written answers are right, and how close they are to the right one."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from statistics import fmean

from secura._extras import require
from secura.experiments.examples import Example

_NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:,\d{3})*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))


def is_match(example: Example, answer: str) -> bool:
    """Whether a written answer is right.

    Against `references`, where the example has any: the answer's first line is one of them, letter
    case, punctuation and articles aside. Else its number is the completion's, see
    :func:`final_number`.
    """
    if example.references:
        written = _normalised(answer)
        return written != "" and written in map(_normalised, example.references)
    number = final_number(answer)
    return number is not None and number == final_number(example.completion)


def final_number(text: str) -> Decimal | None:
    """The last number on the first line after ``####``, or of the text where that has none."""
    marked = _NUMBER.findall(text.partition("####")[2].strip().partition("\n")[0])
    numbers = marked or _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _normalised(text: str) -> str:
    first_line = text.strip().partition("\n")[0]
    return " ".join(_ARTICLES.sub(" ", first_line.lower().translate(_PUNCTUATION)).split())


def _exact_match(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    pairs = zip(examples, answers, strict=True)
    return {"exact_match": fmean(is_match(example, answer) for example, answer in pairs)}


def _rouge_l(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    scorer = require("rouge_score.rouge_scorer", "experiments").RougeScorer(
        ["rougeL"], use_stemmer=True
    )
    pairs = zip(examples, answers, strict=True)
    scores = (scorer.score(example.completion, answer)["rougeL"] for example, answer in pairs)
    return {"rouge_l": fmean(score.fmeasure for score in scores)}


def _bleu(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    sacrebleu = require("sacrebleu", "experiments")
    references = [[example.completion.strip() for example in examples]]
    return {
        "bleu": sacrebleu.corpus_bleu(answers, references).score / 100,
        "chrf": sacrebleu.corpus_chrf(answers, references).score / 100,
    }


METRICS: dict[str, Callable[[Sequence[Example], Sequence[str]], dict[str, float]]] = {
    "exact_match": _exact_match,
    "rouge_l": _rouge_l,
    "bleu": _bleu,
}
"""What is computed from examples and the answers written to them, by metric."""


__all__ = ["METRICS", "final_number", "is_match"]
