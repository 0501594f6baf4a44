"""Rules name arguments by schema: what they ask for exists, and arguments are bound as torch binds them."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from fastmatch.spec.operations import Call, bind
from fastmatch.spec.rules import RULES

ASKED = re.compile(r"""call(?:\[|\.get\(|\.dim\(len\(labels\), )"(\w+)["]""")


def overloads(name: str) -> list:
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


def test_every_rule_names_arguments_that_some_overload_has():
    """A misspelled name would only pin: the tracer takes a failing rule for an operation without one."""
    checked = 0
    for rule in set(RULES.values()):
        schemas = [f._schema for name, r in RULES.items() if r is rule for f in overloads(name)]
        known = {argument.name for schema in schemas for argument in schema.arguments}
        for argument in ASKED.findall(inspect.getsource(rule)):
            assert argument in known, f"{rule.__module__}.{rule.__name__}: {argument}"
            checked += 1
    assert checked > 50


def test_most_names_are_operations_of_torch():
    unknown = [name for name in RULES if not name.endswith("_") and not overloads(name)]
    assert len(unknown) <= 5, unknown  # those of other versions


@pytest.mark.parametrize(("function", "args", "kwargs", "expected"), [
    (torch.ops.aten.softmax.int, ("x", 1), {}, {"self": "x", "dim": 1, "dtype": None}),
    (torch.ops.aten.topk.default, ("x", 3), {"dim": 0}, {"self": "x", "k": 3, "dim": 0, "largest": True, "sorted": True}),
    (torch.ops.aten.sum.dim_IntList, ("x", [1]), {"dtype": "d"}, {"self": "x", "dim": [1], "keepdim": False, "dtype": "d"}),
    (torch.ops.aten.roll.default, ("x", [1]), {}, {"self": "x", "shifts": [1], "dims": []}),
])  # fmt: skip
def test_arguments_are_bound_by_schema_name(function, args, kwargs, expected):
    bound = bind(function, args, kwargs)
    assert bound == expected
    assert list(bound) == list(expected)


def test_a_call_gives_arguments_and_tensors_in_order():
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    call = Call(0, "aten.linear", bind(torch.ops.aten.linear.default, (x, weight), {}), torch.zeros(2, 4))
    assert call.base == "linear"
    assert call.first is x
    assert [id(t) for t in call.inputs] == [id(x), id(weight)]
    assert call["bias"] is None
    assert call.get("dim") is None
    assert call.position("weight") == 1
    with pytest.raises(KeyError):
        call["dim"]
