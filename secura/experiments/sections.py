"""The report's sections: one function an experiment, from a run to Markdown and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from secura.experiments import plots
from secura.experiments.estimates import estimate, mean, paired, transfer
from secura.experiments.markdown import NOTHING, BySeed, Section, plain, show, table, title
from secura.experiments.spectra import COSINE, TOP
from secura.experiments.summary import (
    REFERENCE,
    AtEqualLearning,
    Entry,
    Record,
    Run,
    at_equal_learning,
    loss,
)


def label(run: Run, task: str) -> str:
    """A task's score as a column: its name and metric."""
    return f"{task}, {(run.metric(task) or 'score').replace('_', ' ')}"


def found(run: Run) -> Section:
    """The frontier, the ranking at equal learning, and the differences from LoRA by seed."""
    section, task = Section(), run.tasks[0]
    if not run.base:
        section.lines += ["Nothing can be compared: the base model has no finished record.", ""]
        return section
    section.picture(
        "frontier.png",
        f"What each method kept against what it learned of {task}",
        plots.png(plots.frontier, run),
    )
    section.lines += [
        f"**At equal learning.** How far the loss on general text has risen where a method has "
        f"learned as much of {task} as LoRA has at rate {run.rate:g} on the same seed; read off "
        "the straight lines from the base model through its rates, where the seed has several, the "
        "least rise first. ² marks methods "
        "that reach that at none of their rates: both are read where the method comes nearest.",
        "",
        *table(
            ["method", "learned", "rise of text loss", "LoRA's rise there", "difference"],
            [_equal_row(run, row) for row in at_equal_learning(run)],
        ),
    ]
    for text, rate_of in _rates(run):
        section.lines += [f"**Less LoRA's, seed by seed, {text}.**", ""]
        figures = {
            f"{task}, loss": _at(run, rate_of, lambda record: loss(record, task)),
            "rise of text loss": _at(run, rate_of, run.text_rise),
            "basic knowledge kept": _at(run, rate_of, run.retention),
            "rise of the probes' loss": _at(run, rate_of, run.probe_loss_rise),
        }
        section.lines += _differences(run, run.entries(), figures)
    return section


def singular_values(run: Run) -> Section:
    """exp0."""
    section = Section()
    columns = {
        "‖σ‖": ("norm_after", ".3f"),
        "Σσ": ("nuclear_after", ".2f"),
        "‖ΔW‖/‖W‖": ("change", ".2g"),
        "effective rank of ΔW": ("effective_rank_change", ".1f"),
        "new directions": ("new_directions", ".2f"),
    }
    before = next((r["spectra"] for r in run.records.values() if r.get("spectra")), None)
    rows = []
    if before:
        norm, nuclear = (mean(w[key] for w in before) for key in ("norm_before", "nuclear_before"))
        rows.append(["base model", f"{norm:.3f}", f"{nuclear:.2f}", "", "", ""])
    for entry in run.entries():
        row = [title(entry)]
        for key, spec in columns.values():
            figure = _spectral(key)
            row.append(show(run, _first(run, entry, run.rate, figure), spec=spec))
        rows.append(row)
    section.lines += table(["method", *columns], rows)
    section.lines += [
        f"Means over the adapted weights after training on {run.tasks[0]} at rate {run.rate:g}; σ "
        "are a weight's singular values, and ‖σ‖ is its Frobenius norm. *Effective rank* is exp of "
        f"the entropy of σ / Σσ. *New directions*: how many of the {TOP} leading left singular "
        f"vectors have an absolute cosine below {COSINE:g} with every one of the weight before "
        "(intruder dimensions, arXiv 2410.21228).",
        "",
    ]
    if inexact := _inexact(run):
        section.lines += [
            "No weight has the effect of these layers; shown is W + ΔW without the norm: "
            f"{', '.join(inexact)}.",
            "",
        ]
    if before:
        section.picture(
            "exp0-change.png",
            "Relative change of each layer's weight, by method",
            plots.png(plots.change_by_layer, run),
        )
    return section


def one_task_each(run: Run) -> Section:
    """exp2."""
    columns = [text for task in run.tasks for text in (label(run, task), f"{task}, loss")]
    rows = [["base model", *(plain(v) for task in run.tasks for v in _base_of(run, task))]]
    for entry in run.entries():
        row = [title(entry)]
        for task in run.tasks:
            for figure in _task_figures(run, task):
                row.append(show(run, run.over_seeds(entry.name, (task,), run.rate, figure)))
        rows.append(row)
    head = f"Each task is learned alone, from the base model, at rate {run.rate:g}."
    return Section([head, "", *table(["method", *columns], rows)])


def gradients(run: Run) -> Section:
    """exp3."""
    section = Section()
    rows = []
    for entry in run.entries():
        counts = _first(run, entry, run.rate, lambda r: r["training"]["trainable_parameters"])
        norms = (_first(run, entry, run.rate, figure) for figure in (_mean_norm, _largest_norm))
        count = f"{next(iter(counts.values())):,}" if counts else NOTHING
        rows.append([title(entry), count, *(show(run, norm, spec=".3g") for norm in norms)])
    section.lines += table(
        ["method", "trained parameters", "mean norm over the steps", "largest norm"], rows
    )
    if any(_first(run, entry, run.rate, _mean_norm) for entry in run.entries()):
        section.picture(
            "exp3-gradients.png",
            "Gradient norms step by step, mean and range over the seeds",
            plots.png(plots.gradient_norms, run),
        )
    return section


def retention(run: Run) -> Section:
    """exp4."""
    section, task = Section(), run.tasks[0]
    score, held_out = _task_figures(run, task)
    figures = {
        label(run, task): score,
        f"{task}, loss": held_out,
        "learned": lambda record: run.learned(record, task),
        "rise of text loss": run.text_rise,
        "basic knowledge kept": run.retention,
    }
    probes = {
        **{label(run, probe): _task_figures(run, probe)[0] for probe in run.probes},
        "rise of their mean loss": run.probe_loss_rise,
    }
    for text, rate_of in _rates(run):
        section.lines += [f"**Trained on {task}, {text}.**", ""]
        rows = [
            ["base model", "", *(plain(v) for v in _base_of(run, task)), "", "", "", ""],
            *(
                [
                    title(entry),
                    _rate(rate_of(entry)),
                    *(show(run, _first(run, entry, rate_of(entry), f)) for f in figures.values()),
                    _lost_per_unit(run, entry, rate_of(entry)),
                ]
                for entry in run.entries()
            ),
        ]
        section.lines += table(["method", "rate", *figures, "rise / learned"], rows)
        rows = [
            ["base model", "", *(plain(_base_of(run, probe)[0]) for probe in run.probes), ""],
            *(
                [
                    title(entry),
                    _rate(rate_of(entry)),
                    *(show(run, _first(run, entry, rate_of(entry), f)) for f in probes.values()),
                ]
                for entry in run.entries()
            ),
        ]
        section.lines += table(["method", "rate", *probes], rows)
    section.lines += [
        f"*Learned*: how far the held-out loss on {task} fell below the base model's, nats a "
        "token. *Rise of text loss*: how far that on general text rose above it. *Basic knowledge "
        "kept*: the mean over the probes of score after / score of the base model; 1 is all of "
        "it, and guessing alone keeps a good part of a multiple-choice score. *Rise / learned* is "
        "the ratio of the means over the seeds.",
        "",
    ]
    if run.is_searched:
        section.lines += [
            "A method's *own best rate* is that of least validation loss among those it was run "
            f"at on seed {run.search_seed}.",
            "",
        ]
    left_out = [probe for probe in run.probes if probe not in run.telling_probes]
    if run.base and left_out:
        section.lines += [
            f"Not part of *kept*, because the base model scores 0 there: {', '.join(left_out)}.",
            "",
        ]
    return section


def sequence(run: Run) -> Section:
    """exp5."""
    section = Section()
    if len(run.tasks) < 2:
        section.lines += ["A sequence needs two tasks or more; this run has one.", ""]
        return section
    entries = run.entries(len(run.tasks))
    whole = " → ".join(run.tasks)

    def after_last(figure: Callable[[Record], float | None]) -> Callable[[Entry], BySeed]:
        return lambda entry: run.over_seeds(entry.name, run.tasks, run.rate, figure)

    figures: dict[str, Callable[[Entry], BySeed]] = {
        "ACC": _transferred(run, run.score, "average"),
        "BWT": _transferred(run, run.score, "backward"),
        "forgetting": _transferred(run, run.score, "forgetting"),
        "mean loss": _transferred(run, loss, "average", lower_is_better=True),
        "BWT of loss": _transferred(run, loss, "backward", lower_is_better=True),
        "forgetting of loss": _transferred(run, loss, "forgetting", lower_is_better=True),
        "rise of text loss": after_last(run.text_rise),
        "basic knowledge kept": after_last(run.retention),
    }
    base = [_base_of(run, task) for task in run.tasks]
    means = [mean(values) if run.base else None for values in zip(*base, strict=True)]
    section.lines += [
        f"{whole}, one after another, at rate {run.rate:g}; scored after the last.",
        "",
        *table(
            ["method", *figures],
            [
                ["base model", plain(means[0]), "", "", plain(means[1]), "", "", "", ""],
                *([e.title, *(show(run, f(e)) for f in figures.values())] for e in entries),
            ],
        ),
        "With R(j, i) the score of task i after training on task j, of T tasks: **ACC** = mean "
        "over i of R(T, i) and **BWT** = mean over i < T of R(T, i) − R(i, i) (Lopez-Paz & Ranzato "
        "2017; below 0 is forgotten); **forgetting** = mean over i < T of max over l < T of "
        "R(l, i) − R(T, i) (Chaudhry et al. 2018; above 0 is forgotten). The same of the held-out "
        "loss, which a small test set resolves far better; there BWT above 0 is forgotten, and "
        "forgetting is R(T, i) less the least R(l, i). A seed counts where every one of its cells "
        "is finished.",
        "",
        "**Less LoRA's, seed by seed.**",
        "",
    ]
    compared = {name: f for name, f in figures.items() if "BWT" not in name}
    section.lines += _differences(run, entries, compared)
    for name, figure, lower in (("scores", run.score, False), ("losses", loss, True)):
        if any(run.matrices(entry.name, figure) for entry in entries):
            section.picture(
                f"exp5-{name}.png",
                f"{name.capitalize()} of every task after each stage of the sequence, by method",
                plots.png(plots.sequence_maps, run, figure, lower_is_better=lower),
            )
    return section


def _spectral(key: str) -> Callable[[Record], float | None]:
    """The mean over a record's weights; None where it has no spectra."""
    return lambda r: mean(w[key] for w in r["spectra"]) if r.get("spectra") else None


def _inexact(run: Run) -> list[str]:
    """Titles of the methods whose norm no weight can hold."""
    return [
        entry.title
        for entry in run.entries()
        if any(
            weight["inexact"]
            for seed in run.seeds
            if (record := run.record(entry.name, run.tasks[:1], run.rate, seed))
            for weight in record.get("spectra", ())
        )
    ]


def _equal_row(run: Run, row: AtEqualLearning) -> list[str]:
    if not row.rise:
        return [title(row.entry), "not covered", NOTHING, NOTHING, NOTHING]
    head = title(row.entry) + " ²" * (not row.direct)
    difference = paired(row.rise, row.reference) if row.entry.name != REFERENCE else {}
    return [
        head,
        *(show(run, figure) for figure in (row.learned, row.rise, row.reference)),
        show(run, difference, sign="+", flag=True),
    ]


def _first(
    run: Run, entry: Entry, rate: float | None, figure: Callable[[Record], float | None]
) -> BySeed:
    """A figure of the cells on the first task alone; without a rate, none."""
    return run.over_seeds(entry.name, run.tasks[:1], rate, figure) if rate is not None else {}


def _at(
    run: Run, rate_of: Callable[[Entry], float | None], figure: Callable[[Record], float | None]
) -> Callable[[Entry], BySeed]:
    return lambda entry: _first(run, entry, rate_of(entry), figure)


def _rates(run: Run) -> list[tuple[str, Callable[[Entry], float | None]]]:
    """The ways rates were chosen, in words and as a function of the row."""
    one = (f"all at rate {run.rate:g}", lambda entry: run.rate)
    own = ("each at its own best rate", lambda entry: run.best_rate(entry.name))
    return [one, own] if run.is_searched else [one]


def _rate(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate:g}"


def _task_figures(run: Run, task: str) -> tuple[Callable[[Record], float], ...]:
    """A task's own score and its held-out loss."""
    return lambda record: run.score(record, task), lambda record: loss(record, task)


def _base_of(run: Run, task: str) -> list[float | None]:
    """The base model's score and loss."""
    return [figure(run.base) if run.base else None for figure in _task_figures(run, task)]


def _mean_norm(record: Record) -> float:
    return mean(record["training"]["gradient_norm"])


def _largest_norm(record: Record) -> float:
    return max(record["training"]["gradient_norm"])


def _lost_per_unit(run: Run, entry: Entry, rate: float | None) -> str:
    learned = estimate(_first(run, entry, rate, lambda r: run.learned(r, run.tasks[0])))
    rise = estimate(_first(run, entry, rate, run.text_rise))
    if not learned.values or not rise.values:
        return NOTHING
    return f"{rise.mean / learned.mean:.3f}" if learned.mean > 0 else "learned nothing"


def _transferred(
    run: Run,
    figure: Callable[[Record, str], float],
    which: str,
    *,
    lower_is_better: bool = False,
) -> Callable[[Entry], BySeed]:
    def by_seed(entry: Entry) -> BySeed:
        return {
            seed: getattr(transfer(matrix, lower_is_better=lower_is_better), which)
            for seed, matrix in run.matrices(entry.name, figure).items()
        }

    return by_seed


def _differences(
    run: Run, entries: Sequence[Entry], figures: Mapping[str, Callable[[Entry], BySeed]]
) -> list[str]:
    """Every row's figures less those of LoRA's row, over the seeds both have."""
    reference = next((entry for entry in entries if entry.name == REFERENCE), None)
    if reference is None:
        return ["LoRA is not among the methods.", ""]
    rows = []
    for entry in entries:
        if entry != reference:
            pairs = (paired(figure(entry), figure(reference)) for figure in figures.values())
            rows.append([title(entry), *(show(run, p, sign="+", flag=True) for p in pairs)])
    return table(["method", *figures], rows)


__all__ = ["found", "gradients", "one_task_each", "retention", "sequence", "singular_values"]
