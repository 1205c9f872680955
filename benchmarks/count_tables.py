"""Tables of what is counted, or computed on a CPU alone: memory, launches, what lands in bf16."""

from __future__ import annotations

from statistics import fmean

from .markdown import table
from .retention.figures import interval
from .retention.summary import estimate
from .schema import Result, Row
from .tables import baseline, cut_short, groups, provenance, shape_of, title

BEFORE = ", before"
"""Ends the name of a provider whose figures are an earlier commit's."""


def memory_table(result: Result) -> str:
    """Peak and kept memory of whole training steps, as ``benchmarks.memory`` counted them."""
    heads = ["model, tokens", "layer", "kept by the decoder, MiB", "peak, MiB", "against LoRA"]
    lines = []
    for row in result.rows:
        case, own = row.case, [other for other in result.rows if other.case == row.case]
        what = f"{case['model']}, {case['sequence']} × {case['batch']}"
        what += ", checkpointing" if case["checkpointing"] else ""
        label = title(row.provider, case)
        if row.status != "ok":
            lines.append([what, label, f"{row.status}: {row.note}", "", ""])
            continue
        lora = baseline([other.provider for other in own], result.dtype)
        known = next((o.figures.get("peak_mib") for o in own if o.provider == lora), None)
        kept, peak = row.figures.get("kept_mib"), row.figures["peak_mib"]
        ratio = f"{peak / known:.2f} ×" if known and kept is not None else ""
        lines.append([what, label, "" if kept is None else f"{kept:.0f}", f"{peak:.0f}", ratio])
    caption = (
        f"{result.dtype}; torch {result.versions['torch']}, peft {result.versions['peft']}; commit "
        f"{result.commit}; `{result.command}`. Counted from the shapes of all tensors of a "
        "step, on no device; weights, adapters and the optimizer's state are not in it, nor what "
        "an op allocates for itself alone."
    )
    return f"{table(heads, lines, 2)}\n\n{caption}\n"


def counts_table(result: Result) -> str:
    """Launches and bytes of ``benchmarks.counts``, and times over the frozen layers' by count."""
    chips, parts = result.settings["chips"], []
    for (model, t, _, _), providers in groups(result).items():
        sums = {name: _counted(rows) for name, rows in providers.items()}
        floor, shape = sums["frozen"], shape_of(model, t, providers["frozen"])
        if result.preset == "together":
            shape = f"{model}, a block: q, k and v of one x, gate and up of another, T={t}"
        heads = [shape, "launches", "MiB", *(f"{chip.upper()}, by count" for chip in chips)]
        measured = result.preset != "together"
        heads += ["H100, measured"] * measured
        lines = []
        for name in sorted(one for one in sums if not one.endswith(BEFORE)):
            now, was = sums[name], sums.get(name + BEFORE)
            first, _, rest = name.partition(",")
            cells = [title(first, providers[name][0].case) + f",{rest}" * bool(rest)]
            for show in (_launches, _mib):
                shown = [show(of) for of in (was, now) if of]
                cells.append(" → ".join(dict.fromkeys(shown)))
            for figure in (*(f"us_{chip}" for chip in chips), *["measured_us"] * measured):
                ratios = [
                    f"{of[figure] / floor[figure]:.2f}" for of in (was, now) if of and figure in of
                ]
                cells.append(" → ".join(dict.fromkeys(ratios)))
            lines.append(cells)
        parts.append(f"{table(heads, lines)}\n")
    rates = "; ".join(
        f"{name.upper()} {chip['bytes_s'] / 1e12:.3g} TB/s, {chip['flop_s'] / 1e12:.3g} TFLOP/s"
        for name, chip in chips.items()
    )
    earlier = f", before the arrow {result.settings['before']}" if result.settings["before"] else ""
    caption = (
        f"Forward and backward in {result.dtype}. *By count*: the least time that the ceilings "
        f"({rates}) allow the launches one by one, over that of the frozen layers. "
    )
    if result.preset != "together":
        caption += "*Measured*: a graph's replay, over the frozen layers', of `layer-h100.json`. "
    caption += f"Commit {result.commit}{earlier}; `{result.command}`."
    return "\n".join([*parts, caption]) + "\n"


def _mib(of: dict[str, float]) -> str:
    return f"{of['moved_mib']:.0f}"


def _launches(of: dict[str, float]) -> str:
    return f"{of['launches_forward']:.0f} + {of['launches_backward']:.0f}"


def _counted(rows: list[Row]) -> dict[str, float]:
    """One provider's figures summed over the layers of a block; those that every layer has."""
    names = set.intersection(*(set(row.figures) for row in rows))
    return {name: sum(row.figures[name] * row.case["count"] for row in rows) for name in names}


def landing_table(result: Result) -> str:
    """The share of a small change's effect that outputs show, of ``benchmarks.landing``."""
    changes = dict.fromkeys(row.case["change"] for row in result.rows if row.figures)
    sizes = [f"{change:g}" for change in changes]
    heads = ["of ΔW's effect there arrives, at ‖ΔW‖ / ‖W‖ =", *sizes, "error of the output"]
    lines = []
    for name in dict.fromkeys(row.provider for row in result.rows):
        own = [row.figures for row in result.rows if row.provider == name and row.figures]
        shares = [f"{one['share']:.2f}{_spread(one['spread'])}" for one in own]
        error = f"{max(one['error'] for one in own):.1e}" if own else ""
        lines.append([title(name, result.rows[0].case), *shares, error])
    case = result.rows[0].case
    shape = f"T={case['T']}, {case['K']}→{case['N']}, random weights"
    caption = (
        f"{shape}, {result.settings['draws']} draws, ± where their standard deviation is over "
        "0.005; a gated space's own effect is about ΔW/2. *Error of the output*: against fp64, "
        f"relative, the largest of the columns. A CPU's arithmetic. {provenance(result)}."
    )
    return f"{table(heads, lines)}\n\n{caption}{cut_short(result)}\n"


def _spread(value: float) -> str:
    return f" ± {value:.2f}" if value > 0.005 else ""


def landing_model_table(result: Result) -> str:
    """What was learned at a small rate in each arithmetic, of ``benchmarks.landing_model``."""
    runs: dict[str, dict[int, Row]] = {}
    for row in result.rows:
        if row.status == "ok":
            runs.setdefault(row.provider, {})[row.case["seed"]] = row
    heads = ["", "rate", "learned, nats a token", "less than in fp32"]
    heads += ["its adapter run in fp32", "less than in fp32", "‖ΔW‖ / ‖W‖"]
    lines = []
    for name, own in runs.items():
        exact = runs.get(f"{name.partition(', ')[0]}, fp32", {})
        first = next(iter(own.values())).case
        cells = [title(name, {"m": 64, "r": 8}), f"{first['rate']:g}"]
        for end in ("after", "after_fp32"):
            cells.append(f"{fmean(_learned(row, end) for row in own.values()):.4f}")
            pairs = [_learned(exact[s], end) - _learned(own[s], end) for s in own if s in exact]
            cells.append(interval(estimate(pairs), 4) if any(pairs) else "")
        cells.append(f"{fmean(row.figures['change'] for row in own.values()):.4f}")
        lines.append(cells)
    case, seeds = result.rows[0].case, len({row.case["seed"] for row in result.rows})
    caption = (
        f"SmolLM2-135M, GSM8K, all linear layers, {case['steps']} steps of {case['batch']} × "
        f"{case['length']} tokens, AdamW without schedule, {seeds} seeds, paired, "
        f"with the 95% interval; loss of {case['held_out']} × {case['length']} held-out "
        f"tokens, before it less after it. {provenance(result)}."
    )
    return f"{table(heads, lines)}\n\n{caption}{cut_short(result)}\n"


def _learned(row: Row, end: str) -> float:
    before = row.figures["before" if end == "after" else "before_fp32"]
    return before - row.figures[end]
