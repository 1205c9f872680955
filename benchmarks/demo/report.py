"""The demo's results as a table in the terminal, a Markdown report and `results.json`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

PACKAGES = ("secura", "torch", "transformers", "peft", "gguf", "numpy", "safetensors")
COLUMNS = (
    "",
    "GSM8K loss, held out",
    "loss on news",
    "trainable parameters",
    "adapter bytes",
    "seconds a step",
)


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


def terminal_table(results: dict[str, Any]) -> Table:
    """The table for a rich console."""
    table = Table(title=_subject(results), title_justify="left", header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in table_rows(results):
        table.add_row(*row)
    return table


def markdown(results: dict[str, Any], picture: str) -> str:
    """The report; every figure in it is taken from `results`."""
    merge, plan, settings = results["merge"], results["plan"], results["settings"]
    machine, question = results["hardware"], results["question"]
    rows = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    rows += ["| " + " | ".join(row) + " |" for row in table_rows(results)]
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(
        [
            "# SECURA and LoRA, side by side",
            "",
            f"{_subject(results)}. Everything below was measured in this run, which took "
            f"{results['seconds']:.0f} s on {machine['name']} ({machine['threads']} threads, "
            f"{plan['dtype']}), seed {settings['seed']}.",
            "",
            *rows,
            "",
            f"Losses are mean cross-entropy in nats a token, on {settings['eval_examples']} GSM8K "
            f"test problems (answers alone) and on the first {settings['news_tokens']} tokens of "
            f"{settings['news_articles']} news articles; in brackets, the change from the base. "
            "One seed and few steps: differences of a few thousandths mean nothing. "
            f"{_finding(results)}",
            "",
            f"![Loss curves and retention]({picture})",
            "",
            "## What was trained",
            "",
            f"Both methods saw the same {plan['steps']} batches of {settings['batch_size']} "
            f"problems in the same order, on {', '.join(settings['target_modules'])}, with AdamW, "
            "a linear warm-up over a tenth of the steps and a linear decay to zero. The loss "
            "counts the answers' tokens alone.",
            "",
            *[_settings_line(method) for method in results["methods"].values()],
            "",
            "## Merged and served",
            "",
            "The saved SECURA adapter was loaded again and merged into a plain checkpoint "
            f"(`merged/`, {merge['bytes'] / 1e6:.0f} MB), which a new process loaded with "
            "transformers alone. Largest difference between its logits and the adapter's: "
            f"{merge['max_logit_difference']:.1e} (tolerance {merge['tolerance']:.0e}, largest "
            f"logit {merge['max_logit']:.1f}).",
            "",
            f"**Question.** {question['question']}",
            "",
            _quoted("The merged model", merge["answer"]),
            "",
            _quoted("The base model", results["base"]["answer"]),
            "",
            _quoted("The data set", question["answer"]),
            "",
            "## Model, data, versions",
            "",
            *[
                f"- {asset['description']}; SHA256 `{asset['sha256']}`"
                for asset in results["assets"]
            ],
            f"- {used}",
            "",
            f"Run it again: `{results['command']}`. All figures, with every step's loss and time: "
            "`results.json`.",
            "",
        ]
    )


def _subject(results: dict[str, Any]) -> str:
    asset = results["assets"][0]
    note = f" ({asset['note']})" if asset["note"] else ""
    return f"{asset['title']}{note} on GSM8K, {results['plan']['steps']} steps"


def _finding(results: dict[str, Any]) -> str:
    """What the two methods' last scores say about each other."""
    secura, lora = (results["methods"][name]["evaluations"][-1] for name in ("secura", "lora"))
    learned, kept = (secura[text] - lora[text] for text in ("gsm8k", "news"))
    return (
        f"SECURA ends {abs(learned):.3f} {'below' if learned < 0 else 'above'} LoRA on GSM8K and "
        f"{abs(kept):.3f} {'below' if kept < 0 else 'above'} it on news."
    )


def _settings_line(method: dict[str, Any]) -> str:
    shown = ("r", "inner_r", "scaling", "norm", "lora_alpha")
    config = ", ".join(
        f"{key} {method['config'][key]}" for key in shown if method["config"].get(key) is not None
    )
    return f"- **{method['title']}**: learning rate {method['learning_rate']:g}; {config}"


def _quoted(who: str, text: str) -> str:
    lines = text.splitlines() or ["(nothing)"]
    return f"**{who}.**\n\n" + "\n".join(f"> {line}  " for line in lines)
