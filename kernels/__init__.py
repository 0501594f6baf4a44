"""Compute kernels of fastmatch, by operation: a torch reference, CPU twins, Triton kernels.

Imported as ``fastmatch.kernels``; imports nothing from the rest of the package.
"""

if __name__ != "fastmatch.kernels":
    # A top-level `kernels` would shadow another project's package of that name, and would give two
    # copies of every compiled function.
    raise ImportError(f"import this package as fastmatch.kernels, not {__name__}")
