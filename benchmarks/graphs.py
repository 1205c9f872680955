"""A call as a CUDA graph, recorded once and replayed: launches then cost the host nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class NotCapturableError(RuntimeError):
    """A call cannot become a CUDA graph; the message says why."""


def supported(device: torch.device) -> bool:
    """Whether calls on a device can become graphs at all."""
    return device.type == "cuda"


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as a graph's replay; its results are overwritten by each.

    It runs twice before it is recorded, to compile, the second time refusing to wait for the
    device: what waits cannot be recorded, and a recording that breaks off harms what comes after.

    Raises:
        NotCapturableError: where the call waits for the device, or its recording fails.
        Exception: what the call itself raises.
    """
    home, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(home)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        call()
    try:
        # A recording that fails leaves its own stream the current one: the outer context goes back.
        with torch.cuda.stream(home):
            with torch.cuda.stream(side), _refusing_to_wait():
                call()
            home.wait_stream(side)
            with torch.cuda.graph(graph):
                call()
    except Exception as error:
        _recover()
        # What broke a recording off is the context of what ended it.
        cause = error.__context__ or error
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise NotCapturableError(reason) from error
    return graph.replay


def why_not(call: Callable[[], Any]) -> str | None:
    """Why ``call`` cannot become a graph, or None where it can.

    Raises:
        Exception: what the call itself raises.
    """
    try:
        graphed(call)
    except NotCapturableError as error:
        return str(error)
    return None


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _recover() -> None:
    """Give the default generator a state that takes part in no recording."""
    torch.cuda.synchronize()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
