"""The stages: which cells the experiment is made of, decided before they are run.

A stage is settings and a list of cells in the order in which they are to be run, so that one that
is cut short has compared every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from benchmarks.retention.cells import Cell, Settings

GSM8K = ("gsm8k",)
SEQUENCE = ("gsm8k", "logiqa", "xsum", "csqa")
Tried = Mapping[str, Sequence[float]]
"""Methods and the rates each is run at, the most telling first."""


@dataclass(frozen=True)
class Stage:
    """Cells to compare.

    Args:
        settings: of all of them.
        cells: in the order of running.
        shown_in: the stage in whose section of the report its cells stand, if not in its own.
    """

    settings: Settings
    cells: tuple[Cell, ...]
    shown_in: str = ""


def front(tried: Tried, targets: str, seeds: Iterable[int], steps: int = 128) -> Iterator[Cell]:
    """Every method at its rates: the first rate of all methods and seeds, then the second."""
    most = max(len(rates) for rates in tried.values())
    for place in range(most):
        for seed in seeds:
            for method, rates in tried.items():
                if place < len(rates):
                    own = "all" if method == "full" else targets
                    yield Cell(method, own, rates[place], seed, GSM8K, steps)


def in_sequence(
    methods: Mapping[str, float], targets: str, seeds: Sequence[int], steps: int
) -> tuple[Cell, ...]:
    """Tasks one after another, each method at its own rate."""
    return tuple(
        Cell(method, targets, rate, seed, SEQUENCE[:count], steps)
        for seed in seeds
        for method, rate in methods.items()
        for count in range(1, len(SEQUENCE) + 1)
    )


def _in_turns(*stages: Iterable[Cell]) -> tuple[Cell, ...]:
    turns = chain.from_iterable(zip_longest(*stages))
    return tuple(dict.fromkeys(cell for cell in turns if cell is not None))


_LORA, _CABR = (3e-3, 6e-3, 1e-3), (3e-4, 1e-3, 1e-4)
_QV, _MLP = (3e-3, 6e-3, 1e-3), (1e-3, 1.5e-3, 5e-4)  # a core's


def _screened(core: Sequence[float]) -> Tried:
    return {
        "lora": _LORA,
        "anchored-self": core,
        "anchored-text": core,
        "core-u": core,
        "full": (3e-5, 1e-4, 1e-5),
        "cur-lora": core,
        "cabr": _CABR,
        "anchored-channel": core,
        "secura-weight": _CABR,
        "secura-weight-u": core,
    }


_ANCHOR: Tried = {
    "anchored-self@optimizer=muon": (5e-3, 2.5e-3),
    "anchored-self@damping=0.1": (1e-3, 5e-4),
    "anchored-self@damping=0.001": (1e-3, 5e-4),
    "anchored-self@decay=0.03": (1e-3, 5e-4),
    "anchored-self@decay=0.1": (1e-3, 5e-4),
    "anchored-self@decay=0.3": (1e-3, 5e-4),
    "anchored-self@rank=32": (1e-3, 5e-4),
    "anchored-self@rank=96": (1e-3, 5e-4),
    "anchored-self@sides=in": (1e-3, 5e-4),
    "anchored-self@sides=out": (1e-3, 5e-4),
    "lora@optimizer=muon": (5e-3, 2.5e-3),
}
# Decided after those: more rank at a lower rate, a decay that is felt, LoRA with as many numbers.
_FURTHER: Tried = {
    "anchored-self@rank=128": (5e-4, 2.5e-4),
    "anchored-self@rank=96": (2.5e-4,),
    "anchored-self@decay=30": (1e-3, 2e-3),
    "anchored-self@rank=192": (2.5e-4, 1.25e-4),
    "anchored-self@decay=100": (1e-3, 2e-3),
    "anchored-self@decay=10": (1e-3, 2e-3),
    "anchored-self@rank=128,decay=30": (5e-4, 1e-3),
    "ewc-self@strength=1e5": (3e-3, 6e-3),
    "ewc-self": (6e-3,),
    "anchored-channel@rank=128": (5e-4,),
    "lora@rank=8": (3e-3, 1e-3),
    "lora@rank=16": (3e-3, 1e-3),
}
BEST = "anchored-self@rank=128,decay=30"
"""The anchored core that is confirmed, and at which rates."""
BEST_RATES = (5e-4, 1e-3, 2.5e-4)
_CONFIRMED: Tried = {
    "lora": _LORA,
    BEST: BEST_RATES,
    "ewc-self": (3e-3, 6e-3),
    "full": (3e-5, 1e-4),
    "replay-self": (3e-3, 1e-3),
    "lora-whitened": (1e-3, 3e-3),
    "core-u": (5e-4, 1e-3),
    "dora": (3e-3, 1e-3),
    "lora@rank=8": (3e-3, 1e-3),
    "anchored-self": (1e-3, 5e-4),
    BEST.replace("-self", "-text"): BEST_RATES[:2],
}
# Decided after those: LoRA, plain and whitened, taken back over the run by as much as the core is,
# and cores of one part in e too, at lower rates and of more rank.
_TAKEN_BACK: Tried = {
    "lora": (3e-3, 1e-3),
    "lora-whitened": (3e-3,),
    "lora@decay=5": (3e-3,),
    "lora-whitened@decay=5": (3e-3,),
    BEST: BEST_RATES[:1],
    BEST.replace("decay=30", "decay=60"): (2.5e-4,),
    "anchored-self@rank=192,decay=60": (2.5e-4,),
    "anchored-self@rank=192,decay=120": (1.25e-4,),
    # Decided after two seeds of those: whitening with its decay learned too little to be compared.
    "lora-whitened@decay=2.5": (6e-3,),
}
# Decided after those and a first look at another seed: one price in all layers.
_ONE_PRICE: Tried = {
    f"{BEST},kappa=model": BEST_RATES[:1],
    f"{BEST.replace('decay=30', 'decay=60')},kappa=model": (2.5e-4,),
    "anchored-self@rank=192,decay=120,kappa=model": (1.25e-4,),
}
# In sequence: replay stores data, the anchor 2 m² numbers a layer, and nothing keeps plain LoRA.
_DECIDING = {"lora": 3e-3, BEST: BEST_RATES[0], "er": 3e-3}
_BESIDE = {
    "ewc": 3e-3,
    "cur-lora": 5e-4,
    "i-lora": 3e-3,
    "secura-weight": 3e-4,
    "secura-weight@norm_reference=pretrained": 3e-4,
}
# Decided after those: replay and EWC given the model's own samples too, as the anchor is.
_WITH_OWN_SAMPLES = {"ewc-self": 3e-3, "replay-self": 3e-3}
# Decided after those: EWC of the samples held harder, and after two seeds of that the core too;
# after the first two tasks of that core, the decay that `secura train --anchor` takes for 64 steps
# of this schedule, 59, and a harder one.
HARD_EWC = "ewc-self@strength=1e5"
BY_LENGTH, HARD = (BEST.replace("decay=30", f"decay={decay}") for decay in (59, 100))
_HELD_HARDER = {
    HARD_EWC: 3e-3,
    HARD: BEST_RATES[0],
    BY_LENGTH: BEST_RATES[0],
    BEST.replace("decay=30", "decay=300"): BEST_RATES[0],
}
# Decided after those: the rule's decay once for each task so far.
GROWING = f"{BY_LENGTH},grows=True"
# Decided after the core of `gemma` had stopped learning at half of its steps.
_HELD_LESS = BEST.replace("decay=30", "decay=3")
_ON_GEMMA: Tried = {
    _HELD_LESS: (5e-4, 1e-3),
    "lora": (3e-4,),
    BEST.replace("decay=30", "decay=10"): (1e-3, 5e-4),
}
# Decided after those: the core's next rate, and the controls that could do as well.
_ON_GEMMA_BESIDE: Tried = {_HELD_LESS: (2e-3,), "ewc-self": (1e-3,), "lora-whitened": (3e-3,)}
# Decided after one price had kept more on SmolLM2: at the rate that lies beyond EWC, as it was
# run, and with the decay that the callback's rule takes there.
_ON_GEMMA_ONE_PRICE: tuple[Tried, ...] = (
    {f"{_HELD_LESS},kappa=model": (2e-3,)},
    {f"{BEST.replace('decay=30', 'decay=7.5')},kappa=model": (2e-3,)},
)
# Decided before most of those had run: the rate of the weights (``secura.learning_rate``) with the
# callback's decay there, and A B at SmolLM2's best rate and at that of the weights.
_ON_GEMMA_BY_WEIGHTS: tuple[tuple[Tried, tuple[int, ...]], ...] = (
    ({f"{BEST.replace('decay=30', 'decay=3.8')},kappa=model": (3.9e-3,)}, (0, 1, 2)),
    ({"cabr": (3e-4, 2.3e-3)}, (0,)),
)
# Decided after those: whitening in a sequence, with the decays of the rule, its covariances added
# up as an anchor's sums are; and after one seed of that the core's next rate, with its decay.
WHITENED = "lora-whitened@decay=4.9"
_BESIDE_WHITENING = {
    WHITENED: 6e-3,
    "lora-whitened@decay=9.8": 3e-3,
    f"{BEST.replace('decay=30', 'decay=118')},kappa=model": 2.5e-4,
}
# Decided after I-LoRA had learned less of the first task: higher rates there, and then a lower one.
_ON_FIRST_TASK: Tried = {"i-lora": (6e-3, 1e-2, 1.5e-3)}
_SEEDS = (0, 1, 2, 3, 4)
_MEASURED = Settings(held_out=128, text_count=48, part=1.0, probe_questions=200)
_IN_TURN = Settings(tasks=SEQUENCE, max_tokens=160, text_count=24, part=1.0, probe_questions=0)

STAGES: dict[str, Stage] = {
    # One seed, every method at three rates.
    "screen": Stage(
        _MEASURED,
        (
            *_in_turns(front(_screened(_MLP), "mlp", (0,)), front(_screened(_QV), "qv", (0,))),
            Cell("released-m1", "qv", 1e-3, 0, GSM8K, 128),
        ),
    ),
    # One seed, the anchor's settings, the optimizer and LoRA's rank.
    "anchor": Stage(
        _MEASURED,
        (*front(_ANCHOR, "mlp", (0,)), *front(_FURTHER, "mlp", (0,))),
    ),
    # Five seeds paired, with the controls that could do as well.
    "confirm": Stage(
        _MEASURED,
        (
            *front(_CONFIRMED, "mlp", _SEEDS),
            *front({f"lora@scale={part}": (3e-3,) for part in (0.25, 0.5, 0.75)}, "mlp", _SEEDS),
        ),
    ),
    # Between LoRA's rates, where it is read off a line: on a CPU, afterwards.
    "confirm-line": Stage(_MEASURED, tuple(front({"lora": (2e-3,)}, "mlp", _SEEDS))),
    # A decay of one part in e over the run for each method; three seeds on a CPU, no probes.
    "confirm-decay": Stage(
        replace(_MEASURED, part=0.25, probe_questions=0),
        tuple(
            cell
            for tried in (_TAKEN_BACK, _ONE_PRICE)
            for seed in (0, 1, 2)
            for cell in front(tried, "mlp", (seed,))
        ),
    ),
    # 512 steps, three seeds.
    "long": Stage(
        _MEASURED,
        tuple(
            front(
                {"lora": (3e-3, 1e-3), BEST: BEST_RATES[:2], "ewc-self": (3e-3,)},
                "mlp",
                (0, 1, 2),
                512,
            )
        ),
    ),
    # The core's decay over the whole run as it was at 128 steps, and LoRA on the same machine.
    "long-decay": Stage(
        replace(_MEASURED, part=0.25, probe_questions=0),
        tuple(
            front(
                {BEST.replace("decay=30", "decay=7.5"): (5e-4,), "lora": (3e-3,)},
                "mlp",
                (0, 1, 2),
                512,
            )
        ),
    ),
    # Another model. What was run of it: LoRA at 6e-3 and the core at 1e-3 were decided and left.
    "gemma": Stage(
        replace(_MEASURED, model="gemma3-270m", part=0.25),
        tuple(front({"lora": (3e-3, 1e-3), BEST: BEST_RATES[:1]}, "mlp", (0, 1))),
    ),
    # One seed of it: a smaller penalty, more rates, and LoRA where it learns less; no probes. Then
    # what of that learned as much as LoRA, on the other seeds; then its next rate, and controls.
    "gemma-settings": Stage(
        replace(_MEASURED, model="gemma3-270m", part=0.25, probe_questions=0),
        (
            *front(_ON_GEMMA, "mlp", (0,)),
            *front({_HELD_LESS: (1e-3,), "lora": (3e-4,)}, "mlp", (1, 2)),
            *front({"lora": (1e-3,)}, "mlp", (2,)),
            *front(_ON_GEMMA_BESIDE, "mlp", (0, 1, 2)),
            *(cell for tried in _ON_GEMMA_ONE_PRICE for cell in front(tried, "mlp", (0, 1, 2))),
            *(cell for tried, of in _ON_GEMMA_BY_WEIGHTS for cell in front(tried, "mlp", of)),
        ),
        shown_in="gemma",
    ),
    # Four tasks in turn, each method at its rate of equal learning of the first.
    "sequence": Stage(
        _IN_TURN,
        (
            *in_sequence(_DECIDING, "mlp", (0, 1, 2), 64),
            *in_sequence(_BESIDE, "mlp", (0, 1, 2), 64),
        ),
    ),
    # The same over three seeds on two cores, where a quarter of the rows is scored on the way.
    "sequence-seeds": Stage(
        replace(_IN_TURN, part=0.25),
        (
            *in_sequence(_DECIDING, "mlp", (0, 1, 2), 64),
            *in_sequence(_WITH_OWN_SAMPLES, "mlp", (0, 1, 2), 64),
            *in_sequence(_BESIDE, "mlp", (0, 1, 2), 64),
            *front(_ON_FIRST_TASK, "mlp", (0,), 64),
            *in_sequence(_HELD_HARDER, "mlp", (0, 1, 2), 64),
            *in_sequence({GROWING: BEST_RATES[0]}, "mlp", (0, 1, 2), 64),
            # EWC at the rate at which LoRA learns most of one task.
            *in_sequence({HARD_EWC: 6e-3}, "mlp", (0, 1, 2), 64),
            # The rule's decay, at one price in all layers.
            *in_sequence({f"{BY_LENGTH},kappa=model": BEST_RATES[0]}, "mlp", (0, 1, 2), 64),
            *chain.from_iterable(
                in_sequence({method: rate}, "mlp", (0, 1, 2), 64)
                for method, rate in _BESIDE_WHITENING.items()
            ),
        ),
    ),
}
"""By the name of the stage's folder. The rates of ``sequence`` are read off ``screen``."""

__all__ = [
    "BEST",
    "BY_LENGTH",
    "GROWING",
    "GSM8K",
    "HARD",
    "HARD_EWC",
    "SEQUENCE",
    "STAGES",
    "WHITENED",
    "Stage",
    "front",
    "in_sequence",
]
