"""What every benchmark's command line shares: flags, clock, progress, the way through its cases."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .machine import DTYPES
from .measure import Task, interleaved, is_lost, raise_ceilings, sample
from .registry import Provider, excuse
from .schema import LOST, SPENT, Recorder, Result, Row, new_result

CUDA_BUDGET_S, CPU_BUDGET_S = 480.0, 120.0


def add_recording(made: argparse.ArgumentParser, *, folder: bool = False) -> None:
    """Add ``--out``, a file or a ``folder`` that has to be given, and ``--commit``."""
    what = "folder for what it writes" if folder else "where to keep the figures, as JSON"
    made.add_argument("--out", type=Path, required=folder, help=what)
    made.add_argument("--commit", help="what to record where git cannot say it")


def gpu_parser(name: str, doc: str | None, budget_s: float) -> argparse.ArgumentParser:
    """The flags of the two scripts for a GPU: a module's name, its docstring, its usual budget."""
    made = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=doc)
    add_recording(made, folder=True)
    made.add_argument("--budget_s", type=float, default=budget_s, help="seconds to end within")
    made.add_argument("--resume", action="store_true", help="do what is not done there yet")
    made.add_argument("--dry_run", action="store_true", help="on a CPU, to try the script")
    return made


def lacks_gpu(options: argparse.Namespace) -> bool:
    """Whether a script that is no dry run finds no GPU; it then says so."""
    lacking = not torch.cuda.is_available() and not options.dry_run
    if lacking:
        print("no GPU: torch sees no CUDA device, so there is nothing to run (try --dry_run)")
    return lacking


def parser(doc: str, presets: Sequence[str]) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    made = argparse.ArgumentParser(description=doc.partition("\n")[0])
    made.add_argument("--preset", choices=presets, default="quick")
    made.add_argument("--device", help="default: cuda where there is one, else cpu")
    made.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 elsewhere")
    made.add_argument(
        "--max_seconds",
        type=float,
        help="nothing new is begun later; default 480 on cuda, 120 elsewhere",
    )
    made.add_argument("--providers", help="only those called, or holding, one of these: lora,dora")
    add_recording(made)
    made.add_argument(
        "--resume", action="store_true", help="go on from --out: finished cases are not run again"
    )
    made.add_argument("--seed", type=int, default=0)
    return made


def command(
    flags: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    run: Callable[[argparse.Namespace], Result],
    table: Callable[[Result], str],
) -> int:
    """Runs a benchmark as its command line asks and prints its table; the exit status."""
    options = flags.parse_args(arguments)
    try:
        result = run(options)
    except (ValueError, ImportError) as error:
        flags.error(str(error))
    print(table(result))
    return 0


class Turn(NamedTuple):
    """How long a case may take, and whom to tell how far it is.

    Attributes:
        deadline: the ``time.monotonic()`` after which no round begins but the first ones.
        end: the one after which no provider is taken up.
        say: takes a line.
    """

    deadline: float = float("inf")
    end: float = float("inf")
    say: Callable[[str], None] = lambda text: None


class Session:
    """A benchmark's run from the command line; finished cases are kept whatever happens.

    Args:
        benchmark: the module's name.
        options: of :func:`parser`.
        settings: what else decides the figures; a run is resumed under equal ones alone.

    Raises:
        ValueError: where there is no such device, or the file to resume is of another run.
    """

    def __init__(
        self, benchmark: str, options: argparse.Namespace, settings: dict[str, Any]
    ) -> None:
        cuda = torch.cuda.is_available()
        asked = options.device or ("cuda" if cuda else "cpu")
        try:
            self.device = torch.device(asked)
        except RuntimeError as error:
            raise ValueError(f"--device {asked}: torch knows no such device") from error
        if options.out is not None and options.out.is_dir():
            raise ValueError(f"--out {options.out} is a folder: name a file")
        on_cuda = self.device.type == "cuda"
        if on_cuda and not cuda:
            raise ValueError("--device cuda: torch sees no CUDA device here")
        self.dtype = DTYPES[options.dtype or ("bf16" if on_cuda else "fp32")]
        settings = {"preset": options.preset, "seed": options.seed} | settings
        self.result: Result = new_result(
            benchmark, options.preset, self.device, self.dtype, settings, options.commit
        )
        self.recorder = Recorder(self.result, options.out, resume=options.resume)
        budget = CUDA_BUDGET_S if on_cuda else CPU_BUDGET_S
        budget = budget if options.max_seconds is None else options.max_seconds
        self.start = time.monotonic()
        self.end = self.start + budget

    def run(
        self,
        cases: Iterable[tuple[dict[str, Any], str, float]],
        providers: Sequence[Provider],
        measure: Callable[[dict[str, Any], Turn], Iterable[Row]],
    ) -> Result:
        """Measure every case that has no rows yet, and record its rows as it is done.

        Args:
            cases: each case, what to call it, and its size, by which it gets its share of the time.
            providers: who is skipped where there is no time left.
            measure: a case's rows.
        """
        raise_ceilings(self.result.ceilings, self.device, self.dtype)
        finished = [row.case for row in self.result.rows]
        there = {row.provider for row in self.result.rows}
        if there and (missing := [one.name for one in providers if one.name not in there]):
            raise ValueError(
                f"the file to resume has no row of {missing[0]!r}: give the --providers that it "
                "was made with, or another --out"
            )
        rest = [case for case in cases if case[0] not in finished]
        for index, (case, name, _) in enumerate(rest):
            if time.monotonic() >= self.end:
                self.recorder.add(Row(case, one.name, "skipped", SPENT) for one in providers)
                continue
            deadline = self._deadline([size for _, _, size in rest[index:]])
            self.recorder.add(measure(case, Turn(deadline, self.end, _say)))
            _say(f"{index + 1}/{len(rest)} {time.monotonic() - self.start:4.0f} s  {name}", "\n")
            if is_lost(self.device):
                _say("the device is lost: --resume goes on with the other cases", "\n")
                return self.result
            collect(self.device)
        raise_ceilings(self.result.ceilings, self.device, self.dtype)
        self.recorder.close()
        return self.result

    def _deadline(self, sizes: Sequence[float]) -> float:
        """The ``time.monotonic()`` by which the first of the remaining cases should end.

        A case's share of what is left grows with its size, and half of it does not depend on it:
        checking and compiling take as long for small ones.
        """
        now, mean = time.monotonic(), sum(sizes) / len(sizes)
        return now + (self.end - now) * (1 + sizes[0] / mean) / (2 * len(sizes))


def in_turns(
    case: dict[str, Any],
    providers: Sequence[Provider],
    prepare: Callable[[Provider, Row], dict[str, Task]],
    finish: Callable[[Provider, Row, dict[str, dict[str, float]]], None],
    device: torch.device,
    *,
    turn: Turn,
    rounds: int,
    timer: Callable[[Callable[[], Any], torch.device], list[float]] = sample,
    optional: Sequence[str] = (),
) -> list[Row]:
    """Check every provider on a case and time its phases in turns; one row each, in their order.

    Args:
        case: what is measured.
        providers: who.
        prepare: checks a provider, gives its row the figures that are no times, and returns what to
            time by phase; what it raises is the row's status and note.
        finish: gives the row the figures that come of its :func:`~.measure.timing` by phase.
        device: where.
        turn: how long.
        rounds: turns at most.
        timer: see :func:`~.measure.interleaved`.
        optional: phases whose failure is a note and leaves the others' figures.
    """
    rows: list[Row] = []
    tasks: dict[tuple[str, str], Task] = {}
    lost = False
    for provider in providers:
        rows.append(row := Row(case, provider.name))
        if lost or time.monotonic() > turn.end:
            row.fail(*(("failed", LOST) if lost else ("skipped", SPENT)))
            continue
        turn.say(f"checking {provider.name}")
        try:
            found = prepare(provider, row)
        except Exception as error:  # a rival's failure must not end the run
            row.fail(*excuse(error))
            lost = not isinstance(error, torch.OutOfMemoryError) and is_lost(device)
        else:
            tasks |= {(provider.name, phase): task for phase, task in found.items()}
        if not lost:
            collect(device)
    if lost:  # what was checked cannot be timed any more
        for row in rows:
            if row.status == "ok":
                row.fail("failed", LOST)
        return rows
    times, failures = interleaved(
        tasks, device, timer=timer, rounds=rounds, deadline=turn.deadline, progress=turn.say
    )
    for provider, row in zip(providers, rows, strict=True):
        for (name, phase), failure in failures.items():
            if name == provider.name and phase in optional:
                row.note = "; ".join(filter(None, [row.note, f"no {phase}: {failure}"]))
            elif name == provider.name:
                row.fail(*excuse(failure))
        if row.status == "ok":
            own = {phase: time for (name, phase), time in times.items() if name == provider.name}
            finish(provider, row, own)
    return rows


def _say(text: str, end: str = "") -> None:
    """What is done, on stderr; what is being done on a terminal alone, in one line."""
    live = sys.stderr.isatty()
    if live or end:
        print(f"\r\x1b[K{text}" if live else text, end=end, file=sys.stderr, flush=True)


def collect(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
