"""A plugin of pytest: another project's tests run with our solvers installed, and the calls that these answer are counted.

python -m pytest -p helpers.solving_for_others --pyargs scipy.optimize.tests.test_linear_assignment
"""

from __future__ import annotations

import fastmatch.backends
import fastmatch.backends.patch_target
import fastmatch.backends.scipy

CONTEXT = fastmatch.backends.installed()
ANSWERED = "calls answered by fastmatch:"
answered = 0


def counted(solve):
    def wrapper(*args, **options):
        global answered
        found = solve(*args, **options)  # an error is the original's to answer
        answered += 1
        return found

    return wrapper


def pytest_configure(config):
    fastmatch.backends.patch_target.LEAST_SIZE = 0
    fastmatch.backends.scipy.solve = counted(fastmatch.backends.scipy.solve)
    CONTEXT.__enter__()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{ANSWERED} {answered}")


def pytest_unconfigure(config):
    CONTEXT.__exit__(None, None, None)
