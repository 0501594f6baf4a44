"""One entry an operation: what it takes, the checks, the custom op; :mod:`fastmatch.kernels.dispatch` names them all."""
