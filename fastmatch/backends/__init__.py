"""Run other libraries' matching on fastmatch.

``with fastmatch.backends.installed():`` (or ``fastmatch run script.py`` on the command line) replaces the assignment
solvers that published re-basin code calls, and restores them afterwards. Code that can be edited uses the adapters:
each module of this package covers one library and holds functions with that library's signatures and results.
"""

from fastmatch.backends.patching import LIBRARIES, Installed, installed
from fastmatch.backends.rebasin import which_rebasin

__all__ = ["LIBRARIES", "Installed", "installed", "which_rebasin"]
