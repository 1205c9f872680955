"""Pictures of results, as SVG beside them: layers' speed by T and memory; models' steps.

The same results give the same files, byte for byte, with one version of matplotlib.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from secura._extras import how_to_install

from .schema import Result
from .tables import groups, headline_t, sums

KINDS = {"layer": ("speed", "memory"), "landing": ("share",)}
"""Of the benchmarks whose plots stand below their tables."""
COLOURS = {
    "frozen": "#444444",
    "secura none": "#89C2D9",
    "secura channel": "#2A6F97",
    "secura activation": "#468FAF",
    "secura weight": "#012A4A",
    "released": "#9D0208",
    "peft lora": "#D98324",
    "peft dora": "#8F5BB5",
    "strong lora": "#F2B134",
    "strong dora": "#C9A0DC",
}
DASHES = {"reference": "--", "compiled": ":", "dropout": "-."}


def plots_of(benchmark: str, path: Path) -> list[Path]:
    """Where the plots of the result at ``path`` stand, its suffix left out."""
    return [path.with_name(f"{path.name}-{kind}.svg") for kind in KINDS[benchmark]]


def draw_all(results: Path) -> list[Path]:
    """Draw every layer and model result of a folder; files that would not change are left alone."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is missing ({how_to_install('bench')}): no plots", file=sys.stderr)
        return []
    drawn = []
    style = {"svg.hashsalt": "secura", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        pictures = {
            "layer": {"speed": speed, "memory": memory},
            "model": {"steps": steps},
            "landing": {"share": share},
        }
        for path in sorted(results.glob("*.json")):
            for kind, draw in pictures.get(path.name.partition("-")[0], {}).items():
                figure = draw(Result.load(path))
                if figure is None:
                    continue
                target = path.with_name(f"{path.stem}-{kind}.svg")
                _save(figure, target)
                drawn.append(target)
    return drawn


def plain(axes: Any, *, grid: bool = True) -> None:
    """Leave out the upper and the right edge of axes; draw a pale grid behind what they show."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)


def write_png(figure: Any, path: Path) -> None:
    """Write a figure as a PNG; the same figure gives the same bytes."""
    figure.savefig(path, metadata={"Software": None})


def speed(result: Result) -> Any:
    """Forward + backward against the frozen layer, by T; None where only one T was measured.

    Where there are CUDA graphs one panel shows their replays and one what an eager call takes.
    """
    graphs = any("both_graph_ms" in row.figures for row in result.rows)
    panels = {"both": "eager: what the host adds included"} if graphs else {"both": ""}
    if graphs:
        panels = {"both_graph": "CUDA graph: the GPU's time alone", **panels}
    curves = {phase: _over_frozen(result, phase) for phase in panels}
    if max((len(one) for found in curves.values() for one in found.values()), default=0) < 2:
        return None
    first = result.rows[0].case
    square = first["model"] == "square"
    what = f"{first['K']}→{first['N']}" if square else f"the projections of {first['model']}"
    title = f"Forward + backward over the frozen layer's: {what}"
    figure, axes = _figure(title, result, len(panels))
    for panel, (phase, label) in zip(axes, panels.items(), strict=True):
        for name, curve in curves[phase].items():
            tokens = sorted(curve)
            values = [curve[t] for t in tokens]
            colour, dash = _colour(name), _dash(name)
            panel.plot(tokens, values, dash, color=colour, marker="o", markersize=3, label=name)
            panel.set_xscale("log", base=2)
            panel.set_xticks(tokens, [str(t) for t in tokens])
        panel.set_xlabel(f"tokens T\n{label}".rstrip())
        panel.set_ylim(bottom=0)
    _legend(axes[-1])
    return figure


def _over_frozen(result: Result, phase: str) -> dict[str, dict[int, float]]:
    """A phase's time over the frozen layer's, by provider and T, of the first model."""
    model = result.rows[0].case["model"] if result.rows else None
    curves: dict[str, dict[int, float]] = {}
    for (of, t, _, _), providers in groups(result).items():
        good = {name: whole["time"] for name, whole in sums(providers).items()}
        if of != model or phase not in good.get("frozen", {}):
            continue
        floor = good["frozen"][phase]["median"]
        for name, times in good.items():
            if phase in times:
                curves.setdefault(name, {}).setdefault(t, times[phase]["median"] / floor)
    return curves


def steps(result: Result) -> Any:
    """Bars of tokens per second and of peak memory of a model's training steps, by setting."""
    good = [row for row in result.rows if row.status == "ok"]
    cases = list({str(row.case): row.case for row in good}.values())
    if not cases:
        return None
    first = cases[0]
    title = f"Training steps: {first['blocks']} blocks of {first['model']}, all linears"
    title = title if first["targets"] == "all" else title.replace("all linears", first["targets"])
    figure, axes = _figure(title, result, 2)
    names = list(dict.fromkeys(row.provider for row in good))[::-1]
    height = 0.8 / len(names)
    shown = (
        ("tokens per second", "tokens_per_s", 1.0),
        ("peak above the weights, GiB", "peak_mib", 1024.0),
    )
    for panel, (label, figure_name, unit) in zip(axes, shown, strict=True):
        for index, name in enumerate(names):
            rows = [row for row in good if row.provider == name]
            places = [len(cases) - cases.index(row.case) + index * height for row in rows]
            values = [row.figures[figure_name] / unit for row in rows]
            bars = panel.barh(places, values, height, color=_colour(name), label=name)
            panel.bar_label(bars, fmt="%.0f" if unit == 1 else "%.1f", padding=2, fontsize=6)
        middle = height * (len(names) - 1) / 2
        settings = [_setting(case) for case in cases]
        panel.set_yticks([len(cases) - i + middle for i in range(len(cases))], settings)
        panel.set_xlabel(label)
        panel.margins(x=0.12)
    axes[1].set_yticklabels([])
    handles, labels = axes[0].get_legend_handles_labels()
    axes[1].legend(
        handles[::-1],
        labels[::-1],
        fontsize=7,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
    )
    return figure


def _setting(case: dict[str, Any]) -> str:
    text = f"{case['batch']} × {case['sequence']}"
    return f"{text}\ncheckpointed" if case["checkpointing"] else text


def memory(result: Result) -> Any:
    """Bars of what each provider saves for its backward pass, at the headline T."""
    bars: dict[str, float] = {}
    for (_, t, _, _), providers in groups(result).items():
        if t == headline_t(result) and not bars:
            bars = {name: whole["saved_mib"] for name, whole in sums(providers).items()}
    if not bars:
        return None
    figure, (axes,) = _figure("Saved for the backward pass, MiB", result)
    names = list(bars)[::-1]
    places = axes.barh(names, [bars[name] for name in names], color=[_colour(n) for n in names])
    axes.bar_label(places, fmt="%.1f", padding=3, fontsize=7)
    axes.margins(x=0.1)
    return figure


def share(result: Result) -> Any:
    """The share of a small change's effect that the output shows, by the change's size."""
    figure, (axes,) = _figure("Of ΔW's effect there arrives in the output", result)
    curves: dict[str, dict[float, float]] = {}
    for row in result.rows:
        if row.status == "ok":
            curves.setdefault(row.provider, {})[row.case["change"]] = row.figures["share"]
    for name, curve in curves.items():
        axes.plot(
            list(curve),
            list(curve.values()),
            "-" if "stochastic" in name else "--",
            color=_colour(name),
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("‖ΔW‖ / ‖W‖")
    axes.set_ylim(0, 1.15)
    _legend(axes)
    return figure


def _colour(name: str) -> str:
    return next((value for start, value in COLOURS.items() if name.startswith(start)), "#888888")


def _dash(name: str) -> str:
    return next((dash for part, dash in DASHES.items() if part in name), "-")


def _figure(title: str, result: Result, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    where = f"{result.machine['name']}, {result.dtype}, commit {result.commit}"
    figure.suptitle(f"{title}\n{where}", fontsize=10)
    for axes in all_axes:
        plain(axes)
    return figure, all_axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _save(figure: Any, path: Path) -> None:
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    lines = content.getvalue().splitlines()
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
