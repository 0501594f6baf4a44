"""Every operator moves with its operands as its rule says; see docs/operators.md."""

from __future__ import annotations

import pytest
import torch

from helpers.networks import fresh_seed
from helpers.operators import PAGE, TOLERANCE, UNTESTED, accepted, outcomes, page

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of operators that torch is about to change
]


@pytest.mark.parametrize("name", [name for name in accepted() if name not in UNTESTED])
def test_an_operator_moves_with_its_operands(name):
    found = outcomes(name, fresh_seed())
    assert not [o for o in found if o.failed]
    assert any(o.free for o in found), "no axis moved"
    assert max(o.error for o in found) < TOLERANCE


def test_the_page_of_operators_is_current():
    pinned = (PAGE.parents[1] / "constraints.txt").read_text().partition("torch==")[2].split()[0]
    if torch.__version__.partition("+")[0] != pinned:
        pytest.skip(f"the page lists the operators of torch {pinned}")
    assert PAGE.read_text() == page(), "write it again: PYTHONPATH=tests python -m helpers.operators"
