"""The report's pictures: PNGs of 900 pixels' width at twice the resolution.

The same records give the same bytes with one version of matplotlib. The SECURA family is blue; the
other methods' colours stay apart for colour-blind eyes, and every method has a marker of its own.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from secura._extras import require
from secura.experiments.estimates import Estimate, estimate, mean
from secura.experiments.summary import Entry, Record, Run

WIDTH = 9.0  # inches, of 100 pixels each
STYLE = {"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11}
GREY = "#555555"
LOOKS: dict[str, tuple[str, str]] = {
    "lora": ("#E08A00", "o"),
    "dora": ("#B5421B", "p"),
    "cur-lora": ("#C2569B", "X"),
    "cabr": ("#6BA8DC", "D"),
    "secura-weight": ("#0B2F57", "^"),
    "secura-weight-paper-gated": ("#7A3FA8", "^"),
    "secura-channel": ("#1F6FB2", "s"),
    "secura-activation": ("#2E94D6", "v"),
    "i-lora": ("#00875F", "P"),
    "full": (GREY, "h"),
}
PARTS = {
    "A": ("A", "#1F6FB2"),
    "B": ("B", "#E08A00"),
    "lora_A": ("A", "#1F6FB2"),
    "lora_B": ("B", "#E08A00"),
    "lora_magnitude": ("m", GREY),
    "weights": ("W", GREY),
}
NEAR_ZERO = 0.1  # nats a token
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_LAYER = re.compile(r"\.(\d+)\.")
_SIDES = [(x, y) for y in (1, -1, 0) for x in (1, -1, 0) if (x, y) != (0, 0)]


class Point(NamedTuple):
    """A method at one rate: what it learned (`x`) and kept (`y`)."""

    rate: float
    x: Estimate
    y: Estimate


def frontier(run: Run) -> Any:
    """What is kept against what was learned: a line a method, a point a rate."""
    figure, (text, probes) = _figure(4.9, 1, 2)
    task = run.tasks[0]
    measures: list[tuple[Any, Callable[[Record], float | None], float]] = [
        (text, run.text_rise, 0.0),
        (probes, run.retention, 1.0),
    ]
    text.set(title="General text", ylabel="rise of its loss (nats a token)")
    text.invert_yaxis()
    probes.set(title="Basic knowledge", ylabel="share of the base model's score")
    probes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.suptitle("Further up: kept more. Further right: learned more.", weight="bold")
    figure.supxlabel(
        f"learned: fall of the held-out loss on {task} (nats a token); a point a learning rate, "
        f"the large one {run.rate:g}",
        fontsize=10,
    )
    drawn = [
        (axes, _draw_lines(axes, _lines(run, task, kept), run.rate, base))
        for axes, kept, base in measures
    ]
    _stretch(text)
    figure.draw_without_rendering()
    for axes, points in drawn:
        _label(axes, points)
    return figure


def change_by_layer(run: Run) -> Any:
    """How much each layer's weight changed, a panel a kind of layer, a line a method."""
    task, kinds = run.tasks[0], _kinds(run)
    figure, panels = _figure(2.6 * len(kinds) + 0.5, len(kinds), 1)
    for axes, kind in zip(panels, kinds, strict=True):
        ends = []
        for entry in run.entries():
            changes: dict[int, list[float]] = {}
            for seed in run.seeds:
                record = run.record(entry.name, (task,), run.rate, seed)
                for weight in record.get("spectra", ()) if record else ():
                    if weight["name"].endswith(kind) and (match := _LAYER.search(weight["name"])):
                        changes.setdefault(int(match[1]), []).append(weight["change"])
            if not changes:
                continue
            layers = sorted(changes)
            means = [mean(changes[layer]) for layer in layers]
            colour, marker = look(entry.name)
            axes.plot(layers, means, color=colour, marker=marker, markersize=4, linewidth=1.4)
            ends.append((means[-1], _short(entry), colour))
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=kind, ylabel="‖ΔW‖ / ‖W‖ (log)")
        _label_ends(axes, ends)
    panels[-1].set_xlabel("decoder layer")
    return figure


def gradient_norms(run: Run) -> Any:
    """The gradients' norms step by step: a panel a method, a line a part, a band over seeds."""
    entries = [(entry, norms) for entry in run.entries() if (norms := _norms(run, entry))]
    columns = 3
    rows = math.ceil(len(entries) / columns)
    figure, panels = _figure(2.0 * rows + 0.8, rows, columns, sharex=True, sharey=True)
    for axes in panels[len(entries) :]:
        axes.set_visible(False)
    for axes, (entry, norms) in zip(panels, entries, strict=False):
        for part, curves in norms.items():
            steps = range(1, len(curves[0]) + 1)
            at_step = list(zip(*curves, strict=True))
            name, colour = PARTS.get(part, (part, GREY))
            means = [mean(values) or math.nan for values in at_step]  # a log axis has no 0
            axes.plot(steps, means, color=colour, linewidth=1.5)
            bounds = [min(v) for v in at_step], [max(v) for v in at_step]
            axes.fill_between(steps, *bounds, color=colour, alpha=0.2, linewidth=0)
            axes.annotate(
                name, (steps[-1], means[-1]), xytext=(4, 0), textcoords="offset points",
                va="center", color=colour, fontsize=9, weight="bold", annotation_clip=False,
            )  # fmt: skip
        axes.set_title(_short(entry), fontsize=9)
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=True)
    figure.supxlabel(
        "step (A, B: the adapter's factors, m: DoRA's magnitudes, W: all weights)", fontsize=10
    )
    figure.supylabel("L2 norm of the gradients (log)", fontsize=10)
    return figure


def sequence_maps(
    run: Run, figure_of: Callable[[Record, str], float], *, lower_is_better: bool
) -> Any:
    """Every task after every training stage: a map a method, coloured by change from the base."""
    entries = run.entries(len(run.tasks))
    found = {entry: _mean_matrix(run, entry.name, figure_of) for entry in entries}
    maps = {entry: matrix for entry, matrix in found.items() if matrix}
    base = [figure_of(run.base, task) for task in run.tasks] if run.base else None
    columns = 4
    rows = math.ceil(len(maps) / columns)
    height = 0.3 * (len(run.tasks) + 1) + 0.75
    figure, panels = _figure(height * rows + 0.6, rows, columns, sharex=True, sharey=True)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    sign = -1 if lower_is_better else 1
    start = base or [0.0] * len(run.tasks)
    changes = {
        entry: [[sign * (v - b) for v, b in zip(row, start, strict=True)] for row in matrix]
        for entry, matrix in maps.items()
    }
    gains = [matrix[i][i] for matrix in changes.values() for i in range(len(start))]
    limit = max([gain for gain in gains if gain > 0], default=1.0)
    for axes, (entry, matrix) in zip(panels, maps.items(), strict=False):
        shown = [[0.0] * len(start), *changes[entry]] if base else changes[entry]
        values = [base, *matrix] if base else matrix
        axes.imshow(shown, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        _annotate(axes, values, shown, limit, first=len(values) - len(matrix))
        names = ["base"] * bool(base) + [f"+ {task}" for task in run.tasks]
        axes.set_yticks(range(len(values)), names, fontsize=8)
        axes.set_xticks(range(len(run.tasks)), run.tasks, fontsize=8)
        axes.set_title(entry.title, fontsize=9)
        axes.tick_params(length=0, labelbottom=True)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    figure.supylabel("after training on", fontsize=10)
    figure.supxlabel("scored on (framed: just trained; blue: better than the base)", fontsize=10)
    return figure


def png(draw: Callable[..., Any], *arguments: Any, **keywords: Any) -> bytes:
    """A picture's file, the same bytes for the same picture."""
    with require("matplotlib", "experiments").rc_context(STYLE):
        figure = draw(*arguments, **keywords)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=200, metadata={"Software": None})
    return content.getvalue()


def look(name: str) -> tuple[str, str]:
    """A method's colour and marker: its own, or those of what its name begins with."""
    parts = name.split("-")
    begins = ("-".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((LOOKS[start] for start in begins if start in LOOKS), (GREY, "."))


def _figure(height: float, rows: int, columns: int, **sharing: bool) -> tuple[Any, list[Any]]:
    """An empty figure and its panels, row by row."""
    figure = require("matplotlib.figure", "experiments").Figure(
        (WIDTH, height), layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "experiments").FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, **sharing).ravel().tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E2E2E2", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _lines(run: Run, task: str, kept: Callable[[Record], float | None]) -> dict[Entry, list[Point]]:
    """Every method's points, lowest rate first, those alone that have both figures."""
    found = {}
    for entry in run.entries():
        points = [
            Point(
                rate,
                estimate(run.over_seeds(entry.name, (task,), rate, lambda r: run.learned(r, task))),
                estimate(run.over_seeds(entry.name, (task,), rate, kept)),
            )
            for rate in run.rates(entry.name)
        ]
        found[entry] = [point for point in points if point.x.values and point.y.values]
    return {entry: points for entry, points in found.items() if points}


def _draw_lines(
    axes: Any, lines: Mapping[Entry, Sequence[Point]], rate: float, base: float
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Draws the lines within what is worth showing; returns each label's line, as points."""
    furthest = max((p.x.mean for points in lines.values() for p in points), default=1.0)
    edge = -0.3 * max(furthest, 1e-3)
    places: dict[tuple[str, str], list[tuple[float, float]]] = {}
    outside = []
    axes.axhline(base, color="#999999", linewidth=1, linestyle=":", zorder=1)
    for entry, points in lines.items():
        colour, marker = look(entry.name)
        places[_short(entry), colour] = inside = []
        for point in points:
            x, y = point.x.mean, point.y.mean
            if x < edge:
                outside.append(f"{_short(entry)} at {point.rate:g} ({x:+.2g}, {y:+.2g})")
                continue
            axes.errorbar(
                x, y, yerr=point.y.half_width, xerr=point.x.half_width, color=colour,
                marker=marker, markersize=9 if point.rate == rate else 5.5,
                markeredgecolor="white", elinewidth=0.8, zorder=3,
            )  # fmt: skip
            inside.append((x, y))
        axes.plot(*zip(*inside, strict=True) if inside else ((), ()), color=colour, linewidth=1.5)
    axes.plot(0, base, "*", color="black", markersize=13, markeredgecolor="white", zorder=5)
    places["base", "black"] = [(0.0, base)]
    places = {label: inside for label, inside in places.items() if inside}
    axes.margins(x=0.1, y=0.12)
    if outside:
        axes.set_xlabel(f"far to the left: {'; '.join(outside)}", fontsize=7.5, color=GREY)
    return places


def _stretch(axes: Any) -> None:
    """Makes an axis of rises that differ widely logarithmic, but for those near zero."""
    if max(map(abs, axes.get_ylim())) < 3 * NEAR_ZERO:
        return
    axes.set_yscale("symlog", linthresh=NEAR_ZERO, linscale=1.5)
    axes.autoscale_view(scalex=False)
    low, high = sorted(axes.get_ylim())
    axes.set_yticks([tick for tick in (0, *TICKS, *(-t for t in TICKS)) if low < tick < high])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel(f"{axes.get_ylabel()}, log above {NEAR_ZERO:g}")


def _label(axes: Any, places: Mapping[tuple[str, str], Sequence[tuple[float, float]]]) -> None:
    """Writes each line's name beside one of its points, where it covers least."""
    effects = require("matplotlib.patheffects", "experiments")
    halo = effects.withStroke(linewidth=2.5, foreground="white")
    style = {"weight": "bold", "fontsize": 9, "zorder": 6, "path_effects": [halo]}
    renderer, point = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    inked = np.array([mark for line in places.values() for mark in _inked(axes, line)])
    taken: list[Any] = []
    for (title, colour), line in places.items():
        probe = axes.text(0, 0, title, **style)
        size = np.array(probe.get_window_extent(renderer).size)
        probe.remove()
        trials: list[tuple[Any, ...]] = []
        for place, distance, side in product(reversed(line), (8, 14, 20, 28, 36), _SIDES):
            start = axes.transData.transform(place) + point * distance * np.array(side)
            low = start - size * [(0.5, 0, 1)[at] for at in side]
            covered = ((inked >= low) & (inked <= low + size)).all(axis=1).sum()
            hidden = sum(
                (low < other + other_size).all() and (other < low + size).all()
                for other, other_size in taken
            )
            outside = (low < axes.bbox.min).any() or (low + size > axes.bbox.max).any()
            cost = covered + 40 * hidden + 60 * outside + distance / 3
            trials.append((cost, len(trials), low, place, distance, side))
        _, _, low, place, distance, side = min(trials)
        taken.append((low, size))
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7}
        axes.annotate(
            title, place, xytext=(distance * side[0], distance * side[1]), color=colour,
            textcoords="offset points", ha=("center", "left", "right")[side[0]],
            va=("center", "bottom", "top")[side[1]], arrowprops=leader if distance > 8 else None,
            **style,
        )  # fmt: skip


def _inked(axes: Any, line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places all along a line through points, in pixels; its points count more."""
    corners = [tuple(axes.transData.transform(point)) for point in line]
    found = 6 * corners
    for (x, y), (next_x, next_y) in pairwise(corners):
        steps = 1 + int(math.hypot(next_x - x, next_y - y) / 5)
        found += [
            (x + (next_x - x) * step / steps, y + (next_y - y) * step / steps)
            for step in range(steps)
        ]
    return found


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's name right of its last point, in order and apart from the others."""
    low, high = axes.get_ylim()
    ordered = sorted(ends)
    gap = min(0.09, 1 / max(len(ordered), 1))
    places: list[float] = []
    for value, *_ in ordered:
        at = math.log(max(value, low) / low) / math.log(high / low)
        places.append(max(at, places[-1] + gap) if places else at)
    top = 1.0
    for index in reversed(range(len(places))):
        places[index] = top = min(places[index], top)
        top -= gap
    for at, (_, title, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            title, (1.01, at), xycoords="axes fraction", color=colour, weight="bold",
            va="center", fontsize=8.5,
        )  # fmt: skip


def _short(entry: Entry) -> str:
    """A title for a picture of one task, where M1 and M2 are one."""
    return entry.title.partition(" = ")[0].removesuffix(" M1").removesuffix(" (SEQ)")


def _kinds(run: Run) -> list[str]:
    """The last parts of the adapted weights' names, such as ``q_proj``."""
    records = (r for r in run.records.values() if r.get("spectra"))
    return list(dict.fromkeys(w["name"].rpartition(".")[2] for r in records for w in r["spectra"]))


def _norms(run: Run, entry: Entry) -> dict[str, list[Sequence[float]]]:
    """Curves by part, one a seed."""
    found: dict[str, list[Sequence[float]]] = {}
    for seed in run.seeds:
        record = run.record(entry.name, run.tasks[:1], run.rate, seed)
        for part, curve in record["training"]["gradient_norm_by_part"].items() if record else ():
            found.setdefault(part, []).append(curve)
    return found


def _mean_matrix(
    run: Run, name: str, figure_of: Callable[[Record, str], float]
) -> list[list[float]]:
    """The matrix of a sequence, the mean of the seeds that completed it; empty without any."""
    matrices = run.matrices(name, figure_of).values()
    return [
        [mean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]


def _annotate(
    axes: Any, values: Sequence[Sequence[float]], shown: Sequence[Sequence[float]], limit: float,
    first: int,
) -> None:  # fmt: skip
    rectangle = require("matplotlib.patches", "experiments").Rectangle
    for row, (numbers, colours) in enumerate(zip(values, shown, strict=True)):
        for column, (number, change) in enumerate(zip(numbers, colours, strict=True)):
            colour = "white" if abs(change) > 0.6 * limit else "black"
            axes.text(column, row, f"{number:.2f}", ha="center", va="center", color=colour, size=8)
        if row >= first:
            corner = (row - first - 0.5, row - 0.5)
            axes.add_patch(rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.3))


__all__ = ["change_by_layer", "frontier", "gradient_norms", "png", "sequence_maps"]
