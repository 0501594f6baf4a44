"""Weight matching of models that are divided among ranks."""

from __future__ import annotations

from fastmatch._internal.divided import GatheringRanks
from fastmatch._internal.ranks import Ranks
from fastmatch._internal.states import State
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.matcher import Matcher
from fastmatch.matching.weights import WeightMatching, match_weights
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import PermutationSpec

__all__ = ["check_divided", "match_divided"]


def check_divided(matcher: Matcher, ranks: Ranks) -> None:
    """Raise TypeError unless the matcher and the ranks suit models that are divided."""
    if not isinstance(matcher, WeightMatching):
        raise TypeError(
            f"matcher: models that are divided among ranks (DTensor) are matched by WeightMatching; got {type(matcher).__name__}"
        )
    if matcher.balance:
        raise TypeError(
            "balance: runs the models on one process, so it does not take models that are divided among ranks (DTensor); "
            "call fm.balance on the whole models, and divide the balanced ones"
        )
    if not ranks.is_group:
        raise TypeError(
            "model_a, model_b: of divided models (DTensor) all ranks make the call, outside of fm.alone()"
        )


# parameters: those of match_weights, and the ranks
def match_divided(
    a: State, b: State, spec: PermutationSpec, matcher: Matcher, ranks: Ranks, progress: bool | None
) -> Matching:
    """Match as :func:`match_weights` does, with tensors that are gathered when they are needed and gains that are not kept."""
    assert isinstance(matcher, WeightMatching)
    gathering = GatheringRanks(ranks, [a, b])
    hooks = Hooks(out_of_core=True, ranks=gathering)
    a, b = gathering.states
    return match_weights(a, b, spec, matcher, hooks, progress=progress)
