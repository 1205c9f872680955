"""The demo's picture: what was learned step by step, and what it cost elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"lora": "#D98324", "secura": "#2A6F97"}
BASE_COLOUR = "#444444"
SMOOTHING = 0.85


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average of `values`, without the start's bias."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(mean / weight)
    return out


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the PNG of a run's `results` (the content of `results.json`) to `path`."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    curves, plane = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _draw_curves(curves, results)
    _draw_plane(plane, results)
    for axes in (curves, plane):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    model = results["assets"][0]["title"]
    figure.suptitle(
        f"{model} on GSM8K, {results['plan']['steps']} steps of {results['settings']['batch_size']}"
        f" on {results['hardware']['threads']} CPU threads",
        fontsize=12,
    )
    figure.savefig(path)


def _draw_curves(axes: Axes, results: dict[str, Any]) -> None:
    for name, method in results["methods"].items():
        losses = method["train_losses"]
        steps = range(1, len(losses) + 1)
        colour = COLOURS[name]
        axes.plot(steps, losses, color=colour, alpha=0.22, linewidth=1)
        axes.plot(steps, smoothed(losses), color=colour, linewidth=2, label=method["title"])
        evaluated = [(point["step"], point["gsm8k"]) for point in method["evaluations"]]
        axes.plot(*zip(*evaluated, strict=True), "o", color=colour, markersize=7, mec="white")
    axes.plot(0, results["base"]["gsm8k"], "*", color=BASE_COLOUR, markersize=13, mec="white")
    axes.plot([], [], "o", color="#888888", mec="white", label="held-out loss")
    axes.plot([], [], "*", color=BASE_COLOUR, markersize=11, mec="white", label="held-out, base")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Learning: GSM8K answers")
    axes.legend(frameon=False)


def _draw_plane(axes: Axes, results: dict[str, Any]) -> None:
    base = results["base"]
    for name, method in results["methods"].items():
        points = [base, *method["evaluations"]]
        path = [(point["gsm8k"], point["news"]) for point in points]
        axes.plot(*zip(*path, strict=True), "-o", color=COLOURS[name], markersize=5, linewidth=2)
        axes.plot(*path[-1], "o", color=COLOURS[name], markersize=11, mec="white")
        rising = path[-1][1] > path[-2][1]
        axes.annotate(
            method["title"],
            path[-1],
            xytext=(0, 11 if rising else -11),
            textcoords="offset points",
            ha="center",
            va="bottom" if rising else "top",
            color=COLOURS[name],
            weight="bold",
        )
    axes.axhline(base["news"], color=BASE_COLOUR, linewidth=1, linestyle=":", zorder=1)
    axes.plot(base["gsm8k"], base["news"], "*", color=BASE_COLOUR, markersize=16, mec="white")
    axes.annotate("base", (base["gsm8k"], base["news"]), (-12, 10), textcoords="offset points")
    axes.margins(0.18, 0.25)
    axes.invert_xaxis()
    axes.set(
        xlabel="held-out GSM8K loss (further right: learned more)",
        ylabel="loss on news (lower: kept more)",
        title="Retention: what learning cost elsewhere",
    )
