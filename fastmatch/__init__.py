"""fastmatch: align, merge and renormalize wide networks of the same architecture."""

from fastmatch.spec import PermutationSpec

__all__ = ["PermutationSpec"]
