"""Tile sizes, chosen in plain Python from shapes, precision and target, and the properties of the targets.

There is no autotuner: it needs a driver, and its choices could not all be compiled and inspected ahead of time. A product
uses one of three tiles of ``MATMUL[target][precision]`` or ``CROSS``: for small shapes, for wide shapes, and for data of
unknown alignment, for which each thread holds many addresses and larger tiles spill. Tests compile all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

__all__ = [
    "CROSS",
    "FACTOR_DTYPES",
    "INTERPRETER",
    "MATMUL",
    "PRECISIONS",
    "ROUNDOFF",
    "TARGETS",
    "Target",
    "Tiles",
    "ceil_div",
    "dot_precision",
    "factors_aligned",
    "is_aligned",
    "matmul_tiles",
    "precision_of",
    "target_of",
]

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels read."""

PRECISIONS = ("ieee", "tf32", "bf16x3", "tf32x3")
"""Of float32 products: every bit; 11 bits of each factor; about 16 bits of each factor in three bfloat16
products; about 20 bits in three TF32 products, on the matrix units where IEEE products have none. Half-precision inputs are multiplied as they are (``"half"``), which is exact in float32."""

ROUNDOFF = {
    "ieee": (0.0, 1),
    "half": (0.0, 1),
    "tf32": (2.0**-8.9, 1),
    "bf16x3": (2.0**-16, 3),
    "tf32x3": (2.0**-18, 3),
}
"""Precision -> (bound on the relative error of one product, products summed for it). Factors lose at most
2^-10 to tf32, if hardware truncates; x = hi + lo + r with |r| <= 2^-18 |x| for bfloat16 and 2^-20 |x| for tf32, and lo
times lo is omitted."""


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
    return {"ieee": ieee, "tf32": tf32, "bf16x3": half / 3, "tf32x3": tf32 / 3, "half": half}


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


_ANY = Tiles(128, 64, 32, 8, 2)
MATMUL: dict[str, dict[str, tuple[Tiles, Tiles, Tiles]]] = {
    # IEEE float32 has no matrix unit on NVIDIA: smaller tiles, whose accumulators and operands fit the registers.
    # Those of sm_90 for IEEE, and its small ones for tf32 and half precision, spill on sm_80 with Triton 3.7.1.
    "sm_80": {
        "ieee": (Tiles(64, 32, 16, 4, 3), Tiles(128, 64, 16, 8, 2), Tiles(64, 64, 16, 8, 2)),
        "tf32": (Tiles(64, 64, 32, 8, 3), Tiles(128, 128, 32, 8, 3), _ANY),
        # Both halves of each factor are in registers here, where wgmma and tcgen05 read shared memory.
        "bf16x3": (Tiles(64, 64, 32, 8, 3), Tiles(128, 64, 16, 8, 4), _ANY),
        "tf32x3": (Tiles(64, 64, 32, 8, 3), Tiles(64, 64, 32, 8, 3), Tiles(64, 64, 16, 8, 2)),
        "half": (Tiles(64, 64, 64, 8, 3), Tiles(128, 128, 64, 8, 3), _ANY),
    },
    "sm_90": {
        # Four warps for the small tile, or two pairs of factors spill.
        "ieee": (Tiles(64, 64, 16, 4, 3), Tiles(128, 64, 16, 8, 3), Tiles(128, 64, 16, 8, 2)),
        "tf32": (Tiles(64, 64, 32, 4, 3), Tiles(128, 128, 32, 8, 3), _ANY),
        "bf16x3": (Tiles(64, 64, 32, 4, 3), Tiles(128, 128, 32, 8, 3), _ANY),
        "tf32x3": (Tiles(64, 64, 32, 4, 3), Tiles(128, 128, 32, 8, 3), _ANY),
        "half": (Tiles(64, 64, 64, 4, 3), Tiles(128, 128, 64, 8, 3), _ANY),
    },
    # The same tiles for every precision: deeper or wider ones spill in half precision if strides are not known multiples.
    "gfx942": {p: (Tiles(64, 64, 32, 4, 2), Tiles(128, 64, 32, 8, 2), _ANY) for p in (*PRECISIONS, "half")},
    "interpreter": {
        p: (Tiles(32, 32, 32, 4, 1), Tiles(64, 64, 64, 4, 1), Tiles(32, 32, 32, 4, 1))
        for p in (*PRECISIONS, "half")
    },
}
# The tiles of sm_90 that are replaced here spill on sm_100 in some variant under some Triton from 3.7.1 to 3.9.
MATMUL["sm_100"] = {
    **MATMUL["sm_90"],
    "ieee": (Tiles(64, 64, 16, 8, 2), *MATMUL["sm_90"]["ieee"][1:]),
    "bf16x3": (Tiles(64, 64, 16, 8, 3), *MATMUL["sm_90"]["bf16x3"][1:]),
    "tf32x3": (Tiles(64, 64, 16, 8, 3), *MATMUL["sm_90"]["tf32x3"][1:]),
    "tf32": (*MATMUL["sm_90"]["tf32"][:2], Tiles(64, 64, 32, 4, 2)),
}

_UNITS = (Tiles(64, 64, 32, 4, 3), Tiles(128, 64, 32, 8, 2), Tiles(64, 64, 32, 8, 2))
_DEEP = Tiles(64, 64, 16, 8, 2)
_AMD = (Tiles(64, 64, 32, 8, 2), Tiles(128, 64, 16, 8, 2), Tiles(128, 64, 16, 8, 2))
CROSS: dict[str, dict[str, tuple[Tiles, Tiles, Tiles]]] = {
    # Moments keep statistics and two shifts in registers in addition to the product: 128 x 128 would spill.
    "sm_80": {
        "ieee": (Tiles(64, 64, 16, 4, 3), Tiles(128, 64, 16, 8, 3), Tiles(64, 64, 16, 8, 2)),
        "tf32": _UNITS,
        "bf16x3": (*_UNITS[:2], Tiles(64, 64, 16, 4, 2)),
        "tf32x3": (_DEEP, _DEEP, _DEEP),
    },
    "sm_100": {
        "ieee": (Tiles(64, 32, 16, 8, 3), Tiles(64, 32, 16, 8, 3), Tiles(64, 32, 16, 8, 1)),
        "tf32": _UNITS,
        "bf16x3": (*_UNITS[:2], Tiles(64, 64, 16, 4, 2)),
        "tf32x3": (*_UNITS[:2], Tiles(64, 64, 16, 4, 2)),
    },
    "gfx942": dict.fromkeys(PRECISIONS, _AMD),
    "interpreter": {p: MATMUL["interpreter"][p] for p in PRECISIONS},
}
CROSS["sm_90"] = {**CROSS["sm_80"], "bf16x3": _UNITS, "tf32x3": _UNITS}

WIDE = 1024
"""Rows and columns from which the larger tile is used: 64 tiles of 128 x 128."""


def precision_of(dtype: torch.dtype, precision: str) -> str:
    """The product's key in the tables: ``"half"`` for half-precision inputs, else ``precision``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    return "half" if dtype in (torch.float16, torch.bfloat16) else precision


def matmul_tiles(
    rows: int,
    columns: int,
    precision: str,
    target: Target,
    table: dict[str, dict[str, tuple[Tiles, Tiles, Tiles]]] = MATMUL,
    *,
    aligned: bool = True,
) -> Tiles:
    """The tile for a (rows, columns) output; ``precision`` is a result of :func:`precision_of`."""
    small, wide, unaligned = table[target.name][precision]
    if not aligned:
        return unaligned
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


def factors_aligned(*factors: torch.Tensor) -> bool:
    """:func:`is_aligned` of (rows, depth) factors."""
    return is_aligned(factors, [k for x in factors for k in (*x.stride(), x.shape[1])])


def dot_precision(precision: str, target: Target) -> str:
    """The name that ``product.dot`` takes."""
    if target is INTERPRETER:
        return "interpreter"
    if precision == "tf32x3" and target.backend == "hip":
        return "ieee"  # which runs on the matrix units there
    return "ieee" if precision == "half" else precision


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
