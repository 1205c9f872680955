"""Tables of results, as Markdown, and the sums that tables, pictures and targets are made of."""

from __future__ import annotations

import json
import re
from typing import Any

from .markdown import table
from .schema import Result, Row

NOT_YET = "*Not measured yet.*\n"


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


def sums(providers: dict[str, list[Row]]) -> dict[str, dict[str, Any]]:
    """What :func:`summed` gives of each provider all of whose rows are ok."""
    return {
        name: summed(rows)
        for name, rows in providers.items()
        if all(row.status == "ok" for row in rows)
    }


def shares(whole: dict[str, Any], ceilings: dict[str, float]) -> tuple[float, float]:
    """How much of the measured matrix rate and copy bandwidth the forward + backward used."""
    seconds = whole["time"]["both"]["median"] / 1e3
    return (
        whole["gflop"] / 1e3 / seconds / ceilings["gemm_tflop_s"],
        whole["moved_mib"] * 2**20 / 1e9 / seconds / ceilings["copy_gb_s"],
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


def layer_table(result: Result) -> str:
    """Times, memory and ratios of ``benchmarks.layer`` at its headline T, every provider shown."""
    parts = []
    for (model, t, _, _), providers in groups(result).items():
        if t == headline_t(result):
            parts.append(_layer_group(result, model, t, providers))
    if not parts:
        return NOT_YET
    return "\n".join([*parts, _layer_caption(result)]) + "\n"


def _layer_group(result: Result, model: str, t: int, providers: dict[str, list[Row]]) -> str:
    good = sums(providers)
    base = baseline(list(good), result.dtype)
    first = next(iter(providers.values()))
    graphs = any("both_graph" in whole["time"] for whole in good.values())
    heads = [
        shape_of(model, t, first),
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
    lines = []
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
        lines.append(cells)
    notes = [f"No figures for {', '.join(names)}: {why}." for why, names in absent.items()]
    return "\n".join([table(heads, lines), "", *notes, ""])


def shape_of(model: str, t: int, rows: list[Row]) -> str:
    """A layer's T, K and N, or of how many layers of a block the figures are sums."""
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
    return text + cut_short(result)


def cut_short(result: Result) -> str:
    """A sentence where a run did not reach all its cases, or nothing."""
    return "" if result.complete else " The run was cut short by its time budget."


def model_table(result: Result) -> str:
    """Tokens per second and memory of ``benchmarks.model``'s training steps."""
    if not result.rows:
        return NOT_YET
    bases: dict[str, dict[str, Any]] = {}
    for row in result.rows:
        names = [other.provider for other in result.rows if other.case == row.case]
        if row.status == "ok" and row.provider == baseline(names, result.dtype):
            bases[json.dumps(row.case)] = row.figures
    heads = ["model, adapters on, sequence × batch", "layer", "tokens/s", "against LoRA"]
    heads += ["step, ms (20%, 80%)", "peak, MiB", "MFU"]
    lines = []
    for row in result.rows:
        cells = [setting(row.case), title(row.provider, row.case)]
        if row.status == "ok":
            figures, base = row.figures, bases.get(json.dumps(row.case))
            rate, step = figures["tokens_per_s"], figures["step_ms"]
            cells += [
                f"{rate:.0f}",
                f"{rate / base['tokens_per_s']:.2f} ×" if base else "",
                f"{step['median']:.0f} ({step['q20']:.0f}, {step['q80']:.0f})",
                f"{figures['peak_mib']:.0f}",
                f"{figures['mfu_measured']:.0%}",
            ]
        else:
            cells += [f"{row.status}: {row.note}", "", "", "", ""]
        lines.append(cells)
    caption = (
        f"{provenance(result)}. Random weights and tokens; a step is forward, backward and AdamW. "
        "*Peak* is above weights, adapters and optimizer state. *MFU* is against the matrix rate "
        "measured there; recomputation is not counted as work."
    )
    return f"{table(heads, lines, 2)}\n\n{caption}{cut_short(result)}\n"


def setting(case: dict[str, Any]) -> str:
    """A training step's model, targets and sizes in words."""
    what = f"{case['model']} ({case['blocks']} blocks), {case['targets']}, "
    what += f"{case['sequence']} × {case['batch']}"
    what += f" × {case['accumulate']} accumulated" if case["accumulate"] > 1 else ""
    return what + (", checkpointing" if case["checkpointing"] else "")


def startup_table(result: Result) -> str:
    """Seconds and memory ``benchmarks.startup`` took to wrap a model."""
    heads, lines = ["model", "wrapping", "seconds", "MiB above the model at the peak"], []
    for row in result.rows:
        what = f"{row.case['model']}, {row.case['blocks']} blocks"
        label = title(row.provider, row.case)
        if row.status != "ok":
            lines.append([what, label, f"{row.status}: {row.note}", ""])
            continue
        note = f" ({row.note})" if row.note else ""
        seconds, peak = row.figures["seconds"], row.figures["peak_mib"]
        lines.append([what, label, f"{seconds:.2f}{note}", f"{peak:.0f}"])
    return f"{table(heads, lines, 2)}\n\n{provenance(result)}.\n"


def anchor_table(result: Result) -> str:
    """Costs of the anchor that ``benchmarks.anchor`` found."""
    lines = []
    for row in result.rows:
        figures = row.figures
        if row.status != "ok":
            lines.append([row.provider, f"{row.status}: {row.note}", ""])
        elif "tokens" in figures:
            what = f"anchoring {row.case['layers']} layers, {figures['tokens']:,} tokens"
            peak = f"{figures['peak_mib']:.0f} MiB above the model at the peak"
            lines.append([what, f"{figures['seconds']:.0f}", peak])
        else:
            time = figures["step_ms"]
            shape = f"{row.case['batch']} × {row.case['sequence']} tokens"
            spread = f"{time['q20'] / 1e3:.2f} to {time['q80'] / 1e3:.2f}"
            median, steps = f"{time['median'] / 1e3:.2f}", f"{time['samples']} steps"
            lines.append([f"{row.provider}, {shape}", median, f"{spread}, {steps}"])
    case, text = result.rows[0].case, table(["", "seconds", ""], lines)
    return f"{text}\n\n{case['model']}, m={case['m']}; {provenance(result)}.\n"


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
