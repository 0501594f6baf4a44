from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from fastmatch._internal.checks import check_choice, check_fraction, check_integer, check_number

Colour = Literal["red", "green"]


def test_what_fits_passes():
    check_choice("colour", "red", Colour)
    check_integer("count", 0)
    check_number("rate", 0.5)
    check_fraction("share", 1)


def test_numpy_scalars_are_numbers():
    check_integer("count", np.int64(3))
    check_number("rate", np.float32(1e-6))
    check_fraction("share", np.float64(0.5))


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (check_choice, ("nonsense", Colour), "option: expected one of 'red', 'green'; got 'nonsense'"),
        (check_choice, (None, Colour), "got None"),
        (check_choice, (["red"], Colour), "got \\['red'\\]"),
        (check_integer, (-5, 1), "option: expected a whole number of at least 1; got -5"),
        (check_integer, (True, 1), "got True"),
        (check_integer, (2.0, 1), "got 2.0"),
        (check_number, (float("nan"),), "option: expected a finite number of at least 0; got nan"),
        (check_number, (float("inf"),), "got inf"),
        (check_integer, (np.float64(2), 1), "expected a whole number"),
        (check_number, (10**400,), "expected a finite number of at least 0; got 1000"),
        (check_number, (True,), "got True"),
        (check_number, (np.bool_(True),), "expected a finite number"),
        (check_number, ("1",), "got '1'"),
        (check_fraction, (1.5,), "option: expected a number from 0 to 1; got 1.5"),
    ],
)
def test_what_does_not_is_named(check, arguments, message):
    with pytest.raises(ValueError, match=message):
        check("option", *arguments)


def test_exclusive_bounds():
    with pytest.raises(ValueError, match="above 0; got 0"):
        check_number("rate", 0, exclusive=True)
