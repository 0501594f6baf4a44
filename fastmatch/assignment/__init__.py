"""The linear assignment problem, behind one interface."""

from fastmatch.assignment.lapjv import linear_sum_assignment

__all__ = ["linear_sum_assignment"]
