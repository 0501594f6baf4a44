"""Ahead-of-time compilation of every configuration that the launchers may pick, and what can be read from it.

Registers, spills, shared memory and the instruction mix need no GPU: Triton compiles for a named target, and
its wheel carries NVIDIA's cuobjdump; AMD's assembly states the same numbers itself.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastmatch.kernels.triton import channel_affine, cost_rows, gain, moments, permute_merge, row_softmin
from fastmatch.kernels.triton.tiles import CROSS, MATMUL, TARGETS, Target, Tiles

__all__ = ["Case", "Compiled", "cases", "compile_case"]

DIVISIBLE = ":16"
"""Suffix of a type that is declared a multiple of 16, as Triton finds at launch for pointers and most strides."""
MATRIX = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma", "gfx942": r"v_mfma"}


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments and its constants.

    Attributes:
        op, variant: names for the table.
        precision: of the products, or "-".
        arguments: name -> type ("*fp32:16", "i32", ...), a constant, or a tuple of these.
        tiles: what the launcher passes on.
        matrix: whether the matrix units are expected to be used.
        wide: whether 16-byte loads are expected.
    """

    op: str
    variant: str
    precision: str
    kernel: Any
    arguments: dict[str, Any]
    tiles: Tiles
    matrix: bool
    wide: bool = True


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
    instructions: dict[str, int] = field(default_factory=dict)

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


def _pair(dtype: str, gathered: bool, count: int) -> dict[str, Any]:
    pointer, size = f"*{dtype}:16", "i32:16"
    index = "*i64:16" if gathered else None
    return {
        "a_ptrs": (pointer,) * count,
        "b_ptrs": (pointer,) * count,
        "depths": (size,) * count,
        "a_strides": ((size, 1),) * count,
        "b_strides": ((size, 1),) * count,
        "contraction_ptrs": (index,) * count,
        "b_index_ptr": index,
    }


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.depth}


def _matmul_cases(target: Target, which: slice) -> Iterator[Case]:
    for precision, sizes in MATMUL[target.name].items():
        dtype = "bf16" if precision == "half" else "fp32"
        asked = "ieee" if precision == "half" else precision
        matrix = precision != "ieee" or target.backend == "hip"
        for tiles in dict.fromkeys(sizes[which]):
            for variant, gathered, count in (
                ("plain", False, 1),
                ("gathered", True, 1),
                ("two pairs", False, 2),
            ):
                common = {**_pair(dtype, gathered, count), "n": "i32:16", "m": "i32:16"}
                constants = {"K": count, "PRECISION": asked, "GROUP": 8, **_blocks(tiles)}
                yield Case(
                    "gain",
                    variant,
                    precision,
                    gain._gain_kernel,
                    {
                        **common,
                        "out_ptr": "*fp32:16",
                        "out_stride": "i32:16",
                        "ACCUMULATE": count == 2,
                        **constants,
                    },
                    tiles,
                    matrix,
                )
                yield Case(
                    "cost_rows",
                    variant,
                    precision,
                    cost_rows._candidates_kernel,
                    {
                        **common,
                        "v_ptr": "*fp32:16",
                        "value_ptr": "*fp32:16",
                        "column_ptr": "*i32:16",
                        "cutoff_ptr": "*fp32:16",
                        "few": "i32",
                        **constants,
                    },
                    tiles,
                    matrix,
                )
                if not gathered:
                    yield Case(
                        "row_softmin",
                        variant,
                        precision,
                        row_softmin._softmin_kernel,
                        {
                            **{k: v for k, v in common.items() if k != "b_index_ptr"},
                            "v_ptr": "*fp32:16",
                            "part_ptr": "*fp32:16",
                            "temperature": "fp32",
                            **constants,
                        },
                        tiles,
                        matrix,
                    )


def _cross_cases(target: Target, which: slice) -> Iterator[Case]:
    for precision, sizes in CROSS[target.name].items():
        for tiles, (layout_name, layout), dtype, statistics in itertools.product(
            dict.fromkeys(sizes[which]), LAYOUTS.items(), ("fp32", "bf16"), (True, False)
        ):
            yield Case(
                "moments" if statistics else "moments, one model",
                f"{layout_name}, {dtype}",
                precision,
                moments._cross_kernel,
                {
                    "a_ptr": f"*{dtype}:16",
                    "b_ptr": f"*{dtype}:16",
                    "a_sizes": layout["sizes"],
                    "a_strides": layout["strides"],
                    "a_stride_c": layout["stride_c"],
                    "b_sizes": layout["sizes"],
                    "b_strides": layout["strides"],
                    "b_stride_c": layout["stride_c"],
                    "shift_a_ptr": "*fp32:16",
                    "shift_b_ptr": "*fp32:16",
                    "stats_a_ptr": "*fp64:16",
                    "stats_b_ptr": "*fp64:16",
                    "cross_ptr": "*fp64:16",
                    "channels_a": "i32:16",
                    "channels_b": "i32:16",
                    "samples": "i32:16",
                    "first": "i32:16",
                    "STATS": statistics,
                    "DIMS_A": layout["dims"],
                    "DIMS_B": layout["dims"],
                    "PRECISION": precision,
                    "CHUNK": moments.CHUNK,
                    "BLOCK_A": tiles.rows,
                    "BLOCK_B": tiles.columns,
                    "BLOCK_T": tiles.depth,
                },
                tiles,
                precision != "ieee" or target.backend == "hip",
                # A tile of half-precision numbers gives each thread of a shallow tile less than 16 bytes.
                dtype == "fp32" or tiles.depth >= 32,
            )


LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous map": {
        "sizes": (1, "i32:16", "i32:16"),
        "strides": (0, "i32:16", 1),
        "stride_c": "i32:16",
        "dims": 2,
    },
    "channels last": {"sizes": (1, 1, "i32:16"), "strides": (0, 0, "i32:16"), "stride_c": 1, "dims": 1},
}


def _memory_cases(target: Target) -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        for variant, layout in LAYOUTS.items():
            stride_c = 1 if layout["stride_c"] == 1 else 16
            tiles = moments.stats_tiles(stride_c)
            shape = {
                "x_ptr": f"*{dtype}:16",
                "sizes": layout["sizes"],
                "strides": layout["strides"],
                "stride_c": layout["stride_c"],
                "channels": "i32:16",
                "samples": "i32:16",
                "DIMS": layout["dims"],
            }
            yield Case(
                "moments, no product",
                f"{variant}, {dtype}",
                "-",
                moments._stats_kernel,
                {
                    **shape,
                    "shift_ptr": "*fp32:16",
                    "stats_ptr": "*fp64:16",
                    "span": "i32:16",
                    "CHUNK": moments.CHUNK,
                    "BLOCK_C": tiles.rows,
                    "BLOCK_T": tiles.depth,
                },
                tiles,
                False,
            )
            for samples in (256, 8192, 1 << 20):
                tiles, held = channel_affine.channel_tiles(samples, stride_c)
                if samples == 8192 and not held:
                    continue
                for method in range(3):
                    yield Case(
                        "channel_affine",
                        f"{variant}, {dtype}, {samples} samples, method {method}",
                        "-",
                        channel_affine._channel_affine_kernel,
                        {
                            **shape,
                            "out_ptr": f"*{dtype}:16",
                            "out_sizes": layout["sizes"],
                            "out_strides": layout["strides"],
                            "out_stride_c": layout["stride_c"],
                            "goal_mean_ptr": "*fp32:16",
                            "goal_std_ptr": "*fp32:16",
                            "mean_ptr": "*fp64:16",
                            "variance_ptr": "*fp64:16",
                            "eps": "fp32",
                            "OUT_DIMS": layout["dims"],
                            "METHOD": method,
                            "HELD": held,
                            "BLOCK_C": tiles.rows,
                            "BLOCK_T": tiles.depth,
                        },
                        tiles,
                        False,
                        samples != 256 or stride_c == 1,
                    )
        for variant, first, second in (
            ("average", (None, None), (None, None)),
            ("rows", (None, "*i64:16"), (None, None)),
            ("rows and columns", (None, "*i64:16"), (None, "*i64:16")),
            ("one weight, rows and columns", ("*i64:16",), ("*i64:16",)),
        ):
            count = len(first)
            tiles, steps = permute_merge.run_tiles(8192, second[-1] is not None)
            yield Case(
                "permute_merge",
                f"{variant}, {dtype}",
                "-",
                permute_merge._permute_merge_kernel,
                {
                    "weight_ptrs": (f"*{dtype}:16",) * count,
                    "alphas": ("fp32",) * count,
                    "first_ptrs": first,
                    "second_ptrs": second,
                    "out_ptr": f"*{dtype}:16",
                    "runs": "i32:16",
                    "n1": "i32:16",
                    "middle": 1,
                    "length": "i32:16",
                    "block1": 1,
                    "block2": 1,
                    "K": count,
                    "BLOCK_R": tiles.rows,
                    "BLOCK_L": tiles.columns,
                    "STEPS": steps,
                },
                tiles,
                False,
            )
    for candidates in (64, 2048, cost_rows.MAX_CANDIDATES):
        tiles = cost_rows.select_tiles(candidates)
        yield Case(
            "cost_rows, selection",
            f"{candidates} candidates",
            "-",
            cost_rows._select_kernel,
            {
                "value_ptr": "*fp32:16",
                "column_ptr": "*i32:16",
                "cutoff_ptr": "*fp32:16",
                "v_ptr": "*fp32:16",
                "index_ptr": "*i64:16",
                "best_ptr": "*fp32:16",
                "cost_ptr": "*fp32:16",
                "bound_ptr": "*fp32:16",
                "n": "i32",
                "k": "i32",
                "candidates": "i32:16",
                "tiles_n": "i32:16",
                "BLOCK_R": tiles.rows,
                "BLOCK_C": tiles.columns,
                "BLOCK_T": max(tiles.columns // 4, 2),
            },
            tiles,
            False,
            candidates > 64,
        )


def cases(target: Target) -> list[Case]:
    """Every configuration that the launchers may pick on ``target``: aligned data, and strides and pointers of any kind."""
    memory = list(_memory_cases(target))
    known, unknown = (
        [*_matmul_cases(target, which), *_cross_cases(target, which), *memory]
        for which in (slice(2), slice(2, 3))
    )
    aligned = known + [_float16(case) for case in known if _uses(case, "*bf16")]
    return aligned + [_unaligned(case) for case in unknown]


def _uses(case: Case, pointer: str) -> bool:
    return any(isinstance(v, str) and v.startswith(pointer) for v in _flat(case.arguments.values()))


def _retyped(value: Any, old: str, new: str) -> Any:
    """``value`` with a part of its type names replaced, inside tuples too."""
    if isinstance(value, tuple):
        return tuple(_retyped(v, old, new) for v in value)
    return value.replace(old, new) if isinstance(value, str) else value


def _float16(case: Case) -> Case:
    arguments = {k: _retyped(v, "*bf16", "*fp16") for k, v in case.arguments.items()}
    named = case.variant.replace("bf16", "fp16")
    return replace(
        case, arguments=arguments, variant=named if named != case.variant else f"{case.variant}, fp16"
    )


def _unaligned(case: Case) -> Case:
    """The same for pointers, sizes and strides of which nothing is known: right, with narrow loads."""
    arguments = {k: _retyped(v, DIVISIBLE, "") for k, v in case.arguments.items()}
    return replace(case, arguments=arguments, variant=f"{case.variant}, unaligned", wide=False)


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
    size = 2 if _uses(case, "*bf16") or _uses(case, "*fp16") else 4
    t = case.tiles
    if case.precision != "-":
        return (t.rows + t.columns) * t.depth * size, 2 * t.rows * t.columns * t.depth
    inputs = case.arguments.get("K", 1)
    return t.rows * t.columns * t.depth * size * inputs, 0


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


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
        registers, spills, text = _read_cubin(compiled.asm["cubin"])
        matrix_text = compiled.asm["ptx"]
        wide = len(re.findall(r"\bLDG\.E\.128|\bLDG\.E\S*\.128|\bLDGSTS\S*\.128", text))
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


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, loads and stores of spilled registers, disassembly)."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(str(tool), "--dump-resource-usage", file.name)
        sass = _run(str(tool), "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump: expected REG and STACK, got {usage!r}")
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return int(found.group(1)), max(spills, int(found.group(2)) // 4), sass


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
