"""The pages' tables, and the plots, from the committed results alone.

    python -m benchmarks.report            # rewrite the tables between the pages' markers, plots
    python -m benchmarks.report --check    # exit 1 where the tables differ from the results

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a file in
``benchmarks/results`` (``layer-cpu``, ``model-h200``, …; ``demo-*`` is the demo's results.json), or
``retention-<stage>-<place>``, a stage of the retention experiment there, or the same and
``-brief``, less of it; ``scale`` is what :mod:`benchmarks.scale` counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from . import markdown, scale
from .count_tables import counts_table, landing_model_table, landing_table, memory_table
from .machine import ROOT
from .plots import draw_all, plots_of
from .rates import rates_table
from .retention.front_report import brief_table, main_table
from .retention.record import read_all
from .retention.summary import Front
from .schema import Result
from .tables import NOT_YET, anchor_table, layer_table, model_table, startup_table

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "kernels", "scale")),
)

TABLES = {
    "layer": layer_table,
    "model": model_table,
    "startup": startup_table,
    "anchor": anchor_table,
    "memory": memory_table,
    "counts": counts_table,
    "landing": landing_table,
    "landing_model": landing_model_table,
    "rates": rates_table,
}
"""By the benchmark whose result they show."""

_MARKED = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo_table(result: dict[str, Any]) -> str:
    """Losses and costs of the demo."""
    base, settings, plan = result["base"], result["settings"], result["plan"]
    head = ["", "GSM8K, held out", "news text", "trainable", "adapter file", "seconds a step"]
    rows = [["base model", f"{base['gsm8k']:.3f}", f"{base['news']:.3f}", "", "", ""]]
    for name in ("lora", "secura"):
        method = result["methods"][name]
        last = method["evaluations"][-1]
        rows.append(
            [
                f"{method['title']}, lr {method['learning_rate']:g}",
                f"{last['gsm8k']:.3f}",
                f"{last['news']:.3f}",
                f"{method['trainable_parameters']:,}",
                f"{method['adapter_bytes'] / 1e6:.1f} MB",
                f"{method['seconds_per_step']:.2f}",
            ]
        )
    hardware = result["hardware"]
    caption = (
        f"Cross-entropy, lower is better. {result['assets'][0]['title']} "
        f"({result['assets'][0]['note']}), {plan['steps']} steps of batch "
        f"{settings['batch_size']} on {' and '.join(settings['target_modules'])}, {plan['dtype']}, "
        f"one seed; {hardware['name']}, {hardware['threads']} threads; {result['seconds']:.0f} "
        "seconds in all; `make demo`."
    )
    return f"{markdown.table(head, rows)}\n\n{caption}\n"


def retention_table(results: Path, name: str) -> str:
    """What methods keep where each learned as much, of a stage and a place."""
    _, stage, targets, *brief = name.split("-")
    folder = results / "retention" / stage
    if not folder.is_dir():
        return NOT_YET
    front = Front(read_all(folder), targets)
    return f"{brief_table(front) if brief else main_table(front)}\n"


def table(name: str, results: Path = RESULTS) -> str:
    """The table of one result file, its plots below; says so where there is none yet."""
    if name == "scale":
        return scale.table()
    if name.startswith("retention-"):
        return retention_table(results, name)
    path = results / f"{name}.json"
    if not path.exists():
        return NOT_YET
    if name.startswith("demo"):
        return demo_table(json.loads(path.read_text(encoding="utf-8")))
    result = Result.load(path)
    found = TABLES[result.benchmark](result)
    if result.benchmark in ("layer", "landing"):
        images = [image for image in plots_of(result.benchmark, RESULTS / name) if image.exists()]
        found += "".join(f"![{of.stem}](../{of.relative_to(ROOT).as_posix()})\n" for of in images)
    return found


def render(text: str, results: Path = RESULTS) -> str:
    """``text`` with every marked table made anew."""
    return _MARKED.sub(lambda match: f"{match[1]}{table(match['name'], results)}{match[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, report differences")
    check = parser.parse_args(arguments).check
    if not check:
        draw_all(RESULTS)
    differs = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = render(text)
        if made == text:
            continue
        if check:
            name = page.relative_to(ROOT).as_posix()
            print(f"{name} differs from benchmarks/results: run make table", file=sys.stderr)
            differs = True
        else:
            page.write_text(made, encoding="utf-8")
    if differs:
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
