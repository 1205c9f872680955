"""Times, memory and this machine's own ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MIB = 2**20
WARMUP_MS, SLICE_MS = 10, 40


class Task(NamedTuple):
    """Something to time.

    Attributes:
        prepare: makes the call to time, outside the timer; what it holds is freed after its turn.
        context: what the call runs in, entered outside the timer.
    """

    prepare: Callable[[], Callable[[], Any]]
    context: Callable[[], AbstractContextManager[None]]


def timing(samples: list[float]) -> dict[str, float]:
    """Median and the 20% and 80% quantiles of milliseconds."""
    if len(samples) == 1:
        samples = samples * 2
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "median": statistics.median(samples),
        "q20": fifths[0],
        "q80": fifths[3],
        "samples": len(samples),
    }


def sample(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Milliseconds of ``call``: many runs by events on CUDA (the cache cleared), one run elsewhere.

    Raises:
        RuntimeError: whatever the call raises.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=WARMUP_MS, rep=SLICE_MS, return_mode="all")
    return stopwatch(call, device)


def stopwatch(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Milliseconds of one run of something long, the device drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [(time.perf_counter() - start) * 1e3]


def is_lost(device: torch.device) -> bool:
    """Whether an error has left the device useless to this process."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        return True
    return False


def interleaved(
    tasks: Mapping[Any, Task],
    device: torch.device,
    *,
    timer: Callable[[Callable[[], Any], torch.device], list[float]] = sample,
    rounds: int,
    deadline: float = float("inf"),
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[Any, dict[str, float]], dict[Any, Exception]]:
    """Time the tasks in turns, so that a machine that slows down slows all of them.

    Each round goes the other way about, so that none always follows the same one.

    Args:
        tasks: what to time.
        device: where it runs.
        timer: :func:`sample`, or :func:`stopwatch` for what takes long.
        rounds: turns at most.
        deadline: ``time.monotonic()`` after which no further turn begins but the first two.
        progress: is told which turn it is.

    Returns:
        The :func:`timing` of each task, and what was raised by those that have none: a task that
        raises has no further turn.
    """
    samples: dict[Any, list[float]] = {key: [] for key in tasks}
    failures: dict[Any, Exception] = {}
    order = list(tasks.items())
    for number in range(rounds):
        if number >= 2 and time.monotonic() > deadline:
            break
        progress(f"round {number + 1}/{rounds}")
        for key, task in order:
            if key in failures:
                continue
            try:
                with task.context():
                    samples[key] += timer(task.prepare(), device)
            except Exception as error:  # one task's failure must not end the others' turns
                failures[key] = _without_frames(error)
        order.reverse()
    times = {key: timing(of) for key, of in samples.items() if of and key not in failures}
    return times, failures


def _without_frames(error: Exception) -> Exception:
    """The error alone: the frames it passed through would keep their tensors."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def saved_mib(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> float:
    """MiB that autograd keeps between forward and backward, storages of ``weights`` not counted.

    A storage counts once and whole, if it is still alive when the forward pass has ended: what a
    part of the graph kept that is gone by then is not counted. What a function keeps outside
    ``save_for_backward`` escapes; ``held_mib`` sees that on CUDA.
    """
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # an output that its own node kept would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(nbytes for storage, nbytes in saved.values() if not storage.expired())
    del out
    return total / MIB


def held_mib(forward: Callable[[], Tensor], device: torch.device) -> float | None:
    """MiB the allocator holds after a forward beyond its inputs and its output; CUDA alone."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    out = forward()
    held = torch.cuda.memory_allocated(device) - before - out.untyped_storage().nbytes()
    return held / MIB


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """MiB by which ``call`` raises what torch has allocated, at its highest.

    The allocator's own figure on CUDA, the profiler's record of it elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events: Any = profile.profiler
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(accumulate((nbytes for _, nbytes in changes), initial=0)) / MIB


def rates(device: torch.device, dtype: torch.dtype, *, edge: int, numel: int) -> dict[str, float]:
    """``copy_gb_s``, bytes read and written, and ``gemm_tflop_s`` of a product, on random data.

    Args:
        device: where.
        dtype: of the tensors.
        edge: of the square matrices multiplied.
        numel: elements copied.
    """
    source = torch.randn(numel, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = _typical(lambda: target.copy_(source), device)
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    gemm_ms = _typical(lambda: left @ right, device)
    return {
        "copy_gb_s": 2 * numel * dtype.itemsize / copy_ms / 1e6,
        "gemm_tflop_s": 2 * edge**3 / gemm_ms / 1e9,
    }


def raise_ceilings(found: dict[str, float], device: torch.device, dtype: torch.dtype) -> None:
    """Measure this machine's :func:`rates` and keep the higher of each with what ``found`` holds.

    Taken before and after a run, so that a busy moment does not set them.
    """
    cuda = device.type == "cuda"
    edge, numel = (8192, 2**30 // dtype.itemsize) if cuda else (1024, 2**24)
    for name, rate in rates(device, dtype, edge=edge, numel=numel).items():
        found[name] = max(rate, found.get(name, 0.0))


def _typical(call: Callable[[], Any], device: torch.device) -> float:
    call()
    return statistics.median(value for _ in range(8) for value in sample(call, device))
