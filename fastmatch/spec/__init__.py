"""Structure: which axes of which parameters move together, and how tracing finds them."""

from fastmatch.spec.activation_sites import Site, SiteReader
from fastmatch.spec.axes import ActivationSite, Axis, Group, Permutations, Pin
from fastmatch.spec.running import Examples
from fastmatch.spec.spec import PermutationSpec

__all__ = [
    "ActivationSite",
    "Axis",
    "Examples",
    "Group",
    "PermutationSpec",
    "Permutations",
    "Pin",
    "Site",
    "SiteReader",
]
