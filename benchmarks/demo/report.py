"""The demo's results as a table, a Markdown report and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.markdown import table
from benchmarks.plots import plain, write_png

COLUMNS = (
    "",
    "GSM8K loss, held out",
    "loss on news",
    "trainable parameters",
    "adapter bytes",
    "seconds a step",
)
_COLOURS = {"lora": "#D98324", "secura": "#2A6F97"}
_SMOOTHING = 0.85


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells of the table, base first; losses with their change from the base."""
    base = results["base"]
    rows = [["base model", f"{base['gsm8k']:.3f}", f"{base['news']:.3f}", "", "", ""]]
    for method in results["methods"].values():
        last = method["evaluations"][-1]
        rows.append(
            [
                f"{method['title']}, lr {method['learning_rate']:g}",
                f"{last['gsm8k']:.3f} ({last['gsm8k'] - base['gsm8k']:+.3f})",
                f"{last['news']:.3f} ({last['news'] - base['news']:+.3f})",
                f"{method['trainable_parameters']:,}",
                f"{method['adapter_bytes']:,}",
                f"{method['seconds_per_step']:.2f}",
            ]
        )
    return rows


def markdown(results: dict[str, Any], picture: str) -> str:
    """The report; every figure in it is taken from `results`."""
    merge, plan, settings = results["merge"], results["plan"], results["settings"]
    machine, question = results["hardware"], results["question"]
    trained = [
        f"- **{method['title']}**: {method['about']}" for method in results["methods"].values()
    ]
    assets = [f"- {a['description']}; SHA256 `{a['sha256']}`" for a in results["assets"]]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(
        [
            "# SECURA and LoRA, side by side",
            "",
            f"{results['assets'][0]['title']} ({results['assets'][0]['note']}) on GSM8K, "
            f"{plan['steps']} steps. Everything below was measured in this run, which took "
            f"{results['seconds']:.0f} s on {machine['name']} ({machine['threads']} threads, "
            f"{plan['dtype']}), seed {settings['seed']}.",
            "",
            table(COLUMNS, table_rows(results)),
            "",
            f"Losses are mean cross-entropy in nats a token, on {settings['held_out']} GSM8K test "
            f"problems (answers alone) and on the first {settings['text_tokens']} tokens of "
            f"{settings['text_count']} news articles; in brackets, the change from the base. One "
            f"seed and few steps: differences of a few thousandths mean nothing. "
            f"{_finding(results)}",
            "",
            f"![Loss curves and retention]({picture})",
            "",
            "## What was trained",
            "",
            f"Both methods saw the same {plan['steps']} batches of {settings['batch_size']} "
            f"problems in the same order, on {', '.join(settings['target_modules'])}, with AdamW, "
            "a warm-up over a tenth of the steps and a cosine to zero. The loss counts the "
            "answers' tokens alone.",
            "",
            *trained,
            "",
            "## Merged and served",
            "",
            "The saved SECURA adapter was loaded again and merged into a plain checkpoint "
            f"(`merged/`, {merge['bytes'] / 1e6:.0f} MB), which a new process loaded with "
            "transformers alone. Largest difference between its logits and the adapter's: "
            f"{merge['max_logit_difference']:.1e} (tolerance {merge['tolerance']:.0e}, largest "
            f"logit {merge['max_logit']:.1f}).",
            "",
            f"**Asked.** {question['prompt']}",
            "",
            _quoted("The merged model", merge["answer"]),
            "",
            _quoted("The base model", results["base"]["answer"]),
            "",
            _quoted("The data set", question["answer"]),
            "",
            "## Model, data, versions",
            "",
            *assets,
            f"- {versions}",
            "",
            f"Run it again: `{results['command']}`. Every step's loss: `results.json`.",
            "",
        ]
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the PNG: what was learned step by step, and what it cost elsewhere."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    curves, plane = figure.subplots(1, 2, width_ratios=[1.25, 1])
    base = results["base"]
    for name, method in results["methods"].items():
        colour, losses = _COLOURS[name], method["train_losses"]
        steps = range(1, len(losses) + 1)
        curves.plot(steps, losses, color=colour, alpha=0.22, linewidth=1)
        curves.plot(steps, smoothed(losses), color=colour, linewidth=2, label=method["title"])
        points = method["evaluations"]
        curves.plot([p["step"] for p in points], [p["gsm8k"] for p in points], "o", color=colour)
        way = [base, *points]
        xs, ys = [p["gsm8k"] for p in way], [p["news"] for p in way]
        plane.plot(xs, ys, "-o", color=colour, linewidth=2, label=method["title"])
    curves.plot(0, base["gsm8k"], "*", color="black", markersize=12, label="held-out, base")
    curves.set(xlabel="step", ylabel="loss (nats a token)", title="Learning: GSM8K answers")
    plane.plot(base["gsm8k"], base["news"], "*", color="black", markersize=14, label="base")
    plane.axhline(base["news"], color="black", linewidth=1, linestyle=":", zorder=1)
    plane.invert_xaxis()
    plane.set(
        xlabel="held-out GSM8K loss (further right: learned more)",
        ylabel="loss on news (lower: kept more)",
        title="Retention: what learning cost elsewhere",
    )
    for axes in (curves, plane):
        axes.legend(frameon=False)
        plain(axes)
    write_png(figure, path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average of `values`, without the start's bias."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        out.append(mean / weight)
    return out


def _finding(results: dict[str, Any]) -> str:
    """What the two methods' last scores say about each other."""
    secura, lora = (results["methods"][name]["evaluations"][-1] for name in ("secura", "lora"))
    learned, kept = (secura[text] - lora[text] for text in ("gsm8k", "news"))
    return (
        f"SECURA ends {abs(learned):.3f} {'below' if learned < 0 else 'above'} LoRA on GSM8K and "
        f"{abs(kept):.3f} {'below' if kept < 0 else 'above'} it on news."
    )


def _quoted(who: str, text: str) -> str:
    lines = text.splitlines() or ["(nothing)"]
    return f"**{who}.**\n\n" + "\n".join(f"> {line}  " for line in lines)


__all__ = ["COLUMNS", "draw", "markdown", "smoothed", "table_rows"]
