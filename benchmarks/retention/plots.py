"""The picture: learned to the right, KL upwards, a line a method, the base model at the origin."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.retention.methods import get_method
from benchmarks.retention.summary import Front, kl_of, learned, unseen
from secura._extras import require

_LOOKS: dict[str, tuple[str, str]] = {
    "lora": ("#E08A00", "o"),
    "dora": ("#B5421B", "p"),
    "replay-self": ("#9C6B00", "P"),
    "ewc-self": ("#C9A227", "v"),
    "lora-whitened": ("#7A3FA8", "*"),
    "full": ("#555555", "h"),
    "core-u": ("#6BA8DC", "D"),
    "cur-lora": ("#C2569B", "X"),
    "cabr": ("#00875F", "d"),
    "secura-weight": ("#5B8C5A", "^"),
    "anchored-self": ("#0B2F57", "s"),
    "anchored-text": ("#1F6FB2", "<"),
    "anchored-channel": ("#2E94D6", ">"),
}
_OTHER = ("#999999", ".")


def draw_front(front: Front, title: str) -> Any:
    """A figure of a method's ends at each rate, means over seeds, joined from the origin."""
    figure_class = require("matplotlib.figure", "bench").Figure
    figure = figure_class(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name in [n for n in front.methods if "@" not in n]:
        value = kl_of(*unseen(front.some(name)))
        points = sorted(
            (
                fmean(learned(r.end, r.task) for r in records),
                fmean(value(r.end) for r in records),
            )
            for records in _by_rate(front, name).values()
        )
        xs, ys = zip((0.0, 0.0), *points, strict=True)
        colour, marker = _LOOKS.get(name, _OTHER)
        axes.plot(xs, ys, color=colour, marker=marker, markersize=5, label=get_method(name).title)
    axes.plot(0, 0, color="black", marker="o", markersize=7, clip_on=False)
    axes.annotate("base", (0, 0), xytext=(6, 6), textcoords="offset points")
    axes.set(
        title=title,
        xlabel="learned: fall of the held-out loss (nats a token)",
        ylabel="KL(base ‖ tuned) on old text (nats a token)",
    )
    axes.set_ylim(0, _top(front))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def write_front(front: Front, path: Path, title: str) -> None:
    """Writes the picture as a PNG; the same records give the same bytes."""
    draw_front(front, title).savefig(path, metadata={"Software": None})


def _by_rate(front: Front, method: str) -> dict[float, list[Any]]:
    found: dict[float, list[Any]] = {}
    for records in front.runs[method].values():
        for record in records:
            found.setdefault(record.cell.rate, []).append(record)
    return found


def _top(front: Front) -> float:
    """Where the picture ends: twice the reference's worst, so that a ruined model bends no axis."""
    worst = max(kl_of()(r.end) for records in front.runs["lora"].values() for r in records)
    return 2 * worst


__all__ = ["draw_front", "write_front"]
