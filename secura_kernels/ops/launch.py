"""Launches that cost the host little: a kernel's compiled code, found by what it was given.

Triton works out anew at each launch which compiled code fits the arguments. On the host of an H100
a launch took 18.5 µs that way and 6.0 µs without, by itself in a loop (benchmarks/LOG.md). The
second launch of a :class:`Kernel` on arguments of the same kind (dtypes, alignment, the very same
integers, but for those of ``do_not_specialize``, such as the count of tokens) goes straight to the
code that the first one found. Everything else is Triton's: compiling, the interpreter, hooks, the
recorder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver

MOST_KEPT = 4096
"""Compiled launches kept for one kernel; all are dropped when there are more."""
_NUMBERS = (int, float, bool, type(None))
_SHORT_OFFSETS = torch.version.hip is not None
"""Whether Triton makes other code, with offsets of 32 bits, for tensors of up to 2 GiB."""


watchers: list[Callable[[Any, tuple[Any, ...]], None]] = []
"""What is told of each launch on tensors without data: the function and its arguments."""


class _Compiled(NamedTuple):
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    stream: Callable[[int], int]


class Kernel:
    """A ``@triton.jit`` function, launched as ``kernel[grid](*arguments, **constants)``.

    Args:
        jit: the function. All of its arguments but the constants are given by position, the first
            of them a tensor on the device that is current.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._known: dict[tuple[Any, ...], _Compiled] = {}
        parameters = enumerate(getattr(jit, "params", ()))  # the interpreter's has none
        self._unspecialized = [at for at, one in parameters if one.do_not_specialize]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """What launches the kernel on a grid of up to three numbers."""
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        first = arguments[0]
        if not first.is_cuda or _is_hooked():
            for told in watchers:
                told(self.jit, arguments)
            self.jit[grid](*arguments, **constants)
            return
        device = first.get_device()
        kinds: list[Any] = [
            (argument.dtype, argument.data_ptr() & 15)
            if (kind := type(argument)) not in _NUMBERS
            else kind  # of which Triton asks no more
            if kind is float
            else (kind, argument)
            for argument in arguments
        ]
        if _SHORT_OFFSETS:
            tensors = (one for one in arguments if type(one) not in _NUMBERS)
            kinds.append(tuple(one.untyped_storage().size() < 2**31 for one in tensors))
        for place in self._unspecialized:  # integers: Triton asks no more than how wide they are
            kinds[place] = arguments[place].bit_length() // 32
        key = (device, *kinds, *constants.values())
        known = self._known.get(key)
        if known is None:
            self._learn(key, self.jit[grid](*arguments, **constants), len(arguments), constants)
            return
        x, y, z = (*grid, 1, 1)[:3]
        code = known.stream(device), known.function, known.metadata
        known.run(x, y, z, *code, None, None, None, *arguments, *known.constants)

    def _learn(self, key: tuple, compiled: Any, given: int, constants: dict[str, Any]) -> None:
        if len(self._known) >= MOST_KEPT:
            self._known.clear()
        self._known[key] = _Compiled(
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            tuple(constants[name] for name in self.jit.arg_names[given:]),
            driver.active.get_current_stream,
        )


def _is_hooked() -> bool:
    """Whether a profiler is to be told of launches."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):
            return True
    return False


__all__ = ["MOST_KEPT", "Kernel", "watchers"]
