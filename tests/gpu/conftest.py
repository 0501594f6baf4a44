"""Every test here runs on a GPU: a real one, or a pretended one where there is none."""

from __future__ import annotations

import pytest

from helpers.pretended import gpus


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=gpus(), ids=lambda context: f"cuda:{context.keywords.get('index', 0)}")
def gpu(request):
    """A GPU that is not always the current one, and what crosses from it to the host."""
    with request.param() as found:
        yield found
