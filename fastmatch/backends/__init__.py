"""Other libraries' matching on this engine: patches for code that is not edited, adapters for code that is.

``with fastmatch.backends.installed():`` (and ``python -m fastmatch.backends run script.py``) replaces the
assignment solvers that re-basin code calls, and undoes itself. The modules beside this one, one a library,
hold functions with that library's own signatures and results.
"""

from fastmatch.backends.patching import LIBRARIES, Installed, installed
from fastmatch.backends.rebasin import which_rebasin

__all__ = ["LIBRARIES", "Installed", "installed", "which_rebasin"]
