"""Align any number of checkpoints to one of them, out of core: one pair at a time, then one pass for a merge of all."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from fastmatch._internal.checks import check_integer
from fastmatch._internal.coefficients import check_weights
from fastmatch._internal.locks import hidden, locked
from fastmatch._internal.outputs import check_target, real_path
from fastmatch._internal.renaming import discard
from fastmatch._internal.unfinished import unfinished
from fastmatch.checkpoint.align import AlignedTensors, WriteOptions
from fastmatch.checkpoint.blocks import coefficients_by_name
from fastmatch.checkpoint.journal import journaling
from fastmatch.checkpoint.merge import MergeOptions, Tensors, write_merge
from fastmatch.checkpoint.pairs import Pair, check_runs_nothing, layout_for
from fastmatch.checkpoint.reader import CONFIG, Checkpoint
from fastmatch.checkpoint.same_model import check_same_sizes
from fastmatch.checkpoint.tracing import names_in, prove_checkpoint, take_tied_names, trace_checkpoint
from fastmatch.checkpoint.writer import write_like
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.verify import Verification
from fastmatch.spec import PermutationSpec

__all__ = ["align_many_checkpoints"]

log = logging.getLogger("fastmatch")


# parameters: progress is part of every long call
def align_many_checkpoints(
    paths: Sequence[str | Path],
    out: str | Path,
    matcher: WeightMatching = WeightMatching(),
    *,
    reference: int = 0,
    spec: PermutationSpec | None = None,
    merge: MergeOptions | None = None,
    write: WriteOptions = WriteOptions(),
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool | None = None,
) -> list[Alignment]:
    """Align checkpoints to one of them, and write each of the others, or the merge of all.

    Example:
        >>> from fastmatch.checkpoint import MergeOptions, align_many_checkpoints
        >>> paths = ["model-a", "model-b", "model-c"]
        >>> alignments = align_many_checkpoints(paths, "aligned")  # aligned/model-b, aligned/model-c
        >>> _ = align_many_checkpoints(paths, "soup", merge=MergeOptions([0.5, 0.3, 0.2]))

    Args:
        paths: two or more checkpoints of one architecture, as :func:`align_checkpoints` takes them.
        out: a folder in which each aligned checkpoint is written under its own name; it is made if there is none. With ``merge``
            the file or folder of the merge.
        matcher: a :class:`fastmatch.WeightMatching`.
        reference: the index of the checkpoint that keeps its order.
        spec: which axes move together; by default traced, once for checkpoints with the same names and shapes.
        merge: write the merge of all in place of the aligned checkpoints. The weights are in the order of ``paths``, and the output
            has the layout of the reference, which counts as the first.
        write: the element type, and whether outputs that exist are replaced.
        device: the device that computes the gain matrices.
        resume: continue a killed run of the same tensors and settings. Finished matches and outputs are kept, and a match that was
            under way goes on from its journal. What a run keeps is in hidden files beside ``out``, removed at the end.
        progress: show progress bars; None shows them on a terminal, for work of more than a second.

    Returns:
        One :class:`fastmatch.Alignment` per checkpoint; the reference's is the identity. A map between any two of them is a
        composition, so every cycle of maps is the identity. ``matching`` is None for those of a run that was killed.

    Raises:
        TypeError, ValueError, OSError: see :func:`align_checkpoints`; or two checkpoints have the same name.

    Cost: that of :func:`align_checkpoints` for each checkpoint but the reference, plus one read of each for a merge. Memory holds
    the tensors of one pair, and for a merge one tensor of each of two checkpoints and all permutations. No file stays open.
    """
    paths, out = [Path(p) for p in paths], Path(out)
    if len(paths) < 2:
        raise ValueError(f"paths: expected at least two checkpoints, got {len(paths)}")
    check_integer("reference", reference)
    if reference >= len(paths):
        raise ValueError(f"reference: expected an index below {len(paths)}, got {reference}")
    check_runs_nothing(matcher)
    if write.merge is not None:
        raise ValueError(
            "write: WriteOptions(merge=...) is for two checkpoints; give merge=MergeOptions(...)"
        )
    if write.permutations is not None:
        raise ValueError(
            "write: WriteOptions(permutations=...) is for two checkpoints; save each of the alignments that are returned"
        )
    if merge is not None and merge.base is not None:
        raise ValueError(
            "merge: a base has an order of units of its own; align it too, and give it to merge_checkpoints afterwards"
        )
    paths = [paths[reference], *paths[:reference], *paths[reference + 1 :]]
    first = Checkpoint(paths[0])
    for path in paths[1:]:
        check_same_sizes(first, Checkpoint(path))
    if merge is not None:
        weights = _in_order(merge, reference, len(paths))
        merge = replace(merge, weights=weights)
        # Now, not after hours of matching.
        coefficients_by_name(first, weights[1:], merge.blocks)
    outs = _outputs(paths, out, is_merge=merge is not None)
    run = _Run(paths, out, matcher, spec, write, str(device), progress)
    with unfinished(), locked(out), run.opened(outs, resume=resume):
        found = [run.aligned(k, outs.get(path)) for k, path in enumerate(paths[1:], start=1)]
        identity = Alignment({}, found[0].spec, proof=found[0].proof)
        if merge is not None:
            run.merge([identity, *found], merge)
    found.insert(0, identity)
    return [*found[1 : reference + 1], found[0], *found[reference + 1 :]]


def _in_order(merge: MergeOptions, reference: int, count: int) -> list[float]:
    """Return the weights with the reference's first."""
    weights = check_weights(merge.weights, count)
    return [weights[reference], *weights[:reference], *weights[reference + 1 :]]


def _outputs(paths: list[Path], out: Path, *, is_merge: bool) -> dict[Path, Path]:
    """Return where each checkpoint but the reference is written; nowhere for a merge.

    Raises:
        ValueError: two have the same name, or an output is one of the inputs.
    """
    places: dict[Path, Path] = {} if is_merge else {path: out / path.name for path in paths[1:]}
    owners: dict[Path, Path] = {}
    for path, place in places.items():
        if place in owners:
            raise ValueError(
                f"paths: {owners[place]} and {path} have the same name, and would be written as {place}"
            )
        owners[place] = path
    for place in [out] if is_merge else owners:
        for path in paths:
            if real_path(path).is_relative_to(real_path(place)):
                raise ValueError(f"out: {place} is or holds one of the inputs; choose another folder")
    if len(set(paths)) < len(paths):
        raise ValueError("paths: expected each checkpoint once")
    return places


class _Run:
    """The state of a run: what was traced, and a hidden folder beside the output with what is finished.

    A finished match is a file of permutations, whose name is a hash of all that the match depends on. A note is made there of an
    output before it is written for the first time: outputs appear complete or not at all, so one that exists and is noted is
    finished.
    """

    # parameters: those of the public function
    def __init__(
        self, paths: list[Path], out: Path, matcher: WeightMatching, spec: PermutationSpec | None, write: WriteOptions,
        device: str, progress: bool | None,
    ) -> None:  # fmt: skip
        self.paths, self.out, self.matcher, self.spec, self.write = paths, out, matcher, spec, write
        self.device, self.progress = device, progress
        self.kept = hidden(out, "many")
        self.traced: dict[str, PermutationSpec] = {}
        self.proofs: dict[str, Verification | None] = {}
        self.whole: PermutationSpec | None = None

    @contextmanager
    def opened(self, outs: dict[Path, Path], *, resume: bool) -> Iterator[None]:
        """Check the outputs, and hold the hidden folder. At the end it is removed; after an error only if it is empty."""
        if self.kept.is_symlink() or (self.kept.exists() and not self.kept.is_dir()):
            raise ValueError(f"{self.kept}: is not a folder of an earlier run; remove it")
        for path, place in outs.items():
            noted = resume and any(self.kept.glob(f"{_hash(place.name)}.*"))
            if self.out.is_dir() and not noted:
                check_target(place, force=self.write.force, folder=path.is_dir())
        if not outs:
            check_target(self.out, force=self.write.force, folder=self.paths[0].is_dir())
        elif not self.out.is_dir():
            check_target(self.out, folder=True)
        if not resume:
            discard(self.kept)
        made = [self.kept, *([self.out] if outs else [])]
        for folder in made:
            folder.mkdir(exist_ok=True)
        try:
            yield
        except BaseException:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise
        discard(self.kept)

    def aligned(self, number: int, place: Path | None) -> Alignment:
        """Return the alignment of one checkpoint, found now or before, and write the checkpoint if ``place`` is given."""
        path = self.paths[number]
        a, b = Checkpoint(self.paths[0], self.device), Checkpoint(path, self.device)
        if self.paths[0].is_dir() != path.is_dir():
            kind = "folder" if self.paths[0].is_dir() else "file"
            raise ValueError(f"{path}: expected a {kind}, like {self.paths[0]}")
        structure = self._structure_of(b)
        if structure not in self.traced:
            self.traced[structure] = trace_checkpoint(b.path, b) if self.spec is None else self.spec
        traced = self.traced[structure]
        pair = Pair.of(a, b, traced)
        surveyed = pair.survey()
        # After the survey: a NaN in a file is likelier than a proof that fails.
        if structure not in self.proofs:
            self.proofs[structure] = prove_checkpoint(b.path, b, traced) if self.spec is None else None
        proof = self.proofs[structure]
        run = pair.run(self.matcher, surveyed)
        key = _hash(json.dumps([run, self.matcher.max_sweeps]))
        file = self.kept / f"{key}.safetensors"
        if file.exists():
            alignment = Alignment.load(file)
        else:
            # Without --resume the folder is new, and so is the journal.
            with journaling(
                self.kept / f"{_hash(json.dumps(run))}.journal", run, pair.common, resume=True
            ) as journal:
                alignment = pair.match(self.matcher, surveyed, journal.step, progress=self.progress)
                alignment.save(file)
        # Seventy equal structures are kept once.
        self.whole = self.whole if self.whole == pair.whole else pair.whole
        alignment = replace(alignment, spec=self.whole, proof=proof)
        log.info("%s: %r", path, alignment)
        if place is not None:
            self._write(b, place, AlignedTensors(b, pair.layout, alignment), key)
        return alignment

    def _write(self, b: Checkpoint, place: Path, output: AlignedTensors, key: str) -> None:
        note = self.kept / f"{_hash(place.name)}.{_hash(key + str(self.write.dtype))}"
        if note.exists() and place.exists():
            return
        try:
            if not place.exists():
                note.touch()
            write_like(b, place, output, dtype=self.write.dtype, force=self.write.force)
            note.touch()
        except Exception:
            note.unlink(missing_ok=True)
            raise

    def _structure_of(self, b: Checkpoint) -> str:
        """Return a hash that is the same for checkpoints with the same names, shapes and config, which are traced and proved once."""
        if self.spec is not None:
            return ""
        configs = sorted(b.path.rglob(CONFIG)) if b.path.is_dir() else []
        shapes = {name: tuple(tensor.shape) for name, tensor in b.headers.items()}
        return _hash(json.dumps([shapes, [file.read_text() for file in configs]], sort_keys=True))

    def merge(self, alignments: list[Alignment], options: MergeOptions) -> None:
        """Write the merge of all, each in its new order."""
        models = []
        for path, alignment in zip(self.paths, alignments, strict=True):
            checkpoint = Checkpoint(path)
            layout = layout_for(path, checkpoint, alignment.spec)
            aligned = AlignedTensors(checkpoint, layout, alignment)
            models.append(
                _in_names_of(models[0].checkpoint, checkpoint, aligned)
                if models
                else Tensors(checkpoint, aligned)
            )
        models[0] = Tensors(models[0].checkpoint, models[0].checkpoint.__getitem__)
        write_merge(
            models, self.out, options, dtype=self.write.dtype, force=self.write.force, progress=self.progress
        )


def _in_names_of(first: Checkpoint, checkpoint: Checkpoint, aligned: AlignedTensors) -> Tensors:
    """Return aligned tensors by the names that the same networks have in the first checkpoint."""
    renamed = Checkpoint(checkpoint.path)
    own = take_tied_names(renamed, first)
    names = names_in(first, of=renamed)
    renamed.rename(names)
    own |= {new: own.get(old, old) for old, new in names.items()}
    return Tensors(renamed, lambda name: aligned(own.get(name, name)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
