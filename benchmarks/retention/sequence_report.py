"""The report's tables of tasks learned in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from benchmarks.markdown import table
from benchmarks.retention.figures import NOTHING, interval, plus_minus
from benchmarks.retention.grid import BEST, BY_LENGTH, HARD, HARD_EWC, WHITENED
from benchmarks.retention.methods import get_method
from benchmarks.retention.record import Record
from benchmarks.retention.summary import (
    REFERENCE,
    RIVAL,
    Estimate,
    InTurn,
    difference,
    estimate,
    ratio,
    sequences,
)

_M1 = "secura-weight"
_BESIDE = {
    BEST: "the anchored core, which stores 2 m² numbers a layer, with a decay of 30",
    BY_LENGTH: "the core with the decay that its rule takes for these steps",
    HARD: "the core held harder, with a decay of 100",
    _M1: "the paper's averaged weight, folded between tasks",
    "er": "replay, which stores the earlier tasks",
    "ewc": "EWC, which stores two numbers for each trained parameter",
    "replay-self": "replay of the model's own samples too, which it stores",
    "ewc-self": "EWC of the model's own samples too",
    HARD_EWC: "the same EWC held harder",
    WHITENED: "whitened LoRA with its rule's decay, which stores K² numbers a layer",
}
"""Methods that others are set against in a sequence, beside LoRA, and what they keep."""
_NO_PAIRS = (NOTHING,) * 3
_WHAT = ("method", "on", "rate", "steps")


def sequence_table(records: Iterable[Record]) -> str:
    """What became of tasks learned in turn; empty where no sequence was run."""
    found = sequences(records)
    if not found:
        return ""
    rows = []
    for run in found:
        row = [*_what(run), str(len(run.loss))]
        owns, paired = (run.loss, run.forgetting, run.kl), _beside(run, REFERENCE, found)
        for own, against in zip(owns, paired, strict=True):
            row += [plus_minus(estimate(list(own.values()))), against]
        rows.append(row)
    head = [*_WHAT, "n", "loss", "less LoRA's", "forgetting", "less LoRA's", "KL", "KL over LoRA"]
    caption = (
        "After the last task: mean held-out loss of all of them; rise of the earlier ones' loss "
        "above the least it was; KL on old texts, geometric mean over the kinds but for news where "
        "XSum, the same collection, is trained on. n: seeds of training; ±: half a 95% interval "
        f"over them. Beside each figure what it is against LoRA's, paired by seed; {NOTHING}: on "
        "fewer than two."
    )
    parts = [table(head, rows), caption]
    head = [*_WHAT, "loss less", "forgetting less", "KL over"]
    for reference, keeps in _BESIDE.items():
        beside = [(run, _beside(run, reference, found)) for run in found]
        stored = [[*_what(run), *paired] for run, paired in beside if paired != _NO_PAIRS]
        if stored:
            parts += [f"Against {keeps}, the same:", table(head, stored)]
    for reference in (REFERENCE, RIVAL, BEST, BY_LENGTH, WHITENED, _M1):
        parts += _after_each(found, reference)
    return "\n\n".join(parts)


def _what(run: InTurn) -> list[str]:
    return [get_method(run.method).title, run.targets, f"{run.rate:g}", str(run.steps)]


def _beside(run: InTurn, reference: str, found: Sequence[InTurn]) -> tuple[str, str, str]:
    """Loss and forgetting less the reference's, and KL over its, paired by seed."""
    other = _other(run, reference, found)
    if run is other:
        return _NO_PAIRS
    count = len(run.loss)
    return (
        _paired(difference(run.loss, other.loss), count),
        _paired(difference(run.forgetting, other.forgetting), count),
        _paired(ratio(run.kl, other.kl), count),
    )


def _other(run: InTurn, reference: str, found: Sequence[InTurn]) -> InTurn:
    """The reference's run of the same place and length, at its best rate; ``run`` without one."""
    own = run.targets, run.steps
    plain = [r for r in found if r.method == reference and (r.targets, r.steps) == own]
    return min(plain, key=lambda r: fmean(r.loss.values()), default=run)


def _paired(found: Estimate | None, count: int) -> str:
    """A figure against the reference's, with its interval; of `count` seeds of its own."""
    if found is None or found.count < 2:
        return NOTHING
    note = f" ({found.count} of {count})" if found.count < count else ""
    return f"{interval(found, 2)}{note}"


def _after_each(found: Sequence[InTurn], reference: str) -> list[str]:
    """The KL over a reference's after each of the tasks, where two seeds or more are paired."""
    rows = []
    for run in found:
        other = _other(run, reference, found)
        if other is not run and len(run.kls) > 1:
            paired = (ratio(run.kls[count], other.kls[count]) for count in sorted(run.kls))
            rows.append([*_what(run), *(_paired(kl, len(run.loss)) for kl in paired)])
    rows = [row for row in rows if set(row[4:]) != {NOTHING}]
    if not rows:
        return []
    head = [*_WHAT, *(f"after {count}" for count in range(1, len(rows[0]) - 3))]
    title = f"KL over that of {get_method(reference).title} after each task:"
    return [title, table(head, rows)]


__all__ = ["sequence_table"]
