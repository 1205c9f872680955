"""What anchoring costs: the pass over old text, and a training step with an anchor and without.

    python -m benchmarks.anchor --preset quick --out benchmarks/results/anchor-cpu.json

``quick`` is the whole packaged SmolLM2-135M, CUR rank 64 on its MLP, ``tiny`` a model of two layers
with random weights, for tests. The pass writes its own text; its memory is that of a second pass.
Steps are forward, backward and AdamW on 4 × 128 tokens, with and without in turns.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from secura import SecuraConfig, anchor

from . import measure
from .schema import SPENT, Result, Row
from .session import Session, command, parser
from .shapes import MLP
from .tables import anchor_table
from .training import packaged_or_tiny

BATCH, LENGTH = 4, 128
ROUNDS = 40
"""Steps of each kind at most."""
TOKENS = {"quick": 8192, "tiny": 256}
PLAIN, ANCHORED = "step, core='u'", "step, anchored"


def adapted(base: nn.Module, m: int) -> Any:
    """A copy of the model with ``core="u"`` on its MLP layers."""
    config = SecuraConfig(core="u", norm="none", r=m, target_modules=list(MLP))
    return get_peft_model(copy.deepcopy(base), config).train()


def steps_of(model: nn.Module, seed: int) -> measure.Task:
    """Training steps on random tokens; a first one is taken here, which makes AdamW's state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    device = trained[0].device
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = getattr(model, "config").vocab_size  # noqa: B009  a PeftModel forwards it
    ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=generator, device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return measure.Task(lambda: step, nullcontext)


def run(options: Any) -> Result:
    """Everything the command line asked for."""
    session = Session("anchor", options, {})
    device, recorder = session.device, session.recorder
    quick = options.preset == "quick"
    base = packaged_or_tiny(options.preset, session.dtype).to(device)
    m = 64 if quick else 8
    case = {"model": "smollm2-135m" if quick else "tiny", "m": m}
    model, tokens = adapted(base, m), TOKENS[options.preset]
    report = anchor(model, tokens=tokens, seed=options.seed)
    again = adapted(base, m)
    peak = measure.peak_mib(lambda: anchor(again, tokens=tokens, seed=options.seed), device)
    figures = {"seconds": report.seconds, "peak_mib": peak, "tokens": report.tokens}
    recorder.add([Row(case | {"layers": report.layers}, "anchoring", figures=figures)])
    shape = case | {"batch": BATCH, "sequence": LENGTH}
    if time.monotonic() >= session.end:
        recorder.add([Row(shape, name, "skipped", SPENT) for name in (PLAIN, ANCHORED)])
    else:
        steps = {
            PLAIN: steps_of(adapted(base, m), options.seed),
            ANCHORED: steps_of(model.train(), options.seed),
        }
        times, failures = measure.interleaved(
            steps, device, timer=measure.stopwatch, rounds=ROUNDS, deadline=session.end
        )
        for failure in failures.values():
            raise failure
        recorder.add([Row(shape, name, figures={"step_ms": times[name]}) for name in steps])
    recorder.close()
    return session.result


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    flags = parser(__doc__ or "", ("quick", "tiny"))
    return command(flags, arguments, run, anchor_table)


if __name__ == "__main__":
    raise SystemExit(main())
