"""What an alignment of checkpoints will cost on a number of ranks: the schedule is played through, without a tensor.

The model has seven rates of a device and a latency. A rank reads tensors, gathers them, multiplies them into gains, solves assignments,
and exchanges permutations with the others; nothing overlaps. Reading and writing are by rank, as from local disks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastmatch._internal.allowed import DeviceName
from fastmatch._internal.checks import check_integer
from fastmatch._internal.ranks import deal
from fastmatch._internal.states import State
from fastmatch.matching.gains import block_count
from fastmatch.matching.levels import levels_of
from fastmatch.matching.objective import WeightObjective
from fastmatch.spec import PermutationSpec

__all__ = ["DEVICES", "Device", "DeviceName", "Prediction", "Work", "predict", "work_of"]

PARTS = ("survey", "read", "gather", "products", "assignment", "exchange", "write")

SOLVER = 3.0
"""Memory of an assignment, gain included, in float32 gains."""


@dataclass(frozen=True)
class Device:
    """The rates of one rank.

    Attributes:
        products: operations per second of float32 matrix products.
        gather: bytes per second of the tensors of a group, in which they are brought into the order of the other groups and
            float32, and the progress of the objective is measured.
        assignment: entries per second of an assignment problem.
        survey: bytes per second of the pass that reads, hashes and sums all tensors.
        read, write: bytes per second from and to the disk.
        link: bytes per second that a rank takes in from the others.
        latency: seconds of an exchange.
    """

    products: float
    gather: float
    assignment: float
    survey: float
    read: float
    write: float
    link: float
    latency: float


DEVICES: dict[DeviceName, Device] = {
    "cpu": Device(
        products=5e10, gather=1e9, assignment=4e7, survey=4e8, read=1e9, write=5e8, link=1e9, latency=2e-3
    ),
    "h100": Device(
        products=1e14, gather=1e11, assignment=4e7, survey=4e8, read=3e9, write=1e9, link=5e9, latency=2e-3
    ),
}
"""Rough estimates, of one core and of one GPU with a share of its host; no run has checked them together. An H200 multiplied float32
at 1.5e14 for 4096 units and at 2e14 for 16384 (bench/results/kernels_gpu.md). The rest stands for NVMe drives shared by ranks, and
assignments and hashes on a core."""


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        groups: group -> (units, elements and bytes of its tensors in one model). A group of heads or experts counts the
            units inside: all pairs of them are compared.
        coupled: group -> the groups that share a tensor with it.
        files: bytes of each output file.
        tensors: bytes of each tensor of one model.
        blocks: group -> the blocks of its gain that ranks multiply together where it is the only one that they have to
            solve; groups that are left out have one.
    """

    groups: Mapping[str, tuple[int, float, float]]
    coupled: Mapping[str, set[str]]
    files: Sequence[float]
    tensors: Sequence[float]
    blocks: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Prediction:
    """The predicted cost of a run.

    Attributes:
        seconds: of the whole run, by part: those of the rank that the others wait for.
        memory: bytes of the largest gain with its solver, and of the largest tensor of both models.
        read: bytes that all ranks read together.
        moved: bytes that a rank takes in from the others.
        levels: the levels of each sweep.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    memory: float = 0.0
    read: float = 0.0
    moved: float = 0.0
    levels: int = 0

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """The part that takes the most time."""
        return max(self.seconds, key=self.seconds.__getitem__)


def work_of(state: State, spec: PermutationSpec, files: Sequence[float]) -> Work:
    """Return the work of aligning a checkpoint of these tensors, of which only shapes and types are read."""
    problem = WeightObjective(state, state, spec, "affine")
    names = spec.top_level()
    groups, blocks = {}, {}
    for name in names:
        members = [spec.groups[member] for member in problem.grouping[name]]
        parameters = {axis.parameter for group in members for axis in problem.axes(group)}
        inner = max((group.size for group in members if group.name != name), default=1)
        tensors = [problem.headers[p] for p in parameters]
        elements, size = (float(sum(f(t) for t in tensors)) for f in (torch.Tensor.numel, _nbytes))
        groups[name] = spec.groups[name].size * inner, elements, size
        if len(members) == 1:
            blocks[name] = block_count(spec.groups[name].size, elements)
    sizes = [float(_nbytes(tensor)) for tensor in problem.headers.values()]
    return Work(groups, {name: problem.coupled(name) for name in names}, files, sizes, blocks)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def predict(work: Work, device: Device, ranks: int, sweeps: int = 2) -> Prediction:
    """Play the schedule through: the survey, ``sweeps`` in which every group is solved, and the output.

    Gains are whole. A run of near copies multiplies and reads less, because bounds spare it most of its products.

    The order of groups is that of the work; a run draws others, which have about as many levels.

    Args:
        work: what there is to do.
        device: the rates of a rank.
        ranks: the number of ranks.
        sweeps: how many times each group is solved, the first match included. It is known only after a run.

    Raises:
        ValueError: ``ranks`` or ``sweeps`` is not a whole number of at least 1.
    """
    check_integer("ranks", ranks, least=1)
    check_integer("sweeps", sweeps, least=1)
    found = Prediction()
    whole = sum(work.tensors)
    found.seconds["survey"] += 2 * _longest(work.tensors, ranks) / device.survey
    found.read += 2 * whole
    seconds = {name: _seconds(*numbers, device) for name, numbers in work.groups.items()}
    levels = levels_of(work.groups, work.coupled.__getitem__, lambda name: sum(seconds[name].values()))
    found.levels = len(levels)
    for level in levels:
        for begin in range(0, len(level), ranks):
            _add_round(found, level[begin : begin + ranks], seconds, work, device, ranks, sweeps)
    found.seconds["read"] += _longest(work.files, ranks) / device.read
    found.seconds["write"] += _longest(work.files, ranks) / device.write
    found.read += sum(work.files)
    gains = [
        4 * n * n * max(SOLVER, _buffers(work.blocks.get(name, 1), ranks))
        for name, (n, _, _) in work.groups.items()
    ]
    found.memory = max(gains, default=0.0) + 2 * max(work.tensors, default=0.0)
    return found


# parameters: the prediction that is added to, and those of a run
def _add_round(
    found: Prediction,
    names: Sequence[str],
    seconds: Mapping[str, Mapping[str, float]],
    work: Work,
    device: Device,
    ranks: int,
    sweeps: int,
) -> None:
    """Add groups that are solved side by side: the ranks wait for the slowest."""
    slowest = max(names, key=lambda name: sum(seconds[name].values()))
    blocks = work.blocks.get(slowest, 1) if len(names) == 1 else 1
    share = math.ceil(blocks / ranks) / blocks
    for part, value in seconds[slowest].items():
        found.seconds[part] += sweeps * value * (1.0 if part == "assignment" else share)
    if share < 1.0:  # the sums of two ranks become one, and so on
        size = 4.0 * work.groups[slowest][0] ** 2 * math.ceil(math.log2(min(ranks, blocks)))
        found.moved += sweeps * size
        found.seconds["exchange"] += sweeps * size / device.link
    found.read += sweeps * sum(4 * work.groups[name][2] for name in names)
    if ranks > 1:
        # A permutation and both duals of each group; every rank's message is as long as the longest.
        size = ranks * max(24.0 * work.groups[name][0] for name in names)
        found.moved += sweeps * size
        found.seconds["exchange"] += sweeps * (device.latency * math.log2(ranks) + size / device.link)


def _seconds(units: int, elements: float, size: float, device: Device) -> dict[str, float]:
    """The parts of one solve: both models' tensors are read for the gain, and again to measure the progress."""
    return {
        "read": 4 * size / device.read,
        "gather": 2 * size / device.gather,
        "products": 2.0 * units * elements / device.products,
        "assignment": units * units / device.assignment,
    }


def _buffers(blocks: int, ranks: int) -> float:
    """The gains that a rank holds at once while blocks are added up; a message that comes is one more twice."""
    return 1 + math.log2(blocks) + (2 if ranks > 1 and blocks > 1 else 0)


def _longest(sizes: Sequence[float], ranks: int) -> float:
    """The bytes of the rank that has most of them."""
    loads = [0.0] * ranks
    for size, owner in zip(sizes, deal(sizes, ranks), strict=True):
        loads[owner] += size
    return max(loads)
