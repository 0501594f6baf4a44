"""The linear assignment problem: exact, with a certificate."""

from fastmatch.assignment.certificate import certificate
from fastmatch.assignment.result import Assignment
from fastmatch.assignment.solve import METHODS, linear_sum_assignment, select_method, solve

__all__ = ["METHODS", "Assignment", "certificate", "linear_sum_assignment", "select_method", "solve"]
