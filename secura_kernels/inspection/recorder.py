"""What a kernel costs, without a GPU: its launches recorded, compiled for a chip and read.

:func:`record` lets the launchers run on tensors of the ``meta`` device as if a chip were there, and
keeps what they pass to Triton in place of running it: so what is compiled here is what is launched
there, down to the alignment of every argument. :func:`inspect_launch` compiles a :class:`Launch`
and reads registers and spills from the binary (``cuobjdump`` of Triton's nvidia backend; the
metadata in the assembly on AMD), shared memory from Triton's metadata, and 16-byte loads, 16-byte
stores and matrix instructions from PTX or the assembly. Which launches: :mod:`.launches`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..dispatch import interpreting
from ..gpu import H100, Limits, assume


class Target(NamedTuple):
    """A chip to compile for."""

    name: str
    gpu: GPUTarget
    limits: Limits


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), Limits(163 * 1024, 108)),
        Target("sm_89", GPUTarget("cuda", 89, 32), Limits(99 * 1024, 128)),
        Target("sm_90", GPUTarget("cuda", 90, 32), H100),
        Target("sm_100", GPUTarget("cuda", 100, 32), Limits(227 * 1024, 148)),
        Target("sm_120", GPUTarget("cuda", 120, 32), Limits(99 * 1024, 170)),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), Limits(64 * 1024, 304, rocm=True)),
    )
}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher starts it.

    Attributes:
        key: what tells it from other launches: two with one key share their compiled code.
        kernel: the ``@triton.jit`` function.
        signature: Triton's type of every argument, ``"constexpr"`` for those below.
        constexprs: the constants, arguments of value 1 and None included, by position.
        attributes: what Triton knows of an argument's alignment, by position.
        options: warps and stages.
    """

    key: str
    kernel: Any = field(compare=False)
    signature: Mapping[str, str] = field(compare=False)
    constexprs: Mapping[tuple[int, ...], Any] = field(compare=False)
    attributes: Mapping[tuple[int, ...], Any] = field(compare=False)
    options: Mapping[str, int] = field(compare=False)

    def constant(self, name: str, default: Any = None) -> Any:
        """The constant that an argument is, or ``default`` where it is none or there is none."""
        names = self.kernel.arg_names
        return self.constexprs.get((names.index(name),), default) if name in names else default


class _Driver:
    """Stands for a chip's driver, of which Triton asks no more before it launches."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> str:
        return f"recorded {self.target.name}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Within, kernels launched on tensors of the ``meta`` device are kept instead, once a key.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``, where kernels are not compiled.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled")
    launches: dict[str, Launch] = {}

    def keep(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        key = f"{fn.name} {compile['key']}"
        types, constants, (attributes,) = (
            compile[name] for name in ("signature", "constants", "configs")
        )
        launches[key] = Launch(key, fn.jit_function, types, constants, attributes, options)
        return True  # Triton then takes the launch as done

    before = _active_driver()
    try:
        driver.set_active(_Driver(target))
        with knobs.runtime.scope(), assume(target.limits):
            knobs.runtime.jit_cache_hook = keep
            found: list[Launch] = []
            yield found
            found += launches.values()
    finally:
        driver.set_active(before)


def _active_driver() -> Any:
    try:
        return driver.active
    except RuntimeError:  # no GPU
        return None


class Rule(NamedTuple):
    """What a kernel's code must hold at least, and at most, beyond being free of spills.

    Attributes:
        wide_loads: 16-byte loads, at least.
        wide_stores: 16-byte stores, at least, on CUDA; on AMD Triton stores from the matrix
            layout, which is its own choice.
        narrow: global accesses of one or two bytes, at most; None for any.
        mma: whether matrix instructions must be there.
    """

    wide_loads: int = 0
    wide_stores: int = 0
    narrow: int | None = None
    mma: bool = False


class Report(NamedTuple):
    """What the compiled code of a :class:`Launch` uses on a :class:`Target`."""

    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    narrow: int
    mma: int

    def problems(self, rule: Rule) -> list[str]:
        """What the rules forbid: spills, too much shared memory, narrow accesses, no MMA."""
        target = TARGETS[self.target]
        limit, cuda = target.limits.shared_bytes, target.gpu.backend == "cuda"
        checks = (
            (self.spill_bytes > 0, f"spills {self.spill_bytes} bytes"),
            (self.shared_bytes > limit, f"{self.shared_bytes} bytes shared, {limit} allowed"),
            (self.wide_loads < rule.wide_loads, f"{self.wide_loads} 16-byte loads"),
            (cuda and self.wide_stores < rule.wide_stores, f"{self.wide_stores} 16-byte stores"),
            (
                rule.narrow is not None and self.narrow > rule.narrow,
                f"{self.narrow} accesses of one or two bytes",
            ),
            (rule.mma and not self.mma, "no matrix instruction"),
        )
        return [text for wrong, text in checks if wrong]


_WIDE_LOAD = {
    "cuda": r"ld\.global[\w.:]*\.(?:v4\.[bfus]32|v2\.[bfus]64|v8\.[bfus]32|v4\.[bfus]64)"
    r"|cp\.async\.c[ag]\.shared\.global[^;]*, 0x10|cp\.async\.bulk\S*shared\S*global",
    "hip": r"(?:global|buffer)_load_(?:dwordx4|b128|lds_dwordx4)",
}
_WIDE_STORE = {
    "cuda": r"st\.global[\w.:]*\.(?:v4\.[bfus]32|v2\.[bfus]64|v8\.[bfus]32|v4\.[bfus]64)"
    r"|cp\.async\.bulk\S*global\.shared",
    "hip": r"(?:global|buffer)_store_(?:dwordx4|b128)",
}
_NARROW = {
    "cuda": r"(?:ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*\.[bus](?:8|16)\s",
    "hip": r"(?:global|buffer)_(?:load|store)_(?:u|s)?(?:byte|short)",
}
_MMA = {"cuda": r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", "hip": r"v_mfma_\w+"}


def compile_launch(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel; no GPU and no driver needed."""
    source = triton.compiler.ASTSource(
        launch.kernel, dict(launch.signature), dict(launch.constexprs), dict(launch.attributes)
    )
    return triton.compile(source, target=target.gpu, options=dict(launch.options))


def inspect_launch(launch: Launch, target: Target) -> Report:
    """Compile ``launch`` for ``target``, for which it was recorded, and read what it uses."""
    compiled = compile_launch(launch, target)
    backend = target.gpu.backend
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = _last_number(text, ".vgpr_count"), _amd_spills(text)
    else:
        text = compiled.asm["ptx"]
        registers, spilled = _cubin_usage(compiled.asm["cubin"])
    return Report(
        target=target.name,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        wide_loads=len(re.findall(_WIDE_LOAD[backend], text)),
        wide_stores=len(re.findall(_WIDE_STORE[backend], text)),
        narrow=len(re.findall(_NARROW[backend], text)),
        mma=len(re.findall(_MMA[backend], text)),
    )


def _amd_spills(assembly: str) -> int:
    return 4 * _last_number(assembly, ".vgpr_spill_count")


def _last_number(text: str, key: str) -> int:
    return int(re.findall(rf"{re.escape(key)}:\s*(\d+)", text)[-1])


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """``(registers, bytes of stack)`` of a binary's one kernel; a stack means spills."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"{tool} told no resource usage: {text[-500:]}")
    return int(match[1]), int(match[2])


__all__ = ["TARGETS", "Launch", "Report", "Rule", "Target", "inspect_launch", "record"]
