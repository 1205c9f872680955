"""The report's tables of methods on one task: what each has drifted where it learned as much."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean

from benchmarks.markdown import table
from benchmarks.retention.figures import NOTHING, interval, percent, plus_minus
from benchmarks.retention.grid import BEST
from benchmarks.retention.methods import CUR_RANK, LORA_RANKS, get_method
from benchmarks.retention.record import Record, provenance
from benchmarks.retention.summary import (
    LEVELS,
    MAIN,
    REFERENCE,
    RIVALS,
    SCALED,
    Front,
    estimate,
    ratio,
    unseen,
)

BRIEF = 8  # rows of the table that shows drift alone
_PREFERRED = (
    "lora",
    BEST,
    "lora-whitened",
    "ewc-self",
    "full",
    "replay-self",
    "lora@rank=8",
    "anchored-self",
    REFERENCE + SCALED,
    "core-u",
)
_INTERVALS = "Intervals are of 95% over the seeds of training, paired, on fixed texts."
_MARKED = "†"
_ABOVE = (
    "all its runs of a seed end above this level; it is read off the one that drifted least, and "
    "at the level itself may have drifted less."
)
_LORA_ABOVE = (
    "LoRA ends above this level at every rate it was run at on a seed: its drift here is too "
    "large, and every ratio too small."
)


def brief_table(front: Front) -> str:
    """How far the methods of most interest have drifted at two levels of learning."""
    level, lower = front.levels()[MAIN], front.levels()[MAIN - 1]
    main, less = f"{LEVELS[MAIN]:.0%}", f"{LEVELS[MAIN - 1]:.0%}"
    head = ["method", "trained", "learned at best", f"drift at {main}", f"drift at {less}"]
    rows = [
        [*_learner(front, name), _ratio(front, name, level), _ratio(front, name, lower)]
        for name in _by_interest(front)[:BRIEF]
    ]
    caption = (
        f"*Drift*: KL(base ‖ tuned) on all kinds of old text where a method has learned {main} and "
        f"{less} ({level:.3f} and {lower:.3f} nats a token of the task's held-out loss) of what "
        "LoRA reaches at its best rate on every seed, as a multiple of LoRA's there; below 1 "
        f"drifts less. Read between the ends of runs at different rates. {_INTERVALS}"
        f"{_marks(rows)} {_made(front)}"
    )
    return f"{table(head, rows)}\n\n{caption}"


def main_table(front: Front) -> str:
    """The methods of most interest, each where it learned nearly what LoRA does at its best rate.

    Args:
        front: of one stage and place.
    """
    level = front.levels()[MAIN]
    kinds = front.some(REFERENCE).settings.texts
    head = ["method", "trained", "learned at best", *(f"KL, {kind}" for kind in kinds)]
    more = ["KL, all kinds", "KL, the task", "rise of loss", "probes kept", "kept, plain"]
    shown, task = _by_interest(front), front.some(REFERENCE).task
    rows = [
        [
            *_learner(front, name),
            *(_ratio(front, name, level, kind) for kind in kinds),
            *_costs(front, name, level, task),
        ]
        for name in shown
    ]
    caption = (
        f"KL(base ‖ tuned) where a method has learned {level:.3f} nats a token of the task's "
        f"held-out loss, {LEVELS[MAIN]:.0%} of what LoRA reaches at its best rate on every seed, "
        "as a multiple of LoRA's there; below 1 drifts less. Read between the ends of "
        f"runs at different rates. {_INTERVALS}{_marks(rows)}"
    )
    if front.above(REFERENCE, level):
        caption += f" {_LORA_ABOVE}"
    some = max(front.records(REFERENCE), key=lambda record: len(record.probes))
    low, high = _question_errors(some)
    caption += (
        " Rise of loss, mean over the kinds of old text, and probes, accuracy normalised by "
        "the answers' lengths (acc_norm) and plain as a share of the base model's, are of the "
        "run that ends nearest above that level. Their ± is over seeds alone: the standard "
        "error of a probe's accuracy over its "
        f"{some.settings.probe_questions} questions, {low:.0%} to {high:.0%} of it, is not in it."
    )
    if any(len(unseen(front.some(name))) < len(kinds) for name in shown):
        caption += (
            " An anchor by given news has seen the source of the kind news, which its column "
            "of all kinds leaves out."
        )
    caption += f" {_made(front)}"
    return f"{table([*head, *more], rows)}\n\n{caption}"


def levels_table(front: Front) -> list[str]:
    """The KL over all kinds at three levels of learning."""
    levels = front.levels()
    above = [" ‡" * front.above(REFERENCE, level) for level in levels]
    heads = zip(LEVELS, levels, above, strict=True)
    head = ["method", *(f"{share:.0%} ({x:.3f}){mark}" for share, x, mark in heads)]
    rows = [
        [front.title(name), *(_ratio(front, name, level) for level in levels)]
        for name in front.methods
        if name != REFERENCE and front.ratio(name, levels[0])
    ]
    note = (
        "KL over all kinds as a multiple of LoRA's, at shares of what LoRA learns at its best, "
        f"between the ends of runs at different rates. {_INTERVALS}{_marks(rows)}"
    )
    return ["", table(head, rows), "", f"{note} ‡: {_LORA_ABOVE}" if any(above) else note]


def ends_table(front: Front) -> list[str]:
    """Ends of runs beside LoRA's, and anchored ones beside others that hold, paired by seed."""
    names = [name for name in front.methods if not name.endswith(SCALED)]
    anchored = [name for name in names if get_method(name).anchor]
    pairs = [(name, REFERENCE) for name in names if name != REFERENCE]
    holding = [name for name in names if name in RIVALS or get_method(name).decay]
    pairs += [(name, other) for name in anchored for other in holding if other != name]
    rows = [
        [
            *(front.title(name), f"{rate:g}", front.title(beside), f"{other:g}"),
            *(str(more.count), *map(interval, (more, kl))),
        ]
        for name, beside in pairs
        for rate, other, more, kl in front.around(name, beside)
    ]
    head = ["method", "rate", "beside", "its rate", "seeds", "learned more", "KL over"]
    note = (
        "Ends of runs beside those of another method that lie next below and above in what they "
        "learned, nothing read between. KL over all kinds, a ratio."
    )
    return [table(head, rows), "", f"{note} {_INTERVALS}"] if rows else []


def multiples_table(front: Front) -> list[str]:
    """KL at ends over LoRA's where it learned as much, and those multiples over one another."""
    names = [name for name in front.methods if name != REFERENCE and not name.endswith(SCALED)]
    found = {(n, rate): one for n in names for rate, one in front.multiples(n).items()}
    cores = {key: own for key, own in found.items() if get_method(key[0]).anchor == "self"}
    pairs = [(key, own, ("LoRA", ""), dict.fromkeys(own, 1.0)) for key, own in found.items()]
    pairs += [
        (key, own, (front.title(other), f"{rate:g}"), theirs)
        for key, own in cores.items()
        for (other, rate), theirs in found.items()
        if other != key[0] and (other in RIVALS or get_method(other).decay)
    ]
    rows = [
        [front.title(name), f"{rate:g}", *beside, str(over.count), interval(over)]
        for (name, rate), own, beside, theirs in pairs
        if (over := ratio(own, theirs)) and over.count > 1
    ]
    head = ["method", "rate", "over", "its rate", "seeds", "multiple"]
    note = (
        "KL over all kinds at the ends of runs as a multiple of LoRA's where that learned as much, "
        "read between its ends; of those that end between them on every seed. Then the multiples "
        "of anchored cores over those of what else holds or is whitened."
    )
    return [table(head, rows), "", f"{note} {_INTERVALS}"] if rows else []


def _by_interest(front: Front) -> list[str]:
    """The methods of a front, those of most interest first."""
    return [name for name in dict.fromkeys([*_PREFERRED, *front.methods]) if name in front.runs]


def _learner(front: Front, name: str) -> list[str]:
    """A method's name, how many numbers it trains, and the most it learned."""
    best = plus_minus(estimate(list(front.best(name).values())))
    return [_title(front, name), f"{front.some(name).trained / 1e3:,.0f}k", best]


def _costs(front: Front, name: str, level: float, task: str) -> list[str]:
    ends = front.ends(name, level)
    note = _partly(front, len(ends))
    kept = [
        [share for end in ends.values() if not math.isnan(share := _kept(end, kind))]
        for kind in ("accuracy_norm", "accuracy")
    ]
    return [
        _ratio(front, name, level),
        _ratio(front, name, level, task),
        plus_minus(estimate([_rise(end) for end in ends.values()]), sign=True) + note
        if ends
        else NOTHING,
        *(percent(estimate(shares)) + note if shares else NOTHING for shares in kept),
    ]


def _made(front: Front) -> str:
    """What the figures of a front are of, where they were made, and by which command."""
    records = [record for method in front.methods for record in front.records(method)]
    some, facts = front.some(REFERENCE), provenance(records)
    stages = sorted({record.stage for record in records})
    commands = ", ".join(
        f"`python -m benchmarks.retention run {name} --out DIR`" for name in stages
    )
    place, rank = some.cell.targets, LORA_RANKS[some.cell.targets]
    names = {"True": "bf16 autocast", "False": "fp32"}
    arithmetic = " and ".join(names.get(word, word) for word in facts["bf16"].split(", "))
    return (
        f"Where no rank is named, LoRA's is {rank} (alpha {2 * rank}), the core's {CUR_RANK}. "
        f"{facts['model']}; adapters on {place}, {some.cell.steps} steps of batch "
        f"{some.settings.batch_size}, {arithmetic}; {facts['machine.name']}, torch "
        f"{facts['torch']}; commit {facts['commit']}; {commands}."
    )


def _title(front: Front, method: str) -> str:
    """A method's name for people, the reference's with its rank."""
    rank = LORA_RANKS[front.some(method).cell.targets] if method == REFERENCE else 0
    return f"{front.title(method)}, rank={rank}" if rank else front.title(method)


def _marks(rows: Sequence[Sequence[str]]) -> str:
    """What the marks that stand in a table mean, each a sentence after a space."""
    cells = [cell for row in rows for cell in row]
    whole, text = " ".join(cells), ""
    if "**" in whole:
        text += " Bold: the interval excludes 1, before rounding, below or above."
    if partly := re.search(r"\(\d+ of \d+\)", whole):
        text += f" {partly[0]}: of the seeds on which the level is reached, alone."
    if NOTHING in cells:
        text += f" {NOTHING}: it does not learn as much at any rate."
    if _MARKED in whole:
        text += f" {_MARKED}: {_ABOVE}"
    return text


def _question_errors(record: Record) -> tuple[float, float]:
    """The least and the largest standard error of a probe's accuracy, as a share of it."""
    shares = [
        math.sqrt((1 - accuracy) / (probe.n * accuracy))
        for probe in record.probes.values()
        for accuracy in (probe.base_accuracy_norm, probe.base_accuracy)
        if accuracy
    ]
    return (min(shares), max(shares)) if shares else (math.nan, math.nan)


def _ratio(front: Front, method: str, level: float, *kinds: str) -> str:
    if method == REFERENCE:
        return "1"
    found = front.ratio(method, level, *kinds)
    if found is None:
        return NOTHING
    note = f"{_MARKED * front.above(method, level)}{_partly(front, found.count)}"
    if math.isnan(found.low):
        return f"{found.mean:.2f}{note}"
    whole = found.count == len(front.runs[REFERENCE])
    mark = "**" if whole and (found.high < 1 or found.low > 1) else ""
    return f"{interval(found, 2, mark)}{note}"


def _partly(front: Front, count: int) -> str:
    """Of how many of the reference's seeds a figure is, where it is not of all."""
    seeds = len(front.runs[REFERENCE])
    return f" ({count} of {seeds})" if count < seeds else ""


def _rise(record: Record) -> float:
    return fmean(score.rise for score in record.end.texts.values())


def _kept(record: Record, kind: str) -> float:
    """Mean share of the base's accuracy that a run's probes kept, of that kind; nan without any."""
    pairs = [
        (getattr(probe, kind), getattr(probe, f"base_{kind}")) for probe in record.probes.values()
    ]
    shares = [own / base for own, base in pairs if base]
    return fmean(shares) if shares else math.nan


__all__ = ["BRIEF", "brief_table", "ends_table", "levels_table", "main_table", "multiples_table"]
