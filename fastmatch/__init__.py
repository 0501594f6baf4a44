"""fastmatch: align, merge and renormalize wide networks of the same architecture.

The public names are listed by task in ``__init__.pyi``. Each is loaded on first use, so ``import fastmatch`` is quick.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
