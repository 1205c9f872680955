"""Pictures of a layer result, as SVG beside it: speed by T, memory, roofline.

The same results give the same files, byte for byte, with one version of matplotlib.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from .schema import Result

RESULTS = Path(__file__).parent / "results"
KINDS = ("speed", "memory", "roofline")
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


def layer_plots(name: str) -> list[Path]:
    """Where the plots of result ``name`` stand."""
    return [RESULTS / f"{name}-{kind}.svg" for kind in KINDS]


def draw_all(results: Path) -> list[Path]:
    """Draw every layer result of a folder; files that would not change are left alone."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is missing (pip install 'secura[bench]'): no plots", file=sys.stderr)
        return []
    drawn = []
    style = {"svg.hashsalt": "secura", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        for path in sorted(results.glob("layer-*.json")):
            result = Result.load(path)
            for kind, draw in (("speed", speed), ("memory", memory), ("roofline", roofline)):
                figure = draw(result)
                if figure is None:
                    continue
                target = path.with_name(f"{path.stem}-{kind}.svg")
                _save(figure, target)
                drawn.append(target)
    return drawn


def speed(result: Result) -> Any:
    """Forward + backward against the frozen layer, by T; None where only one T was measured."""
    from .report import groups, summed

    model = result.rows[0].case["model"] if result.rows else None
    curves: dict[str, dict[int, float]] = {}
    for (of, t, _, _), providers in groups(result).items():
        good = {name: rows for name, rows in providers.items() if _measured(rows)}
        if of != model or "frozen" not in good:
            continue
        floor = summed(good["frozen"])["time"]["both"]["median"]
        for name, rows in good.items():
            ratio = summed(rows)["time"]["both"]["median"] / floor
            curves.setdefault(name, {}).setdefault(t, ratio)
    if max((len(curve) for curve in curves.values()), default=0) < 2:
        return None
    first = result.rows[0].case
    what = f"{first['K']}→{first['N']}" if model == "square" else f"the projections of {model}"
    figure, axes = _figure(f"Forward + backward over the frozen layer's: {what}", result)
    for name, curve in curves.items():
        tokens = sorted(curve)
        values = [curve[t] for t in tokens]
        colour, dash = _colour(name), _dash(name)
        axes.plot(tokens, values, dash, color=colour, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.set_xlabel("tokens T")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def memory(result: Result) -> Any:
    """Bars of what each provider saves for its backward pass, at the headline T."""
    from .report import groups, headline_t, summed

    bars: dict[str, float] = {}
    for (_, t, _, _), providers in groups(result).items():
        if t == headline_t(result) and not bars:
            for name, rows in providers.items():
                if _measured(rows):
                    bars[name] = summed(rows)["saved_mib"]
    if not bars:
        return None
    figure, axes = _figure("Saved for the backward pass, MiB", result)
    names = list(bars)[::-1]
    places = axes.barh(names, [bars[name] for name in names], color=[_colour(n) for n in names])
    axes.bar_label(places, fmt="%.1f", padding=3, fontsize=7)
    axes.margins(x=0.1)
    return figure


def roofline(result: Result) -> Any:
    """Achieved TFLOP/s over operations per byte, under the two ceilings measured there."""
    points = [row for row in result.rows if row.status == "ok"]
    if not points:
        return None
    copy, gemm = result.ceilings["copy_gb_s"], result.ceilings["gemm_tflop_s"]
    figure, axes = _figure("Roofline: forward + backward", result)
    seen: set[str] = set()
    intensities = []
    for row in points:
        figures = row.figures
        intensity = figures["both_gflop"] * 1e9 / (figures["both_moved_mib"] * 2**20)
        intensities.append(intensity)
        rate = figures["both_gflop"] / figures["both_ms"]["median"]
        label = None if row.provider in seen else row.provider
        seen.add(row.provider)
        axes.plot(intensity, rate, "o", color=_colour(row.provider), markersize=4, label=label)
    knee = gemm * 1e3 / copy
    edges = [min([*intensities, knee]) / 2, knee, max([*intensities, knee]) * 2]
    axes.plot(edges, [edges[0] * copy / 1e3, gemm, gemm], color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte, by formula")
    axes.set_ylabel("TFLOP/s")
    _legend(axes)
    return figure


def _measured(rows: list) -> bool:
    return all(row.status == "ok" for row in rows)


def _colour(name: str) -> str:
    return next((value for start, value in COLOURS.items() if name.startswith(start)), "#888888")


def _dash(name: str) -> str:
    return next((dash for part, dash in DASHES.items() if part in name), "-")


def _figure(title: str, result: Result) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    where = f"{result.machine['name']}, {result.dtype}, commit {result.commit}"
    axes.set_title(f"{title}\n{where}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _save(figure: Any, path: Path) -> None:
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    lines = content.getvalue().splitlines()
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


__all__ = ["COLOURS", "draw_all", "layer_plots", "memory", "roofline", "speed"]
