"""Outputs and journals of several ranks: rank 0 holds both, the others write and repeat what it says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fastmatch._internal.locks import hidden
from fastmatch._internal.outputs import Claim, claimed
from fastmatch._internal.ranks import Ranks
from fastmatch.checkpoint.journal import journaling
from fastmatch.matching.ascent import Step
from fastmatch.spec import PermutationSpec

__all__ = ["claimed_on_ranks", "journaling_on_ranks"]


@contextmanager
def claimed_on_ranks(ranks: Ranks, out: str | Path, *, force: bool, folder: bool) -> Iterator[Claim]:
    """Claim an output on rank 0, as :func:`claimed` does, before another rank writes to it."""
    if ranks.rank == 0:
        with claimed(out, force=force, folder=folder) as claim:
            ranks.exchange(None, f"the claim of {claim.path.name}")
            yield claim
        return
    path = Path(out)
    ranks.exchange(None, f"the claim of {path.name}")
    yield Claim(path, hidden(path, "part"), force, None)


@contextmanager
def journaling_on_ranks(
    ranks: Ranks, path: Path, run: Mapping[str, str], spec: PermutationSpec, *, resume: bool
) -> Iterator[Callable[[str, Callable[[], Step]], Step]]:
    """Open the journal on rank 0, and yield the function that remembers steps: the same ones on all ranks."""
    what = f"the journal of a run ({', '.join(f'{name}: {value}' for name, value in run.items())})"
    if ranks.rank == 0:
        with journaling(path, run, spec, resume=resume) as journal:
            if ranks.size > 1:
                ranks.broadcast(journal.waiting, what)
            yield journal.step
        return
    waiting = deque(ranks.broadcast(list[Step], what))

    def remembered(name: str, compute: Callable[[], Step]) -> Step:
        return waiting.popleft() if waiting else compute()

    yield remembered
