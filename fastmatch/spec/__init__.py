"""Which axes of which parameters move together, and how that is found."""

from fastmatch.spec.spec import Axis, Group, Permutations, PermutationSpec, Pin, Tap

__all__ = ["Axis", "Group", "PermutationSpec", "Permutations", "Pin", "Tap"]
