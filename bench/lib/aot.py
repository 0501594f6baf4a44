"""Ahead-of-time compilation of the kernels' configurations, and what can be read from the machine code.

Registers, spills, shared memory and the instruction mix need no GPU: Triton compiles for a named target, and
its wheel carries NVIDIA's cuobjdump; AMD's assembly states the same numbers itself.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.aot_cases import DIVISIBLE, Case, cases
from fastmatch_kernels._triton.tiles import TARGETS, Target

__all__ = ["Case", "Compiled", "cases", "compile_all", "compile_case", "count_instructions", "disassembled"]

MATRIX = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma", "gfx942": r"v_mfma"}
STL, LDL, LDG, LDGSTS = 0x387, 0x983, 0x981, 0xFAE
"""Operations as machine code names them: stores and loads of spilled registers, loads, copies into shared memory."""
COPY_SIZE = {"sm_80": 9, "sm_90": 9, "sm_100": 10}
"""The first of three bits that hold the size of a copy, in the second word of the instruction; a load's is 9."""
SIXTEEN_BYTES = 6


@dataclass(frozen=True)
class Compiled:
    """What was read from the machine code of one case."""

    op: str
    variant: str
    precision: str
    target: str
    tiles: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    shared_limit: int
    blocks: int
    occupancy: float
    matrix: int
    matrix_expected: bool
    wide_loads: int
    wide_expected: bool
    tile_bytes: int
    tile_flops: int

    @property
    def faults(self) -> list[str]:
        """What a launch on the target would suffer from."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, over {self.shared_limit}")
        if self.matrix_expected and not self.matrix:
            found.append("no matrix instruction")
        if self.wide_expected and not self.wide_loads:
            found.append("no 16-byte load")
        if self.blocks < 1:
            found.append("does not fit a multiprocessor")
        return found

    def row(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "faults": self.faults}


def _source(case: Case) -> Any:
    """Triton's description of the case: signature, constants and divisibility by argument path."""
    from triton.compiler import ASTSource

    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def signature(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(signature(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, str) and re.match(r"\*|[iu]\d|fp\d", value):
            if value.endswith(DIVISIBLE):
                attributes[path] = [["tt.divisibility", 16]]
            return value.removesuffix(DIVISIBLE)
        constants[path] = value
        return "constexpr"

    names = case.kernel.arg_names
    types = {name: signature(case.arguments[name], (i,)) for i, name in enumerate(names)}
    return ASTSource(case.kernel, types, constexprs=constants, attrs=attributes)


def _tile_work(case: Case) -> tuple[int, int]:
    """(bytes loaded, FLOP) of one step of one program: a step of the contraction, or one block of memory."""
    size = 2 if case.uses("*bf16", "*fp16") else 4
    t = case.tiles
    if case.precision != "-":
        return (t.rows + t.columns) * t.depth * size, 2 * t.rows * t.columns * t.depth
    inputs = case.arguments.get("K", 1)
    return t.rows * t.columns * t.depth * size * inputs, 0


def compile_case(case: Case, target: Target) -> Compiled:
    """Compiles one case for one target and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(
        _source(case),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=case.tiles.options,
    )
    if target.backend == "cuda":
        registers, spills, wide = _read_cubin(compiled.asm["cubin"], target.name)
        matrix_text = compiled.asm["ptx"]
    else:
        text = matrix_text = compiled.asm["amdgcn"]
        registers = _number(text, "vgpr_count")
        spills = _number(text, "vgpr_spill_count") + _number(text, "sgpr_spill_count")
        wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text))
    shared = compiled.metadata.shared
    t = case.tiles
    # The number of warps may grow (warp specialisation); what is compiled counts.
    warps = compiled.metadata.num_warps
    granule = 8
    per_block = -(-max(registers, 1) // granule) * granule * target.warp_size * warps
    reserved = 1024 if target.backend == "cuda" else 0
    blocks = min(
        target.registers // per_block,
        target.max_warps // warps,
        target.shared_per_processor // (shared + reserved) if shared + reserved else 32,
    )
    tile_bytes, tile_flops = _tile_work(case)
    return Compiled(
        op=case.op,
        variant=case.variant,
        precision=case.precision,
        target=target.name,
        tiles=f"{t.rows} x {t.columns} x {t.depth}",
        warps=t.warps,
        stages=t.stages,
        registers=registers,
        spills=spills,
        shared=shared,
        shared_limit=target.shared,
        blocks=blocks,
        occupancy=blocks * warps / target.max_warps,
        matrix=len(re.findall(MATRIX[target.name], matrix_text)),
        matrix_expected=case.matrix,
        wide_loads=wide,
        wide_expected=case.wide,
        tile_bytes=tile_bytes,
        tile_flops=tile_flops,
    )


def _number(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", assembly)
    if found is None:
        raise ValueError(f"assembly: expected a line .{name}")
    return int(found.group(1))


def _read_cubin(cubin: bytes, target: str) -> tuple[int, int, int]:
    """(registers, loads and stores of spilled registers, 16-byte loads)."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _dumped(cubin, "--dump-resource-usage"))
    if found is None:
        raise ValueError("cuobjdump: expected REG and STACK")
    spills, wide = count_instructions(cubin, target)
    return int(found.group(1)), max(spills, int(found.group(2)) // 4), wide


def _dumped(cubin: bytes, *options: str) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def count_instructions(cubin: bytes, target: str) -> tuple[int, int]:
    """(loads and stores of spilled registers, 16-byte loads), read from the machine code itself.

    An instruction is two words of 64 bits, and its operation is the low 12 bits of the first. cuobjdump counts the same, but
    takes as long to write code as text as Triton takes to make it.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, table + k * size) for k in range(count)]
    spills = wide = 0
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            first, second = np.frombuffer(cubin, "<u8", length // 8, offset).reshape(-1, 2).astype(np.int64).T
            operation = first & 0xFFF
            spills += np.isin(operation, (STL, LDL)).sum()
            for kind, bit in ((LDG, 9), (LDGSTS, COPY_SIZE[target])):
                wide += ((operation == kind) & (second >> bit & 7 == SIXTEEN_BYTES)).sum()
    return int(spills), int(wide)


def disassembled(cubin: bytes) -> tuple[int, int]:
    """What :func:`count_instructions` counts, from cuobjdump's text."""
    text = _dumped(cubin, "-sass")
    wide = re.findall(r"\bLDG\.E\.128|\bLDG\.E\S*\.128|\bLDGSTS\S*\.128", text)
    return len(re.findall(r"\b(?:LDL|STL)\b", text)), len(wide)


def compile_all(names: list[str], quick: bool) -> list[Compiled]:
    """All cases of the named targets; ``quick`` keeps one variant of each operation and precision, and of each product
    an unaligned one."""
    results = []
    for name in names:
        seen = set()
        for case in cases(TARGETS[name]):
            product, unaligned = case.precision != "-", case.variant.endswith("unaligned")
            key = (case.op, case.precision, unaligned)
            small = case.tiles.rows == 64 and not unaligned
            if quick and (key in seen or (product and small) or (unaligned and not product)):
                continue
            seen.add(key)
            results.append(compile_case(case, TARGETS[name]))
    return results
