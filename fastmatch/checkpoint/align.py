"""Align checkpoints out of core: weight matching over tensors that are read on demand, then one pass that writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from fastmatch._internal.checks import check_type
from fastmatch._internal.computed_weights import check_equal_parts, fixed_parts
from fastmatch._internal.files import check_format, in_common
from fastmatch._internal.outputs import Claim, check_target, real_path
from fastmatch._internal.ranks import Ranks, current
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.states import working_dtype
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch.checkpoint.differences import log_differences
from fastmatch.checkpoint.inputs import differ_in_inputs, with_more_inputs
from fastmatch.checkpoint.journal import journal_path
from fastmatch.checkpoint.names import Layout, RenamedCheckpoint
from fastmatch.checkpoint.on_ranks import claimed_on_ranks, journaling_on_ranks
from fastmatch.checkpoint.pairs import Pair, check_runs_nothing
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.same_model import check_same_sizes
from fastmatch.checkpoint.scaled import check_unscaled
from fastmatch.checkpoint.tracing import check_no_adapter, is_diffusion, prove_checkpoint, trace_checkpoint
from fastmatch.checkpoint.writer import write_like
from fastmatch.matching.weights import WeightMatching
from fastmatch.merging.average import merge_states
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import PermutationSpec

__all__ = ["AlignedTensors", "WriteOptions", "align_checkpoints", "metadata_of"]


@dataclass(frozen=True)
class WriteOptions:
    """What :func:`align_checkpoints` writes.

    Args:
        merge: write ``(1 - merge) A + merge B`` instead of the aligned B, in B's element types. Sums run in the wider type of
            both, float32 at least. Integers, and what A lacks, are B's; a line of the logger ``fastmatch`` names what A lacks.
        dtype: element type for floating point tensors; by default each keeps its own.
        force: replace an output that exists.
        permutations: a file for the permutations too, as :meth:`Alignment.save` writes it. While it is not written, the journal
            is kept.

    Raises:
        TypeError: ``merge`` is not a number, ``dtype`` not a torch.dtype, or ``force`` not a bool.
        ValueError: ``merge`` is not finite, or ``dtype`` is not a floating point type.
    """

    merge: float | None = None
    dtype: torch.dtype | None = None
    force: bool = False
    permutations: str | Path | None = None

    def __post_init__(self) -> None:
        if self.merge is not None:
            if isinstance(self.merge, bool) or not isinstance(self.merge, (int, float)):
                raise TypeError(f"merge: expected a finite number; got {self.merge!r}")
            if not math.isfinite(self.merge):
                raise ValueError(f"merge: expected a finite number; got {self.merge!r}")
        if self.dtype is not None:
            expected = "dtype: expected a floating point type such as torch.bfloat16"
            if not isinstance(self.dtype, torch.dtype):
                raise TypeError(f"{expected}; got {self.dtype!r}")
            if not self.dtype.is_floating_point:
                raise ValueError(f"{expected}; got {self.dtype}")
        check_type("force", self.force, bool)


class AlignedTensors:
    """Computes the tensors of the aligned B by their names in the file."""

    def __init__(self, b: Checkpoint, layout: Layout, alignment: Alignment) -> None:
        self.layout, self.alignment = layout, alignment
        self.parameters = RenamedCheckpoint(b, layout)
        # A file alternates between the chunks of an expert's two stacks.
        self.cached_aligned = lru_cache(maxsize=2)(self._aligned)

    def _aligned(self, parameter: str) -> torch.Tensor:
        tensor = self.parameters[parameter]
        return permute_tensor(tensor, parameter, self.alignment.spec, self.alignment.permutations)

    def __call__(self, name: str) -> torch.Tensor:
        """Return one tensor to write."""
        chunk = self.layout[name]
        if chunk.index:
            return self.cached_aligned(chunk.parameter)[chunk.index]
        return self._aligned(chunk.parameter)


def _merged(a: Checkpoint, aligned: AlignedTensors, write: WriteOptions) -> Callable[[str], torch.Tensor]:
    """Return what computes the tensors to write: those of the aligned B, or their merge with A's where A has numbers like them."""
    weight = write.merge
    if weight is None:
        return aligned
    fixed = fixed_parts(a)

    def merged(name: str) -> torch.Tensor:
        tensor = aligned(name)
        if name not in a or not _are_averaged(a.headers[name], tensor):
            return tensor
        first = a[name]
        if differ_in_inputs(name, first.shape, tensor.shape):
            first = with_more_inputs(first, tensor)
        elif first.shape != tensor.shape:
            return tensor
        if name in fixed:
            check_equal_parts(name, first, tensor, fixed, str(aligned.parameters.path))
            return tensor
        work = torch.promote_types(working_dtype(first.dtype), working_dtype(tensor.dtype))
        if torch.equal(first.to(work), tensor.to(work)):  # indices in a floating point type bear no rounding
            return tensor
        final = write.dtype if write.dtype is not None and tensor.is_floating_point() else tensor.dtype
        if not first.dtype == tensor.dtype == final:
            # merge_states returns the type of the first.
            first = first.to(work)
        return merge_states([{name: first}, {name: tensor}], [1 - weight, weight])[name].to(final)

    return merged


def _are_averaged(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether both hold real numbers, or both complex ones; integers are counters and indices."""
    if first.is_complex() or second.is_complex():
        return first.is_complex() and second.is_complex()
    return first.is_floating_point() and second.is_floating_point()


# parameters: progress is part of every long call
def align_checkpoints(
    path_a: str | Path,
    path_b: str | Path,
    out: str | Path,
    matcher: WeightMatching = WeightMatching(),
    *,
    spec: PermutationSpec | None = None,
    write: WriteOptions = WriteOptions(),
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool | None = None,
) -> Alignment:
    """Align checkpoint B to checkpoint A without holding either in memory, and write the result.

    Example:
        >>> from fastmatch.checkpoint import align_checkpoints
        >>> alignment = align_checkpoints("model-a", "model-b", "model-b-aligned")
        >>> alignment.matching.converged
        True

    Args:
        path_a, path_b: Hugging Face directories (config.json; model.safetensors or shards with an index), directories of
            torch.distributed.checkpoint (with a config.json, or ``spec``), or single .safetensors or torch files, of the same
            architecture. A is the reference. Of a diffusion model, B may have
            networks that A lacks; they are written as they are.
        out: the directory to write for directories, the file to write for files. A directory has B's shards, config and
            tokenizer.
        matcher: a :class:`fastmatch.WeightMatching`. The other matchers run the networks and need them in memory.
        spec: which axes move together; by default traced from config.json, or from the names and shapes in a file of a
            diffusion model. ``spec.select`` and
            ``spec.without_residual`` restrict the groups that are matched.
        write: what to write: the aligned B or a merge, its element type, and whether an existing output is replaced.
        device: the device that computes the gain matrices.
        resume: continue from the journal of a killed run of the same tensors and settings; the output has the same bits
            as that of a run that is not interrupted. The journal is a hidden file in the folder of ``out`` and is
            removed when the output is complete. ``max_sweeps`` and ``write`` may differ.
        progress: show progress bars; None shows them on a terminal, for work of more than a second.

    Returns:
        The :class:`fastmatch.Alignment`. Its ``proof`` is of a small model of the architecture that the config names; None
        if ``spec`` was given, or no small model runs.

    In a torch.distributed process group all ranks make the call with the same arguments, see the same files, and share the
    reading, the solves and the writing. Output and journal do not depend on the number of ranks: a run that is killed may go
    on with another number.

    Raises:
        TypeError: ``matcher`` is not a WeightMatching.
        ValueError: ``matcher`` compares balanced networks, a file is damaged, A and B differ, numbers of eight bits have
            scales beside them, a tensor or the result holds NaN or infinity, nothing can be
            permuted, or the journal is of another run. File and tensor are named.
        OSError: a file is missing or cannot be written, or another run writes ``out``. Nothing is left half-written.
        RuntimeError: another rank failed or does not answer; the message names it.

    Cost: a near copy takes two reads of A and three of B: one to check and hash both, one to match, one to write. Otherwise each
    further solve reads the group's tensors for its gain and, if units move, to verify the progress in float64. Memory holds the
    tensors of one group of A and of B, up to 1.15 GB together with the gain matrix, and the solver's workspace.
    """
    ranks = current()
    with ranks.together():
        return _claim_and_align(path_a, path_b, out, matcher, spec, write, device, resume, progress, ranks)


# parameters: those of align_checkpoints, and the ranks
def _claim_and_align(
    path_a: str | Path,
    path_b: str | Path,
    out: str | Path,
    matcher: WeightMatching,
    spec: PermutationSpec | None,
    write: WriteOptions,
    device: str | torch.device,
    resume: bool,
    progress: bool | None,
    ranks: Ranks,
) -> Alignment:
    check_runs_nothing(matcher)
    a, b = Checkpoint(path_a, device), Checkpoint(path_b, device)
    seen = {"path_a": a.headers, "path_b": b.headers}
    options = {"matcher": matcher, "spec": spec, "write": write, "resume": resume}
    check_same_on_ranks(ranks, "align_checkpoints", options | seen)
    for path in (path_a, path_b):
        check_no_adapter(path)
    for checkpoint in (a, b):
        check_unscaled(checkpoint)
    if Path(path_a).is_dir() != Path(path_b).is_dir():
        kind = "directory" if Path(path_a).is_dir() else "file"
        raise ValueError(f"{path_b}: expected a {kind}, like {path_a}")
    check_same_sizes(a, b)
    check_target(out, force=write.force, folder=Path(path_b).is_dir())
    if write.permutations is not None:
        check_format(write.permutations, "permutations", {".safetensors"})
        check_target(write.permutations, force=write.force)
    for path in (path_a, path_b):
        if real_path(path).is_relative_to(real_path(out)):
            what = "is" if real_path(path) == real_path(out) else "holds"
            raise ValueError(f"out: {out} {what} one of the inputs; choose another path")
    with claimed_on_ranks(ranks, out, force=write.force, folder=Path(path_b).is_dir()) as claim:
        return _align(a, b, claim, matcher, spec, write, resume=resume, progress=progress, ranks=ranks)


# parameters: those of align_checkpoints, and the ranks
def _align(
    a: Checkpoint,
    b: Checkpoint,
    claim: Claim,
    matcher: WeightMatching,
    spec: PermutationSpec | None,
    write: WriteOptions,
    *,
    resume: bool,
    progress: bool | None,
    ranks: Ranks,
) -> Alignment:
    traced = trace_checkpoint(b.path, b) if spec is None else spec
    pair = Pair.of(a, b, traced)
    if write.merge is not None and ranks.rank == 0:
        log_differences(b, a, sizes=is_diffusion(b.path, b))  # of other models they are named as not matched
    watch = Stopwatch()
    with watch("survey"):
        surveyed = pair.survey(ranks)
    # After the survey: a NaN in a file is likelier than a proof that fails.
    proof = prove_checkpoint(b.path, b, traced) if spec is None else None
    run = pair.run(matcher, surveyed)
    with journaling_on_ranks(ranks, journal_path(claim.path), run, pair.common, resume=resume) as remembered:
        with watch("match"):
            alignment = replace(
                pair.match(matcher, surveyed, remembered, ranks=ranks, progress=progress), proof=proof
            )
        output = _merged(a, AlignedTensors(b, pair.layout, alignment), write)
        metadata = None if write.merge is None else metadata_of([a, b])
        with watch("write"):
            write_like(b, claim, output, dtype=write.dtype, metadata=metadata, ranks=ranks)
            if write.permutations is not None and ranks.rank == 0:
                alignment.save(write.permutations, force=write.force)
    return replace(alignment, seconds=watch.seconds)


def metadata_of(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Return what the headers of all files of all checkpoints say; torch files have none, and say nothing."""
    return in_common([c.metadata.get(file, {}) for c in checkpoints for file in c.files])
