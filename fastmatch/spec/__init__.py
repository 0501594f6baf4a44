"""Which axes of which parameters move together, and how that is found."""

from fastmatch.spec.spec import ActivationSite, Axis, Group, Permutations, PermutationSpec, Pin

__all__ = ["ActivationSite", "Axis", "Group", "PermutationSpec", "Permutations", "Pin"]
