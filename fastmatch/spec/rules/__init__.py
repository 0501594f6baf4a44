"""What each ATen operation does to the labels of its operands: one rule per operation.

A rule reads the labels of the inputs, unites what the operation makes equal, and gives the outputs their labels.
An operation without a rule pins every axis that reaches it. To add a rule, write
``@rule("name") def _name(record, call)`` in the module of its kind and read arguments by schema name,
``call["weight"]``.
"""

from fastmatch.spec.rules import (
    attention,
    convolution,
    elementwise,
    indexing,
    joining,
    matmul,
    matrices,
    norms,
    pooling,
    recurrent,
    reduction,
    shape,
    sorting,
)
from fastmatch.spec.rules.registry import RULES, rule_of

__all__ = [
    "RULES",
    "attention",
    "convolution",
    "elementwise",
    "indexing",
    "joining",
    "matmul",
    "matrices",
    "norms",
    "pooling",
    "recurrent",
    "reduction",
    "rule_of",
    "shape",
    "sorting",
]
"""Importing a module of rules registers them."""
