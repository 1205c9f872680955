"""The README's tables and the plots, made from the committed results alone.

    python -m benchmarks.report            # rewrite the tables between the README's markers, plots
    python -m benchmarks.report --check    # exit 1 where the tables differ from the results

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a file in
``benchmarks/results`` (``layer-cpu``, ``model-h200``, …; ``demo-*`` is the demo's results.json), or
a results folder of ``secura experiment`` there (``retention-small``).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .retention import is_there, retention_table
from .schema import Result, Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
NOT_YET = "*Not measured yet.*\n"

_MARKED = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def baseline(providers: list[str], dtype: str) -> str | None:
    """What ratios are against: PEFT's LoRA with adapters in the compute dtype, or what is there."""
    names = (f"peft lora {dtype}", "peft lora fp32", "strong lora", "frozen")
    return next((name for name in names if name in providers), None)


def title(provider: str, case: dict[str, Any]) -> str:
    """A provider's name in a table, with its rank."""
    for short, long in (("peft", "PEFT"), ("secura", "SECURA"), ("lora", "LoRA"), ("dora", "DoRA")):
        provider = re.sub(rf"\b{short}\b", long, provider)
    if provider.startswith(("SECURA", "released", "svd")):
        return f"{provider}, m={case['m']}"
    return provider if provider == "frozen" else f"{provider}, r={case['r']}"


def summed(rows: list[Row]) -> dict[str, Any]:
    """One provider's figures over the layers of a decoder block, each as often as it is there.

    ``{"time": {phase: {"median", "q20", "q80"}}, "saved_mib", "peak_mib", "gflop", "moved_mib"}``.
    Everything adds up (quantiles too, which overstates the spread of a sum) but the peaks, of which
    the largest stands. A phase but ``both`` is there where every layer has it.
    """
    phases = ["both"]
    for phase in ("forward", "backward", "both_graph"):
        if all(f"{phase}_ms" in row.figures for row in rows):
            phases.append(phase)
    return {
        "time": {
            phase: {
                key: sum(row.figures[f"{phase}_ms"][key] * row.case["count"] for row in rows)
                for key in ("median", "q20", "q80")
            }
            for phase in phases
        },
        "saved_mib": sum(row.figures["saved_mib"] * row.case["count"] for row in rows),
        "peak_mib": max((row.figures["peak_mib"] for row in rows), default=0),
        "gflop": sum(row.figures["both_gflop"] * row.case["count"] for row in rows),
        "moved_mib": sum(row.figures["both_moved_mib"] * row.case["count"] for row in rows),
    }


def shares(sums: dict[str, Any], ceilings: dict[str, float]) -> tuple[float, float]:
    """How much of the measured matrix rate and copy bandwidth the forward + backward used."""
    seconds = sums["time"]["both"]["median"] / 1e3
    return (
        sums["gflop"] / 1e3 / seconds / ceilings["gemm_tflop_s"],
        sums["moved_mib"] * 2**20 / 1e9 / seconds / ceilings["copy_gb_s"],
    )


def groups(result: Result) -> dict[tuple, dict[str, list[Row]]]:
    """Rows by ``(model, T, m, r)``, then by provider, in the order measured."""
    found: dict[tuple, dict[str, list[Row]]] = {}
    for row in result.rows:
        key = tuple(row.case[name] for name in ("model", "T", "m", "r"))
        found.setdefault(key, {}).setdefault(row.provider, []).append(row)
    return found


def headline_t(result: Result) -> int:
    """The T that tables and bars show: the preset's, or the largest measured."""
    measured = {row.case["T"] for row in result.rows}
    wanted = result.settings["headline_t"]
    return wanted if wanted in measured or not measured else max(measured)


def layer_table(result: Result, name: str) -> str:
    """Times, memory and ratios of ``benchmarks.layer`` at its headline T, every provider shown."""
    parts = []
    for (model, t, _, _), providers in groups(result).items():
        if t == headline_t(result):
            parts.append(_layer_group(result, model, t, providers))
    if not parts:
        return NOT_YET
    parts.append(_layer_caption(result))
    return "\n".join(parts) + _plots(name)


def _layer_group(result: Result, model: str, t: int, providers: dict[str, list[Row]]) -> str:
    good = {
        provider: summed(rows)
        for provider, rows in providers.items()
        if all(row.status == "ok" for row in rows)
    }
    base = baseline(list(good), result.dtype)
    first = next(iter(providers.values()))
    graphs = any("both_graph" in sums["time"] for sums in good.values())
    heads = [
        _shape(model, t, first),
        "forward, ms",
        "backward, ms",
        "both, ms (20%, 80%)",
        *["both, graph, ms"] * graphs,
        f"against {title(base, first[0].case)}" if base else "ratio",
        "saved, MiB",
        "peak, MiB",
        "matrix rate",
        "bandwidth",
    ]
    lines = [_cells(heads), "|---" * len(heads) + "|"]
    absent: dict[str, list[str]] = {}
    for provider, rows in providers.items():
        label = title(provider, rows[0].case)
        if provider not in good:
            bad = next(row for row in rows if row.status != "ok")
            absent.setdefault(f"{bad.status}, {bad.note}", []).append(label)
            continue
        time = good[provider]["time"]
        ratio = time["both"]["median"] / good[base]["time"]["both"]["median"] if base else 1.0
        both = (
            f"{time['both']['median']:.2f} ({time['both']['q20']:.2f}, {time['both']['q80']:.2f})"
        )
        cells = [
            label,
            *(
                f"{time[phase]['median']:.2f}" if phase in time else ""
                for phase in ("forward", "backward")
            ),
            both,
            *[f"{time['both_graph']['median']:.2f}" if "both_graph" in time else ""] * graphs,
            f"{ratio:.2f} ×",
            f"{good[provider]['saved_mib']:.1f}",
            f"{good[provider]['peak_mib']:.0f}",
            *(f"{share:.0%}" for share in shares(good[provider], result.ceilings)),
        ]
        lines.append(_cells(cells))
    notes = [f"No figures for {', '.join(names)}: {why}." for why, names in absent.items()]
    return "\n".join([*lines, "", *notes, ""])


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shape(model: str, t: int, rows: list[Row]) -> str:
    if len(rows) == 1 and rows[0].case["count"] == 1:
        case = rows[0].case
        return f"T={t}, K={case['K']}, N={case['N']}"
    count = sum(row.case["count"] for row in rows)
    return f"{model}, sum over the {count} projections of a block, T={t}"


def _layer_caption(result: Result) -> str:
    good = [row for row in result.rows if row.status == "ok"]
    samples = min((row.figures["both_ms"]["samples"] for row in good), default=0)
    ceilings = result.ceilings
    text = (
        f"{provenance(result)}. Medians of {samples} runs or more, providers in turns; each agreed "
        "with fp64 before it was timed. *Saved*: what autograd keeps for the backward pass, "
        "weights not counted. *Matrix rate*, *bandwidth*: the method's least operations and bytes "
        "over the time, as shares of the rates measured there "
        f"({ceilings['gemm_tflop_s']:.3g} TFLOP/s, {ceilings['copy_gb_s']:.3g} GB/s)."
    )
    if any("both_graph_ms" in row.figures for row in good):
        text += " *Graph*: replayed as a CUDA graph, so without the host's part."
    return text if result.complete else text + " The run was cut short by its time budget."


def model_table(result: Result, name: str) -> str:
    """Tokens per second and memory of ``benchmarks.model``'s training steps."""
    if not result.rows:
        return NOT_YET
    baselines: dict[str, float] = {}
    for row in result.rows:
        setting = json.dumps(row.case)
        names = [other.provider for other in result.rows if other.case == row.case]
        if row.status == "ok" and row.provider == baseline(names, result.dtype):
            baselines[setting] = row.figures["tokens_per_s"]
    lines = [
        "| model, adapters on, sequence × batch | layer | tokens/s | against LoRA | step, ms (20%, "
        "80%) | peak, MiB | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result.rows:
        case = row.case
        what = f"{case['model']} ({case['blocks']} blocks), {case['targets']}, "
        what += f"{case['sequence']} × {case['batch']}"
        what += f" × {case['accumulate']} accumulated" if case["accumulate"] > 1 else ""
        what += ", checkpointing" if case["checkpointing"] else ""
        label = title(row.provider, case)
        if row.status != "ok":
            lines.append(f"| {what} | {label} | {row.status}: {row.note} | | | | |")
            continue
        figures = row.figures
        base = baselines.get(json.dumps(case))
        ratio = f"{figures['tokens_per_s'] / base:.2f} ×" if base else ""
        step = figures["step_ms"]
        lines.append(
            f"| {what} | {label} | {figures['tokens_per_s']:.0f} | {ratio} "
            f"| {step['median']:.0f} ({step['q20']:.0f}, {step['q80']:.0f}) "
            f"| {figures['peak_mib']:.0f} | {figures['mfu_measured']:.0%} |"
        )
    caption = (
        f"{provenance(result)}. Random weights and tokens; a step is forward, backward and AdamW. "
        "*Peak* is above weights, adapters and optimizer state. *MFU* is against the matrix rate "
        "measured there; recomputation is not counted as work."
    )
    if not result.complete:
        caption += " The run was cut short by its time budget."
    return "\n".join([*lines, "", caption]) + "\n"


def startup_table(result: Result, name: str) -> str:
    """Seconds and memory ``benchmarks.startup`` took to wrap a model."""
    lines = [
        "| model | wrapping | seconds | MiB above the model at the peak |",
        "|---|---|---|---|",
    ]
    for row in result.rows:
        what = f"{row.case['model']}, {row.case['blocks']} blocks"
        label = title(row.provider, row.case)
        if row.status != "ok":
            lines.append(f"| {what} | {label} | {row.status}: {row.note} | |")
            continue
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"| {what} | {label} | {row.figures['seconds']:.2f}{note} "
            f"| {row.figures['peak_mib']:.0f} |"
        )
    return "\n".join([*lines, "", f"{provenance(result)}."]) + "\n"


def anchor_table(result: Result, name: str) -> str:
    """Costs of the anchor that ``benchmarks.anchor`` found."""
    lines = ["| | seconds | |", "|---|---|---|"]
    for row in result.rows:
        figures = row.figures
        if row.status != "ok":
            lines.append(f"| {row.provider} | {row.status}: {row.note} | |")
        elif "tokens" in figures:
            lines.append(
                f"| anchoring {row.case['layers']} layers, {figures['tokens']:,} tokens | "
                f"{figures['seconds']:.0f} | {figures['peak_mib']:.0f} MiB above the model at the "
                "peak |"
            )
        else:
            time = figures["step_ms"]
            shape = f"{row.case['batch']} × {row.case['sequence']} tokens"
            lines.append(
                f"| {row.provider}, {shape} | {time['median'] / 1e3:.2f} | "
                f"{time['q20'] / 1e3:.2f} to {time['q80'] / 1e3:.2f}, {time['samples']} steps |"
            )
    case = result.rows[0].case
    return "\n".join([*lines, "", f"{case['model']}, m={case['m']}; {provenance(result)}."]) + "\n"


def demo_table(result: dict[str, Any]) -> str:
    """Losses and costs of ``secura demo``."""
    base, settings, plan = result["base"], result["settings"], result["plan"]
    lines = [
        "| | GSM8K, held out | news text | trainable | adapter file | seconds a step |",
        "|---|---|---|---|---|---|",
        f"| base model | {base['gsm8k']:.3f} | {base['news']:.3f} | | | |",
    ]
    for name in ("lora", "secura"):
        method = result["methods"][name]
        last = method["evaluations"][-1]
        lines.append(
            f"| {method['title']}, lr {method['learning_rate']:g} | {last['gsm8k']:.3f} "
            f"| {last['news']:.3f} | {method['trainable_parameters']:,} "
            f"| {method['adapter_bytes'] / 1e6:.1f} MB | {method['seconds_per_step']:.2f} |"
        )
    hardware = result["hardware"]
    lines += [
        "",
        f"Cross-entropy, lower is better. {result['assets'][0]['title']} "
        f"({result['assets'][0]['note']}), {plan['steps']} steps of batch "
        f"{settings['batch_size']} on {' and '.join(settings['target_modules'])}, {plan['dtype']}, "
        f"one seed; {hardware['name']}, {hardware['threads']} threads; {result['seconds']:.0f} "
        "seconds in all; `make demo`.",
    ]
    return "\n".join(lines) + "\n"


def provenance(result: Result) -> str:
    """Where and how a result was made, in a sentence."""
    machine, versions = result.machine, result.versions
    where = machine["name"]
    if machine["device"] == "cpu":
        where += f", {machine['threads']} threads"
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "peft") if name in versions
    )
    return f"{where}, {result.dtype}; {packages}; commit {result.commit}; `{result.command}`"


def _plots(name: str) -> str:
    from .plots import layer_plots

    images = [path.relative_to(ROOT) for path in layer_plots(name) if path.exists()]
    return "".join(f"\n![{path.stem}]({path.as_posix()})" for path in images) + "\n"


TABLES: dict[str, Callable[[Result, str], str]] = {
    "layer": layer_table,
    "model": model_table,
    "startup": startup_table,
    "anchor": anchor_table,
}


def table(name: str, results: Path = RESULTS) -> str:
    """The table of one result file; says so where there is none yet."""
    if is_there(results / name):
        return retention_table(results / name)
    path = results / f"{name}.json"
    if not path.exists():
        return NOT_YET
    if name.startswith("demo"):
        return demo_table(json.loads(path.read_text(encoding="utf-8")))
    result = Result.load(path)
    return TABLES[result.benchmark](result, name)


def render(text: str, results: Path = RESULTS) -> str:
    """``text`` with every marked table made anew."""
    return _MARKED.sub(lambda match: f"{match[1]}{table(match['name'], results)}{match[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, report differences")
    check = parser.parse_args(arguments).check
    if not check:
        from .plots import draw_all

        draw_all(RESULTS)
    text = README.read_text(encoding="utf-8")
    made = render(text)
    if check and made != text:
        print("README.md differs from benchmarks/results: run make table", file=sys.stderr)
        return 1
    if made != text:
        README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
