"""What a kernel costs, without a GPU: compiled ahead of time for a chip and read from its code.

A kernel file exports ``CONFIGS``, a list of :class:`Config`: every configuration it ships by
default, with the argument types it is launched with. :func:`inspect_config` compiles one for one
:class:`Target` and reads registers and spills from the binary (``cuobjdump`` of Triton's nvidia
backend; the metadata in the assembly on AMD), shared memory from Triton's metadata, and 16-byte
loads, 16-byte stores and matrix instructions from PTX or the assembly.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """A chip to compile for."""

    name: str
    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
        Target("sm_89", GPUTarget("cuda", 89, 32), 99 * 1024),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
        Target("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
    )
}


@dataclass(frozen=True)
class Config:
    """One default configuration of one kernel.

    Attributes:
        name: what the table and the test ids show.
        kernel: the ``@triton.jit`` function.
        types: Triton's type of every argument that is not a constexpr: ``"*bf16"``, ``"i32"``.
            Pointers count as 16-byte aligned.
        constexprs: every ``tl.constexpr`` argument; None values are allowed.
        multiples_of_16: names of the integer arguments (strides, mostly) that are such multiples.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        wide_loads: how many 16-byte loads the code must hold at least.
        wide_stores: how many 16-byte stores the code must hold at least, on CUDA; on AMD Triton
            stores from the matrix layout, which is its own choice.
        narrow: how many global accesses of one or two bytes the code may hold, None for any.
        mma: whether matrix instructions must be there.
        targets: the chips it ships for.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    multiples_of_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    wide_loads: int = 1
    wide_stores: int = 1
    narrow: int | None = None
    mma: bool = True
    targets: tuple[str, ...] = field(default=tuple(TARGETS))


@dataclass(frozen=True)
class Report:
    """What the compiled code of a :class:`Config` uses on a :class:`Target`."""

    config: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    narrow: int
    mma: int

    def problems(self, config: Config) -> list[str]:
        """What the rules forbid: spills, too much shared memory, narrow accesses, no MMA."""
        target = TARGETS[self.target]
        limit, cuda = target.shared_limit, target.gpu.backend == "cuda"
        checks = (
            (self.spill_bytes > 0, f"spills {self.spill_bytes} bytes"),
            (self.shared_bytes > limit, f"{self.shared_bytes} bytes shared, {limit} allowed"),
            (self.wide_loads < config.wide_loads, f"{self.wide_loads} 16-byte loads"),
            (
                cuda and self.wide_stores < config.wide_stores,
                f"{self.wide_stores} 16-byte stores",
            ),
            (
                config.narrow is not None and self.narrow > config.narrow,
                f"{self.narrow} accesses of one or two bytes",
            ),
            (config.mma and not self.mma, "no matrix instruction"),
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


def compile_config(config: Config, target: Target) -> Any:
    """Triton's compiled kernel; no GPU and no driver needed.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``, where kernels are not compiled.
    """
    fn = config.kernel
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled")
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in config.constexprs:
            signature[name], constexprs[name] = "constexpr", config.constexprs[name]
            continue
        signature[name] = config.types[name]
        if signature[name].startswith("*") or name in config.multiples_of_16:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(fn, signature, constexprs, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target.gpu, options=options)


def inspect_config(config: Config, target: Target | str) -> Report:
    """Compile ``config`` for ``target`` and read what it uses."""
    target = TARGETS[target] if isinstance(target, str) else target
    compiled = compile_config(config, target)
    backend = target.gpu.backend
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = _last_number(text, ".vgpr_count"), _amd_spills(text)
    else:
        text = compiled.asm["ptx"]
        registers, spilled = _cubin_usage(compiled.asm["cubin"])
    return Report(
        config=config.name,
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


__all__ = ["TARGETS", "Config", "Report", "Target", "compile_config", "inspect_config"]
