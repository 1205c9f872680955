"""The stages: which cells the experiment is made of, decided before they are run.

A stage is settings and a list of cells in the order in which they are to be run, so that one that
is cut short has compared every method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.retention.cells import Cell, Settings

GSM8K = ("gsm8k",)
SEQUENCE = ("gsm8k", "logiqa", "xsum", "csqa")
# Three rates a family across its useful range, by place. Muon's are those of its scaled steps.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "lora": {"qv": (1e-3, 3e-3, 6e-3), "mlp": (1e-3, 3e-3, 6e-3)},
    "core": {"qv": (1e-3, 3e-3, 6e-3), "mlp": (5e-4, 1e-3, 1.5e-3)},
    "cabr": {"qv": (1e-4, 3e-4, 1e-3), "mlp": (1e-4, 3e-4, 1e-3)},
    "full": {"all": (1e-5, 3e-5, 1e-4)},
    "muon": {"qv": (5e-3, 1e-2, 2e-2), "mlp": (2.5e-3, 5e-3, 1e-2)},
}
_FAMILIES = {
    "lora": "lora",
    "dora": "lora",
    "ewc-self": "lora",
    "replay-self": "lora",
    "lora-whitened": "lora",
    "full": "full",
    "cabr": "cabr",
    "secura-weight": "cabr",
    "secura-weight-gated": "cabr",
}


@dataclass(frozen=True)
class Stage:
    """Cells to compare.

    Args:
        title: for people.
        settings: of all of them.
        cells: in the order of running.
    """

    title: str
    settings: Settings
    cells: tuple[Cell, ...]


def rates(method: str, targets: str) -> tuple[float, ...]:
    """The rates a method is run at."""
    family = _FAMILIES.get(method.partition("@")[0], "core")
    return RATES["muon" if "optimizer=muon" in method else family][targets]


def front(
    methods: Sequence[str],
    targets: str,
    seeds: Sequence[int],
    steps: int,
    places: Sequence[int] = (1, 2, 0),
) -> Iterator[Cell]:
    """Every method at its rates of these places in their list: all methods' first of them first."""
    for seed, place in product(seeds, places):
        for method in methods:
            own = "all" if method == "full" else targets
            yield Cell(method, own, rates(method, own)[place], seed, GSM8K, steps)


def _both(methods: Sequence[str], seeds: Sequence[int], steps: int) -> tuple[Cell, ...]:
    pairs = zip(
        *(list(front(methods, place, seeds, steps)) for place in ("mlp", "qv")), strict=True
    )
    return tuple(dict.fromkeys(cell for pair in pairs for cell in pair))


def in_sequence(
    methods: dict[str, float], targets: str, seeds: Sequence[int], steps: int
) -> tuple[Cell, ...]:
    """Tasks one after another, each method at its own rate."""
    return tuple(
        Cell(method, targets, rate, seed, SEQUENCE[:count], steps)
        for seed in seeds
        for method, rate in methods.items()
        for count in range(1, len(SEQUENCE) + 1)
    )


_SCREEN = (
    "lora",
    "anchored-self",
    "anchored-text",
    "core-u",
    "full",
    "cur-lora",
    "cabr",
    "anchored-channel",
    "secura-weight",
    "secura-weight-u",
)
_ANCHOR = tuple(
    f"anchored-self@{variation}"
    for variation in (
        "optimizer=muon",
        "damping=0.1",
        "damping=0.001",
        "decay=0.03",
        "decay=0.1",
        "decay=0.3",
        "rank=32",
        "rank=96",
        "sides=in",
        "sides=out",
    )
)
_CONTROLS = ("lora@rank=2", "lora-whitened", "replay-self", "ewc-self")
_SEEDS = (0, 1, 2, 3, 4)
_TWO = (1, 0)  # rates: the curves over the steps bridge what lies between
_CONFIRMED = ("anchored-self", "anchored-text", "core-u", "lora", "dora", "full")
_SCALED = tuple(f"lora@scale={scale}" for scale in (0.25, 0.5, 0.75))
_MEASURED = Settings(held_out=128, text_count=48, part=1.0, probe_questions=200)

STAGES: dict[str, Stage] = {
    "screen": Stage(
        "One seed, every method at three rates",
        _MEASURED,
        (*_both(_SCREEN, (0,), 128), Cell("released-m1", "qv", 1e-3, 0, GSM8K, 128)),
    ),
    "anchor": Stage(
        "One seed, the anchor's settings and the optimizer",
        _MEASURED,
        tuple(
            Cell(method, "mlp", rate, 0, GSM8K, 128)
            for method in (*_ANCHOR, "lora@optimizer=muon")
            for rate in rates(method, "mlp")[:2]
        ),
    ),
    "confirm": Stage(
        "Five seeds paired, with the controls that could do as well",
        _MEASURED,
        (
            *front((*_CONFIRMED, *_CONTROLS), "mlp", _SEEDS, 128, _TWO),
            *(Cell(method, "mlp", 3e-3, seed, GSM8K, 128) for seed in _SEEDS for method in _SCALED),
        ),
    ),
    "long": Stage(
        "512 steps, three seeds",
        _MEASURED,
        tuple(front(("anchored-self", "lora", "replay-self"), "mlp", (0, 1, 2), 512, _TWO)),
    ),
    "gemma": Stage(
        "Another model, three seeds",
        replace(_MEASURED, model="gemma3-270m"),
        tuple(front(("anchored-self", "lora"), "mlp", (0, 1, 2), 128, _TWO)),
    ),
    "sequence": Stage(
        "Four tasks in turn, each method at its rate of equal learning of the first",
        Settings(tasks=SEQUENCE, max_tokens=160, text_count=12, probe_questions=0),
        in_sequence(
            {
                "lora": 3e-3,
                "anchored-self": 1e-3,
                "er": 3e-3,
                "ewc": 3e-3,
                "i-lora": 3e-3,
                "cur-lora": 1e-3,
                "secura-weight": 3e-4,
                "secura-weight@norm_reference=pretrained": 3e-4,
            },
            "mlp",
            (0, 1, 2),
            64,
        ),
    ),
}
"""By the name of the stage's folder. The rates of ``sequence`` are read off ``screen``."""

__all__ = ["GSM8K", "RATES", "SEQUENCE", "STAGES", "Stage", "front", "in_sequence", "rates"]
