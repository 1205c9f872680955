"""The pictures: what was learned against the KL, of one task and of several in turn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.plots import plain
from benchmarks.retention.grid import BEST, BY_LENGTH, GROWING
from benchmarks.retention.methods import get_method
from benchmarks.retention.summary import REFERENCE, SCALED, Front, InTurn, kl_of, learned, unseen
from secura._extras import require

_LOOKS: dict[str, tuple[str, str]] = {
    "lora": ("#E08A00", "o"),
    REFERENCE + SCALED: ("#D4694A", "<"),
    "dora": ("#B5421B", "p"),
    "replay-self": ("#9C6B00", "P"),
    "ewc-self": ("#C9A227", "v"),
    "lora-whitened": ("#7A3FA8", "*"),
    "full": ("#555555", "h"),
    "core-u": ("#6BA8DC", "D"),
    "cur-lora": ("#C2569B", "X"),
    "cabr": ("#00875F", "d"),
    "secura-weight": ("#5B8C5A", "^"),
    "secura-weight-u": ("#9DBF6E", "v"),
    "released-m1": ("#222222", "x"),
    "anchored-self": ("#6C8EBF", "s"),
    BEST: ("#0B2F57", "s"),
    BEST.replace("decay=30", "decay=10"): ("#3F7FBF", "X"),
    BEST.replace("decay=30", "decay=7.5"): ("#0B2F57", "^"),
    BEST.replace("decay=30", "decay=3"): ("#19A0A0", "D"),
    f"{BEST.replace('decay=30', 'decay=3')},kappa=model": ("#F06292", "D"),
    f"{BEST.replace('decay=30', 'decay=3.8')},kappa=model": ("#D81B60", "s"),
    BEST.replace("decay=30", "decay=60"): ("#3F7FBF", "s"),
    "anchored-self@rank=192,decay=60": ("#00875F", "D"),
    "anchored-self@rank=192,decay=120": ("#00875F", "d"),
    f"{BEST},kappa=model": ("#D81B60", "s"),
    f"{BEST.replace('decay=30', 'decay=60')},kappa=model": ("#F06292", "s"),
    "anchored-self@rank=192,decay=120,kappa=model": ("#AD1457", "d"),
    "lora@decay=5": ("#B5421B", "o"),
    "lora-whitened@decay=2.5": ("#A66FD0", "*"),
    "lora-whitened@decay=5": ("#A66FD0", "P"),
    GROWING: ("#3F7FBF", "*"),
    f"{BY_LENGTH},kappa=model": ("#D81B60", "s"),
    "lora@rank=8": ("#F2B75C", "o"),
    "anchored-text": ("#1F6FB2", "<"),
    "anchored-channel": ("#2E94D6", ">"),
}
_OTHER = ("#999999", ".")
_IN_TURN = {
    "anchored-self@rank=128": _LOOKS[BEST],
    "ewc": ("#8A7A3A", "^"),
    "er": ("#5F4300", "P"),
    "i-lora": ("#C23B22", "8"),
    "secura-weight@norm_reference=pretrained": ("#1E7B45", "v"),
}
_STRENGTH = re.compile(r"(?:decay|strength)=[^,]+")
"""Of a method's name, how hard it is held; the last of its settings."""


def draw_front(front: Front, title: str) -> Any:
    """A figure of a method's ends at each rate, means over seeds.

    The KL is over the kinds of old text that none of the drawn methods has seen the source of.
    On the left all ends of a method are joined, the first by a dotted line to the untouched model
    at the origin. On the right is the part where most was learned, the KL on a logarithmic scale.
    Variations of a method are drawn where ``_LOOKS`` names them.
    """
    figure_class = require("matplotlib.figure", "bench").Figure
    figure = figure_class(figsize=(11, 4.6), dpi=150, layout="constrained")
    whole, near = figure.subplots(1, 2)
    tops = []
    names = [n for n in front.methods if "@" not in n or n in _LOOKS]
    every = front.some(REFERENCE).settings.texts
    kinds = [kind for kind in every if all(kind in unseen(front.some(name)) for name in names)]
    kinds = kinds or list(every)
    runs = [len(records) for name in names for records in _alike(front, name).values()]
    for name in names:
        points = _points(front, name, kinds)
        colour, marker = _LOOKS.get(name, _OTHER)
        look = {"color": colour, "marker": marker, "markersize": 5}
        xs, ys = zip((0.0, 0.0), *points, strict=True)
        whole.plot(xs[:2], ys[:2], color=colour, linestyle=":", linewidth=1)
        whole.plot(xs[1:], ys[1:], **look, label=front.title(name))
        near.plot(xs[1:], ys[1:], **look)
        tops.append(max(xs))
    whole.plot(0, 0, color="black", marker="o", markersize=7, clip_on=False)
    whole.annotate("base", (0, 0), xytext=(6, 6), textcoords="offset points")
    whole.set_ylim(0, _top(front, kinds))
    near.set(yscale="log", xlim=(0.9 * max(tops), 1.005 * max(tops)), title="where most is learned")
    whole.set(title=title, ylabel=f"KL(base ‖ tuned) on {', '.join(kinds)}, nats a token")
    seeds = "" if len({*runs}) == 1 else f"; means over {min(runs)} to {max(runs)} seeds"
    for axes, more in ((whole, seeds), (near, "")):
        axes.set_xlabel(f"learned: fall of the held-out loss, nats a token{more}")
        plain(axes, grid=False)
    whole.legend(frameon=False, fontsize=8)
    return figure


def _points(front: Front, method: str, kinds: list[str]) -> list[tuple[float, float]]:
    """(learned, KL on these kinds) by a method's rates or scales in their order, means over seeds.

    That is the order in which :class:`Front` joins them.
    """
    value, found = kl_of(*kinds), _alike(front, method)
    return [
        (
            fmean(learned(record.end, record.task) for record in found[place]),
            fmean(value(record.end) for record in found[place]),
        )
        for place in sorted(found)
    ]


def draw_sequence(runs: Sequence[InTurn], title: str) -> Any:
    """A figure of tasks learned in turn: the loss of all of them against the KL, after the last.

    A marker a method, the mean over seeds, each of which is a small dot; lower and further left is
    better. A line joins one method at several strengths of what holds it. On the left all; on the
    right those that drift less than half as far as LoRA, with the strengths beside them.
    """
    figure_class = require("matplotlib.figure", "bench").Figure
    figure = figure_class(figsize=(11, 4.8), dpi=150, layout="constrained")
    whole, near = figure.subplots(1, 2)
    reference = [fmean(run.kl.values()) for run in runs if run.method == REFERENCE]
    edge = min(reference, default=math.inf) / 2
    methods: dict[tuple, list[InTurn]] = {}
    for run in sorted(runs, key=_how_hard):
        weaker = _STRENGTH.sub("", run.method).rstrip("@,")
        methods.setdefault((weaker, run.targets, run.rate, run.steps), []).append(run)
    for (method, targets, rate, steps), strengths in methods.items():
        shown = strengths[0].method if len(strengths) == 1 else method
        own = _IN_TURN.get(method) or _LOOKS.get(shown)
        colour, marker = own or _LOOKS.get(method, _OTHER)
        look = {"color": colour, "marker": marker, "markersize": 6}
        same = [key for key in methods if key[:2] == (method, targets) and key[3] == steps]
        at = f", rate {rate:g}" if len(same) > 1 else ""
        _draw_strengths(whole, strengths, label=f"{get_method(shown).title}{at}", **look)
        close = [run for run in strengths if fmean(run.kl.values()) < edge]
        _draw_strengths(near, close, **look)
        for run in close if len(strengths) > 1 else ():
            if held := _STRENGTH.search(run.method):
                place = fmean(run.kl.values()), fmean(run.loss.values())
                around = {"xytext": (5, -11), "textcoords": "offset points", "fontsize": 8}
                near.annotate(held[0].replace("=", " "), place, color=colour, **around)
    seeds = {len(run.kl) for run in runs}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    means = "one seed" if seeds == {1} else f"means over {count} seeds"
    whole.set(title=title, ylabel=f"held-out loss of all tasks, {means}")
    if reference:
        near.set(title="less than half of LoRA's KL")
    for axes in (whole, near):
        axes.set(xscale="log", xlabel="KL(base ‖ tuned) on old texts, nats a token")
        plain(axes, grid=False)
    whole.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def _how_hard(run: InTurn) -> tuple[float, float]:
    """By what the strengths of one method are in order."""
    method = get_method(run.method)
    return method.decay, method.strength


def _draw_strengths(axes: Any, runs: Sequence[InTurn], **look: Any) -> None:
    """Draws a method's seeds, and its means at each strength joined."""
    for run in runs:
        seeds = [(run.kl[seed], run.loss[seed]) for seed in run.kl]
        axes.plot(*zip(*seeds, strict=True), ".", color=look["color"], alpha=0.4, markersize=4)
    if runs:
        means = [(fmean(run.kl.values()), fmean(run.loss.values())) for run in runs]
        axes.plot(*zip(*means, strict=True), **look)


def _alike(front: Front, method: str) -> dict[tuple[float, float], list[Any]]:
    """Records of several seeds by rate and scale."""
    found: dict[tuple[float, float], list[Any]] = {}
    for records in front.runs[method].values():
        for record in records:
            place = record.cell.rate, get_method(record.cell.method).scale
            found.setdefault(place, []).append(record)
    return found


def _top(front: Front, kinds: list[str]) -> float:
    """Where the picture ends: twice the reference's worst, so that a ruined model bends no axis."""
    worst = max(kl_of(*kinds)(r.end) for records in front.runs["lora"].values() for r in records)
    return 2 * worst


__all__ = ["draw_front", "draw_sequence"]
