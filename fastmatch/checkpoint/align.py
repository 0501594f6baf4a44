"""Alignment of checkpoints on disk: weight matching over lazily read tensors, then one streamed write."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from fastmatch._internal.files import check_target
from fastmatch._internal.states import check_finite, check_same_architecture
from fastmatch.checkpoint.journal import Journal, fingerprint
from fastmatch.checkpoint.names import Layout, Piece, UnderParameterNames, layout_of
from fastmatch.checkpoint.reader import CONFIG, Checkpoint
from fastmatch.checkpoint.structure import bind, build_empty, trace_config
from fastmatch.checkpoint.writer import write_like
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.objective import Include
from fastmatch.matching.weights import WeightMatching, match_weights
from fastmatch.merging.average import merge_states
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import PermutationSpec

__all__ = ["align_checkpoints", "journal_path"]


def journal_path(out: str | Path) -> Path:
    """Where the journal of a run that writes ``out`` lies: beside it."""
    out = Path(out)
    return out.parent / f".{out.name}.journal"


def layout_for(path: str | Path, checkpoint: Checkpoint, spec: PermutationSpec) -> Layout:
    """Where a checkpoint's tensors lie in what the spec describes: its own names where the spec is in them."""
    named = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    if named <= set(checkpoint) or not (Path(path) / CONFIG).is_file():
        return {name: Piece(name, tensor.shape) for name, tensor in checkpoint.headers.items()}
    return layout_of(build_empty(path), checkpoint.headers, str(path))


class _Output:
    """Gives the tensors to write: B's aligned, or merged with A's, each named in its errors."""

    def __init__(
        self, a: Checkpoint, b: Checkpoint, layout: Layout, alignment: Alignment, weight: float | None
    ) -> None:
        self.a, self.layout, self.alignment, self.weight = a, layout, alignment, weight
        self.parameters = UnderParameterNames(b, layout)
        # A file lists the pieces of an expert's two stacks in turn.
        self.moved = lru_cache(maxsize=2)(self._moved)

    def _moved(self, name: str) -> torch.Tensor:
        return permute_tensor(self.parameters[name], name, self.alignment.spec, self.alignment.permutations)

    def __call__(self, name: str) -> torch.Tensor:
        piece = self.layout[name]
        moved = self.moved(piece.parameter)[piece.index] if piece.index else self._moved(piece.parameter)
        if self.weight is None:
            return moved
        return merge_states([{name: self.a[name]}, {name: moved}], [1 - self.weight, self.weight])[name]


def align_checkpoints(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    *,
    spec: PermutationSpec | None = None,
    groups: list[str] | None = None,
    residual: bool = True,
    merge: float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    seed: int = 0,
    max_sweeps: int = 100,
    include: Include = "affine",
    progress: bool | None = None,
    force: bool = False,
) -> Alignment:
    """Aligns checkpoint ``b`` to ``a`` without holding either, and writes it to ``out``.

    Example:
        >>> alignment = align_checkpoints("model-a", "model-b", "model-b-aligned")

    Args:
        a, b: Hugging Face directories (config.json; model.safetensors or shards with an index), or single
            .safetensors or torch files of the same architecture. A is the reference.
        out: a directory for a directory, a file for a file; same shards, config and tokenizer copied from B.
        spec: which axes move together; traced from A's config.json where left out.
        groups: names of the groups to match; all where left out.
        residual: False leaves residual streams where they are: they move nearly every weight at once.
        merge: write ``(1 - merge) A + merge B`` instead of aligned B.
        dtype: element type to write floating point tensors in; their own where left out.
        device: where the gains are computed.
        resume: go on from the journal of a killed run with the same files and settings. The journal lies
            beside ``out`` and is removed when the output is complete.
        seed, max_sweeps, include, progress: see :class:`fastmatch.WeightMatching`.
        force: replace an output that exists.

    Returns:
        The :class:`fastmatch.Alignment`, as matched.

    Raises:
        ValueError, OSError: a file is damaged, missing or cannot be written, or A and B differ; file and
            tensor are named, and nothing is left half-written.

    Cost: each solve reads the group's tensors once for the gains and, where units move, once more to prove
    progress in float64; memory is one tensor of A and of B with copies of B's, the gain matrix and the solver's.
    """
    first, second = Checkpoint(a, device), Checkpoint(b, device)
    if Path(a).is_dir() != Path(b).is_dir():
        raise ValueError(f"{b}: expected a {'directory' if Path(a).is_dir() else 'file'}, like {a}")
    check_target(out, force=force)
    if Path(out).resolve() in (Path(a).resolve(), Path(b).resolve()):
        raise ValueError(f"out: {out} is one of the inputs; choose another path")
    check_same_architecture(first.headers, second.headers, str(a), str(b))
    if spec is None:
        if not Path(a).is_dir():
            raise ValueError(f"spec: needed, since {a} has no config.json beside it to trace")
        spec = trace_config(a)
    layout = layout_for(a, first, spec)
    one, two = (UnderParameterNames(checkpoint, layout) for checkpoint in (first, second))
    spec = bind(spec, one.headers, str(a))
    if groups is not None:
        spec = spec.select(groups)
    if not residual:
        spec = spec.without_residual()
    if not spec.groups:
        raise ValueError(f"{a}: nothing in it can be permuted")
    for checkpoint in (first, second):
        check_finite(checkpoint, str(checkpoint.path))
    key = fingerprint(first, second, spec, seed=seed, include=include)
    journal = Journal(journal_path(out), key, spec, resume=resume)
    init = journal.permutations or "greedy"
    matcher = WeightMatching(init, max_sweeps=max_sweeps, include=include, seed=seed)
    hooks = Hooks(out_of_core=True, stale=journal.stale, on_solve=journal.add)
    matching = match_weights(one, two, spec, matcher, hooks, progress=progress)
    alignment = Alignment(matching.permutations, spec, matching)
    write_like(second, out, _Output(first, second, layout, alignment, merge), dtype=dtype, force=force)
    journal.remove()
    return alignment
