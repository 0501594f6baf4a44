"""Tile sizes, chosen in plain Python from shapes, precision and target, and the properties of the targets.

There is no autotuner: it needs a driver, and its choices could not all be compiled and inspected ahead of time. A product
uses one of two tiles of ``MATMUL[target][precision]``, for small shapes and for wide ones. Tests compile all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

__all__ = [
    "FACTOR_DTYPES",
    "INTERPRETER",
    "MATMUL",
    "PRECISIONS",
    "ROUNDOFF",
    "TARGETS",
    "Kind",
    "Target",
    "Tiles",
    "ceil_div",
    "dot_precision",
    "is_aligned",
    "matmul_tiles",
    "precision_of",
    "target_of",
]

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels read."""

PRECISIONS = ("ieee", "fp16", "fp16x3")
"""Of float32 products: every bit; 11 bits of each factor (those of TF32); 22 bits of each factor in three products. The last two
scale rows by powers of two, multiply in float16 on the matrix units and sum in float32: see ``packing``. Half-precision
inputs are multiplied as they are (``"half"``), which is exact in float32."""

ROUNDOFF = {
    "ieee": (0.0, 0.0, 1),
    "half": (0.0, 0.0, 1),
    "fp16": (2.0**-10 + 2.0**-20, 2.0**-35, 1),
    "fp16x3": (2.0**-20, 2.0**-35, 3),
}
"""Precision -> (bound on the relative error of one product; what numbers near zero add to the error of one product, relative to the
largest elements of both rows; products summed for one). By the bound of ``packing``: rounding each factor loses 2^-11 or
2^-22 of it, low times low another 2^-22, and numbers near zero 2^-37 of their row's largest, on both sides."""


@dataclass(frozen=True)
class Target:
    """What is known of a GPU without one at hand: for compiling ahead and for the roofline on paper.

    Rates are the vendors' published dense peaks, in FLOP/s; bandwidth in byte/s.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int
    """Largest shared memory of one block, bytes."""
    shared_per_processor: int
    registers: int
    """32-bit registers of one multiprocessor."""
    max_warps: int
    processors: int
    bandwidth: float
    rates: dict[str, float]
    """Precision -> FLOP/s."""


def _rates(ieee: float, tf32: float, half: float) -> dict[str, float]:
    return {"ieee": ieee, "tf32": tf32, "tf32x3": tf32 / 3, "half": half, "fp16": half, "fp16x3": half / 3}


TARGETS = {
    # NVIDIA A100 SXM 80 GB, H100 SXM, B200: data sheets; blocks' shared memory from the CUDA C++ guide.
    "sm_80": Target(
        "sm_80",
        "cuda",
        80,
        32,
        163 << 10,
        164 << 10,
        65536,
        64,
        108,
        2.04e12,
        _rates(19.5e12, 156e12, 312e12),
    ),
    "sm_90": Target(
        "sm_90", "cuda", 90, 32, 227 << 10, 228 << 10, 65536, 64, 132, 3.35e12, _rates(67e12, 495e12, 989e12)
    ),
    "sm_100": Target(
        "sm_100",
        "cuda",
        100,
        32,
        227 << 10,
        228 << 10,
        65536,
        64,
        148,
        8.0e12,
        _rates(75e12, 1100e12, 2250e12),
    ),
    # AMD Instinct MI300X. Its float32 products run on the matrix units.
    "gfx942": Target(
        "gfx942",
        "hip",
        "gfx942",
        64,
        64 << 10,
        64 << 10,
        131072,
        32,
        304,
        5.3e12,
        _rates(163e12, 654e12, 1307e12),
    ),
}

INTERPRETER = Target(
    "interpreter", "interpreter", 0, 32, 1 << 30, 1 << 30, 65536, 64, 4, 1e9, _rates(1e9, 1e9, 1e9)
)
"""Triton's interpreter on CPU tensors: small tiles, so that small shapes have several of them."""


@dataclass(frozen=True)
class Tiles:
    """Output tile (rows x columns), depth of one step of the contraction, warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options of a launch. Fused multiply-adds are allowed: they round once instead of twice."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


MATMUL: dict[str, dict[str, tuple[Tiles, Tiles]]] = {
    # IEEE float32 has no matrix unit on NVIDIA: smaller tiles, whose accumulators and operands fit the registers.
    "sm_80": {
        "ieee": (Tiles(64, 32, 16, 4, 3), Tiles(128, 64, 16, 8, 2)),
        "half": (Tiles(64, 64, 64, 8, 3), Tiles(128, 128, 64, 8, 3)),
        "fp16x3": (Tiles(64, 64, 32, 4, 3), Tiles(128, 128, 32, 8, 3)),
        "fp16, summed": (Tiles(64, 64, 64, 8, 3), Tiles(128, 64, 64, 8, 3)),
    },
    # Measured on an H200 among seven tiles: docs/design/kernels.md.
    "sm_90": {
        "ieee": (Tiles(64, 64, 16, 4, 3), Tiles(128, 64, 16, 8, 3)),
        "half": (Tiles(64, 64, 64, 4, 3), Tiles(128, 128, 64, 8, 3)),
        "fp16x3": (Tiles(64, 64, 64, 4, 3), Tiles(128, 128, 64, 8, 3)),
        "fp16, reduced": (Tiles(64, 64, 64, 4, 3), Tiles(128, 256, 64, 8, 3)),
        "ieee, reduced": (Tiles(64, 64, 16, 4, 3), Tiles(128, 64, 16, 8, 2)),
    },
    "gfx942": {p: (Tiles(64, 64, 32, 4, 2), Tiles(128, 64, 32, 8, 2)) for p in ("ieee", "half", "fp16x3")},
    "interpreter": {
        p: (Tiles(32, 32, 32, 4, 1), Tiles(64, 64, 64, 4, 1)) for p in ("ieee", "half", "fp16x3")
    },
}
"""Target -> precision -> tiles of a product of packed factors, for small shapes and for wide ones. "fp16" takes those of "half".
An entry "precision, kind" comes before that of the precision."""
MATMUL["sm_100"] = {
    "ieee": (Tiles(64, 64, 16, 8, 2), Tiles(128, 64, 16, 8, 3)),
    "half": MATMUL["sm_90"]["half"],
    "fp16x3": MATMUL["sm_90"]["fp16x3"],
    "fp16, summed": (Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 3)),
    "fp16x3, summed": (Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 3)),
}

Kind: TypeAlias = Literal["written", "reduced", "summed"]
"""What becomes of a tile: it is written or added to in float32, its rows are reduced, or it is added to in float64."""

WIDE = 2048
"""Rows and columns from which the larger tile is used: 256 tiles of 128 x 128."""


def precision_of(dtype: torch.dtype, precision: str) -> str:
    """The product's key in the tables: ``"half"`` for half-precision inputs, else ``precision``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    return "half" if dtype in (torch.float16, torch.bfloat16) else precision


def matmul_tiles(rows: int, columns: int, precision: str, target: Target, kind: Kind = "written") -> Tiles:
    """The tile for a (rows, columns) output; ``precision`` is a result of :func:`precision_of`."""
    table = MATMUL[target.name]
    plain = "half" if precision == "fp16" else precision
    small, wide = table.get(f"{precision}, {kind}", table[plain])
    if target is INTERPRETER:
        return small if min(rows, columns) < 256 else wide
    return wide if min(rows, columns) >= WIDE else small


def is_aligned(tensors: Iterable[torch.Tensor], numbers: Iterable[int]) -> bool:
    """Whether Triton can use 16-byte loads: all pointers, strides and sizes are multiples of 16.

    Args:
        tensors: tensors that are read by pointer.
        numbers: strides and sizes. 0 and 1 are allowed, since the compiler treats them as constants.
    """
    return all(x.data_ptr() % 16 == 0 for x in tensors) and all(k in (0, 1) or k % 16 == 0 for k in numbers)


def dot_precision(precision: str, target: Target) -> str:
    """The name that ``product.dot`` takes."""
    if target is INTERPRETER:
        return "interpreter"
    if precision == "tf32x3" and target.backend == "hip":
        return "ieee"  # which runs on the matrix units there
    return precision if precision in ("tf32", "tf32x3") else "ieee"  # float16 has nothing to choose


def target_of(device: torch.device) -> Target:
    """The target that kernels on ``device`` are compiled for; the interpreter for CPU tensors.

    Raises:
        ValueError: CPU tensors without Triton's interpreter, or a GPU that no tiles were chosen for.
    """
    if device.type == "cpu":
        import triton.knobs

        if not triton.knobs.runtime.interpret:
            raise ValueError(
                "backend: Triton kernels need CUDA or HIP tensors, got CPU tensors; "
                "use backend='cpu', or set TRITON_INTERPRET=1 before triton is imported"
            )
        return INTERPRETER
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, _ = torch.cuda.get_device_capability(device)
        # Consumer chips of a generation have less shared memory; the sm_80 tiles fit all of them.
        name = {9: "sm_90", 10: "sm_100"}.get(major, "sm_80" if major >= 8 else f"sm_{major}x")
    if name not in TARGETS:
        raise ValueError(f"device: expected one of {sorted(TARGETS)}, got {name}")
    return TARGETS[name]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
