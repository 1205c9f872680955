"""Made-up records of cells, for the tests of what is read off them."""

from __future__ import annotations

from benchmarks.retention.cells import Cell, Settings
from benchmarks.retention.record import Measure, Probe, Record, Score

SETTINGS = Settings(texts=("news", "code"))


def score(learned: float, kl: float) -> Score:
    return Score(10, 2.0, 2.0 - learned, kl, 0.5, 0.4)


def made(method="lora", rate=1e-3, seed=0, path=((0.3, 0.01), (0.6, 0.04)), **more) -> Record:
    """A cell whose measures are (learned, KL on news); on code it is twice that."""
    cell = Cell(method, "mlp", rate, seed, ("gsm8k",), len(path))
    measures = [
        Measure(
            step,
            step < len(path),
            {"gsm8k": score(learned, 2 * kl)},
            {"news": score(-kl, kl), "code": score(0.0, 2 * kl)},
        )
        for step, (learned, kl) in enumerate(path, start=1)
    ]
    fields = {"trained": 1000, "seconds": {"total": 9.0}, "environment": {"model": "a model"}}
    probes = {"arc-easy": Probe(10, 0.5, 0.5, 0.4, 0.4)}
    return Record("screen", cell, SETTINGS, measures=measures, probes=probes, **(fields | more))
